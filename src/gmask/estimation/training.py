"""How much memory does training take: weights, gradients, the optimizer, and what a step computes with?

A step has four large moments: the loss, when all activations are kept; the backward pass of the last block, with the
gradients of the head; that of the first block, with nearly all gradients and few activations; and the gradients of the
embeddings, which come twice where the head shares them. The largest of them is what counts: gradients grow while
activations go, and the two are never there whole together. What is counted is what `gmask.models`,
`gmask.training.tuning.losses` and PEFT hold; change it with them.

Shape letters: activations.py.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from gmask.checkpoints.configs import Config
from gmask.errors import GmaskError
from gmask.estimation.activations import FLOAT, Step, block_bytes, end_bytes, state_between
from gmask.estimation.inference import DeviceKind
from gmask.estimation.weights import read_shape_config, shape_at, weight_bytes
from gmask.models.glm import GLMConfig
from gmask.models.glm.prompt_vectors import PromptEncoder
from gmask.models.prefix import PrefixEncoder
from gmask.quantization.linear import QuantizedLayer
from gmask.quantization.quantizer import QuantizationConfig
from gmask.tasks.recipes.methods import LINEARS, LOW_RANK, MethodSettings, check_model

RUNTIME_BYTES: dict[DeviceKind, int] = {"cpu": 530_000_000, "mps": 530_000_000, "cuda": 500_000_000}
"""What a process takes beside the model: Python and the libraries that training imports, with the buffers of their
kernels (torch 2.x, Linux, x86-64); of CUDA, its context on the GPU, which is assumed."""

OPTIMIZER_BYTES = {
    "adamw": 8, "adamw_torch": 8, "adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw": 8,
    "paged_adamw_8bit": 2, "adafactor": 0, "sgd": 0,
}  # fmt: skip
"""Bytes of state for each number that trains, by the names of transformers; adamw is its default."""


@dataclass(frozen=True, slots=True)
class TrainingEstimate:
    """Bytes that a process of a training run takes on its device.

    Gradients and activations are the most that there are of each, not at the same time, so that the parts add up to
    more than the peak.
    """

    weights: int  # with what the method adds
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass
    working: int  # the largest that the loss or a block holds beside them for a moment
    runtime: int  # of the process without a model, or of CUDA's context
    peak: int
    trainable: int  # numbers that train, in all processes together


def estimate_training(
    model: Config | Path,
    *,
    method: MethodSettings,
    dtype: torch.dtype = torch.float32,
    autocast: bool | None = None,
    form: QuantizationConfig | None = None,
    batch_size: int = 1,
    length: int = 512,
    answer_length: int | None = None,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
    shards: int = 1,
    device_kind: DeviceKind = "cpu",
) -> TrainingEstimate:
    """The memory that tuning a model takes, without loading it.

    Args:
        model: its config, or the folder of its weights, of which the config or the shapes are read.
        dtype: of the weights that do not train; what trains is float32, and all of it with the methods full and
            frozen-embeddings.
        autocast: whether the forward pass computes in bfloat16 (the recipe's ``optimization.dtype``); by default if
            ``dtype`` is that.
        form: of the weights, if they are quantized; by default what the config says.
        batch_size: rows of a forward and backward pass, in each process.
        length: tokens of a row.
        answer_length: tokens of a row that are predicted; by default all, which is the largest case.
        optimizer: a name of `OPTIMIZER_BYTES`.
        accumulation: passes of a step.
        shards: processes among which FSDP divides weights, gradients and optimizer.
        device_kind: where they are. The figures of GPUs, and of shards, have not been measured.

    Raises:
        GmaskError: a number below 1, a GLM with fewer positions, a method or form that does not fit the model, an
            unknown optimizer, or a folder that holds no model.
    """
    config = read_shape_config(model) if isinstance(model, Path) else model
    answer_length = length if answer_length is None else min(answer_length, length)
    _check_numbers(config, batch_size, length, answer_length, accumulation, shards)
    if optimizer not in OPTIMIZER_BYTES:
        raise GmaskError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZER_BYTES)}")
    trains_weights = not method.makes_adapter
    shaped = shape_at(config, dtype=torch.float32 if trains_weights else dtype, form=form)
    check_model(method, is_quantized=bool(_quantized_layers(shaped)), is_glm=isinstance(config, GLMConfig))
    step = Step(
        config=shaped.config,
        method=method,
        dtype=dtype,
        autocast=dtype == torch.bfloat16 if autocast is None else autocast,
        quantized=_quantized_layers(shaped),
        batch_size=batch_size,
        length=length,
        answer_length=answer_length,
        is_fused=device_kind == "cuda",
    )
    added = _added_numbers(shaped, step)
    trainable = _own_numbers(shaped, method) if trains_weights else added
    weights = weight_bytes(shaped) + FLOAT * added
    gradients, states = FLOAT * trainable, OPTIMIZER_BYTES[optimizer] * trainable
    activations, moments = _moments(shaped, step, gradients, checkpointing=gradient_checkpointing, shards=shards)
    waiting = gradients // shards if accumulation > 1 else 0  # those of the passes before
    held = (weights + states) // shards + (_gathered_bytes(shaped) if shards > 1 else 0)
    runtime = RUNTIME_BYTES[device_kind]
    moment = max(moments.loss + waiting, moments.last_block + waiting, moments.first_block, moments.embeddings)
    return TrainingEstimate(
        weights=weights // shards,
        gradients=gradients // shards,
        optimizer=states // shards,
        activations=activations,
        working=moments.working,
        runtime=runtime,
        peak=held + moment + runtime,
        trainable=trainable,
    )


def _check_numbers(config: Config, batch_size: int, length: int, answer_length: int, *others: int) -> None:
    names = ("batch size", "length", "answer length", "number of passes", "number of processes")
    for name, value in zip(names, (batch_size, length, answer_length, *others), strict=True):
        if value < 1:
            raise GmaskError(f"a {name} of {value}: give at least 1")
    if isinstance(config, GLMConfig) and length > config.max_position_embeddings:
        raise GmaskError(f"rows of {length} tokens: the model has {config.max_position_embeddings} positions")


def _quantized_layers(model: PreTrainedModel) -> frozenset[str]:
    names = (name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer))
    return frozenset(names)


def _own_numbers(model: PreTrainedModel, method: MethodSettings) -> int:
    """The numbers of a model that train with it; a head that is tied to the embeddings counts once."""
    return _numbers(model) - (0 if method.name == "full" else _numbers(model.get_input_embeddings()))


def _added_numbers(model: PreTrainedModel, step: Step) -> int:
    """What a method adds to a model; all of it trains."""
    method, config = step.method, copy.copy(step.config)
    layers = {layer: _shape_of(config, layer) for layer in method.adapted_layers}
    count = config.num_hidden_layers
    if method.name == "ia3":
        (query_key_value, perceptron) = layers["query_key_value"], layers["dense_4h_to_h"]
        return count * (query_key_value[1] + perceptron[0])
    if method.name in LOW_RANK:
        more = {"dora": sum(outputs for _, outputs in layers.values()), "adalora": len(layers) * method.first_rank}
        matrices = sum(method.first_rank * (columns + outputs) for columns, outputs in layers.values())
        return count * (matrices + more.get(method.name, 0))
    with torch.device("meta"):
        if method.name == "p-tuning-v2":
            config.pre_seq_len, config.prefix_projection = method.prefix_length, method.projection
            return _numbers(PrefixEncoder(config))
        if isinstance(config, GLMConfig) and method.name == "p-tuning":
            config.prompt_tokens, config.prompt_encoder = method.prompt_tokens, method.prompt_encoder
            return _numbers(PromptEncoder(config))
    return 0


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shape_of(config: Config, layer: str) -> tuple[int, int]:
    """Columns and outputs of a linear layer of a block."""
    size, width = config.hidden_size, config.intermediate_size
    shapes = ((size, 3 * size), (size, size), (size, width), (width, size))
    return dict(zip(LINEARS, shapes, strict=True))[layer]


@dataclass(frozen=True, slots=True)
class _Moments:
    """Bytes at the large moments of a step, beside weights and optimizer."""

    loss: int
    last_block: int
    first_block: int
    embeddings: int
    working: int


def _moments(
    model: PreTrainedModel, step: Step, gradients: int, *, checkpointing: bool, shards: int
) -> tuple[int, _Moments]:
    """What is kept when the loss is known, and the moments."""
    layers = step.config.num_hidden_layers
    inputs = state_between(step).nbytes
    block, first = block_bytes(step, is_first=False), block_bytes(step, is_first=True)
    again = block if checkpointing else 0  # the block whose backward pass runs is computed anew
    blocks = layers * inputs if checkpointing else first + (layers - 1) * block
    ends = end_bytes(step)
    logits = FLOAT * step.batch_size * step.answer_length * step.config.vocab_size
    working = _block_working_bytes(step)
    table = FLOAT * model.get_input_embeddings().weight.numel() if step.trains_embeddings else 0
    rounded = table // 2 if step.autocast else 0
    moments = _Moments(
        loss=blocks + ends + max(2 * logits, logits + table + rounded),
        last_block=blocks + ends - logits + table + again + working,
        first_block=gradients // shards + (block if checkpointing else first) + working,
        embeddings=gradients // shards + table,
        working=max(2 * logits, working + again),
    )
    return blocks + ends, moments


def _block_working_bytes(step: Step) -> int:
    """The gradients that the backward pass of a block holds at once, at its perceptron or at its attention."""
    config = step.config
    size = 2 if step.autocast else step.itemsize
    residual = step.rows * config.hidden_size * state_between(step).itemsize
    wide = step.rows * config.intermediate_size * size
    weight = config.intermediate_size * config.hidden_size * (size if step.trains_weights else 0)
    integers = FLOAT * step.rows * config.intermediate_size if step.quantized else 0
    perceptron = residual + 2 * wide + weight + 2 * integers
    scores = step.batch_size * config.num_attention_heads * step.length * (step.length + step.prefix_length)
    attention = residual + 3 * FLOAT * scores - 2 * wide if step.has_dropout and not step.is_fused else 0
    norms = 13 * FLOAT * config.hidden_size**2 if step.method.name == "dora" else 0
    return max(perceptron, attention) + norms


def _gathered_bytes(model: PreTrainedModel) -> int:
    """What FSDP has whole for a moment: the embeddings, the block that runs and the next one."""
    block = next(layer for name, layer in model.named_modules() if name.endswith("layers.0"))
    others: int = model.config.num_hidden_layers - 2
    return weight_bytes(model) - others * weight_bytes(block)
