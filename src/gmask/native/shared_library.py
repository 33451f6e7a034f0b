"""Which instruction sets of the package's own C++ library does this machine have, and how is the library reached?

The library beside this file is built when the package is installed, if a C++ compiler is found (setup.py); nothing is
compiled later. It has a plain C interface, so it depends on no version of Python or torch.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch  # first: the library then shares the OpenMP threads that torch has loaded

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
