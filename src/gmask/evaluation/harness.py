"""The scores of a model on a task: `gmask evaluate --task`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console
from tqdm import tqdm

from gmask.checkpoints.load import find_folder, load
from gmask.errors import GmaskError
from gmask.files import write_json
from gmask.generation.predict import predict
from gmask.generation.settings import make_sampling
from gmask.recipes.tuning import TuningRecipe, find_tuning_recipe
from gmask.tasks.metrics import Rows, check_metrics, is_answered, predict_majority, score_predictions
from gmask.tasks.records import Prediction, Sample, TaskKind, Truncation, read_records, write_predictions
from gmask.tasks.task import Task, load_task


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


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The scores of an evaluation, and its settings. Scores are in per cent; without answers there are none."""

    task: str
    kind: TaskKind
    model: str
    adapter: str | None
    data: str
    samples: int
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    majority: Mapping[str, float]  # scores of the label most frequent in these samples; empty where there is none
    versions: Mapping[str, str]


def run_task(
    model: str = "bundled",
    *,
    task: str,
    data: str,
    adapter: str | None = None,
    out: str | None = None,
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
    max_source: int | None = None,
    truncation: Truncation | None = None,
    batch_size: int = 16,
    device: str | None = None,
    tables: bool = True,
) -> TaskReport:
    """Measures a model on the samples of a task.

    For a model or an adapter of ``gmask finetune``, the defaults of ``settings``, ``max_source`` and ``truncation`` are
    those of its recipe.

    Args:
        model: a folder, the name of a published model, or ``"bundled"``.
        task: one of gmask's own, such as ``"superglue/rte"``, or the YAML file of another.
        data: a file of records, or a glob.
        adapter: a folder that was trained for the model.
        out: the folder for ``predictions.jsonl``, which is written before anything is measured, and ``scores.json``.
        limit: the number of records that are read, from the first one.
        settings: of the decoding, by name, if the model writes texts.
        max_source, truncation: as of `predict`.
        batch_size: samples of a batch; the predictions do not depend on it.
        tables: print the scores.

    Raises:
        GmaskError: a task, a file, a column or a metric that cannot be used; samples of which only some have an answer;
            a file that cannot be written.

    Warns:
        UserWarning: texts had to be cut, or rounds of conversations left out.
    """
    console = Console(stderr=not tables)
    make_sampling(settings or {})  # a mistake is reported before a model is fetched
    plan, samples = _read_samples(task, data, limit)
    _check_answers(plan, samples)
    recipe = find_tuning_recipe(Path(adapter).expanduser() if adapter else find_folder(model))
    decoding = make_sampling({**(recipe.decoding_settings if recipe else {}), **(settings or {})})
    limits = _choose_limits(recipe, max_source, truncation)
    network, tokenizer = load(model, adapter=adapter, device=device)
    with tqdm(total=len(samples), unit="sample", disable=not console.is_terminal, leave=False) as bar:

        def ask(samples: Sequence[Sample]) -> Sequence[Prediction]:
            predictions = predict(
                network,
                tokenizer,
                plan.kind,
                samples,
                settings=decoding,
                batch_size=batch_size,
                likelihood=plan.likelihood,
                on_progress=bar.update,
                **limits,
            )
            if out is not None:
                write_predictions(Path(out) / "predictions.jsonl", predictions, samples)
            return predictions

        found = evaluate(plan, samples, predict=ask, known=samples)
    report = TaskReport(
        task=plan.name,
        kind=plan.kind,
        model=model,
        adapter=adapter,
        data=data,
        samples=len(samples),
        settings=decoding.keywords() | limits | {"batch_size": batch_size, "limit": limit},
        scores=found.scores,
        majority=found.majority,
        versions={name: version(name) for name in ("gmask", "torch", "transformers")},
    )
    if out is not None:
        write_json(Path(out) / "scores.json", asdict(report))
    if tables:
        print_scores(report, console)
    return report


def print_scores(report: TaskReport, console: Console) -> None:
    if not report.scores:
        console.print(f"{report.task}: {report.samples} samples without answers, so there is nothing to measure")
        return
    names = ("this model", "majority") if report.majority else ("this model",)
    columns = ("metric", *(f"{name}, %" for name in names))
    rows = [
        (metric, *(f"{scores[metric]:.2f}" for scores in (report.scores, report.majority) if scores))
        for metric in report.scores
    ]
    console.print(Rows(columns, rows).to_rich(f"{report.task}: {report.samples} samples"))


def _read_samples(task: str, data: str, limit: int | None) -> tuple[Task, list[Sample]]:
    plan = load_task(task)
    if not plan.metrics:
        raise GmaskError(f"task {task} names no metrics, so there is nothing to measure: add some, such as exact-match")
    return plan, plan.samples(read_records(data, limit=limit), require_answers=False)


def _choose_limits(recipe: TuningRecipe | None, max_source: int | None, truncation: Truncation | None) -> SourceLimits:
    tuned = recipe.data if recipe else None
    return SourceLimits(
        max_source=max_source or (tuned.max_source if tuned else None),
        truncation=truncation or (tuned.truncation if tuned else "left"),
    )


def _check_answers(plan: Task, samples: Sequence[Sample]) -> None:
    """Raises `GmaskError` if only some of the samples have an answer, or if a metric does not fit."""
    unanswered = [sample for sample in samples if not is_answered(sample, plan.kind)]
    if len(unanswered) == len(samples):
        return
    if unanswered:
        first = unanswered[0]
        raise GmaskError(
            f"{first.path}, line {first.line}: the answer is not known, as it is not of {len(unanswered)} samples of "
            f"{len(samples)}: evaluate those with an answer and those without apart"
        )
    check_metrics(plan.metrics, samples[0], plan.kind)
