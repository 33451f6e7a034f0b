"""Which texts does a recipe name, and how are they read?"""

from __future__ import annotations

import glob
import io
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from gmask.errors import GmaskError

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
    weight: float | None = None
    epochs: float | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and self.epochs is not None:
            raise GmaskError(f"source {self.name}: give weight or epochs, not both")
        if (self.weight if self.weight is not None else self.share_of(1)) <= 0:
            raise GmaskError(f"source {self.name}: weight and epochs must be above 0")

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
    if not path.name.endswith((".jsonl", ".jsonl.zst", ".txt")):
        raise GmaskError(f"{path}: only .jsonl, .jsonl.zst and .txt files are read")
    texts = _read_txt(path) if path.suffix == ".txt" else _read_jsonl(path, field)
    for line, text in texts:
        if isinstance(text, GmaskError):
            if on_bad_line is None:
                raise text
            on_bad_line(text)
        elif text.strip():
            yield Document(unicodedata.normalize("NFC", text), path, line)


def read_texts(files: Sequence[Path], *, on_bad_line: Callable[[GmaskError], None] | None = None) -> Iterator[str]:
    """The texts of several files, one after the other; bad lines as in `read_documents`."""
    for path in files:
        for document in read_documents(path, on_bad_line=on_bad_line):
            yield document.text


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[int, str | GmaskError]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = parse_json(line, path, number)
        except GmaskError as error:
            yield number, error
        else:
            text = record.get(field) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield number, text
            else:
                yield number, GmaskError(f'{path}, line {number}: no text under "{field}"')


def _read_txt(path: Path) -> Iterator[tuple[int, str | GmaskError]]:
    begin, size, lines = 1, 0, list[str]()
    for number, line in read_lines(path):
        try:
            lines.append(decode(line, path, number))
        except GmaskError as error:
            yield number, error
            continue
        size += len(lines[-1])
        if size >= (TXT_DOCUMENT_MAX_CHARS if lines[-1].strip() else TXT_DOCUMENT_CHARS):
            yield begin, "".join(lines).strip("\r\n")
            begin, size, lines = number + 1, 0, []
    yield begin, "".join(lines).strip("\r\n")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, counted from 1, without a byte order mark; those of a .zst file are unpacked.

    Raises:
        GmaskError: the file cannot be read, or its compression is damaged.
    """
    number = 0
    try:
        with path.open("rb") as file:
            stream: BinaryIO = file
            if path.suffix == ".zst":
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                stream = io.BufferedReader(reader, 1 << 20)
            for number, line in enumerate(stream, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise GmaskError(f"{path}: cannot be read ({error.strerror})") from error
    except zstandard.ZstdError as error:
        raise GmaskError(f"{path}, after line {number}: the zstd file is damaged ({error})") from error


def decode(line: bytes, path: Path, number: int) -> str:
    """The text of a line. Raises `GmaskError` with the file and the line number."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GmaskError(f"{path}, line {number}: not UTF-8 text") from error


def parse_json(line: bytes, path: Path, number: int) -> Any:
    """The JSON value of a line. Raises `GmaskError` with the file and the line number."""
    try:
        return json.loads(decode(line, path, number))
    except json.JSONDecodeError as error:
        raise GmaskError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
