"""The processes that share an evaluation, as torchrun starts them: each answers its batches, the first one writes.

Training leaves this to accelerate, which belongs to the extra ``train``; a model is measured without it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of a run; all of them make the same calls."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in every process."""
        if self.size == 1:
            return [value]
        values: list[Value | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def agree(self, value: Value) -> Value:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def device(self, given: str | None) -> str | None:
        """The device of this process: without a given one, each has a GPU of its own where there are some."""
        if given is not None or self.size == 1 or not torch.cuda.is_available():
            return given
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"


@contextmanager
def join_team() -> Iterator[Team]:
    """The processes that torchrun started; alone without it. What they exchange goes over the CPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    joins = not distributed.is_initialized()
    if joins:
        distributed.init_process_group("gloo")
    try:
        yield Team(distributed.get_rank(), distributed.get_world_size())
    finally:
        if joins:
            distributed.destroy_process_group()
