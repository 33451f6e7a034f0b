"""How are the lines of a file filled, scored or embedded, one result a line?"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gmask.errors import GmaskError
from gmask.generation.choices import ChoiceLists, read_choices
from gmask.generation.context import Context
from gmask.generation.embed import Embedder, as_floats
from gmask.generation.infill import Infiller
from gmask.generation.lines import FileReport, Job, run_job
from gmask.generation.score import Question, Scorer
from gmask.generation.search import make_seeds


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
    first_seed = make_seeds(infiller.settings, 1)[0]

    def read(values: Mapping[str, Any]) -> str:
        blanked = infiller.read(values["text"])
        if choices is not None:
            read_choices(choices, len(blanked.context.places))
        return str(values["text"])

    def answer(texts: Sequence[tuple[int, str]]) -> Iterator[dict[str, Any]]:
        seeds = [first_seed + index for index, _ in texts]
        for infilling in infiller.fill([text for _, text in texts], choices, seeds=seeds):
            yield infilling.to_dict()

    settings = ["infill", asdict(infiller.settings), repr(choices)]
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
    with scored.open(encoding="utf-8") as file:
        verdicts = [values["correct"] for values in map(json.loads, filter(str.strip, file)) if "correct" in values]
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
