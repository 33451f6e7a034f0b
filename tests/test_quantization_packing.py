"""Are the published int8 and int4 formats read and written bit for bit?"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from gmask.errors import GmaskError
from gmask.native import ops as native
from gmask.native.ops import instruction_sets
from gmask.quantization import formats

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = {"chatglm-tiny-int8": 8, "chatglm-tiny-int4": 4, "chatglm-tiny-int4-qe": 4}
seeds = st.integers(0, 2**31)


@cache
def read_weights(name: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted((GOLDEN / name / "model").glob("*.bin")):
        weights |= torch.load(file, weights_only=True)
    return weights


@cache
def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / name / "case.json").read_text("utf-8")), load_file(
        GOLDEN / name / "tensors.safetensors"
    )


def quantized_names(name: str) -> list[str]:
    suffix = ".weight_scale"
    return [key.removesuffix(suffix) for key in read_weights(name) if key.endswith(suffix)]


def random_integers(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator).to(torch.int8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_quantizing_the_dense_checkpoint_gives_the_published_integers_and_scales(name: str) -> None:
    dense, published, bits = read_weights("chatglm-tiny"), read_weights(name), PUBLISHED[name]
    names = quantized_names(name)
    assert len(names) >= 16
    for key in names:
        source = "transformer.word_embeddings" if key == "lm_head" else key  # one quantization for both
        integers, scale = formats.quantize(dense[f"{source}.weight"], bits)
        assert torch.equal(formats.pack_integers(integers, bits), published[f"{key}.weight"]), key
        assert torch.equal(scale, published[f"{key}.weight_scale"]), key
        assert torch.equal(formats.unpack_integers(published[f"{key}.weight"], bits), integers), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_checksums_and_dequantized_weights_are_met(name: str) -> None:
    case, tensors = read_case(name)
    weights, bits = read_weights(name), PUBLISHED[name]
    for key, sums in case["checksums"].items():
        assert int(formats.unpack_integers(weights[f"{key}.weight"], bits).long().sum()) == sums["sum_int"]
        assert float(weights[f"{key}.weight_scale"].double().sum()) == pytest.approx(sums["sum_scale"], rel=1e-6)
    compared = 0
    for key, expected in tensors.items():
        kind, _, layer = key.partition(".")
        if kind in ("deq32", "deq16"):
            integers = formats.unpack_integers(weights[f"{layer}.weight"], bits)
            got = formats.dequantize(integers, weights[f"{layer}.weight_scale"], expected.dtype)
            assert torch.equal(got, expected), key
            compared += 1
    assert compared >= 6


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_float32_model_gets_float32_scales_as_the_published_cpu_code_gave_it(name: str) -> None:
    _, tensors = read_case(name)
    key = "transformer.layers.0.attention.query_key_value.weight"
    weight = read_weights("chatglm-tiny")[key].float()
    integers, scale = formats.quantize(weight, PUBLISHED[name], dtype=torch.float32)
    assert torch.equal(formats.pack_integers(integers, PUBLISHED[name]), tensors["cpu_fp32_quantize.weight"])
    assert torch.equal(scale, tensors["cpu_fp32_quantize.weight_scale"])


@given(st.integers(1, 70), st.integers(1, 80), st.sampled_from([4, 8]), seeds)
def test_packing_in_rows_and_in_blocks_can_be_undone(rows: int, columns: int, bits: int, seed: int) -> None:
    columns = 2 * columns if bits == 4 else columns
    integers = random_integers(rows, columns, bits, seed)
    packed = formats.pack_integers(integers, bits)
    assert packed.shape == (rows, columns * bits // 8)
    assert torch.equal(formats.unpack_integers(packed, bits), integers)
    blocks = formats.pack_blocks(packed, bits)
    assert torch.equal(formats.unpack_blocks(blocks, bits, rows, columns), packed)


def test_the_even_column_is_in_the_high_nibble() -> None:
    assert formats.pack_int4(torch.tensor([[1, -2, -8, 7]], dtype=torch.int8)).tolist() == [[0x1E, 0x87 - 256]]


@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([4, 8]), st.sampled_from([None, 32, 64, 128]), seeds)
def test_a_dequantized_weight_is_within_half_a_step(
    rows: int, groups: int, bits: int, group_size: int | None, seed: int
) -> None:
    columns = groups * (group_size or 32)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0, :32] = 0
    integers, scale = formats.quantize(weight, bits, group_size=group_size, dtype=torch.float32)
    assert scale.shape == ((rows,) if group_size is None else (rows, groups))
    steps = scale.view(rows, -1).repeat_interleave(columns // scale.view(rows, -1).shape[1], dim=1)
    error = (formats.dequantize(integers, scale) - weight).abs()
    assert (error <= steps * 0.5 * (1 + 1e-5)).all()
    assert formats.dequantize(integers, scale)[0, :32].count_nonzero() == 0


def test_rows_of_zeros_and_scales_without_digits_stay_in_range() -> None:
    weight = torch.tensor([[0.0, 0.0], [6e-8, -6e-8], [65504.0, -65504.0], [3e-6, 1e-6]], dtype=torch.float16)
    for bits in (4, 8):
        integers, scale = formats.quantize(weight, bits)
        assert scale.isfinite().all() and scale[0] == 0
        assert integers[0].tolist() == [0, 0]
        largest = 2 ** (bits - 1) - 1
        assert integers.min() >= -largest - 1 and integers.max() <= largest
        assert integers[2].tolist() == [largest, -largest]


@pytest.mark.parametrize(
    ("weight", "bits", "group_size", "message"),
    [
        (torch.ones(2, 8), 3, None, "4 or 8 bits"),
        (torch.ones(2, 7), 4, None, "even number of columns"),
        (torch.ones(2, 64), 4, 48, "32, 64 or 128"),
        (torch.ones(2, 96), 4, 64, "divisor"),
        (torch.tensor([[1.0, float("nan")]]), 8, None, "NaN"),
        (torch.tensor([[1.0, 1e6]]), 8, None, "beyond"),
    ],
)
def test_what_cannot_be_quantized_is_said_in_one_line(
    weight: Tensor, bits: int, group_size: int | None, message: str
) -> None:
    with pytest.raises(GmaskError, match=message) as told:
        formats.quantize(weight, bits, group_size=group_size)
    assert "\n" not in str(told.value)


@pytest.mark.skipif(not instruction_sets(), reason="the C++ library was not built")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (31, 30), (32, 32), (33, 94), (100, 1024)])
def test_the_kernels_blocks_are_packed_in_one_pass_as_in_many(bits: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(-128, 128, (rows, columns * bits // 8), generator=generator).to(torch.int8)
    blocks = native.pack_blocks_native(packed, bits)
    assert torch.equal(blocks, formats.pack_blocks(packed, bits))
    assert torch.equal(formats.unpack_blocks(blocks, bits, rows, columns), packed)
