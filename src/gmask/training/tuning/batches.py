"""How do examples become batches, and how do several share a row?

Shape letters: B rows, T positions.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gmask.errors import GmaskError
from gmask.infilling.collator import collate
from gmask.tasks.samples import CHOICES, TaskKind
from gmask.training.tuning.examples import Example

Row = tuple[Example, ...]
"""Examples that share a row and do not see one another."""

Batch = dict[str, Tensor]

OPEN_ROWS = 64
"""Rows that `pack` keeps open: with more, little room is gained."""


def pack(examples: Sequence[Example], *, row_length: int) -> list[Row]:
    """Examples in rows of at most ``row_length`` tokens: each goes into the fullest open row that has room for it.

    Packing is exact: what an example contributes to the loss is what it contributes alone.

    Raises:
        GmaskError: an example that is longer than a row.
    """
    rows: list[list[Example]] = []
    room: dict[int, int] = {}  # of the open rows, in the order in which they were opened
    for example in examples:
        if example.length > row_length:
            raise GmaskError(f"an example has {example.length} tokens, a row {row_length}: raise it, or do not pack")
        fitting = [row for row, free in room.items() if free >= example.length]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
        else:
            row = len(rows)
            rows.append([])
            room[row] = row_length
            if len(room) > OPEN_ROWS:
                del room[min(room, key=lambda row: room[row])]
        rows[row].append(example)
        if row in room:
            room[row] -= example.length
    return [tuple(row) for row in rows]


def find_collator(kind: TaskKind, *, pad_id: int) -> Callable[[Sequence[Example | Row]], Batch]:
    """What makes batches of a kind of examples: the fitting one of the functions below."""
    if kind == "classification":
        return lambda items: collate_classes(items, pad_id=pad_id)
    if kind in CHOICES:
        return lambda items: collate_choices(items, pad_id=pad_id)
    return lambda items: collate_tokens(items, pad_id=pad_id)


def collate_tokens(items: Sequence[Example | Row], *, pad_id: int) -> Batch:
    """A row for each item, padded on the left: answers end the rows, and the head runs over fewer columns.

    Returns:
        int64 tensors: ``input_ids [B, T]``; ``labels [B, T]`` as the model takes them, -100 where nothing is taught;
        ``layout [B, 2, T]``; ``sequence_ids [B, T]``, 0, 1, ... along a row and -1 at padding.
    """
    rows = [(item,) if isinstance(item, Example) else item for item in items]
    return _align_right(collate(rows, row_length=None, pad_id=pad_id), _lengths(rows))


def collate_choices(items: Sequence[Example | Row], *, pad_id: int) -> Batch:
    """A row for each sample, padded on the left: its context once, and behind it all of its candidates.

    Returns:
        int64 tensors: ``input_ids``, ``labels``, ``layout`` as of `collate_tokens`; ``pieces [B, T]``, 0 in the
        context, n in the n-th candidate and -1 at padding; ``choice [B]``, the index of the right candidate.
    """
    examples = _singles(items)
    batch = collate([(example,) for example in examples], row_length=None, pad_id=pad_id)
    pieces = batch.pop("sequence_ids")  # 0 in a row, -1 at padding
    for row, example in zip(pieces, examples, strict=True):
        row[: example.length] = torch.from_numpy(example.pieces)
    return _align_right({**batch, "pieces": pieces}, _lengths(examples)) | {"choice": _choices(examples)}


def collate_classes(items: Sequence[Example | Row], *, pad_id: int) -> Batch:
    """A row for each sample, padded on the right: ``input_ids``, ``attention_mask [B, T]``, ``layout``, ``choice``."""
    examples = _singles(items)
    batch = collate([(example,) for example in examples], row_length=None, pad_id=pad_id)
    mask = (batch["sequence_ids"] >= 0).long()
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": mask,
        "layout": batch["layout"],
        "choice": _choices(examples),
    }


def _singles(items: Sequence[Example | Row]) -> list[Example]:
    """Candidates and classes are read in rows of their own."""
    return [item for row in items for item in ((row,) if isinstance(row, Example) else row)]


def _lengths(rows: Sequence[Example | Row]) -> list[int]:
    return [sum(example.length for example in _singles([row])) for row in rows]


def _choices(examples: Sequence[Example]) -> Tensor:
    return torch.from_numpy(np.array([example.choice for example in examples], dtype=np.int64))


def _align_right(batch: Batch, lengths: Sequence[int]) -> Batch:
    """Rows that are padded on the right, with the padding on the left."""
    width = batch["input_ids"].shape[-1]
    return {
        name: torch.stack([row.roll(width - length, -1) for row, length in zip(values, lengths, strict=True)])
        for name, values in batch.items()
    }
