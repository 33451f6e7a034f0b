"""What lies at the edges of forward and generate gives the right answer or a plain refusal, never a wrong number."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from transformers import CompileConfig

from conftest import EOP, MASK, PAD, SOP
from gmask.models.base import MatrixAttention
from gmask.models.glm import GLMForConditionalGeneration
from gmask.models.layout import derive_layout

BuildGLM = Callable[..., GLMForConditionalGeneration]

PROMPT = torch.tensor([[2, 20, MASK, SOP, 21]])


def layout_of(ids: torch.Tensor) -> torch.Tensor:
    return derive_layout(ids, blank_token_ids=[MASK], sop_token_id=SOP)


def test_an_end_of_text_that_is_also_the_padding_id_stays_visible(build_glm: BuildGLM) -> None:
    model = build_glm(pad_token_id=1, eos_token_id=EOP)
    ids = torch.tensor([[2, 20, MASK, 1, SOP]])
    told = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), told)


def test_generation_may_start_from_embeddings(build_glm: BuildGLM) -> None:
    model = build_glm()
    from_ids = model.generate(PROMPT, max_new_tokens=4, do_sample=False)
    embeddings = model.get_input_embeddings()(PROMPT)
    found = model.generate(inputs_embeds=embeddings, layout=layout_of(PROMPT), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, from_ids[:, PROMPT.shape[1] :])


def test_one_position_table_leaves_the_answer_unbounded(build_glm: BuildGLM) -> None:
    model = build_glm(block_position_encoding=False, max_position_embeddings=8)
    layout = torch.tensor([[[0, 1] + [1] * 10, [0, 0, *range(1, 11)]]])
    assert model(torch.full((1, 12), 20), layout=layout).logits.isfinite().all()


def test_positions_that_start_anew_pack_sequences(build_glm: BuildGLM) -> None:
    model = build_glm()
    first, second = [2, 20, MASK, SOP, 21], [2, MASK, 22, SOP, 23, 24]
    positions = torch.tensor([[*range(5), *range(6)]])
    packed = model(torch.tensor([first + second]), position_ids=positions, use_cache=False).logits[0]
    alone = [model(torch.tensor([sequence])).logits[0] for sequence in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_packed_rows_cannot_continue_a_cache(build_glm: BuildGLM) -> None:
    model = build_glm()
    past = model(PROMPT, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="packed rows cannot continue a cache"):
        model(
            torch.tensor([[20, 21]]),
            layout=torch.tensor([[[2, 2], [3, 4]]]),
            sequence_ids=torch.zeros(1, 2, dtype=torch.long),
            past_key_values=past,
        )


@pytest.mark.parametrize("shape", [(1, 5), (1, 2, 4), (2, 2, 5)])
def test_a_layout_of_another_shape_is_refused(build_glm: BuildGLM, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"layout is .* must be \[1, 2, 5\]"):
        build_glm()(PROMPT, layout=torch.zeros(shape, dtype=torch.long))


def test_a_layout_longer_than_the_prompt_is_refused(build_glm: BuildGLM) -> None:
    with pytest.raises(ValueError, match="layout covers 20 tokens, the prompt has 5"):
        build_glm().generate(PROMPT, layout=torch.zeros(1, 2, 20, dtype=torch.long), max_new_tokens=2)


def test_rows_that_see_nothing_stay_finite_in_half_precision(build_glm: BuildGLM) -> None:
    model = build_glm(attn_implementation="eager", initializer_range=1.0).half()
    mask = torch.ones(1, 1, 5, 5)
    mask[:, :, 3:] = 0
    assert model(PROMPT, layout=torch.zeros(1, 2, 5, dtype=torch.long), attention_mask=mask).logits.isfinite().all()


def test_token_losses_leave_out_the_padding_id_like_forward(build_glm: BuildGLM) -> None:
    model = build_glm()
    labels, sequences = torch.tensor([[PAD, PAD, PAD, 21, EOP]]), torch.zeros_like(PROMPT)
    layout = layout_of(PROMPT)
    found = model.token_losses(PROMPT, labels, layout=layout, sequence_ids=sequences)
    assert len(found) == 2
    torch.testing.assert_close(found.mean(), model(PROMPT, layout=layout, labels=labels).loss)


def test_a_padded_static_decode_is_traced_once(build_glm: BuildGLM) -> None:
    model = build_glm(num_hidden_layers=1)
    settings = CompileConfig(fullgraph=True, mode="default", backend="eager")
    settings._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ids = torch.tensor([[PAD, 2, MASK, SOP], [2, 20, MASK, SOP]])
    model.generate(
        ids,
        attention_mask=(ids != PAD).long(),
        max_new_tokens=6,
        do_sample=False,
        cache_implementation="static",
        compile_config=settings,
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("how", ["boolean", "additive", "none", "autocast"])
def test_training_in_bfloat16_on_a_cpu_learns_what_float32_would(how: str) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(2, 3, length, 8) for length in (5, 7, 7)]  # of queries, keys and values
    visible = torch.rand(2, 1, 5, 7) > 0.4
    visible[..., 0] = True
    mask = {"additive": torch.zeros(2, 1, 5, 7).masked_fill(~visible, -1e4), "none": None}.get(how, visible)
    towards = torch.randn(2, 5, 3, 8)
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        query, key, value = (row.clone().to(dtype).requires_grad_() for row in rows)
        additive = mask.to(dtype) if how == "additive" and mask is not None else mask
        assert MatrixAttention.takes(query, key, additive)
        found: torch.Tensor = MatrixAttention.apply(query, key, value, additive, 0.5)
        gradients = torch.autograd.grad(found, (query, key, value), towards.to(found.dtype))
    exact = [row.double().requires_grad_() for row in rows]
    known = mask.double() if how == "additive" and mask is not None else mask
    expected = F.scaled_dot_product_attention(exact[0], exact[1], exact[2], attn_mask=known, scale=0.5).transpose(1, 2)
    others = torch.autograd.grad(expected, exact, towards.double())
    assert found.dtype == torch.bfloat16
    for one, other in zip((found, *gradients), (expected, *others), strict=True):
        torch.testing.assert_close(one.double(), other, atol=0.05, rtol=0.05)


def test_only_training_in_bfloat16_on_a_cpu_leaves_the_fused_kernel() -> None:
    row = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert MatrixAttention.takes(row, row, None)
    assert not MatrixAttention.takes(row.detach(), row.detach(), None)
    assert not MatrixAttention.takes(row.float(), row.float(), None)
    assert not MatrixAttention.takes(row, torch.zeros(1, 1, 257, 8), None)
    with torch.no_grad():
        assert not MatrixAttention.takes(row, row, None)
