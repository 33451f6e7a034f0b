"""Batches of examples, as tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from gmask.errors import GmaskError
from gmask.infilling.blanks import NOT_SCORED, InfillingExample


def collate(
    rows: Sequence[Sequence[InfillingExample]], *, row_length: int | None, pad_id: int
) -> dict[str, torch.Tensor]:
    """Packs the examples of each row one after the other, and pads the rows on the right.

    Args:
        rows: B rows; the examples of one row share it and do not see one another.
        row_length: T; None takes the longest row.

    Returns:
        int64 tensors: `input_ids` [B, T]; `labels` [B, T], -100 where nothing is scored; `layout` [B, 2, T], of each
        example for itself; `sequence_ids` [B, T], 0, 1, ... along a row, -1 on padding.

    Raises:
        GmaskError: a row holds more than `row_length` tokens.
    """
    used = [sum(len(example.input_ids) for example in row) for row in rows]
    width = max(used) if row_length is None else row_length
    if max(used) > width:
        raise GmaskError(f"{max(used)} tokens do not fit in a row of {width}: pack less, or raise row_length")
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    labels = np.full((len(rows), width), NOT_SCORED, np.int64)
    layout = np.zeros((len(rows), 2, width), np.int64)
    sequence_ids = np.full((len(rows), width), -1, np.int64)
    for b, row in enumerate(rows):
        start = 0
        for sequence, example in enumerate(row):
            columns = slice(start, start + len(example.input_ids))
            input_ids[b, columns] = example.input_ids
            labels[b, columns] = example.labels
            layout[b, :, columns] = example.layout
            sequence_ids[b, columns] = sequence
            start = columns.stop
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "layout": torch.from_numpy(layout),
        "sequence_ids": torch.from_numpy(sequence_ids),
    }
