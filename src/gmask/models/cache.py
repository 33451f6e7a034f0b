"""KV caches: `GrowingCache` for one batch, and `SlotCache` for rows that come and go.

transformers' `DynamicCache` concatenates old and new keys into a new tensor at each token; for ChatGLM-6B at 512
positions that copies half a gigabyte a token. A `GrowingCache` has spare room in each layer, and allocates a new tensor
only when it is used up.

`SlotCache` gives every running row a slot: a row of preallocated keys and values, filled from the left. A decoding step
feeds one token a row, writes it to the next free position of its slot, and reads the filled part of all slots. A row
that ends is replaced by the last one, so that the running rows are always the first ones and no indexing is needed.
Slots may hold int8 (`quantize_states`), which takes half the memory of bfloat16, and half the time to read it.

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

from gmask.errors import GmaskError
from gmask.native import ops as native

ROOM = 128
"""The number of positions that are allocated at a time."""

CLEANED = 16
"""The number of positions that are set to zero at a time."""


def capacity_for(length: int) -> int:
    """Returns the number of positions that are allocated for ``length`` of them."""
    return (length // ROOM + 1) * ROOM


KV_CACHES = ("int8",)
"""The forms of keys and values in slots, beside the dtype of the activations."""


def read_kv_cache(name: str | None) -> str | None:
    """Returns a form of keys and values; None for that of the activations.

    Raises:
        GmaskError: a form that is not in `KV_CACHES`.
    """
    if name is not None and name not in KV_CACHES:
        raise GmaskError(f"kv_cache {name!r} is not one of {', '.join(KV_CACHES)}")
    return name


SMALLEST = 2.0**-100
"""Numbers below are rounded to 0."""


def quantize_states(states: Tensor) -> Tensor:
    """Rounds keys or values to int8: each head of each position to multiples of a 127th of its largest number.

    Args:
        states: ``[B, N, K, D]``.

    Returns:
        int8 ``[B, N, K, D + 4]``: the D multiples, and the bytes of the float32 step, which is NaN if a number was not
        finite.
    """
    if native.can_round(states):
        return native.round_states(states)
    wide = states.detach().float()
    extent = wide.abs().amax(-1, keepdim=True)
    is_zero = extent < SMALLEST
    most = torch.full_like(extent, 127)  # by a number torch would multiply with its reciprocal
    step = torch.where(is_zero, 0.0, torch.where(extent.isfinite(), extent / most, torch.nan))
    up = torch.where(is_zero | ~extent.isfinite(), 0.0, most / extent)
    numbers = (wide.nan_to_num() * up).round().to(torch.int8)
    return torch.cat((numbers, step.view(torch.int8)), dim=-1)


def dequantize_states(rounded: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the keys or values ``[B, N, K, D]`` that `quantize_states` rounded, in ``dtype``."""
    numbers, step = rounded[..., : -native.STEP_BYTES], rounded[..., -native.STEP_BYTES :]
    return (numbers * step.contiguous().view(torch.float32)).to(dtype)


class GrowingLayer(DynamicLayer):
    """Keys and values ``[B, N, K, D]`` of a layer: the filled parts of two larger tensors."""

    keys: Tensor
    values: Tensor

    def __init__(self, *, spare: bool = True) -> None:
        """``spare``: True to allocate more positions than are filled."""
        super().__init__()
        self.spare = spare
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new positions; returns all of them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._rooms = None  # gradients do not flow through writes in place
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
        """Returns True if the keys are still a view of their room; selecting or reordering rows replaces them."""
        return self.keys.numel() == 0 or (
            self.keys.data_ptr() == rooms[0].data_ptr() and self.keys.stride() == rooms[0].stride()
        )

    def _make_room(self, states: Tensor, length: int) -> Tensor:
        batch, heads, _, size = states.shape
        return states.new_empty(batch, heads, capacity_for(length) if self.spare else length, size)

    def select(self, rows: Tensor, *, room: int) -> "GrowingLayer":
        """Returns a new layer with these rows, and room for exactly ``room`` more positions."""
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
        """Frees the memory; the layer must not be read afterwards."""
        self._rooms = None
        self.keys, self.values = self.keys.new_empty(0), self.values.new_empty(0)

    def give_rooms(self) -> tuple[Tensor, Tensor] | None:
        """Hands over the tensors of which the keys and values are the first positions; None if there is no spare room.

        The layer is empty afterwards.
        """
        rooms = self._rooms
        if rooms is None or not self._lies_in(rooms):
            return None
        self.release()
        return rooms

    def reset(self) -> None:
        self._rooms = None
        super().reset()


def _own(states: Tensor) -> Tensor:
    """Copies states that are a view of fused queries, keys and values, so that these can be freed."""
    is_part = states.untyped_storage().nbytes() > states.nbytes
    return states.clone(memory_format=torch.contiguous_format) if is_part else states


class GrowingCache(DynamicCache):
    """A `DynamicCache` that grows by `ROOM` positions at a time or, without ``spare``, has no spare room."""

    def __init__(self, config: PreTrainedConfig, *, spare: bool = True) -> None:
        super().__init__()
        self.layers = [GrowingLayer(spare=spare) for _ in range(config.num_hidden_layers)]

    def select(self, rows: Tensor, *, room: int) -> "GrowingCache":
        """Returns a new cache with these rows, which may repeat, and room for exactly ``room`` more positions."""
        chosen = copy.copy(self)
        chosen.layers = [layer.select(rows, room=room) for layer in self.layers]
        return chosen


@dataclass(slots=True)
class FilledSlots:
    """The filled part of the slots; all layers share this object."""

    lengths: list[int] = field(default_factory=list)  # filled positions of each running row
    places: tuple[Tensor, Tensor] | None = None  # row and position of each next token; None if positions are the same
    width: int = 0  # W of the present step


class SlotLayer(CacheLayerMixin):
    """Keys and values ``[R, N, C, D]`` of one layer, or what `quantize_states` makes of them."""

    is_compileable = False
    is_sliding = False
    is_initialized: bool
    keys: Tensor
    values: Tensor

    def __init__(self, filled: FilledSlots, *, is_int8: bool = False) -> None:
        super().__init__()
        self.filled, self.is_int8 = filled, is_int8
        self.clean_rows = self.clean_width = 0  # these first positions of these first rows hold no NaN

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: slots are allocated when the first row is added."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one position a row ``[R, N, 1, D]``; returns ``[R, N, W, D]``, or int8 ``[R, N, W, D + 4]``."""
        key_states, value_states = self.convert(key_states), self.convert(value_states)
        count, places, width = len(self.filled.lengths), self.filled.places, self.filled.width
        if places is None:  # all rows are equally long
            self.keys[:count, :, width - 1] = key_states[:, :, 0]
            self.values[:count, :, width - 1] = value_states[:, :, 0]
        else:
            rows, positions = (place.to(self.keys.device) for place in places)  # layers may be on several
            self.keys[rows, :, positions] = key_states[:, :, 0]
            self.values[rows, :, positions] = value_states[:, :, 0]
        return self.keys[:count, :, :width], self.values[:count, :, :width]

    def convert(self, states: Tensor) -> Tensor:
        """Returns keys or values as they are held."""
        return quantize_states(states) if self.is_int8 else states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled.width, 0

    def get_seq_length(self) -> int:
        return self.filled.width - 1

    def get_max_length(self) -> int:
        return -1

    def reserve(self, rows: int, length: int, width: int, like: Tensor) -> None:
        """Allocates room for rows and positions, and keeps the filled part.

        ``width``: the number of first positions that will be read.
        """
        if not self.is_initialized or rows > self.keys.shape[0] or length > self.keys.shape[2]:
            self._grow(rows, length, like)
        if rows > self.clean_rows or width > self.clean_width:
            self._clean(max(rows, self.clean_rows), max(width, self.clean_width))

    def take_over(self, read: GrowingLayer, room: int) -> bool:
        """Takes the tensors of a prefill as the slots of its rows; returns False if they have no room for ``room``."""
        count, length = len(read.keys), read.get_seq_length()
        if self.is_int8 or room > capacity_for(length) or (rooms := read.give_rooms()) is None:
            return False
        self.keys, self.values = rooms
        self.clean_rows, self.clean_width, self.is_initialized = count, length, True
        return True

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
        """Sets new positions to zero: hidden values still enter torch's products, times 0, so they must not be NaN."""
        width = min(-(-width // CLEANED) * CLEANED, self.keys.shape[2])
        for states in (self.keys, self.values):
            if rows > self.clean_rows:
                states[self.clean_rows : rows, :, :width] = 0
            states[: self.clean_rows, :, self.clean_width : width] = 0
        self.clean_rows, self.clean_width = rows, width


class SlotCache(Cache):
    """The slots of all layers; with ``is_int8`` they hold int8."""

    def __init__(self, layers: int, *, is_int8: bool = False) -> None:
        self.filled = FilledSlots()  # layers refer to it, not to the cache: reference cycles are freed late
        super().__init__(layers=[SlotLayer(self.filled, is_int8=is_int8) for _ in range(layers)])

    @property
    def lengths(self) -> list[int]:
        """Filled positions of each running row."""
        return self.filled.lengths

    def add(self, read: GrowingCache, is_real: Tensor | None, *, copies: Sequence[int], room: int = 0) -> None:
        """Copies the cache of a prefill into new slots behind the running ones, and empties it.

        Args:
            read: the cache of the prefill.
            is_real: boolean ``[B, T]`` for its last T positions, False at padding; positions before them are a prefix.
            copies: the number of slots for each row of the prefill: the samples of its context.
            room: the most positions that a new row will need; without it, slots grow as they fill.
        """
        width = read.get_seq_length()
        sources = torch.tensor([row for row, count in enumerate(copies) for _ in range(count)])
        if is_real is None:
            lengths, columns = [width] * len(sources), None
        else:
            prefix, real = width - is_real.shape[1], is_real.sum(-1).cpu()[sources]
            lengths = (prefix + real).tolist()
            skipped = torch.where(torch.arange(max(lengths)) < prefix, 0, width - prefix - real[:, None])
            columns = (torch.arange(max(lengths)) + skipped).clamp(max=width - 1)  # [R, longest]: index in the prefill
        first, longest = len(self.lengths), max(lengths)
        rows = slice(first, first + len(sources))
        fits = columns is None and first == 0 and max(copies) == 1  # then a slot is what the prefill wrote
        for slot, layer in zip(self.layers, read.layers, strict=True):
            if fits and slot.take_over(layer, room):
                continue
            keys, values = slot.convert(layer.keys), slot.convert(layer.values)
            slot.reserve(rows.stop, max(room, longest, *self.lengths), longest, keys)
            for new, old in ((slot.keys, keys), (slot.values, values)):
                if columns is not None:
                    new[rows, :, :longest] = old[sources[:, None], :, columns].transpose(1, 2)
                else:
                    new[rows, :, :longest] = old if len(sources) == len(old) else old[sources]
            layer.release()  # so that only one layer at a time is in memory twice
        self.lengths.extend(lengths)

    def remove(self, row: int) -> None:
        """Removes a row; the last row takes its slot."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            for slot in self.layers:
                slot.keys[row, :, :length] = slot.keys[last, :, :length]
                slot.values[row, :, :length] = slot.values[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def begin_step(self, device: torch.device) -> Tensor | None:
        """Prepares a step of one token a row; returns the positions that each row then sees.

        Boolean ``[R, W]``; None if all rows are equally long, so that each sees all of its positions.
        """
        filled, count = self.filled, len(self.lengths)
        filled.width = max(self.lengths) + 1
        for slot in self.layers:
            slot.reserve(count, filled.width, filled.width, slot.keys)
        if min(self.lengths) + 1 == filled.width:
            filled.places = None
            return None
        positions = torch.tensor(self.lengths, device=device)
        filled.places = (torch.arange(count, device=device), positions)
        return torch.arange(filled.width, device=device) <= positions[:, None]

    def end_step(self) -> None:
        """Counts the fed tokens as part of their rows."""
        self.filled.lengths = [length + 1 for length in self.lengths]


def position_bytes(config: PreTrainedConfig, dtype: torch.dtype, kv_cache: str | None) -> int:
    """Returns the bytes of the keys and values of one position in all layers.

    ``kv_cache``: one of `KV_CACHES`; None for keys and values in ``dtype``.
    """
    if kv_cache is None:
        head: int = config.head_dim * dtype.itemsize
    else:
        head = config.head_dim + native.STEP_BYTES
    heads: int = 2 * config.num_hidden_layers * config.num_attention_heads
    return heads * head


def total_positions(lengths: Sequence[int]) -> int:
    """Returns the positions that rows of these final lengths take: all slots are as long as the longest row."""
    return len(lengths) * capacity_for(max(lengths)) if lengths else 0
