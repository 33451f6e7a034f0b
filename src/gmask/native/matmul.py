"""How are the C++ product with a quantized weight, and the packing of the weight for it, called?"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from gmask.native.shared_library import INSTRUCTION_SETS, NUMBER_TYPES, check, open_library

BLOCK_ROWS, BLOCK_COLUMNS = 32, 32  # csrc/kernels.h: kRows, kColumnStep


def pack_blocks(packed: Tensor, bits: int) -> Tensor:
    """`gmask.quantization.packing.pack_blocks`, in one pass; on the CPU."""
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
        blocks: of `gmask.quantization.packing.pack_blocks`.
        scale: of `gmask.quantization.packing.pack_scale_blocks`, float16 or float32.
        bias: ``[outputs]`` or None.
        outputs: N, without padding.
        isa: one of `gmask.native.shared_library.instruction_sets`. With ``avx512_vnni`` bfloat16 activations are
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
