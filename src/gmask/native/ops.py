"""The package's own C++ library.

It has products with int8, int4, bfloat16 and float32 weights, attention of one query, keys and values in int8, GELU,
rotary positions, and the second half of a block with quantized weights.

The library beside this file is built when the package is installed, if there is a C++ compiler (setup.py); nothing is
compiled later. It has a plain C interface, so that it does not depend on the versions of Python and torch.

torch's fused attention is made for many queries. For a single one, as in decoding, it takes several times as long as
reading the keys and values.

Shape letters: B rows, N heads, K key positions, D head size, T positions, G groups of R channels of a head.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

INSTRUCTION_SETS = (  # as csrc/kernels.h
    "portable",
    "neon",
    "avx2",
    "avx2_int8",
    "avx_vnni",
    "avx512",
    "avx512_vnni",
    "avx512_bf16",
    "neon_dotprod",
    "neon_i8mm",
)
LIBRARY = Path(__file__).with_name("_native.dll" if sys.platform == "win32" else "_native.so")
NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1}
STORED_TYPES = {**NUMBER_TYPES, torch.int8: 2}  # of keys and values


class LinearPointers(ctypes.Structure):
    """A quantized weight and its bias, for `feed_forward`; the tensors must live as long (csrc/api.h: GmaskLinear)."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "columns", "group")),
        *((name, ctypes.c_int32) for name in ("bits", "half_scale", "bias_type")),
    )

    @classmethod
    def to(
        cls, blocks: Tensor, scale: Tensor, bias: Tensor | None, *, bits: int, outputs: int, columns: int
    ) -> "LinearPointers":
        """Arguments as of `matmul_native`; the bias is contiguous, and in one of `NUMBER_TYPES`."""
        return cls(
            blocks.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            outputs,
            columns,
            columns // scale.shape[1],
            bits,
            scale.dtype == torch.float16,
            NUMBER_TYPES[torch.float32 if bias is None else bias.dtype],
        )


@cache
def open_library() -> ctypes.CDLL | None:
    """Returns the library; None if it was not built, or was built for another machine."""
    if not LIBRARY.is_file():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    pointer, count, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.gmask_matmul.argtypes = [size] * 4 + [pointer] * 4 + [size, pointer] + [count] * 4 + [size]
    library.gmask_dense.argtypes = [size] * 2 + [pointer] * 3 + [size, pointer] + [count] * 3 + [size]
    library.gmask_pack.argtypes = [size, pointer, pointer, count, count, size]
    library.gmask_gelu.argtypes = [size, pointer, pointer, count, size]
    library.gmask_rotate.argtypes = [size] * 2 + [pointer] * 5 + [count] * 5 + [size]
    library.gmask_attention.argtypes = [size] * 3 + [pointer] * 6 + [count] * 4 + [ctypes.c_float, size]
    library.gmask_round.argtypes = [size] * 2 + [pointer] * 3 + [count] * 4 + [size]
    library.gmask_feed_forward.argtypes = [size, *[ctypes.POINTER(LinearPointers)] * 2, *[pointer] * 2]
    library.gmask_feed_forward.argtypes += [ctypes.c_float] * 2 + [pointer] * 4 + [count, size]
    return library


@cache
def instruction_sets() -> tuple[str, ...]:
    """Returns the instruction sets of both library and machine, the slowest first; none without a library."""
    library = open_library()
    if library is None:
        return ()
    bits = library.gmask_instruction_sets()
    return tuple(name for index, name in enumerate(INSTRUCTION_SETS) if bits >> index & 1)


def _call(function: str, *arguments: Any, purpose: str) -> None:
    """Calls a function of the library, with as many threads as torch has.

    Raises:
        MemoryError: no memory for the working buffers of the call.
    """
    library = open_library()
    assert library is not None
    failed = getattr(library, function)(*arguments, torch.get_num_threads())
    if failed == 2:
        raise MemoryError(f"no memory for {purpose}")
    assert not failed, f"no kernel for {purpose}"


def _number_of(isa: str | None) -> int:
    """Returns the number of an instruction set in csrc/kernels.h; for None that of the fastest."""
    return INSTRUCTION_SETS.index(isa or instruction_sets()[-1])


def _as_array(strides: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(strides))(*strides)


def is_captured() -> bool:
    """Whether a graph is being made (torch.compile, torch.export, torch.jit.trace), which must hold for other values.

    Nothing may then depend on the values of a tensor, so that what is wrong with them is not noticed.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _are_served(*tensors: Tensor) -> bool:
    """Returns True if the library can compute with tensors: on the CPU, without gradients, not in a captured graph."""
    if is_captured() or not instruction_sets():
        return False
    has_gradients = torch.is_grad_enabled()
    for x in tensors:  # noqa: SIM110 - this runs in each layer for each token, and a generator would be slower
        if not x.is_cpu or (has_gradients and x.requires_grad):
            return False
    return True


BLOCK_ROWS, BLOCK_COLUMNS = 32, 32  # csrc/kernels.h: kRows, kColumnStep


def pack_blocks_native(packed: Tensor, bits: int) -> Tensor:
    """As `gmask.quantization.formats.pack_blocks`, in one pass, on the CPU."""
    assert packed.is_cpu
    packed = pad(packed, (0, -packed.shape[1] % (BLOCK_COLUMNS * bits // 8))).contiguous()
    rows, width = packed.shape
    blocks = torch.empty(-(-rows // BLOCK_ROWS), width // 4, BLOCK_ROWS, 4, dtype=torch.uint8)
    purpose = f"the packing of {bits}-bit weights"
    _call("gmask_pack", bits, packed.data_ptr(), blocks.data_ptr(), rows, width, purpose=purpose)
    return blocks


def matmul_native(
    x: Tensor, blocks: Tensor, scale: Tensor, bias: Tensor | None, *, bits: int, outputs: int, isa: str
) -> Tensor:
    """Returns ``x @ dequantized.T + bias`` on the CPU, summed in float32.

    Args:
        x: ``[M, K]``, float32 or bfloat16.
        blocks: of `gmask.quantization.formats.pack_blocks`.
        scale: of `gmask.quantization.formats.pack_scale_blocks`, float16 or float32.
        bias: ``[outputs]`` or None.
        outputs: N, without padding.
        isa: one of `instruction_sets`. With ``avx512_vnni``, ``avx_vnni``, ``neon_dotprod`` and ``neon_i8mm``, bfloat16
            activations are rounded to int8, with a scale for every 128 columns (64 with 8-bit weights); with
            ``avx2_int8`` to int8, or int16 with 8-bit weights, with a scale for every 128.

    Returns:
        ``[M, outputs]`` in x's dtype.
    """
    assert blocks.is_cpu and scale.is_cpu and x.is_cpu
    assert blocks.is_contiguous() and scale.is_contiguous()
    x = x.contiguous()
    rows, columns = x.shape
    y = torch.empty(rows, outputs, dtype=x.dtype)
    if bias is not None:
        bias = (bias if bias.dtype in NUMBER_TYPES else bias.float()).contiguous()
    _call(
        "gmask_matmul",
        _number_of(isa),
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
        purpose=f"a product with {bits}-bit weights ({isa})",
    )
    return y


DENSE_STEP = 32  # csrc/kernels.h: kDenseStep


def can_multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Returns True if `multiply` takes these tensors: bfloat16 or float32, on the CPU, without gradients."""
    return (
        x.dtype == weight.dtype
        and x.dtype in NUMBER_TYPES
        and weight.shape[1] % DENSE_STEP == 0
        and weight.is_contiguous()
        and (_are_served(x, weight) if bias is None else _are_served(x, weight, bias))
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, *, isa: str | None = None) -> Tensor:
    """Returns ``x @ weight.T + bias``, summed in float32 and rounded once.

    On CPUs without instructions for bfloat16 torch's own product takes several times as long as one in float32; this is
    as fast as float32 for many rows, and for a few, where the weight has to be read, faster. On those with AVX-512 BF16
    it uses the instructions, and is faster than torch for a few rows (`gmask.models.base.BFLOAT16_ROWS`). In float32 it
    is for a few rows (`gmask.models.base.FLOAT32_ROWS`): the weight is read in one run.

    Args:
        x: bfloat16 or float32 ``[..., K]``.
        weight: ``[N, K]`` of the same dtype, contiguous; K is a multiple of `DENSE_STEP`.
        bias: ``[N]`` or None.
        isa: one of `instruction_sets`, instead of the fastest.

    Returns:
        ``[..., N]`` of this dtype.
    """
    x = x.contiguous()
    outputs, columns = weight.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    if bias is not None:
        bias = (bias if bias.dtype in NUMBER_TYPES else bias.float()).contiguous()
    _call(
        "gmask_dense",
        _number_of(isa),
        NUMBER_TYPES[x.dtype],
        weight.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        NUMBER_TYPES[torch.float32 if bias is None else bias.dtype],
        y.data_ptr(),
        x.numel() // columns,
        outputs,
        columns,
        purpose=f"a product with a weight in {x.dtype}",
    )
    return y


HEAD_STEP, MAX_HEAD = 16, 512  # csrc/kernels.h: kHeadStep, csrc/exponential.h: kMaxHead


def can_attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> bool:
    """Returns True if `attend` takes these tensors: one query, on the CPU, float32 or bfloat16, without gradients.

    Keys and values have the dtype of the query, or are int8 as `round_states` writes them.
    """
    size = query.shape[-1]
    return (
        query.shape[2] == 1
        and _are_served(query, key, value)
        and query.dtype in NUMBER_TYPES
        and key.dtype == value.dtype
        and (key.shape[-1] == size if key.dtype == query.dtype else is_rounded(key, size))
        and size % HEAD_STEP == 0
        and size <= MAX_HEAD
        and query.shape[1] == key.shape[1]
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and (visible is None or (visible.dtype == torch.bool and visible.shape[1:3] == (1, 1)))
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, *, scaling: float, isa: str | None = None
) -> Tensor:
    """Returns ``softmax(scaling * query @ key.T) @ value``, summed in float32.

    Args:
        query: ``[B, N, 1, D]``.
        key, value: ``[B, N, K, D]``, the last axis contiguous; or int8 ``[B, N, K, D + 4]`` of `round_states`.
        visible: boolean ``[B, 1, 1, K]``, or None if all keys are visible. A query that sees no key gets zeros.
        isa: one of `instruction_sets`, instead of the fastest.

    Returns:
        ``[B, 1, N, D]``, in the precision of the query.
    """
    batch, heads, _, size = query.shape
    length = key.shape[2]
    out = torch.empty(batch, 1, heads, size, dtype=query.dtype)
    strides = [
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        *((0, 0) if visible is None else (visible.stride(0) if len(visible) > 1 else 0, visible.stride(3))),
    ]
    _call(
        "gmask_attention",
        _number_of(isa),
        NUMBER_TYPES[query.dtype],
        STORED_TYPES[key.dtype],
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if visible is None else visible.data_ptr(),
        out.data_ptr(),
        _as_array(strides),
        batch,
        heads,
        length,
        size,
        scaling,
        purpose="the attention of one query",
    )
    return out


STEP_BYTES = 4  # csrc/kernels.h: kStepBytes


def is_rounded(states: Tensor, size: int) -> bool:
    """Whether keys or values of head size ``size`` are int8, as `round_states` returns them."""
    return states.dtype == torch.int8 and states.shape[-1] == size + STEP_BYTES


def can_round(states: Tensor) -> bool:
    """Returns True if `round_states` takes these: float32 or bfloat16 on the CPU, without gradients."""
    return (
        states.dtype in NUMBER_TYPES and states.shape[-1] <= MAX_HEAD and states.stride(-1) == 1 and _are_served(states)
    )


def round_states(states: Tensor, *, isa: str | None = None) -> Tensor:
    """Rounds keys or values to int8: each head of each position to multiples of a 127th of its largest number.

    Args:
        states: ``[B, N, K, D]``.
        isa: one of `instruction_sets`, instead of the fastest.

    Returns:
        int8 ``[B, N, K, D + 4]``: the D multiples, and the bytes of the float32 step, which is NaN if a number was not
        finite.
    """
    batch, heads, length, size = states.shape
    out = torch.empty(batch, heads, length, size + STEP_BYTES, dtype=torch.int8)
    _call(
        "gmask_round",
        _number_of(isa),
        NUMBER_TYPES[states.dtype],
        states.data_ptr(),
        out.data_ptr(),
        _as_array(states.stride()[:3]),
        batch,
        heads,
        length,
        size,
        purpose="the rounding of keys and values",
    )
    return out


def can_gelu(x: Tensor) -> bool:
    """Returns True if `gelu` takes this tensor: bfloat16 on the CPU, without gradients."""
    return x.dtype == torch.bfloat16 and x.is_contiguous() and _are_served(x)


def gelu(x: Tensor, *, isa: str | None = None) -> Tensor:
    """Returns the tanh form of GELU, computed in float32 and rounded once.

    Args:
        isa: one of `instruction_sets`, instead of the fastest.
    """
    out = torch.empty_like(x)
    _call("gmask_gelu", _number_of(isa), x.data_ptr(), out.data_ptr(), x.numel(), purpose="GELU")
    return out


def can_feed_forward(x: Tensor, residual: Tensor, *parameters: Tensor) -> bool:
    """Returns True if `feed_forward` takes these states, normalization and biases: on the CPU, without gradients."""
    return (
        x.dtype == residual.dtype == torch.bfloat16
        and x.is_contiguous()
        and residual.is_contiguous()
        and all(parameter.dtype in NUMBER_TYPES and parameter.is_contiguous() for parameter in parameters)
        and _are_served(x, residual, *parameters)
        and not torch.is_autocast_enabled("cpu")
    )


def feed_forward(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    up: LinearPointers,
    down: LinearPointers,
    *,
    epsilon: float,
    alpha: float,
    isa: str,
) -> Tensor:
    """Returns ``alpha * n + down(gelu(up(n)))``, where n is the layer normalization of ``x + alpha * residual``.

    Each of these operations rounds its result to bfloat16.

    Args:
        x, residual: bfloat16 ``[..., H]``, contiguous.
        norm_weight, norm_bias: bfloat16 ``[H]``.
        up, down: quantized weights ``[I, H]`` and ``[H, I]``.
        isa: one of `instruction_sets`.
    """
    size, out = up.columns, torch.empty_like(x)
    rows = x.numel() // size
    room = torch.empty(2 * rows * (size + up.outputs), dtype=x.dtype)
    _call(
        "gmask_feed_forward",
        _number_of(isa),
        up,
        down,
        norm_weight.data_ptr(),
        norm_bias.data_ptr(),
        epsilon,
        alpha,
        x.data_ptr(),
        residual.data_ptr(),
        room.data_ptr(),
        out.data_ptr(),
        rows,
        purpose="the second half of a block",
    )
    return out


def can_rotate(states: Tensor, cosines: Tensor) -> bool:
    """Returns True if `rotate` takes these: float32 or bfloat16 on the CPU, float32 tables, without gradients."""
    return (
        states.dtype in NUMBER_TYPES
        and states.stride(-1) == 1
        and cosines.dtype == torch.float32
        and cosines.is_contiguous()
        and _are_served(states)
    )


def rotate(states: Tensor, cosines: Tensor, sines: Tensor, *, isa: str | None = None) -> Tensor:
    """Rotates channels i and i + R/2 of each group by an angle, computed in float32 and rounded once.

    Args:
        states: ``[B, N, T, G * R]``.
        cosines, sines: float32 ``[B or 1, 1, T, G, R]``, contiguous.
        isa: one of `instruction_sets`, instead of the fastest.

    Returns:
        ``[B, N, T, G * R]``, contiguous.
    """
    batch, heads, length, size = states.shape
    groups, channels = cosines.shape[-2:]
    out = torch.empty(states.shape, dtype=states.dtype)
    strides = (*states.stride()[:3], length * size if len(cosines) > 1 else 0, size)
    _call(
        "gmask_rotate",
        _number_of(isa),
        NUMBER_TYPES[states.dtype],
        states.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        out.data_ptr(),
        _as_array(strides),
        batch,
        heads,
        length,
        groups,
        channels // 2,
        purpose="rotary positions",
    )
    return out
