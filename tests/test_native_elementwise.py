"""Do the C++ loops equal torch's operations, on every instruction set of the machine?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gmask.models.chatglm import rotary_tables
from gmask.native import ops
from gmask.native.ops import instruction_sets
from gmask.quantization.formats import pack_integers, pack_scale_blocks, quantize

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


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 9]),
    size=st.sampled_from([32, 72, 160]),
    inner=st.sampled_from([32, 96, 200]),
    bits=st.sampled_from([4, 8]),
    has_bias=st.booleans(),
    alpha=st.sampled_from([1.0, 7.483314773547883]),
    seed=st.integers(0, 2**31),
)
def test_the_second_half_of_a_block_is_its_operations_one_by_one(
    isa: str, rows: int, size: int, inner: int, bits: int, has_bias: bool, alpha: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    x, residual, norm_weight, norm_bias = draw(rows, size), draw(rows, size), draw(size), draw(size)
    layers, arguments = [], []
    for outputs, columns in ((inner, size), (size, inner)):
        integers, scale = quantize(draw(outputs, columns).float() / columns**0.5, bits, dtype=torch.float16)
        blocks = ops.pack_blocks_native(pack_integers(integers, bits), bits)
        layers.append((blocks, pack_scale_blocks(scale), draw(outputs) if has_bias else None))
        arguments.append({"bits": bits, "outputs": outputs})
    up, down = (
        ops.LinearPointers.to(*layer, **named, columns=columns)
        for layer, named, columns in zip(layers, arguments, (size, inner), strict=True)
    )
    found = ops.feed_forward(x, residual, norm_weight, norm_bias, up, down, epsilon=1e-5, alpha=alpha, isa=isa)
    normed = F.layer_norm(torch.add(x, residual, alpha=alpha), (size,), norm_weight, norm_bias, 1e-5)
    active = ops.gelu(ops.matmul_native(normed, *layers[0], **arguments[0], isa=isa), isa=isa)
    exact = torch.add(ops.matmul_native(active, *layers[1], **arguments[1], isa=isa), normed, alpha=alpha)
    # A sum of the normalization that is rounded the other way moves all that follows.
    assert ((found.float() - exact.float()).abs() <= 2.0**-6 * (alpha + exact.float().abs())).all()


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
    assert ops.can_feed_forward(x, x, x[0]) == bool(ISAS)
    assert not ops.can_feed_forward(x, x.float(), x[0])
    assert not ops.can_feed_forward(x[:, ::2], x, x[0])
    assert not ops.can_feed_forward(x, x, x[0].half())
    assert not ops.can_feed_forward(x, x, x[0].clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.can_feed_forward(x, x, x[0])
