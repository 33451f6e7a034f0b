"""What a pretraining run takes: the memory of each GPU by part, the time of a step, days and cost.

Memory is that of `gmask.estimation.training` for a model that trains as a whole, divided by the parallel layout; time
is that of `gmask.estimation.scaling`. How many positions have a label is counted in made text, by the recipe's
objective.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from gmask.errors import GmaskError
from gmask.estimation.gpus import Gpu
from gmask.estimation.inference import DeviceKind, shape_at
from gmask.estimation.scaling import WEIGHT, Assumptions, ParallelLayout, StepTime, StepWork, simulate_step
from gmask.estimation.training import FLOAT, RUNTIME_BYTES, Checkpointing, Step, find_moments
from gmask.hardware import training_dtype
from gmask.infilling.blanks import NOT_SCORED, BlankTokens
from gmask.infilling.objectives import Mixture
from gmask.models.glm import GLMConfig
from gmask.recipes.pretraining import VOCABULARY_MULTIPLE, PretrainingRecipe
from gmask.recipes.tuning import MethodSettings

UPDATE_BYTES = 32
"""Bytes that an AdamW update reads and writes for each number: weight, gradient (and its norm), two moments."""

ONE_GPU = ParallelLayout()
ASSUMED = Assumptions()


@dataclass(frozen=True, slots=True)
class PretrainingMemory:
    """Bytes of a GPU, or of the process on a CPU. Each part is the most of it, at a moment of its own."""

    weights: int
    gathered: int  # weights of other GPUs while they are used, and gradients on their way to them
    gradients: int
    optimizer: int  # with the moving average of the weights
    activations: int  # kept for the backward pass, without logits
    logits: int  # with their log-probabilities and gradients
    runtime: int  # of the process without a model, or of CUDA's context
    peak: int


@dataclass(frozen=True, slots=True)
class PretrainingTime:
    """The time of a run on GPUs."""

    step: StepTime  # of the first stage
    positions: int  # that a step of it reads
    flops: float  # of the model in a step of it, on all GPUs, without those that are computed again
    mfu: float  # model FLOPs a second, of the peak of all GPUs
    days: float
    cost: float  # US dollars


@dataclass(frozen=True, slots=True)
class Labels:
    """How many positions of packed rows have a label."""

    share: float  # of the positions, on average
    most: float  # the same in one of a hundred passes
    text: float  # tokens of text for each position


def config_of_recipe(recipe: PretrainingRecipe) -> GLMConfig:
    """The config of the model that a recipe trains, with as many tokens as its tokenizer has or will have.

    Raises:
        GmaskError: the recipe names a tokenizer that is not there.
    """
    tokens, folder = recipe.tokenizer.vocab_size, recipe.tokenizer.path
    if folder:
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise GmaskError(f"{folder}: no tokenizer.json there")
        tokens = Tokenizer.from_file(str(path)).get_vocab_size()
    rows = -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return GLMConfig(**{"vocab_size": rows, "hidden_act": "gelu_pytorch_tanh"} | recipe.shape)


def count_labels(recipe: PretrainingRecipe) -> Labels:
    """Counts the labels of made text under a recipe's objective.

    Its sentences have 20 tokens on average, its words 1.4. Each text is as long as a row, or as its longest piece.
    """
    positions: int = GLMConfig(**recipe.shape).max_position_embeddings
    length = min(recipe.data.row_length, recipe.data.max_piece or recipe.data.row_length, positions)
    return _count_labels(length, recipe.optimization.rows_per_pass, tuple(sorted(recipe.objective.items())))


@functools.lru_cache(maxsize=64)
def _count_labels(
    length: int, per_pass: int, settings: tuple[tuple[str, Any], ...], *, rows: int = 400, seed: int = 0
) -> Labels:
    special = BlankTokens(pad=0, eos=1, cls=2, mask=3, smask=4, gmask=5, sop=6, eop=7, dblock=8)
    words = np.zeros((2, 64), bool)
    words[0, 48:], words[1, 11:] = True, True  # three in ten tokens continue a word
    ends = np.arange(64) == 10
    mixture = Mixture(special=special, sentence_ends=ends, word_edges=words, **dict(settings))
    generator = np.random.default_rng(seed)
    labels: list[int] = []
    positions: list[int] = []
    while len(labels) < rows:
        text = generator.integers(11, 64, length)
        text[generator.random(length) < 1 / 20] = 10
        text[0], text[-1] = special.cls, special.eos
        example = mixture.sample(text, generator)
        if example is not None:
            labels.append(int((example.labels != NOT_SCORED).sum()))
            positions.append(len(example.labels))
    found, read = np.array(labels), np.array(positions)
    chosen = generator.integers(0, rows, (100, per_pass))
    passes = found[chosen].sum(1) / read[chosen].sum(1)
    return Labels(float(found.sum() / read.sum()), float(passes.max()), rows * length / float(read.sum()))


@dataclass(frozen=True, slots=True)
class Shape:
    """How many numbers of a model a GPU has, of one replica. Norms and biases are taken to be whole."""

    block: int
    tables: int  # embeddings, and what else is not in a block
    matrices: int  # of all blocks, which Muon optimizes
    all: int

    @staticmethod
    def of(model: PreTrainedModel, tensor: int) -> "Shape":
        """Counts them where the matrices of a model are divided among ``tensor`` GPUs."""
        block = tables = matrices = 0
        for name, weight in model.named_parameters():
            is_divided = weight.ndim == 2 and not name.endswith("position_embeddings.weight")
            count = weight.numel() // (tensor if is_divided else 1)
            if ".layers." not in name:
                tables += count
            elif ".layers.0." in name:
                block += count
                matrices += count if weight.ndim == 2 else 0
        layers = model.config.num_hidden_layers
        return Shape(block, tables, layers * matrices, layers * block + tables)


def find_stages(recipe: PretrainingRecipe) -> Iterator[tuple[PretrainingRecipe, int]]:
    """Yields a recipe for each part of a run that has rows and blanks of its own, and the number of its steps."""
    settings = recipe.optimization
    if recipe.decay_start:
        yield recipe, recipe.decay_start
    if recipe.decay_start < settings.steps:
        length = recipe.decay.row_length or recipe.data.row_length
        per_pass = max(1, settings.rows_per_pass * recipe.data.row_length // length)
        yield (
            replace(
                recipe,
                data=replace(recipe.data, row_length=length),
                optimization=replace(settings, rows_per_pass=per_pass),
                objective=recipe.objective | recipe.decay.objective,
            ),
            settings.steps - recipe.decay_start,
        )


def count_rows(recipe: PretrainingRecipe, layout: ParallelLayout) -> tuple[int, int]:
    """The rows of a step on each replica, and the most of them in a pass.

    Raises:
        GmaskError: fewer rows in a step than replicas.
    """
    rows = recipe.optimization.rows_per_step
    if rows < layout.replicas:
        raise GmaskError(
            f"optimization.rows_per_step is {rows}, fewer than the {layout.replicas} replicas of {layout}: "
            "take fewer GPUs, or --parallel tp=8"
        )
    own = -(-rows // layout.replicas)
    return own, min(own, recipe.optimization.rows_per_pass)


def checkpointing_of(recipe: PretrainingRecipe) -> Checkpointing:
    return "full" if recipe.optimization.gradient_checkpointing else "none"


def estimate_memory(
    recipe: PretrainingRecipe,
    *,
    layout: ParallelLayout = ONE_GPU,
    checkpointing: Checkpointing | None = None,
    device_kind: DeviceKind = "cuda",
) -> PretrainingMemory:
    """Estimates the memory of a run: of each of its GPUs, or of its process.

    Args:
        checkpointing: by default as in the recipe.

    Raises:
        GmaskError: a layout that the model or the rows of a step cannot be divided by, a tokenizer that is not there.
    """
    chosen = checkpointing or checkpointing_of(recipe)
    found = [_stage_memory(stage, layout, chosen, device_kind) for stage, _ in find_stages(recipe)]
    return max(found, key=lambda memory: memory.peak)


def _stage_memory(
    recipe: PretrainingRecipe, layout: ParallelLayout, checkpointing: Checkpointing, kind: DeviceKind
) -> PretrainingMemory:
    config, settings = config_of_recipe(recipe), recipe.optimization
    model = _shape(config, layout)
    shape = Shape.of(model, layout.tensor)
    own, rows = count_rows(recipe, layout)
    labelled = min(1.0, count_labels(recipe).most) * recipe.data.row_length
    is_half = settings.dtype == "bfloat16" or (
        settings.dtype == "auto" and (kind != "cpu" or training_dtype("auto", torch.device("cpu")) == torch.bfloat16)
    )
    step = Step(
        config=config,
        method=MethodSettings(name="full"),
        dtype=torch.float32,
        autocast=is_half,
        quantized=frozenset(),
        batch_size=rows,
        length=recipe.data.row_length,
        answer_length=max(1, round(labelled)),
        is_fused=kind == "cuda",
        tensor_parallel=layout.tensor,
        keeps_rounded=layout.shards == 1,
    )
    gradients = FLOAT * shape.all
    moments = find_moments(model, step, gradients, checkpointing=checkpointing, shards=layout.shards)
    own_logits = FLOAT * rows * step.answer_length * config.vocab_size
    optimizer = 8 * shape.all - (4 * shape.matrices if settings.optimizer == "muon" else 0)
    if settings.ema is not None:
        optimizer += FLOAT * shape.all
    gathered = 0
    if layout.shards > 1:
        weight = WEIGHT if is_half else FLOAT
        held = shape.all if layout.data == "zero2" else shape.tables + 2 * shape.block
        gathered = weight * held + FLOAT * shape.block  # one block's gradients are on their way
    weights, states = FLOAT * shape.all // layout.shards, optimizer // layout.shards
    accumulated = gradients // layout.shards if own > rows else 0
    runtime = RUNTIME_BYTES[kind]
    return PretrainingMemory(
        weights=weights,
        gathered=gathered,
        gradients=gradients // layout.shards,
        optimizer=states,
        activations=moments.kept - own_logits,
        logits=3 * own_logits,
        runtime=runtime,
        peak=weights + gathered + states + runtime + moments.most(accumulated),
    )


def _shape(config: GLMConfig, layout: ParallelLayout) -> PreTrainedModel:
    heads = config.num_attention_heads
    if heads % layout.tensor:
        raise GmaskError(f"--parallel {layout}: {heads} heads cannot be divided by {layout.tensor}")
    return _shape_of_values(config.to_json_string())


@functools.lru_cache(maxsize=4)
def _shape_of_values(values: str) -> PreTrainedModel:
    """The model without values of a config in JSON; to make one takes a second at 10B, and each estimate needs it."""
    return shape_at(GLMConfig(**json.loads(values)), dtype=torch.float32)


def forward_flops(config: GLMConfig, length: int) -> tuple[float, float]:
    """The FLOPs of the forward pass for a position: in a block, and in the head if the position has a label.

    A product of matrices counts two for each weight. Attention is counted over all positions of a row, since a context
    is read in both directions; what a mask hides is computed all the same. Norms and the like are left out.
    """
    size, wide = config.hidden_size, config.intermediate_size
    products = 2 * (4 * size * size + 2 * size * wide)
    attention = 2 * 2 * length * size
    return float(products + attention), float(2 * size * config.vocab_size)


def estimate_time(
    recipe: PretrainingRecipe,
    *,
    gpu: Gpu,
    layout: ParallelLayout = ONE_GPU,
    checkpointing: Checkpointing | None = None,
    assumed: Assumptions = ASSUMED,
    price: float | None = None,
) -> PretrainingTime:
    """Estimates the time and the cost of a run on GPUs. Validation, checkpoints and failures are not counted.

    Args:
        checkpointing: by default as in the recipe.
        price: US dollars an hour of a GPU; by default as assumed for its kind.

    Raises:
        GmaskError: as of `estimate_memory`.
    """
    chosen = checkpointing or checkpointing_of(recipe)
    stages = [(*plan_step(stage, layout, chosen), steps) for stage, steps in find_stages(recipe)]
    times = [simulate_step(work, layout, gpu, assumed) for work, _, _ in stages]
    seconds = sum(time.total * stage[2] for time, stage in zip(times, stages, strict=True))
    work, positions, _ = stages[0]
    flops = 3 * work.passes * (work.layers * work.block_flops + work.head_flops) * layout.gpus
    hours = seconds / 3600
    return PretrainingTime(
        step=times[0],
        positions=positions,
        flops=flops,
        mfu=flops / (times[0].total * layout.gpus * gpu.flops),
        days=hours / 24,
        cost=hours * layout.gpus * (gpu.price if price is None else price),
    )


def plan_step(recipe: PretrainingRecipe, layout: ParallelLayout, checkpointing: Checkpointing) -> tuple[StepWork, int]:
    """The work of a step on one GPU, and the positions that all of them read."""
    config, length = config_of_recipe(recipe), recipe.data.row_length
    shape = Shape.of(_shape(config, layout), layout.tensor)
    rows, per_pass = count_rows(recipe, layout)
    passes = -(-rows // per_pass)
    block, head = forward_flops(config, length)
    positions = rows * length / passes  # the last pass may have fewer rows
    work = StepWork(
        layers=config.num_hidden_layers,
        passes=passes,
        block_flops=positions * block / layout.tensor,
        head_flops=positions * count_labels(recipe).share * head / layout.tensor,
        block_weights=shape.block,
        table_weights=shape.tables,
        state_bytes=WEIGHT * positions * config.hidden_size,
        optimizer_bytes=UPDATE_BYTES * shape.all / layout.shards,
        again=float(checkpointing == "full"),
    )
    return work, rows * length * layout.replicas
