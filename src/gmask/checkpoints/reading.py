"""How is a checkpoint of any published form read, tensor by tensor, and what is wrong with a bad one?"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor

from gmask.checkpoints.json_files import read_object
from gmask.checkpoints.megatron import find_rank_files, find_tracker, holds_ranks, open_ranks
from gmask.checkpoints.tensor_files import PickledFile, SafetensorsFile, TensorFile, refuse_placeholder
from gmask.checkpoints.weight_maps import Split, bare_name, merge, split_of
from gmask.errors import GmaskError
from gmask.models.glm.heads import THUDM_CLASSIFIER_NAMES

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights may lie, in the order of preference; an index names the files that they are spread over."""

Layout: TypeAlias = Literal["safetensors", "bin", "megatron"]
Place: TypeAlias = tuple[TensorFile, str]
"""A file, and the name of a tensor in it."""


class Checkpoint:
    """Weights on a disk, under their bare published names; nothing is read before `read`.

    Attributes:
        folder: where it lies.
        layout: ``"safetensors"`` or ``"bin"`` of the Hugging Face form, or ``"megatron"`` of the training code.
        parallel_size: ranks of model parallelism that the weights are divided among; 1 unless megatron.
        bookkeeping: megatron's other entries (``iteration`` ...), with None for what is not plain data.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        places: Mapping[str, Sequence[Place]],
        bookkeeping: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.layout: Layout = layout
        self._places = dict(places)
        self.parallel_size = max((len(parts) for parts in places.values()), default=1)
        self.bookkeeping = dict(bookkeeping or {})

    def keys(self) -> list[str]:
        """Bare names, in the order in which the files are best read."""
        return list(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def stored_name(self, key: str) -> str:
        """The name that a tensor has in its file."""
        return self._places[key][0][1]

    def shape(self, key: str) -> torch.Size:
        """That of the whole tensor, all ranks together."""
        (file, name), *others = self._places[key]
        shape = list(file.shape(name))
        if others:
            split = split_of(key)
            if split is Split.COLUMNS:
                shape[1] *= self.parallel_size
            elif split is not Split.WHOLE:
                shape[0] *= self.parallel_size
        return torch.Size(shape)

    def dtype(self, key: str) -> torch.dtype:
        file, name = self._places[key][0]
        return file.dtype(name)

    def read(self, key: str) -> Tensor:
        """The tensor on the CPU, in its stored dtype.

        It may be a view of the file: copy it before the file changes, and do not write to it.

        Raises:
            GmaskError: ranks that differ where they must not.
        """
        parts = [file.read(name) for file, name in self._places[key]]
        return parts[0] if len(parts) == 1 else merge(key, parts)

    @property
    def unmapped_bytes(self) -> int:
        """Bytes of the files that fill memory as a whole when they are read (written before PyTorch 1.6)."""
        files = {file.path: file for parts in self._places.values() for file, _ in parts}
        return sum(path.stat().st_size for path, file in files.items() if not file.is_mapped)

    def close(self) -> None:
        """Lets the files go."""
        self._places.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens the weights of a folder, in whichever form they are, and checks what can be checked unread.

    Of several forms the safetensors are taken, then ``.bin``, then the files of the training code.

    Raises:
        GmaskError: no weights; a missing, damaged or dangerous file, which is named; files that do not fit together.
    """
    if is_megatron(folder):
        ranks = open_ranks(find_rank_files(folder))
        keys = {name: [(rank, name) for rank in ranks] for name in ranks[0].names()}
        return Checkpoint(folder, "megatron", _under_bare_names(folder, keys), ranks[0].others)
    index = _read_index(folder)
    files = [_open_file(path) for path in weight_files(folder)]
    if index is not None:
        _check_shards(files, index)
    places: dict[str, list[Place]] = {}
    for file in files:
        for name in file.names():
            places[name] = [(file, name)]
    layout: Layout = "safetensors" if files[0].path.suffix == ".safetensors" else "bin"
    return Checkpoint(folder, layout, _under_bare_names(folder, places))


def is_megatron(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of the training code, and no weights in the Hugging Face form beside it."""
    if any((folder / name).exists() for name in WEIGHT_FILES):
        return False
    return find_tracker(folder) is not None or holds_ranks(folder)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder.

    Raises:
        GmaskError: there are none, one that is named is missing, or an index points elsewhere.
    """
    if is_megatron(folder):
        return find_rank_files(folder)
    index = _read_index(folder)
    if index is not None:
        return [folder / name for name in sorted(set(index.values()))]
    return [_find_weights(folder)]


def _find_weights(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if found is None:
        raise GmaskError(
            f"{folder}: no weights there; expected {' or '.join(WEIGHT_FILES[::2])} (or an index of several such "
            "files), or mp_rank_00_model_states.pt of the training code"
        )
    refuse_placeholder(found)
    return found


def _read_index(folder: Path) -> dict[str, str] | None:
    """Names of tensors and of the files that hold them; None if the weights are in one file.

    Raises:
        GmaskError: a damaged index, or one that names a file elsewhere.
    """
    path = _find_weights(folder)
    if path.suffix != ".json":
        return None
    index = read_object(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise GmaskError(f"{path}: has no weight_map; download or copy it again")
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    for name in set(map(str, index.values())):
        if Path(name).name != name or "\\" in name or Path(name).suffix != suffix:
            raise GmaskError(f"{path}: names {name!r}, which is no {suffix} file of this folder: refused")
        if not _lies_inside(folder, name):
            raise GmaskError(f"{folder / name}: links to a file outside its folder: refused; copy the file there")
        if not (folder / name).exists():
            raise GmaskError(f"{folder / name}: missing, though {path.name} names it; download or copy it again")
    return index


def _lies_inside(folder: Path, name: str) -> bool:
    """Whether a file is in the folder; a link into the blobs of the hub cache that the folder is part of counts."""
    real_folder, real_file = folder.resolve(), (folder / name).resolve()
    if real_file.parent == real_folder:
        return True
    is_snapshot = real_folder.parent.name == "snapshots"
    return is_snapshot and real_file.parent == real_folder.parents[1] / "blobs"


def _open_file(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)


def _check_shards(files: Sequence[TensorFile], index: Mapping[str, str]) -> None:
    for file in files:
        held, named = set(file.names()), {key for key, name in index.items() if name == file.path.name}
        if held != named:
            fault = f"lacks {min(named - held)}" if named - held else f"holds {min(held - named)}"
            not_there = "which the index puts there" if named - held else "which the index does not put there"
            raise GmaskError(
                f"{file.path}: {fault}, {not_there}: truncated, or of another model; download or copy it again"
            )


def _under_bare_names(folder: Path, places: Mapping[str, Sequence[Place]]) -> dict[str, Sequence[Place]]:
    """The same tensors under the names that `GLMModel` has for them."""
    if not places:
        raise GmaskError(f"{folder}: the files hold no weights")
    named: dict[str, Sequence[Place]] = {}
    for key, parts in places.items():
        bare = _own_name(bare_name(key))
        if bare in named:
            raise GmaskError(f"{folder}: holds {bare} twice, as {named[bare][0][1]} and as {key}")
        named[bare] = parts
    return named


def _own_name(key: str) -> str:
    """A name with that of a classifier's layer in place of the one that the training code has for it."""
    layer, dot, parameter = key.partition(".")
    return THUDM_CLASSIFIER_NAMES.get(layer, layer) + dot + parameter
