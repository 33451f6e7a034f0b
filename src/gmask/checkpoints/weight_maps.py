"""How do the tensors of a GLM lie in the published checkpoints: under which names, and divided among which ranks?

Source: THUDM/GLM change_mp.py and mpu/layers.py.
"""

import re
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from gmask.errors import GmaskError

WRAPPERS = ("glm.", "model.", "module.")
"""Prefixes that classes around a `GLMModel` give to its names."""


class Split(Enum):
    """How model parallelism divides a tensor."""

    WHOLE = "every rank has all of it"
    ROWS = "each rank has a range of rows"
    COLUMNS = "each rank has a range of columns"
    THIRDS = "each rank has a range of rows of the queries, then of the keys, then of the values"


SPLITS = (
    (r"word_embeddings\.weight|lm_head\.weight", Split.ROWS),
    (r".*\.attention\.query_key_value\.(weight|bias)", Split.THIRDS),
    (r".*\.mlp\.dense_h_to_4h\.(weight|bias)", Split.ROWS),
    (r".*\.(attention\.dense|mlp\.dense_4h_to_h)\.weight", Split.COLUMNS),
)
"""Names that are divided; all others are whole."""


def bare_name(key: str) -> str:
    """The name that a tensor has in `GLMModel`; those of heads stay as they are."""
    while key.startswith(WRAPPERS):
        key = key.partition(".")[2]
    return key


def split_of(key: str) -> Split:
    """How the tensor of a bare name is divided."""
    return next((split for pattern, split in SPLITS if re.fullmatch(pattern, key)), Split.WHOLE)


def divide(key: str, tensor: Tensor, parts: int) -> list[Tensor]:
    """The tensor's share for each of ``parts`` ranks, in their order.

    Raises:
        ValueError: it cannot be divided evenly.
    """
    split = split_of(key)
    if split is Split.WHOLE or parts == 1:
        return [tensor] * parts
    axis = 1 if split is Split.COLUMNS else 0
    pieces = 3 * parts if split is Split.THIRDS else parts
    if tensor.shape[axis] % pieces:
        raise ValueError(f"{key} {list(tensor.shape)} cannot be divided among {parts} ranks")
    if split is Split.THIRDS:
        thirds = [third.chunk(parts) for third in tensor.chunk(3)]
        return [torch.cat(own) for own in zip(*thirds, strict=True)]
    return [part.contiguous() for part in tensor.chunk(parts, dim=axis)]


def merge(key: str, parts: Sequence[Tensor]) -> Tensor:
    """The whole tensor from the shares of all ranks, bit for bit.

    Raises:
        GmaskError: every rank should have the same, and they differ; shares that cannot be such.
    """
    if len(parts) == 1:
        return parts[0]
    split = split_of(key)
    if split is Split.WHOLE:
        if not all(same_bits(part, parts[0]) for part in parts[1:]):
            raise GmaskError(f"{key} differs between the ranks, where all have to have the same")
        return parts[0]
    if split is Split.THIRDS:
        if any(part.shape[0] % 3 for part in parts):
            raise GmaskError(f"{key} {list(parts[0].shape)} is not queries, keys and values, a third of the rows each")
        return torch.cat([third for thirds in zip(*(part.chunk(3) for part in parts), strict=True) for third in thirds])
    return torch.cat(list(parts), dim=1 if split is Split.COLUMNS else 0)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits: NaN is like itself here, and 0 unlike -0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
