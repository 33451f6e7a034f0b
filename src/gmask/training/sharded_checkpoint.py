"""A checkpoint that each process writes its parts of, and that any number of processes reads, however they divide them.

The form is that of torch.distributed.checkpoint. Its planner takes the part of a process for one piece of the whole
tensor, which a projection that is divided within its thirds is not: the planners here name each piece.

Source: PyTorch, the documentation of `torch.distributed.checkpoint`.
"""

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from gmask.training.parallel import pieces


class PieceSavePlanner(DefaultSavePlanner):
    """Writes the pieces that this process holds of each tensor. What several processes hold is written once."""

    def create_local_plan(self) -> SavePlan:
        self.pieces = dict[MetadataIndex, Tensor]()
        items = []
        for name, value in self.state_dict.items():
            for start, piece in pieces(value):
                index = MetadataIndex(name, start)
                self.pieces[index] = piece
                chunk = ChunkStorageMetadata(torch.Size(start), piece.shape)
                data = TensorWriteData(chunk, TensorProperties.create_from_tensor(piece), value.shape)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items, planner_data=self.mappings)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[MetadataIndex(index.fqn, index.offset)]


class PieceLoadPlanner(DefaultLoadPlanner):
    """Reads the pieces that this process holds of each tensor, out of any pieces that were written."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        self.pieces = dict[MetadataIndex, Tensor]()
        items = []
        for name, value in self.state_dict.items():
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            own = pieces(value)
            self.pieces |= {MetadataIndex(name, start): piece for start, piece in own}
            chunks = [ChunkStorageMetadata(torch.Size(start), piece.shape) for start, piece in own]
            items.extend(create_read_items_for_chunk_list(name, saved, chunks))
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[MetadataIndex(index.fqn, index.offset)]


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup) -> "Future[Any]":
    """Begins to write this process's parts of tensors, from a copy, in a thread. All processes must call this together.

    Args:
        tensors: by name; those that are not divided are the same in every process.
        group: over gloo, which nothing else uses meanwhile.
    """
    writer, planner = FileSystemWriter(folder), PieceSavePlanner()
    return cast("Future[Any]", async_save(dict(tensors), storage_writer=writer, planner=planner, process_group=group))


def wait_for_shards(writing_shards: "Future[Any]") -> None:
    """Waits until all processes have written their parts. Raises what went wrong in the first that failed."""
    try:
        writing_shards.result()
    except CheckpointException as error:
        failed, _ = next(iter(error.failures.values()))
        raise failed from error


def read_shards(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `write_shards`: this process's parts of those that are divided like a parameter, others whole."""
    reader = FileSystemReader(folder)
    found: dict[str, Tensor] = {}
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        like, dtype = parameters.get(key.partition(".")[2]), saved.properties.dtype
        is_part = isinstance(like, DTensor) and like.shape == saved.size
        found[key] = torch.empty_like(like, dtype=dtype) if is_part else torch.empty(saved.size, dtype=dtype)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads all parts
        load_shards(dict(found), storage_reader=reader, planner=PieceLoadPlanner())
    return found
