"""How does a new folder come to its place as a whole, or not at all?"""

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from gmask.checkpoints.megatron import RANK_FILE, TRACKERS
from gmask.checkpoints.memory import format_bytes
from gmask.errors import GmaskError

OWN_FILES = (
    "*.safetensors", "pytorch_model*.bin", "*.json", "*.model", "merges.txt", "vocab.txt", "README.md", "LICENSE",
    "MODEL_LICENSE", ".gitattributes", *TRACKERS,
)  # fmt: skip
"""What may be lost when a checkpoint is replaced; a folder that holds anything else is left alone."""


def check_places(source: Path, target: Path, *, force: bool, also_read: Sequence[Path] = ()) -> None:
    """Raises `GmaskError` if a folder cannot be written without harm to others, or to what is there.

    Args:
        source: is converted.
        target: does not exist, or is empty; with ``force``, may also hold a checkpoint, and nothing else.
        also_read: folders that are read beside the source.
    """
    place = target.resolve()
    for folder in (source, *also_read):
        real = folder.resolve()
        if real == place:
            raise GmaskError(f"{target}: is what is read; name another folder for the result")
        if place.is_relative_to(real):
            raise GmaskError(f"{target}: lies in {folder}, which is read; name a folder outside it")
        if real.is_relative_to(place):
            raise GmaskError(f"{target}: holds {folder}, which is read; name another folder for the result")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise GmaskError(f"{target}: is a file or a link; name a new folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise GmaskError(f"{target}: exists; name a new folder, or use --force to replace it")
    if foreign := _find_foreign(target):
        raise GmaskError(
            f"{target}: holds {foreign.name}, which is no part of a checkpoint; move it away, or remove {target}"
        )


def _find_foreign(folder: Path) -> Path | None:
    """Something in a folder that is no part of one checkpoint."""
    iterations = [path for path in folder.iterdir() if path.is_dir()]
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            inner = list(path.iterdir())
            if len(iterations) > 1 or not inner or not all(RANK_FILE.fullmatch(entry.name) for entry in inner):
                return path
        elif not RANK_FILE.fullmatch(path.name) and not any(fnmatch(path.name, pattern) for pattern in OWN_FILES):
            return path
    return None


def check_space(target: Path, needed: int) -> None:
    """Raises `GmaskError`, with the numbers, if the disk has no room for ``needed`` bytes more."""
    free = shutil.disk_usage(nearest_folder(target)).free
    if needed > free:
        raise GmaskError(f"{target}: needs {format_bytes(needed)} of the disk, {format_bytes(free)} are free")


def nearest_folder(path: Path) -> Path:
    """The first of its parents that exists."""
    return next(parent for parent in path.resolve().parents if parent.is_dir())


@contextmanager
def placed_at_last(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which takes its place once the block is left without an error.

    What is at the target is removed after that; after an error the new folder is.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    folder = target.with_name(f".{target.name}.{mark}.partial")
    folder.mkdir()
    try:
        yield folder
        _replace(target, folder, target.with_name(f".{target.name}.{mark}.replaced"))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _replace(target: Path, folder: Path, aside: Path) -> None:
    if not target.exists():
        folder.rename(target)
        _sync(target.parent)
        return
    target.rename(aside)
    try:
        folder.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside)


def _sync(folder: Path) -> None:
    """Has the names in a folder written to the disk, where the system can be asked for it."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
