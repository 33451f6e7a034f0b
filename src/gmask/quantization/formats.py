"""The int8 and int4 formats of weights: quantizing, packing, dequantizing.

All functions are plain torch, run on any device, and are the reference for the fast kernels. Integers are symmetric
around zero: ``weight ~ scale * integer``.

The published format: int8 ``[N, K]``, or int4 ``[N, K/2]`` with column 2j in the high nibble of byte j and 2j+1 in the
low one, in two's complement; a float16 scale per row (quantization.py of the published ChatGLM-6B).

Shape letters: N output rows, K input columns, G groups of K/G columns that share a scale (1 if a whole row does).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gmask.errors import GmaskError
from gmask.native.ops import BLOCK_COLUMNS, BLOCK_ROWS

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)


def quantize(
    weight: Tensor, bits: int, *, group_size: int | None = None, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """Quantizes a weight; returns integers and scales. Without ``group_size`` they are as published.

    ``scale = max|w| / (2**(bits-1) - 1)`` and ``integer = round(w / scale)``, halves to even, both in ``dtype``: the
    published checkpoints were made in float16, while a float32 model quantized on a CPU got float32 scales. If the
    original divides by zero (a row of zeros) or overflows (a subnormal scale), scale and integers are zero here, or the
    nearest values in range.

    Args:
        weight: ``[N, K]``, floating point.
        bits: 4 or 8.
        group_size: columns that share a scale; a divisor of K, or None for all of them.

    Returns:
        int8 ``[N, K]``, and scales of ``dtype``, ``[N]`` or ``[N, K/group_size]``.

    Raises:
        GmaskError: bits or a group size that are not supported, or a weight with NaN or infinity.
    """
    columns = check_format(weight.shape[-1], bits, group_size)
    largest = 2 ** (bits - 1) - 1
    groups = weight.to(dtype).view(-1, weight.shape[-1] // columns, columns)
    extent = groups.abs().amax(dim=-1, keepdim=True)
    if not extent.isfinite().all():
        raise GmaskError(f"a weight holds NaN or a number beyond {dtype}: it cannot be quantized")
    scale = extent / largest
    quotient = torch.where(scale == 0, 0, groups / scale)
    integers = quotient.round().clamp_(-largest - 1, largest).to(torch.int8)
    scale = scale.squeeze(-1)
    return integers.view(weight.shape), scale if group_size else scale.squeeze(-1)


def check_form(bits: int, group_size: int | None) -> None:
    """Raises `GmaskError` for a number of bits or a group size that is not supported."""
    if bits not in BITS:
        raise GmaskError(f"weights can be kept in 4 or 8 bits, not in {bits}")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise GmaskError(f"a group of {group_size} columns: choose 32, 64 or 128, or none for a scale a row")


def check_format(columns: int, bits: int, group_size: int | None) -> int:
    """Returns the number of columns that share a scale.

    Raises:
        GmaskError: a format that is not supported, or does not fit the number of columns.
    """
    check_form(bits, group_size)
    if bits == 4 and columns % 2:
        raise GmaskError(f"int4 weights need an even number of columns, not {columns}")
    if group_size is None:
        return columns
    if columns % group_size:
        raise GmaskError(
            f"a group of {group_size} columns: choose 32, 64 or 128, and a divisor of the weight's {columns}"
        )
    return group_size


def pack_int4(integers: Tensor) -> Tensor:
    """Packs int8 ``[N, K]`` in -8..7 as the published int8 ``[N, K/2]``."""
    return (integers[..., 0::2] << 4) | (integers[..., 1::2] & 15)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    return torch.stack((packed >> 4, packed << 4 >> 4), dim=-1).flatten(-2)


def pack_integers(integers: Tensor, bits: int) -> Tensor:
    """Packs int8 ``[N, K]`` as the published ``[N, K * bits / 8]``."""
    return pack_int4(integers) if bits == 4 else integers


def unpack_integers(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_integers`."""
    return unpack_int4(packed) if bits == 4 else packed


def dequantize(integers: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns ``scale * integer``, rounded once to ``dtype``. The original uses float32 on a CPU, float16 on a GPU.

    Args:
        integers: int8 ``[N, K]``.
        scale: ``[N]`` or ``[N, G]``.
    """
    scale = scale.float().view(integers.shape[0], -1, 1)
    groups = integers.view(integers.shape[0], scale.shape[1], -1)
    return (scale * groups).view(integers.shape).to(dtype)


def pack_blocks(packed: Tensor, bits: int) -> Tensor:
    """Rearranges the published ``[N, K * bits / 8]`` into blocks, which the kernels read sequentially.

    The plain twin of `gmask.native.ops.pack_blocks_native`; the layout is described in native/csrc/kernels.h.

    Returns:
        uint8, ``[N/32, K * bits / 32, 32, 4]``: each 32-bit word is of one row; N and K are padded to 32.
    """
    rows, width = packed.shape
    packed = pad(packed, (0, -width % (BLOCK_COLUMNS * bits // 8), 0, -rows % BLOCK_ROWS)).view(torch.uint8)
    words = packed.view(-1, BLOCK_ROWS, packed.shape[1] // 4, 4)
    if bits == 4:
        nibbles = words ^ 0x88  # two's complement + 8
        columns = torch.stack((nibbles >> 4, nibbles & 15), dim=-1).flatten(-2)
        words = columns[..., :4] | columns[..., 4:] << 4
    return words.transpose(1, 2).contiguous()


BLOCK_LAYOUT = 1
"""The number of the layout of blocks, for files that hold them: another one when native/csrc/kernels.h changes."""


def block_shape(shape: Sequence[int], bits: int) -> tuple[int, ...]:
    """Returns the shape of the blocks of a published weight ``[N, K * bits / 8]``."""
    rows, width = shape
    step = BLOCK_COLUMNS * bits // 8
    return -(-rows // BLOCK_ROWS), -(-width // step) * step // 4, BLOCK_ROWS, 4


def scale_block_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the blocks of scales ``[N]`` or ``[N, G]``."""
    rows, groups = (*shape, 1)[:2]
    return -(-rows // BLOCK_ROWS), groups, BLOCK_ROWS


def unpack_blocks(blocks: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_blocks`: int8 ``[rows, columns * bits / 8]``, the padding left out."""
    words = blocks.transpose(1, 2)
    if bits == 4:
        nibbles = torch.cat((words & 15, words >> 4), dim=-1)
        words = (nibbles[..., 0::2] << 4 | nibbles[..., 1::2]) ^ 0x88
    packed = words.reshape(-1, blocks.shape[1] * 4)
    return packed[:rows, : columns * bits // 8].contiguous().view(torch.int8)


def pack_scale_blocks(scale: Tensor) -> Tensor:
    """Rearranges scales ``[N]`` or ``[N, G]`` as ``[N/32, G, 32]``, in the order of the blocks."""
    scale = scale.view(scale.shape[0], -1)
    scale = pad(scale, (0, 0, 0, -scale.shape[0] % BLOCK_ROWS))
    return scale.view(-1, BLOCK_ROWS, scale.shape[1]).transpose(1, 2).contiguous()


def unpack_scale_blocks(blocks: Tensor, rows: int, *, group_size: int | None) -> Tensor:
    """The inverse of `pack_scale_blocks`."""
    scale = blocks.transpose(1, 2).reshape(-1, blocks.shape[1])[:rows].contiguous()
    return scale if group_size else scale.squeeze(1)
