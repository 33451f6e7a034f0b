"""Which records does a data file hold, whatever its format?"""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmask.errors import GmaskError, one_line
from gmask.tasks.corpus import decode, find_files, parse_json, read_lines


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a data file: a value for each column."""

    values: dict[str, Any]
    path: Path
    line: int  # where it begins, from 1; in a .parquet file, the row

    @property
    def place(self) -> str:
        return f"{self.path}, line {self.line}"


def read_records(
    pattern: str | Path, *, limit: int | None = None, on_bad: Callable[[GmaskError], None] | None = None
) -> list[Record]:
    """Reads the records of the files that a path or a glob names, in the order of the files' names.

    - .jsonl, .jsonl.zst: one object a line.
    - .json: an array of objects, an object with such an array under "data", or one object a line, as AdvertiseGen and
      FewCLUE are published.
    - .csv, .tsv: the first line names the columns. Quotes have no meaning in a .tsv file, as in GLUE.
    - .parquet: needs pyarrow, which ``gmask[train]`` brings.
    - .source: one text a line, in the column "source"; the lines of the .target file beside it are the column "target".

    Args:
        limit: read no more than so many records.
        on_bad: told of each line that is no record, and it is left out; without it the first one raises.

    Raises:
        GmaskError: no such file, an unknown format, a line that is no record (with its number), a file that cannot be
            read on, or no record at all.
    """
    if limit is not None and limit < 1:
        raise GmaskError(f"the limit of records must be at least 1, not {limit}")
    files = find_files(str(pattern))
    files = [path for path in files if path.suffix != ".target" or path.with_suffix(".source") not in files]
    records = list(itertools.islice((record for path in files for record in _read_file(path, on_bad)), limit))
    if not records:
        raise GmaskError(f"{pattern}: there is no record in it")
    return records


def _read_file(path: Path, on_bad: Callable[[GmaskError], None] | None) -> Iterator[Record]:
    ending = next((ending for ending in READERS if path.name.endswith(ending)), None)
    if ending is None:
        raise GmaskError(f"{path}: only {', '.join(READERS)} files are read (a .target file by its .source file)")
    for line, values in READERS[ending](path):
        if isinstance(values, dict):
            yield Record(values, path, line)
            continue
        error = values if isinstance(values, GmaskError) else GmaskError(f"{path}, line {line}: not an object")
        if on_bad is None:
            raise error
        on_bad(error)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line, path, number)
        except GmaskError as error:
            yield number, error


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text)
    except OSError as error:
        raise GmaskError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise GmaskError(f"{path}: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise GmaskError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
        yield from _read_jsonl(path)
        return
    if isinstance(tree, dict) and not isinstance(tree.get("data"), list):
        yield 1, tree
        return
    line, seen = 1, 0
    for place, value in _walk_array(text, _find_array(text)):
        line, seen = line + text.count("\n", seen, place), place
        yield line, value


def _find_array(text: str) -> int:
    """Where the array of valid JSON opens: the text itself, or the value of "data" in it."""
    place = _skip_space(text, 0)
    if text[place] == "[":
        return place
    decoder = json.JSONDecoder()
    key = None
    while key != "data":
        key, place = decoder.raw_decode(text, _skip_space(text, place + 1))  # behind "{" or ","
        place = _skip_space(text, _skip_space(text, place) + 1)  # behind ":"
        if key != "data":
            _, place = decoder.raw_decode(text, place)
            place = _skip_space(text, place)
    return place


def _walk_array(text: str, place: int) -> Iterator[tuple[int, Any]]:
    """The values of the array that opens at a place of valid JSON, each with the place where it begins."""
    decoder = json.JSONDecoder()
    place = _skip_space(text, place + 1)
    while text[place] != "]":
        value, end = decoder.raw_decode(text, place)
        yield place, value
        place = _skip_space(text, end)
        if text[place] == ",":
            place = _skip_space(text, place + 1)


def _skip_space(text: str, place: int) -> int:
    while text[place].isspace():
        place += 1
    return place


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, str] | GmaskError]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".tsv":
                rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                rows = csv.reader(file, strict=True)
            header = next(rows, [])
            _check_delimiter(path, header)
            if len(set(header)) != len(header):
                raise GmaskError(f"{path}, line 1: two columns have the same name ({', '.join(header)})")
            line = rows.line_num + 1
            for row in rows:
                if row and len(row) != len(header):
                    columns = f"{len(header)} columns {', '.join(header)}"
                    yield line, GmaskError(f"{path}, line {line}: {len(row)} values for the {columns}")
                elif row:
                    yield line, dict(zip(header, row, strict=True))
                line = rows.line_num + 1
    except OSError as error:
        raise GmaskError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise GmaskError(f"{path}: not UTF-8 text; save the table as UTF-8") from error
    except csv.Error as error:
        raise GmaskError(f"{path}, line {rows.line_num}: not a table ({error})") from error


def _check_delimiter(path: Path, header: list[str]) -> None:
    """Raises `GmaskError` for a single column whose name holds what other tables are separated by."""
    marks = ";|," if path.suffix == ".tsv" else ";|\t"
    mark = next((mark for mark in marks if len(header) == 1 and mark in header[0]), None)
    if mark is not None:
        raise GmaskError(
            f"{path}, line 1: the table seems to be separated by {mark!r}: separate its columns by commas, or by tabs "
            "in a .tsv file"
        )


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise GmaskError(f"{path}: reading it needs pyarrow; install gmask[train]") from error
    try:
        with parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            yield from enumerate(rows, 1)
    except (OSError, pyarrow.ArrowException) as error:
        raise GmaskError(f"{path}: cannot be read as parquet ({one_line(error)})") from error


def _read_source(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    target = path.with_suffix(".target")
    if not target.is_file():
        yield from ((number, {"source": text}) for number, text in _read_texts(path))
        return
    for source_line, target_line in itertools.zip_longest(_read_texts(path), _read_texts(target)):
        if source_line is None or target_line is None:
            longer, (number, _) = (path, source_line) if source_line else (target, target_line)
            raise GmaskError(f"{longer} has a line {number}, {path.stem} has none in the file that belongs to it")
        yield source_line[0], {"source": source_line[1], "target": target_line[1]}


def _read_texts(path: Path) -> Iterator[tuple[int, str]]:
    return ((number, decode(line, path, number).strip()) for number, line in read_lines(path))


READERS: Mapping[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".source": _read_source,
}
"""By the end of the file's name: the rows with the lines where they begin; a row may be the error that it is."""
