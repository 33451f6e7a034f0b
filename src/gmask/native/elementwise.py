"""How are the C++ loops over single numbers called? For one token torch's overhead is most of what these cost.

Shape letters: B rows, N heads, T positions, G groups of R channels of a head.
"""

import ctypes

import torch
from torch import Tensor

from gmask.native.shared_library import INSTRUCTION_SETS, NUMBER_TYPES, check, instruction_sets, open_library


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
        isa: one of `gmask.native.shared_library.instruction_sets`, instead of the best.
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
        isa: one of `gmask.native.shared_library.instruction_sets`, instead of the best.

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
