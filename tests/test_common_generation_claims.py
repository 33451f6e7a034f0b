"""Does every language model generate as transformers' common tests ask?

Restated from ``tests/generation/test_utils.py`` of transformers; `test_common_model_claims` has those of caches and
assistants. What cannot hold is refused here, and listed in docs/explanation/differences.md.
"""

from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel

from conftest import GMASK, PAD, SOP
from test_common_model_claims import LANGUAGE_MODELS, PROMPT, build, each_language_model

MASKED = {"attention_mask": (PROMPT != PAD).long()}
GREEDY: dict[str, Any] = {**MASKED, "do_sample": False, "max_new_tokens": 5, "disable_compile": True}
EXACT = {**GREEDY, "min_new_tokens": 5}


@each_language_model
def test_it_inherits_generation_once_and_says_so(model_class: type[PreTrainedModel]) -> None:
    assert issubclass(model_class, GenerationMixin) and model_class.can_generate()
    assert "GenerationMixin" not in str(model_class.__bases__)  # by the class that reads its prompts


@each_language_model
@pytest.mark.parametrize(
    "way", [{}, {"num_beams": 2}, {"do_sample": True}, {"do_sample": True, "num_beams": 2}], ids=str
)
def test_every_way_of_searching_tells_scores_logits_attentions_and_states(
    model_class: type[PreTrainedModel], way: dict[str, Any]
) -> None:
    model, beams = build(model_class, attention="eager"), way.get("num_beams", 1)
    torch.manual_seed(0)
    told = model.generate(
        PROMPT, **{**EXACT, **way}, return_dict_in_generate=True, output_scores=True, output_logits=True,
        output_attentions=True, output_hidden_states=True, num_return_sequences=beams,
    )  # fmt: skip
    rows, layers = 2 * beams, model.config.num_hidden_layers
    assert told.sequences.shape == (rows, PROMPT.shape[1] + 5)
    assert torch.equal(told.sequences[::beams, : PROMPT.shape[1]], PROMPT)
    assert [tuple(one.shape) for one in (*told.scores, *told.logits)] == [(rows, model.config.vocab_size)] * 10
    for step, (attentions, states) in enumerate(zip(told.attentions, told.hidden_states, strict=True)):
        read = PROMPT.shape[1] if step == 0 else 1
        assert len(attentions) == layers and len(states) == layers + 1
        assert attentions[0].shape[0] in (2, rows) and attentions[0].shape[2:] == (read, PROMPT.shape[1] + step)
        assert states[0].shape[1:] == (read, model.config.hidden_size)


@each_language_model
@pytest.mark.parametrize("beams", [1, 3])
def test_transition_scores_are_those_of_the_tokens(model_class: type[PreTrainedModel], beams: int) -> None:
    model = build(model_class)
    told = model.generate(PROMPT, **EXACT, num_beams=beams, return_dict_in_generate=True, output_scores=True)
    found = model.compute_transition_scores(
        told.sequences, told.scores, getattr(told, "beam_indices", None), normalize_logits=beams == 1
    )
    if beams > 1:
        assert torch.allclose(found.sum(1) / 5, told.sequences_scores, atol=1e-4)
        return
    for step, scores in enumerate(told.scores):
        chosen = told.sequences[:, PROMPT.shape[1] + step, None]
        assert torch.allclose(found[:, step, None], scores.log_softmax(-1).gather(1, chosen), atol=1e-5)


@each_language_model
def test_the_cache_has_a_layer_for_each_and_a_place_for_each_token(model_class: type[PreTrainedModel]) -> None:
    model = build(model_class)
    cache = model.generate(PROMPT, **EXACT, return_dict_in_generate=True).past_key_values
    config, places = model.config, PROMPT.shape[1] + 4
    assert len(cache) == config.num_hidden_layers and cache.get_seq_length() == places
    shape = (2, config.num_attention_heads, places, config.hidden_size // config.num_attention_heads)
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == shape


@each_language_model
def test_eager_attention_writes_what_sdpa_writes(model_class: type[PreTrainedModel]) -> None:
    found = [build(model_class, attention=kind).generate(PROMPT, **EXACT) for kind in ("eager", "sdpa")]
    assert torch.equal(*found)


@each_language_model
def test_padding_on_the_left_changes_no_logits(model_class: type[PreTrainedModel]) -> None:
    model = build(model_class)
    whole = model.generate(PROMPT, **EXACT, return_dict_in_generate=True, output_logits=True)
    alone = model.generate(
        PROMPT[1:, 2:], **{**EXACT, "attention_mask": None}, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(whole.sequences[1:, 2:], alone.sequences)
    for one, other in zip(whole.logits, alone.logits, strict=True):
        assert torch.allclose(one[1:], other, atol=1e-5)


@each_language_model
def test_the_logits_that_are_kept_are_the_last(model_class: type[PreTrainedModel]) -> None:
    model = build(model_class)
    ids = torch.tensor([[16, 17, 18, GMASK, SOP, 20]])
    with torch.no_grad():
        every = model(ids).logits
        for kept in (0, 1, 3):
            assert torch.allclose(model(ids, logits_to_keep=kept).logits, every[:, -kept:], atol=1e-6)
    assert model.generate(PROMPT, **EXACT, return_dict_in_generate=True, output_logits=True).logits[0].ndim == 2


@each_language_model
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_last_block_computes_the_states_that_are_asked_for(
    model_class: type[PreTrainedModel], attention: str
) -> None:
    model, shapes = build(model_class, attention=attention), list[tuple[int, ...]]()
    hook = model.base_model.register_forward_hook(lambda *run: shapes.append(tuple(run[-1].last_hidden_state.shape)))
    rows, length = PROMPT.shape
    with torch.no_grad():
        every = model(PROMPT, **MASKED, use_cache=True)
        last = model(PROMPT, **MASKED, use_cache=True, logits_to_keep=1)
        told = model(PROMPT, **MASKED, logits_to_keep=1, output_hidden_states=True)
    hook.remove()
    assert shapes == [(rows, kept, model.config.hidden_size) for kept in (length, 1, length)]
    assert torch.allclose(last.logits, every.logits[:, -1:], atol=1e-5)
    assert torch.allclose(told.logits, every.logits[:, -1:], atol=1e-5)
    for found, expected in zip(last.past_key_values.layers, every.past_key_values.layers, strict=True):
        assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)


@each_language_model
def test_a_look_up_in_the_prompt_stops_at_the_end_token(model_class: type[PreTrainedModel]) -> None:
    model = build(model_class)
    prompt = PROMPT[:1]
    first = int(model.generate(prompt, do_sample=False, max_new_tokens=1)[0, -1])
    found = model.generate(prompt, do_sample=False, max_new_tokens=8, eos_token_id=first, prompt_lookup_num_tokens=2)
    assert found[0, prompt.shape[1] :].tolist() == [first]


@each_language_model
def test_an_assistant_may_propose_what_is_drawn(model_class: type[PreTrainedModel]) -> None:
    model = build(model_class)
    torch.manual_seed(0)
    drawn = model.generate(
        PROMPT[:1], do_sample=True, max_new_tokens=6, min_new_tokens=6, assistant_model=build(model_class, seed=1)
    )
    assert drawn.shape == (1, PROMPT.shape[1] + 6)


@each_language_model
@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_beside_ids_write_what_ids_write(model_class: type[PreTrainedModel], beams: int) -> None:
    model = build(model_class)
    embeddings = model.get_input_embeddings()(PROMPT).detach()
    expected = model.generate(PROMPT, **EXACT, num_beams=beams)
    assert torch.equal(model.generate(PROMPT, inputs_embeds=embeddings, **EXACT, num_beams=beams), expected)
    layout = model.read_prompt_layout(PROMPT, MASKED["attention_mask"])
    alone = model.generate(inputs_embeds=embeddings, layout=layout, **EXACT, num_beams=beams)
    assert torch.equal(alone, expected[:, PROMPT.shape[1] :])
    with pytest.raises(ValueError, match="layout"):
        model.generate(inputs_embeds=embeddings, **EXACT)


@each_language_model
def test_a_prompt_of_nothing_is_refused(model_class: type[PreTrainedModel]) -> None:
    model = build(model_class)
    with pytest.raises(ValueError, match=r"<sop>|no `input_ids` are provided"):
        model.generate(max_new_tokens=2)


def test_all_language_models_are_asked() -> None:
    assert len(LANGUAGE_MODELS) == 2
