"""Memory of inference: weights, keys and values, and the intermediate tensors of a forward pass.

Memory is highest while a prompt is read, in the multilayer perceptron of a block; with quantized weights also at the
first product, which repacks them. The counts are those of the tensors that `gmask.models` and `gmask.quantization` hold
at that moment; change them together.

Shape letters: B batch rows, T positions of the context, H hidden size, F width of the perceptron, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from gmask.architectures import class_of
from gmask.checkpoints.folder import Config, Folder
from gmask.checkpoints.zoo import Family
from gmask.errors import GmaskError
from gmask.models.cache import capacity_for, position_bytes
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.glm import GLMConfig
from gmask.quantization.kernels import ROW_CHUNK, available_paths
from gmask.quantization.linear import QuantizedLayer
from gmask.quantization.quantizer import QuantizationConfig, form_of, lay_out

DeviceKind: TypeAlias = Literal["cpu", "cuda", "mps"]
INFERENCE_RUNTIME_BYTES: dict[DeviceKind, int] = {"cpu": 430_000_000, "mps": 430_000_000, "cuda": 500_000_000}
"""Bytes of a process without the model: Python and the imported libraries with the buffers of their kernels, measured
after `gmask.load` and a forward pass (torch 2.x, Linux, x86-64); of CUDA, its context on the GPU, which is assumed."""

BLOCK_STATES = 5
"""Tensors ``[B, T, H]`` that are held while the perceptron of a block runs: the embeddings, the input of the block, its
normalised and its attended states, and their sum."""

KERNEL_BYTES = {"avx512_vnni": 1.25, "avx_vnni": 1.25, "neon_i8mm": 1.25, "neon_dotprod": 1.25, "avx2_int8": 2.25}
"""Bytes that the C++ kernel takes for each bfloat16 activation, by instruction set: int8 (int16 for int8 weights with
``avx2_int8``), and a scale for every 32, at most."""

KERNEL_FLOAT_BYTES = 4
"""The same for float32 activations, and for bfloat16 ones with other instruction sets."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that inference takes on a device."""

    weights: int
    cache: int  # keys and values
    working: int  # the most of other tensors at any moment
    runtime: int  # of the process without a model, or of CUDA's context

    @property
    def resident(self) -> int:
        """Bytes that are in use between two tokens."""
        return self.weights + self.cache + self.runtime

    @property
    def peak(self) -> int:
        return self.resident + self.working


def estimate_inference(
    model: Config | Path,
    *,
    dtype: torch.dtype = torch.float32,
    form: QuantizationConfig | None = None,
    context_length: int = 2048,
    batch_size: int = 1,
    device_kind: DeviceKind = "cpu",
    kv_cache: str | None = None,
) -> MemoryEstimate:
    """Estimates the memory that a model takes to answer prompts, without loading it.

    The prompt is assumed to fill the context, the largest case: a shorter prompt takes less while it is read, and the
    cache grows to the same size.

    Args:
        model: its config, or the folder of its weights, whose config or shapes are read.
        dtype: of the weights that are not quantized, and of the activations.
        form: of the quantized weights; by default that of the config.
        context_length: tokens of the prompt and its answer together.
        batch_size: prompts that are answered at once.
        device_kind: of the device. The figures of GPUs have not been measured.
        kv_cache: as of `gmask.load`. A prompt is read with keys and values in ``dtype``.

    Raises:
        GmaskError: a length or size below 1, a GLM with fewer positions, a form that does not fit the model, or a
            folder that holds none.
    """
    config = read_shape_config(model) if isinstance(model, Path) else model
    _check_lengths(config, context_length, batch_size)
    shaped = shape_at(config, dtype=dtype, form=form)
    positions = batch_size * capacity_for(context_length)  # with the spare ones
    cache = positions * position_bytes(config, dtype, kv_cache)
    read = cache if kv_cache is None else batch_size * context_length * position_bytes(config, dtype, None)
    working = _working_bytes(shaped, dtype=dtype, length=context_length, batch_size=batch_size, kind=device_kind)
    return MemoryEstimate(
        weights=weight_bytes(shaped),
        cache=cache,
        working=working + max(0, read - cache),
        runtime=INFERENCE_RUNTIME_BYTES[device_kind],
    )


def _check_lengths(config: Config, context_length: int, batch_size: int) -> None:
    for name, value in (("context length", context_length), ("batch size", batch_size)):
        if value < 1:
            raise GmaskError(f"a {name} of {value}: give at least 1")
    positions = config.max_position_embeddings
    if isinstance(config, GLMConfig) and context_length > positions:
        raise GmaskError(f"a context of {context_length} tokens: the model has {positions} positions")


def _working_bytes(
    model: PreTrainedModel, *, dtype: torch.dtype, length: int, batch_size: int, kind: DeviceKind
) -> int:
    """The most bytes of intermediate tensors, while the prompt is read or a token is chosen."""
    rows = batch_size * length
    mask = batch_size * length**2  # boolean
    block = max(
        _attention_bytes(model.config, dtype, batch_size, length),
        _perceptron_bytes(model, dtype, rows, kind),
    )
    return max(mask + block, _choice_bytes(model.config.vocab_size, dtype, batch_size), _head_bytes(model, kind))


def _attention_bytes(config: Config, dtype: torch.dtype, batch_size: int, length: int) -> int:
    """Bytes in attention: inputs and embeddings, queries, keys and values, rotated copies, and the mask as numbers."""
    rotated = 2 if isinstance(config, ChatGLMConfig) else 0
    states = 3 + 3 + rotated + 1
    return dtype.itemsize * batch_size * (states * length * config.hidden_size + length**2)


def _perceptron_bytes(model: PreTrainedModel, dtype: torch.dtype, rows: int, kind: DeviceKind) -> int:
    """The most bytes in a perceptron: at its activation, at its second product, or while that weight is repacked."""
    narrow: int = rows * model.config.hidden_size * dtype.itemsize
    wide: int = rows * model.config.intermediate_size * dtype.itemsize
    second = next(layer for name, layer in model.named_modules() if name.endswith("mlp.dense_4h_to_h"))
    beside = max(wide, narrow + _product_bytes(second, rows, dtype, kind), _repacking_bytes(second, kind))
    return BLOCK_STATES * narrow + wide + beside


def _product_bytes(layer: torch.nn.Module, rows: int, dtype: torch.dtype, kind: DeviceKind) -> int:
    """Bytes of a product with a quantized weight, without its input and output."""
    if not isinstance(layer, QuantizedLayer):
        return 0
    columns = layer.weight.shape[1] * 8 // layer.bits
    if not _has_kernel(kind):
        return ROW_CHUNK * columns * (1 + 4 + dtype.itemsize)  # integers, float32, and rounded
    if dtype == torch.bfloat16:
        return math.ceil(rows * columns * KERNEL_BYTES.get(available_paths()[0], KERNEL_FLOAT_BYTES))
    as_float32 = rows * (columns + layer.weight.shape[0]) * 4 if dtype == torch.float16 else 0
    return rows * columns * KERNEL_FLOAT_BYTES + as_float32


def _repacking_bytes(layer: torch.nn.Module, kind: DeviceKind) -> int:
    """Bytes of the copy that the first product makes of a weight to repack it."""
    return layer.weight.nbytes if isinstance(layer, QuantizedLayer) and _has_kernel(kind) else 0


def _head_bytes(model: PreTrainedModel, kind: DeviceKind) -> int:
    """Bytes of the copy of the head; it is repacked when all activations but the last are freed."""
    head = model.get_output_embeddings()
    return 0 if head is None else _repacking_bytes(head, kind)


def _choice_bytes(vocabulary: int, dtype: torch.dtype, batch_size: int) -> int:
    """Bytes of logits, the logits and their log-probabilities in float32, and these sorted with their ids."""
    return batch_size * vocabulary * (dtype.itemsize + 4 + 4 + 4 + 8)


def _has_kernel(kind: DeviceKind) -> bool:
    """True if the package's C++ kernel, for which weights are repacked, is used."""
    return kind == "cpu" and available_paths()[0] not in ("aten", "torch")


def read_shape_config(folder: Path) -> Config:
    """The config of a folder; of a checkpoint of the training code, the config that its shapes imply.

    The shapes do not imply the number of attention heads, on which no size depends.

    Raises:
        GmaskError: as of `gmask.checkpoints.folder.Folder`.
    """
    with Folder(folder, heads=1) as opened:  # a folder with a config has its own number
        return opened.config


def config_of_family(family: Family) -> Config:
    """The config of a published model, from its entry in the catalog."""
    config_class: type[GLMConfig | ChatGLMConfig] = GLMConfig if family.architecture == "glm" else ChatGLMConfig
    stored = {"quantization_bit": family.bits, "quantization_embeddings": family.quantized_embeddings}
    return config_class(
        vocab_size=family.vocab_size,
        hidden_size=family.hidden_size,
        num_hidden_layers=family.layers,
        num_attention_heads=family.heads,
        max_position_embeddings=family.positions,
        **(stored if family.bits else {}),
    )


def shape_at(config: Config, *, dtype: torch.dtype, form: QuantizationConfig | None = None) -> PreTrainedModel:
    """Makes the model of a config on the meta device: shapes and dtypes without values.

    Args:
        dtype: of the weights that are not quantized, and of the activations.
        form: of the quantized weights; by default that of the config.

    Raises:
        GmaskError: a form that does not fit the model, or weights that are already in another form.
    """
    stored = form_of(config)
    if form is not None and stored is not None and form.to_dict() != stored.to_dict():
        raise GmaskError(f"the weights are {stored} already, and cannot become {form}: name the unquantized model")
    model_class = class_of(config)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config).to(dtype)
        model.tie_weights()
        if chosen := form or stored:
            lay_out(model, chosen)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model or a part of it; a head tied to the embeddings counts once."""
    tensors = [*model.parameters(), *model.buffers()]  # a shared one is listed once
    return sum(tensor.nbytes for tensor in tensors)
