"""Do the Triton kernels give what the plain reference gives, compile for GPUs, and step aside where they cannot run?

Without a GPU, Triton's interpreter runs them on the CPU: there the tests of every path hold them to the reference.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gmask.quantization import formats, kernels
from test_quantization_kernels import make_weight

TESTS = Path(__file__).parent
CUDA = torch.device("cuda")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    needs_triton,
]
PRODUCT = """
import torch
from gmask.quantization import kernels
weight = torch.ones(8, 32, dtype=torch.int8, device="cuda")
packed = kernels.repack_weight(weight, torch.ones(8, device="cuda"), bits=8)
assert kernels.matmul(torch.ones(1, 32, device="cuda"), packed).eq(32).all()
print(packed.path)
"""


@pytest.mark.slow
@needs_triton
def test_the_interpreted_kernels_pass_the_tests_of_every_path() -> None:
    ignored = "ignore:invalid value:RuntimeWarning"  # numpy's, of infinity times zero
    tests = [str(TESTS / "test_quantization_kernels.py"), "-k", "triton", "-W", ignored]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, int | None], capability: int) -> Any:
    """Compiles without a GPU, every pointer and size known to be a multiple of 16 that Triton would look at."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gmask.quantization.triton import WARPS

    known = [name for name in types if name not in kernel.do_not_specialize]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in known}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize(("bits", "group_size", "rows"), [(4, None, 1), (4, 32, 8), (8, None, 2), (8, 128, 1)])
def test_the_kernels_compile_for_a_gpu(capability: int, bits: int, group_size: int | None, rows: int) -> None:
    from gmask.quantization import triton as ours

    form = {"bits": bits, "group_size": group_size}
    pointers = {"x_ptr": "*fp16", "weight_ptr": "*i8", "scale_ptr": "*fp16", "bias_ptr": "*fp16", "y_ptr": "*fp16"}
    sizes = {"rows": "i32", "outputs": "i32", "columns": "i32"}
    blocks = {"block_rows": rows, "block_outputs": min(ours.SUMS // rows, 16), "block_words": ours.WORDS}
    product = compile_kernel(ours._multiply_words, pointers | sizes, form | blocks, capability)
    assert ".local" not in product.asm["ptx"]
    # Shared memory serves to join the sums of the warps at the end, not to move weights between threads.
    assert product.metadata.shared <= 4 * ours.SUMS * ours.WARPS
    types = {"weight_ptr": "*i8", "scale_ptr": "*fp16", "dense_ptr": "*fp16", "columns": "i32"}
    dense = compile_kernel(ours._dequantize_block, types, form | {"block": ours.DENSE_BLOCK}, capability)
    assert dense.asm["cubin"]


def test_where_triton_is_missing_one_warning_says_so_and_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("gmask.quantization.triton", raising=False)
    monkeypatch.setitem(sys.modules, "gmask.quantization.triton", None)
    with pytest.warns(UserWarning, match="plain torch path: Triton fails"):
        assert kernels._triton_kernels.__wrapped__(CUDA) is None
    monkeypatch.setattr(kernels, "_triton_kernels", lambda device: None)
    assert kernels.available_paths(CUDA) == ("torch",)


def test_a_cpu_never_tries_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels._triton_kernels.__wrapped__(torch.device("cpu")) is None


def test_only_rows_of_whole_words_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_triton_kernels", lambda device: kernels)
    assert kernels.repack_weight(*make_weight(33, 40, 4), bits=4, path="triton").path == "triton"
    assert kernels.repack_weight(*make_weight(33, 36, 4), bits=4, path="triton").path == "torch"
    weight, scale = make_weight(33, 40, 8)
    assert kernels.repack_weight(weight[:, 2:], scale, bits=8, path="triton").path == "torch"


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("group_size", [None, 32, 64, 128])
    @pytest.mark.parametrize("shape", [(12288, 4096), (1001, 1664), (4096, 16384)])
    def test_products_equal_the_reference(
        self, shape: tuple[int, int], group_size: int | None, bits: int, dtype: torch.dtype
    ) -> None:
        weight, scale = (tensor.to(CUDA) for tensor in make_weight(*shape, bits, group_size))
        packed = kernels.repack_weight(weight, scale, bits=bits, group_size=group_size)
        assert packed.path == "triton"
        dense = formats.dequantize(formats.unpack_integers(weight, bits), scale)
        bias = torch.randn(shape[0], device=CUDA, dtype=dtype)
        for rows in (1, 2, 3, 8, 16, 17, 300):
            x = torch.randn(rows, shape[1], device=CUDA, dtype=dtype)
            exact = x.double() @ dense.double().T + bias.double()
            size = x.double().abs() @ dense.double().abs().T
            rounding = torch.finfo(dtype).eps
            y = kernels.matmul(x, packed, bias)
            few = rows <= 16  # beyond, what is dequantized is rounded as well
            bound = 1e-5 * size + rounding * exact.abs() + (0 if few else rounding * (size + bias.double().abs()))
            assert ((y.double() - exact).abs() <= bound).all()

    def test_a_product_can_be_captured_in_a_graph(self) -> None:
        weight, scale = (tensor.to(CUDA) for tensor in make_weight(512, 1024, 4))
        packed = kernels.repack_weight(weight, scale, bits=4)
        x = torch.randn(1, 1024, device=CUDA, dtype=torch.bfloat16)
        kernels.matmul(x, packed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernels.matmul(x, packed)
        x.normal_()
        graph.replay()
        assert torch.equal(y, kernels.matmul(x, packed))

    def test_without_a_c_compiler_torch_serves(self, tmp_path: Path) -> None:
        found = os.environ | {"PATH": "", "TRITON_CACHE_DIR": str(tmp_path)}
        found.pop("CC", None)
        run = subprocess.run([sys.executable, "-c", PRODUCT], env=found, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout.strip() == "torch", run.stderr
        assert run.stderr.count("Triton fails") == 1
