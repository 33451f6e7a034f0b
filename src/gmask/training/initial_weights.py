"""The weights that a pretraining run begins with: new ones, those of a model, or the `neighbours` initialisation.

With random position tables every head attends to all positions at first, and a run of some ten million tokens may end
before a head has found the words beside a blank. With `initialization: neighbours` the tables start as sinusoids, in
which a step of one position is the same rotation everywhere. Each head of the first layers starts with its query
rotated against its key, so that it attends to one neighbour of its own position. These are initial values only: every
weight trains, and the architecture is unchanged.

The idea is that of mimetic initialisation (Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers",
ICML 2023), with a chosen neighbour in place of the token itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gmask.checkpoints.folder import Folder
from gmask.checkpoints.load import fill_model
from gmask.errors import GmaskError
from gmask.estimation.inference import weight_bytes
from gmask.hardware import check_room
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration

DROPOUTS = ("embedding_dropout", "attention_dropout", "hidden_dropout")
"""The keys of a config that may change between two stages of a model."""


def begin_with(folder: Folder, shape: Mapping[str, Any], tokens: int) -> GLMConfig:
    """The config of the model of a folder, with the dropouts of a recipe.

    Args:
        shape: the recipe's keywords of `GLMConfig`.
        tokens: of the recipe's tokenizer.

    Raises:
        GmaskError: it is no GLM with float weights, has another shape, or fewer tokens.
    """
    config = folder.config
    if not isinstance(config, GLMConfig) or folder.quantization is not None:
        raise GmaskError(f"model.name: {folder} is no GLM with weights that train: name another folder")
    for key, value in shape.items():
        if key in DROPOUTS:
            setattr(config, key, value)
        elif getattr(config, key) != value:
            raise GmaskError(
                f"model.{key} is {value}, and that of {folder} is {getattr(config, key)}: leave it out, or name "
                "another model"
            )
    if config.vocab_size < tokens:
        raise GmaskError(
            f"the tokenizer has {tokens} tokens, and the model in {folder} {config.vocab_size}: leave tokenizer.path "
            "out"
        )
    return config


STATES = 4
"""Numbers in memory for each weight: itself, its gradient, and two moments of the optimizer."""


def make_whole(
    config: GLMConfig, beginning: Folder | None, initialization: Literal["normal", "neighbours"], out: Path
) -> GLMForConditionalGeneration:
    """The whole model on the CPU, in float32, as it is before the first step.

    Args:
        beginning: the folder whose weights it has; None for new ones.
        initialization: of new weights.
        out: of the run, for the error.

    Raises:
        GmaskError: it, its gradients and the optimizer's moments do not fit into memory; damaged weights.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        needed = STATES * weight_bytes(GLMForConditionalGeneration(config))
    check_room(out, needed, torch.device("cpu"), advise=lambda: "make the model smaller (the section model)")
    if beginning is not None:
        with beginning as folder:
            kind, cpu = GLMForConditionalGeneration, torch.device("cpu")
            found = fill_model(folder, device=cpu, dtype=torch.float32, model_class=kind)
        return cast("GLMForConditionalGeneration", found)
    model = GLMForConditionalGeneration(config)
    if initialization == "neighbours":
        start_with_neighbours(model)
    return model


CONTEXT_OFFSETS = (-1, 1, -2, 2)  # positions from the blank, or from the token itself if it is of the context
ANSWER_OFFSETS = (-1, -2, -3, -4)  # positions in the answer
FASTEST = 3.0  # radians a position; a little under half a turn, so that adjacent positions are far apart
AMPLITUDE = 2.0  # of the sinusoids, in standard deviations of the word embeddings
SHARPNESS = 2.0  # with it the chosen neighbour gets a third or more of its head's attention


def start_with_neighbours(model: GLMForConditionalGeneration) -> None:
    """Sets the position tables, and the queries and keys of the first two layers, in place.

    Positions in the context rotate in the first half of the hidden dimensions, positions in the answer in the second.
    Layer 0 attends to positions beside the blank (`CONTEXT_OFFSETS`, one for each head), layer 1 to earlier positions
    of the answer (`ANSWER_OFFSETS`). The latter is weak: layer 0 adds to the residual stream, which blurs the positions
    that layer 1 compares.
    """
    config = model.config
    half = config.hidden_size // 2
    transformer = model.glm.transformer
    frequencies = find_frequencies(half // 2)
    with torch.no_grad():
        for table, start in ((transformer.position_embeddings, 0), (transformer.block_position_embeddings, half)):
            waves = sinusoids(table.num_embeddings, frequencies)
            assert isinstance(table, nn.Embedding)
            table.weight[:, start : start + half] = AMPLITUDE * config.initializer_range * waves
        plans = ((CONTEXT_OFFSETS, 0), (ANSWER_OFFSETS, half))
        for layer, (offsets, start) in zip(transformer.layers, plans, strict=False):
            weight = layer.get_parameter("attention.query_key_value.weight")  # [3 H, H]: queries, keys, values
            pairs = torch.linspace(0, len(frequencies) - 1, config.head_dim // 2).round().long()
            for head, offset in enumerate(offsets[: config.num_attention_heads]):
                rows = torch.arange(config.head_dim) + head * config.head_dim
                query, key = neighbour_projection(frequencies, pairs, offset, width=config.hidden_size, start=start)
                weight[rows] = SHARPNESS**0.5 * query
                weight[rows + config.hidden_size] = SHARPNESS**0.5 * key


def find_frequencies(count: int) -> Tensor:
    """``[count]`` frequencies in radians a position, unevenly spaced so that no two positions look alike."""
    return FASTEST * (torch.arange(1, count + 1) / count) ** 1.5


def sinusoids(positions: int, frequencies: Tensor) -> Tensor:
    """``[positions, 2 F]``: the sine and cosine of each frequency side by side."""
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def neighbour_projection(
    frequencies: Tensor, pairs: Tensor, offset: int, *, width: int, start: int
) -> tuple[Tensor, Tensor]:
    """Query and key weights ``[2 P, width]`` whose product is highest for the key ``offset`` positions from the query.

    pairs: ``[P]`` indices of the frequencies to compare; start: the first dimension of the sinusoids.
    """
    query, key = torch.zeros(2 * len(pairs), width), torch.zeros(2 * len(pairs), width)
    sine, cosine = torch.arange(len(pairs)) * 2, torch.arange(len(pairs)) * 2 + 1
    turn = frequencies[pairs] * offset
    from_sine, from_cosine = start + 2 * pairs, start + 2 * pairs + 1
    query[sine, from_sine], query[sine, from_cosine] = turn.cos(), turn.sin()  # sin(a + t)
    query[cosine, from_cosine], query[cosine, from_sine] = turn.cos(), -turn.sin()  # cos(a + t)
    key[sine, from_sine] = key[cosine, from_cosine] = 1.0
    return query, key
