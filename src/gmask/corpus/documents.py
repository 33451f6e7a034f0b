"""The documents of a corpus: files by glob or URL, divided into blocks, and read as a stream of texts."""

import io
import itertools
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gmask.errors import GmaskError, one_line
from gmask.files import at_line, check_text
from gmask.recipes.preparation import PreparationDataSettings
from gmask.tasks.records import TEXT_FILES, Document, open_parquet, read_documents

PARQUET_FILES = (".parquet",)
WARC_FILES = (".warc", ".warc.gz", ".wet", ".wet.gz")
"""Their records of the kind ``conversion``, which have the text of a page, are documents; Common Crawl publishes them
as .warc.wet.gz."""

CORPUS_FILES = (*TEXT_FILES, *PARQUET_FILES, *WARC_FILES)
OnBad = Callable[[GmaskError], None]


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file, on a disk or elsewhere, as it was when it was found."""

    name: str  # a path, or a URL of a file system that fsspec knows
    size: int  # bytes
    changed: str  # its time of change or its entity tag; "" where the file system has neither


@dataclass(frozen=True, slots=True)
class FileRange:
    """A part of a file: bytes of JSON lines, row groups of a .parquet file; else the whole file, from 0 to -1.

    A line belongs to the piece in which its first byte is.
    """

    name: str
    start: int = 0
    end: int = -1

    @property
    def label(self) -> str:
        """The file, and where the piece begins, for errors: lines are counted from there."""
        if self.start == 0:
            return self.name
        return f"from {'row group' if self.name.endswith(PARQUET_FILES) else 'byte'} {self.start} of {self.name}"


@dataclass(frozen=True, slots=True)
class Block:
    """A unit of work: pieces of about as many bytes as the recipe says. Its tokens become one shard."""

    number: int
    source: str
    split: str
    size: int  # bytes, as stored
    pieces: tuple[FileRange, ...]


def block_name(number: int) -> str:
    """The name of a block's files, and of its shard."""
    return f"{number:06d}"


def find_corpus_files(pattern: str) -> list[CorpusFile]:
    """The files that a path, a glob or a URL names, in the order of their names.

    Raises:
        GmaskError: there are none, one has no known format, or the file system cannot be asked.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        found = system.glob(path, detail=True) if set(path) & set("*?[") else {path: system.info(path)}
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, FileNotFoundError):
            found = {}
        else:
            raise GmaskError(f"{pattern}: cannot be read ({one_line(error)})") from error
    files = []
    for name, info in sorted(found.items()):
        if info["type"] != "file":
            continue
        name = system.unstrip_protocol(name) if "://" in pattern else name
        if not name.endswith(CORPUS_FILES):
            raise GmaskError(f"{name}: only {', '.join(CORPUS_FILES)} files are read")
        changed = next((str(info[key]) for key in ("mtime", "ETag", "etag", "LastModified") if info.get(key)), "")
        files.append(CorpusFile(name, int(info["size"] or 0), changed))
    if not files:
        raise GmaskError(f"no text file at {pattern}: name a file or a glob such as folder/*.jsonl.zst")
    return files


def find_blocks(data: PreparationDataSettings) -> tuple[list[CorpusFile], list[Block]]:
    """The files of all sources, and the blocks that they are divided into; validation texts come first."""
    files, blocks = list[CorpusFile](), list[Block]()
    for split in ("validation", "train"):
        for source in data.resolved_sources:
            pattern = source.validation if split == "validation" else source.train
            if pattern is None:
                continue
            found = find_corpus_files(pattern)
            files += found
            for size, pieces in _group(found, data.block_bytes):
                blocks.append(Block(len(blocks), source.name, split, size, pieces))
    return files, blocks


def _group(files: Sequence[CorpusFile], block_bytes: int) -> Iterator[tuple[int, tuple[FileRange, ...]]]:
    """Small files together, and large ones in pieces where their format can be read from the middle."""
    pieces, size = list[FileRange](), 0
    for file in files:
        for piece, length in _cut_file(file, block_bytes):
            if pieces and size + length > block_bytes:
                yield size, tuple(pieces)
                pieces, size = [], 0
            pieces.append(piece)
            size += length
    yield size, tuple(pieces)


def _cut_file(file: CorpusFile, block_bytes: int) -> Iterator[tuple[FileRange, int]]:
    if file.name.endswith(PARQUET_FILES) and file.size > block_bytes:
        with _opened_table(file.name) as table:
            sizes = [table.metadata.row_group(index).total_byte_size for index in range(table.num_row_groups)]
        scale = file.size / max(sum(sizes), 1)  # those are sizes before compression
        start = 0
        while start < len(sizes):
            end, size = start + 1, sizes[start] * scale
            while end < len(sizes) and size + sizes[end] * scale <= block_bytes:
                size, end = size + sizes[end] * scale, end + 1
            yield FileRange(file.name, start, end), int(size)
            start = end
    elif file.name.endswith(".jsonl"):
        count = max(1, -(-file.size // block_bytes))
        bounds = [file.size * index // count for index in range(count + 1)]
        yield from ((FileRange(file.name, *pair), pair[1] - pair[0]) for pair in itertools.pairwise(bounds))
    else:
        yield FileRange(file.name), file.size


def read_block(block: Block, field: str, *, on_bad_line: OnBad | None, on_bad_file: OnBad | None) -> Iterator[Document]:
    """The documents of a block, in NFC; those without any text are left out.

    Args:
        on_bad_line: called with the error of each line or row that has no text; without it the first one raises.
        on_bad_file: called with the error of a file that cannot be read on; its rest is left out. Without it it raises.

    Raises:
        GmaskError: as above.
    """
    for piece in block.pieces:
        bad_lines = list[GmaskError]()  # errors of lines are told from those of the file
        documents = _read_piece(piece, field, bad_lines.append)
        while True:
            try:
                document = next(documents, None)
            except GmaskError as error:
                if on_bad_file is None:
                    raise
                on_bad_file(error)
                document = None
            for bad_line in bad_lines:
                if on_bad_line is None:
                    raise bad_line
                on_bad_line(bad_line)
            bad_lines.clear()
            if document is None:
                break
            yield document


def _read_piece(piece: FileRange, field: str, on_bad_line: OnBad) -> Iterator[Document]:
    if piece.name.endswith(PARQUET_FILES):
        yield from _read_rows(piece, field, on_bad_line)
        return
    with _opened(piece.name) as file:
        if piece.name.endswith(WARC_FILES):
            yield from _read_pages(piece.name, file)
            return
        stream = _Lines(file, piece.start, piece.end) if piece.end != -1 else file
        yield from read_documents(piece.label, field=field, on_bad_line=on_bad_line, stream=stream)


@contextmanager
def _opened(name: str) -> Iterator[io.IOBase]:
    """A file's bytes, by fsspec. Raises `GmaskError` if it cannot be opened."""
    import fsspec

    try:
        file = fsspec.open(name, "rb").open()
    except (OSError, ValueError, ImportError) as error:
        raise GmaskError(f"{name}: cannot be read ({one_line(error)})") from error
    with file:
        yield file


class _Lines(io.RawIOBase):
    """The bytes of the lines that begin between two offsets of a file."""

    def __init__(self, file: Any, start: int, end: int) -> None:
        self.file = file
        self.left = self._line_start(end) - self._line_start(start)
        self.file.seek(self._line_start(start))

    def _line_start(self, offset: int) -> int:
        """The first line start at or after an offset."""
        if offset == 0:
            return 0
        self.file.seek(offset - 1)
        while (data := self.file.read(1 << 16)) and b"\n" not in data:
            pass
        return int(self.file.tell() - len(data) + data.find(b"\n") + 1 if data else self.file.tell())

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


@contextmanager
def _opened_table(name: str) -> Iterator[Any]:
    with _opened(name) as stream, open_parquet(name, stream) as table:
        yield table


def _read_rows(piece: FileRange, field: str, on_bad_line: OnBad) -> Iterator[Document]:
    with _opened_table(piece.name) as table:
        if field not in table.schema_arrow.names:
            raise GmaskError(f"{piece.name}: has no column {field!r}, but {', '.join(table.schema_arrow.names)}")
        groups = range(piece.start, table.num_row_groups if piece.end == -1 else piece.end)
        batches = table.iter_batches(batch_size=1024, row_groups=list(groups), columns=[field])
        texts = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for row, text in enumerate(texts, 1):
            try:
                if not isinstance(text, str):
                    raise GmaskError(f'no text under "{field}"')
                if check_text(text).strip():
                    yield Document(unicodedata.normalize("NFC", text), piece.label, row)
            except GmaskError as error:
                on_bad_line(at_line(piece.label, row, error))


def _read_pages(name: str, file: io.IOBase) -> Iterator[Document]:
    """The texts of a WET file; the line is the record's number."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    number = 0
    try:
        for number, record in enumerate(ArchiveIterator(file), 1):
            if record.rec_type == "conversion":
                text = record.content_stream().read().decode("utf-8", "replace")
                if text.strip():
                    yield Document(unicodedata.normalize("NFC", text), name, number)
    except (ArchiveLoadFailed, OSError, EOFError) as error:
        raise GmaskError(f"{name}, after record {number}: cannot be read as WARC ({one_line(error)})") from error


def describe_files(files: Sequence[CorpusFile]) -> list[Mapping[str, Any]]:
    """The files for a manifest."""
    return [{"name": file.name, "bytes": file.size, "changed": file.changed} for file in files]
