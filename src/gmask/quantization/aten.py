"""Products with int8 and int4 weights by torch's own CPU operations.

They are used only for bfloat16 activations: with float32 they take a hundred times as long, and float16 sums may
overflow. A scale per row is applied to the output in float32, with ones as the packed scales: this is more accurate
than packed bfloat16 scales. Group-wise scales have to be packed.
"""

from functools import cache

import torch
from torch import Tensor

from gmask.quantization.formats import pack_int4, unpack_integers

PACKED_ROWS = 1024  # rows packed at a time: the operation takes 32-bit integers, eight times the packed size
LAYOUT_ROWS = 64  # rows of a block in torch's widest layout
ATEN_ROWS = {4: 56, 8: 14}  # most rows of activations, by bits; with more, dequantizing is faster


def aten_takes(*, bits: int, outputs: int, columns: int, group_size: int | None) -> bool:
    """Returns True if torch can multiply with a weight of this format and shape on this CPU."""
    if bits == 8:
        return group_size is None and columns % 32 == 0 and outputs % 16 == 0
    return columns % 32 == 0 and outputs % LAYOUT_ROWS == 0 and _layout() is not None


@cache
def _layout() -> int | None:
    """Finds the number of rows whose nibbles are adjacent in torch's int4 layout on this CPU; None if unknown."""
    integers = torch.arange(LAYOUT_ROWS * 32).mul(7).remainder(16).sub(8).to(torch.int8).view(LAYOUT_ROWS, 32)
    try:
        packed = pack_aten(pack_int4(integers), bits=4)
    except RuntimeError:
        return None
    return next((lanes for lanes in (32, 16) if torch.equal(_unpack_int4(packed, lanes), integers)), None)


def pack_aten(packed: Tensor, *, bits: int) -> Tensor:
    """Converts the published integers into torch's layout."""
    if bits == 8:
        return packed.contiguous()
    out = torch.empty(packed.shape, dtype=torch.uint8)
    for start in range(0, packed.shape[0], PACKED_ROWS):
        unsigned = unpack_integers(packed[start : start + PACKED_ROWS], 4).int() + 8
        out[start : start + PACKED_ROWS] = torch._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    return out


def unpack_aten(data: Tensor, *, bits: int) -> Tensor:
    """The inverse of `pack_aten` for whole blocks of rows: int8 ``[N, K]``."""
    if bits == 8:
        return data
    lanes = _layout()
    assert lanes is not None
    return _unpack_int4(data, lanes)


def unpack_rows_aten(data: Tensor, ids: Tensor, *, bits: int) -> Tensor:
    """Returns int8 ``[n, K]``: the rows ``ids [n]`` of a weight in torch's layout."""
    if bits == 8:
        return data[ids]
    lanes = _layout()
    assert lanes is not None
    row = ids % (2 * lanes)  # in a block of `_unpack_int4`
    packed = data.view(-1, 2 * data.shape[1], lanes)[ids // (2 * lanes), :, row % lanes]
    nibbles = torch.where((row < lanes)[:, None], packed & 15, packed >> 4)
    return nibbles.to(torch.int8).sub_(8)


def _unpack_int4(data: Tensor, lanes: int) -> Tensor:
    """Unpacks ``[N / (2 * lanes), K, lanes]`` bytes: low nibbles are the first rows of a block, high ones the rest."""
    rows, width = data.shape
    blocks = data.view(-1, 2 * width, lanes)
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=1)  # [blocks, 2, K, lanes]
    return nibbles.transpose(2, 3).reshape(rows, 2 * width).to(torch.int8).sub_(8)


def matmul_aten(x: Tensor, data: Tensor, scale: Tensor, *, bits: int, group_size: int | None) -> Tensor:
    """Returns ``x @ dequantized.T`` for a few rows of bfloat16 ``[M, K]``; ``scale`` float32 ``[N]`` or ``[N, G]``."""
    if bits == 8:
        ones = torch.ones(data.shape[0], dtype=x.dtype)
        return torch._weight_int8pack_mm(x, data, ones).mul(scale).to(x.dtype)
    group = group_size or next(size for size in (256, 128, 64, 32) if x.shape[1] % size == 0)
    in_pack = torch.ones(data.shape[0], 1) if group_size is None else scale
    scales = in_pack.to(x.dtype).T.expand(x.shape[1] // group, -1)
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, data, group, scales_and_zeros)
    return y if group_size else y.mul(scale).to(x.dtype)
