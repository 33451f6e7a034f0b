"""Our tasks as tasks of lm-eval: a YAML for each, and its samples as it asks them of a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gmask.errors import GmaskError
from gmask.evaluation.preparation import DataPlace, PreparedTask, find_place, prepare_task
from gmask.evaluation.results import Refusal
from gmask.evaluation.suite import PlannedTask, folder_of, plan_tasks
from gmask.files import write_text
from gmask.tasks.metrics import TEXT_METRICS, score_predictions
from gmask.tasks.records import Prediction, Sample, TaskKind
from gmask.tasks.sources import MissingDataError
from gmask.tasks.templates import count_blanks, split_final_blank

OUTPUT_TYPES: Mapping[TaskKind, str] = {
    "cloze": "multiple_choice",
    "multiple-choice": "multiple_choice",
    "likelihood": "loglikelihood",
    "language-model": "loglikelihood_rolling",
    "seq2seq": "generate_until",
}

METRIC_NAMES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "multiple_choice": {"accuracy": ("acc", "mean"), "f1": ("f1", "f1")},
    "loglikelihood": {"accuracy": ("acc", "mean"), "nats": ("perplexity", "perplexity")},
    "loglikelihood_rolling": {"word-perplexity": ("word_perplexity", "weighted_perplexity")},
    "generate_until": {},
}
"""lm-eval's metrics, and how it aggregates them, by its type of output and our metrics. Its perplexity is exp(nats)."""


@dataclass(frozen=True, slots=True)
class Export:
    """The tasks that were written, by lm-eval's names, and those that it cannot do."""

    written: Mapping[str, Path]
    refused: Sequence[Refusal]


def export_tasks(
    out: str,
    *,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    data: str | None = None,
    train: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> Export:
    """Writes tasks for lm-eval, which reads them with ``--include_path OUT``.

    The samples are written as they are asked: by our readers and templates, with the examples in front that the seed
    draws. Where the blank ends the text, any model of lm-eval can be asked; else only ``gmask`` knows what a blank is.

    Args:
        out: a folder; of each task ``NAME.yaml`` and ``NAME.jsonl`` are written.
        tasks, suite, data, train, limit, shots: as of `gmask.evaluation.harness.run_tasks`.

    Raises:
        GmaskError: as of `run_tasks`; the one task, or each of several, cannot be written.
    """
    planned = plan_tasks(tasks, suite, limit=limit, shots=shots)
    place, folder = find_place(planned, data, train), Path(out).expanduser()
    written, refused = dict[str, Path](), list[Refusal]()
    for one in planned:
        try:
            name = f"gmask_{'_'.join(folder_of(one.name).parts)}"
            written[name] = _export(one, place, folder, name, seed)
        except GmaskError as error:
            if len(planned) == 1:
                raise
            refused.append(Refusal(name=one.name, reason=str(error), is_missing=isinstance(error, MissingDataError)))
    if not written:
        raise GmaskError(f"none of the {len(planned)} tasks can be written; the first: {refused[0].reason}")
    return Export(written, refused)


def _export(planned: PlannedTask, place: DataPlace, folder: Path, name: str, seed: int) -> Path:
    task = planned.task
    output_type = OUTPUT_TYPES.get(task.kind)
    if output_type is None:
        raise GmaskError(f"{planned.name}: lm-eval has no tasks of the kind {task.kind}")
    metrics = _list_metrics(planned, output_type)
    prepared = prepare_task(planned, place)
    if not prepared.has_answers:
        raise GmaskError(f"{planned.name}: the samples have no answers, so there is nothing to measure")
    lines = [json.dumps(row, ensure_ascii=False) for row in _list_rows(prepared, seed)]
    path = folder / f"{name}.jsonl"
    write_text(path, "\n".join(lines) + "\n")
    values: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "" if output_type == "loglikelihood_rolling" else "text",
        "doc_to_target": "label" if output_type == "multiple_choice" else "target",
        "target_delimiter": "",
        "num_fewshot": 0,  # the examples are in the text
        "metric_list": metrics,
    }
    if output_type == "multiple_choice":
        values["doc_to_choice"] = "choices"
    if output_type == "generate_until":
        values["generation_kwargs"] = _list_settings(planned)
    values["metadata"] = {"version": 1.0, "model_args": _list_arguments(planned)}
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    if output_type in ("loglikelihood_rolling", "generate_until"):
        function = "measure_document" if output_type == "loglikelihood_rolling" else "measure_text"
        text += f"process_results: !function {__name__}.{function}\n"
    write_text(folder / f"{name}.yaml", f"# {planned.name} of gmask\n{text}")
    return folder / f"{name}.yaml"


def _list_metrics(planned: PlannedTask, output_type: str) -> list[dict[str, Any]]:
    if output_type == "generate_until":
        known = {metric: (metric, "mean") for metric in TEXT_METRICS if metric != "sacrebleu"}
    else:
        known = dict(METRIC_NAMES[output_type])
    if planned.entry.normalization == "unconditional" and "accuracy" in known:
        known["accuracy"] = ("acc_mutual_info", "mean")
    found = dict(known[metric] for metric in planned.task.metrics if metric in known)
    if not found:
        ours = ", ".join(planned.task.metrics)
        raise GmaskError(f"{planned.name}: lm-eval has none of its metrics: {ours}")
    return [
        {"metric": name, "aggregation": how, "higher_is_better": "perplexity" not in name}
        for name, how in found.items()
    ]


def _list_rows(prepared: PreparedTask, seed: int) -> Iterator[dict[str, Any]]:
    task, examples = prepared.task, prepared.draw_examples(seed)
    for sample in map(examples.put_before, prepared.stream()):
        if task.kind == "language-model":
            yield {"target": sample.answers[0], "words": sample.words}
            continue
        # A text that ends with the model's own blank is asked as lm-eval asks: what follows?
        before, blank = split_final_blank(sample.text) or (sample.text, None)
        usual = "[gMASK]" if task.kind == "seq2seq" else "[MASK]"
        row: dict[str, Any] = {"text": before if blank == usual and not count_blanks(before) else sample.text}
        if task.kind in ("cloze", "multiple-choice"):
            row |= {"choices": list(sample.answers), "label": sample.label}
        else:
            row["target"] = sample.answers[0] if sample.answers else sample.references[0]
        if task.kind == "seq2seq":
            row |= {"references": list(sample.references), "metrics": list(task.metrics), "language": task.language}
        yield row


def _list_settings(planned: PlannedTask) -> dict[str, Any]:
    names = {"max_tokens": "max_gen_toks", "stop": "until", "no_repeat_ngram": "no_repeat_ngram_size"}
    given = dict(planned.entry.decoding)
    stop = given.pop("stop", ())
    settings = {names.get(key, key): value for key, value in {"max_tokens": 64, **given}.items()}
    draws = given.get("temperature", 0) > 0
    return {**settings, "until": [stop] if isinstance(stop, str) else list(stop), "do_sample": draws}


def _list_arguments(planned: PlannedTask) -> str:
    """The arguments with which the model ``gmask`` does what the task says; what is default is left out."""
    task = planned.task
    if task.kind not in ("likelihood", "language-model"):
        return ""
    found: dict[str, Any] = {"direction": task.direction, "window": task.window, "stride": task.stride}
    plain = {"direction": "both", "window": None, "stride": None}
    return ",".join(f"{name}={value}" for name, value in found.items() if value != plain[name])


# lm-eval calls these with a row and what the model answered


def measure_document(doc: Mapping[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """The log-probability of a document, and the words that it is divided by: all but the first, as published."""
    (logprob,) = results
    return {"word_perplexity": (logprob, doc["words"] - 1)}


def measure_text(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The metrics of one written text, in per cent."""
    sample = Sample(answers=(doc["target"],), references=tuple(doc["references"] or ()))
    metrics = [metric for metric in doc["metrics"] if metric in TEXT_METRICS and metric != "sacrebleu"]
    return score_predictions(metrics, [Prediction(texts=(results[0],))], [sample], language=doc["language"])
