"""Files worked through line by line, resumable: filled, scored or embedded, one result a line."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm import tqdm

from gmask.errors import GmaskError
from gmask.files import at_line, parse_json, read_json_lines, read_lines, writing, written
from gmask.generation.embed import Embedder, as_floats
from gmask.generation.infill import Infiller
from gmask.generation.score import ChoiceLists, Question, Scorer, read_choices
from gmask.generation.text import Context
from gmask.models.glm import GLMForConditionalGeneration


@dataclass(frozen=True, slots=True)
class FileReport:
    """What became of the lines of a file."""

    lines: int
    resumed: int  # had been done before
    skipped: int  # of the others: could not be read, and the output has their error in their place


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

    The line with index i (from 0) draws as a single run does with ``seed + i``. All else is as in `run_job`.
    """
    (first_seed,) = infiller.sampling.seeds(1)

    def read(values: Mapping[str, Any]) -> str:
        blanked = infiller.read(values["text"])
        if choices is not None:
            read_choices(choices, len(blanked.context.blanks))
        return str(values["text"])

    def answer(texts: Sequence[tuple[int, str]]) -> Iterator[dict[str, Any]]:
        seeds = [first_seed + index for index, _ in texts]
        for infilling in infiller.fill([text for _, text in texts], choices, seeds=seeds):
            yield infilling.to_dict()

    settings = ["infill", infiller.sampling.keywords(), repr(choices)]
    job = Job(read, answer, infiller.batch_size, infiller.model, settings)
    return run_job(job, source, target, skip_bad_lines=skip_bad_lines, progress=progress)


def score_file(
    scorer: Scorer,
    source: Path,
    target: Path,
    *,
    answers: Sequence[str] | None = None,
    skip_bad_lines: bool = False,
    progress: bool = False,
) -> FileReport:
    """Scores the answers of each line of ``source`` and writes one JSON line for each to ``target``.

    A line has its own ``answers``, or gets those that are given here. It may have a ``label``, the right answer or its
    index from 0; its output then has the ``label`` (the answer) and whether the best answer is ``correct``. All else is
    as in `run_job`.
    """

    def read(values: Mapping[str, Any]) -> tuple[Question, str | None]:
        candidates = values.get("answers", answers)
        if candidates is None:
            raise GmaskError('no "answers" here, and none given for all lines')
        question = scorer.read(values["text"], candidates)
        return question, _read_label(values["label"], question.answers) if "label" in values else None

    def answer(items: Sequence[tuple[int, tuple[Question, str | None]]]) -> Iterator[dict[str, Any]]:
        scorings = scorer.score([question for _, (question, _) in items])
        for scoring, (_, (_, label)) in zip(scorings, items, strict=True):
            verdict = {} if label is None else {"label": label, "correct": scoring.best.text == label}
            yield {**scoring.to_dict(), **verdict}

    job = Job(read, answer, scorer.batch_size, scorer.model, ["score", scorer.normalization, answers])
    return run_job(job, source, target, skip_bad_lines=skip_bad_lines, progress=progress)


def _read_label(label: object, answers: Sequence[str]) -> str:
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(answers):
        return answers[label]
    if label not in answers:
        raise GmaskError(f'"label" is {label!r}: it must be one of the answers, or its index from 0')
    return str(label)


def count_correct(scored: Path) -> tuple[int, int]:
    """How many best answers of a file that `score_file` wrote are correct, and how many lines have a label."""
    verdicts = [values["correct"] for _, values in read_json_lines(scored) if "correct" in values]
    return sum(verdicts), len(verdicts)


def embed_file(
    embedder: Embedder, source: Path, target: Path, *, skip_bad_lines: bool = False, progress: bool = False
) -> FileReport:
    """Embeds the text of each line of ``source``.

    A ``target`` that ends with ``.npy`` becomes a float32 array ``[lines, H]``, with a row of NaN for a line that is
    empty or was skipped; any other gets one JSON line for each, ``{"text", "embedding"}``. All else is as in `run_job`.
    """

    def read(values: Mapping[str, Any]) -> tuple[str, Context]:
        return values["text"], embedder.read(values["text"])

    def answer(items: Sequence[tuple[int, tuple[str, Context]]]) -> Iterator[dict[str, Any]]:
        vectors = embedder.embed([context for _, (_, context) in items])
        for vector, (_, (text, _)) in zip(vectors, items, strict=True):
            yield {"text": text, "embedding": as_floats(vector)}

    settings = ["embed", embedder.pooling, embedder.layer, embedder.normalize, embedder.truncate]
    convert = partial(_write_array, width=embedder.model.config.hidden_size) if target.suffix == ".npy" else None
    job = Job(read, answer, embedder.batch_size, embedder.model, settings, convert)
    return run_job(job, source, target, skip_bad_lines=skip_bad_lines, progress=progress)


def _write_array(lines: Path, target: Path, *, width: int) -> None:
    """Makes the JSON lines of `embed_file` an array, row by row."""
    with lines.open(encoding="utf-8") as file, target.open("wb") as output:
        header = {"descr": "<f4", "fortran_order": False, "shape": (sum(1 for _ in file), width)}
        np.lib.format.write_array_header_1_0(output, header)
        file.seek(0)
        for line in file:
            values = json.loads(line) if line.strip() else {}
            output.write(np.array(values.get("embedding", [np.nan] * width), "<f4").tobytes())


Item = TypeVar("Item")
LONGEST_LINE = 2**22
"""Bytes: far more than any of the models reads. Longer ones would only be cut into tokens to be refused."""


@dataclass(frozen=True, slots=True)
class Line(Generic[Item]):
    """One line of the input: what it asks for, an error, or neither if it is empty."""

    number: int  # from 1
    item: Item | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Job(Generic[Item]):
    """What is done with each line of a file."""

    read: Callable[[Mapping[str, Any]], Item]  # what a line asks for, or GmaskError; its "text" is a string
    answer: Callable[[Sequence[tuple[int, Item]]], Iterable[Mapping[str, Any]]]  # of lines by their index from 0
    batch_size: int
    model: GLMForConditionalGeneration
    settings: Any  # what was done with other ones is not taken over
    convert: Callable[[Path, Path], None] | None = None  # from the finished JSON lines to the form of the target


def run_job(
    job: Job[Item], source: Path, target: Path, *, skip_bad_lines: bool = False, progress: bool = False
) -> FileReport:
    """Answers each line of ``source`` with one JSON line in ``target``.

    A ``.jsonl`` or ``.jsonl.zst`` file has an object with a ``text`` on each line; in any other file a line is a text.
    An empty line stays empty.

    Until all lines are done they are kept beside the target, in a file whose name ends with ``.partial``; the same
    call then goes on behind the last of them. A call with other settings starts anew.

    Args:
        skip_bad_lines: write ``{"error": ...}`` in the place of a line that cannot be read or answered, and count it.

    Raises:
        GmaskError: a line that cannot be read or answered, with its number, the lines before it being kept; the target
            is there already; the source cannot be read, or the target cannot be written.
    """
    if target.exists():
        raise GmaskError(f"{target}: is there already and is not overwritten; remove it, or name another output")
    if source.exists() and not source.is_file():  # it is read more than once
        raise GmaskError(f"{source}: is no file, but a folder, a pipe or a device; name a file of texts")
    total = sum(1 for _ in read_lines(source, max_bytes=LONGEST_LINE))
    partial = target.with_name(f"{target.name}.{_fingerprint(job, source)}.partial")
    with writing(target, partial, kept="what is done"):
        resumed, skipped = keep_whole_lines(partial), 0
        lines = _read_items(source, job.read, start=resumed)
        bar = tqdm(total=total, initial=resumed, unit="text", disable=not progress)
        with partial.open("a", encoding="utf-8") as output, bar:
            while batch := list(itertools.islice(lines, job.batch_size)):
                bad = None if skip_bad_lines else next((line for line in batch if line.error), None)
                done = batch if bad is None else batch[: batch.index(bad)]
                output.writelines(_answer_lines(done, job))
                output.flush()
                bar.update(len(done))
                skipped += sum(line.error is not None for line in done)
                if bad is not None:
                    raise at_line(source, bad.number, bad.error)
            os.fsync(output.fileno())
        if job.convert is None:
            os.replace(partial, target)
        else:
            with written(target) as draft:
                job.convert(partial, draft)
            partial.unlink()
    return FileReport(total, resumed, skipped)


def _read_items(source: Path, read: Callable[[Mapping[str, Any]], Item], *, start: int) -> Iterator[Line[Item]]:
    """What the lines of a file ask for, without the first ``start`` ones."""
    is_json = source.name.endswith((".jsonl", ".jsonl.zst"))
    for number, line in read_lines(source, start=start, max_bytes=LONGEST_LINE):
        try:
            if isinstance(line, GmaskError):
                raise line
            values = _parse(line.rstrip("\r\n"), is_json=is_json)
            yield Line(number, None if values is None else read(values))
        except GmaskError as error:
            yield Line(number, error=str(error))


def _parse(line: str, *, is_json: bool) -> Mapping[str, Any] | None:
    """What a line says; None if it is empty."""
    values = parse_json(line) if is_json and line.strip() else {"text": line}
    if not isinstance(values, dict) or "text" not in values:
        raise GmaskError('not an object with a "text"')
    if not isinstance(values["text"], str):
        raise GmaskError('"text" is not a string')
    return values if values["text"].strip() else None


def _answer_lines(lines: Sequence[Line[Item]], job: Job[Item]) -> Iterator[str]:
    """The lines of the output, in order."""
    items = [(line.number - 1, line.item) for line in lines if line.item is not None]
    answers = iter(job.answer(items))
    for line in lines:
        if line.item is not None:
            yield json.dumps(next(answers), ensure_ascii=False) + "\n"
        elif line.error is not None:
            yield json.dumps({"error": line.error}, ensure_ascii=False) + "\n"
        else:
            yield "\n"


def keep_whole_lines(path: Path) -> int:
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


def _fingerprint(job: Job[Any], source: Path) -> str:
    """Tells runs apart that must not be joined: another source, model or setting."""
    run = [str(source.resolve()), job.model.config.name_or_path, str(job.model.dtype), job.settings]
    return hashlib.sha256(json.dumps(run).encode()).hexdigest()[:8]
