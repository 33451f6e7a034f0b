"""How is the C++ attention of a single query called?

torch's fused attention is made for many queries: for one, as in decoding, it takes several times as long as reading the
keys and values.

Shape letters: B rows, N heads, K key positions, D head size.
"""

import ctypes

import torch
from torch import Tensor

from gmask.native.shared_library import INSTRUCTION_SETS, NUMBER_TYPES, check, instruction_sets, open_library

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
        isa: one of `gmask.native.shared_library.instruction_sets`, instead of the best.

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
