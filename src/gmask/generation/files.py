"""How are the texts of a file filled, so that a stopped run can go on?"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from gmask.errors import GmaskError
from gmask.generation.choices import ChoiceLists
from gmask.generation.infill import Infiller


@dataclass(frozen=True, slots=True)
class FileReport:
    """What became of the lines of a file."""

    lines: int
    resumed: int  # had been done before
    skipped: int  # of the others: could not be read, and the output has their error in their place


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input: a text, an error, or neither if it is empty."""

    number: int  # from 1
    text: str | None = None
    error: str | None = None


def fill_file(
    infiller: Infiller,
    source: Path,
    target: Path,
    *,
    choices: ChoiceLists | None = None,
    skip_bad_lines: bool = False,
    progress: bool = False,
) -> FileReport:
    """Fills the text of each line of ``source`` and writes one JSON line for each to ``target``.

    A ``.jsonl`` file has an object with a ``text`` on each line; in any other file a line is a text. An empty line
    stays empty. The line with index i (from 0) draws as a single run does with ``seed + i``.

    Until all lines are done they are kept beside the target, in a file whose name ends with ``.partial``; the same
    call then goes on behind the last of them. A call with other settings starts anew.

    Args:
        skip_bad_lines: write ``{"error": ...}`` in the place of a line that cannot be read or filled, and count it.

    Raises:
        GmaskError: a line that cannot be read or filled, with its number; the lines before it are kept.
        OSError: the source cannot be read or the target cannot be written.
    """
    partial = target.with_name(f"{target.name}.{_fingerprint(infiller, source, choices)}.partial")
    with source.open("rb") as file:
        total = sum(1 for _ in file)
    resumed, skipped = _keep_whole_lines(partial), 0
    first_seed = infiller.make_seeds(1)[0]
    lines = (_check(line, infiller) for line in read_lines(source, start=resumed))
    bar = tqdm(total=total, initial=resumed, unit="text", disable=not progress)
    with partial.open("a", encoding="utf-8") as output, bar:
        for batch in _batches(lines, infiller.batch_size):
            bad = None if skip_bad_lines else next((line for line in batch if line.error), None)
            done = batch if bad is None else batch[: batch.index(bad)]
            output.writelines(_fill_lines(done, infiller, choices, first_seed))
            output.flush()
            bar.update(len(done))
            skipped += sum(line.error is not None for line in done)
            if bad is not None:
                raise GmaskError(f"{source}, line {bad.number}: {bad.error}")
        os.fsync(output.fileno())
    os.replace(partial, target)
    return FileReport(total, resumed, skipped)


def read_lines(source: Path, *, start: int = 0) -> Iterator[Line]:
    """The lines of a file, without the first ``start`` ones."""
    with source.open("rb") as file:
        for index, raw in itertools.islice(enumerate(file), start, None):
            yield _read_line(index + 1, raw, is_json=source.suffix == ".jsonl")


def _read_line(number: int, raw: bytes, *, is_json: bool) -> Line:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
        if is_json and text.strip():
            text = json.loads(text)["text"]
    except UnicodeDecodeError:
        return Line(number, error="not UTF-8 text")
    except json.JSONDecodeError as error:
        return Line(number, error=f"not JSON ({error.msg} at column {error.colno})")
    except (KeyError, TypeError):
        return Line(number, error='not an object with a "text"')
    if not isinstance(text, str):
        return Line(number, error='"text" is not a string')
    return Line(number, text if text.strip() else None)


def _check(line: Line, infiller: Infiller) -> Line:
    if line.text is not None:
        try:
            infiller.read(line.text)
        except GmaskError as error:
            return replace(line, text=None, error=str(error))
    return line


def _batches(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    while batch := list(itertools.islice(lines, size)):
        yield batch


def _fill_lines(
    lines: Sequence[Line], infiller: Infiller, choices: ChoiceLists | None, first_seed: int
) -> Iterator[str]:
    """The lines of the output, in order."""
    texts = [line.text for line in lines if line.text is not None]
    seeds = [first_seed + line.number - 1 for line in lines if line.text is not None]
    filled = iter(infiller.fill(texts, choices, seeds=seeds))
    for line in lines:
        if line.text is not None:
            yield json.dumps(next(filled).to_dict(), ensure_ascii=False) + "\n"
        elif line.error is not None:
            yield json.dumps({"error": line.error}, ensure_ascii=False) + "\n"
        else:
            yield "\n"


def _keep_whole_lines(path: Path) -> int:
    """The number of lines in a file that may not be there; a last line without its end is cut off."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        count = end = 0
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def _fingerprint(infiller: Infiller, source: Path, choices: ChoiceLists | None) -> str:
    """Tells runs apart that must not be joined: another source, model or setting."""
    model = infiller.model
    job = [str(source.resolve()), model.config.name_or_path, str(model.dtype), asdict(infiller.settings), repr(choices)]
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()[:8]
