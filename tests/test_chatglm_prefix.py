"""Does a P-tuning prefix learn, and is it seen by whatever stands behind it, with a cache or without?

That it gives the published numbers is shown in test_chatglm_parity.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gmask.models.chatglm import ChatGLMForConditionalGeneration
from test_chatglm_parity import PREFIXES, load_chatglm

IDS = torch.tensor([[20, 21, 22, 513, 516, 30, 31, 517], [40, 41, 513, 516, 50, 517, 3, 3]])
REAL = (IDS != 3).long()
LABELS = IDS.where(((IDS == 516).cumsum(-1) > 0) & (IDS != 516) & (IDS != 3), -100)


@pytest.fixture(params=PREFIXES)
def model(request: pytest.FixtureRequest) -> Iterator[ChatGLMForConditionalGeneration]:
    model = load_chatglm(request.param)
    yield model
    model.activation_checkpointing_disable()
    model.requires_grad_(True).eval()
    model.zero_grad()


def learn(model: ChatGLMForConditionalGeneration, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of the prefix while the rest is frozen, as when it is tuned."""
    model.requires_grad_(False).train()
    prefix = model.transformer.prefix_encoder.requires_grad_(True)
    prefix.zero_grad()
    loss = model(IDS, attention_mask=REAL, labels=LABELS, **inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in prefix.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_prefix_through_checkpoints_unchanged(model, reentrant: bool) -> None:
    loss, gradients = learn(model, use_cache=False)
    assert all((gradient != 0).all() for gradient in gradients.values())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for use_cache in (False, True, None):  # transformers drops the cache then, which must not hold the prefix
        again, recomputed = learn(model, use_cache=use_cache)
        torch.testing.assert_close(again, loss)
        torch.testing.assert_close(recomputed, gradients)


@torch.no_grad()
def test_a_cache_of_ones_own_is_begun_with_the_prefix(model) -> None:
    whole = model(IDS[:1], use_cache=False)
    assert whole.past_key_values is None
    cache, length = DynamicCache(config=model.config), 5
    begun = model(IDS[:1, :length], past_key_values=cache)
    assert cache.get_seq_length() == model.config.pre_seq_len + length
    layout = model.read_prompt_layout(IDS[:1], None)[:, :, length:]
    rest = model(IDS[:1, length:], layout=layout, past_key_values=cache)
    joined = torch.cat((begun.logits, rest.logits), dim=1)
    assert torch.allclose(joined, whole.logits, atol=2e-5)


@torch.no_grad()
def test_packed_sequences_all_see_the_prefix(model) -> None:
    alone = [model(row[real.bool()][None]).logits[0] for row, real in zip(IDS, REAL, strict=True)]
    packed = IDS[REAL.bool()][None]
    sequence_ids = torch.repeat_interleave(torch.arange(2), REAL.sum(-1))[None]
    logits = model(packed, sequence_ids=sequence_ids).logits[0]
    assert torch.allclose(logits, torch.cat(alone), atol=2e-5)


@torch.no_grad()
def test_padding_hides_no_part_of_the_prefix(model) -> None:
    padded = torch.tensor([[3, 3, *IDS[1, :4].tolist()], IDS[0, :6].tolist()])
    mask = (padded != 3).long()
    alone = model.generate(IDS[1:, :4], max_new_tokens=6, do_sample=False)[0, 4:]
    for caching in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        batch = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, **caching)
        assert torch.equal(batch[0, 6:], alone), caching
