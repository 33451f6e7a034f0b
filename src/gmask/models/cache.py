"""How are keys and values kept, so that a new token copies only its own?

transformers' `DynamicCache` joins old and new into a fresh tensor at each token; for ChatGLM-6B at 512 positions that
moves half a gigabyte a token. Here each layer has room to spare, and a new tensor is made only when it runs out.

Shape letters: B rows, N heads, K positions so far, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

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
