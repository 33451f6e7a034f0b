"""Files and folders written whole or not at all; texts, JSON and JSON lines read, with errors of one line."""

import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from safetensors import SafetensorError

from gmask.errors import GmaskError, one_line, type_name

LFS_POINTER = b"version https://git-lfs"
UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
READ_BYTES = 1 << 20
MAX_OBJECT_BYTES = 64 << 20  # of a JSON file in a model's folder; the greatest, a tokenizer.json, has 20 MB
MOST_KEYS = 10_000
"""The limit of the keys of a config, of a model, a tokenizer or an adapter."""

COPY_AGAIN = "download or copy it again"
"""What to do about a damaged file of a model folder."""

# torch.save and safetensors wrap the system's message about a disk into messages of their own.
TORCH_WRITER = re.compile("PytorchStreamWriter|inline_container")
SAFETENSORS_REASON = re.compile(r"I/O error: (.*) \(os error \d+\)")


@contextmanager
def written(path: Path | str, *, kept: str = "") -> Iterator[Path]:
    """Gives an empty draft beside ``path``, and renames it to ``path`` when the block ends without an error.

    Before that, the draft's bytes are flushed to the disk, and it gets the permissions of a new file. After an error it
    is removed, and a file at the path stays as it was. Folders above the path are made.

    Args:
        kept: what is not lost if the file cannot be written, for the error: "the last complete checkpoint".

    Raises:
        GmaskError: the file cannot be written.
    """
    path = Path(path)
    draft = _draft_of(path)
    with writing(path, draft, kept=kept):
        if path.exists() and not path.is_file():
            raise GmaskError(f"{path}: is no file, so none is written there; name another one")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.open("xb").close()
            mode = draft.stat().st_mode & 0o777
            yield draft
            _finish_file(draft, mode)
            os.replace(draft, path)
            _sync(path.parent)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def written_folder(folder: Path | str, *, replace: bool = True, kept: str = "") -> Iterator[Path]:
    """Gives an empty draft beside ``folder``, and renames it to ``folder`` when the block ends without an error.

    A folder that was there is removed after that. After an error the draft is removed, and the folder that was there
    stays.

    Args:
        replace: if False, a folder that exists and is not empty is refused before anything is written.
        kept: as of `written`.

    Raises:
        GmaskError: the folder cannot be written.
    """
    folder = Path(folder)
    draft = _draft_of(folder)
    with writing(folder, draft, kept=kept):
        if folder.exists() and not folder.is_dir():
            raise GmaskError(f"{folder}: is a file; name a new folder")
        if not replace and folder.exists() and any(folder.iterdir()):
            raise GmaskError(f"{folder}: is there already; name a new folder, or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.mkdir()
            mode = draft.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
            yield draft
            for path in sorted(draft.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    _finish_file(path, mode)
            _put_folder(draft, folder, replace=replace)
            _sync(folder.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def writing(path: Path, draft: Path, *, kept: str = "") -> Iterator[None]:
    """Turns the errors of writing a draft of ``path`` into one line.

    Raises:
        GmaskError: the draft cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, UnicodeEncodeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not TORCH_WRITER.search(str(error)):
            raise
        ending = f"; {kept} is kept" if kept else ""
        raise GmaskError(f"{path}: cannot be written ({_reason(error, path, draft)}){ending}") from error


def write_text(path: Path | str, text: str | Iterable[str], *, kept: str = "") -> None:
    """Writes a text, or the parts of one, as UTF-8 by `written`."""
    with written(path, kept=kept) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines([text] if isinstance(text, str) else text)


def write_json(
    path: Path | str, values: Any, *, indent: int | None = 1, sort_keys: bool = False, kept: str = ""
) -> None:
    """Writes a JSON file by `written`; characters beyond ASCII are not escaped."""
    write_text(path, json.dumps(values, ensure_ascii=False, indent=indent, sort_keys=sort_keys) + "\n", kept=kept)


def write_json_lines(path: Path | str, values: Iterable[Any], *, kept: str = "") -> None:
    """Writes one JSON value a line by `written`; characters beyond ASCII are not escaped."""
    write_text(path, (json.dumps(value, ensure_ascii=False) + "\n" for value in values), kept=kept)


def remove_drafts(path: Path | str) -> None:
    """Removes the drafts of a file or a folder that killed processes left. No other process may be writing it."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(partial|replaced)")
    for found in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        if pattern.fullmatch(found.name):
            _remove(found)


def read_text(path: Path | str, *, keep_ends: bool = False) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        keep_ends: leave line ends as they are; without it all are ``\\n``.

    Raises:
        GmaskError: it cannot be read, is not UTF-8 (with the line), or is a Git LFS pointer.
    """
    try:
        refuse_device(Path(path))
        data = Path(path).read_bytes()
    except GmaskError:
        raise
    except (OSError, ValueError) as error:  # a ValueError comes from a name that no file can have
        raise GmaskError(f"{path}: cannot be read ({_system_reason(error)})") from error
    text = decode_text(data, path)
    return text if keep_ends else text.replace("\r\n", "\n").replace("\r", "\n")


def decode_text(data: bytes, path: Path | str) -> str:
    """The text of UTF-8 bytes, without a byte order mark. Raises `GmaskError` as `read_text`, naming ``path``."""
    _refuse_start(path, data)
    try:
        return data.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise at_line(path, line, "not UTF-8 text; save the file as UTF-8") from error


def read_json(path: Path | str, *, checked: bool = True, remedy: str = "") -> Any:
    """The value of a JSON file.

    Args:
        checked: refuse what `check_values` does.
        remedy: what to do about a file that is not JSON, for the error.

    Raises:
        GmaskError: as by `read_text` and `parse_json`, with the path.
    """
    return parse_json(read_text(path), path, checked=checked, remedy=remedy)


def read_object(
    path: Path | str, *, required: bool = True, remedy: str = COPY_AGAIN, most_keys: int | None = None
) -> dict[str, Any]:
    """The object in a JSON file that gmask or another program wrote; not checked by `check_values`.

    Args:
        required: if False, a file that is not there gives an empty object.
        remedy: what to do about a file that is missing, empty or damaged, for the error.
        most_keys: an object of more keys is refused. A library that gets them may take minutes.

    Raises:
        GmaskError: no such file, not JSON (with the line), another value than an object, or a Git LFS pointer.
    """
    path = Path(path)
    if not required and not path.is_file():
        return {}
    refuse_placeholder(path, remedy)
    if (size := path.stat().st_size) > MAX_OBJECT_BYTES:
        raise GmaskError(f"{path}: has {size >> 20:,} MB, and no such file is as large; {remedy}")
    values = read_json(path, checked=False, remedy=remedy)
    if not isinstance(values, dict):
        raise GmaskError(f"{path}: expected a JSON object; {remedy}")
    if most_keys is not None and len(values) > most_keys:
        raise GmaskError(f"{path}: has {len(values)} keys, and no such file has as many; {remedy}")
    return values


def read_json_lines(
    path: Path | str, on_bad_line: Callable[[GmaskError], None] | None = None, *, checked: bool = True
) -> Iterator[tuple[int, Any]]:
    """The values of a file with one JSON value a line, and the lines' numbers from 1; empty lines are left out.

    Args:
        on_bad_line: called with the error of each line that is not UTF-8, not JSON, or refused by `check_values`; the
            line is left out. Without it the first bad line raises.
        checked: refuse what `check_values` does.

    Raises:
        GmaskError: a bad line, with file and number, or as by `read_lines`.
    """
    for number, line in read_lines(path):
        try:
            if isinstance(line, GmaskError):
                raise line
            if line.strip():
                yield number, parse_json(line.rstrip("\r\n"), checked=checked)
        except GmaskError as error:
            located = at_line(path, number, error)
            if on_bad_line is None:
                raise located from error
            on_bad_line(located)


def read_lines(
    path: Path | str, *, start: int = 0, max_bytes: int | None = None, stream: io.IOBase | None = None
) -> Iterator[tuple[int, str | GmaskError]]:
    """The lines of a UTF-8 file with their ends, and their numbers from 1; .zst and .gz files are decompressed.

    In place of a line that cannot be read comes its error, which names neither file nor line: `at_line` adds them. A
    byte order mark is dropped.

    Args:
        start: lines at the beginning that are left out.
        max_bytes: a longer line is an error; it is never held in memory.
        stream: the bytes of the file, where it is opened already; the path then only names it, and says by its end how
            it is compressed. It is closed.

    Raises:
        GmaskError: the file cannot be read, its compression is damaged, it is UTF-16 or a Git LFS pointer.
    """
    number = 0
    damage: tuple[type[Exception], ...] = ()
    try:
        if stream is None:
            refuse_device(Path(path))
        raw = Path(path).open("rb", buffering=0) if stream is None else cast(io.RawIOBase, stream)  # noqa: SIM115
        with io.BufferedReader(raw) as buffered:
            _refuse_start(path, buffered.peek(len(LFS_POINTER)))
            plain, damage = _decompress(str(path), cast(BinaryIO, buffered))
            for number, line in enumerate(_cut_lines(plain, max_bytes), 1):
                if number == 1 and line is not None:
                    _refuse_start(path, line)
                    line = line.removeprefix(UTF8_MARK)
                if number > start:
                    yield number, _decode_line(line, max_bytes)
    except damage as error:
        raise GmaskError(
            f"{path}, after line {number}: the {COMPRESSIONS[Path(path).suffix]} file is damaged ({error})"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, GmaskError):
            raise
        raise GmaskError(f"{path}: cannot be read ({_system_reason(error)})") from error


COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}


def _decompress(name: str, file: BinaryIO) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """The bytes of a file that is compressed as its name ends, and what is raised where they are damaged."""
    if name.endswith(".zst"):
        import zstandard

        unpacked = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return cast(BinaryIO, io.BufferedReader(unpacked, READ_BYTES)), (zstandard.ZstdError,)
    if name.endswith(".gz"):
        import gzip
        import zlib

        return cast(BinaryIO, gzip.GzipFile(fileobj=file)), (gzip.BadGzipFile, EOFError, zlib.error)
    return file, ()


def at_line(path: Path | str, number: int, fault: object) -> GmaskError:
    """The error of a line of a file."""
    return GmaskError(f"{path}, line {number}: {fault}")


def parse_json(text: str, path: Path | str | None = None, *, checked: bool = True, remedy: str = "") -> Any:
    """The value of a JSON text. Its nesting is bounded by Python's recursion limit.

    Args:
        path: the file whose whole content the text is, to be named in errors.
        checked: refuse what `check_values` does.
        remedy: what to do, for the end of the error.

    Raises:
        GmaskError: not JSON (with the line, if there is a path), or refused.
    """
    try:
        values = json.loads(text)
        if checked:
            check_values(values)
    except (RecursionError, ValueError) as error:
        message = _describe_json_error(error) + (f"; {remedy}" if remedy else "")
        if path is None:
            raise GmaskError(message) from error
        if isinstance(error, json.JSONDecodeError):
            raise at_line(path, error.lineno, message) from error
        raise GmaskError(f"{path}: {message}") from error
    return values


def _describe_json_error(error: RecursionError | ValueError) -> str:
    if isinstance(error, RecursionError):
        return "not read, since its values are nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    # Python refuses an integer of thousands of digits by a plain ValueError.
    return str(error) if isinstance(error, GmaskError) else f"not JSON ({one_line(error)})"


def check_values(values: Any) -> None:
    """Raises `GmaskError` for values that Python reads and JSON does not have: NaN, infinity, half a character."""
    if isinstance(values, str):
        check_text(values, "a text")
    elif isinstance(values, float):
        if not math.isfinite(values):
            name = "NaN" if math.isnan(values) else "an infinite number"
            raise GmaskError(f"holds {name}, which JSON cannot say: write null, or leave it out")
    elif isinstance(values, dict):
        for key, value in values.items():
            check_values(key)
            check_values(value)
    elif isinstance(values, list):
        for value in values:
            check_values(value)


def require_text(text: object, name: str = "the text") -> None:
    """Raises `GmaskError` for what is no text, such as None or NaN out of a table."""
    if not isinstance(text, str):
        raise GmaskError(f"{name} is {type_name(text)}, where a text is expected")


def check_text(text: str, name: str = "the text") -> str:
    """Returns the text if UTF-8 can write it. A Python string may also hold half of a surrogate pair, or a raw byte.

    Raises:
        GmaskError: UTF-8 cannot write it, or it is no text.
    """
    require_text(text, name)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text[max(error.start - 10, 0) : error.start + 11]
            raise GmaskError(
                f"{name} holds half of a character (a lone surrogate), or a byte that is not UTF-8, in {shown!r}: "
                "write it in UTF-8"
            ) from error
    return text


LONGEST_TOKEN = 128
"""Characters of the longest token of the published vocabularies, GPT-2's."""


class Vocabulary(Protocol):
    """What of a tokenizer `check_characters` asks for."""

    def get_vocab(self) -> dict[str, int]:
        """Returns the ids of the tokens."""


def check_characters(text: str, most: int, tokenizer: Vocabulary, *, name: str = "the text") -> None:
    """Raises `GmaskError` for a text that is longer than ``most`` of the longest tokens.

    Tokenizing takes seconds a megabyte, only to find too many tokens. What is no text is refused, too.
    """
    require_text(text, name)
    if len(text) > most * LONGEST_TOKEN and len(text) > most * _longest_token(tokenizer):
        raise GmaskError(f"{name} has {len(text)} characters, and there is room for {most} tokens: shorten it")


def cut_characters(text: str, most: int, tokenizer: Vocabulary, *, keep_end: bool = False) -> str:
    """The start, or the end, of a text of which ``most`` tokens are kept: twice as many characters as they can have.

    It is cut before it is tokenized, for the reason of `check_characters`. What is left has more than ``most`` tokens.
    """
    if len(text) <= 2 * most * LONGEST_TOKEN or len(text) <= (kept := 2 * most * _longest_token(tokenizer)):
        return text
    return text[-kept:] if keep_end else text[:kept]


def _longest_token(tokenizer: Vocabulary) -> int:
    """The characters of the longest token, at least `LONGEST_TOKEN`."""
    return max(LONGEST_TOKEN, *map(len, tokenizer.get_vocab()))


def refuse_device(path: Path) -> None:
    """Raises `GmaskError` for a device, such as /dev/zero, which has no end."""
    if path.is_char_device() or path.is_block_device():
        raise GmaskError(f"{path}: is a device, where a file is expected")


def refuse_placeholder(path: Path, remedy: str = COPY_AGAIN) -> None:
    """Raises `GmaskError` for a missing or empty file, a folder in its place, or a Git LFS pointer.

    remedy: what to do about a missing or empty file, for the error.
    """
    if path.is_dir():
        raise GmaskError(f"{path}: is a folder, where a file is expected")
    if not path.is_file():
        raise GmaskError(f"{path}: is no file" if path.exists() else f"{path}: missing; {remedy}")
    if path.stat().st_size == 0:
        raise GmaskError(f"{path}: truncated or damaged, {remedy} (it is empty)")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise GmaskError(f"{path}: cannot be read ({error.strerror})") from error
    _refuse_pointer(path, start)


def _refuse_pointer(path: Path | str, data: bytes) -> None:
    if data.startswith(LFS_POINTER):
        raise GmaskError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` there")


def _refuse_start(path: Path | str, data: bytes) -> None:
    """Raises `GmaskError` if the first bytes of a file are those of a Git LFS pointer or of UTF-16.

    UTF-16 without a byte order mark has a null byte in each letter of ASCII, and no text begins with one.
    """
    _refuse_pointer(path, data)
    if data.startswith(UTF16_MARKS) or b"\0" in data[:2]:
        raise GmaskError(f"{path}: UTF-16 text; save the file as UTF-8")


def _cut_lines(stream: BinaryIO, max_bytes: int | None) -> Iterator[bytes | None]:
    """The lines of a stream; None for one that is too long."""
    if max_bytes is None:
        yield from stream
        return
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(READ_BYTES)
        yield None


def _decode_line(line: bytes | None, max_bytes: int | None) -> str | GmaskError:
    if line is None:
        return GmaskError(f"longer than {max_bytes:,} bytes, so it is not read")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return GmaskError("not UTF-8 text")


def _system_reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return str(error.strerror)
    return "no file can have this name" if isinstance(error, UnicodeEncodeError) else str(error)  # a null character


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _reason(error: Exception, path: Path, draft: Path) -> str:
    if isinstance(error, UnicodeEncodeError):
        if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # of a library that writes names as UTF-8
            return "its name holds bytes that are not UTF-8: name another one"
        return "a text in it holds half of a character"
    if isinstance(error, SafetensorError) and (found := SAFETENSORS_REASON.search(str(error))):
        return found[1]
    if isinstance(error, RuntimeError):  # torch's says nothing of the disk
        return "the file could not take all of it: the disk may be full"
    if not isinstance(error, OSError) or not error.strerror:
        return one_line(error)
    named = draft if error.filename is None else Path(str(error.filename))
    is_read = draft not in (named, *named.parents) and named not in (path, *path.parents)
    return f"{named}: {error.strerror}" if is_read else error.strerror


def _finish_file(path: Path, mode: int) -> None:
    """Gives a file its permissions, and flushes its bytes to the disk."""
    path.chmod(mode)
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _put_folder(draft: Path, folder: Path, *, replace: bool) -> None:
    if not replace or not folder.exists():
        draft.rename(folder)  # onto an empty folder, too
        return
    aside = draft.with_suffix(".replaced")
    folder.rename(aside)
    try:
        draft.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Flushes the names in a folder to the disk, on systems that can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
