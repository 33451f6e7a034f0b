"""Does ChatGLM build its prompts, stream and clean its replies as published, without hiding failures?"""

import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

import gmask
from gmask.models.chatglm import ChatGLMForConditionalGeneration
from gmask.models.chatglm_chat import build_prompt, clean_reply
from gmask.tokenizers.chatglm import ChatGLMTokenizer
from test_chatglm_parity import TINY, load_chatglm, read_case

VOCABULARY = Path(__file__).parents[2] / "shared" / "golden" / TINY / "model" / "ice_text.model"
needs_vocabulary = pytest.mark.skipif(not VOCABULARY.is_file(), reason="the tiny vocabulary is not here")


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    return read_case(TINY)[0]


@pytest.fixture(scope="module")
def model() -> ChatGLMForConditionalGeneration:
    return load_chatglm()


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer(str(VOCABULARY))


def rounds(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in found["history"]]


def test_every_published_prompt(case: dict[str, Any]) -> None:
    assert len(case["chat_prompts"]) == 6
    for found in case["chat_prompts"]:
        assert build_prompt(found["query"], rounds(found)) == found["prompt"]


def test_every_published_clean_reply(case: dict[str, Any]) -> None:
    wrong = [found["in"] for found in case["process_response"] if clean_reply(found["in"]) != found["out"]]
    assert len(case["process_response"]) == 28
    assert wrong == []


@needs_vocabulary
def test_published_conversations_at_once_and_streamed(case: dict[str, Any], model, tokenizer) -> None:
    for found in case["chat_end_to_end"]:
        settings = dict(history=rounds(found), max_length=found["max_length"], do_sample=False)
        reply, history = model.chat(tokenizer, found["query"], **settings)
        assert reply == found["chat_response"]
        assert history == [*rounds(found), (found["query"], reply)]
        streamed = list(model.stream_chat(tokenizer, found["query"], **settings))
        assert streamed[-1] == (reply, history)
        assert all(not part.endswith("\ufffd") for part, _ in streamed[:-1])
        assert found["chat_response"].startswith(found["stream_chat_last"].rstrip("\ufffd"))


def test_streamed_ids_are_the_published_ones_and_the_last_is_not_lost(case: dict[str, Any], model) -> None:
    found = case["stream_generate"]
    ids = torch.tensor(found["input_ids"])
    steps = list(
        model.stream_generate(ids, attention_mask=torch.ones_like(ids), max_length=found["max_length"], do_sample=False)
    )
    assert steps[found["num_yields"] - 1].tolist() == found["yields_last_only"]
    assert [step.shape[1] for step in steps] == list(range(ids.shape[1] + 1, found["max_length"] + 1))


def test_sampling_shapes_scores_in_the_published_order(case: dict[str, Any], model) -> None:
    tensors = read_case(TINY)[1]
    settings = model._chat_settings(2048, 1, True, 0.7, 0.95, None, {})
    own = settings.pop("logits_processor")
    config = GenerationConfig(**settings)
    processors = model._get_logits_processor(
        config, input_ids_seq_length=1, encoder_input_ids=None, logits_processor=own, device="cpu"
    )
    names = [type(processor).__name__ for processor in processors]
    assert names[1:] == [found["class"] for found in case["sampling"]["order"][1:]]
    ids = torch.zeros(3, 1, dtype=torch.long)
    scores = tensors["sampling.in"]
    for step, processor in enumerate(processors):
        scores = processor(ids, scores)
        assert torch.equal(scores, tensors[f"sampling.step{step}"]), names[step]
    assert torch.allclose(scores.softmax(-1), tensors["sampling.probs"])


@needs_vocabulary
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_raise(model, tokenizer, fault: float) -> None:
    weight = model.transformer.final_layernorm.bias
    kept = weight.detach().clone()
    try:
        weight.data[0] = fault
        with pytest.raises(FloatingPointError, match="not finite"):
            model.chat(tokenizer, "你好", max_length=12)
        with pytest.raises(FloatingPointError, match="not finite"):
            model.chat(tokenizer, "你好", max_length=12, num_beams=2, do_sample=False)
        with pytest.raises(FloatingPointError, match="not finite"):
            list(model.stream_chat(tokenizer, "你好", max_length=12))
    finally:
        weight.data.copy_(kept)


@needs_vocabulary
def test_temperature_0_is_greedy_and_seeds_repeat(model, tokenizer) -> None:
    greedy, _ = model.chat(tokenizer, "你好", do_sample=False, max_length=20)
    assert model.chat(tokenizer, "你好", temperature=0, max_length=20)[0] == greedy
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.chat(tokenizer, "你好", top_p=1.0, temperature=3.0, max_length=30)[0])
    assert drawn[0] == drawn[1] != drawn[2]


@needs_vocabulary
@pytest.mark.parametrize("ban", [{"min_new_tokens": 8}, {"bad_words_ids": [[301]]}, {"suppress_tokens": [301, 319]}])
def test_a_forbidden_token_is_no_damage_and_a_seed_repeats_in_a_stream(model, tokenizer, ban: dict[str, Any]) -> None:
    settings = dict(max_length=20, temperature=3.0, top_p=1.0, **ban)
    torch.manual_seed(4)
    reply, history = model.chat(tokenizer, "你好", **settings)
    torch.manual_seed(4)
    assert list(model.stream_chat(tokenizer, "你好", **settings))[-1] == (reply, history)


@needs_vocabulary
def test_beams_find_a_reply_at_least_as_probable_and_are_not_streamed(model, tokenizer) -> None:
    ids = model.encode_chat(tokenizer, "你好", [], max_length=None)["input_ids"]
    settings = dict(max_length=12, do_sample=False, pad_token_id=3)
    wanted = model.generate(ids, num_beams=4, **settings)[0, ids.shape[1] :].tolist()
    reply = clean_reply(tokenizer.decode(wanted, skip_special_tokens=True))
    assert model.chat(tokenizer, "你好", max_length=12, num_beams=4, do_sample=False)[0] == reply
    assert model.chat(tokenizer, "你好", max_length=12, num_beams=4, temperature=0)[0] == reply
    assert model.chat(tokenizer, "你好", max_length=12, do_sample=False)[0] != reply
    with pytest.raises(gmask.GmaskError, match=r"cannot be streamed: use chat$"):
        next(model.stream_chat(tokenizer, "你好", num_beams=4, max_length=12))


@needs_vocabulary
@pytest.mark.parametrize("tables", ["float32", "module"])
def test_a_half_precision_model_chats_on_a_cpu(tokenizer, tables: str) -> None:
    model = copy.deepcopy(load_chatglm(rotary_dtype=tables)).half()
    settings = dict(do_sample=False, max_length=30)
    reply, history = model.chat(tokenizer, "你好", **settings)
    assert reply and list(model.stream_chat(tokenizer, "你好", **settings))[-1] == (reply, history)
    model.chat(tokenizer, "再见", history, max_length=60)


def test_a_temperature_below_0_is_no_greedy_search(model) -> None:
    settings = model._chat_settings(2048, 1, True, 0.7, -1.0, None, {})
    with pytest.raises(ValueError, match="temperature"):
        model.generate(torch.tensor([[20, 513, 516]]), **settings)


@needs_vocabulary
@pytest.mark.parametrize("limit", [{"max_length": 80}, {"max_new_tokens": 77}])
def test_a_model_warns_once_with_counts_of_a_text_longer_than_it_was_trained_on(tokenizer, limit: Any) -> None:
    model = copy.copy(load_chatglm())
    model.generate = lambda input_ids, **_: input_ids
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.chat(tokenizer, "你好", max_length=64)
        assert not told
        for _ in range(2):
            model.chat(tokenizer, "你好", **limit)
            list(model.stream_chat(tokenizer, "你好", **limit))
    assert [str(one.message) for one in told] == [
        "the prompt has 3 tokens and may grow to 80 with the reply, but the model was trained on at most 64: replies "
        "get worse beyond them"
    ]
    assert told[0].filename == __file__


@needs_vocabulary
def test_special_tokens_in_a_question_are_text(model, tokenizer) -> None:
    ids = model.encode_chat(tokenizer, "a [MASK] <eop> b", [], max_length=None)["input_ids"][0].tolist()
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert not {tokenizer.mask_token_id, tokenizer.eos_token_id} & set(ids[:-2])


@needs_vocabulary
def test_a_prompt_without_room_for_a_reply_is_refused_with_counts(model, tokenizer) -> None:
    with pytest.raises(gmask.GmaskError, match=r"3 tokens, max_length 3"):
        model.chat(tokenizer, "你好", max_length=3)


@needs_vocabulary
def test_leaving_a_stream_stops_the_model(model, tokenizer) -> None:
    stream = model.stream_chat(tokenizer, "你好", do_sample=False, max_length=60)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "stream_generate"]


@needs_vocabulary
def test_stop_strings_and_own_processors_reach_the_model(model, tokenizer) -> None:
    whole, _ = model.chat(tokenizer, "你是谁？", do_sample=False, max_length=60)
    cut, _ = model.chat(tokenizer, "你是谁？", do_sample=False, max_length=60, stop_strings=["一k"])
    assert whole.startswith(cut) and len(cut) < len(whole) and cut.endswith("一k")
    streamed = list(model.stream_chat(tokenizer, "你是谁？", do_sample=False, max_length=60, stop_strings=["一k"]))
    assert streamed[-1][0] == cut

    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.shape[1])
        return scores

    seen: list[int] = []
    model.chat(tokenizer, "你好", do_sample=False, max_length=8, logits_processor=LogitsProcessorList([forbid]))
    assert seen == [3, 4, 5, 6, 7]
