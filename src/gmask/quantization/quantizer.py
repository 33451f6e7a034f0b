"""Quantizes models to int8 or int4, in memory or while they are loaded, and loads quantized weights.

As published, the four linear layers of every block are quantized and, optionally, the word embeddings with the head
that is tied to them. The quantizer is registered with transformers, so that `from_pretrained` and `save_pretrained`
handle such models.
"""

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gmask.errors import GmaskError
from gmask.quantization.formats import check_form, check_format, pack_integers, quantize
from gmask.quantization.linear import SCALE_DTYPE, QuantEmbedding, QuantizedLayer, QuantLinear

METHOD = "gmask"  # the quant_method in a config

QUANTIZED_LINEARS = re.compile(
    r"(?:^|\.)layers\.\d+\.(?:attention\.(?:query_key_value|dense)|mlp\.(?:dense_h_to_4h|dense_4h_to_h))$"
)
"""Names of the layers that are quantized, in GLM and ChatGLM."""

NAMES = {"int8": 8, "int4": 4}
"""Bits by the name of a form, as in `gmask.load` and on the command line."""

CHUNK_NUMBERS = 2**20  # elements that are quantized at a time; each takes some 16 bytes

ModelType = TypeVar("ModelType", bound=PreTrainedModel)


@register_quantization_config(METHOD)
class QuantizationConfig(QuantizationConfigMixin):
    """The integer form of a model's weights.

    Args:
        bits: 4 or 8.
        group_size: columns that share a scale, 32, 64 or 128; None for a scale a row, as published.
        embeddings: True if the word embeddings and the head are quantized, too.

    Raises:
        GmaskError: a form that is not supported.
    """

    def __init__(
        self, bits: int = 4, group_size: int | None = None, embeddings: bool = False, **others: Any
    ) -> None:  # others: transformers passes quant_method
        check_form(bits, group_size)
        self.quant_method = METHOD
        self.bits, self.group_size, self.embeddings = bits, group_size, embeddings

    def __str__(self) -> str:
        scales = "a scale a row" if self.group_size is None else f"a scale for {self.group_size} columns"
        return f"int{self.bits}, {scales}{', with embeddings' if self.embeddings else ''}"


def read_form(name: str | None, group_size: int | None = None) -> QuantizationConfig | None:
    """Returns the form of a name in `NAMES`; None for None.

    Raises:
        GmaskError: another name, a group size that is not supported, or one without a name.
    """
    if name is None:
        if group_size is not None:
            raise GmaskError(f"group_size {group_size} is for quantized weights: add quantize='int4'")
        return None
    if name not in NAMES:
        raise GmaskError(f"quantize {name!r} is not one of {', '.join(NAMES)}")
    return QuantizationConfig(NAMES[name], group_size)


def form_of(config: Any) -> QuantizationConfig | None:
    """Returns the form of a model's weights by its config; None if they are not quantized.

    Raises:
        GmaskError: weights that were quantized by another method.
    """
    found = getattr(config, "quantization_config", None)
    if found is None or isinstance(found, QuantizationConfig):
        return found
    method = dict(found).get("quant_method")
    if method != METHOD:
        raise GmaskError(f"the weights are quantized by {method}, which gmask does not read; use transformers")
    return QuantizationConfig(**dict(found))


def quantize_model(
    model: ModelType, *, bits: int, group_size: int | None = None, embeddings: bool = False
) -> ModelType:
    """Quantizes a model in place, layer by layer, in the memory of the model and of one layer.

    As in the published checkpoints, integers and scales are computed in float16, whatever the model's dtype.

    Args:
        model: a GLM or ChatGLM, with or without a head.
        bits: 4 or 8.
        group_size: columns that share a scale, 32, 64 or 128; None for a scale a row, as published.
        embeddings: quantizes the word embeddings and the head too; if they are tied, they share the result.

    Returns:
        The same model.

    Raises:
        GmaskError: a form that is not supported or does not fit the model, a model that is quantized already, weights
            with NaN or infinity.
    """
    config = QuantizationConfig(bits, group_size, embeddings)
    names = find_layers(model, config)
    for name in tqdm(names, desc=f"quantizing to int{bits}", delay=3, leave=False, disable=None):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Embedding):
            model.set_submodule(name, QuantEmbedding.from_embedding(layer, bits=bits, group_size=group_size))
        elif name != _tied_head(model):
            assert isinstance(layer, nn.Linear)
            model.set_submodule(name, QuantLinear.from_linear(layer, bits=bits, group_size=group_size))
    return finish(model, config)


def find_layers(model: PreTrainedModel, config: QuantizationConfig) -> list[str]:
    """Returns the names of the layers that are to be quantized, the word embeddings last.

    Raises:
        GmaskError: as of `quantize_model`; the model is unchanged then.
    """
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise GmaskError("the model is quantized already; load its unquantized weights to quantize it otherwise")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = [name for name in linears if QUANTIZED_LINEARS.search(name)]
    if not names:
        raise GmaskError(f"{type(model).__name__} has no layers of a GLM or ChatGLM, which could be quantized")
    if config.embeddings:
        names += _embedding_names(model)
    for name in names:
        check_format(model.get_submodule(name).weight.shape[1], config.bits, config.group_size)
    return names


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Returns the names of the head, if there is one, and of the word embeddings."""
    wanted = (model.get_output_embeddings(), model.get_input_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in wanted if module is not None]


def _tied_head(model: PreTrainedModel) -> str | None:
    """Returns the name of the head if it shares the weight of the word embeddings; else None."""
    if model.get_output_embeddings() is None or not getattr(model.config, "tie_word_embeddings", False):
        return None
    return _embedding_names(model)[0]


def lay_out(model: PreTrainedModel, config: QuantizationConfig) -> None:
    """Replaces layers of a model by empty quantized ones, into which weights are loaded next; then call `finish`."""
    for name in find_layers(model, config):
        layer = model.get_submodule(name)
        form = {"bits": config.bits, "group_size": config.group_size}
        if isinstance(layer, nn.Embedding):
            model.set_submodule(name, QuantEmbedding.like(layer, **form))  # type: ignore[arg-type]
        else:
            assert isinstance(layer, nn.Linear)
            model.set_submodule(name, QuantLinear.like(layer, **form))  # type: ignore[arg-type]
    if config.embeddings:
        _tie(model)


def quantize_weight(model: PreTrainedModel, name: str, weight: Tensor) -> dict[str, Tensor]:
    """Quantizes a weight if its layer is quantized; returns the tensors to load, by name.

    `lay_out` has prepared the model.
    """
    path, _, parameter = name.rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, QuantizedLayer) or parameter != "weight" or not weight.is_floating_point():
        return {name: weight}
    pieces = []
    rows = max(1, CHUNK_NUMBERS // weight.shape[1])
    for start in range(0, len(weight), rows):
        chunk = weight[start : start + rows]
        integers, scale = quantize(chunk, layer.bits, group_size=layer.group_size, dtype=SCALE_DTYPE)
        pieces.append((pack_integers(integers, layer.bits), scale))
    packed, scales = zip(*pieces, strict=True)
    return {name: torch.cat(packed), f"{path}.weight_scale": torch.cat(scales)}


def finish(model: ModelType, config: QuantizationConfig) -> ModelType:
    """Sets the attributes that transformers sets after loading a quantized model: config, quantizer, ties, flags."""
    for _, layer in quantized_layers(model):
        layer.weight_scale.requires_grad_(False)
        if isinstance(layer, QuantEmbedding):
            layer.dtype = model.dtype
    if config.embeddings:
        _tie(model)
    model.config.quantization_config = config
    model.hf_quantizer = WeightQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    return model


def detach_from_files(model: PreTrainedModel) -> None:
    """Copies quantized weights on the CPU that are mapped from files into memory of their own."""
    layers = [layer for _, layer in quantized_layers(model)]
    for layer in sorted(layers, key=lambda layer: isinstance(layer, QuantEmbedding)):  # heads first: they pack for both
        layer.detach_from_file()


def _tie(model: PreTrainedModel) -> None:
    """Makes the head share the integers and scales of the word embeddings."""
    name = _tied_head(model)
    if name is None:
        return
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    head = model.get_submodule(name)
    if not isinstance(head, QuantLinear):
        assert isinstance(head, nn.Linear)
        head = QuantLinear.like(head, bits=embedding.bits, group_size=embedding.group_size)
        model.set_submodule(name, head)
    head.weight, head.weight_scale = embedding.weight, embedding.weight_scale
    tied = {f"{name}.weight_scale": f"{_embedding_names(model)[1]}.weight_scale"}
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tied}
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **tied}


class _QuantizeWeight(ConversionOps):
    """Quantizes one weight while the others are still on the disk."""

    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **others: Any) -> dict[str, Tensor]:
        ((name, found),) = input_dict.items()
        return quantize_weight(model, name, found[0] if isinstance(found, list) else found)


@register_quantizer(METHOD)
class WeightQuantizer(HfQuantizer):
    """The quantizer that transformers' `from_pretrained` and `save_pretrained` use."""

    quantization_config: QuantizationConfig
    is_qat_trainable = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **others: Any) -> PreTrainedModel:
        lay_out(model, self.quantization_config)
        model.hf_quantizer = self
        if not self.pre_quantized:  # bfloat16 would round the weights before they are quantized
            names = {f"{name}.weight" for name, _ in quantized_layers(model)}
            model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *names}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **others: Any) -> PreTrainedModel:
        model.__dict__.pop("_keep_in_fp32_modules_strict", None)
        for _, layer in quantized_layers(model):
            layer.take_share()
        return finish(model, self.quantization_config)

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Keeps embeddings whole in every process, and scales of whole rows if columns are divided."""
        for name, layer in quantized_layers(model):
            rule = parallel_rule(name)
            if isinstance(layer, QuantEmbedding) or name == _tied_head(model):
                plan.pop(rule, None)
            elif plan.get(rule) == "rowwise" and layer.group_size is None:
                plan[f"{rule}.weight_scale"] = "replicate"

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **others: Any) -> bool:
        path, _, parameter = param_name.rpartition(".")
        is_quantized = isinstance(model.get_submodule(path), QuantizedLayer)
        return is_quantized and parameter == "weight" and not self.pre_quantized

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWeight()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns the dtype of a loaded tensor; None for scales, which keep the stored one."""
        if any(target.endswith("weight_scale") for target in converter.target_patterns):
            return None
        kept: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return kept

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # by adapters


def parallel_rule(name: str) -> str:
    """Returns the name of a layer in plans of tensor parallelism, with ``*`` for its number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Returns the quantized layers of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer))
