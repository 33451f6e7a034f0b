"""Where the records of a task are: in a folder of data, or on the hub; and what is said of a set that is not there."""

import contextlib
import functools
import glob
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
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
    config: str | None = None  # its part, or "*": all of them, their names in the column subject
    revision: str | None = None  # its branch, where the default one holds a script: none is run
    lines: bool = False  # its rows are the lines of one text
    split: str = "validation"
    train_split: str | None = "train"  # None: it has no training records
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
    commits: Mapping[str, str] = field(default_factory=dict)  # of a set on the hub

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files by their names; of a set on the hub its commit."""
        return {**self.commits, **{path.name: hash_file(path) for path in self.files if path.suffix != ".target"}}


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
    has_hub = source.hub is not None and (split != "train" or source.train_split is not None)
    if has_hub and root is not None:  # a run on local data asks no network
        reason = f"; on the hub it is {_hub_name(source, split)}, which is read where no folder is named"
    elif has_hub:
        try:
            return _open_hub(source, split, labels)
        except ImportError:
            reason = f"; {_hub_name(source, split)} on the hub needs pip install datasets"
        except ConnectionError:
            reason = f"; {_hub_name(source, split)}: the hub cannot be reached, and its cache has no such set"
        except Exception as error:  # of the library, of those below it, and of the operating system
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            reason = f"; {_hub_name(source, split)} on the hub cannot be read ({one_line(cause)})"
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
    from huggingface_hub import constants

    assert source.hub is not None, "find_records checks it"
    chosen, name = source.train_split if split == "train" else source.split, _hub_name(source, split)
    parts, commits = list[tuple[str | None, Any]](), dict[str, str]()
    with contextlib.nullcontext() if _answers(constants.ENDPOINT) else _from_cache():
        is_whole = source.config != "*"
        configs = [source.config] if is_whole else datasets.get_dataset_config_names(source.hub, source.revision)
        for config in configs:
            builder = datasets.load_dataset_builder(source.hub, config, revision=source.revision)
            builder.download_and_prepare()
            parts.append((None if is_whole else config, builder.as_dataset(split=chosen)))
            commits[source.hub] = str(builder.hash)

    def read_rows() -> Iterator[dict[str, Any]]:
        for subject, rows in parts:
            features = rows.features.items()
            classes = {column: kind.names for column, kind in features if isinstance(kind, datasets.ClassLabel)}
            extra = {} if subject is None else {"subject": subject}
            for row in rows:
                yield {**extra, **name_classes(row, classes, labels)}

    def stream(limit: int | None, on_bad: Callable[[GmaskError], None] | None) -> Iterator[Record]:
        rows = read_rows()
        if source.lines:
            rows = iter([{"text": "".join(row["text"] or BLANK_LINE for row in rows)}])
        for number, row in enumerate(itertools.islice(rows, limit), 1):
            yield Record(row, Path(name), number)

    return RecordSet(name, stream, commits=commits)


BLANK_LINE = " \n"
"""What WikiText's files have where the rows of the hub are empty."""


@functools.lru_cache(maxsize=1)
def _answers(endpoint: str) -> bool:
    """Whether the hub answers at all. It is asked once: the libraries try six times, for each set anew."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=10)
    except Exception:  # of the HTTP library, or because HF_HUB_OFFLINE is set
        return False
    return True


@contextlib.contextmanager
def _from_cache() -> Iterator[None]:
    """The libraries ask no network, as if HF_HUB_OFFLINE had been set before they were loaded."""
    import datasets
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (datasets.config, constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def name_classes(row: Mapping[str, Any], classes: Mapping[str, list[str]], labels: Collection[str]) -> dict[str, Any]:
    """A row of the hub with the names of its classes, where a task's labels are such names; -1 is no class."""
    values = dict(row)
    for column, names in classes.items():
        index = values.get(column)
        if isinstance(index, int) and 0 <= index < len(names):
            spelled = [name for name in (names[index], names[index].lower()) if name in labels]
            values[column] = spelled[0] if spelled else index
    return values
