"""Do the C++ loops equal torch's operations, on every instruction set of the machine?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmask.models.chatglm import rotary_tables
from gmask.native import ops
from gmask.native.ops import instruction_sets

ISAS = instruction_sets()


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_is_off_by_its_rounding_alone(isa: str) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()]
    wide = x.double()
    exact = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    found = ops.gelu(x, isa=isa).double()
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_of_what_is_not_finite(isa: str) -> None:
    found = ops.gelu(torch.tensor([float("nan"), float("inf")]).bfloat16(), isa=isa)
    assert found[0].isnan() and found[1] == float("inf")


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    tables=st.booleans(),
    length=st.sampled_from([1, 2, 33]),
    channels=st.sampled_from([2, 8, 24, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_rotating_turns_pairs(
    isa: str, batch: int, tables: bool, length: int, channels: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, 2000, (batch if tables else 1, 2, length), generator=generator)
    cosines, sines = rotary_tables(places, torch.rand(channels // 2, generator=generator), dtype=torch.float32)
    fused = torch.randn(batch, length, 5, 6 * channels, generator=generator).to(dtype)
    states = fused.transpose(1, 2)[..., 2 * channels : 4 * channels]
    found = ops.rotate(states, cosines, sines, isa=isa)
    pairs = states.double().unflatten(-1, (2, 2, channels // 2))
    turned = torch.view_as_complex(pairs.transpose(-1, -2).contiguous()) * torch.complex(
        cosines[..., : channels // 2].double(), sines[..., : channels // 2].double()
    )
    exact = torch.stack((turned.real, turned.imag), dim=-2).flatten(-3)
    assert found.dtype == dtype and found.is_contiguous()
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    assert ((found.double() - exact).abs() <= rounding * (1 + exact.abs())).all()


def test_what_they_do_not_take() -> None:
    x = torch.randn(4, 8).bfloat16()
    assert ops.can_gelu(x) == bool(ISAS)
    assert not ops.can_gelu(x.float())
    assert not ops.can_gelu(x[:, ::2])
    assert not ops.can_gelu(x.clone().requires_grad_())
    tables = torch.ones(1, 1, 4, 2, 4)
    assert ops.can_rotate(x, tables) == bool(ISAS)
    assert not ops.can_rotate(x.half(), tables)
    assert not ops.can_rotate(x, tables.bfloat16())
    assert not ops.can_rotate(x.clone().requires_grad_(), tables)
