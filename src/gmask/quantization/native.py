"""Which instruction sets of the package's own C++ kernel does this machine have, and how is it called?

The library beside this file is built when the package is installed, if a C++ compiler is found (setup.py); nothing is
compiled later. It has a plain C interface, so it depends on no version of Python or torch.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch  # first: the library then shares the OpenMP threads that torch has loaded
from torch import Tensor

INSTRUCTION_SETS = ("portable", "neon", "avx2", "avx512", "avx512_bf16")  # as csrc/blocks.h numbers them
LIBRARY = Path(__file__).with_name("_matmul.dll" if sys.platform == "win32" else "_matmul.so")
ACTIVATION_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@cache
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.is_file():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # built for another machine
        return None
    pointer, count, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.gmask_matmul.argtypes = [size] * 4 + [pointer] * 5 + [count] * 4 + [size]
    return library


@cache
def instruction_sets() -> tuple[str, ...]:
    """What the library and this machine can do, the slowest first; empty where the library was not built."""
    library = _library()
    if library is None:
        return ()
    bits = library.gmask_instruction_sets()
    return tuple(name for index, name in enumerate(INSTRUCTION_SETS) if bits >> index & 1)


def matmul(
    x: Tensor, blocks: Tensor, scale: Tensor, bias: Tensor | None, *, bits: int, outputs: int, isa: str
) -> Tensor:
    """``x @ dequantized.T + bias`` on the CPU, summed in float32.

    Args:
        x: ``[M, K]``, float32 or bfloat16.
        blocks: of `packing.pack_blocks`.
        scale: of `packing.pack_scale_blocks`, float16 or float32.
        bias: ``[outputs]`` or None.
        outputs: N, without padding.
        isa: one of `instruction_sets`.

    Returns:
        ``[M, outputs]`` in x's dtype.
    """
    library = _library()
    assert library is not None and blocks.device.type == scale.device.type == x.device.type == "cpu"
    assert blocks.is_contiguous() and scale.is_contiguous()
    x = x.contiguous()
    rows, columns = x.shape
    y = torch.empty(rows, outputs, dtype=x.dtype)
    if bias is not None:
        bias = bias.float().contiguous()
    failed = library.gmask_matmul(
        INSTRUCTION_SETS.index(isa),
        bits,
        ACTIVATION_TYPES[x.dtype],
        scale.dtype == torch.float16,
        blocks.data_ptr(),
        scale.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        rows,
        outputs,
        columns,
        columns // scale.shape[1],
        torch.get_num_threads(),
    )
    if failed == 2:
        raise MemoryError("no memory for the activations of a quantized matrix product")
    assert not failed, f"no kernel for {bits} bits, {isa}"
    return y
