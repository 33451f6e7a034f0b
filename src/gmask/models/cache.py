"""Keys and values: a cache with room to grow, and one whose rows come and go.

transformers' `DynamicCache` joins old and new into a fresh tensor at each token; for ChatGLM-6B at 512 positions that
moves half a gigabyte a token. Here each layer has room to spare, and a new tensor is made only when it runs out.

`SlotCache` gives every running row a slot: a row of preallocated keys and values, filled from the left. A decoding step
feeds one token a row, each to the next free position of its own slot, and looks at the filled part of all. A row that
ends is replaced by the last one, so that the running rows always come first and no row has to be picked out.

Shape letters: B rows, N heads, K positions so far, D head size, R rows, C positions of a slot, W the longest filled
part.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

ROOM = 128
"""Positions that room is made for at a time."""

CLEANED = 16
"""Positions that are set to zero at a time."""


def capacity_for(length: int) -> int:
    """Positions that a layer of ``length`` positions has room for."""
    return (length // ROOM + 1) * ROOM


class GrowingLayer(DynamicLayer):
    """Keys and values ``[B, N, K, D]`` of a layer: the filled parts of two larger tensors."""

    keys: Tensor
    values: Tensor

    def __init__(self, *, spare: bool = True) -> None:
        """``spare``: whether there is room for more positions than are there."""
        super().__init__()
        self.spare = spare
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
        if not past and not self.spare:
            self.keys, self.values = _own(key_states), _own(value_states)
            return self.keys, self.values
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

    def _make_room(self, states: Tensor, length: int) -> Tensor:
        batch, heads, _, size = states.shape
        return states.new_empty(batch, heads, capacity_for(length) if self.spare else length, size)

    def select(self, rows: Tensor, *, room: int) -> "GrowingLayer":
        """A layer of its own with these rows, and room for exactly so many positions more."""
        batch, heads, length, size = len(rows), *self.keys.shape[1:]
        chosen = GrowingLayer()
        chosen.lazy_initialization(self.keys, self.values)
        shape = (batch, heads, length + room, size)
        rooms = chosen._rooms = (self.keys.new_empty(shape), self.values.new_empty(shape))
        chosen.keys, chosen.values = rooms[0][..., :length, :], rooms[1][..., :length, :]
        rows = rows.to(self.keys.device)
        torch.index_select(self.keys, 0, rows, out=chosen.keys)
        torch.index_select(self.values, 0, rows, out=chosen.values)
        return chosen

    def release(self) -> None:
        """Lets the memory go; nothing can be read of the layer any more."""
        self._rooms = None
        self.keys, self.values = self.keys.new_empty(0), self.values.new_empty(0)

    def reset(self) -> None:
        self._rooms = None
        super().reset()


def _own(states: Tensor) -> Tensor:
    """The states in memory of their own: as a part of queries, keys and values they would keep all three."""
    is_part = states.untyped_storage().nbytes() > states.nbytes
    return states.clone(memory_format=torch.contiguous_format) if is_part else states


class GrowingCache(DynamicCache):
    """A `DynamicCache` that grows by `ROOM` positions at a time; without ``spare``, it holds what it must."""

    def __init__(self, config: PreTrainedConfig, *, spare: bool = True) -> None:
        super().__init__()
        self.layers = [GrowingLayer(spare=spare) for _ in range(config.num_hidden_layers)]

    def select(self, rows: Tensor, *, room: int) -> "GrowingCache":
        """A cache of its own with these rows, and room for exactly so many positions more; a row may come twice."""
        chosen = copy.copy(self)
        chosen.layers = [layer.select(rows, room=room) for layer in self.layers]
        return chosen


@dataclass(slots=True)
class FilledSlots:
    """How far the slots are filled; all layers share it."""

    lengths: list[int] = field(default_factory=list)  # of each running row: filled positions
    row_index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    positions: Tensor | None = None  # where the next token of each row goes; None: all at the same
    width: int = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values ``[R, N, C, D]`` of one layer."""

    is_compileable = False
    is_sliding = False
    is_initialized: bool
    keys: Tensor
    values: Tensor

    def __init__(self, filled: FilledSlots) -> None:
        super().__init__()
        self.filled = filled
        self.clean_rows = self.clean_width = 0  # the first positions of the first rows, all of which are numbers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Slots get their room when a first row is put in."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one position a row ``[R, N, 1, D]``; returns ``[R, N, W, D]``."""
        rows, positions, width = self.filled.row_index, self.filled.positions, self.filled.width
        count = len(rows)
        if positions is None:  # all rows are equally long
            self.keys[:count, :, width - 1] = key_states[:, :, 0]
            self.values[:count, :, width - 1] = value_states[:, :, 0]
        else:
            rows, positions = rows.to(self.keys.device), positions.to(self.keys.device)  # a model may lie on several
            self.keys[rows, :, positions] = key_states[:, :, 0]
            self.values[rows, :, positions] = value_states[:, :, 0]
        return self.keys[:count, :, :width], self.values[:count, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled.width, 0

    def get_seq_length(self) -> int:
        return self.filled.width - 1

    def get_max_length(self) -> int:
        return -1

    def reserve(self, rows: int, length: int, width: int, like: Tensor) -> None:
        """Makes room for so many rows and positions; what is filled stays. The first ``width`` are going to be read."""
        if not self.is_initialized or rows > self.keys.shape[0] or length > self.keys.shape[2]:
            self._grow(rows, length, like)
        if rows > self.clean_rows or width > self.clean_width:
            self._clean(max(rows, self.clean_rows), max(width, self.clean_width))

    def _grow(self, rows: int, length: int, like: Tensor) -> None:
        held = (self.keys.shape[0], self.keys.shape[2]) if self.is_initialized else (0, 0)
        _, heads, _, size = like.shape
        shape = (max(rows, held[0]), heads, max(capacity_for(length), held[1]), size)
        grown = (like.new_empty(shape), like.new_empty(shape))
        count, width = len(self.filled.lengths), max(self.filled.lengths, default=0)
        if self.is_initialized:
            for new, old in zip(grown, (self.keys, self.values), strict=True):
                new[:count, :, :width] = old[:count, :, :width]
        self.keys, self.values = grown
        self.clean_rows, self.clean_width = (count, width) if self.is_initialized else (0, 0)
        self.is_initialized = True

    def _clean(self, rows: int, width: int) -> None:
        """Zeros: what is hidden still takes part in torch's products, times 0, and must be a number."""
        width = min(-(-width // CLEANED) * CLEANED, self.keys.shape[2])
        for states in (self.keys, self.values):
            states[self.clean_rows : rows, :, :width] = 0
            states[: self.clean_rows, :, self.clean_width : width] = 0
        self.clean_rows, self.clean_width = rows, width


class SlotCache(Cache):
    """The slots of all layers."""

    def __init__(self, layers: int) -> None:
        self.filled = FilledSlots()  # no layer refers to the cache: memory that is in a circle is freed late
        super().__init__(layers=[SlotLayer(self.filled) for _ in range(layers)])

    @property
    def lengths(self) -> list[int]:
        """Filled positions of each running row."""
        return self.filled.lengths

    def add(self, read: GrowingCache, is_real: Tensor | None, *, copies: Sequence[int], room: int = 0) -> None:
        """Puts what a prefill has read into new slots behind the running ones, and empties its cache.

        Args:
            read: the cache of the prefill.
            is_real: boolean ``[B, T]``, False at padding among its last T positions; those before them are a prefix.
            copies: of each row: samples of the same context.
            room: positions that any of them will need in the end; without it, slots grow as they fill.
        """
        width = read.get_seq_length()
        sources = torch.tensor([row for row, count in enumerate(copies) for _ in range(count)])
        if is_real is None:
            lengths, columns = [width] * len(sources), None
        else:
            prefix, real = width - is_real.shape[1], is_real.sum(-1).cpu()[sources]
            lengths = (prefix + real).tolist()
            skipped = torch.where(torch.arange(max(lengths)) < prefix, 0, width - prefix - real[:, None])
            columns = (torch.arange(max(lengths)) + skipped).clamp(max=width - 1)  # R, longest: where each stands
        first, longest = len(self.lengths), max(lengths)
        rows = slice(first, first + len(sources))
        for slot, layer in zip(self.layers, read.layers, strict=True):
            slot.reserve(rows.stop, max(room, longest, *self.lengths), longest, layer.keys)
            for new, old in ((slot.keys, layer.keys), (slot.values, layer.values)):
                if columns is not None:
                    new[rows, :, :longest] = old[sources[:, None], :, columns].transpose(1, 2)
                else:
                    new[rows, :, :longest] = old if len(sources) == len(old) else old[sources]
            layer.release()  # so that both copies are in memory for one layer only
        self.lengths.extend(lengths)

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

    def begin_step(self, device: torch.device) -> Tensor | None:
        """Prepares the feeding of one token a row; returns which positions each row then sees.

        Boolean ``[R, W]``; None where the rows are equally long, and each sees all of its own.
        """
        filled, count = self.filled, len(self.lengths)
        filled.width = max(self.lengths) + 1
        for slot in self.layers:
            slot.reserve(count, filled.width, filled.width, slot.keys)
        filled.row_index = torch.arange(count, device=device)
        if min(self.lengths) + 1 == filled.width:
            filled.positions = None
            return None
        filled.positions = torch.tensor(self.lengths, device=device)
        return torch.arange(filled.width, device=device) <= filled.positions[:, None]

    def end_step(self) -> None:
        """The fed tokens are part of their rows."""
        self.filled.lengths = [length + 1 for length in self.lengths]


def total_positions(lengths: Sequence[int]) -> int:
    """Positions that rows of these final lengths take: slots are as long as the longest of them."""
    return len(lengths) * capacity_for(max(lengths)) if lengths else 0
