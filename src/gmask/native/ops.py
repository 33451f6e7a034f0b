"""The package's own C++ library, and its operations: products, attention of one query, GELU, rotation.

The library beside this file is built when the package is installed, if a C++ compiler is found (setup.py); nothing is
compiled later. It has a plain C interface, so it depends on no version of Python or torch.

torch's fused attention is made for many queries: for one, as in decoding, it takes several times as long as reading the
keys and values.

Shape letters: B rows, N heads, K key positions, D head size, T positions, G groups of R channels of a head.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

INSTRUCTION_SETS = ("portable", "neon", "avx2", "avx512", "avx512_vnni")  # as csrc/kernels.h numbers them
LIBRARY = Path(__file__).with_name("_native.dll" if sys.platform == "win32" else "_native.so")
NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@cache
def open_library() -> ctypes.CDLL | None:
    """The library; None where it was not built, or for another machine."""
    if not LIBRARY.is_file():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    pointer, count, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.gmask_matmul.argtypes = [size] * 4 + [pointer] * 4 + [size, pointer] + [count] * 4 + [size]
    library.gmask_pack.argtypes = [size, pointer, pointer, count, count, size]
    library.gmask_gelu.argtypes = [size, pointer, pointer, count, size]
    library.gmask_rotate.argtypes = [size] * 2 + [pointer] * 5 + [count] * 5 + [size]
    library.gmask_attention.argtypes = [size] * 2 + [pointer] * 6 + [count] * 4 + [ctypes.c_float, size]
    return library


@cache
def instruction_sets() -> tuple[str, ...]:
    """What the library and this machine can do, the slowest first; empty where the library was not built."""
    library = open_library()
    if library is None:
        return ()
    bits = library.gmask_instruction_sets()
    return tuple(name for index, name in enumerate(INSTRUCTION_SETS) if bits >> index & 1)


def check(failed: int, what: str) -> None:
    """Raises what a call of the library returned.

    Raises:
        MemoryError: no room for what the call needs beside its arguments.
    """
    if failed == 2:
        raise MemoryError(f"no memory for {what}")
    assert not failed, f"no kernel for {what}"


BLOCK_ROWS, BLOCK_COLUMNS = 32, 32  # csrc/kernels.h: kRows, kColumnStep


def pack_blocks(packed: Tensor, bits: int) -> Tensor:
    """`gmask.quantization.formats.pack_blocks`, in one pass; on the CPU."""
    library = open_library()
    assert library is not None and packed.device.type == "cpu"
    packed = pad(packed, (0, -packed.shape[1] % (BLOCK_COLUMNS * bits // 8))).contiguous()
    rows, width = packed.shape
    blocks = torch.empty(-(-rows // BLOCK_ROWS), width // 4, BLOCK_ROWS, 4, dtype=torch.uint8)
    failed = library.gmask_pack(bits, packed.data_ptr(), blocks.data_ptr(), rows, width, torch.get_num_threads())
    check(failed, f"the packing of {bits}-bit weights")
    return blocks


def matmul(
    x: Tensor, blocks: Tensor, scale: Tensor, bias: Tensor | None, *, bits: int, outputs: int, isa: str
) -> Tensor:
    """``x @ dequantized.T + bias`` on the CPU, summed in float32.

    Args:
        x: ``[M, K]``, float32 or bfloat16.
        blocks: of `gmask.quantization.formats.pack_blocks`.
        scale: of `gmask.quantization.formats.pack_scale_blocks`, float16 or float32.
        bias: ``[outputs]`` or None.
        outputs: N, without padding.
        isa: one of `gmask.native.ops.instruction_sets`. With ``avx512_vnni`` bfloat16 activations are
            rounded to int8, with a step for every 128 columns (64 with 8-bit weights).

    Returns:
        ``[M, outputs]`` in x's dtype.
    """
    library = open_library()
    assert library is not None and blocks.device.type == scale.device.type == x.device.type == "cpu"
    assert blocks.is_contiguous() and scale.is_contiguous()
    x = x.contiguous()
    rows, columns = x.shape
    y = torch.empty(rows, outputs, dtype=x.dtype)
    if bias is not None:
        bias = (bias if bias.dtype in NUMBER_TYPES else bias.float()).contiguous()
    failed = library.gmask_matmul(
        INSTRUCTION_SETS.index(isa),
        bits,
        NUMBER_TYPES[x.dtype],
        scale.dtype == torch.float16,
        blocks.data_ptr(),
        scale.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        NUMBER_TYPES[torch.float32 if bias is None else bias.dtype],
        y.data_ptr(),
        rows,
        outputs,
        columns,
        columns // scale.shape[1],
        torch.get_num_threads(),
    )
    check(failed, f"a product with {bits}-bit weights ({isa})")
    return y


HEAD_STEP, MAX_HEAD = 16, 512  # csrc/kernels.h: kHeadStep, csrc/exponential.h: kMaxHead


def can_attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> bool:
    """Whether `attend` takes these: one query, on the CPU, in float32 or bfloat16, no gradients."""
    return (
        query.shape[2] == 1
        and query.is_cpu
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and query.dtype in NUMBER_TYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] % HEAD_STEP == 0
        and query.shape[-1] <= MAX_HEAD
        and query.shape[1] == key.shape[1]
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and (visible is None or (visible.dtype == torch.bool and visible.shape[1:3] == (1, 1)))
        and not torch.compiler.is_compiling()
        and bool(instruction_sets())
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, *, scaling: float, isa: str | None = None
) -> Tensor:
    """``softmax(scaling * query @ key.T) @ value``, summed in float32.

    Args:
        query: ``[B, N, 1, D]``.
        key, value: ``[B, N, K, D]``, the last axis contiguous.
        visible: boolean ``[B, 1, 1, K]``, or None where every key is. A row that sees nothing gets zeros.
        isa: one of `gmask.native.ops.instruction_sets`, instead of the best.

    Returns:
        ``[B, 1, N, D]``, in the precision of the query.
    """
    library = open_library()
    assert library is not None
    batch, heads, _, size = query.shape
    length = key.shape[2]
    out = torch.empty(batch, 1, heads, size, dtype=query.dtype)
    strides = [
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        *((0, 0) if visible is None else (visible.stride(0) if len(visible) > 1 else 0, visible.stride(3))),
    ]
    failed = library.gmask_attention(
        INSTRUCTION_SETS.index(isa or instruction_sets()[-1]),
        NUMBER_TYPES[query.dtype],
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if visible is None else visible.data_ptr(),
        out.data_ptr(),
        (ctypes.c_int64 * len(strides))(*strides),
        batch,
        heads,
        length,
        size,
        scaling,
        torch.get_num_threads(),
    )
    check(failed, "the attention of one query")
    return out


def _is_plain(x: Tensor) -> bool:
    """Numbers on the CPU, without gradients, and a library to compute with."""
    return (
        x.is_cpu
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_compiling()
        and bool(instruction_sets())
    )


def can_gelu(x: Tensor) -> bool:
    """Whether `gelu` takes these: bfloat16 on the CPU, no gradients."""
    return x.dtype == torch.bfloat16 and x.is_contiguous() and _is_plain(x)


def gelu(x: Tensor, *, isa: str | None = None) -> Tensor:
    """The tanh form of GELU in float32, rounded once.

    Args:
        isa: one of `gmask.native.ops.instruction_sets`, instead of the best.
    """
    library = open_library()
    assert library is not None
    out = torch.empty_like(x)
    number = INSTRUCTION_SETS.index(isa or instruction_sets()[-1])
    check(library.gmask_gelu(number, x.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads()), "GELU")
    return out


def can_rotate(states: Tensor, cosines: Tensor) -> bool:
    """Whether `rotate` takes these: float32 or bfloat16 on the CPU, float32 tables, no gradients."""
    return (
        states.dtype in NUMBER_TYPES
        and states.stride(-1) == 1
        and cosines.dtype == torch.float32
        and cosines.is_contiguous()
        and _is_plain(states)
    )


def rotate(states: Tensor, cosines: Tensor, sines: Tensor, *, isa: str | None = None) -> Tensor:
    """Turns channels i and i + R/2 of each group by an angle of their own, in float32, rounded once.

    Args:
        states: ``[B, N, T, G * R]``.
        cosines, sines: float32 ``[B or 1, 1, T, G, R]``, contiguous.
        isa: one of `gmask.native.ops.instruction_sets`, instead of the best.

    Returns:
        ``[B, N, T, G * R]``, contiguous.
    """
    library = open_library()
    assert library is not None
    batch, heads, length, size = states.shape
    groups, channels = cosines.shape[-2:]
    out = torch.empty(states.shape, dtype=states.dtype)
    strides = (*states.stride()[:3], length * size if len(cosines) > 1 else 0, size)
    failed = library.gmask_rotate(
        INSTRUCTION_SETS.index(isa or instruction_sets()[-1]),
        NUMBER_TYPES[states.dtype],
        states.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        out.data_ptr(),
        (ctypes.c_int64 * len(strides))(*strides),
        batch,
        heads,
        length,
        groups,
        channels // 2,
        torch.get_num_threads(),
    )
    check(failed, "rotary places")
    return out
