"""Where the records of a task are: in a folder of data, or on the hub; and what is said of a set that is not there."""

import glob
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gmask.errors import GmaskError, one_line
from gmask.tasks.records import Record, find_files, hash_file, stream_records

RecordSplit = Literal["validation", "train"]
"""The records that are measured, and those that few-shot examples are drawn from."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where the records of a task come from.

    ``files`` and ``train`` are globs relative to a folder of data, or to a folder in it: the names in the published
    archives and those of FewGLUE and FewCLUE. The first one that names a file is taken.
    """

    files: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    hub: str | None = None  # a data set of the Hugging Face hub, which the library datasets reads
    config: str | None = None  # its part
    split: str = "validation"
    train_split: str = "train"
    url: str = ""  # where people get it
    licence: str = ""  # of the data


class MissingDataError(GmaskError):
    """The records of a task are not on this machine."""


@dataclass(frozen=True, slots=True)
class RecordSet:
    """Records that were found. They are read anew each time."""

    name: str  # a path, a glob, or the name on the hub
    stream: Callable[[int | None, Callable[[GmaskError], None] | None], Iterator[Record]]  # of limit and on_bad
    files: tuple[Path, ...] = ()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files by their names; empty for a set of the hub."""
        return {path.name: hash_file(path) for path in self.files if path.suffix != ".target"}


def open_files(pattern: str) -> RecordSet:
    """The records of a file or a glob. Raises `GmaskError` if there is no such file."""
    files = tuple(find_files(pattern))
    return RecordSet(pattern, lambda limit, on_bad: stream_records(pattern, limit=limit, on_bad=on_bad), files)


def find_records(
    source: DataSource, root: Path | None, split: RecordSplit, *, name: str, labels: Collection[str] = ()
) -> RecordSet:
    """Looks for the records of a task: under a folder of data or, if none is named, on the hub.

    Args:
        root: the folder, or None.
        name: of the task, for the error.
        labels: of the task: a class of the hub is called by its name if that is one of them, else by its number.

    Raises:
        MissingDataError: they are not there; the message says where to get them, and under which names they are looked
            for.
    """
    if (pattern := find_pattern(source, root, split)) is not None:
        return open_files(pattern)
    reason = ""
    if source.hub is not None and root is not None:  # a run on local data asks no network
        reason = f"; on the hub it is {_hub_name(source, split)}, which is read where no folder is named"
    elif source.hub is not None:
        try:
            return _open_hub(source, split, labels)
        except ImportError:
            reason = f"; {_hub_name(source, split)} on the hub needs pip install datasets"
        # what a set that cannot be fetched raises: no connection, no such set or part, another format
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            reason = f"; {_hub_name(source, split)} on the hub cannot be read ({one_line(error)})"
    raise MissingDataError(f"{name}: {_describe_missing(source, root, split)}{reason}")


def find_pattern(source: DataSource, root: Path | None, split: RecordSplit) -> str | None:
    """The first of a task's names under which files lie in a folder of data, or one folder deeper; None without any."""
    if root is None:
        return None
    places = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    for relative, place in itertools.product(source.train if split == "train" else source.files, places):
        pattern = f"{glob.escape(str(place))}/{relative}"
        if any(Path(path).is_file() for path in glob.iglob(pattern, recursive=True)):
            # a name without wildcards is shown as it is
            return str(place / relative) if not set("*?[") & set(relative + str(place)) else pattern
    return None


def _describe_missing(source: DataSource, root: Path | None, split: RecordSplit) -> str:
    patterns = source.train if split == "train" else source.files
    wanted = "training records for the examples" if split == "train" else "records"
    if not patterns:
        option = "--train" if split == "train" else "--data"
        return f"the task does not say where its {wanted} are: name their file with {option}"
    where = "no folder of data is named" if root is None else f"no {wanted} in {root}"
    remedy = f"get them from {source.url}" if source.url else "put them there"
    licence = f" (licence: {source.licence})" if source.licence else ""
    return f"{where}: {remedy}{licence}; looked for: {', '.join(patterns)}"


def _hub_name(source: DataSource, split: RecordSplit) -> str:
    part = f"/{source.config}" if source.config else ""
    return f"{source.hub}{part}:{source.train_split if split == 'train' else source.split}"


def _open_hub(source: DataSource, split: RecordSplit, labels: Collection[str]) -> RecordSet:
    """A set of the hub, or of its cache on this machine; the library keeps it on the disk."""
    import datasets  # type: ignore[import-untyped]

    chosen = source.train_split if split == "train" else source.split
    rows = datasets.load_dataset(source.hub, source.config, split=chosen)
    classes = {name: kind.names for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    name = _hub_name(source, split)

    def stream(limit: int | None, on_bad: Callable[[GmaskError], None] | None) -> Iterator[Record]:
        for number, row in enumerate(itertools.islice(rows, limit), 1):
            yield Record(name_classes(row, classes, labels), Path(name), number)

    return RecordSet(name, stream)


def name_classes(row: Mapping[str, Any], classes: Mapping[str, list[str]], labels: Collection[str]) -> dict[str, Any]:
    """A row of the hub with the names of its classes, where a task's labels are such names; -1 is no class."""
    values = dict(row)
    for column, names in classes.items():
        index = values.get(column)
        if isinstance(index, int) and 0 <= index < len(names):
            spelled = [name for name in (names[index], names[index].lower()) if name in labels]
            values[column] = spelled[0] if spelled else index
    return values
