"""Keys and values: a cache with room to grow, and one whose rows come and go.

transformers' `DynamicCache` joins old and new into a fresh tensor at each token; for ChatGLM-6B at 512 positions that
moves half a gigabyte a token. Here each layer has room to spare, and a new tensor is made only when it runs out.

`SlotCache` gives every running row a slot: a row of preallocated keys and values, filled from the left. A decoding step
feeds one token a row, each to the next free place of its own slot, and looks at the filled part of all. A row that ends
is replaced by the last one, so that the running rows always come first and no row has to be picked out.

Shape letters: B rows, N heads, K positions so far, D head size, R rows, C places of a slot, W the longest filled part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

ROOM = 128
"""Positions that room is made for at a time."""


def capacity_for(length: int) -> int:
    """Positions that a layer of ``length`` positions has room for."""
    return (length // ROOM + 1) * ROOM


class GrowingLayer(DynamicLayer):
    """Keys and values ``[B, N, K, D]`` of a layer: the filled parts of two larger tensors."""

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new positions; returns all of them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._rooms = None  # gradients do not flow through what is written in place
            joined: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return joined
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        rooms = self._rooms
        if rooms is None or length > rooms[0].shape[-2] or not self._lies_in(rooms):
            rooms = self._rooms = (self._make_room(key_states, length), self._make_room(value_states, length))
            if past:
                rooms[0][..., :past, :].copy_(self.keys)
                rooms[1][..., :past, :].copy_(self.values)
        rooms[0][..., past:length, :].copy_(key_states)
        rooms[1][..., past:length, :].copy_(value_states)
        self.keys, self.values = rooms[0][..., :length, :], rooms[1][..., :length, :]
        return self.keys, self.values

    def _lies_in(self, rooms: tuple[Tensor, Tensor]) -> bool:
        """Whether the keys are still a part of their room: whoever selects or reorders rows replaces them."""
        return self.keys.numel() == 0 or (
            self.keys.data_ptr() == rooms[0].data_ptr() and self.keys.stride() == rooms[0].stride()
        )

    @staticmethod
    def _make_room(states: Tensor, length: int) -> Tensor:
        batch, heads, _, size = states.shape
        return states.new_empty(batch, heads, capacity_for(length), size)

    def reset(self) -> None:
        self._rooms = None
        super().reset()


class GrowingCache(DynamicCache):
    """A `DynamicCache` that grows by `ROOM` positions at a time."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.layers = [GrowingLayer() for _ in range(config.num_hidden_layers)]


class SlotLayer(CacheLayerMixin):
    """Keys and values ``[R, N, C, D]`` of one layer."""

    is_compileable = False
    is_sliding = False
    is_initialized: bool
    keys: Tensor
    values: Tensor

    def __init__(self, slots: "SlotCache") -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Slots get their room when a first row is put in."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one position a row ``[R, N, 1, D]``; returns ``[R, N, W, D]``."""
        rows, places, width = self.slots.row_index, self.slots.places, self.slots.width
        self.keys[rows, :, places] = key_states[:, :, 0]
        self.values[rows, :, places] = value_states[:, :, 0]
        count = len(rows)
        return self.keys[:count, :, :width], self.values[:count, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0

    def get_seq_length(self) -> int:
        return self.slots.width - 1

    def get_max_length(self) -> int:
        return -1

    def reserve(self, rows: int, length: int, like: Tensor) -> None:
        """Makes room for so many rows and places; what is filled stays."""
        if self.is_initialized and rows <= self.keys.shape[0] and length <= self.keys.shape[2]:
            return
        held = (0, 0) if not self.is_initialized else (self.keys.shape[0], self.keys.shape[2])
        _, heads, _, size = like.shape
        shape = (max(rows, held[0]), heads, max(capacity_for(length), held[1]), size)
        # Zeros, for what is hidden still takes part in torch's products, times 0, and must be a number.
        grown = (like.new_zeros(shape), like.new_zeros(shape))
        if self.is_initialized:
            count, width = len(self.slots.lengths), max(self.slots.lengths, default=0)
            for new, old in zip(grown, (self.keys, self.values), strict=True):
                new[:count, :, :width] = old[:count, :, :width]
        self.keys, self.values = grown
        self.is_initialized = True


class SlotCache(Cache):
    """The slots of all layers."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.lengths: list[int] = []  # of each running row: filled places
        self.row_index = torch.zeros(0, dtype=torch.long)
        self.places = torch.zeros(0, dtype=torch.long)  # where the next token of each row goes
        self.width = 0

    def add(self, read: Cache, row: int, columns: Tensor, *, copies: int, room: int) -> None:
        """Puts what a prefill has read into new slots behind the running ones.

        Args:
            read: the cache of the prefill.
            row: of it.
            columns: boolean, which of its positions are the row's own, and no padding.
            copies: of the row: samples of the same context.
            room: places that each will need in the end.
        """
        count, length = len(self.lengths), int(columns.sum())
        for slot, layer in zip(self.layers, read.layers, strict=True):
            slot.reserve(count + copies, max([room, *self.lengths]), layer.keys)
            slot.keys[count : count + copies, :, :length] = layer.keys[row][:, columns]
            slot.values[count : count + copies, :, :length] = layer.values[row][:, columns]
        self.lengths += [length] * copies

    def remove(self, row: int) -> None:
        """Lets a row go; the last one takes its slot."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            for slot in self.layers:
                slot.keys[row, :, :length] = slot.keys[last, :, :length]
                slot.values[row, :, :length] = slot.values[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def keep(self, rows: int) -> None:
        """Lets all but the first rows go."""
        del self.lengths[rows:]

    def begin_step(self, device: torch.device) -> Tensor:
        """Prepares the feeding of one token a row; returns which places each row then sees, boolean ``[R, W]``."""
        self.row_index = torch.arange(len(self.lengths), device=device)
        self.places = torch.tensor(self.lengths, device=device)
        self.width = max(self.lengths) + 1
        return torch.arange(self.width, device=device) <= self.places[:, None]

    def end_step(self) -> None:
        """The fed tokens are part of their rows."""
        self.lengths = [length + 1 for length in self.lengths]


def real_columns(mask: Tensor | None, row: int, *, width: int) -> Tensor:
    """Which of the ``width`` cached positions are a row's own: those of a prefix, and its tokens where ``mask`` is."""
    columns = torch.ones(width, dtype=torch.bool)
    if mask is not None:
        columns[width - mask.shape[1] :] = mask[row].cpu()
    return columns


def total_places(lengths: Sequence[int]) -> int:
    """Places that rows of these final lengths take: slots are as long as the longest of them."""
    return len(lengths) * capacity_for(max(lengths)) if lengths else 0
