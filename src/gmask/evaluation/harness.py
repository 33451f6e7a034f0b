"""The scores of a model on tasks: `gmask evaluate --tasks`, and what fine-tuning measures by."""

import hashlib
import itertools
import json
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.load import find_folder, load
from gmask.errors import GmaskError, is_shortage
from gmask.evaluation.pages import print_report, write_reports
from gmask.evaluation.prediction_log import PredictionLog, key_of, refuse_file
from gmask.evaluation.preparation import DataPlace, Examples, PreparedTask, find_place, prepare_task
from gmask.evaluation.processes import Team, join_team
from gmask.evaluation.results import (
    EvaluationReport,
    Refusal,
    RunRecord,
    TaskResult,
    TaskScore,
    find_commit,
    hash_weights,
    list_versions,
)
from gmask.evaluation.suite import PlannedTask, folder_of, plan_tasks
from gmask.generation.padding import batches_by_length
from gmask.generation.predict import Predictor, ReadSample, locate, make_predictor, measure_length
from gmask.generation.score import check_normalization
from gmask.generation.settings import Sampling, ScoreNormalization, make_sampling
from gmask.hardware import describe_device
from gmask.recipes.tuning import TuningRecipe, find_tuning_recipe
from gmask.tasks.metrics import is_answered, predict_majority, score_predictions
from gmask.tasks.records import LABELLED, MEASURED, Prediction, Sample, Truncation
from gmask.tasks.sources import MissingDataError
from gmask.tasks.tally import Tally, interval
from gmask.tasks.task import Task

WINDOW = 1024
"""Samples that are in memory; batches are made among them."""

AUTO_ROWS = {"cuda": 256, "cpu": 32}
"""Rows of a batch that are tried first, by kind of device; halved while there is too little memory."""

RowsPerBatch = int | Literal["auto"]


class SourceLimits(TypedDict):
    """How long the text of a sample may be, as arguments of `predict`."""

    max_source: int | None
    truncation: Truncation


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The predictions and scores of a model. Scores are in per cent, a loss in nats; without answers there are none."""

    predictions: Sequence[Prediction]
    scores: Mapping[str, float]
    majority: Mapping[str, float]  # scores of the most frequent label; empty where there is none


def evaluate(
    task: Task,
    samples: Sequence[Sample],
    *,
    predict: Callable[[Sequence[Sample]], Sequence[Prediction]],
    loss: Callable[[Sequence[Sample]], float] | None = None,
    known: Sequence[Sample] = (),
) -> Evaluation:
    """Measures a model by the metrics of a task, beside the majority baseline.

    Args:
        predict: gives a prediction for each sample.
        loss: gives the loss of the samples, which is the score ``loss``.
        known: samples whose most frequent label is the baseline's answer.
    """
    has_answers = all(is_answered(sample, task.kind) for sample in samples)
    # A language model in training has its loss, which says as much as perplexity by windows, and costs less
    metrics = () if loss is not None and task.kind == "language-model" else task.metrics
    predictions = predict(samples) if metrics or not has_answers else []
    if not has_answers:
        return Evaluation(predictions, {}, {})
    scores = {} if loss is None else {"loss": loss(samples)}
    if metrics:
        scores |= score_predictions(metrics, predictions, samples, language=task.language)
    baseline = predict_majority(known, samples)
    majority = {} if baseline is None else score_predictions(task.metrics, baseline, samples, language=task.language)
    return Evaluation(predictions, scores, majority)


def run_tasks(
    model: str = "bundled",
    *,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    data: str | None = None,
    train: str | None = None,
    adapter: str | None = None,
    out: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    normalization: ScoreNormalization | None = None,
    max_source: int | None = None,
    truncation: Truncation | None = None,
    batch_size: RowsPerBatch = "auto",
    shuffle_labels: bool = False,
    skip_bad_lines: bool = False,
    device: str | None = None,
    tables: bool = True,
) -> EvaluationReport:
    """Measures a model on tasks. A run with ``out`` that was stopped goes on when it is called again.

    For a model or an adapter of ``gmask finetune``, the defaults of ``settings``, ``max_source`` and ``truncation`` are
    those of its recipe. Under torchrun the processes share the samples of each batch; all return the same report.

    Args:
        model: a folder, the name of a published model, or ``"bundled"``.
        tasks: names of gmask's tasks, patterns such as ``"superglue/*"``, YAML files of others.
        suite: the name of a suite, or its YAML file.
        data: the folder in which the tasks' files are looked for, or a folder above; of a single task also a file of
            records, or a glob. Without it the records are read from the hub, where the library ``datasets`` can; with
            it the network is never asked.
        train: a file of the records that examples are drawn from, for a task that does not say where they are.
        adapter: a folder that was trained for the model.
        out: the folder for predictions, which are written while they are made, and for reports.
        limit: the number of records of each task that are read, from the first one.
        shots: examples in front of each text, drawn by the seed from the training records.
        seeds: each gives a run of a task with examples, or with answers that are drawn; other tasks take the first.
        settings: of the decoding, by name, where the model writes texts.
        normalization: of candidates' scores, as of `gmask.score`.
        max_source, truncation: as of `predict`.
        batch_size: rows that are read together, or "auto"; the predictions do not depend on it.
        shuffle_labels: exchange the labels among the samples, by the first seed: what is then found is chance.
        skip_bad_lines: leave out and count records that cannot be used.
        tables: print the scores.

    Raises:
        GmaskError: an unknown task or suite; the one task cannot be measured, or none of several can; a folder that
            cannot be written, or holds predictions of something else.
    """
    console = Console(stderr=not tables)
    make_sampling(settings or {})  # a mistake is reported before a model is fetched
    _check_options(batch_size, normalization, shots, seeds)
    planned = plan_tasks(tasks, suite, limit=limit, shots=shots)
    place = find_place(planned, data, train)
    if out is not None:
        refuse_file(Path(out))
    shuffle = seeds[0] if shuffle_labels else None
    prepared, refused = _prepare(planned, place, skip_bad_lines=skip_bad_lines, shuffle=shuffle)
    with join_team() as team:
        source = Path(adapter).expanduser() if adapter else find_folder(model)
        reading = ReadingSettings(
            given=settings or {},
            normalization=normalization,
            max_source=max_source,
            truncation=truncation,
            batch_size=batch_size,
            recipe=find_tuning_recipe(source),
        )
        began, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        network, tokenizer = load(model, adapter=adapter, device=team.device(device))
        weights = team.agree(_hash_weights(model, adapter) if team.is_first else {})
        runner = Runner(network, tokenizer, team, console, reading, weights, None if out is None else Path(out))
        results = list[TaskResult]()
        for one in prepared:
            try:
                results.append(runner.measure(one, _useful_seeds(one, seeds, reading.sampling(one.planned))))
            except GmaskError as error:
                if len(planned) == 1:
                    raise
                refused.append(Refusal(name=one.planned.name, reason=str(error)))
        report = EvaluationReport(
            run=RunRecord(
                model=model,
                adapter=adapter,
                weights=weights,
                dtype=str(network.dtype).removeprefix("torch."),
                device=describe_device(network.device),
                processes=team.size,
                threads=torch.get_num_threads(),
                versions=list_versions(),
                commit=find_commit(),
                started=started,
                seconds=time.perf_counter() - began,
            ),
            tasks=results,
            refused=refused,
        )
        if team.is_first and out is not None:
            write_reports(report, Path(out))
        if team.is_first and tables:
            print_report(report, console)
        return report


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingSettings:
    """How samples are read and answered: by a caller, else by an entry of a suite, else by the recipe of the model."""

    given: Mapping[str, Any]  # of the decoding
    normalization: ScoreNormalization | None
    max_source: int | None
    truncation: Truncation | None
    batch_size: RowsPerBatch
    recipe: TuningRecipe | None

    def sampling(self, planned: PlannedTask) -> Sampling:
        tuned = self.recipe.decoding_settings if self.recipe else {}
        return make_sampling({**tuned, **planned.entry.decoding, **self.given})

    def limits(self, planned: PlannedTask, positions: int) -> SourceLimits:
        """A suite is for models of any number of positions, so its limit is theirs where they have fewer."""
        tuned, entry = (self.recipe.data if self.recipe else None), planned.entry
        fitting = None if entry.max_source is None else min(entry.max_source, positions)
        return SourceLimits(
            max_source=self.max_source or fitting or (tuned.max_source if tuned else None),
            truncation=self.truncation or entry.truncation or (tuned.truncation if tuned else "left"),
        )

    def normalize(self, planned: PlannedTask) -> ScoreNormalization:
        return self.normalization or planned.entry.normalization or "sum"


@dataclass
class RunCounts:
    """What a run of a task counted, for its notes."""

    cut: int = 0  # samples whose text was cut
    rounds: int = 0  # of conversations, left out
    resumed: int = 0
    predicted: int = 0


@dataclass
class Runner:
    """Measures a model on prepared tasks. All processes of a team make the same calls."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    team: Team
    console: Console
    reading: ReadingSettings
    weights: Mapping[str, str]
    out: Path | None
    rows: int = field(init=False)  # of a batch; halved where memory is short

    def __post_init__(self) -> None:
        size = self.reading.batch_size
        self.rows = AUTO_ROWS.get(self.network.device.type, AUTO_ROWS["cpu"]) if size == "auto" else size

    def measure(self, prepared: PreparedTask, seeds: Sequence[int]) -> TaskResult:
        """Predicts the samples of a task, once for each seed, and scores the predictions."""
        planned, task = prepared.planned, prepared.task
        positions: int = self.network.config.max_position_embeddings
        sampling, limits = self.reading.sampling(planned), self.reading.limits(planned, positions)
        normalization = self.reading.normalize(planned)
        predictor = make_predictor(
            self.network,
            self.tokenizer,
            task.kind,
            settings=sampling,
            batch_size=self.rows,
            normalization=normalization,
            likelihood=task.likelihood,
            **limits,
        )
        counts, tallies = RunCounts(), list[Tally]()
        majority = Tally(task.metrics, task.language)
        began = time.perf_counter()
        total = prepared.samples * len(seeds)
        is_quiet = not (self.console.is_terminal and self.team.is_first)
        with tqdm(total=total, unit="sample", desc=planned.name, disable=is_quiet, leave=False) as bar:
            for seed in seeds:
                settings = sampling if sampling.seed is not None else replace(sampling, seed=seed)
                path = self._path(planned, seed, seeds)
                tally = Tally(task.metrics, task.language)
                for prediction, sample in self._predict(
                    prepared, replace(predictor, settings=settings), seed, path, counts, bar.update
                ):
                    if prepared.has_answers:
                        tally.add(prediction, sample)
                        if prepared.majority is not None and not tallies:
                            majority.add(Prediction(label=prepared.majority), sample)
                tallies.append(tally)
        seconds = time.perf_counter() - began
        return TaskResult(
            name=planned.name,
            task=task.name,
            kind=task.kind,
            samples=prepared.samples,
            scores=combine_tallies(tallies) if prepared.has_answers else {},
            majority=majority.scores() if len(majority) else {},
            chance=prepared.chance if prepared.has_answers else None,
            groups=tallies[0].score_groups() if prepared.has_answers else {},
            seeds=tuple(seeds),
            by_seed=[tally.scores() for tally in tallies] if prepared.has_answers and len(seeds) > 1 else [],
            shots=planned.entry.shots,
            shuffled_labels=prepared.labels is not None,
            data=prepared.records.name,
            hashes=prepared.hashes,
            settings={
                **_describe_kind(task, sampling, normalization),
                "max_source": predictor.reader.max_source,
                "truncation": limits["truncation"],
                "batch_size": self.rows,
                "limit": planned.entry.limit,
            },
            resumed=counts.resumed,
            left_out=prepared.left_out,
            notes=list(_list_notes(prepared, counts, tallies[0], total, predictor.reader.max_source)),
            seconds=seconds,
            samples_per_second=counts.predicted / seconds if counts.predicted else None,
        )

    def _path(self, planned: PlannedTask, seed: int, seeds: Sequence[int]) -> Path | None:
        if self.out is None:
            return None
        folder = self.out / folder_of(planned.name)
        return (folder / f"seed-{seed}" if len(seeds) > 1 else folder) / "predictions.jsonl"

    def _predict(
        self,
        prepared: PreparedTask,
        predictor: Predictor,
        seed: int,
        path: Path | None,
        counts: RunCounts,
        on_progress: Callable[[int], Any],
    ) -> Iterator[tuple[Prediction, Sample]]:
        """The predictions of a task in the order of its samples. At most `WINDOW` samples are held.

        The batches of a window are always the same, and one that an earlier run did not finish is answered as a whole:
        that is why a run that goes on gives the same numbers, bit for bit.
        """
        examples = prepared.draw_examples(seed)
        log = PredictionLog(path if self.team.is_first else None)
        fingerprint = self._fingerprint(predictor)
        draws = predictor.settings.temperature > 0 and prepared.task.kind not in LABELLED
        (first_seed,) = predictor.settings.seeds(1)
        keys, start = array("Q"), 0
        stream = map(examples.put_before, prepared.stream())
        while samples := list(itertools.islice(stream, WINDOW)):
            questions = predictor.read(samples)
            _check_examples(examples, samples, questions)
            counts.cut += sum(question.tokens_cut > 0 for question in questions)
            counts.rounds += sum(question.rounds_left_out for question in questions)
            seeds = [first_seed + start + index for index in range(len(samples))]
            window = [key_of(fingerprint, sample, seeds[i] if draws else None) for i, sample in enumerate(samples)]
            batches = list(
                batches_by_length(list(map(measure_length, questions)), predictor.samples_per_batch(questions))
            )
            todo = self.team.agree([batch for batch in batches if any(window[index] not in log for index in batch)])
            done = len(samples) - sum(map(len, todo))
            counts.resumed, counts.predicted = counts.resumed + done, counts.predicted + len(samples) - done
            on_progress(done)
            found: dict[int, Prediction] = {}
            for batch, predictions in self._answer(predictor, questions, seeds, todo):
                found.update(zip(batch, predictions, strict=True))
                log.append((window[index], found[index], samples[index]) for index in batch)
                on_progress(len(batch))
            left = [index for index in range(len(samples)) if index not in found]
            recalled = self.team.agree(
                log.find([window[index] for index in left]) if left and self.team.is_first else []
            )
            found.update(zip(left, recalled, strict=True))
            yield from ((found[index], sample) for index, sample in enumerate(samples))
            keys.extend(window)
            start += len(samples)
        log.put_in_order(keys)

    def _answer(
        self, predictor: Predictor, questions: Sequence[ReadSample], seeds: Sequence[int], todo: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], list[Prediction]]]:
        """The predictions of batches of indices. In each round every process answers one batch."""
        for start in range(0, len(todo), self.team.size):
            batches = todo[start : start + self.team.size]
            mine = batches[self.team.rank] if self.team.rank < len(batches) else []
            answered = self._answer_batch(predictor, [questions[i] for i in mine], [seeds[i] for i in mine])
            yield from zip(batches, self.team.gather(answered)[: len(batches)], strict=True)

    def _answer_batch(
        self, predictor: Predictor, questions: Sequence[ReadSample], seeds: Sequence[int]
    ) -> list[Prediction]:
        """The predictions of a batch; with batch size auto, of parts of it where memory is short."""
        found = list[Prediction]()
        while len(found) < len(questions):
            smaller = replace(predictor, batch_size=min(predictor.batch_size, self.rows))
            part = slice(len(found), len(found) + smaller.samples_per_batch(questions))
            try:
                found += smaller.answer(questions[part], seeds[part])
            except (MemoryError, RuntimeError) as error:
                if self.reading.batch_size != "auto" or smaller.batch_size == 1 or not is_shortage(error):
                    raise
                self.rows = smaller.batch_size // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return found

    def _fingerprint(self, predictor: Predictor) -> str:
        """A digest of the weights and of all settings on which predictions depend."""
        settings = {key: value for key, value in predictor.settings.keywords().items() if key != "seed"}
        parts = [
            dict(self.weights),
            str(self.network.dtype),
            predictor.reader.kind,
            settings,
            predictor.normalization,
            asdict(predictor.likelihood),
            [predictor.reader.max_source, predictor.reader.truncation],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _describe_kind(task: Task, sampling: Sampling, normalization: ScoreNormalization) -> dict[str, Any]:
    """The settings that a task of this kind depends on."""
    if task.kind in LABELLED:
        return {"normalization": normalization}
    return asdict(task.likelihood) if task.kind in MEASURED else sampling.keywords()


def combine_tallies(tallies: Sequence[Tally]) -> dict[str, TaskScore]:
    """The scores of the runs of one task: their means, with intervals over samples and the deviation of the runs."""
    by_seed = [tally.scores() for tally in tallies]
    resampled = [tally.resample() for tally in tallies] if tallies[0].n_units > 1 else []
    found = {}
    for name in by_seed[0]:
        values = [scores[name] for scores in by_seed]
        low, high = None, None
        if resampled:  # the runs draw the same samples
            low, high = interval(np.mean([scores[name] for scores in resampled], axis=0))
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found[name] = TaskScore(statistics.fmean(values), low, high, deviation)
    return found


def _prepare(
    planned: Sequence[PlannedTask], place: DataPlace, *, skip_bad_lines: bool, shuffle: int | None
) -> tuple[list[PreparedTask], list[Refusal]]:
    """The tasks that can be measured, and why others cannot. A single task, or none of several, is an error."""
    prepared, refused = list[PreparedTask](), list[Refusal]()
    for one in planned:
        try:
            prepared.append(prepare_task(one, place, skip_bad_lines=skip_bad_lines, shuffle=shuffle))
        except GmaskError as error:
            if len(planned) == 1:
                raise
            missing = isinstance(error, MissingDataError)
            refused.append(Refusal(name=one.name, reason=str(error), is_missing=missing))
    if not prepared:
        raise GmaskError(f"none of the {len(planned)} tasks can be measured; the first: {refused[0].reason}")
    return prepared, refused


def _check_options(
    batch_size: RowsPerBatch, normalization: ScoreNormalization | None, shots: int | None, seeds: Sequence[int]
) -> None:
    if batch_size != "auto" and batch_size < 1:
        raise GmaskError(f"batch_size must be at least 1, or auto, not {batch_size}")
    if normalization is not None:
        check_normalization(normalization)
    if shots is not None and shots < 0:
        raise GmaskError(f"shots is {shots}: it must be at least 0")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise GmaskError(f"seeds are {', '.join(map(str, seeds)) or 'missing'}: give different numbers from 0")


def _useful_seeds(prepared: PreparedTask, seeds: Sequence[int], sampling: Sampling) -> Sequence[int]:
    """The seeds of which the predictions depend; the first one where nothing is drawn."""
    draws = sampling.temperature > 0 and sampling.seed is None and prepared.task.kind not in LABELLED
    return seeds if draws or prepared.planned.entry.shots else seeds[:1]


def _check_examples(examples: Examples, samples: Sequence[Sample], questions: Sequence[ReadSample]) -> None:
    """Raises `GmaskError` where a text with examples had to be cut: it would lose examples, and nobody would know."""
    if not examples.shots:
        return
    for sample, question in zip(samples, questions, strict=True):
        if question.tokens_cut or question.rounds_left_out:
            lost = f"{question.tokens_cut} tokens" if question.tokens_cut else f"{question.rounds_left_out} rounds"
            error = GmaskError(
                f"with {examples.shots} examples in front the text does not fit into {len(question.context.ids)} "
                f"tokens: {lost} would be lost; take fewer shots"
            )
            raise locate(error, sample)


def _list_notes(prepared: PreparedTask, counts: RunCounts, tally: Tally, total: int, max_source: int) -> Iterator[str]:
    if counts.cut or counts.rounds:
        yield (
            f"of {total} samples {counts.cut} were cut to {max_source} tokens, and {counts.rounds} earlier rounds of "
            "conversations were left out"
        )
    if prepared.left_out:
        yield f"{prepared.left_out} records could not be used and are left out"
    if prepared.has_answers and tally.lacks_positive():
        yield "no sample is of class 1, so F1 is 0 whatever is answered"
    if prepared.labels is not None:
        yield "the labels are shuffled: these are the scores of chance"
    if counts.resumed:
        yield f"{counts.resumed} of {total} predictions are those of an earlier run"


def _hash_weights(model: str, adapter: str | None) -> dict[str, str]:
    return hash_weights(find_folder(model), Path(adapter).expanduser() if adapter else None)
