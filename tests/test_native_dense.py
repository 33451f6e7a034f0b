"""Does the product with a bfloat16 or float32 weight equal the exact one, on every instruction set of the machine?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

from gmask.models import base
from gmask.native import ops
from gmask.native.ops import instruction_sets

ISAS = instruction_sets()


def make_numbers(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 4.0 ** torch.randn(shape[-1], generator=generator)).to(dtype)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    rows=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 33, 130, 517]),
    outputs=st.sampled_from([1, 7, 31, 32, 33, 160]),
    columns=st.sampled_from([32, 96, 512, 544, 4128]),
    bias_dtype=st.sampled_from([None, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_it_equals_the_exact_product(
    isa: str, dtype: torch.dtype, rows: int, outputs: int, columns: int, bias_dtype: torch.dtype | None, seed: int
) -> None:
    x, weight = (
        make_numbers(rows, columns, seed=seed, dtype=dtype),
        make_numbers(outputs, columns, seed=seed + 1, dtype=dtype),
    )
    bias = None if bias_dtype is None else make_numbers(outputs, seed=seed + 2).to(bias_dtype)
    y = ops.multiply(x, weight, bias, isa=isa)
    added = torch.zeros(()) if bias is None else bias
    exact = x.double() @ weight.double().T + added.double()
    products = x.double().abs() @ weight.double().abs().T + added.double().abs()
    assert y.dtype == dtype and y.shape == (rows, outputs)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + 2.0**-23 * (columns + 8) * products).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [3, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_reaches_its_row_and_no_other(isa: str, rows: int, dtype: torch.dtype) -> None:
    x, weight = make_numbers(rows, 64, seed=0, dtype=dtype), make_numbers(40, 64, seed=1, dtype=dtype)
    clean = ops.multiply(x, weight, None, isa=isa)
    x[1, 5] = float("nan")
    y = ops.multiply(x, weight, None, isa=isa)
    assert y[1].isnan().all()
    assert torch.equal(y[0], clean[0]) and torch.equal(y[2:], clean[2:])


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_of_any_shape_and_layout_are_taken(isa: str) -> None:
    x, weight = make_numbers(2, 64, 5, seed=0), make_numbers(40, 64, seed=1)
    y = ops.multiply(x.transpose(1, 2), weight, None, isa=isa)
    assert y.shape == (2, 5, 40)
    assert torch.equal(y, ops.multiply(x.transpose(1, 2).contiguous(), weight, None, isa=isa))
    assert ops.multiply(x.new_empty(0, 64), weight, None, isa=isa).shape == (0, 40)


@pytest.mark.skipif(not ISAS, reason="the C++ library was not built")
def test_what_it_takes() -> None:
    x, weight = make_numbers(2, 64, seed=0), make_numbers(40, 64, seed=1)
    assert ops.can_multiply(x, weight, None) and ops.can_multiply(x.float(), weight.float(), None)
    for other in (
        (x.float(), weight),
        (x, weight.float()),
        (x[:, :63], weight[:, :63].contiguous()),
        (x, weight[:, ::2]),
        (x.double(), weight.double()),
    ):
        assert not ops.can_multiply(*other, None)
    assert not ops.can_multiply(x.requires_grad_(), weight, None)
    with torch.no_grad():
        assert ops.can_multiply(x, weight, None)


@pytest.mark.skipif(not ISAS, reason="the C++ library was not built")
def test_a_layer_takes_it_where_it_is_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = base.Linear(64, 40, dtype=torch.bfloat16), list[Tensor]()

    def note(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(weight)
        return linear(x, weight, bias)

    monkeypatch.setattr(ops, "multiply", note)
    for lacks, few, rows, grad, takes in (
        (True, 0, 3, False, True),
        (True, 2, 1, True, False),
        (False, 2, 2, False, True),
        (False, 2, 3, False, False),
        (False, 0, 1, False, False),
    ):
        monkeypatch.setattr(base, "lacks_bfloat16", lambda lacks=lacks: lacks)
        monkeypatch.setattr(base, "few_rows", lambda few=few: few)
        calls.clear()
        x = make_numbers(rows, 64, seed=0)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), nn.Linear.forward(layer, x))
        assert len(calls) == takes


@pytest.mark.skipif(not ISAS, reason="the C++ library was not built")
@pytest.mark.parametrize(
    ("few", "rows", "grad", "takes"),
    [(16, 2, False, True), (16, 16, False, True), (16, 1, False, False), (16, 17, False, False), (16, 2, True, False)],
)
def test_it_multiplies_a_few_rows_of_float32_where_mkl_is_slow(
    monkeypatch: pytest.MonkeyPatch, few: int, rows: int, grad: bool, takes: bool
) -> None:
    layer, calls, multiply = base.Linear(64, 40), list[Tensor](), ops.multiply

    def note(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(weight)
        return multiply(x, weight, bias)

    monkeypatch.setattr(ops, "multiply", note)
    monkeypatch.setattr(base, "few_float32_rows", lambda: few)
    x = make_numbers(rows, 64, seed=0).float() / 64
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x), nn.Linear.forward(layer, x))
    assert len(calls) == takes
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert len(calls) == takes


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn_computes_the_product_of_float32_where_mkl_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "few_float32_rows", lambda: 0)

    def is_taken(layer: nn.Module, x: Tensor) -> bool:
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as taken:
            layer(x)
        return any("mkldnn::_linear_pointwise" in event.key for event in taken.key_averages())

    for bias in (True, False):
        layer, x = base.Linear(64, 40, bias=bias), make_numbers(2, 5, 64, seed=0).float()
        monkeypatch.setattr(base, "onednn_from", lambda: 64 * 40 + 1)
        assert not is_taken(layer, x), "a small weight"
        monkeypatch.setattr(base, "onednn_from", lambda: 64 * 40)
        assert is_taken(layer, x) and not is_taken(layer, x[:1])
        with torch.no_grad():
            y = layer(x)
        added = layer.bias.double() if bias else 0.0
        exact = x.double() @ layer.weight.double().T + added
        products = x.double().abs() @ layer.weight.double().abs().T + abs(added)
        assert y.shape == (2, 5, 40) and ((y.double() - exact).abs() <= 2.0**-23 * 64 * products).all()
        layer(x).sum().backward()
        torch.testing.assert_close(layer.weight.grad, x.flatten(0, 1).sum(0).expand(40, 64))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
