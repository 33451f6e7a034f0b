"""Does every model class do what transformers' common tests ask of a model?

Restated from ``tests/test_modeling_common.py`` and ``tests/generation/test_utils.py`` of transformers, whose package
leaves them out. What cannot hold is refused below, and listed in docs/explanation/differences.md.
"""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import GMASK, MASK, PAD, SHAPE, SOP, SPECIAL
from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMModel
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration, GLMModel
from gmask.models.glm_heads import (
    GLMForMultipleChoice,
    GLMForMultiTokenCloze,
    GLMForSequenceClassification,
    GLMForSingleTokenCloze,
)
from test_glm_heads import inputs_of

LANGUAGE_MODELS = [GLMForConditionalGeneration, ChatGLMForConditionalGeneration]
READERS = [GLMModel, ChatGLMModel, *LANGUAGE_MODELS, GLMForSequenceClassification]
CHOOSERS = [GLMForMultipleChoice, GLMForMultiTokenCloze, GLMForSingleTokenCloze]
CLASSES = [*READERS, *CHOOSERS]
CHAT = dict(pad_token_id=PAD, bos_token_id=SOP, eos_token_id=9, mask_token_id=MASK, gmask_token_id=GMASK)
ROWS = [[16, 17, MASK, 18, GMASK, SOP, 20], [30, GMASK, SOP, 31, 32, 33, 34], [40, 41, 42, 43, 44, GMASK, SOP]]


def build(model_class: type[PreTrainedModel], *, attention: str = "sdpa", seed: int = 0, **settings: Any) -> Any:
    """A tiny model with random weights, in evaluation mode."""
    if model_class.config_class is ChatGLMConfig:
        config: Any = ChatGLMConfig(**{**SHAPE, "intermediate_size": 64, **CHAT, **settings})
    else:
        config = GLMConfig(**{**SHAPE, **SPECIAL, **settings})
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def inputs_for(model_class: type[PreTrainedModel], rows: list[list[int]] = ROWS) -> dict[str, Any]:
    """What a class reads; the heads that choose take one text."""
    if model_class in CHOOSERS:
        return {name: value for name, value in inputs_of(model_class).items() if name != "labels"}
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def first(outputs: Any) -> Tensor:
    """Logits, or the final hidden states of a model without a head."""
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


each_class = pytest.mark.parametrize("model_class", CLASSES)
each_reader = pytest.mark.parametrize("model_class", READERS)
each_language_model = pytest.mark.parametrize("model_class", LANGUAGE_MODELS)


@each_class
@torch.no_grad()
def test_it_is_the_same_after_every_way_of_storing_it(model_class: type[PreTrainedModel], tmp_path: Path) -> None:
    model, inputs = build(model_class), inputs_for(model_class)
    expected = first(model(**inputs))
    assert torch.equal(first(model(**inputs)), expected)
    model.save_pretrained(tmp_path)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    ways = {
        "from_pretrained": model_class.from_pretrained(tmp_path),
        "deepcopy": copy.deepcopy(model),
        "torch.save": torch.load(buffer, weights_only=False),
        "state_dict": build(model_class, seed=1),
    }
    ways["state_dict"].load_state_dict(model.state_dict())
    for way, again in ways.items():
        assert torch.equal(first(again.eval()(**inputs)), expected), way
    assert ways["from_pretrained"].config.to_diff_dict() == model.config.to_diff_dict()
    for dtype in (torch.bfloat16, "bfloat16"):
        assert model_class.from_pretrained(tmp_path, dtype=dtype).dtype == torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert model_class.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert model_class.from_pretrained(tmp_path).dtype == torch.float32


@each_class
@torch.no_grad()
def test_the_vocabulary_can_grow_and_shrink(model_class: type[PreTrainedModel], tmp_path: Path) -> None:
    model, inputs = build(model_class), inputs_for(model_class)
    words, before = model.get_input_embeddings().weight.clone(), first(model(**inputs))
    size = len(words)
    for count in (size + 10, size - 1):
        model.resize_token_embeddings(count)
        assert model.config.vocab_size == count
        table = model.get_input_embeddings().weight
        assert table.shape[0] == count
        assert torch.equal(table[: size - 1], words[: size - 1])
        head = model.get_output_embeddings()
        assert head is None or (head.weight is table and head.out_features == count)
        after = first(model(**inputs))
        if model_class not in CHOOSERS:  # whose scores have the whole vocabulary below the line
            kept = min(before.shape[-1], after.shape[-1])
            assert torch.allclose(after[..., :kept], before[..., :kept], atol=1e-5)
        model.save_pretrained(tmp_path)
        assert torch.equal(first(model_class.from_pretrained(tmp_path).eval()(**inputs)), after)
    assert len(model.resize_token_embeddings(size, pad_to_multiple_of=64).weight) == 64
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(words))
    assert torch.equal(model.get_input_embeddings().weight, words)


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
@torch.no_grad()
def test_an_untied_head_grows_too(model_class: type[PreTrainedModel], tmp_path: Path) -> None:
    model = build(model_class, tie_word_embeddings=False)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.resize_token_embeddings(60)
    assert model.lm_head.weight.shape[0] == model(**inputs_for(model_class)).logits.shape[-1] == 60
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert again.lm_head.weight is not again.get_input_embeddings().weight


@each_class
def test_hidden_states_and_attentions_are_given_and_keep_gradients(model_class: type[PreTrainedModel]) -> None:
    model, inputs = build(model_class, attention="eager"), inputs_for(model_class)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert (len(outputs.hidden_states), len(outputs.attentions)) == (3, 2)
    rows, width = outputs.hidden_states[0].shape[:2]
    assert {state.shape for state in outputs.hidden_states} == {(rows, width, 32)}
    assert {weights.shape for weights in outputs.attentions} == {(rows, 4, width, width)}
    assert torch.allclose(outputs.attentions[0].sum(-1), torch.ones(1), atol=1e-5)
    for kept in (outputs.hidden_states[0], outputs.attentions[0]):
        kept.retain_grad()
    first(outputs).sum().backward()
    assert outputs.hidden_states[0].grad is not None
    assert outputs.attentions[0].grad is not None
    plain = model(**inputs)
    assert plain.get("hidden_states") is None
    assert plain.get("attentions") is None
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 3


@each_class
@torch.no_grad()
def test_a_tuple_holds_what_a_named_output_holds(model_class: type[PreTrainedModel]) -> None:
    model, inputs = build(model_class), inputs_for(model_class)
    for extra in ({}, {"output_hidden_states": True}):
        named = model(**inputs, use_cache=False, **extra)
        plain = model(**inputs, use_cache=False, return_dict=False, **extra)
        assert isinstance(plain, tuple)
        assert len(plain) == len(named.to_tuple())
        assert torch.equal(plain[0], named.to_tuple()[0])


@each_class
@torch.no_grad()
def test_eager_attention_gives_what_sdpa_gives(model_class: type[PreTrainedModel]) -> None:
    inputs = inputs_for(model_class, [*ROWS, ROWS[1][:3]])
    eager, sdpa = (build(model_class, attention=name) for name in ("eager", "sdpa"))
    expected = first(eager(**inputs))
    assert torch.allclose(first(sdpa(**inputs)), expected, atol=1e-4)
    sdpa.set_attn_implementation("eager")
    assert torch.equal(first(sdpa(**inputs)), expected)


@each_reader
@torch.no_grad()
def test_a_batch_gives_what_its_rows_give(model_class: type[PreTrainedModel]) -> None:
    model, rows = build(model_class), [*ROWS, ROWS[1][:4]]
    together = first(model(**inputs_for(model_class, rows)))
    for index, row in enumerate(rows):
        alone = first(model(**inputs_for(model_class, [row])))[0]
        of_batch = together[index] if alone.ndim == 1 else together[index, -len(row) :]
        assert torch.allclose(of_batch, alone, atol=1e-4)


@each_reader
@torch.no_grad()
def test_embeddings_with_a_layout_give_what_ids_give(model_class: type[PreTrainedModel]) -> None:
    model, inputs = build(model_class), inputs_for(model_class)
    ids = inputs.pop("input_ids")
    embedded = model.get_input_embeddings()(ids)
    body = model.base_model
    layout = body._read_layout(ids, None, None, None)
    assert torch.equal(
        first(model(inputs_embeds=embedded, layout=layout, **inputs)), first(model(input_ids=ids, **inputs))
    )
    with pytest.raises(ValueError, match="carry no layout"):
        model(inputs_embeds=embedded)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=embedded)


@each_reader
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(model_class: type[PreTrainedModel], reentrant: bool) -> None:
    model, inputs = build(model_class).train(), inputs_for(model_class)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.base_model.config.attention_dropout = 0.0
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            assert model.is_activation_checkpointing
        first(model(**inputs)).square().mean().backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        model.zero_grad()
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-5), name
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@each_class
def test_weights_of_other_shapes_are_refused_unless_they_are_to_be_new(
    model_class: type[PreTrainedModel], tmp_path: Path
) -> None:
    build(model_class).save_pretrained(tmp_path)
    with pytest.raises(GmaskError, match="shape") as caught:
        model_class.from_pretrained(tmp_path, vocab_size=50)
    assert "\n" not in str(caught.value)
    model = model_class.from_pretrained(tmp_path, vocab_size=50, ignore_mismatched_sizes=True)
    assert model.get_input_embeddings().weight.shape[0] == 50
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


@each_class
def test_every_weight_can_be_made_anew(model_class: type[PreTrainedModel]) -> None:
    """On the meta device, as `from_pretrained` makes a model, then drawn as the constructor draws them."""
    config = build(model_class).config
    with torch.device("meta"):
        model = model_class(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())  # so nothing is left that only the constructor would fill
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


@each_class
def test_loading_onto_no_device_is_refused_by_transformers_own_words(
    model_class: type[PreTrainedModel], tmp_path: Path
) -> None:
    build(model_class).save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context manager"):
        model_class.from_pretrained(tmp_path)


@each_class
def test_it_has_the_parts_that_its_class_names(model_class: type[PreTrainedModel]) -> None:
    model = build(model_class)
    assert model.main_input_name == "input_ids"
    assert type(model.base_model) in (GLMModel, ChatGLMModel)
    assert model is model.base_model or getattr(model, model.base_model_prefix) is model.base_model
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    assert tied == (set() if model.get_output_embeddings() is None else {"lm_head.weight"})
    assert model.can_generate() == (model_class in LANGUAGE_MODELS)
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    for pattern in model.tp_plan or {}:
        assert any(name.replace(".0.", ".*.").endswith(pattern) for name in names) or pattern == "lm_head", pattern


PROMPT = torch.tensor([[16, 17, 18, GMASK, SOP], [PAD, PAD, 30, GMASK, SOP]])
WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "static cache": lambda model: {"cache_implementation": "static"},
    "no cache": lambda model: {"use_cache": False},
    "dynamic cache": lambda model: {"cache_implementation": "dynamic"},
    "a caller's layout": lambda model: {"layout": model.read_prompt_layout(PROMPT, (PROMPT != PAD).long())},
}


@each_language_model
@pytest.mark.parametrize("way", WAYS)
def test_greedy_answers_are_the_same_with_every_cache(model_class: type[PreTrainedModel], way: str) -> None:
    model = build(model_class)
    common = dict(attention_mask=(PROMPT != PAD).long(), do_sample=False, max_new_tokens=6, disable_compile=True)
    expected = model.generate(PROMPT, **common)
    assert torch.equal(model.generate(PROMPT, **common, **WAYS[way](model)), expected)


@each_language_model
def test_generate_tells_what_it_did(model_class: type[PreTrainedModel]) -> None:
    model = build(model_class, attention="eager")
    common = dict(
        attention_mask=(PROMPT != PAD).long(), max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True
    )
    told = model.generate(
        PROMPT, **common, do_sample=False, output_scores=True, output_logits=True, output_attentions=True,
        output_hidden_states=True,
    )  # fmt: skip
    assert told.sequences.shape == (2, 9)
    assert [len(part) for part in (told.scores, told.logits, told.attentions, told.hidden_states)] == [4] * 4
    assert {scores.shape for scores in told.logits} == {(2, 48)}
    assert told.past_key_values.get_seq_length() == 8
    drawn = [torch.manual_seed(3) and model.generate(PROMPT, **common, do_sample=True).sequences for _ in range(2)]
    assert torch.equal(*drawn)
    beams = model.generate(PROMPT, **common, do_sample=False, num_beams=3, num_return_sequences=2, output_scores=True)
    assert beams.sequences.shape == (4, 9)
    assert beams.sequences_scores.shape == (4,)


@each_language_model
def test_an_assistant_changes_no_greedy_answer(model_class: type[PreTrainedModel]) -> None:
    model, prompt = build(model_class), PROMPT[:1]
    expected = model.generate(prompt, do_sample=False, max_new_tokens=8)
    for way in ({"assistant_model": build(model_class, seed=1)}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=8, **way), expected)


@each_language_model
def test_a_cache_is_continued(model_class: type[PreTrainedModel]) -> None:
    model, prompt = build(model_class), PROMPT[:1]
    common = dict(do_sample=False, min_new_tokens=1, eos_token_id=None, return_dict_in_generate=True)
    whole = model.generate(prompt, max_new_tokens=6, **common).sequences
    part = model.generate(prompt, max_new_tokens=3, **common)
    again = model.generate(part.sequences, past_key_values=part.past_key_values, max_new_tokens=3, **common).sequences
    assert torch.equal(again, whole)


@each_language_model
def test_what_a_prefix_model_cannot_do_is_refused(model_class: type[PreTrainedModel]) -> None:
    model = build(model_class)
    with pytest.raises(ValueError, match="<sop>"):  # there is no causal reading of a text
        model.generate(torch.tensor([[16, 17, 18]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="read in both directions"):
        model.generate(PROMPT, prefill_chunk_size=2, max_new_tokens=2)
