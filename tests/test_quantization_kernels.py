"""Does every way to multiply by an int8 or int4 weight give what the plain reference gives?"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmask.errors import GmaskError
from gmask.native import ops
from gmask.quantization import aten, formats, kernels

PATHS = kernels.available_paths()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
seeds = st.integers(0, 2**31)


def make_weight(
    rows: int,
    columns: int,
    bits: int,
    group_size: int | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Published integers over their whole range, and scales of like size."""
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    integers = torch.randint(low, -low, (rows, columns), generator=generator).to(torch.int8)
    shape = (rows,) if group_size is None else (rows, columns // group_size)
    scale = torch.rand(shape, generator=generator).mul(0.01).add(0.001).to(dtype)
    scale[0] = 0
    return formats.pack_integers(integers, bits), scale


STEPS = {path: {4: (128, 254), 8: (64, 254)} for path in ("avx512_vnni", "avx_vnni", "neon_i8mm", "neon_dotprod")}
STEPS["avx2_int8"] = {4: (128, 254), 8: (128, 65534)}
"""Where bfloat16 activations are rounded to integers, by path and bits of the weight: columns that share a step, and
how many halves of it the largest has."""


def error_bound(
    x: Tensor, weight: Tensor, exact: Tensor, bias: Tensor, path: str, *, steps: tuple[int, int] | None
) -> Tensor:
    """How far from the float64 product a path may be.

    All sum K products in float32. The C++ kernels round once more, to the output; the others also round what they
    dequantize, or the product before its scale and its bias, to the activations' dtype. ``steps``: as in `STEPS`.
    """
    rounding, size = ROUNDING[x.dtype], x.double().abs()
    products = size @ weight.abs().T
    subnormal = rounding * torch.finfo(x.dtype).smallest_normal  # of float16, whose small numbers lie evenly
    bound = 2.0**-23 * (x.shape[1] + 8) * (products + bias.abs()) + rounding * exact.abs() + subnormal
    if path not in kernels.NATIVE_PATHS:
        return bound + rounding * (products + 2 * exact.abs() + 3 * bias.abs())
    if steps is not None:
        group, halves = steps
        for start in range(0, x.shape[1], group):
            part = slice(start, start + group)
            bound += 1.001 / halves * size[:, part].amax(dim=1, keepdim=True) * weight[:, part].abs().sum(dim=1)
    return bound


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64]),
    outputs=st.sampled_from([1, 16, 31, 33, 64, 192]),
    columns=st.sampled_from([2, 30, 32, 64, 94, 128, 384]),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([None, 32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=seeds,
)
def test_a_path_equals_the_reference(
    path: str,
    rows: int,
    outputs: int,
    columns: int,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    if group_size is not None and columns % group_size:
        group_size = None
    weight, scale = make_weight(outputs, columns, bits, group_size, seed=seed, dtype=scale_dtype)
    packed = kernels.repack_weight(weight, scale, bits=bits, group_size=group_size, path=path)
    for given_tensor, unpacked in zip((weight, scale), packed.unpack(), strict=True):
        assert torch.equal(given_tensor, unpacked)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, columns, generator=generator) * 4.0 ** torch.randn(columns, generator=generator)).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    dense = formats.dequantize(formats.unpack_integers(weight, bits), scale, torch.float64)
    exact = x.double() @ dense.T + bias.double()
    y = kernels.matmul(x, packed, bias)
    assert y.dtype == dtype and y.shape == (rows, outputs)
    steps = STEPS.get(packed.path, {}).get(bits) if dtype == torch.bfloat16 else None
    bound = error_bound(x, dense, exact, bias.double(), packed.path, steps=steps)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_outliers_cost_less_than_the_rounding_of_the_weight(path: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 1024, generator=generator)
    integers, scale = formats.quantize(weight, bits)
    x = torch.randn(8, 1024, generator=generator)
    x[:, ::128] *= 1000
    x = x.bfloat16()
    quantized = x.double() @ formats.dequantize(integers, scale, torch.float64).T
    weight_error = (quantized - x.double() @ weight.double().T).norm()
    y = kernels.matmul(x, kernels.repack_weight(formats.pack_integers(integers, bits), scale, bits=bits, path=path))
    assert (y.double() - quantized).norm() < weight_error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_an_aligned_weight_is_served_by_the_path_that_was_asked_for(path: str, bits: int) -> None:
    weight, scale = make_weight(128, 256, bits)
    assert kernels.repack_weight(weight, scale, bits=bits, path=path).path == path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_its_row_and_no_other(path: str, dtype: torch.dtype, bits: int, bad: float) -> None:
    weight, scale = make_weight(64, 64, bits)
    scale[0] = 0.5
    packed = kernels.repack_weight(weight, scale, bits=bits, path=path)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = kernels.matmul(x, packed)
    x[1, 5] = bad
    y = kernels.matmul(x, packed)
    assert not y[1].isfinite().any()
    assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("path", [path for path in PATHS if path in kernels.NATIVE_PATHS])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_number_of_threads_changes_nothing(path: str, bits: int) -> None:
    weight, scale = make_weight(1000, 1024, bits)
    packed = kernels.repack_weight(weight, scale, bits=bits, path=path)
    x = torch.randn(11, 1024, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(kernels.matmul(x, packed))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("path", PATHS)
def test_a_row_is_the_same_alone_and_among_others(path: str) -> None:
    weight, scale = make_weight(96, 256, 4)
    packed = kernels.repack_weight(weight, scale, bits=4, path=path)
    x = torch.randn(13, 256, generator=torch.Generator().manual_seed(1))
    together = kernels.matmul(x, packed)
    alone = torch.cat([kernels.matmul(row, packed)[None] for row in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_activations_of_any_shape_and_layout_are_taken(path: str) -> None:
    weight, scale = make_weight(48, 64, 8)
    packed = kernels.repack_weight(weight, scale, bits=8, path=path)
    x = torch.randn(64, 2, 5, generator=torch.Generator().manual_seed(1))
    y = kernels.matmul(x.permute(1, 2, 0), packed)
    assert y.shape == (2, 5, 48)
    torch.testing.assert_close(y, kernels.matmul(x.permute(1, 2, 0).contiguous(), packed))
    assert kernels.matmul(x.new_empty(0, 64), packed).shape == (0, 48)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_the_dequantized_weight(path: str) -> None:
    weight, scale = make_weight(600, 64, 4)
    dense = formats.dequantize(formats.unpack_int4(weight), scale)
    packed = kernels.repack_weight(weight, scale, bits=4, path=path)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(2, 3, 64, generator=generator), torch.randn(600, generator=generator)
    into, wanted = torch.randn(2, 3, 600, generator=generator), []
    for multiply in (lambda x, b: kernels.matmul(x, packed, b), lambda x, b: x @ dense.T + b):
        x_leaf, bias_leaf = x.clone().requires_grad_(), bias.clone().requires_grad_()
        multiply(x_leaf, bias_leaf).backward(into)
        wanted.append((x_leaf.grad, bias_leaf.grad))
    for ours, reference in zip(*wanted, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)


def test_a_path_can_be_forced_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = make_weight(64, 64, 4)
    monkeypatch.setenv(kernels.PATH_VARIABLE, "torch")
    assert kernels.repack_weight(weight, scale, bits=4).path == "torch"
    assert kernels.describe_path() == "plain torch"
    monkeypatch.setenv(kernels.PATH_VARIABLE, "fastest")
    with pytest.raises(GmaskError, match="this machine has"):
        kernels.repack_weight(weight, scale, bits=4)


def test_without_the_cpp_kernel_torch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "instruction_sets", lambda: ())
    weight, scale = make_weight(64, 64, 4)
    expected = "aten" if aten.aten_takes(bits=4, outputs=64, columns=64, group_size=None) else "torch"
    assert kernels.repack_weight(weight, scale, bits=4).path == expected
    assert "was not built" in kernels.describe_path()
    odd = kernels.repack_weight(*make_weight(33, 30, 4), bits=4)
    assert odd.path == "torch"


def test_a_missing_or_foreign_library_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    foreign = tmp_path / "_native.so"
    foreign.write_bytes(b"not a library")
    for path in (foreign, tmp_path / "absent.so"):
        monkeypatch.setattr(ops, "LIBRARY", path)
        assert ops.open_library.__wrapped__() is None


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    weight, scale = make_weight(64, 64, 4)
    with pytest.raises(GmaskError, match=r"needs scales \[64\]"):
        kernels.repack_weight(weight, scale[:-1], bits=4)
    with pytest.raises(GmaskError, match=r"needs scales \[64, 2\]"):
        kernels.repack_weight(weight, scale, bits=4, group_size=32)
