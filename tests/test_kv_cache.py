"""Do answers with keys and values in int8 equal those of a plain model whose cache is rounded, alone and in batches?"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import gmask
from gmask.errors import GmaskError
from gmask.estimation.inference import estimate_inference
from gmask.generation.encoding import TextReader
from gmask.generation.engine import Engine, Request
from gmask.generation.padding import stack_prompts
from gmask.generation.settings import Sampling
from gmask.models.cache import (
    GrowingCache,
    SlotCache,
    capacity_for,
    dequantize_states,
    position_bytes,
    quantize_states,
)
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.native import ops

TEXTS = (
    "She poured a cup of [MASK] and sat down.",
    "They walked along the river until the [gMASK]",
    "[MASK]",
    "昨天我们去[MASK]吃饭。",
    "The [MASK] was cold, so nobody in the whole village went out that night, not even the dogs.",
)
SETTINGS = {"max_tokens": 8, "min_tokens": 6}


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return gmask.load()


@pytest.fixture(scope="module")
def rounded() -> tuple[Any, Any]:
    return gmask.load(kv_cache="int8")


class RoundingCache(DynamicCache):
    """Holds what `quantize_states` leaves of keys and values. A context sees its own ones as they were."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
        is_context = self.get_seq_length(layer_idx) == 0
        rounded = [dequantize_states(quantize_states(one), torch.float32) for one in (key_states, value_states)]
        joined = super().update(*rounded, layer_idx, **kwargs)
        return (key_states, value_states) if is_context else joined


def answer_plainly(model: Any, tokenizer: Any, text: str) -> list[tuple[int, float]]:
    """Greedy tokens and log-probabilities for the one blank of a text: one row, one token at a time."""
    reader = TextReader(tokenizer)
    special, ends = reader.special, [reader.special.eop, reader.special.eos]
    ids, layout, _ = stack_prompts([reader.read(text).context], special, model.device)
    cache, found = RoundingCache(), []
    with torch.inference_mode():
        while len(found) < SETTINGS["max_tokens"]:
            logits = model(input_ids=ids, layout=layout, past_key_values=cache, use_cache=True).logits[0, -1]
            allowed = logits.clone()
            allowed[sorted({*reader.special_ids.values()} - {*ends})] = -torch.inf
            allowed[len(tokenizer) :] = -torch.inf
            if len(found) < SETTINGS["min_tokens"]:
                allowed[ends] = -torch.inf
            token = int(allowed.argmax())
            if token in ends:
                break
            found.append((token, float(logits.log_softmax(-1)[token])))
            ids, layout = torch.tensor([[token]]), layout[:, :, -1:] + torch.tensor([[0], [1]])
    return found


def answers(found: Any) -> list[tuple[int, float]]:
    return [(token.id, token.logprob) for blank in found.blanks for token in blank.tokens]


def assert_close(found: list[tuple[int, float]], expected: list[tuple[int, float]], most: float) -> None:
    assert [token for token, _ in found] == [token for token, _ in expected] and found
    assert max(abs(one - other) for (_, one), (_, other) in zip(found, expected, strict=True)) < most


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_that_of_a_plain_rounded_cache(text: str, plain: Any, rounded: Any) -> None:
    (found,) = gmask.infill(*rounded, [text], **SETTINGS)
    assert_close(answers(found), answer_plainly(*plain, text), 1e-3)


def test_the_option_changes_numbers_so_the_comparison_can_fail(plain: Any, rounded: Any) -> None:
    pairs = [
        zip(answers(one), answers(other), strict=False)
        for one, other in zip(
            gmask.infill(*plain, TEXTS, **SETTINGS),
            gmask.infill(*rounded, TEXTS, **SETTINGS),
            strict=True,
        )
    ]
    gaps = [abs(one[1] - other[1]) for pair in pairs for one, other in pair]
    assert 1e-3 < max(gaps) < 1


def test_a_batch_answers_as_single_texts_do(rounded: Any) -> None:
    together = gmask.infill(*rounded, TEXTS, **SETTINGS)
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = gmask.infill(*rounded, [text], **SETTINGS)
        assert_close(answers(found), answers(alone), 1e-3)


def test_the_engine_answers_as_infill_does(rounded: Any) -> None:
    engine, reader = Engine(*rounded, max_rows=3), TextReader(rounded[1])
    try:
        waiting = [
            engine.submit(Request(context=reader.read(text).context, sampling=Sampling(**SETTINGS))) for text in TEXTS
        ]
        for text, submission in zip(TEXTS, waiting, strict=True):
            (progress,) = submission.wait(60)
            (alone,) = gmask.infill(*rounded, [text], **SETTINGS)
            assert [list(answer.ids) for answer in progress.done] == [
                [token.id for token in blank.tokens] for blank in alone.blanks
            ]
    finally:
        engine.close()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_the_library_answers_are_the_same(
    implementation: str, rounded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gmask.infill(*rounded, TEXTS, **SETTINGS)
    monkeypatch.setattr(ops, "instruction_sets", tuple)
    monkeypatch.setattr(rounded[0].config, "_attn_implementation", implementation)
    for found, other in zip(gmask.infill(*rounded, TEXTS, **SETTINGS), expected, strict=True):
        assert_close(answers(found), answers(other), 1e-3)  # a number on the border of two is rounded to either


def test_chatglm_decodes_as_with_a_plain_rounded_cache() -> None:
    config = ChatGLMConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        initializer_range=0.2, bos_token_id=60, eos_token_id=61, gmask_token_id=62, mask_token_id=63, pad_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChatGLMForConditionalGeneration(config).eval()
    ids = torch.tensor([[7, 8, 9, 10, 62, 60]])
    layout = torch.tensor([[[0, 1, 2, 3, 4, 4], [0, 0, 0, 0, 0, 1]]])
    read, plain, slots = GrowingCache(config), RoundingCache(), SlotCache(config.num_hidden_layers, is_int8=True)
    with torch.inference_mode():
        found = model(input_ids=ids, layout=layout, past_key_values=read, use_cache=True).logits[0, -1]
        expected = model(input_ids=ids, layout=layout, past_key_values=plain, use_cache=True).logits[0, -1]
        slots.add(read, None, copies=[1])
        for place in range(2, 9):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            fed, where = found.argmax().view(1, 1), torch.tensor([[[4], [place]]])
            slots.begin_step(model.device)
            found = model(input_ids=fed, layout=where, past_key_values=slots, use_cache=True).logits[0, -1]
            slots.end_step()
            expected = model(input_ids=fed, layout=where, past_key_values=plain, use_cache=True).logits[0, -1]


def test_what_cannot_be_held_so_is_refused(rounded: Any) -> None:
    with pytest.raises(GmaskError, match="'int4' is not one of int8"):
        gmask.load(kv_cache="int4")
    with pytest.raises(GmaskError, match="beams hold keys and values as they are"):
        gmask.infill(*rounded, TEXTS[0], num_beams=2)


def test_the_memory_is_what_is_allocated() -> None:
    config = gmask.load()[0].config
    for kv_cache, like in ((None, torch.bfloat16), ("int8", torch.int8)):
        slots = SlotCache(config.num_hidden_layers, is_int8=kv_cache is not None)
        read = GrowingCache(config, spare=False)
        states = torch.zeros(1, config.num_attention_heads, 5, config.head_dim, dtype=torch.bfloat16)
        for layer in range(config.num_hidden_layers):
            read.update(states, states, layer)
        slots.add(read, None, copies=[1])
        assert slots.layers[0].keys.dtype == like
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in slots.layers)
        assert held == capacity_for(5) * position_bytes(config, torch.bfloat16, kv_cache)
    full, half = (
        estimate_inference(config, dtype=torch.bfloat16, context_length=64, kv_cache=kv_cache)
        for kv_cache in (None, "int8")
    )
    assert half.cache < 0.6 * full.cache and half.resident < full.resident and half.peak <= full.peak
