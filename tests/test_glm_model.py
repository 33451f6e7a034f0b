"""Is the model a sound transformers model: packing, loss, gradients, saving, loading, limits?"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from conftest import EOP, GMASK, MASK, ORDINARY, PAD, SOP
from gmask.errors import GmaskError
from gmask.infilling.blanks import BlankTokens, InfillingExample, blank_out
from gmask.infilling.collator import collate
from gmask.models.generate import summed_loss
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration, GLMModel

SPECIAL = BlankTokens(mask=MASK, smask=6, gmask=GMASK, sop=SOP, eop=EOP, pad=PAD, cls=2, eos=1)
BuildGLM = Callable[..., GLMForConditionalGeneration]


def make_examples() -> list[InfillingExample]:
    """Four texts of different length with two blanks each, answered in either order."""
    rng = np.random.default_rng(0)
    examples = []
    for length in (12, 9, 15, 7):
        tokens = rng.choice(ORDINARY, length)
        spans = np.array([[1, 3], [5, 6]])
        examples.append(
            blank_out(tokens, spans, mask=MASK, special=SPECIAL, objective="token", order=rng.permutation(2))
        )
    return examples


@pytest.fixture
def packed() -> dict[str, Tensor]:
    """Four sequences in two padded rows."""
    first, second, third, fourth = make_examples()
    return collate([[first, second], [third, fourth]], row_length=40, pad_id=PAD)


@pytest.fixture
def separate() -> list[dict[str, Tensor]]:
    return [collate([[example]], row_length=None, pad_id=PAD) for example in make_examples()]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    model.zero_grad()
    return found


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, atol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.allclose(ours[name], theirs[name], atol=atol)} == set()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_give_what_they_give_alone(
    build_glm: BuildGLM, attention: str, packed: dict[str, Tensor], separate: list[dict[str, Tensor]]
) -> None:
    model = build_glm(attn_implementation=attention)
    together = model(**packed)
    together.loss.backward()
    packed_gradients = gradients(model)

    outputs = [model(**row) for row in separate]
    alone = torch.cat([output.logits[0] for output in outputs])
    assert torch.allclose(together.logits[packed["sequence_ids"] >= 0], alone, atol=1e-4)

    counts = [int((row["labels"] != -100).sum()) for row in separate]
    loss = sum(output.loss * count for output, count in zip(outputs, counts, strict=True)) / sum(counts)
    assert torch.allclose(together.loss, loss, atol=1e-5)
    loss.backward()
    assert_close(packed_gradients, gradients(model))


def test_padding_is_finite(build_glm: BuildGLM, packed: dict[str, Tensor]) -> None:
    for attention in ("eager", "sdpa"):
        assert build_glm(attn_implementation=attention)(**packed).logits.isfinite().all()


def test_the_head_at_labels_alone_gives_the_same_loss(build_glm: BuildGLM, packed: dict[str, Tensor]) -> None:
    model = build_glm()
    output = model(**packed)
    output.loss.backward()
    expected = gradients(model)
    losses = model.token_losses(**packed)
    assert losses.shape == ((packed["labels"] != -100).sum(),)
    assert losses.dtype == torch.float32
    by_hand = -output.logits.log_softmax(-1).gather(-1, packed["labels"].clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(losses, by_hand[packed["labels"] != -100], atol=1e-5)
    assert torch.allclose(losses.mean(), output.loss, atol=1e-6)
    losses.mean().backward()
    assert_close(expected, gradients(model))


@pytest.mark.parametrize("chunk", [None, 3, 1000])
def test_a_loss_in_chunks_is_the_loss_of_the_whole(
    build_glm: BuildGLM, packed: dict[str, Tensor], chunk: int | None
) -> None:
    model = build_glm()
    whole = model(**packed, num_items_in_batch=1)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    found = model(**packed, num_items_in_batch=1, skip_logits=True, loss_chunk=chunk)
    assert found.logits is None
    assert float(found.loss.detach()) == pytest.approx(float(whole.loss.detach()), rel=1e-6)
    found.loss.backward()
    ours = gradients(model)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).abs().max()) <= 1e-6 * largest, name


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def test_a_loss_in_chunks_never_holds_all_logits() -> None:
    rows, width, vocabulary, chunk = 200, 8, 4000, 16
    head = torch.nn.Linear(width, vocabulary, bias=False)
    states = torch.randn(4, rows // 4, width, requires_grad=True)
    targets = torch.randint(vocabulary, (4, rows // 4))
    largest = {}
    for size in (None, chunk):
        with LargestTensor() as seen:
            summed_loss(head, states, targets, chunk=size).backward()
        largest[size] = seen.elements
    assert largest[None] == rows * vocabulary
    assert largest[chunk] == chunk * vocabulary


def test_the_loss_ignores_the_padding_id_and_divides_as_told(build_glm: BuildGLM, packed: dict[str, Tensor]) -> None:
    model = build_glm()
    expected = model(**packed).loss
    as_published = {**packed, "labels": packed["labels"].masked_fill(packed["labels"] == -100, PAD)}
    assert torch.equal(model(**as_published).loss, expected)
    count = int((packed["labels"] != -100).sum())
    assert torch.allclose(model(**packed, num_items_in_batch=2 * count).loss, expected / 2)


@pytest.mark.parametrize("name", ["embedding_dropout", "attention_dropout", "hidden_dropout"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_dropout_works_in_training_only(
    build_glm: BuildGLM, packed: dict[str, Tensor], attention: str, name: str
) -> None:
    off = dict(embedding_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0)
    model = build_glm(attn_implementation=attention, **{**off, name: 0.5})
    assert torch.equal(model(**packed).loss, model(**packed).loss)
    model.train()
    assert not torch.equal(model(**packed).loss, model(**packed).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    build_glm: BuildGLM, packed: dict[str, Tensor], reentrant: bool
) -> None:
    dropout = dict(embedding_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0)
    model = build_glm(**dropout).train()
    runs = []
    model.glm.transformer.layers[0].attention.register_forward_hook(lambda *_: runs.append(1))
    model(**packed).loss.backward()
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model(**packed).loss.backward()
    assert len(runs) == 1 + 2  # the second forward is computed again for its backward
    assert_close(gradients(model), expected, atol=1e-6)


def test_eager_and_sdpa_agree(build_glm: BuildGLM, packed: dict[str, Tensor]) -> None:
    eager, sdpa = (build_glm(attn_implementation=name)(**packed) for name in ("eager", "sdpa"))
    assert torch.allclose(eager.logits, sdpa.logits, atol=1e-4)


def test_attention_weights_stay_within_the_visible_keys(build_glm: BuildGLM, separate: list[dict[str, Tensor]]) -> None:
    row = separate[0]
    weights = build_glm(attn_implementation="eager")(**row, output_attentions=True).attentions
    answer_place = row["layout"][0, 1]
    place = torch.arange(len(answer_place))
    visible = (answer_place == 0) | ((answer_place[:, None] > 0) & (place <= place[:, None]))
    assert len(weights) == 2
    for layer in weights:  # B N T K
        assert torch.allclose(layer.sum(-1), torch.ones(()))
        assert bool((layer[0, :, ~visible] == 0).all())
        assert bool((layer[0, :, visible] > 0).all())


def test_only_the_wanted_logits_are_computed(build_glm: BuildGLM, separate: list[dict[str, Tensor]]) -> None:
    model, ids = build_glm(), separate[0]["input_ids"]
    logits = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=1).logits, logits[:, -1:], atol=1e-5)
    assert torch.allclose(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, logits[:, [2, 5]], atol=1e-5)


def test_the_head_is_tied_and_saved_once(build_glm: BuildGLM, tmp_path: Path) -> None:
    model = build_glm()
    assert model.lm_head.weight is model.glm.word_embeddings.weight
    assert model.get_output_embeddings() is model.lm_head
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert saved == {name for name in model.state_dict() if name != "lm_head.weight"}

    ids = torch.tensor([[2, 20, MASK, SOP]])
    loaded, report = GLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.lm_head.weight is loaded.glm.word_embeddings.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    settings = {key: value for key, value in model.config.to_dict().items() if key in GLMConfig.__annotations__}
    assert settings == {key: loaded.config.to_dict()[key] for key in settings}


def test_a_resized_vocabulary_stays_tied(build_glm: BuildGLM, tmp_path: Path) -> None:
    model = build_glm(seed=4)
    ids = torch.tensor([[2, 20, MASK, SOP]])
    expected = model(ids).logits
    model.resize_token_embeddings(64, mean_resizing=False)
    assert model.lm_head.weight is model.glm.word_embeddings.weight
    assert model.lm_head.out_features == model.config.vocab_size == 64
    assert torch.allclose(model(ids).logits[..., :48], expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(GLMForConditionalGeneration.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("target", [GLMForConditionalGeneration, GLMModel])
@pytest.mark.parametrize("prefix", ["", "glm."], ids=["bare", "prefixed"])
def test_keys_load_with_and_without_their_prefix(
    build_glm: BuildGLM, tmp_path: Path, prefix: str, target: type[PreTrainedModel]
) -> None:
    model = build_glm()
    weights = {f"{prefix}{name}": value for name, value in model.glm.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path)
    loaded, report = target.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.tensor([[2, 20, MASK, SOP]])
    with torch.no_grad():
        base = loaded if target is GLMModel else loaded.glm
        assert torch.equal(base(ids).last_hidden_state, model.glm(ids).last_hidden_state)


def test_a_missing_weight_is_an_error_that_names_it(build_glm: BuildGLM, tmp_path: Path) -> None:
    build_glm().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["glm.transformer.final_layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(GmaskError, match=r"lack transformer\.final_layernorm\.bias;"):
        GLMForConditionalGeneration.from_pretrained(tmp_path)


def test_published_names_configure_it() -> None:
    published = dict(
        num_layers=3,
        max_sequence_length=77,
        embedding_dropout_prob=0.2,
        attention_dropout_prob=0.3,
        output_dropout_prob=0.4,
    )
    config = GLMConfig(**published, hidden_size=32, num_attention_heads=4)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (3, 77)
    assert (config.embedding_dropout, config.attention_dropout, config.hidden_dropout) == (0.2, 0.3, 0.4)
    assert (config.num_layers, config.head_dim, config.intermediate_size) == (3, 8, 128)
    with pytest.raises(ValueError, match="hidden_size 30 is not a multiple of num_attention_heads 4"):
        GLMConfig(hidden_size=30, num_attention_heads=4)


def test_weights_start_as_published(build_glm: BuildGLM) -> None:
    model = build_glm(hidden_size=128, num_hidden_layers=8, initializer_range=0.02)
    scaled = 0.02 / math.sqrt(2 * 8)  # what is added to the residual stream
    for name, weight in model.named_parameters():
        if "layernorm" in name and name.endswith("weight"):
            assert bool((weight == 1).all()), name
        elif name.endswith("bias"):
            assert bool((weight == 0).all()), name
        else:
            std = scaled if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) else 0.02
            error = 5 * std / math.sqrt(2 * weight.numel())  # five standard errors
            assert abs(weight.std().item() - std) < error, name
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_trains_and_generates(build_glm: BuildGLM, packed: dict[str, Tensor], attention: str) -> None:
    model = build_glm(attn_implementation=attention)
    full = model(**packed)
    model.to(torch.bfloat16)
    half = model(**packed)
    assert half.logits.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    assert abs(half.loss.item() - full.loss.item()) < 0.05 * full.loss.item()
    half.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    ids = torch.tensor([[2, 20, MASK, SOP]])
    for options in ({}, {"cache_implementation": "static"}):
        assert model.generate(ids, max_new_tokens=4, do_sample=False, **options).shape == (1, 8)


def test_more_tokens_than_positions_is_an_error_with_both_counts(build_glm: BuildGLM) -> None:
    model = build_glm(max_position_embeddings=8)  # tables of nine rows
    fits = torch.tensor([[2, *[20] * 7, MASK]])
    assert model(fits).logits.shape == (1, 9, 48)
    for too_long in ([2, *[20] * 8, MASK], [2, MASK, SOP, *[20] * 9]):
        with pytest.raises(ValueError, match=r"position (9|10) is beyond the 9 positions"):
            model(torch.tensor([too_long]))


WRONG_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({}, "exactly one of input_ids and inputs_embeds"),
    "ids and embeddings": (
        {"input_ids": torch.tensor([[2, MASK]]), "inputs_embeds": torch.zeros(1, 2, 32)},
        "exactly one of input_ids and inputs_embeds",
    ),
    "embeddings alone": ({"inputs_embeds": torch.zeros(1, 2, 32)}, "pass layout"),
    "no blank": ({"input_ids": torch.tensor([[2, 20, SOP]])}, "put the blank into the context"),
    "a mask of three dimensions": (
        {"input_ids": torch.tensor([[2, MASK]]), "attention_mask": torch.ones(1, 2, 2)},
        "3 dimensions",
    ),
    "a paged cache": ({"input_ids": torch.tensor([[2, MASK]]), "cache": object()}, "continuous batching"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_an_error_that_says_so(build_glm: BuildGLM, name: str) -> None:
    arguments, message = WRONG_CALLS[name]
    with pytest.raises(ValueError, match=message):
        build_glm()(**arguments)


def test_ids_without_a_meaning_need_a_layout(build_glm: BuildGLM) -> None:
    known = build_glm()
    unknown = build_glm(mask_token_id=None, smask_token_id=None, gmask_token_id=None)
    ids, layout = torch.tensor([[2, MASK, SOP]]), torch.tensor([[[0, 1, 1], [0, 0, 1]]])
    with pytest.raises(ValueError, match="no sop_token_id or blank ids"):
        unknown(ids)
    assert torch.equal(unknown(ids, layout=layout).logits, known(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_its_rows_give_alone(build_glm: BuildGLM, side: str) -> None:
    model = build_glm()
    short, long = [2, 20, MASK, SOP, 30], [2, 21, MASK, 22, 23, MASK, SOP, 31, SOP]
    padding = [PAD] * (len(long) - len(short))
    ids = torch.tensor([padding + short if side == "left" else short + padding, long])
    columns = slice(len(padding), None) if side == "left" else slice(len(short))
    mask = torch.zeros_like(ids)
    mask[0, columns] = 1
    mask[1] = 1
    logits = model(ids, attention_mask=mask).logits
    assert torch.allclose(logits[0, columns], model(torch.tensor([short])).logits[0], atol=1e-5)
    assert torch.allclose(logits[1], model(torch.tensor([long])).logits[0], atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cached_prefix_is_seen_by_all_and_takes_no_place(build_glm: BuildGLM, attention: str) -> None:
    """Prefix tuning: keys and values that stand for no token, counted by the padding mask or not."""
    model = build_glm(attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 4, 3, 8, generator=generator)  # of two layers: N K D

    def run(prompts: list[list[int]], *, counted: bool) -> Tensor:
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = (ids != PAD).long()
        prefix = DynamicCache(config=model.config)
        for layer in range(2):
            shape = (len(prompts), -1, -1, -1)
            prefix.update(keys[layer].expand(shape), values[layer].expand(shape), layer)
        if counted:
            mask = torch.cat((mask.new_ones(len(ids), 3), mask), dim=1)
        return model(ids, attention_mask=mask, past_key_values=prefix).logits

    short, long = [2, MASK, SOP, 30], [2, 20, MASK, 21, 22, SOP]
    uncounted = run([short, long], counted=False)
    assert torch.equal(uncounted, run([short, long], counted=True))
    assert torch.allclose(uncounted[0, -len(short) :], run([short], counted=True)[0], atol=1e-5)
    without = model(torch.tensor([long])).logits[0]
    assert bool((uncounted[1] - without).abs().amax(-1).gt(1e-2).all())


def test_cached_tokens_need_a_layout(build_glm: BuildGLM) -> None:
    model, ids = build_glm(), torch.tensor([[2, MASK, SOP, 20]])
    past = model(ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="continue a cached answer"):
        model(ids[:, 3:], past_key_values=past)
    layout = torch.tensor([[[1], [2]]])
    step = model(ids[:, 3:], past_key_values=past, layout=layout).logits
    assert torch.allclose(step, model(ids).logits[:, 3:], atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_context_without_padding_is_read_without_a_mask(
    build_glm: BuildGLM, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_glm(attn_implementation=attention)
    masks = []
    model.glm.transformer.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    context = torch.tensor([[16, 17, MASK, 18]])
    with torch.no_grad():
        bare = model(context).logits
        model(context, torch.ones_like(context))
        model(torch.cat((context, torch.tensor([[SOP]])), dim=1))
        model(context, torch.tensor([[0, 1, 1, 1]]))
        assert [mask is None for mask in masks] == [True, True, False, False]
        monkeypatch.setattr("gmask.models.layout._drop_idle", lambda mask: mask)
        assert torch.equal(model(context).logits, bare)
