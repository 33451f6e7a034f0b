"""Linear layers and embeddings that keep their weight in int8 or int4.

A layer holds integers and scales in the published format, by the published names ``weight`` and ``weight_scale``. The
first product repacks them for the fastest kernel of the machine and frees the published format, so that there is one
copy. Reading ``weight`` or ``weight_scale``, saving or copying the layer restores the published format, bit for bit.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from gmask.native import ops as native
from gmask.quantization.aten import unpack_rows_aten
from gmask.quantization.formats import check_format, dequantize, pack_integers, quantize, unpack_blocks, unpack_integers
from gmask.quantization.kernels import NATIVE_PATHS, PackedWeight, matmul, repack_weight

SCALE_DTYPE = torch.float16  # of the published checkpoints
_packing = threading.Lock()  # threads may share a model


@dataclass(frozen=True, slots=True)
class _Packed:
    """An attribute of a weight whose data is in the layout of a fast kernel."""

    product: PackedWeight
    scale: nn.Parameter  # its data is in `product`, too


class QuantizedLayer(nn.Module):
    """A weight ``[N, K]`` as integers and scales. Casts of the model do not change them.

    Attributes:
        weight: int8 ``[N, K * bits / 8]``, as `formats.pack_integers` has it.
        weight_scale: float16 (or float32), ``[N]``, or ``[N, K / group_size]``.
        group_size: columns that share a scale; None for all of a row.
        divided: in tensor parallelism, by name, how the tensor is divided of which this process has a share.
    """

    weight: Tensor
    weight_scale: Tensor
    bits: int
    group_size: int | None
    divided: dict[str, dict[str, Any]]
    _hf_quantized_needs_local_tp = True  # transformers passes the share, and sums the products of the shares

    def _set_format(
        self, rows: int, columns: int, bits: int, group_size: int | None, device: torch.device | str | None
    ) -> None:
        self.bits, self.group_size, self.divided = bits, group_size, {}
        groups = columns // check_format(columns, bits, group_size)
        integers = torch.empty(rows, columns * bits // 8, dtype=torch.int8, device=device)
        shape = (rows,) if group_size is None else (rows, groups)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(shape, dtype=SCALE_DTYPE, device=device), requires_grad=False)

    def set_integers(self, integers: Tensor, scale: Tensor) -> None:
        """Sets the weight to int8 ``[N, K]`` and scales, as `formats.quantize` returns them."""
        self.weight = nn.Parameter(pack_integers(integers, self.bits), requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def take_share(self) -> None:
        """Replaces a weight that is divided among processes by this process's share, as an ordinary tensor."""
        for name in ("weight", "weight_scale"):
            whole: Any = self._parameters[name]
            if hasattr(whole, "placements"):  # a DTensor, whose module not every build of torch has
                layout = {"device_mesh": whole.device_mesh, "placements": whole.placements}
                self.divided[name] = {**layout, "shape": whole.shape, "stride": whole.stride()}
                self._parameters[name] = nn.Parameter(whole.detach().to_local(), requires_grad=False)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight ``[N, K]``: integers times scales."""
        return dequantize(unpack_integers(self.weight.data, self.bits), self.weight_scale.data, dtype)

    def product(self) -> PackedWeight:
        """Returns the weight in the layout of the fastest kernel, which replaces the published format."""
        weight: nn.Parameter = self._parameters["weight"]  # type: ignore[assignment]
        packed: _Packed | None = getattr(weight, "packed", None)
        if packed is not None:
            return packed.product
        with _packing, torch.inference_mode(False), torch.no_grad():
            now: _Packed | None = getattr(weight, "packed", None)
            if now is not None:  # by another thread
                return now.product
            scale: nn.Parameter = self._parameters["weight_scale"]  # type: ignore[assignment]
            product: PackedWeight = repack_weight(weight.data, scale.data, bits=self.bits, group_size=self.group_size)
            is_offloaded = hasattr(self, "_hf_hook")  # accelerate loads the weight anew before each product
            if product.data.data_ptr() != weight.data_ptr() and not is_offloaded:
                weight.packed = _Packed(product, scale)  # type: ignore[attr-defined]
                weight.data, scale.data = without_numbers(weight), without_numbers(scale)
            return product

    def adopt(self, product: PackedWeight) -> None:
        """Takes a weight in the layout of its kernel; the parameters have its published shapes, and no numbers."""
        weight: nn.Parameter = self._parameters["weight"]  # type: ignore[assignment]
        weight.packed = _Packed(product, self._parameters["weight_scale"])  # type: ignore[attr-defined, arg-type]

    def detach_from_file(self) -> None:
        """Copies a weight on the CPU, which may be mapped from a file, into memory, in the layout of its kernel."""
        weight: nn.Parameter = self._parameters["weight"]  # type: ignore[assignment]
        if not weight.is_cpu:
            return
        if isinstance(self, nn.Linear):
            self.product()
        if getattr(weight, "packed", None) is None:
            weight.data = weight.data.clone()

    def _unpack(self) -> None:
        """Restores the published format."""
        weight = self._parameters.get("weight")
        if getattr(weight, "packed", None) is None:
            return
        with _packing, torch.inference_mode(False), torch.no_grad():
            packed: _Packed | None = getattr(weight, "packed", None)
            if packed is not None:
                weight.data, packed.scale.data = packed.product.unpack()  # type: ignore[union-attr]
                del weight.packed  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "weight_scale"):
            self._unpack()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        self._unpack()
        return self.__dict__.copy()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, layout in self.divided.items():  # transformers gathers the whole tensors from these
            from torch.distributed.tensor import DTensor

            destination[prefix + name] = DTensor.from_local(destination[prefix + name], run_check=False, **layout)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves all tensors, but casts only the bias."""
        names = ("weight", "weight_scale")
        device = fn(torch.empty(0, dtype=torch.int8, device=self._parameters["weight"].device)).device  # type: ignore[union-attr]
        if any(self._parameters[name].device != device for name in names):  # type: ignore[union-attr]
            self._unpack()
            for name in names:
                parameter: nn.Parameter = self._parameters[name]  # type: ignore[assignment]
                moved = fn(parameter.data)
                if moved.dtype != parameter.dtype:
                    moved = parameter.data.to(device)
                if torch._has_compatible_shallow_copy_type(parameter.data, moved):
                    parameter.data = moved
                else:
                    self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        kept = {name: self._parameters[name] for name in names}
        self._parameters.update(dict.fromkeys(names))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters.update(kept)
        return self


def without_numbers(parameter: Tensor, device: torch.device | None = None) -> Tensor:
    """Returns zeros of the same shape that take no memory. Only code that bypasses the layer's attribute sees them."""
    return torch.zeros((), dtype=parameter.dtype, device=device or parameter.device).expand(parameter.shape)


class QuantLinear(QuantizedLayer, nn.Linear):
    """A linear layer whose weight is kept in int8 or int4. Gradients flow to its input and its bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes an empty layer; ``dtype`` is that of the bias.

        Raises:
            GmaskError: a format that is not supported.
        """
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the weight
        self.in_features, self.out_features = in_features, out_features
        self._set_format(out_features, in_features, bits, group_size, device)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def like(cls, linear: nn.Linear, *, bits: int, group_size: int | None = None) -> Self:
        """Makes an empty layer of the same shape as another, with its bias."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            bits=bits,
            group_size=group_size,
            bias=False,
            device=linear.weight.device,
        )
        layer.bias = linear.bias
        return layer.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, bits: int, group_size: int | None = None) -> Self:
        """Quantizes a layer by `formats.quantize`, in float16 as the published checkpoints were.

        Raises:
            GmaskError: a format that is not supported, or a weight with NaN or infinity.
        """
        layer = cls.like(linear, bits=bits, group_size=group_size)
        layer.set_integers(*quantize(linear.weight.detach(), bits, group_size=group_size, dtype=SCALE_DTYPE))
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``[..., N]`` for ``[..., K]``, in the precision of the input."""
        return matmul(input, self.product(), self._parameters["bias"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody else takes part in the calls of a module: by hooks, or by a ``forward`` of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def feed_forward_at_once(
    x: Tensor, residual: Tensor, norm: nn.LayerNorm, mlp: nn.Module, up: nn.Module, down: nn.Module, *, alpha: float
) -> Tensor | None:
    """The second half of a block with quantized layers, in one call of the library: as of `native.ops.feed_forward`.

    Args:
        mlp: the module that has ``up`` and ``down``, and GELU between them.

    Returns:
        bfloat16 ``[..., H]``; None where the modules have to be called one by one: other layers or paths, hooks, other
        types, gradients, graphs.
    """
    if type(up) is not QuantLinear or type(down) is not QuantLinear or type(norm) is not nn.LayerNorm:
        return None
    if any(_is_watched(module) for module in (norm, mlp, up, down)):
        return None
    biases = up._parameters["bias"], down._parameters["bias"]
    parameters = [one for one in (norm.weight, norm.bias, *biases) if one is not None]
    if norm.bias is None or not native.can_feed_forward(x, residual, *parameters):
        return None
    wide, narrow = up.product(), down.product()
    if norm.weight.dtype != torch.bfloat16 or wide.path not in NATIVE_PATHS or wide.path != narrow.path:
        return None
    first, second = (
        native.LinearPointers.to(one.data, one.scale, bias, bits=one.bits, outputs=one.outputs, columns=one.columns)
        for one, bias in zip((wide, narrow), biases, strict=True)
    )
    return native.feed_forward(
        x, residual, norm.weight, norm.bias, first, second, epsilon=norm.eps, alpha=alpha, isa=wide.path
    )


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    """An embedding whose table is kept in int8 or int4. It may be shared with the head, as in the published models.

    Attributes:
        dtype: of the returned embeddings; casts of the model change it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes an empty table.

        Raises:
            GmaskError: a format that is not supported.
        """
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self._set_format(num_embeddings, embedding_dim, bits, group_size, device)

    @classmethod
    def like(cls, embedding: nn.Embedding, *, bits: int, group_size: int | None = None) -> Self:
        """Makes an empty table of the same shape as another."""
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            bits=bits,
            group_size=group_size,
            device=embedding.weight.device,
            dtype=embedding.weight.dtype,
        )
        return layer.train(embedding.training)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, bits: int, group_size: int | None = None) -> Self:
        """Quantizes a table; errors as of `QuantLinear.from_linear`."""
        layer = cls.like(embedding, bits=bits, group_size=group_size)
        layer.set_integers(*quantize(embedding.weight.detach(), bits, group_size=group_size, dtype=SCALE_DTYPE))
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Returns embeddings ``[..., K]`` for ids ``[...]``."""
        ids = input.flatten()
        packed: _Packed | None = getattr(self._parameters["weight"], "packed", None)
        if packed is None:
            integers, scale = unpack_integers(self.weight[ids], self.bits), self.weight_scale[ids]
        else:  # packed by the head, which shares the table
            integers, scale = _read_rows(packed.product, ids)
        return dequantize(integers, scale, self.dtype).view(*input.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


def _read_rows(product: PackedWeight, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 ``[n, K]`` and scales of some rows of a weight in the layout of a fast kernel."""
    if product.path == "aten":
        return unpack_rows_aten(product.data, ids, bits=product.bits), product.scale[ids]
    lanes = product.data.shape[2]
    block, lane = ids // lanes, ids % lanes
    rows = product.data[block, :, lane].transpose(0, 1).unsqueeze(0)
    integers = unpack_integers(unpack_blocks(rows, product.bits, len(ids), product.columns), product.bits)
    return integers, product.scale[block, :, lane]
