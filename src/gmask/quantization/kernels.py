"""The product with an int8 or int4 weight, by the fastest kernel of this machine.

There are several paths, fastest first: on CUDA devices Triton's kernels ("triton"); on CPUs the package's C++ kernel
with the best instructions ("avx512_vnni", "avx512", "avx_vnni", "avx2_int8", "avx2"; on ARM "neon_i8mm",
"neon_dotprod", "neon"), torch's own operations ("aten"), and the same C++ for any CPU ("portable"); everywhere else
plain torch ("torch"), which dequantizes a few rows at a time. ``GMASK_MATMUL`` forces one of the paths of the CPU;
"torch" is forced on GPUs, too. All paths compute the same values up to rounding; "avx512_vnni", "avx_vnni",
"avx2_int8", "neon_i8mm" and "neon_dotprod" round bfloat16 activations to int8 (with int8 weights "avx2_int8" rounds
them to int16), with a step for up to 128 columns. Sums are float32.

Shape letters: formats.py, M rows of activations.
"""

import os
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gmask.errors import GmaskError
from gmask.native import ops as native
from gmask.quantization.aten import ATEN_ROWS, aten_takes, matmul_aten, pack_aten, unpack_aten
from gmask.quantization.formats import (
    check_format,
    dequantize,
    pack_integers,
    pack_scale_blocks,
    unpack_blocks,
    unpack_integers,
    unpack_scale_blocks,
)

PATHS = (
    "triton",
    "avx512_vnni",
    "avx512",
    "avx_vnni",
    "avx2_int8",
    "neon_i8mm",
    "neon_dotprod",
    "neon",
    "avx2",
    "aten",
    "portable",
    "torch",
)
NATIVE_PATHS = native.INSTRUCTION_SETS
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_CHUNK = 512  # weight rows dequantized at a time, so that they stay in the cache of the CPU
PATH_VARIABLE = "GMASK_MATMUL"


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the layout of the path that multiplies by it."""

    data: Tensor
    scale: Tensor
    bits: int
    outputs: int  # N
    columns: int  # K
    group_size: int | None  # None: a scale a row
    path: str

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Returns the weight and scale that `repack_weight` was given, bit for bit."""
        if self.path in NATIVE_PATHS:
            weight = unpack_blocks(self.data, self.bits, self.outputs, self.columns)
            return weight, unpack_scale_blocks(self.scale, self.outputs, group_size=self.group_size)
        if self.path == "aten":
            return pack_integers(unpack_aten(self.data, bits=self.bits), self.bits), self.scale
        return self.data, self.scale

    def integers(self, start: int, stop: int) -> Tensor:
        """Returns rows ``[start, stop)`` as int8 ``[rows, K]``; the bounds are multiples of `ROW_CHUNK`, or the end."""
        if self.path in NATIVE_PATHS:
            blocks = self.data[start // native.BLOCK_ROWS : -(-stop // native.BLOCK_ROWS)]
            count = min(stop, self.outputs) - start
            return unpack_integers(unpack_blocks(blocks, self.bits, count, self.columns), self.bits)
        rows = self.data[start:stop]
        return unpack_aten(rows, bits=self.bits) if self.path == "aten" else unpack_integers(rows, self.bits)

    def row_scale(self) -> Tensor:
        """Returns the scales ``[N]`` or ``[N, G]``."""
        if self.path in NATIVE_PATHS:
            return unpack_scale_blocks(self.scale, self.outputs, group_size=self.group_size)
        return self.scale


def available_paths(device: torch.device | None = None) -> tuple[str, ...]:
    """Returns the paths of a device, by default of this machine's CPU, the fastest first."""
    device = device or torch.device("cpu")
    usable = {"torch", *(("aten", *native.instruction_sets()) if device.type == "cpu" else ())}
    if _triton_kernels(device):
        usable.add("triton")
    return tuple(path for path in PATHS if path in usable)


@cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """Returns the kernels for a CUDA device, or for Triton's interpreter on the CPU; None if a trial of them fails."""
    if device.type != ("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"):
        return None
    try:
        from gmask.quantization import triton as triton_kernels

        one = torch.ones(1, 32, device=device)
        triton_kernels.matmul_triton(one, one.to(torch.int8), one[0, :1], None, bits=8, group_size=None)
    except Exception as error:  # no Triton, C compiler, Python headers or driver, or an old GPU: the errors differ
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"int8 and int4 products take the slow plain torch path: Triton fails ({reason})", stacklevel=2)
        return None
    return triton_kernels


def describe_path() -> str:
    """Returns a description of the path of this machine's CPU."""
    path = _chosen_path() or available_paths()[0]
    if path in NATIVE_PATHS:
        return f"the package's C++ kernel ({path.replace('_', ' ')})"
    reason = "" if native.instruction_sets() else "; the package's C++ kernel was not built"
    names = {
        "triton": "Triton's interpreter",
        "aten": "torch's int4pack and int8pack operations",
        "torch": "plain torch",
    }
    return names[path] + reason


def _chosen_path() -> str | None:
    """Returns the path that the environment variable `PATH_VARIABLE` forces; None if it is not set."""
    path = os.environ.get(PATH_VARIABLE) or None
    if path is not None and path not in available_paths():
        raise GmaskError(f"{PATH_VARIABLE}={path}: this machine has {', '.join(available_paths())}")
    return path


def repack_weight(
    weight: Tensor, scale: Tensor, *, bits: int, group_size: int | None = None, path: str | None = None
) -> PackedWeight:
    """Repacks a weight, without loss, for the fastest path of its device.

    Args:
        weight: published integers, int8 ``[N, K * bits / 8]`` (`formats.pack_integers`).
        scale: float16 or float32 (others become float32), ``[N]``, or ``[N, K / group_size]``.
        group_size: columns that share a scale; None for all.
        path: one of `available_paths`, instead of the fastest.

    Raises:
        GmaskError: shapes that do not fit together; a format or path that is not supported.
    """
    outputs, columns = weight.shape[0], weight.shape[1] * 8 // bits
    groups = columns // check_format(columns, bits, group_size)
    expected = (outputs,) if group_size is None else (outputs, groups)
    if weight.dtype != torch.int8 or tuple(scale.shape) != expected:
        raise GmaskError(
            f"an int{bits} weight {list(weight.shape)} of {weight.dtype} needs scales {list(expected)}, "
            f"not {list(scale.shape)}, and must be int8"
        )
    if scale.dtype not in (torch.float16, torch.float32):
        scale = scale.float()
    path = path or _chosen_path()
    if weight.device.type != "cpu" and path != "torch":
        path = None  # the environment names a path of the CPU
    usable = {
        "aten": aten_takes(bits=bits, outputs=outputs, columns=columns, group_size=group_size),
        "triton": weight.is_contiguous() and weight.shape[1] % 4 == 0 and weight.data_ptr() % 4 == 0,  # in words
    }
    candidates = [name for name in available_paths(weight.device) if usable.get(name, True)]
    path = path if path in candidates else candidates[0] if path is None else "torch"
    data = weight
    if path in NATIVE_PATHS:
        data, scale = native.pack_blocks_native(weight, bits), pack_scale_blocks(scale)
    elif path == "aten":
        data = pack_aten(weight, bits=bits)
    return PackedWeight(data, scale, bits, outputs, columns, group_size, path)


def adopt_blocks(
    blocks: Tensor, scale: Tensor, *, bits: int, outputs: int, columns: int, group_size: int | None
) -> PackedWeight | None:
    """Returns a weight whose blocks lie in memory already, such as a mapped file; None if the CPU has another path.

    Args:
        blocks: uint8, of `formats.pack_blocks`.
        scale: of `formats.pack_scale_blocks`, float16 or float32.
    """
    path = _chosen_path() or available_paths()[0]
    return PackedWeight(blocks, scale, bits, outputs, columns, group_size, path) if path in NATIVE_PATHS else None


def matmul(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Returns ``x @ dequantized.T + bias``; gradients flow to x and bias.

    Args:
        x: ``[..., K]``, floating point, on the weight's device.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    rows = x.reshape(-1, packed.columns)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Matmul.apply(rows, bias, packed)  # type: ignore[no-untyped-call]
    else:
        y = _multiply(rows, packed, bias)
    # The view is made outside of `_Matmul`: a view that a custom function returns must not be changed in place, which
    # AdaLoRA's layers do.
    output: Tensor = y.view(*x.shape[:-1], packed.outputs)
    return output


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor | None, packed: PackedWeight) -> Tensor:
        ctx.packed, ctx.bias_dtype = packed, None if bias is None else bias.dtype
        return _multiply(rows, packed, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_rows = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = _multiply_transposed(grad, ctx.packed)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_rows, grad_bias, None


def _multiply(rows: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """Multiplies ``[M, K]``; returns ``[M, N]``."""
    dtype = rows.dtype
    if packed.path in NATIVE_PATHS and dtype in (torch.float32, torch.bfloat16, torch.float16):
        served = rows.float() if dtype == torch.float16 else rows
        y = native.matmul_native(
            served, packed.data, packed.scale, bias, bits=packed.bits, outputs=packed.outputs, isa=packed.path
        )
        y = y if served is rows else y.to(dtype)  # a cast to the same type takes as long as half of the call
    elif packed.path == "triton" and dtype in TRITON_DTYPES and (triton_kernels := _triton_kernels(rows.device)):
        y = triton_kernels.matmul_triton(
            rows, packed.data, packed.scale, bias, bits=packed.bits, group_size=packed.group_size
        )
    else:
        if packed.path == "aten" and dtype == torch.bfloat16 and rows.shape[0] <= ATEN_ROWS[packed.bits]:
            scale = packed.scale.float()
            y = matmul_aten(rows.contiguous(), packed.data, scale, bits=packed.bits, group_size=packed.group_size)
        else:
            y = _multiply_in_chunks(rows, packed)
        y = y if bias is None else (y + bias).to(dtype)
    return y


def _multiply_in_chunks(x: Tensor, packed: PackedWeight) -> Tensor:
    """Computes the product with `ROW_CHUNK` rows of the weight dequantized at a time."""
    y = x.new_empty(x.shape[0], packed.outputs)
    scale = packed.row_scale()
    # bfloat16 holds the integers exactly, but not the scaled weights; a float16 sum of unscaled products may overflow.
    scale_output = x.dtype == torch.bfloat16 and packed.group_size is None
    for start in range(0, packed.outputs, ROW_CHUNK):
        chunk = slice(start, start + ROW_CHUNK)
        integers = packed.integers(start, start + ROW_CHUNK)
        if scale_output:
            y[:, chunk] = (x @ integers.to(x.dtype).T) * scale[chunk].float()
        else:
            y[:, chunk] = x @ dequantize(integers, scale[chunk], x.dtype).T
    return y


def _multiply_transposed(grad: Tensor, packed: PackedWeight) -> Tensor:
    """Returns ``grad @ dequantized``: the gradient of the activations, summed in float32."""
    total = grad.new_zeros(grad.shape[0], packed.columns, dtype=torch.promote_types(grad.dtype, torch.float32))
    scale = packed.row_scale()
    for start in range(0, packed.outputs, ROW_CHUNK):
        chunk = slice(start, start + ROW_CHUNK)
        total += grad[:, chunk] @ dequantize(packed.integers(start, start + ROW_CHUNK), scale[chunk], grad.dtype)
    return total.to(grad.dtype)
