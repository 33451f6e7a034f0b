"""The forms in which a folder may hold weights, and `Checkpoint`, the one view of them all.

There are safetensors and ``.bin`` files in the Hugging Face form, whole or in shards, and the files of the original
training code. A checkpoint of the latter is a folder ``DIR/<iteration>`` with a file for each rank of model
parallelism, and in DIR a tracker file that names the iteration; without a tracker the folder is the iteration itself.

Source: THUDM/GLM utils.py (``save_checkpoint``, ``load_checkpoint``), change_mp.py and mpu/layers.py.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor

from gmask.checkpoints.tensor_files import WEIGHTS_ENTRY, PickledFile, SafetensorsFile, TensorFile
from gmask.config import show
from gmask.errors import GmaskError
from gmask.files import read_object, read_text, refuse_placeholder
from gmask.models.glm_heads import THUDM_CLASSIFIER_NAMES

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of weights in the order of preference; an index names the shards."""

PREFIX_ENCODER = "transformer.prefix_encoder."
"""Start of the names that P-tuning v2 adds to a ChatGLM. Its published checkpoints hold nothing else."""

Layout: TypeAlias = Literal["safetensors", "mapped", "bin", "megatron"]
Location: TypeAlias = tuple[TensorFile, str]
"""A file, and the name of a tensor in it."""


class Checkpoint:
    """Weights on the disk, by their bare published names. Only `read` reads them.

    Attributes:
        folder: its path.
        layout: ``"safetensors"`` or ``"bin"`` for the Hugging Face form, ``"mapped"`` for safetensors that hold the
            blocks of the CPU kernels, ``"megatron"`` for the training code.
        parallel_size: ranks of model parallelism that the weights are divided among; 1 unless megatron.
        bookkeeping: megatron's other entries (``iteration`` ...), with None for values that are not plain data.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        locations: Mapping[str, Sequence[Location]],
        bookkeeping: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.layout: Layout = layout
        self._locations = dict(locations)
        self.parallel_size = max((len(parts) for parts in locations.values()), default=1)
        self.bookkeeping = dict(bookkeeping or {})

    def keys(self) -> list[str]:
        """Bare names, in the order in which the files are best read."""
        return list(self._locations)

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __contains__(self, key: str) -> bool:
        return key in self._locations

    def stored_name(self, key: str) -> str:
        """The name that a tensor has in its file."""
        return self._locations[key][0][1]

    def shape(self, key: str) -> torch.Size:
        """Returns the shape of the whole tensor, all ranks merged."""
        (file, name), *others = self._locations[key]
        shape = list(file.shape(name))
        if others:
            split = split_of(key)
            if split is Split.COLUMNS:
                shape[1] *= self.parallel_size
            elif split is not Split.WHOLE:
                shape[0] *= self.parallel_size
        return torch.Size(shape)

    def dtype(self, key: str) -> torch.dtype:
        file, name = self._locations[key][0]
        return file.dtype(name)

    def read(self, key: str) -> Tensor:
        """The tensor on the CPU, in its stored dtype.

        It may be a view of the file: copy it before the file changes, and do not write to it.

        Raises:
            GmaskError: the ranks differ in a tensor that should be the same in all.
        """
        parts = [file.read(name) for file, name in self._locations[key]]
        return parts[0] if len(parts) == 1 else merge(key, parts)

    def read_blocks(self, key: str) -> Tensor | None:
        """Returns a tensor that lies in the blocks of the CPU kernels as it lies there, a view of its file; else None.

        `read` returns it in the published format.
        """
        (file, name), *_ = self._locations[key]
        lies = isinstance(file, SafetensorsFile) and file.blocks is not None and name in file.blocks.shapes
        return file.read_blocks(name) if lies else None  # type: ignore[attr-defined]

    @property
    def files(self) -> list[Path]:
        """The paths of the files that hold the weights."""
        return sorted({file.path for parts in self._locations.values() for file, _ in parts})

    @property
    def unmapped_bytes(self) -> int:
        """Bytes of the files that cannot be mapped, but are read as a whole (written before PyTorch 1.6)."""
        files = {file.path for parts in self._locations.values() for file, _ in parts if not file.is_mapped}
        return sum(path.stat().st_size for path in files)

    def close(self) -> None:
        """Closes the files."""
        self._locations.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens the weights of a folder in any form, and checks what can be checked without reading them.

    If there are several forms, safetensors are preferred, then ``.bin``, then the files of the training code.

    Raises:
        GmaskError: no weights; a missing, damaged or dangerous file; files that do not fit together.
    """
    return open_megatron(folder) if is_megatron(folder) else open_published(folder)


def is_megatron(folder: Path) -> bool:
    """Returns True if a folder holds a checkpoint of the training code, and no weights in the Hugging Face form."""
    if holds_published(folder):
        return False
    return find_tracker(folder) is not None or holds_ranks(folder)


def holds_published(folder: Path) -> bool:
    """True if a folder holds weights in the Hugging Face form."""
    return any((folder / name).exists() for name in WEIGHT_FILES)


def open_megatron(folder: Path) -> Checkpoint:
    """`open_checkpoint` for the files of the training code."""
    ranks = open_ranks(find_rank_files(folder))
    keys = {name: [(rank, name) for rank in ranks] for name in ranks[0].names()}
    return Checkpoint(folder, "megatron", _under_bare_names(folder, keys), ranks[0].others)


def open_published(folder: Path) -> Checkpoint:
    """`open_checkpoint` for the Hugging Face form."""
    path = _find_weights(folder)
    index = _read_index(path) if path.suffix == ".json" else None
    names = [path.name] if index is None else sorted(set(index.values()))
    files = [_open_file(folder / name) for name in names]
    if index is not None:
        _check_shards(files, index)
    locations: dict[str, list[Location]] = {}
    for file in files:
        for name in file.names():
            locations[name] = [(file, name)]
    layout: Layout = "safetensors" if files[0].path.suffix == ".safetensors" else "bin"
    if any(isinstance(file, SafetensorsFile) and file.blocks is not None for file in files):
        layout = "mapped"
    return Checkpoint(folder, layout, _under_bare_names(folder, locations))


def _find_weights(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if found is None:
        raise GmaskError(
            f"{folder}: no weights there; expected {' or '.join(WEIGHT_FILES[::2])} (or an index of several such "
            "files), or mp_rank_00_model_states.pt of the training code"
        )
    refuse_placeholder(found)
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Names of tensors and of the files that hold them.

    Raises:
        GmaskError: a damaged index, or one that names a file elsewhere.
    """
    folder = path.parent
    index = read_object(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise GmaskError(f"{path}: has no weight_map; download or copy it again")
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    for name in set(map(str, index.values())):
        if Path(name).name != name or "\\" in name or Path(name).suffix != suffix:
            raise GmaskError(f"{path}: names {show(name)}, which is no {suffix} file of this folder: refused")
        if not _lies_inside(folder, name):
            raise GmaskError(f"{folder / name}: links to a file outside its folder: refused; copy the file there")
        if not (folder / name).exists():
            raise GmaskError(f"{folder / name}: missing, though {path.name} names it; download or copy it again")
    return index


def _lies_inside(folder: Path, name: str) -> bool:
    """Returns True if a file is in the folder, or a link to a blob of the hub cache that the folder is part of."""
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


def _under_bare_names(folder: Path, locations: Mapping[str, Sequence[Location]]) -> dict[str, Sequence[Location]]:
    """Returns the locations by the names that `GLMModel` has for the tensors."""
    if not locations:
        raise GmaskError(f"{folder}: the files hold no weights")
    named: dict[str, Sequence[Location]] = {}
    for key, parts in locations.items():
        bare = _rename_head(bare_name(key))
        if bare in named:
            raise GmaskError(f"{folder}: holds {bare} twice, as {named[bare][0][1]} and as {key}")
        named[bare] = parts
    return named


def _rename_head(key: str) -> str:
    """Returns a name in which a layer of a classifier's head is called as here, not as in the training code."""
    layer, dot, parameter = key.partition(".")
    return THUDM_CLASSIFIER_NAMES.get(layer, layer) + dot + parameter


TRACKERS = ("latest_checkpointed_iteration.txt", "latest")  # of THUDM/GLM, of DeepSpeed
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")


def rank_file_name(rank: int) -> str:
    return f"mp_rank_{rank:02d}_model_states.pt"


def find_tracker(folder: Path) -> Path | None:
    """Returns the file that names the newest iteration; None if the folder is an iteration itself."""
    return next((folder / name for name in TRACKERS if (folder / name).is_file()), None)


def holds_ranks(folder: Path) -> bool:
    """Returns True if the folder itself holds files of ranks."""
    return folder.is_dir() and any(RANK_FILE.fullmatch(path.name) for path in folder.iterdir())


def find_rank_files(folder: Path) -> list[Path]:
    """Returns the files of all ranks, in order.

    Raises:
        GmaskError: the tracker names no iteration of this folder, or a rank's file is missing.
    """
    iteration = _find_iteration(folder)
    found = {int(match[1]): path for path in iteration.iterdir() if (match := RANK_FILE.fullmatch(path.name))}
    if not found:
        raise GmaskError(f"{iteration}: no {rank_file_name(0)} there, so it is no checkpoint of the training code")
    for rank in range(max(found) + 1):
        if rank not in found:
            raise GmaskError(f"{iteration / rank_file_name(rank)}: missing, though there is {found[max(found)].name}")
    return [found[rank] for rank in sorted(found)]


def _find_iteration(folder: Path) -> Path:
    tracker = find_tracker(folder)
    if tracker is None:
        return folder
    refuse_placeholder(tracker)
    name = read_text(tracker).strip()
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise GmaskError(f"{tracker}: expected the name of an iteration, found {name[:40]!r}")
    if not (folder / name).is_dir():
        raise GmaskError(f"{tracker}: names the iteration {name}, which is not there; copy its folder, or name another")
    return folder / name


def open_ranks(files: Sequence[Path]) -> list[PickledFile]:
    """Opens the files of all ranks.

    Raises:
        GmaskError: they do not belong together, or some are missing.
    """
    ranks = [PickledFile(path, WEIGHTS_ENTRY) for path in files]
    first = ranks[0]
    for rank in ranks:
        size = rank.others.get("mp_world_size")
        if isinstance(size, int) and size != len(ranks):
            raise GmaskError(f"{rank.path}: is one of {size} ranks, but {_count_files(ranks)}")
        if rank.others.get("iteration") != first.others.get("iteration"):
            iterations = f"{rank.others.get('iteration')}, but {first.path.name} of {first.others.get('iteration')}"
            raise GmaskError(f"{rank.path}: is of iteration {iterations}; take all ranks from one checkpoint")
        if differing := set(rank.names()) ^ set(first.names()):
            raise GmaskError(f"{rank.path}: {min(differing)} is only in one of it and {first.path.name}")
        for key in rank.names():
            if (rank.shape(key), rank.dtype(key)) != (first.shape(key), first.dtype(key)):
                described = (
                    f"{list(rank.shape(key))} {rank.dtype(key)}, but {list(first.shape(key))} {first.dtype(key)}"
                )
                raise GmaskError(f"{rank.path}: {key} is {described} in {first.path.name}")
    expected = _count_by_shapes(first)
    if expected is not None and expected != len(ranks):
        raise GmaskError(f"{first.path}: its shapes are those of one of {expected} ranks, but {_count_files(ranks)}")
    return ranks


def _count_files(ranks: Sequence[PickledFile]) -> str:
    there = "there is one file" if len(ranks) == 1 else f"there are {len(ranks)} files"
    return f"{there}; copy all mp_rank files of the iteration"


def _count_by_shapes(rank: PickledFile) -> int | None:
    """Infers from the shapes of one rank among how many ranks the attention is divided; None without attention."""
    projection = next((key for key in rank.names() if key.endswith("attention.query_key_value.weight")), None)
    if projection is None or len(rank.shape(projection)) != 2:
        return None
    rows, hidden_size = rank.shape(projection)
    return 3 * hidden_size // rows if rows and 3 * hidden_size % rows == 0 else None


WRAPPERS = ("glm.", "model.", "module.")
"""Prefixes that wrapping classes add to the names of a `GLMModel`."""


class Split(Enum):
    """How model parallelism divides a tensor."""

    WHOLE = "every rank has all of it"
    ROWS = "each rank has a range of rows"
    COLUMNS = "each rank has a range of columns"
    THIRDS = "each rank has a range of rows of the queries, then of the keys, then of the values"


SPLITS = (
    (r"word_embeddings\.weight|lm_head\.weight", Split.ROWS),
    (r".*\.attention\.query_key_value\.(weight|bias)", Split.THIRDS),
    (r".*\.mlp\.dense_h_to_4h\.(weight|bias)", Split.ROWS),
    (r".*\.(attention\.dense|mlp\.dense_4h_to_h)\.weight", Split.COLUMNS),
)
"""Patterns of the names of divided tensors; all others are whole in every rank."""


def bare_name(key: str) -> str:
    """Returns the name that a tensor has in `GLMModel`; the names of heads stay as they are."""
    while key.startswith(WRAPPERS):
        key = key.partition(".")[2]
    return key


def split_of(key: str) -> Split:
    """Returns how the tensor of a bare name is divided."""
    return next((split for pattern, split in SPLITS if re.fullmatch(pattern, key)), Split.WHOLE)


def divide(key: str, tensor: Tensor, parts: int) -> list[Tensor]:
    """Divides a tensor among ``parts`` ranks; returns their shares in order.

    Raises:
        ValueError: it cannot be divided evenly.
    """
    split = split_of(key)
    if split is Split.WHOLE or parts == 1:
        return [tensor] * parts
    axis = 1 if split is Split.COLUMNS else 0
    pieces = 3 * parts if split is Split.THIRDS else parts
    if tensor.shape[axis] % pieces:
        raise ValueError(f"{key} {list(tensor.shape)} cannot be divided among {parts} ranks")
    if split is Split.THIRDS:
        thirds = [third.chunk(parts) for third in tensor.chunk(3)]
        return [torch.cat(own) for own in zip(*thirds, strict=True)]
    return [part.contiguous() for part in tensor.chunk(parts, dim=axis)]


def merge(key: str, parts: Sequence[Tensor]) -> Tensor:
    """Merges the shares of all ranks into the whole tensor, bit for bit.

    Raises:
        GmaskError: shares that differ, though all should be the same; shares of an impossible shape.
    """
    if len(parts) == 1:
        return parts[0]
    split = split_of(key)
    if split is Split.WHOLE:
        if not all(same_bits(part, parts[0]) for part in parts[1:]):
            raise GmaskError(f"{key} differs between the ranks, where all have to have the same")
        return parts[0]
    if split is Split.THIRDS:
        if any(part.shape[0] % 3 for part in parts):
            raise GmaskError(f"{key} {list(parts[0].shape)} is not queries, keys and values, a third of the rows each")
        return torch.cat([third for thirds in zip(*(part.chunk(3) for part in parts), strict=True) for third in thirds])
    return torch.cat(list(parts), dim=1 if split is Split.COLUMNS else 0)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns True if two tensors have the same dtype, shape and bits; NaN equals itself, and 0 differs from -0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
