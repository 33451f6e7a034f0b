"""What can be done with a model whose weights are, or are to be, int8 or int4?"""

from typing import Any, Self

import torch
from torch import nn

from gmask.errors import GmaskError
from gmask.quantization.linear import QuantizedLayer
from gmask.quantization.quantizer import parallel_rule, quantize_model, quantized_layers


def check_division(model: Any, processes: int) -> None:
    """Raises `GmaskError` for integers that cannot be divided among processes."""
    for name, layer in quantized_layers(model):
        if not model.hf_quantizer.pre_quantized:
            raise GmaskError(
                "weights are not quantized while they are divided among processes: write them with gmask quantize, and "
                "name that folder"
            )
        together = layer.group_size or 8 // layer.bits  # columns that share a scale, or a byte
        if model.tp_plan.get(parallel_rule(name)) == "rowwise" and layer.in_features % (together * processes):
            raise GmaskError(
                f"the {layer.in_features} columns of {name} lie in groups of {together}, which cannot be divided among "
                f"{processes} processes: run fewer, or quantize in smaller groups"
            )


class QuantizingMixin:
    """``quantize`` as published; casts that leave integers and scales alone."""

    def quantize(self, bits: int, *, group_size: int | None = None, embeddings: bool = False) -> Self:
        """Quantizes the weights in place: `gmask.quantization.quantizer.quantize_model`."""
        return quantize_model(self, bits=bits, group_size=group_size, embeddings=embeddings)

    def half(self, *args: Any) -> Self:
        return nn.Module.half(self)  # type: ignore[type-var]  # transformers refuses a quantized model

    def float(self, *args: Any) -> Self:
        return nn.Module.float(self)  # type: ignore[type-var]

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations; scales have one of their own."""
        named = self.named_parameters()  # type: ignore[attr-defined]
        found = (p.dtype for name, p in named if p.is_floating_point() and not name.endswith("weight_scale"))
        dtype: torch.dtype = next(found)
        return dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, QuantizedLayer):  # integers only come from files
            super()._init_weights(module)  # type: ignore[misc]
