"""Fills, scores or embeds a file line by line. A job that was interrupted is resumed."""

import hashlib
import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from gmask.errors import GmaskError
from gmask.files import at_line, parse_json, read_json_lines, read_lines, writing, written
from gmask.generation.embed import Embedder, as_floats
from gmask.generation.encoding import BlankedText, Context
from gmask.generation.infill import Infiller
from gmask.generation.reward import RewardQuestion, RewardScorer
from gmask.generation.score import ChoiceLists, ChoiceQuestion, Scorer, read_choice_lists
from gmask.models.glm import GLMForConditionalGeneration


@dataclass(frozen=True, slots=True)
class FileReport:
    """The number of lines that a job processed."""

    lines: int
    resumed: int  # done by an earlier call
    skipped: int  # of the others: could not be read or answered; the output has an error in their line


def fill_file(
    infiller: Infiller,
    source: Path,
    target: Path,
    *,
    choices: ChoiceLists | None = None,
    skip_bad_lines: bool = False,
    progress: bool = False,
    processes: int = 1,
    load: Callable[[], Infiller] | None = None,
) -> FileReport:
    """Fills the text of each line of ``source`` and writes one JSON line for each to ``target``.

    The line with index i (from 0) draws by ``seed + i``, as a single run does. The rest is as in `run_file_job`.

    Args:
        processes: this one, and others that are started; each has a model of its own and fills a part of the lines.
        load: returns the infiller in a process that is started; it is sent there, so it has to be picklable.
    """
    job = fill_job(infiller, choices)
    settings: dict[str, Any] = {"skip_bad_lines": skip_bad_lines, "progress": progress}
    if processes == 1:
        return run_file_job(job, source, target, **settings)
    if load is None or processes < 1:
        raise GmaskError(f"processes is {processes}: give 1, or more and the function that loads the model")
    with Workers(processes, partial(_load_fill_job, load, choices)) as workers:
        return run_file_job(job, source, target, workers=workers, **settings)


def _load_fill_job(load: Callable[[], Infiller], choices: ChoiceLists | None) -> "FileJob[BlankedText]":
    return fill_job(load(), choices)


def fill_job(infiller: Infiller, choices: ChoiceLists | None = None) -> "FileJob[BlankedText]":
    """Returns the job of `fill_file`."""
    (first_seed,) = infiller.sampling.seeds(1)

    def read(values: Mapping[str, Any]) -> BlankedText:
        blanked = infiller.read(values["text"])
        if choices is not None:
            read_choice_lists(choices, len(blanked.context.blanks))
        return blanked

    def answer(texts: Sequence[tuple[int, BlankedText]]) -> Iterator[dict[str, Any]]:
        seeds = [first_seed + index for index, _ in texts]
        for infilling in infiller.fill([text for _, text in texts], choices, seeds=seeds):
            yield infilling.to_dict()

    settings = ["infill", infiller.sampling.keywords(), repr(choices)]
    # Of many texts, the next takes the place of one that is done, so that as many as fit are filled at any time.
    return FileJob(read, answer, FILLED_TOGETHER * infiller.batch_size, infiller.model, settings)


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

    A line has its own ``answers``, or gets those that are given here. It may have a ``label``: the right answer, or its
    index from 0. Its output then has the ``label`` (the answer), and ``correct``, true if that is the best answer. The
    rest is as in `run_file_job`.
    """

    def read(values: Mapping[str, Any]) -> tuple[ChoiceQuestion, str | None]:
        candidates = values.get("answers", answers)
        if candidates is None:
            raise GmaskError('no "answers" here, and none given for all lines')
        question = scorer.read(values["text"], candidates)
        return question, _read_label(values["label"], question.answers) if "label" in values else None

    def answer(queries: Sequence[tuple[int, tuple[ChoiceQuestion, str | None]]]) -> Iterator[dict[str, Any]]:
        scorings = scorer.score([question for _, (question, _) in queries])
        for scoring, (_, (_, label)) in zip(scorings, queries, strict=True):
            verdict = {} if label is None else {"label": label, "correct": scoring.best.text == label}
            yield {**scoring.to_dict(), **verdict}

    job = FileJob(read, answer, scorer.batch_size, scorer.model, ["score", scorer.normalization, answers])
    return run_file_job(job, source, target, skip_bad_lines=skip_bad_lines, progress=progress)


def reward_file(
    scorer: RewardScorer,
    source: Path,
    target: Path,
    *,
    answers: Sequence[str] | None = None,
    skip_bad_lines: bool = False,
    progress: bool = False,
) -> FileReport:
    """Rewards the answers of each line of ``source``, whose ``text`` is the prompt; the rest is as of `score_file`."""

    def read(values: Mapping[str, Any]) -> RewardQuestion:
        candidates = values.get("answers", answers)
        if candidates is None:
            raise GmaskError('no "answers" here, and none given for all lines')
        return scorer.read(values["text"], candidates)

    def answer(queries: Sequence[tuple[int, RewardQuestion]]) -> Iterator[dict[str, Any]]:
        yield from (found.to_dict() for found in scorer.rank([question for _, question in queries]))

    job = FileJob(read, answer, scorer.batch_size, scorer.model, ["reward", answers])
    return run_file_job(job, source, target, skip_bad_lines=skip_bad_lines, progress=progress)


def _read_label(label: object, answers: Sequence[str]) -> str:
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(answers):
        return answers[label]
    if label not in answers:
        raise GmaskError(f'"label" is {label!r}: it must be one of the answers, or its index from 0')
    return str(label)


def count_correct(scored: Path) -> tuple[int, int]:
    """Returns, of a file that `score_file` wrote, the number of correct best answers and of lines with a label."""
    verdicts = [values["correct"] for _, values in read_json_lines(scored) if "correct" in values]
    return sum(verdicts), len(verdicts)


def embed_file(
    embedder: Embedder, source: Path, target: Path, *, skip_bad_lines: bool = False, progress: bool = False
) -> FileReport:
    """Embeds the text of each line of ``source``.

    A ``target`` that ends with ``.npy`` becomes a float32 array ``[lines, H]``, with a row of NaN for a line that is
    empty or was skipped. Any other target gets one JSON line for each, ``{"text", "embedding"}``. The rest is as in
    `run_file_job`.
    """

    def read(values: Mapping[str, Any]) -> tuple[str, Context]:
        return values["text"], embedder.read(values["text"])

    def answer(queries: Sequence[tuple[int, tuple[str, Context]]]) -> Iterator[dict[str, Any]]:
        vectors = embedder.embed([context for _, (_, context) in queries])
        for vector, (_, (text, _)) in zip(vectors, queries, strict=True):
            yield {"text": text, "embedding": as_floats(vector)}

    settings = ["embed", embedder.pooling, embedder.layer, embedder.normalize, embedder.truncate]
    convert = partial(_write_array, width=embedder.model.config.hidden_size) if target.suffix == ".npy" else None
    job = FileJob(read, answer, embedder.batch_size, embedder.model, settings, convert)
    return run_file_job(job, source, target, skip_bad_lines=skip_bad_lines, progress=progress)


def _write_array(lines: Path, target: Path, *, width: int) -> None:
    """Writes the JSON lines of `embed_file` as an array, row by row."""
    with lines.open(encoding="utf-8") as file, target.open("wb") as output:
        header = {"descr": "<f4", "fortran_order": False, "shape": (sum(1 for _ in file), width)}
        np.lib.format.write_array_header_1_0(output, header)
        file.seek(0)
        for line in file:
            values = json.loads(line) if line.strip() else {}
            output.write(np.array(values.get("embedding", [np.nan] * width), "<f4").tobytes())


FILLED_TOGETHER = 16
"""Batches of texts that are given to the model at once, and whose results are written at once."""

Query = TypeVar("Query")
LONGEST_LINE = 2**22
"""In bytes, far more than any of the models reads. Longer lines are refused before they are tokenized."""


@dataclass(frozen=True, slots=True)
class Line(Generic[Query]):
    """One line of the input: it has a query or an error, or neither if it is empty."""

    number: int  # from 1
    query: Query | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class FileJob(Generic[Query]):
    """The functions that read and answer the lines of a file."""

    read: Callable[[Mapping[str, Any]], Query]  # makes the query of a line, whose "text" is a string; may raise
    answer: Callable[[Sequence[tuple[int, Query]]], Iterable[Mapping[str, Any]]]  # of (index of the line, query)
    batch_size: int  # lines that are answered and written at a time
    model: GLMForConditionalGeneration
    settings: Any  # part of the fingerprint: a job with other settings starts anew
    convert: Callable[[Path, Path], None] | None = None  # from the finished JSON lines to the format of the target


class Workers:
    """Processes that answer lines of a file beside this one, each with a model of its own; use it in a ``with`` block.

    Args:
        count: of processes, this one counted. Its threads are divided among them.
        make: returns the job in a new process.
    """

    def __init__(self, count: int, make: Callable[[], FileJob[Any]]) -> None:
        self._threads = torch.get_num_threads()
        threads = max(1, self._threads // count)
        self._ahead = count  # batches that the others have not answered yet: one waits when another is done
        self._pool = ProcessPoolExecutor(
            count - 1, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(make, threads)
        )
        torch.set_num_threads(threads)

    def answer(
        self, batches: Iterable[list[Line[Any]]], job: FileJob[Any]
    ) -> Iterator[tuple[list[Line[Any]], list[str]]]:
        """Yields batches with the lines of their output, in order. Those that the others leave are answered here."""
        running: deque[tuple[list[Line[Any]], Future[list[str]]]] = deque()
        for batch in batches:
            if sum(not future.done() for _, future in running) < self._ahead:
                future = self._pool.submit(_work, batch)
            else:
                future = Future()
                try:
                    future.set_result(list(_answer_lines(batch, job)))
                except Exception as error:  # raised when the batches before it are written
                    future.set_exception(error)
            running.append((batch, future))
            while running and running[0][1].done():
                done, future = running.popleft()
                yield done, future.result()
        for done, future in running:
            yield done, future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)


_job: FileJob[Any] | None = None


def _start_worker(make: Callable[[], FileJob[Any]], threads: int) -> None:
    global _job
    torch.set_num_threads(threads)
    _job = make()


def _work(batch: list[Line[Any]]) -> list[str]:
    assert _job is not None
    return list(_answer_lines(batch, _job))


def run_file_job(
    job: FileJob[Query],
    source: Path,
    target: Path,
    *,
    skip_bad_lines: bool = False,
    progress: bool = False,
    workers: Workers | None = None,
) -> FileReport:
    """Answers each line of ``source`` with one JSON line in ``target``.

    A ``.jsonl`` or ``.jsonl.zst`` file has an object with a ``text`` on each line; in any other file a line is a text.
    An empty line stays empty.

    Until all lines are done, the results are in a file beside the target whose name ends with ``.partial``. The same
    call then resumes behind the last of them. A call with other settings starts anew.

    Args:
        skip_bad_lines: write ``{"error": ...}`` for a line that cannot be read or answered, and count it.
        workers: processes that answer beside this one.

    Raises:
        GmaskError: a line that cannot be read or answered, with its number (the results of the lines before it are
            kept); a target that exists; a source that cannot be read, or a target that cannot be written.
    """
    if target.exists():
        raise GmaskError(f"{target}: is there already and is not overwritten; remove it, or name another output")
    if source.exists() and not source.is_file():  # it is read more than once
        raise GmaskError(f"{source}: is no file, but a folder, a pipe or a device; name a file of texts")
    total = sum(1 for _ in read_lines(source, max_bytes=LONGEST_LINE))
    partial = target.with_name(f"{target.name}.{_fingerprint(job, source)}.partial")
    with writing(target, partial, kept="what is done"):
        resumed, skipped = keep_whole_lines(partial), 0
        lines = _read_queries(source, job.read, start=resumed)
        bar = tqdm(total=total, initial=resumed, unit="text", disable=not progress)
        with partial.open("a", encoding="utf-8") as output, bar:
            batches = _batch_lines(lines, job.batch_size, skip_bad_lines=skip_bad_lines)
            answered = _answer_here(batches, job) if workers is None else workers.answer(batches, job)
            for batch, texts in answered:
                last = batch[-1]
                bad = None if skip_bad_lines or last.error is None else last
                done = batch if bad is None else batch[:-1]
                output.writelines(itertools.islice(texts, len(done)))
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


def _batch_lines(lines: Iterator[Line[Query]], batch_size: int, *, skip_bad_lines: bool) -> Iterator[list[Line[Query]]]:
    """Yields batches of lines; the first bad line is the last, unless such lines are skipped."""
    while batch := list(itertools.islice(lines, batch_size)):
        bad = None if skip_bad_lines else next((index for index, line in enumerate(batch) if line.error), None)
        if bad is not None:
            yield batch[: bad + 1]
            return
        yield batch


def _answer_here(
    batches: Iterable[list[Line[Query]]], job: FileJob[Query]
) -> Iterator[tuple[list[Line[Query]], Iterable[str]]]:
    return ((batch, _answer_lines(batch, job)) for batch in batches)


def _read_queries(source: Path, read: Callable[[Mapping[str, Any]], Query], *, start: int) -> Iterator[Line[Query]]:
    """Yields the lines of a file with their queries, without the first ``start`` lines."""
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
    """Returns the object of a line; None if its text is empty."""
    values = parse_json(line) if is_json and line.strip() else {"text": line}
    if not isinstance(values, dict) or "text" not in values:
        raise GmaskError('not an object with a "text"')
    if not isinstance(values["text"], str):
        raise GmaskError('"text" is not a string')
    return values if values["text"].strip() else None


def _answer_lines(lines: Sequence[Line[Query]], job: FileJob[Query]) -> Iterator[str]:
    """Yields the lines of the output, in order."""
    queries = [(line.number - 1, line.query) for line in lines if line.query is not None]
    answers = iter(job.answer(queries))
    for line in lines:
        if line.query is not None:
            yield json.dumps(next(answers), ensure_ascii=False) + "\n"
        elif line.error is not None:
            yield json.dumps({"error": line.error}, ensure_ascii=False) + "\n"
        else:
            yield "\n"


def keep_whole_lines(path: Path) -> int:
    """Returns the number of whole lines in a file, 0 if there is none, and cuts off a last line without its end."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        count = end = 0
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def _fingerprint(job: FileJob[Any], source: Path) -> str:
    """Returns a digest of source, model and settings: only a job with the same one may be resumed."""
    run = [str(source.resolve()), job.model.config.name_or_path, str(job.model.dtype), job.settings]
    return hashlib.sha256(json.dumps(run).encode()).hexdigest()[:8]
