"""Files written whole or not at all, and JSON objects read with one-line errors."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gmask.errors import GmaskError, one_line

LFS_POINTER = b"version https://git-lfs"


def read_object(path: Path, *, required: bool = True) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        required: if False, a file that is not there gives an empty object.

    Raises:
        GmaskError: not JSON, another value than an object, or a Git LFS pointer.
        OSError: no such file, though it is required.
    """
    if not required and not path.is_file():
        return {}
    refuse_placeholder(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GmaskError(f"{path}: not JSON, download or copy it again ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise GmaskError(f"{path}: expected a JSON object")
    return values


def write_json(path: Path, values: Any) -> None:
    """Writes an indented JSON file. Raises OSError if it cannot be written."""
    write_pieces(path, [json.dumps(values, ensure_ascii=False, indent=1) + "\n"])


def write_pieces(path: Path, pieces: Iterable[str]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def refuse_placeholder(path: Path) -> None:
    """Raises `GmaskError` if there is no file, or only what stands for one: a folder, nothing, a Git LFS pointer."""
    if path.is_dir():
        raise GmaskError(f"{path}: is a folder, where a file is expected")
    if not path.is_file():
        raise GmaskError(f"{path}: missing; download or copy it again")
    if path.stat().st_size == 0:
        raise GmaskError(f"{path}: truncated or damaged, download or copy it again (it is empty)")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise GmaskError(f"{path}: cannot be read ({error.strerror})") from error
    if start == LFS_POINTER:
        raise GmaskError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` there")
