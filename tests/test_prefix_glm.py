"""Is a GLM's prefix seen by all that stands behind it, counted nowhere, and the same with a cache and without?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import gmask
from conftest import MASK, PAD, SOP
from gmask.checkpoints.adapters import save_adapter
from gmask.errors import GmaskError
from gmask.generation.encoding import TextReader
from gmask.generation.engine import Engine, Request
from gmask.generation.settings import Sampling
from gmask.models.base import attach_prefix
from gmask.models.glm import GLMForConditionalGeneration
from tiny_folder import make_folder
from tuning import IDS, LABELS, build_glm_of

REAL = (IDS != PAD).long()
TEXTS = ("The old man took [MASK] and went.", "It was [MASK] day, and the [MASK] season was over. 我今天去[gMASK]")
Build = Callable[..., GLMForConditionalGeneration]


@pytest.fixture(params=[False, True], ids=["table", "projection"])
def model(request: pytest.FixtureRequest) -> GLMForConditionalGeneration:
    return build_glm_of(pre_seq_len=3, prefix_projection=request.param)


def learn(model: GLMForConditionalGeneration, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of the prefix while the rest is frozen."""
    model.requires_grad_(False).train()
    prefix = model.glm.prefix_encoder.requires_grad_(True)
    prefix.zero_grad()
    loss = model(IDS, attention_mask=REAL, labels=LABELS, **inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in prefix.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_prefix_through_checkpoints_unchanged(model, reentrant: bool) -> None:
    loss, gradients = learn(model, use_cache=False)
    assert all((gradient != 0).any() for gradient in gradients.values())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again, recomputed = learn(model, use_cache=False)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(recomputed, gradients)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_is_a_cache_that_was_there_before_the_text(build_glm: Build, attention: str) -> None:
    """The plain twin: keys and values put into an ordinary cache by hand, and the layout of the text alone."""
    model = build_glm(pre_seq_len=3, attn_implementation=attention)
    plain = build_glm(attn_implementation=attention)
    own = model.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    pairs = model.glm.prefix_encoder().unflatten(0, (-1, 2))
    cache = DynamicCache([(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1)) for key, value in pairs])
    layout = model.read_prompt_layout(IDS, REAL)
    mask = torch.nn.functional.pad(REAL, (3, 0), value=1)
    expected = plain(IDS, layout=layout, attention_mask=mask, past_key_values=cache).logits
    found = model(IDS, attention_mask=REAL).logits
    assert torch.allclose(found[REAL.bool()], expected[REAL.bool()], atol=2e-5)
    assert not torch.allclose(found, plain(IDS, attention_mask=REAL).logits, atol=1e-2), "the prefix must be seen"


@torch.no_grad()
def test_a_cache_is_begun_with_the_prefix(model) -> None:
    whole = model(IDS[:1], use_cache=False).logits
    cache, length = DynamicCache(config=model.config), 5
    begun = model(IDS[:1, :length], past_key_values=cache)
    assert cache.get_seq_length() == 3 + length
    layout = model.read_prompt_layout(IDS[:1], None)[:, :, length:]
    rest = model(IDS[:1, length:], layout=layout, past_key_values=cache)
    assert torch.allclose(torch.cat((begun.logits, rest.logits), dim=1), whole, atol=2e-5)


@torch.no_grad()
def test_packed_sequences_all_see_the_prefix(model) -> None:
    alone = [model(row[real.bool()][None]).logits[0] for row, real in zip(IDS, REAL, strict=True)]
    sequence_ids = torch.repeat_interleave(torch.arange(2), REAL.sum(-1))[None]
    logits = model(IDS[REAL.bool()][None], sequence_ids=sequence_ids).logits[0]
    assert torch.allclose(logits, torch.cat(alone), atol=2e-5)


@torch.no_grad()
def test_padding_hides_no_part_of_the_prefix(model) -> None:
    padded = torch.tensor([[PAD, PAD, 40, MASK, 23, SOP], [20, 21, MASK, 22, 24, SOP]])
    mask = (padded != PAD).long()
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    alone = model.generate(padded[:1, 2:], **settings)[0, 4:]
    for caching in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}):
        batch = model.generate(padded, attention_mask=mask, **settings, **caching)
        expected = model.generate(padded[:1, 2:], **settings, **caching)[0, 4:] if "num_beams" in caching else alone
        assert torch.equal(batch[0, 6:], expected), caching


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory):
    """A model with a tokenizer and a prefix, loaded from folders as a user would."""
    folder = make_folder(tmp_path_factory.mktemp("prefix") / "model")
    model, _ = gmask.load(folder, device="cpu")
    torch.manual_seed(5)
    encoder = attach_prefix(model, 4, projection=False)
    torch.nn.init.normal_(encoder.embedding.weight)
    save_adapter(model, folder.with_name("adapter"), base=str(folder))
    return gmask.load(folder, device="cpu", adapter=folder.with_name("adapter"))


def uncached_answer(model, context, *, tokens: int) -> list[int]:
    """The greedy answer to the first blank, where every step reads the whole text anew."""
    special = (model.config.eop_token_id, model.config.eos_token_id)
    banned = [*range(440, 448), *(i for i in range(10) if i not in special)]
    ids, answer = [*context.ids, model.config.sop_token_id], []
    place = [[*range(len(context.ids)), context.blanks[0]], [0] * len(context.ids) + [1]]
    for step in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), layout=torch.tensor([place]), use_cache=False).logits[0, -1]
        logits[banned] = -torch.inf
        if step == 0:
            logits[list(special)] = -torch.inf
        token = int(logits.argmax())
        if token in special:
            break
        answer.append(token)
        ids.append(token)
        place[0].append(context.blanks[0])
        place[1].append(step + 2)
    return answer


def test_infill_and_the_engine_write_what_the_whole_text_gives_without_a_cache(tuned) -> None:
    model, tokenizer = tuned
    contexts = [TextReader(tokenizer).read(text).context for text in TEXTS]
    expected = [uncached_answer(model, context, tokens=6) for context in contexts]
    together = gmask.infill(model, tokenizer, list(TEXTS), max_tokens=6)
    alone = [gmask.infill(model, tokenizer, text, max_tokens=6) for text in TEXTS]
    engine = Engine(model, tokenizer, max_rows=4)
    try:
        tickets = [engine.submit(Request(context=one, sampling=Sampling(max_tokens=6))) for one in contexts]
        rows = [ticket.wait(60)[0] for ticket in tickets]
    finally:
        engine.close(drain=False)
    for index, ids in enumerate(expected):
        assert list(rows[index].done[0].ids) == ids
        assert [token.id for token in together[index].blanks[0].tokens] == ids
        assert together[index].text == alone[index].text


def test_scores_are_those_of_the_whole_text_without_a_cache(tuned) -> None:
    model, tokenizer = tuned
    text, answers = "The old man took his dog and went [MASK] the river.", ["down to", "sunny"]
    scoring = gmask.score(model, tokenizer, text, answers)
    context = TextReader(tokenizer).read(text).context
    for answer, scored in zip(answers, scoring.answers, strict=True):
        ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        row = torch.tensor([[*context.ids, model.config.sop_token_id, *ids]])
        with torch.no_grad():
            logprobs = model(row).logits[0].log_softmax(-1)
        first = len(context.ids)
        expected = sum(float(logprobs[first + place, token]) for place, token in enumerate(ids))
        assert scored.logprob == pytest.approx(expected, abs=1e-4)


def test_a_text_may_be_as_long_as_the_model_has_positions(tuned) -> None:
    model, _ = tuned
    length = model.config.max_position_embeddings
    ids = torch.full((1, length - 1), 20)
    ids[0, 3] = model.config.mask_token_id
    row = torch.cat((ids, torch.tensor([[model.config.sop_token_id]])), dim=-1)
    assert model(row).logits.shape[1] == length, "the prefix takes no place"


def test_a_whole_model_with_its_prefix_is_saved_and_loaded(tuned, tmp_path: Path) -> None:
    model, tokenizer = tuned
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = gmask.load(tmp_path, device="cpu")
    through = GLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[20, 21, model.config.mask_token_id, model.config.sop_token_id, 30]])
    with torch.no_grad():
        for one in (again, through):
            assert torch.equal(one(ids).logits, model(ids).logits)


def test_a_prefix_is_not_divided_among_processes() -> None:
    model = build_glm_of(pre_seq_len=2)
    with pytest.raises(GmaskError, match="prefix is not divided"):
        from transformers.distributed import DistributedConfig

        type(model).maybe_distribute_model(model, DistributedConfig(tp_size=1))
