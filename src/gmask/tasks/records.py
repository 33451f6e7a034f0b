"""Records, texts and samples: data files in, predictions out."""

import csv
import glob
import hashlib
import io
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

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
    refuse_placeholder,
    write_json_lines,
)

TaskKind = Literal[
    "cloze", "multiple-choice", "classification", "seq2seq", "infill", "likelihood", "language-model", "chat"
]
CHOICES: tuple[TaskKind, ...] = ("cloze", "multiple-choice")
"""The kinds of task whose answers are candidates."""

LABELLED: tuple[TaskKind, ...] = (*CHOICES, "classification")
"""The kinds of task whose predictions have a label."""

MEASURED: tuple[TaskKind, ...] = ("likelihood", "language-model")
"""The kinds of task whose given answers are scored, token by token. Predictions of the remaining kinds have texts."""

Truncation = Literal["left", "right"]
"""Where a long text is cut: ``left``, before its first blank and then at its end; ``right``, at its end only."""

Direction = Literal["both", "left"]
"""How a text before a scored answer is read: as a context, in both directions; or written too, from left to right."""

BlankToken = Literal["[MASK]", "[sMASK]", "[gMASK]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodSettings:
    """How given texts are scored.

    Args:
        direction: ``"left"``: the context is the first token and the blank; the rest is written before the answer.
        window, stride: of the kind language-model, in tokens: as of `gmask.perplexity`.
        blank: of the kind language-model: the one into which a GLM writes the text.
    """

    direction: Direction = "both"
    window: int | None = None
    stride: int | None = None
    blank: BlankToken = "[MASK]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A question to a model, and what is known of its answer.

    By kind:

    - cloze, multiple-choice: ``text`` has one blank, ``answers`` are the candidates, ``label`` the index of the
      right one;
    - classification: ``text`` has no blank, ``label`` is the class;
    - seq2seq: ``text`` has one blank, ``answers`` is ``(target,)``;
    - infill: ``text`` has n blanks, ``answers`` their n texts;
    - likelihood: ``text`` has one blank, ``answers`` is ``(target,)``, which is scored, not written;
    - language-model: ``answers`` is ``(document,)``, ``words`` the number of its words;
    - chat: ``history`` holds the rounds before, ``text`` the prompt, ``answers`` is ``(reply,)``.

    A backslash before a blank in ``text`` makes it plain text, as in `gmask.infill`; a chat has no such escapes.
    What is not known is ``()`` or None. A metric takes the samples of one ``group`` together (a MultiRC question, a
    ReCoRD query). ``references`` are the texts that count as right, if these are others than ``answers[label]``.
    ``path`` and ``line`` say where the sample was read.
    """

    text: str = ""
    answers: tuple[str, ...] = ()
    label: int | None = None
    history: tuple[tuple[str, str], ...] = ()
    group: str | None = None
    references: tuple[str, ...] = ()
    words: int | None = None
    path: Path | None = None
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A model's answer: the index of the most probable candidate or class, the log-probability of each in nats, and the
    texts that it wrote, one a blank. Of a given answer: the log-probability of each token, and whether it is the most
    probable one."""

    label: int | None = None
    scores: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()
    is_greedy: tuple[bool, ...] = ()


Values: TypeAlias = Mapping[str, Any]
"""The values of a record by the names of its columns."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a data file: a value for each column."""

    values: dict[str, Any]
    path: Path
    line: int  # where it begins, from 1; in a .parquet file, the row

    @property
    def location(self) -> str:
        return f"{self.path}, line {self.line}"


def read_records(
    pattern: str | Path, *, limit: int | None = None, on_bad: Callable[[GmaskError], None] | None = None
) -> list[Record]:
    """All records that `stream_records` gives.

    Raises:
        GmaskError: as `stream_records`, or no record at all.
    """
    records = list(stream_records(pattern, limit=limit, on_bad=on_bad))
    if not records:
        raise GmaskError(f"{pattern}: there is no record in it")
    return records


def stream_records(
    pattern: str | Path, *, limit: int | None = None, on_bad: Callable[[GmaskError], None] | None = None
) -> Iterator[Record]:
    """The records of the files that a path or a glob names, in the order of the files' names, one after the other.

    - .jsonl, .jsonl.zst: one object a line.
    - .json: an array of objects, an object with such an array under "data", or one object a line, as AdvertiseGen and
      FewCLUE are published.
    - .csv, .tsv: the first line names the columns. Quotes have no meaning in a .tsv file, as in GLUE.
    - .parquet: needs pyarrow, which ``gmask[train]`` brings.
    - .source: one text a line, in the column "source"; the lines of the .target file beside it are the column "target".
    - .blank: one text a line, with ``<blank>`` where words are missing, in the column "source"; the lines of the .txt
      file of the same name, here or in the folder above, are the column "target".
    - .txt, .tokens: the whole file is the column "text" of one record.

    Args:
        limit: read no more than so many records.
        on_bad: called with the error of each line that is no record, which is left out; without it the first one
            raises.

    Raises:
        GmaskError: no such file; and while they are read, an unknown format, a line that is no record (with its
            number), or a file that cannot be read on.
    """
    if limit is not None and limit < 1:
        raise GmaskError(f"the limit of records must be at least 1, not {limit}")
    files = find_files(str(pattern))
    files = [path for path in files if path.suffix != ".target" or path.with_suffix(".source") not in files]
    return itertools.islice((record for path in files for record in _read_file(path, on_bad or _raise)), limit)


def hash_file(path: Path) -> str:
    """SHA-256 of a file; of a .source file and its .target together."""
    digest = hashlib.sha256()
    target = path.with_suffix(".target")
    for part in (path, target) if path.suffix == ".source" and target.is_file() else (path,):
        with part.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def _read_file(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[Record]:
    ending = next((ending for ending in FILE_READERS if path.name.endswith(ending)), None)
    if ending is None:
        raise GmaskError(f"{path}: only {', '.join(FILE_READERS)} files are read (a .target file by its .source file)")
    for line, values in FILE_READERS[ending](path, on_bad):
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
            yield line, {"items": value} if isinstance(value, list) else value  # C3's records are arrays


def _find_array(text: str) -> int:
    """The index of the bracket that opens the array of valid JSON: the text itself, or the value of "data" in it."""
    index = _skip_space(text, 0)
    if text[index] == "[":
        return index
    decoder = json.JSONDecoder()
    key = None
    while key != "data":
        key, index = decoder.raw_decode(text, _skip_space(text, index + 1))  # behind "{" or ","
        index = _skip_space(text, _skip_space(text, index) + 1)  # behind ":"
        if key != "data":
            _, index = decoder.raw_decode(text, index)
            index = _skip_space(text, index)
    return index


def _walk_array(text: str, index: int) -> Iterator[tuple[int, Any]]:
    """The values of the array that opens at an index of valid JSON, each with the index where it begins."""
    decoder = json.JSONDecoder()
    index = _skip_space(text, index + 1)
    while text[index] != "]":
        value, end = decoder.raw_decode(text, index)
        yield index, value
        index = _skip_space(text, end)
        if text[index] == ",":
            index = _skip_space(text, index + 1)


def _skip_space(text: str, index: int) -> int:
    while text[index].isspace():
        index += 1
    return index


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
    """Raises `GmaskError` if the header is one column, whose name has the delimiter of another kind of table."""
    marks = ";|," if path.suffix == ".tsv" else ";|\t"
    mark = next((mark for mark in marks if len(header) == 1 and mark in header[0]), None)
    if mark is not None:
        raise GmaskError(
            f"{path}, line 1: the table seems to be separated by {mark!r}: separate its columns by commas, or by tabs "
            "in a .tsv file"
        )


@contextmanager
def open_parquet(path: Path | str, stream: io.IOBase | None = None) -> Iterator[Any]:
    """A .parquet file, as pyarrow's ``ParquetFile``; of a file elsewhere, ``stream`` gives the bytes.

    Raises:
        GmaskError: pyarrow is missing, or the file, or a part of it that is read, is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise GmaskError(f"{path}: reading it needs pyarrow; install gmask[train]") from error
    if stream is None:
        refuse_placeholder(Path(path))
    try:
        with parquet.ParquetFile(path if stream is None else stream) as file:
            yield file
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise GmaskError(f"{path}: cannot be read as parquet ({one_line(error)})") from error


def _read_parquet(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_parquet(path) as file:
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
        for row, values in enumerate(rows, 1):
            try:
                values = _without_nan(values)
                check_values(values)
            except GmaskError as error:
                on_bad(at_line(path, row, error))
            else:
                yield row, values


def _without_nan(value: Any) -> Any:
    """The value with None in place of NaN, which pandas writes for a cell that is missing."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return list(map(_without_nan, value))
    return None if value != value else value


def _read_source(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, dict[str, str]]]:
    target = path.with_suffix(".target")
    if not target.is_file():
        yield from ((number, {"source": text}) for number, text in _read_stripped(path))
        return
    yield from _pair_lines(path, target)


def _read_blanked(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, dict[str, str]]]:
    """Reads ``blank/test.maskratio0.5.blank`` with ``test.txt``, as the texts of BlankLM are published."""
    refuse_placeholder(path)
    name = f"{path.name.partition('.')[0]}.txt"
    whole = next((folder / name for folder in (path.parent, path.parent.parent) if (folder / name).is_file()), None)
    if whole is None:
        raise GmaskError(f"{path}: its whole texts, {name}, are neither beside it nor in the folder above")
    yield from _pair_lines(path, whole)


def _read_whole(path: Path, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, dict[str, str]]]:
    yield 1, {"text": read_text(path)}


def _pair_lines(path: Path, target: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for source_line, target_line in itertools.zip_longest(_read_stripped(path), _read_stripped(target)):
        if source_line is None or target_line is None:
            longer, (number, _) = (path, source_line) if source_line else (target, target_line)
            raise GmaskError(f"{longer} has a line {number}, {path.stem} has none in the file that belongs to it")
        yield source_line[0], {"source": source_line[1], "target": target_line[1]}


def _read_stripped(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, without the space around them. Raises `GmaskError` for a line that cannot be read."""
    for number, line in read_lines(path):
        if isinstance(line, GmaskError):
            raise at_line(path, number, line)
        yield number, line.strip()


FILE_READERS: Mapping[str, Callable[[Path, Callable[[GmaskError], None]], Iterator[tuple[int, Any]]]] = {
    ".jsonl": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".source": _read_source,
    ".blank": _read_blanked,
    ".txt": _read_whole,
    ".tokens": _read_whole,
}
"""The reader of each file format, by the end of the file's name. It gives the line and the values of each record, and
calls ``on_bad`` with the error of each that cannot be read."""

LONGEST_CELL = 2**31 - 1  # characters; Python's own limit is less than a text of 132 kB

TXT_DOCUMENT_CHARS = 8_192
"""A document of a .txt file ends at the first blank line after so many characters."""

TXT_DOCUMENT_MAX_CHARS = 65_536
"""Without a blank line, it ends at the first end of a line after so many."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, in NFC, with its file and line."""

    text: str
    path: Path | str  # a name of another kind for a part of a file, or a file elsewhere
    line: int  # where it begins, from 1


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of a recipe's ``sources``: some texts, and how much of them to use.

    Args:
        train, validation: a path or a glob of `TEXT_FILES`.
        weight: share of the training tokens, relative to the other sources' weights.
        epochs: instead of a weight, the number of passes relative to the other such sources (weight = epochs x tokens
            of the source). Neither given: epochs = 1.
        kind: of text, such as "literature"; measurements on held-out sentences are reported for each kind.
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

    def under(self, root: str) -> "Source":
        """The source with its paths under a folder; a URL and an absolute path stay."""

        def resolve(pattern: str) -> str:
            if "://" in pattern:
                return pattern
            return f"{root.rstrip('/')}/{pattern}" if "://" in root else str(Path(root) / pattern)

        validation = None if self.validation is None else resolve(self.validation)
        return replace(self, train=resolve(self.train), validation=validation)

    def share_of(self, size: int) -> float:
        """The weight of the source, if it has ``size`` tokens (or bytes)."""
        if self.weight is not None:
            return self.weight
        return size * (1.0 if self.epochs is None else self.epochs)


def find_files(pattern: str) -> list[Path]:
    """The files that a path or a glob names, sorted. Raises `GmaskError` when there are none."""
    files = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not files:
        if Path(pattern).exists():
            raise GmaskError(f"{pattern}: is no file; name a file or a glob such as folder/*.jsonl.zst")
        raise GmaskError(f"no text file at {pattern}: name a file or a glob such as folder/*.jsonl.zst")
    return files


TEXT_FILES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".txt", ".txt.zst", ".txt.gz")
"""The files of texts: JSON lines and plain text. A .json.gz file has JSON lines, as C4 is published."""


def read_documents(
    path: Path | str,
    *,
    field: str = "text",
    on_bad_line: Callable[[GmaskError], None] | None = None,
    stream: io.IOBase | None = None,
) -> Iterator[Document]:
    """Reads the documents of one of `TEXT_FILES`: of JSON lines, an object a line; of plain text, its parts.

    A .txt file is one document up to `TXT_DOCUMENT_CHARS` characters; a longer one is cut at blank lines into
    documents just above that size. Documents without any text are left out.

    Args:
        on_bad_line: called with the error of each line that is no UTF-8, no JSON object or has no string ``field``;
            the line is skipped. Without it the first such line raises.
        stream: as of `read_lines`.

    Raises:
        GmaskError: a file of another kind, or a bad line, with its file and number.
    """
    name = str(path)
    on_bad = on_bad_line or _raise
    if not name.endswith(TEXT_FILES):
        raise GmaskError(f"{path}: only {', '.join(TEXT_FILES[:-1])} and {TEXT_FILES[-1]} files are read")
    lines = read_lines(path, stream=stream)
    is_plain = ".txt" in name[-len(".txt.zst") :]
    texts = _cut_txt(path, lines, on_bad) if is_plain else _read_text_lines(path, lines, field, on_bad)
    for line, text in texts:
        if text.strip():
            yield Document(unicodedata.normalize("NFC", text), path, line)


def read_texts(files: Sequence[Path], *, on_bad_line: Callable[[GmaskError], None] | None = None) -> Iterator[str]:
    """The texts of several files, one after the other; bad lines as in `read_documents`."""
    for path in files:
        for document in read_documents(path, on_bad_line=on_bad_line):
            yield document.text


Lines: TypeAlias = Iterator[tuple[int, str | GmaskError]]
"""What `read_lines` gives."""


def _read_text_lines(
    path: Path | str, lines: Lines, field: str, on_bad: Callable[[GmaskError], None]
) -> Iterator[tuple[int, str]]:
    """The texts of JSON lines; the other values of a line are not checked."""
    for number, line in lines:
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


def _cut_txt(path: Path | str, lines: Lines, on_bad: Callable[[GmaskError], None]) -> Iterator[tuple[int, str]]:
    """The parts of a plain text."""
    begin, size, part = 1, 0, list[str]()
    for number, line in lines:
        if isinstance(line, GmaskError):
            on_bad(at_line(path, number, line))
            continue
        part.append(line)
        size += len(line)
        if size >= (TXT_DOCUMENT_MAX_CHARS if line.strip() else TXT_DOCUMENT_CHARS):
            yield begin, "".join(part).strip("\r\n")
            begin, size, part = number + 1, 0, []
    yield begin, "".join(part).strip("\r\n")


def write_predictions(path: Path, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
    """Writes one JSON object a line: a sample and its prediction.

    Raises:
        GmaskError: the file cannot be written.
    """
    lines = (prediction_line(*answered) for answered in zip(predictions, samples, strict=True))
    write_json_lines(path, lines)


def prediction_line(prediction: Prediction, sample: Sample, *, digits: int | None = 4) -> dict[str, Any]:
    """The line of a sample and its prediction, without empty values.

    digits: decimals of the scores, which are in nats; None leaves them as they are.
    """
    values = {
        "history": sample.history,
        "text": sample.text,
        "answers": sample.answers,
        "references": sample.references,
        "label": sample.label,
        "group": sample.group,
        "predicted_label": prediction.label,
        "predicted_texts": prediction.texts,
        "scores": [score if digits is None else round(score, digits) for score in prediction.scores],
        "is_greedy": prediction.is_greedy,
    }
    return {name: value for name, value in values.items() if value is not None and value not in ("", (), [])}
