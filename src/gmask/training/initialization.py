"""How can a small model see its neighbours from the first step?

With random position tables every head first looks everywhere at once, and a run of some ten million tokens may end
before a head has found the words beside a blank. So the tables start as sinusoids, in which a step of one place is the
same rotation everywhere, and each head of the first layers starts with the query rotated against the key: it looks at
one place beside its own. All of it is only a start; every weight trains on, and the architecture is unchanged.

The idea is that of mimetic initialisation (Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers",
ICML 2023), with a chosen neighbour in place of the token itself.
"""

import torch
from torch import Tensor, nn

from gmask.models.glm import GLMForConditionalGeneration

CONTEXT_OFFSETS = (-1, 1, -2, 2)  # places from the blank, or from a token of the context itself
ANSWER_OFFSETS = (-1, -2, -3, -4)  # places back in the answer
FASTEST = 3.0  # radians a place; a little under half a turn, so that the next place is far away
AMPLITUDE = 2.0  # of the sinusoids, in standard deviations of the word embeddings
SHARPNESS = 2.0  # gives the chosen neighbour a third or more of its head's attention


def start_with_neighbours(model: GLMForConditionalGeneration) -> None:
    """Sets the position tables and the queries and keys of the first two layers in place.

    The context's places rotate in the first half of the hidden dimensions, the answer's in the second. Layer 0 looks
    beside the blank (`CONTEXT_OFFSETS`, a head each). Layer 1 leans back along the answer (`ANSWER_OFFSETS`), a weak
    start only: what layer 0 adds to the residual stream blurs the places that it compares.
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
    """``[count]`` radians a place, unevenly spaced so that no two places look alike."""
    return FASTEST * (torch.arange(1, count + 1) / count) ** 1.5


def sinusoids(places: int, frequencies: Tensor) -> Tensor:
    """``[places, 2 F]``: the sine and cosine of each frequency beside one another."""
    angles = torch.arange(places)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def neighbour_projection(
    frequencies: Tensor, pairs: Tensor, offset: int, *, width: int, start: int
) -> tuple[Tensor, Tensor]:
    """Query and key weights ``[2 P, width]`` whose product peaks where the key stands ``offset`` places on.

    pairs: ``[P]`` indices of the frequencies to compare; start: the dimension where the sinusoids begin.
    """
    query, key = torch.zeros(2 * len(pairs), width), torch.zeros(2 * len(pairs), width)
    sine, cosine = torch.arange(len(pairs)) * 2, torch.arange(len(pairs)) * 2 + 1
    turn = frequencies[pairs] * offset
    from_sine, from_cosine = start + 2 * pairs, start + 2 * pairs + 1
    query[sine, from_sine], query[sine, from_cosine] = turn.cos(), turn.sin()  # sin(a + t)
    query[cosine, from_cosine], query[cosine, from_sine] = turn.cos(), -turn.sin()  # cos(a + t)
    key[sine, from_sine] = key[cosine, from_cosine] = 1.0
    return query, key
