"""Does the attention of a single query equal the plain one, on every instruction set of the machine?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_no_bit(isa: str, dtype: torch.dtype) -> None:
    query, key, value = make_states(1, 4, 33, 64, dtype, seed=0)
    alone = ops.attend(query, key, value, None, scaling=0.1, isa=isa)
    padded = [torch.cat((torch.full_like(part[:, :, :5], float("nan")), part), dim=2) for part in (key, value)]
    visible = (torch.arange(38) >= 5).view(1, 1, 1, -1)
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
