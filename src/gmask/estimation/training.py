"""Memory of training: weights, gradients, the optimizer, activations and working memory.

The peak of a step is at one of four moments: at the loss, when all activations are kept; in the backward pass of the
last block, with the gradients of the head; in that of the first block, with nearly all gradients and few activations;
or at the gradients of the embeddings, of which there are two where the head shares them. Activations are freed while
gradients are made, so the two are never complete together. The counts are those of the tensors that `gmask.models`,
`gmask.training.losses` and PEFT hold; change them together.

To count activations, a `Tape` runs the blocks of `gmask.models` with sizes instead of numbers: each operation records
the tensors that torch keeps for its gradient, each tensor once. The tests compare it with what torch keeps. On CUDA
devices dropout is assumed to keep a byte for each number, and attention no weights; this was not measured.

Shape letters: B rows, T positions, K key positions (a prefix first), H hidden size, F width of the perceptron, N heads,
V vocabulary.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn
from transformers import PreTrainedModel

from gmask.checkpoints.folder import Config
from gmask.checkpoints.load import find_folder
from gmask.errors import GmaskError
from gmask.estimation.inference import DeviceKind, read_shape_config, shape_at, weight_bytes
from gmask.hardware import format_bytes, free_bytes
from gmask.models.base import MATRIX_ATTENTION_KEYS, PrefixEncoder
from gmask.models.glm import GLMConfig, PromptEncoder
from gmask.quantization.linear import QuantizedLayer
from gmask.quantization.quantizer import QuantizationConfig, read_form
from gmask.recipes.feedback import METHODS_OF_STAGES
from gmask.recipes.tuning import LINEARS, LOW_RANK, MethodSettings, TuningRecipe, check_model

RUNTIME_BYTES: dict[DeviceKind, int] = {"cpu": 530_000_000, "mps": 530_000_000, "cuda": 500_000_000}
"""Bytes of a process without the model: Python and the libraries that training imports, with the buffers of their
kernels (torch 2.x, Linux, x86-64); of CUDA, its context on the GPU, which is assumed."""

OPTIMIZER_BYTES = {
    "adamw": 8, "adamw_torch": 8, "adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw": 8,
    "paged_adamw_8bit": 2, "adafactor": 0, "sgd": 0,
}  # fmt: skip
"""Bytes of state for each number that trains, by transformers' names of optimizers; adamw is its default."""


FeedbackStage = Literal["reward", "dpo", "kto", "grpo", "ppo"]
Critic = Literal["shared", "head", "own", "joint", "frozen"]
Head = Literal["tokens", "score", "fused", "policy"]
"""What reads the last states: the head of the loss of answers; that of rewards and values; the head of TRL's trainers,
which keeps no logits; that of PPO, which keeps log-probabilities and probabilities."""

HEADS: dict[FeedbackStage | None, Head] = {
    None: "tokens", "reward": "score", "dpo": "fused", "kto": "fused", "grpo": "fused", "ppo": "policy",
}  # fmt: skip
LOGITS_KEPT: dict[Head, int] = {"tokens": 1, "score": 0, "fused": 0, "policy": 2}
LOGITS_MORE: dict[Head, int] = {"tokens": 2, "score": 0, "fused": 0, "policy": 3}
"""Tensors of the size of the logits, in float32, that are kept and that there are beside them for a moment."""

TILE = (4096, 32768)  # tokens and columns of the logits that TRL's head makes at a time
TILES = 8  # of them at once in its backward pass, where there is no Triton


@dataclass(frozen=True, slots=True)
class TrainingEstimate:
    """Bytes that a process of a training run takes on its device.

    Gradients and activations are the most of each, at different moments, so the parts add up to more than the peak.
    """

    weights: int  # with those that the method adds
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass
    working: int  # the most of other tensors, at the loss or in a block
    runtime: int  # of the process without a model, or of CUDA's context
    peak: int
    trainable: int  # numbers that train, in all processes together
    others: int = 0  # models that do not train: the reference, the reward model


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
    stage: FeedbackStage | None = None,
    critic: Critic = "shared",
    reward_model: bool = False,
    reference: bool = True,
) -> TrainingEstimate:
    """Estimates the memory that tuning a model takes, without loading it.

    Args:
        model: its config, or the folder of its weights, whose config or shapes are read.
        dtype: of the weights that do not train; those that train are float32, with the methods full and
            frozen-embeddings all weights.
        autocast: the forward pass computes in bfloat16 (the recipe's ``optimization.dtype``); by default if ``dtype``
            is bfloat16.
        form: of the weights, if they are quantized; by default that of the config.
        batch_size: rows of a forward and backward pass, in each process; pairs of rows with the stages reward and dpo.
        length: tokens of a row.
        answer_length: tokens of a row that are predicted; by default all, the largest case.
        optimizer: a name of `OPTIMIZER_BYTES`.
        accumulation: passes of a step.
        shards: processes among which FSDP divides weights, gradients and optimizer.
        device_kind: of the device. The figures of GPUs, and of shards, have not been measured.
        stage: what is learnt from feedback; None for answers.
        critic: of ppo, as in its recipe.
        reward_model: grpo or ppo is rewarded by a model of the same shape, too, in float32. What sampling takes, while
            nothing is kept for a backward pass, is not counted.
        reference: False for a grpo whose ``trl.beta`` is 0: it holds no copy of the model as it was.

    Raises:
        GmaskError: an unknown stage or critic, or a method or setting that the stage does not take; a number below 1, a
            GLM with fewer positions, a method or form that does not fit the model, an unknown optimizer, or a folder
            that holds no model.
    """
    config = read_shape_config(model) if isinstance(model, Path) else model
    answer_length = length if answer_length is None else min(answer_length, length)
    _check_numbers(config, batch_size, length, answer_length, accumulation, shards)
    if optimizer not in OPTIMIZER_BYTES:
        raise GmaskError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZER_BYTES)}")
    _check_stage(method, stage, critic, reward_model=reward_model, reference=reference)
    trains_weights = not method.makes_adapter
    shaped = shape_at(config, dtype=torch.float32 if trains_weights else dtype, form=form)
    check_model(method, is_quantized=bool(_quantized_layers(shaped)), is_glm=isinstance(config, GLMConfig))
    step = Step(
        config=shaped.config,
        method=method,
        dtype=dtype,
        autocast=dtype == torch.bfloat16 if autocast is None else autocast,
        quantized=_quantized_layers(shaped),
        batch_size=batch_size * (2 if stage in ("reward", "dpo") else 1),
        length=length,
        answer_length=answer_length,
        is_fused=device_kind == "cuda",
        head=HEADS[stage],
    )
    added = _count_added(shaped, step)
    trainable = _count_own(shaped, method) if trains_weights else added
    weights = weight_bytes(shaped) + FLOAT * added
    others = _other_bytes(shaped, method, stage, reward_model=reward_model, reference=reference)
    gradients, states = FLOAT * trainable, OPTIMIZER_BYTES[optimizer] * trainable
    checkpointing: Checkpointing = "full" if gradient_checkpointing else "none"
    moments = find_moments(shaped, step, gradients, checkpointing=checkpointing, shards=shards)
    activations = moments.kept
    accumulated = gradients // shards if accumulation > 1 else 0  # those of earlier passes
    valued = 0
    if stage == "ppo" and critic in ("own", "joint"):  # its backward pass comes first, and leaves its gradients
        count = _count_body(shaped)
        own = replace(step, method=MethodSettings(name="full"), head="score", quantized=frozenset())
        kept = find_moments(shaped, own, 0, checkpointing="none", shards=1).kept
        valued, trainable = FLOAT * count, trainable + count
        weights, states = weights + valued, states + OPTIMIZER_BYTES[optimizer] * count
        gradients, activations = gradients + valued, activations + kept
        moments = replace(
            moments,
            loss=max(moments.loss + valued, moments.kept + kept + _block_working_bytes(own)),
            last_block=moments.last_block + valued,
            first_block=moments.first_block + valued,
            embeddings=moments.embeddings + valued,
        )
    held = (weights + states) // shards + others + (_gathered_bytes(shaped) if shards > 1 else 0)
    runtime = RUNTIME_BYTES[device_kind]
    return TrainingEstimate(
        weights=weights // shards,
        gradients=gradients // shards,
        optimizer=states // shards,
        activations=activations,
        working=moments.working,
        runtime=runtime,
        peak=held + moments.most(accumulated) + runtime,
        trainable=trainable,
        others=others,
    )


def _check_stage(
    method: MethodSettings, stage: FeedbackStage | None, critic: Critic, *, reward_model: bool, reference: bool
) -> None:
    if stage is not None and stage not in get_args(FeedbackStage):
        raise GmaskError(f"stage {stage!r} is not one of {', '.join(get_args(FeedbackStage))}")
    if critic not in get_args(Critic):
        raise GmaskError(f"critic {critic!r} is not one of {', '.join(get_args(Critic))}")
    if stage != "ppo" and critic != "shared":
        raise GmaskError("critic goes with the stage ppo: leave it out")
    if reward_model and stage not in ("grpo", "ppo"):
        raise GmaskError("reward_model goes with the stages grpo and ppo: leave it out")
    if not reference and stage != "grpo":
        raise GmaskError("reference=false goes with the stage grpo: leave it out")
    known = () if stage is None or stage == "ppo" else METHODS_OF_STAGES[stage]
    if known and method.name not in known:
        raise GmaskError(f"{stage} takes {', '.join(known)}, not {method.name}")
    if stage == "ppo" and method.name in ("adalora", "p-tuning"):
        raise GmaskError(f"{method.name} is not for ppo: take lora, or full")


def _other_bytes(
    model: PreTrainedModel, method: MethodSettings, stage: FeedbackStage | None, *, reward_model: bool, reference: bool
) -> int:
    """Bytes of the reference, which is a copy where the adapter cannot be switched off, and of a reward model."""
    is_referred = stage in ("dpo", "kto", "grpo", "ppo") and reference
    is_copied = is_referred and (not method.makes_adapter or method.name.startswith("p-tuning"))
    reward = FLOAT * _count_body(model) if reward_model else 0
    return reward + (weight_bytes(model) if is_copied else 0)


def _count_body(model: PreTrainedModel) -> int:
    """How many numbers a model has without its head: in float32, also where its layers are packed integers."""
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)(model.config)
    return _count_numbers(plain.base_model)


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


def _count_own(model: PreTrainedModel, method: MethodSettings) -> int:
    """How many numbers of a model train; a head that is tied to the embeddings counts once."""
    return _count_numbers(model) - (0 if method.name == "full" else _count_numbers(model.get_input_embeddings()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The settings of a pass that decide how much it keeps."""

    config: Config
    method: MethodSettings
    dtype: torch.dtype  # of the weights that do not train
    autocast: bool  # to bfloat16
    quantized: frozenset[str]  # names of the linear layers with integers, "lm_head" among them
    batch_size: int
    length: int
    answer_length: int  # tokens of a row that are predicted
    is_fused: bool  # on a CUDA device
    head: Head = "tokens"
    tensor_parallel: int = 1  # processes among which the matrices of a block are divided
    keeps_rounded: bool = True  # autocast keeps its rounded copies of the weights; FSDP's are freed behind each block

    @property
    def rows(self) -> int:
        return self.batch_size * self.length

    @property
    def trains_weights(self) -> bool:
        return not self.method.makes_adapter

    @property
    def trains_embeddings(self) -> bool:
        return self.method.name == "full"

    @property
    def prefix_length(self) -> int:
        return self.method.prefix_length if self.method.name == "p-tuning-v2" else 0

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return FLOAT if self.trains_weights else self.dtype.itemsize

    @property
    def has_dropout(self) -> bool:
        """True if there is dropout in attention, whose weights are then kept."""
        return isinstance(self.config, GLMConfig) and self.config.attention_dropout > 0


def _count_added(model: PreTrainedModel, step: Step) -> int:
    """How many numbers a method adds to a model; all of them train."""
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
            return _count_numbers(PrefixEncoder(config))
        if isinstance(config, GLMConfig) and method.name == "p-tuning":
            config.prompt_tokens, config.prompt_encoder = method.prompt_tokens, method.prompt_encoder
            return _count_numbers(PromptEncoder(config))
    return 0


def _count_numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shape_of(config: Config, layer: str) -> tuple[int, int]:
    """The inputs and outputs of a linear layer of a block."""
    size, width = config.hidden_size, config.intermediate_size
    shapes = ((size, 3 * size), (size, size), (size, width), (width, size))
    return dict(zip(LINEARS, shapes, strict=True))[layer]


@dataclass(frozen=True, slots=True)
class Moments:
    """Bytes at the large moments of a step, beside weights and optimizer."""

    kept: int  # by all blocks and both ends, behind the forward pass
    loss: int
    last_block: int
    first_block: int
    embeddings: int
    working: int

    def most(self, accumulated: int = 0) -> int:
        """The bytes at the largest of them.

        Args:
            accumulated: bytes of the gradients of earlier passes, which are there before this pass makes its own.
        """
        return max(self.loss + accumulated, self.last_block + accumulated, self.first_block, self.embeddings)


Checkpointing = Literal["none", "selective", "full"]
"""What a block keeps: all that its backward pass reads; the outputs of its products and of its attention, from which
the rest is computed again; its input alone."""


def find_moments(
    model: PreTrainedModel, step: Step, gradients: int, *, checkpointing: Checkpointing, shards: int
) -> Moments:
    """The large moments of a step."""
    layers = step.config.num_hidden_layers
    block, first = block_bytes(step, is_first=False), block_bytes(step, is_first=True)
    kept = {"none": block, "selective": min(block, _products_bytes(step)), "full": state_between(step).nbytes}
    again = 0 if checkpointing == "none" else block  # the block whose backward pass runs is computed again
    blocks = layers * kept[checkpointing] + (first - block if checkpointing == "none" else 0)
    ends = end_bytes(step)
    logits = FLOAT * step.batch_size * step.answer_length * step.config.vocab_size
    working = _block_working_bytes(step)
    table = FLOAT * model.get_input_embeddings().weight.numel() if step.trains_embeddings else 0
    table //= step.tensor_parallel
    if step.head == "score":  # the embeddings have one gradient, behind the first block
        table = logits = 0
    rounded = table // 2 if step.autocast else 0
    more = max(LOGITS_MORE[step.head] * logits, logits + table + rounded)
    if step.head == "fused":
        scored = step.batch_size * (step.answer_length if step.is_fused else step.length)  # without Triton all
        tile = FLOAT * min(TILE[0], scored) * min(TILE[1], step.config.vocab_size)
        more = tile * (1 if step.is_fused else TILES) + table
    return Moments(
        kept=blocks + ends,
        loss=blocks + ends + more,
        last_block=blocks + ends - LOGITS_KEPT[step.head] * logits + table + again + working,
        first_block=gradients // shards + (first if checkpointing == "none" else block) + working,
        embeddings=gradients // shards + table,
        working=max(more - table, working + again),
    )


def _products_bytes(step: Step) -> int:
    """Bytes of the outputs of the four products of a block and of its attention, and of its input."""
    size = 2 if step.autocast else step.itemsize
    divided = 4 * step.config.hidden_size + step.config.intermediate_size
    outputs = step.rows * (divided // step.tensor_parallel + 2 * step.config.hidden_size)
    return outputs * size + state_between(step).nbytes


def _block_working_bytes(step: Step) -> int:
    """The most bytes of gradients inside a block during its backward pass, in its perceptron or its attention."""
    config = step.config
    size = 2 if step.autocast else step.itemsize
    residual = step.rows * config.hidden_size * state_between(step).itemsize
    wide = step.rows * config.intermediate_size * size // step.tensor_parallel
    weight = config.intermediate_size * config.hidden_size * (size if step.trains_weights else 0)
    weight //= step.tensor_parallel
    integers = FLOAT * step.rows * config.intermediate_size if step.quantized else 0
    perceptron = residual + 2 * wide + weight + 2 * integers
    scores = step.batch_size * config.num_attention_heads * step.length * (step.length + step.prefix_length)
    scores //= step.tensor_parallel
    attention = residual + 3 * FLOAT * scores - 2 * wide if step.has_dropout and not step.is_fused else 0
    norms = 13 * FLOAT * config.hidden_size**2 if step.method.name == "dora" else 0
    return max(perceptron, attention) + norms


def _gathered_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that FSDP has gathered at once: the embeddings, the block that runs and the next one."""
    block = next(layer for name, layer in model.named_modules() if name.endswith("layers.0"))
    others: int = model.config.num_hidden_layers - 2
    return weight_bytes(model) - others * weight_bytes(block)


FLOAT = 4  # bytes of what trains, of attention weights and of log-probabilities


@dataclass(eq=False, slots=True)
class State:
    """A tensor of the pass: its numbers, the bytes of each, and whether it has a gradient."""

    numbers: int
    itemsize: int
    has_grad: bool = False

    @property
    def nbytes(self) -> int:
        return self.numbers * self.itemsize


class Tape:
    """Runs the operations of the models on `State`s, and records those that autograd keeps."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.kept: dict[State, None] = {}

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.kept)

    def keep(self, *states: State) -> None:
        self.kept.update(dict.fromkeys(states))

    def as_read(self, x: State) -> State:
        """The input of a product: under autocast, a rounded copy."""
        return State(x.numbers, 2, x.has_grad) if self.step.autocast and x.itemsize > 2 else x

    def norm(self, x: State) -> State:
        """Layer normalisation; it keeps its input, the means and the deviations."""
        size = FLOAT if self.step.autocast and self.step.is_fused else x.itemsize
        out = State(x.numbers, size, x.has_grad or self.step.trains_weights)
        if out.has_grad:
            read = x if x.itemsize == size else State(x.numbers, size)
            self.keep(read, State(2 * x.numbers // self.step.config.hidden_size, size))
        return out

    def linear(self, layer: str, x: State, outputs: int, *, trains: bool | None = None) -> State:
        """A linear layer, which keeps nothing if its weight is quantized.

        Args:
            trains: its weight trains; by default as the other weights do.
        """
        trains = self.step.trains_weights if trains is None else trains
        is_quantized = layer in self.step.quantized
        read = self.as_read(x)
        columns = self.columns(layer)  # of this process
        size = x.itemsize if is_quantized else read.itemsize
        out = State(x.numbers // columns * outputs, size, x.has_grad or trains)
        if layer in self.step.method.adapted_layers and self.step.method.name == "ia3":
            return self._scale(layer, x, out)
        if trains:
            self.keep(read)
        if x.has_grad and not is_quantized:
            self._keep_weight(columns * outputs, self.step.itemsize)
        if layer in self.step.method.adapted_layers:
            self._add_low_rank(x, out, columns, outputs)
        return out

    def columns(self, layer: str) -> int:
        config = self.step.config
        columns: int = config.intermediate_size if layer == "dense_4h_to_h" else config.hidden_size
        return columns // (self.step.tensor_parallel if layer in ("dense", "dense_4h_to_h") else 1)

    def _keep_weight(self, numbers: int, itemsize: int) -> None:
        """Keeps the rounded copy that autocast makes of a float32 weight."""
        if self.step.autocast and itemsize == FLOAT and self.step.keeps_rounded:
            self.keep(State(numbers, 2))

    def _scale(self, layer: str, x: State, out: State) -> State:
        """The layer with ia3: its output, in the perceptron its input, times a trained vector."""
        is_input = layer == "dense_4h_to_h"
        if is_input:
            self.keep(x if x.itemsize == FLOAT else State(x.numbers, FLOAT))
        else:
            self.keep(out)
        if (x.has_grad or is_input) and layer not in self.step.quantized:
            columns = self.columns(layer)
            self._keep_weight(columns * columns * out.numbers // x.numbers, self.step.itemsize)
        return State(out.numbers, out.itemsize, True)

    def _add_low_rank(self, x: State, out: State, columns: int, outputs: int) -> None:
        """Adds lora or a method like it, which reads its input in float32."""
        step = self.step
        wide = x if x.itemsize == FLOAT else State(x.numbers, FLOAT, x.has_grad)
        if step.method.dropout:
            if x.has_grad:
                self.keep(State(x.numbers, 1 if step.is_fused else FLOAT))
            wide = State(x.numbers, FLOAT, x.has_grad)
        narrow = State(x.numbers // columns * step.method.first_rank, 2 if step.autocast else FLOAT)
        self.keep(self.as_read(wide), narrow)
        self._keep_weight(step.method.first_rank * (outputs + columns * x.has_grad), FLOAT)
        if step.method.name == "dora":  # its magnitudes multiply the product without its bias, and the change
            self.keep(State(out.numbers, max(out.itemsize, step.itemsize)), State(out.numbers, narrow.itemsize))
        out.has_grad = True

    def attention(self, fused: State) -> State:
        """Attention, of queries, keys and values in one tensor ``[B, T, 3 H]``."""
        step, heads = self.step, self.step.config.num_attention_heads // self.step.tensor_parallel
        width = step.config.hidden_size // step.tensor_parallel
        if isinstance(step.config, GLMConfig):
            read = [fused]
        else:  # rotated queries and keys in one tensor, and the values
            read = [fused, State(2 * step.rows * width, fused.itemsize)]
            self._keep_angles(fused.itemsize)
        prefix = step.prefix_length * step.batch_size * width
        positions = step.rows * width + prefix
        size = 2 if step.autocast else fused.itemsize
        weights = step.batch_size * heads * step.length * (step.length + step.prefix_length)
        out = State(step.rows * width, size, fused.has_grad or bool(prefix))
        if step.has_dropout and not step.is_fused:  # attention operation by operation, in float32
            self.keep(State(step.rows * width + 2 * positions, FLOAT), State(3 * weights, FLOAT))
            return out
        if size < fused.itemsize:  # rounded by autocast
            self.keep(State(step.rows * width + 2 * positions, size))
        elif prefix:
            self.keep(read[-1], State(2 * positions, size))  # keys and values with the prefix are copies
        else:
            self.keep(*read)
        is_short = step.length + step.prefix_length <= MATRIX_ATTENTION_KEYS
        if size == 2 and not step.is_fused and not step.has_dropout and is_short:
            self.keep(State(weights, size))
        else:  # the sums of the rows, and an additive mask
            self.keep(out, State(step.rows * heads, FLOAT), State(weights // heads, size))
        return out

    def _keep_angles(self, itemsize: int) -> None:
        """Keeps cosines and sines of a head, rounded for queries and for keys; all layers share those in float32."""
        if itemsize < FLOAT:
            self.keep(State(4 * self.step.rows * self.step.config.head_dim, itemsize))

    def gelu(self, x: State) -> State:
        if x.has_grad:
            self.keep(x)
        return State(x.numbers, x.itemsize, x.has_grad)

    def dropout(self, x: State, rate: float) -> State:
        if rate == 0:
            return x
        if x.has_grad:
            self.keep(State(x.numbers, 1 if self.step.is_fused else x.itemsize))
        return State(x.numbers, x.itemsize, x.has_grad)

    def add(self, x: State, y: State) -> State:
        return State(x.numbers, max(x.itemsize, y.itemsize), x.has_grad or y.has_grad)


def run_block(tape: Tape, hidden: State) -> State:
    """A block of a GLM or a ChatGLM."""
    config = tape.step.config
    size, width = config.hidden_size, config.intermediate_size // tape.step.tensor_parallel
    is_glm = isinstance(config, GLMConfig)
    rate = config.hidden_dropout if isinstance(config, GLMConfig) else 0.0
    normed = tape.norm(hidden)
    mixed = tape.attention(tape.linear("query_key_value", normed, 3 * size // tape.step.tensor_parallel))
    hidden = tape.add(hidden if is_glm else normed, tape.dropout(tape.linear("dense", mixed, size), rate))
    normed = tape.norm(hidden)
    wide = tape.gelu(tape.linear("dense_h_to_4h", normed, width))
    return tape.add(hidden if is_glm else normed, tape.dropout(tape.linear("dense_4h_to_h", wide, size), rate))


def run_embeddings(tape: Tape) -> State:
    """The embeddings of tokens and positions; the positions of a GLM also train when the tokens do not."""
    step, config = tape.step, tape.step.config
    is_glm = isinstance(config, GLMConfig)
    has_grad = step.method.name in ("full", "p-tuning") or (step.trains_weights and is_glm)
    hidden = State(step.rows * config.hidden_size, step.itemsize, has_grad)
    return tape.dropout(hidden, config.embedding_dropout if isinstance(config, GLMConfig) else 0.0)


def run_head(tape: Tape, hidden: State) -> None:
    """The head, at the positions with a label, and the log-probabilities in float32."""
    step = tape.step
    normed = tape.norm(hidden)
    predicted = step.batch_size * (1 if step.head == "score" else step.answer_length)
    picked = State(predicted * step.config.hidden_size, normed.itemsize, normed.has_grad)
    if step.head in ("score", "fused"):
        tape.keep(picked)
        return
    tape.linear("lm_head", picked, step.config.vocab_size, trains=step.trains_embeddings)
    tape.keep(*(State(predicted * step.config.vocab_size, FLOAT) for _ in range(LOGITS_KEPT[step.head])))


def block_bytes(step: Step, *, is_first: bool) -> int:
    """Bytes that a block keeps; the first one keeps less where its input has no gradient."""
    tape = Tape(step)
    hidden = run_embeddings(Tape(step)) if is_first else state_between(step)
    run_block(tape, hidden)
    return tape.nbytes


def state_between(step: Step) -> State:
    """The hidden states between two blocks."""
    return run_block(Tape(step), run_embeddings(Tape(step)))


def end_bytes(step: Step) -> int:
    """Bytes that the embeddings and the head keep, with the log-probabilities."""
    tape = Tape(step)
    run_embeddings(tape)
    run_head(tape, state_between(step))
    return tape.nbytes


def describe_memory(
    recipe: TuningRecipe,
    model: PreTrainedModel,
    *,
    length: int,
    labelled: int,
    processes: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """Compares the estimated peak of a run with the free memory, in a line; None for an unknown optimizer.

    Args:
        length: tokens of the longest row.
        labelled: the most tokens with a label in a row.
        processes: that share the weights, if the recipe shards them.
        dtype: of the forward pass.
    """
    optimization = recipe.optimization
    rows = -(-length // model.config.max_position_embeddings)  # a longer, packed row counts as several
    is_sharded = optimization.trainer.get("fsdp") or optimization.trainer.get("deepspeed")
    optimizer = str(optimization.trainer.get("optim", "adamw"))
    if optimizer not in OPTIMIZER_BYTES:
        return None
    kind = device.type
    assert kind in ("cpu", "cuda", "mps")
    frozen = [parameter.dtype for parameter in model.parameters() if not parameter.requires_grad]
    floats = [found for found in frozen if found.is_floating_point]
    needed = estimate_training(
        find_folder(recipe.model.name),
        method=recipe.method,
        dtype=floats[0] if floats else torch.float32,
        autocast=dtype == torch.bfloat16,
        form=read_form(recipe.model.quantize, None),
        batch_size=optimization.batch_size * rows,
        length=-(-length // rows),
        answer_length=max(1, -(-labelled // rows)),
        shards=processes if is_sharded else 1,
        optimizer=optimizer,
        gradient_checkpointing=optimization.gradient_checkpointing,
        accumulation=optimization.accumulation,
        device_kind=kind,  # type: ignore[arg-type]  # asserted above
    ).peak
    room = free_bytes(device) + _held_bytes(device)
    summary = f"memory: about {format_bytes(needed)} at the most, {format_bytes(room)} are there"
    if needed <= room:
        return summary
    return (
        f"{summary}: lower optimization.batch_size (and raise accumulation), set optimization.gradient_checkpointing, "
        "or choose lora or qlora"
    )


def _held_bytes(device: torch.device) -> int:
    """Bytes that this run has already taken."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)
