"""Does `generate` give what recomputing the whole sequence for every token gives?"""

from collections.abc import Callable
from functools import partial
from string import ascii_letters
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from conftest import EOP, GMASK, MASK, ORDINARY, PAD, SHAPE, SMASK, SOP
from gmask.models.glm import GLMForConditionalGeneration
from gmask.models.layout import derive_layout

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
PROMPTS = [
    [2, 20, 21, MASK, 22, SOP],
    [2, 30, SMASK, SOP],
    [2, 20, MASK, 23, MASK, 24, 25, 26, SOP, 40, 41, SOP],  # the second blank, the first is filled
    [2, 33, 34, 35, GMASK, SOP, 36],  # an answer that has begun
]
greedy = partial(GLMForConditionalGeneration.generate, do_sample=False)
BuildGLM = Callable[..., GLMForConditionalGeneration]


@pytest.fixture(params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest, build_glm: BuildGLM) -> GLMForConditionalGeneration:
    return build_glm(attn_implementation=request.param)


@pytest.fixture(params=CACHES)
def caching(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CACHES[request.param]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One letter a token."""
    letters = {letter: token for token, letter in enumerate(ascii_letters[: SHAPE["vocab_size"]])}
    backend = Tokenizer(BPE(letters, merges=[]))
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def pad_left(prompts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@torch.no_grad()
def run_whole(model: GLMForConditionalGeneration, sequences: Tensor, prompt_length: int) -> Tensor:
    """Logits ``[B, T, V]`` without a cache. The layout is read off the ids; a ``<sop>`` that the model itself wrote
    is a word of the answer, not the start of another one."""
    read = sequences.clone()
    read[:, prompt_length:] = ORDINARY[0]
    layout = derive_layout(read, blank_token_ids=[MASK, SMASK, GMASK], sop_token_id=SOP)
    return model(sequences, layout=layout, use_cache=False).logits


def recompute(model: GLMForConditionalGeneration, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding that runs the whole sequence for every token."""
    ids = torch.tensor([prompt])
    for _ in range(steps):
        best = run_whole(model, ids, len(prompt))[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, best), dim=1)
    return ids[0].tolist()


def log_probabilities(model: GLMForConditionalGeneration, sequences: Tensor, prompt_length: int) -> Tensor:
    """``[B, steps]``: what one pass without a cache says of the tokens behind the prompt."""
    scores = run_whole(model, sequences, prompt_length).log_softmax(-1)[:, prompt_length - 1 : -1]
    return scores.gather(-1, sequences[:, prompt_length:, None])[..., 0]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["mask", "smask", "second blank", "begun"])
def test_greedy_equals_recomputation(
    model: GLMForConditionalGeneration, caching: dict[str, Any], prompt: list[int]
) -> None:
    output = greedy(model, torch.tensor([prompt]), max_new_tokens=8, **caching)
    assert output[0].tolist() == recompute(model, prompt, 8)


def test_a_left_padded_batch_gives_what_single_runs_give(
    model: GLMForConditionalGeneration, caching: dict[str, Any]
) -> None:
    inputs = pad_left(PROMPTS)
    width = inputs["input_ids"].shape[1]
    output = greedy(model, **inputs, max_new_tokens=8, **caching)
    for row, prompt in zip(output.tolist(), PROMPTS, strict=True):
        assert row[width - len(prompt) :] == recompute(model, prompt, 8)


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_right_padded_batch_gives_what_single_runs_give(
    model: GLMForConditionalGeneration, caching: dict[str, Any], has_mask: bool, copies: int
) -> None:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([prompt + [PAD] * (width - len(prompt)) for prompt in PROMPTS])
    mask = {"attention_mask": (ids != PAD).long()} if has_mask else {"pad_token_id": PAD}
    beams = {"num_beams": 2, "num_return_sequences": 2} if copies == 2 else {}
    output = greedy(model, ids, max_new_tokens=8, **mask, **caching, **beams)
    assert torch.equal(output[:, :width], ids.repeat_interleave(copies, dim=0))
    for row, prompt in zip(output.unflatten(0, (-1, copies)), PROMPTS, strict=True):
        alone = greedy(model, torch.tensor([prompt]), max_new_tokens=8, **caching, **beams)
        assert row[:, width:].tolist() == alone[:, len(prompt) :].tolist()


def test_a_layout_and_embeddings_are_moved_with_right_padded_prompts(model: GLMForConditionalGeneration) -> None:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([prompt + [PAD] * (width - len(prompt)) for prompt in PROMPTS])
    mask = (ids != PAD).long()
    layout = model.read_prompt_layout(ids, mask)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    expected = greedy(model, ids, attention_mask=mask, max_new_tokens=8)[:, width:]
    assert torch.equal(greedy(model, **inputs, layout=layout, max_new_tokens=8), expected)
    assert torch.equal(greedy(model, ids, **inputs, max_new_tokens=8)[:, -8:], expected)


def test_embeddings_without_ids_need_a_layout(model: GLMForConditionalGeneration) -> None:
    ids = torch.tensor([PROMPTS[0]])
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="inputs_embeds carry no layout: pass input_ids, or layout"):
        greedy(model, inputs_embeds=embeds, max_new_tokens=2)
    with pytest.raises(ValueError, match="both must be of one"):
        greedy(model, ids[:, 1:], inputs_embeds=embeds, max_new_tokens=2)
    found = greedy(model, inputs_embeds=embeds, layout=model.read_prompt_layout(ids, None), max_new_tokens=6)
    assert found[0].tolist() == recompute(model, PROMPTS[0], 6)[len(PROMPTS[0]) :]


def test_a_right_padded_prompt_cannot_continue_a_cache(model: GLMForConditionalGeneration) -> None:
    ids = torch.tensor([PROMPTS[0] + [PAD]])
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="padded on the left"):
        greedy(model, ids, attention_mask=(ids != PAD).long(), past_key_values=cache, max_new_tokens=2)


def test_a_row_that_has_ended_is_filled_with_padding(
    model: GLMForConditionalGeneration, caching: dict[str, Any]
) -> None:
    inputs = pad_left(PROMPTS)
    width = inputs["input_ids"].shape[1]
    free = [recompute(model, prompt, 8)[len(prompt) :] for prompt in PROMPTS]
    end = free[0][2]  # a token that the first answer really has
    output = greedy(model, **inputs, max_new_tokens=8, eos_token_id=end, **caching)[:, width:].tolist()
    assert len({len(answer) if end not in answer else answer.index(end) for answer in free}) > 1
    for row, answer in zip(output, free, strict=True):
        stopped = answer[: answer.index(end) + 1] if end in answer else answer
        assert row == stopped + [PAD] * (len(row) - len(stopped))


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """A context with some blanks, some of them answered, and an open ``<sop>`` at the end."""
    word = st.sampled_from(ORDINARY)
    pieces = draw(st.lists(st.lists(word, max_size=3), min_size=2, max_size=4))
    blanks = draw(st.lists(st.sampled_from([MASK, SMASK, GMASK]), min_size=3, max_size=3))
    context = [*pieces[0]]
    for blank, piece in zip(blanks, pieces[1:], strict=False):
        context += [blank, *piece]
    answers = draw(st.lists(st.lists(word, max_size=3), max_size=len(pieces) - 2))
    begun = draw(st.lists(word, max_size=2))
    return context + [token for answer in answers for token in (SOP, *answer)] + [SOP, *begun]


@given(batch=st.lists(prompts(), min_size=1, max_size=3), name=st.sampled_from(["dynamic", "static"]))
@settings(deadline=None, max_examples=25)
def test_random_prompts_equal_recomputation(build_glm: BuildGLM, batch: list[list[int]], name: str) -> None:
    model = build_glm(attn_implementation="sdpa")
    inputs = pad_left(batch)
    width = inputs["input_ids"].shape[1]
    output = greedy(model, **inputs, max_new_tokens=4, **CACHES[name]).tolist()
    for row, prompt in zip(output, batch, strict=True):
        assert row[width - len(prompt) :] == recompute(model, prompt, 4)


def test_the_second_sop_answers_the_second_blank(model: GLMForConditionalGeneration) -> None:
    prompt = torch.tensor([[2, MASK, 20, 21, MASK, SOP, 30, SOP]])
    places = torch.tensor([[[0, 1, 2, 3, 4, 1, 1, 4], [0, 0, 0, 0, 0, 1, 2, 1]]])
    other_blank = places.clone()
    other_blank[:, 0, -1] = 1
    read = greedy(model, prompt, max_new_tokens=6)
    assert torch.equal(read, greedy(model, prompt, layout=places, max_new_tokens=6))
    assert not torch.equal(read, greedy(model, prompt, layout=other_blank, max_new_tokens=6))


def test_beams_have_the_exact_log_probability(model: GLMForConditionalGeneration, caching: dict[str, Any]) -> None:
    prompt = torch.tensor([PROMPTS[2]])
    output = model.generate(
        prompt,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=5,
        length_penalty=0.0,  # the score is the plain sum
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **caching,
    )
    exact = log_probabilities(model, output.sequences, prompt.shape[1]).sum(-1)
    assert torch.allclose(output.sequences_scores, exact, atol=1e-4)
    assert exact[0] >= log_probabilities(model, torch.tensor([recompute(model, PROMPTS[2], 5)]), prompt.shape[1]).sum()


def test_beams_of_a_padded_batch_equal_beams_of_single_runs(
    model: GLMForConditionalGeneration, caching: dict[str, Any]
) -> None:
    beams = partial(greedy, model, num_beams=3, max_new_tokens=6, **caching)
    output = beams(**pad_left(PROMPTS))
    for row, prompt in zip(output, PROMPTS, strict=True):
        alone = beams(torch.tensor([prompt]))[0]
        assert row[-len(alone) :].tolist() == alone.tolist()


def test_samples_are_drawn_from_the_recomputed_distribution(
    model: GLMForConditionalGeneration, caching: dict[str, Any]
) -> None:
    prompt = torch.tensor([PROMPTS[0]])

    def sample(**options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return model.generate(
                prompt,
                do_sample=True,
                num_return_sequences=4,
                temperature=2.0,
                max_new_tokens=6,
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )

    output, plain = sample(**caching), sample(use_cache=False)
    assert torch.equal(output.sequences, plain.sequences)
    assert len(set(map(tuple, output.sequences.tolist()))) > 1
    drawn = torch.stack(output.logits, dim=1).log_softmax(-1)
    drawn = drawn.gather(-1, output.sequences[:, prompt.shape[1] :, None])[..., 0]
    assert torch.allclose(drawn, log_probabilities(model, output.sequences, prompt.shape[1]), atol=1e-4)


def test_the_streamer_yields_the_answer(model: GLMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=600)
    options = {"inputs": prompt, "max_new_tokens": 8, "streamer": streamer}
    thread = Thread(target=partial(greedy, model, **options))
    thread.start()
    streamed = list(streamer)
    thread.join()
    assert "".join(streamed) == tokenizer.decode(recompute(model, PROMPTS[0], 8)[prompt.shape[1] :])


def test_a_stop_string_ends_the_answer(
    model: GLMForConditionalGeneration, caching: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = PROMPTS[1]
    answer = tokenizer.decode(recompute(model, prompt, 8)[len(prompt) :])
    stop = answer[2:4]  # of two tokens
    output = greedy(
        model, torch.tensor([prompt]), max_new_tokens=8, stop_strings=[stop], tokenizer=tokenizer, **caching
    )
    assert tokenizer.decode(output[0, len(prompt) :]) == answer[: answer.index(stop) + 2]


def test_a_stopping_criterion_ends_the_answer(model: GLMForConditionalGeneration, caching: dict[str, Any]) -> None:
    class AtLength(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= len(PROMPTS[0]) + 3)

    criteria = StoppingCriteriaList([AtLength()])
    output = greedy(model, torch.tensor([PROMPTS[0]]), max_new_tokens=8, stopping_criteria=criteria, **caching)
    assert output[0].tolist() == recompute(model, PROMPTS[0], 3)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["mask", "smask", "second blank", "begun"])
@pytest.mark.parametrize("assistant", ["itself", "another", "prompt lookup"])
def test_assisted_decoding_changes_nothing(
    model: GLMForConditionalGeneration, build_glm: BuildGLM, assistant: str, prompt: list[int]
) -> None:
    options: dict[str, dict[str, Any]] = {
        "itself": {"assistant_model": model},
        "another": {"assistant_model": build_glm(seed=1, num_hidden_layers=1)},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }
    output = greedy(model, torch.tensor([prompt]), max_new_tokens=12, **options[assistant])
    assert output[0].tolist() == recompute(model, prompt, 12)


def test_a_cache_is_continued(model: GLMForConditionalGeneration) -> None:
    inputs = pad_left(PROMPTS)
    width = inputs["input_ids"].shape[1]
    first = greedy(model, **inputs, max_new_tokens=3, return_dict_in_generate=True)
    mask = torch.cat((inputs["attention_mask"], torch.ones(len(PROMPTS), 3, dtype=torch.long)), dim=1)
    output = greedy(
        model,
        first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
    ).tolist()
    for row, prompt in zip(output, PROMPTS, strict=True):
        assert row[width - len(prompt) :] == recompute(model, prompt, 7)


def test_a_cached_answer_is_followed_by_the_answer_to_the_next_blank(
    model: GLMForConditionalGeneration,
) -> None:
    """As in the published blank filling: one cache, the blanks from left to right."""
    prompt = [2, 20, MASK, 23, MASK, 24, SOP]
    first = greedy(model, torch.tensor([prompt]), max_new_tokens=3, return_dict_in_generate=True)
    longer = [*first.sequences[0].tolist(), SOP]
    output = greedy(model, torch.tensor([longer]), past_key_values=first.past_key_values, max_new_tokens=4)
    assert output[0].tolist() == recompute(model, longer, 4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([2, 20, MASK], "end each prompt with <sop>"),
        ([2, 20, SOP], r"no \[MASK\], \[sMASK\] or \[gMASK\]"),
    ],
    ids=["no sop", "no blank"],
)
def test_a_prompt_without_a_layout_is_an_error(build_glm: BuildGLM, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_glm().generate(torch.tensor([ids]), max_new_tokens=2)


def test_a_config_without_the_special_ids_needs_a_layout(build_glm: BuildGLM) -> None:
    known, unknown = build_glm(), build_glm(sop_token_id=None)
    prompt = torch.tensor([[2, 20, MASK, SOP]])
    with pytest.raises(ValueError, match="no sop_token_id"):
        unknown.generate(prompt, max_new_tokens=2)
    layout = torch.tensor([[[0, 1, 2, 2], [0, 0, 0, 1]]])
    assert torch.equal(
        greedy(unknown, prompt, layout=layout, max_new_tokens=4), greedy(known, prompt, max_new_tokens=4)
    )


def test_chunked_prefill_is_an_error(build_glm: BuildGLM) -> None:
    model, prompt = build_glm(), torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(prompt, prefill_chunk_size=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(prompt, GenerationConfig(prefill_chunk_size=2, max_new_tokens=2))


def test_an_answer_beyond_the_positions_is_an_error(build_glm: BuildGLM) -> None:
    with pytest.raises(ValueError, match="beyond the 9 positions"):
        greedy(build_glm(max_position_embeddings=8), torch.tensor([PROMPTS[0]]), max_new_tokens=20)


def test_an_answer_ends_with_eop_if_the_config_says_so(build_glm: BuildGLM) -> None:
    model = build_glm(eos_token_id=EOP)
    with torch.no_grad():
        model.glm.word_embeddings.weight[EOP] *= 3  # a likely end
        output = greedy(model, **pad_left(PROMPTS), max_new_tokens=20)
    ended = (output == EOP).sum(-1)
    assert ended.max() == 1
