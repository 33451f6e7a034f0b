"""Products with int8 and int4 weights on CUDA devices, in the published packing.

For a few rows of activations, reading the weight takes most of the time: one kernel extracts the integers from 32-bit
words in registers and sums in float32. For more rows, a second kernel dequantizes a part of the weight at a time, and
cuBLAS multiplies. Triton compiles both at their first use.

Shape letters: formats.py, M rows of activations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_ROWS = 16  # most rows of activations for the first kernel; with more, dequantizing for cuBLAS is faster
ROWS = 8  # most rows of activations in a program: its registers hold no more sums
SUMS = 32  # activation rows times weight rows of a program
WORDS = 256  # 32-bit words of a weight row that a program holds at a time, one for each thread
WARPS = 8
DENSE_SIZE = 2**26  # elements dequantized at a time: 128 MiB in half precision, the largest layer of ChatGLM-6B
DENSE_BLOCK = 1024


# `columns` is not specialized. For a known multiple of 16, Triton would load four words a thread and exchange them
# through shared memory in each round. Loads of single words are coalesced, too, and need no exchange.
@triton.jit(do_not_specialize=["columns"])
def _multiply_words(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,  # or None
    y_ptr: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    columns: tl.tensor,
    bits: tl.constexpr,
    group_size: tl.constexpr,  # or None
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_words: tl.constexpr,
) -> None:
    """Multiplies a block of weight rows with a block of activation rows, over all columns."""
    fields: tl.constexpr = 32 // bits
    ones: tl.constexpr = (1 << bits) - 1
    sign_bits: tl.constexpr = (0x88888888 if bits == 4 else 0x80808080) - (1 << 32)
    words = columns // fields
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    output = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    is_row, is_output = row < rows, output < outputs
    weight_rows = weight_ptr.to(tl.pointer_type(tl.int32)) + output[:, None].to(tl.int64) * words
    total = tl.zeros((block_rows, block_outputs, block_words), tl.float32)
    for start in range(0, words, block_words):
        word = start + tl.arange(0, block_words)
        is_word = word < words
        is_weight = is_output[:, None] & is_word[None]
        packed = tl.load(weight_rows + word[None], mask=is_weight, other=0) ^ sign_bits  # makes the fields unsigned
        part = tl.zeros((block_rows, block_outputs, block_words), tl.float32)
        for field in tl.static_range(fields):
            # An integer n in the low bits of the float 2^23 gives the float 2^23 + n without a slow conversion. The
            # field is `shift` bits too high; dividing the activation by 2^shift, which is exact, makes up for it.
            shift = field * bits % 16
            half = packed if field * bits < 16 else packed >> 16
            number = ((half & (ones << shift)) | 0x4B000000).to(tl.float32, bitcast=True)
            integer = number - (8388608.0 + (1 << (bits - 1 + shift)))
            column = word * fields + (field ^ 1 if bits == 4 else field)  # the high nibble is the first of its byte
            x_at = x_ptr + row[:, None] * columns + column[None]
            x = tl.load(x_at, mask=is_row[:, None] & is_word[None], other=0).to(tl.float32) * (1.0 / (1 << shift))
            part += x[:, None, :] * integer[None]
        if group_size is not None:  # a word lies within one group
            group = word * fields // group_size
            scale_at = scale_ptr + output[:, None].to(tl.int64) * (columns // group_size) + group[None]
            part *= tl.load(scale_at, mask=is_weight, other=0).to(tl.float32)[None]
        total += part
    y = tl.sum(total, axis=2)
    if group_size is None:
        y *= tl.load(scale_ptr + output, mask=is_output, other=0).to(tl.float32)[None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + output, mask=is_output, other=0).to(tl.float32)[None]
    y_at = y_ptr + row[:, None] * outputs + output[None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_output[None])


@triton.jit
def _dequantize_block(
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,  # or None: the integers alone
    dense_ptr: tl.tensor,
    columns: tl.tensor,
    bits: tl.constexpr,
    group_size: tl.constexpr,  # or None
    block: tl.constexpr,
) -> None:
    """Dequantizes a block of columns of one weight row. Neighbouring threads write neighbouring columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    is_column = column < columns
    packed = tl.load(weight_ptr + row * (columns * bits // 8) + column * bits // 8, mask=is_column, other=0)
    integer = packed.to(tl.int32)
    if bits == 4:
        integer = integer << (24 + column % 2 * 4) >> 28
    number = integer.to(tl.float32)
    if scale_ptr is not None:
        group = column // (columns if group_size is None else group_size)
        groups = 1 if group_size is None else columns // group_size
        number *= tl.load(scale_ptr + row * groups + group, mask=is_column, other=0).to(tl.float32)
    tl.store(dense_ptr + row * columns + column, number.to(dense_ptr.dtype.element_ty), mask=is_column)


def matmul_triton(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, bits: int, group_size: int | None
) -> Tensor:
    """Returns ``x @ dequantized.T + bias``, summed in float32.

    Args:
        x: ``[M, K]``, float16, bfloat16 or float32.
        weight: published integers, int8 ``[N, K * bits / 8]``, contiguous; rows are whole 32-bit words, aligned.
        scale: float16 or float32, ``[N]`` or ``[N, K / group_size]``.
        bias: ``[N]`` or None.

    Returns:
        ``[M, N]`` in x's dtype.
    """
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        if x.shape[0] <= FEW_ROWS:
            return _multiply_few(x.contiguous(), weight, scale, bias, bits, group_size)
        y = _multiply_many(x, weight, scale, bits, group_size)
    return y if bias is None else (y + bias).to(x.dtype)


def _multiply_few(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group_size: int | None
) -> Tensor:
    (rows, columns), outputs = x.shape, weight.shape[0]
    y = x.new_empty(rows, outputs)
    if y.numel() == 0:
        return y
    block_rows = min(triton.next_power_of_2(rows), ROWS)
    block_outputs = min(SUMS // block_rows, 16)
    _multiply_words[triton.cdiv(outputs, block_outputs), triton.cdiv(rows, block_rows)](
        x,
        weight,
        scale,
        bias,
        y,
        rows,
        outputs,
        columns,
        bits=bits,
        group_size=group_size,
        block_rows=block_rows,
        block_outputs=block_outputs,
        block_words=WORDS,
        num_warps=WARPS,
    )
    return y


def _multiply_many(x: Tensor, weight: Tensor, scale: Tensor, bits: int, group_size: int | None) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    step = max(1, DENSE_SIZE // x.shape[1])
    # bfloat16 holds the integers exactly, but not the scaled weights; a float16 sum of unscaled products may overflow.
    scale_output = x.dtype == torch.bfloat16 and group_size is None
    for start in range(0, weight.shape[0], step):
        chunk = slice(start, start + step)
        chunk_scale = None if scale_output else scale[chunk]
        dense = dequantize_triton(weight[chunk], chunk_scale, bits=bits, group_size=group_size, dtype=x.dtype)
        part = x @ dense.T
        y[:, chunk] = part * scale[chunk].float() if scale_output else part
    return y


def dequantize_triton(
    weight: Tensor, scale: Tensor | None, *, bits: int, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    """Returns ``scale * integer``, rounded once to ``dtype``; without a ``scale`` the integers.

    Args:
        weight: int8 ``[N, K * bits / 8]``.

    Returns:
        ``[N, K]``.
    """
    rows, columns = weight.shape[0], weight.shape[1] * 8 // bits
    dense = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    _dequantize_block[rows, triton.cdiv(columns, DENSE_BLOCK)](
        weight, scale, dense, columns, bits=bits, group_size=group_size, block=DENSE_BLOCK
    )
    return dense
