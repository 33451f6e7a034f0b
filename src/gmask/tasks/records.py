"""Records, texts and samples: data files in, predictions out."""

import csv
import glob
import io
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gmask.config import Positive, check_fields
from gmask.errors import GmaskError, one_line
from gmask.files import (
    at_line,
    check_text,
    check_values,
    parse_json,
    read_json_lines,
    read_lines,
    read_text,
    write_json_lines,
)

TaskKind = Literal["cloze", "multiple-choice", "classification", "seq2seq", "infill", "language-model", "chat"]
CHOICES: tuple[TaskKind, ...] = ("cloze", "multiple-choice")
"""The kinds whose answers are candidates."""

LABELLED: tuple[TaskKind, ...] = (*CHOICES, "classification")
"""The kinds whose predictions have a label; those of the others have texts."""

Truncation = Literal["left", "right"]
"""Where a text that is too long loses tokens: before its first blank and then at its end, or at its end alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question and what is known of its answer.

    By kind:

    - cloze, multiple-choice: ``text`` has one blank, ``answers`` are the candidates, ``label`` the index of the
      right one;
    - classification: ``text`` has no blank, ``label`` is the class;
    - seq2seq: ``text`` has one blank, ``answers`` is ``(target,)``;
    - infill: ``text`` has n blanks, ``answers`` their n texts;
    - language-model: ``answers`` is ``(document,)``;
    - chat: ``history`` holds the rounds before, ``text`` the prompt, ``answers`` is ``(reply,)``.

    A backslash before a blank in ``text`` makes it plain text, as in `gmask.infill`; a chat has no such escapes.
    What is not known is ``()`` or None. ``group`` names the samples that a metric takes together (a MultiRC question, a
    ReCoRD query). ``references`` are all the texts that a metric counts as right, where these are not
    ``answers[label]``. ``path`` and ``line`` say where the sample was read.
    """

    text: str = ""
    answers: tuple[str, ...] = ()
    label: int | None = None
    history: tuple[tuple[str, str], ...] = ()
    group: str | None = None
    references: tuple[str, ...] = ()
    path: Path | None = None
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model answers: the most probable candidate or class, the log-probability of each in nats, and the texts
    that it wrote, one a blank."""

    label: int | None = None
    scores: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()


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
    records = list(itertools.islice((record for path in files for record in _read_file(path, on_bad or _raise)), limit))
    if not records:
        raise GmaskError(f"{pattern}: there is no record in it")
    return records


def _read_file(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[Record]:
    ending = next((ending for ending in READERS if path.name.endswith(ending)), None)
    if ending is None:
        raise GmaskError(f"{path}: only {', '.join(READERS)} files are read (a .target file by its .source file)")
    for line, values in READERS[ending](path, on_bad):
        if isinstance(values, dict):
            yield Record(values, path, line)
        else:
            on_bad(at_line(path, line, "not an object"))


def _raise(error: GmaskError) -> None:
    raise error


def _read_json(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, Any]]:
    text = read_text(path)
    try:
        tree = parse_json(text, path, checked=False)
    except GmaskError as error:
        if isinstance(error.__cause__, json.JSONDecodeError) and error.__cause__.msg == "Extra data":
            yield from read_json_lines(path, on_bad)
            return
        raise
    is_list = isinstance(tree.get("data") if isinstance(tree, dict) else tree, list)
    line, seen = 1, 0
    for start, value in _walk_array(text, _find_array(text)) if is_list else [(0, tree)]:
        line, seen = line + text.count("\n", seen, start), start
        try:
            check_values(value)
        except GmaskError as error:
            on_bad(at_line(path, line, error))
        else:
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


def _read_table(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, dict[str, str]]]:
    text = read_text(path, keep_ends=True)
    csv.field_size_limit(LONGEST_CELL)
    if path.suffix == ".tsv":
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(rows, [])
        _check_delimiter(path, header)
        if len(set(header)) != len(header):
            raise at_line(path, 1, f"two columns have the same name ({', '.join(header)})")
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                columns = f"{len(header)} columns {', '.join(header)}"
                on_bad(at_line(path, line, f"{len(row)} values for the {columns}"))
            elif row:
                yield line, dict(zip(header, row, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise at_line(path, rows.line_num, f"not a table ({error})") from error


def _check_delimiter(path: Path, header: list[str]) -> None:
    """Raises `GmaskError` for a single column whose name holds what other tables are separated by."""
    marks = ";|," if path.suffix == ".tsv" else ";|\t"
    mark = next((mark for mark in marks if len(header) == 1 and mark in header[0]), None)
    if mark is not None:
        raise GmaskError(
            f"{path}, line 1: the table seems to be separated by {mark!r}: separate its columns by commas, or by tabs "
            "in a .tsv file"
        )


def _read_parquet(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _read_source(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, dict[str, str]]]:
    target = path.with_suffix(".target")
    if not target.is_file():
        yield from ((number, {"source": text}) for number, text in _read_stripped(path))
        return
    for source_line, target_line in itertools.zip_longest(_read_stripped(path), _read_stripped(target)):
        if source_line is None or target_line is None:
            longer, (number, _) = (path, source_line) if source_line else (target, target_line)
            raise GmaskError(f"{longer} has a line {number}, {path.stem} has none in the file that belongs to it")
        yield source_line[0], {"source": source_line[1], "target": target_line[1]}


def _read_stripped(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, none of which may be left out."""
    for number, line in read_lines(path):
        if isinstance(line, GmaskError):
            raise at_line(path, number, line)
        yield number, line.strip()


READERS: Mapping[str, Callable[[Path, Callable[[GmaskError], None]], Iterator[tuple[int, Any]]]] = {
    ".jsonl": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".source": _read_source,
}
"""By the end of the file's name: the rows with the lines where they begin; bad ones are told."""

LONGEST_CELL = 2**31 - 1  # characters; Python's own limit is less than a text of 132 kB

TXT_DOCUMENT_CHARS = 8_192
"""A document of a .txt file ends at the first blank line after this many characters ..."""

TXT_DOCUMENT_MAX_CHARS = 65_536
"""... and, where no blank line comes, at the first line end after this many."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, in NFC, with the place it came from."""

    text: str
    path: Path
    line: int  # where it begins, from 1


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of a recipe's `sources`: a kind of text and how much of it to use.

    train, validation: a path or a glob of .jsonl, .jsonl.zst or .txt files.
    weight: share of the training tokens, relative to the other sources' weights.
    epochs: instead of a weight, the number of passes relative to the other such sources
        (weight = epochs x tokens of the source). Neither given: epochs = 1.
    kind: of text, such as "literature": what is measured on held-out sentences is told for each kind.
    """

    name: str
    train: str
    validation: str | None = None
    weight: Positive | None = None
    epochs: Positive | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and self.epochs is not None:
            raise GmaskError(f"source {self.name}: give weight or epochs, not both")
        check_fields(self, f"source {self.name}: ")

    def share_of(self, size: int) -> float:
        """The source's weight when it holds `size` tokens (or bytes)."""
        if self.weight is not None:
            return self.weight
        return size * (1.0 if self.epochs is None else self.epochs)


def find_files(pattern: str) -> list[Path]:
    """The files that a path or a glob names, sorted. Raises `GmaskError` when there are none."""
    files = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not files:
        raise GmaskError(f"no text file at {pattern}: name a file or a glob such as folder/*.jsonl.zst")
    return files


def read_documents(
    path: Path | str, *, field: str = "text", on_bad_line: Callable[[GmaskError], None] | None = None
) -> Iterator[Document]:
    """Read the documents of one file: .jsonl and .jsonl.zst hold one object a line, .txt is plain text.

    A .txt file is one document up to `TXT_DOCUMENT_CHARS` characters; a longer one is cut at blank lines into
    documents just above that size. Documents without any text are left out.

    on_bad_line: told of each line that is no UTF-8, no JSON object or has no string `field`, and the line is
        skipped; without it the first such line raises `GmaskError` with the file and the line number.
    """
    path = Path(path)
    on_bad = on_bad_line or _raise
    if not path.name.endswith((".jsonl", ".jsonl.zst", ".txt")):
        raise GmaskError(f"{path}: only .jsonl, .jsonl.zst and .txt files are read")
    texts = _read_txt(path, on_bad) if path.suffix == ".txt" else _read_text_lines(path, field, on_bad)
    for line, text in texts:
        if text.strip():
            yield Document(unicodedata.normalize("NFC", text), path, line)


def read_texts(files: Sequence[Path], *, on_bad_line: Callable[[GmaskError], None] | None = None) -> Iterator[str]:
    """The texts of several files, one after the other; bad lines as in `read_documents`."""
    for path in files:
        for document in read_documents(path, on_bad_line=on_bad_line):
            yield document.text


def _read_text_lines(path: Path, field: str, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, str]]:
    """The texts of JSON lines; what else stands beside them is not looked at."""
    for number, line in read_lines(path):
        try:
            if isinstance(line, GmaskError):
                raise line
            if not line.strip():
                continue
            record = parse_json(line.rstrip("\r\n"), checked=False)
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise GmaskError(f'no text under "{field}"')
            yield number, check_text(text)
        except GmaskError as error:
            on_bad(at_line(path, number, error))


def _read_txt(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, str]]:
    begin, size, lines = 1, 0, list[str]()
    for number, line in read_lines(path):
        if isinstance(line, GmaskError):
            on_bad(at_line(path, number, line))
            continue
        lines.append(line)
        size += len(line)
        if size >= (TXT_DOCUMENT_MAX_CHARS if line.strip() else TXT_DOCUMENT_CHARS):
            yield begin, "".join(lines).strip("\r\n")
            begin, size, lines = number + 1, 0, []
    yield begin, "".join(lines).strip("\r\n")


def write_predictions(path: Path, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
    """Writes one JSON object a line: the sample, and what the model made of it. What is empty is left out.

    Raises:
        GmaskError: the file cannot be written.
    """
    lines = (describe(*answered) for answered in zip(predictions, samples, strict=True))
    write_json_lines(path, lines)


def describe(prediction: Prediction, sample: Sample) -> dict[str, Any]:
    """A sample and its prediction as a line of a predictions file: with the scores in nats, rounded to 4 places."""
    values = {
        "history": sample.history,
        "text": sample.text,
        "answers": sample.answers,
        "references": sample.references,
        "label": sample.label,
        "group": sample.group,
        "predicted_label": prediction.label,
        "predicted_texts": prediction.texts,
        "scores": [round(score, 4) for score in prediction.scores],
    }
    return {name: value for name, value in values.items() if value is not None and value not in ("", (), [])}
