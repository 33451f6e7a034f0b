"""Does the attention of a single query equal the plain one, on every instruction set of the machine?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gmask.models.cache import dequantize_states, quantize_states
from gmask.native import ops
from gmask.native.ops import instruction_sets

ISAS = instruction_sets()


def make_states(
    batch: int, heads: int, length: int, size: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, the latter two part of larger tensors, as a cache holds them."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 1, heads, 3 * size, generator=generator).to(dtype).transpose(1, 2)[..., :size]
    key, value = (
        torch.randn(batch, heads, length + 9, size, generator=generator).to(dtype)[:, :, :length] for _ in range(2)
    )
    return query, key, value


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    length=st.sampled_from([1, 2, 7, 64, 200]),
    size=st.sampled_from([16, 32, 48, 64, 80, 128, 512]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_equals_the_plain_attention(
    isa: str, batch: int, heads: int, length: int, size: int, dtype: torch.dtype, is_masked: bool, seed: int
) -> None:
    query, key, value = make_states(batch, heads, length, size, dtype, seed)
    visible = torch.rand(batch, 1, 1, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    visible[..., -1] = True
    mask = visible if is_masked else None
    found = ops.attend(query, key, value, mask, scaling=size**-0.5, isa=isa)
    expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask)
    assert found.dtype == dtype and found.shape == (batch, 1, heads, size)
    error = (found.double() - expected.transpose(1, 2)).abs()
    rounding = 2.0**-18 if dtype == torch.float32 else 2.0**-8
    assert (error <= rounding * (1 + value.double().abs().amax())).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(
    length=st.sampled_from([1, 2, 7, 64, 200]),
    size=st.sampled_from([16, 32, 48, 64, 80, 128, 512]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_keys_and_values_in_int8_are_read_as_what_they_stand_for(
    isa: str, length: int, size: int, dtype: torch.dtype, is_masked: bool, seed: int
) -> None:
    query, key, value = make_states(2, 3, length, size, dtype, seed)
    key, value = (quantize_states(5 * part) for part in (key, value))
    mask = torch.arange(length).view(1, 1, 1, -1) % 3 != 1 if is_masked else None
    found = ops.attend(query, key, value, mask, scaling=size**-0.5, isa=isa)
    wide = [dequantize_states(part, torch.float64) for part in (key, value)]
    expected = scaled_dot_product_attention(query.double(), *wide, attn_mask=mask)
    assert found.dtype == dtype and found.shape == (2, 1, 3, size)
    error = (found.double() - expected.transpose(1, 2)).abs()
    rounding = 2.0**-16 if dtype == torch.float32 else 2.0**-8
    assert (error <= rounding * (1 + wide[1].abs().amax())).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(
    length=st.sampled_from([1, 5, 33]),
    size=st.sampled_from([4, 16, 36, 64, 128, 512]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    exponent=st.integers(-140, 120),
    seed=st.integers(0, 2**31),
)
def test_rounding_equals_that_by_torch(
    isa: str, length: int, size: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    _, key, _ = make_states(2, 3, length, size, dtype, seed)
    key = (key.double() * 2.0**exponent).to(dtype)
    found = ops.round_states(key, isa=isa)
    assert found.shape == (2, 3, length, size + 4)
    plain = quantize_states(key.clone().requires_grad_())  # by torch, which rounds every product before it is an int8
    assert torch.equal(found[..., size:], plain[..., size:])
    assert (found[..., :size].int() - plain[..., :size].int()).abs().amax() <= 1
    exact = dequantize_states(found, torch.float64)
    smallest = 2.0**-100 if exponent < -90 else 0
    assert ((exact - key.double()).abs() <= key.double().abs().amax(-1, keepdim=True) / 253 + smallest).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_rounded_away(isa: str, bad: float) -> None:
    query, key, value = make_states(1, 2, 9, 32, torch.float32, seed=2)
    value[0, 1, 4, 7] = bad
    found = ops.round_states(value, isa=isa)
    numbers = dequantize_states(found, torch.float32)
    plain = dequantize_states(quantize_states(value.requires_grad_()), torch.float32)  # by torch
    assert torch.equal(numbers.isnan(), plain.isnan())
    assert numbers[0, 1, 4].isnan().all() and numbers.isnan().sum() == 32
    mixed = ops.attend(query, ops.round_states(key), found, None, scaling=0.1, isa=isa)
    assert mixed[0, 0, 1].isnan().all() and mixed[0, 0, 0].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_rounded", [False, True])
def test_padding_changes_no_bit(isa: str, dtype: torch.dtype, is_rounded: bool) -> None:
    query, key, value = make_states(1, 4, 33, 64, dtype, seed=0)
    nan = torch.full_like(key[:, :, :5], float("nan"))
    # Hidden positions in front of all others, and among them.
    padded = [torch.cat((nan, part[:, :, :7], nan, part[:, :, 7:]), dim=2) for part in (key, value)]
    if is_rounded:
        key, value, *padded = (ops.round_states(part) for part in (key, value, *padded))
    alone = ops.attend(query, key, value, None, scaling=0.1, isa=isa)
    place = torch.arange(43)
    visible = ((place >= 5) & ((place < 12) | (place >= 17))).view(1, 1, 1, -1)
    assert torch.equal(ops.attend(query, *padded, visible, scaling=0.1, isa=isa), alone)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_head_and_no_other(isa: str, bad: float) -> None:
    query, key, value = make_states(2, 3, 20, 32, torch.float32, seed=1)
    clean = ops.attend(query, key, value, None, scaling=1.0, isa=isa)
    value[1, 2, 7, 3] = bad
    found = ops.attend(query, key, value, None, scaling=1.0, isa=isa)
    assert not found[1, 0, 2, 3].isfinite()
    found[1, 0, 2, 3] = clean[1, 0, 2, 3]
    assert torch.equal(found, clean)
    query[0, 0, 0, 0] = float("nan")
    assert ops.attend(query, key, value, None, scaling=1.0, isa=isa)[0, 0, 0].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_query_that_sees_nothing_gets_zeros(isa: str) -> None:
    query, key, value = make_states(1, 2, 5, 32, torch.float32, seed=0)
    nothing = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert not ops.attend(query, key, value, nothing, scaling=1.0, isa=isa).any()


@pytest.mark.parametrize("scale", [1e-30, 60.0, 1e4])
@pytest.mark.parametrize("isa", ISAS)
def test_scores_of_any_size(isa: str, scale: float) -> None:
    query, key, value = make_states(1, 2, 50, 32, torch.float32, seed=3)
    found = ops.attend(query, key, value, None, scaling=scale, isa=isa)
    expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
    assert torch.allclose(found.double(), expected.transpose(1, 2), atol=2e-3)


def test_what_it_does_not_take() -> None:
    query, key, value = make_states(1, 2, 5, 32, torch.float32, seed=0)
    visible = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    assert ops.can_attend(query, key, value, visible) == bool(ISAS)
    assert not ops.can_attend(key, key, value, None)
    assert not ops.can_attend(query[..., :20], key[..., :20], value[..., :20], None)
    assert not ops.can_attend(query.half(), key.half(), value.half(), None)
    assert not ops.can_attend(query.clone().requires_grad_(), key, value, None)
    assert not ops.can_attend(query, key, value, visible.float())
    assert not ops.can_attend(query, key[:, :1], value[:, :1], None)
    rounded = [ops.round_states(part) for part in (key, value)] if ISAS else [key, value]
    assert ops.can_attend(query, *rounded, visible) == bool(ISAS)
    assert not ops.can_attend(query, rounded[0], value, None)
    assert not ops.can_attend(query[..., :16], *rounded, None)
    assert not ops.can_round(key.half())
    assert not ops.can_round(key.transpose(-1, -2))
    assert not ops.can_round(key.clone().requires_grad_())
