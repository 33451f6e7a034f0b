"""Which tensors does a conversion write, under which names, and are they on the disk as they should be?"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gmask.checkpoints.reading import Checkpoint, open_checkpoint
from gmask.checkpoints.tensor_files import SCALES
from gmask.checkpoints.weight_maps import same_bits
from gmask.errors import GmaskError

EMBEDDING = "word_embeddings.weight"
PIECE = 2**22  # numbers that are looked at together


class Content:
    """The tensors of a checkpoint as another is to have them; each is read when it is asked for.

    Args:
        checkpoint: where they come from.
        names: of those that are wanted, by bare name: what they are called in the new files.
        dtype: what they become, but for integers and their scales; None to keep what each has.
        rows: rows of the word embedding to put in the place of those that are there.
        twins: tensors that the checkpoint lacks, by bare name, and the bare name of the one that each equals.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        dtype: torch.dtype | None = None,
        rows: Mapping[int, Tensor] | None = None,
        twins: Mapping[str, str] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.names = dict(names)
        self.twins = dict(twins or {})
        self._dtype = dtype
        self._rows = dict(rows or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def dtype(self, key: str) -> torch.dtype:
        stored = self.checkpoint.dtype(self._source(key))
        is_kept = not stored.is_floating_point or key.endswith(SCALES)
        return stored if is_kept or self._dtype is None else self._dtype

    def plan(self, key: str) -> Tensor:
        """The shape and dtype of a tensor, without numbers."""
        return torch.empty(self.checkpoint.shape(self._source(key)), dtype=self.dtype(key), device="meta")

    @property
    def nbytes(self) -> int:
        return sum(self.plan(key).nbytes for key in self)

    @property
    def numbers(self) -> int:
        """How many there are, those of integers that are packed counted as they lie there."""
        return sum(self.plan(key).numel() for key in self)

    def read(self, key: str) -> Tensor:
        """A tensor, which may be a view of its file.

        Raises:
            GmaskError: the new dtype is too small for a number.
        """
        stored = self.checkpoint.read(self._source(key))
        tensor = stored.to(self.dtype(key))
        if has_overflown(stored, tensor):
            raise GmaskError(
                f"{self.checkpoint.folder}: {key} has numbers beyond the range of {dtype_name(tensor.dtype)}; choose "
                "bfloat16 or float32"
            )
        if key == EMBEDDING and self._rows:
            tensor = tensor.clone()
            for row, values in self._rows.items():
                tensor[row] = values
        return tensor

    def read_rows(self, rows: list[int]) -> dict[int, Tensor]:
        """Copies of rows of the word embedding, in its new dtype."""
        embedding = self.read(EMBEDDING)
        return {row: embedding[row].clone() for row in rows}

    def with_rows(self, rows: Mapping[int, Tensor]) -> "Content":
        """The same, but for rows of the word embedding."""
        return Content(self.checkpoint, self.names, self._dtype, rows, self.twins)

    def _source(self, key: str) -> str:
        return self.twins.get(key, key)


def verify(content: Content, folder: Path, advance: Callable[[int], object]) -> None:
    """Compares the weights of a folder with what it should hold, bit by bit.

    Args:
        advance: is told the bytes that were compared.

    Raises:
        GmaskError: they differ.
    """
    with open_checkpoint(folder) as written:
        if differing := set(written) ^ set(content):
            raise GmaskError(f"{min(differing)} was not written as it should be; this is a fault of gmask: report it")
        for key in content:
            tensor = content.read(key)
            if written.stored_name(key) != content.names[key] or not same_bits(written.read(key), tensor):
                raise GmaskError(f"{key} is not on the disk as it was written; check the disk, and try again")
            advance(tensor.nbytes)


def has_overflown(stored: Tensor, tensor: Tensor) -> bool:
    """Whether finite numbers have become infinite in a smaller dtype."""
    if tensor.dtype == stored.dtype or torch.finfo(tensor.dtype).max >= torch.finfo(stored.dtype).max:
        return False
    pieces = zip(torch.split(stored.reshape(-1), PIECE), torch.split(tensor.reshape(-1), PIECE), strict=True)
    return any(not torch.equal(before.isfinite(), after.isfinite()) for before, after in pieces)


def main_dtype(weights: Checkpoint | Content, embedding: str) -> torch.dtype:
    """The dtype that a model of these weights computes in: of its embedding, or of the first floats.

    Args:
        embedding: the bare name of the word embedding.
    """
    keys = [embedding, *(key for key in weights if not key.endswith(SCALES))]
    return next(weights.dtype(key) for key in keys if weights.dtype(key).is_floating_point)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
