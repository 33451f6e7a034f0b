"""Fine-tuning by a recipe, on the loop of `gmask.training.loop`; with cross-validation where the recipe asks for it."""

import dataclasses
import io
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gmask.errors import GmaskError
from gmask.estimation.training import describe_memory
from gmask.evaluation.harness import Evaluation
from gmask.files import read_object, write_json, write_text
from gmask.generation.encoding import PROMPT
from gmask.generation.settings import make_sampling
from gmask.recipes.tuning import TuningRecipe, hint_learning_rate, load_tuning_recipe, with_usual_rate
from gmask.tasks.metrics import LOWER_IS_BETTER, Rows
from gmask.tasks.records import Sample, hash_file, write_predictions
from gmask.tasks.task import Task, read_task
from gmask.training.examples import Batch, Splits, read_splits
from gmask.training.loop import StepData, StepResult
from gmask.training.losses import EncodedSamples, TaskObjective, count_items, examples_of
from gmask.training.methods import choose_trainable, load_tuned_model, peak_memory, save_tuned_model
from gmask.training.parallel import unsharded
from gmask.training.report import (
    CURVES_FILE,
    StartSummary,
    TuningResults,
    draw_curves,
    format_metric,
    metric_rows,
    render_tuning_card,
)
from gmask.training.run_folder import (
    LOG_FILE,
    RESULTS_FILE,
    START_FILE,
    TRAINED_FILE,
    last_checkpoint,
    read_metrics,
)
from gmask.training.tuning_run import TuningRun
from gmask.training.validation import (
    COSTS,
    Forgetting,
    GeneralScores,
    Validator,
    read_general_scores,
    read_general_set,
    score_general_set,
)

GENERAL_BEFORE_FILE = "general-before.json"


def run_finetuning(recipe_path: str, overrides: Sequence[str] = (), *, resume: bool = True) -> Path:
    """Tunes a model by a recipe, resuming from the last checkpoint; returns the folder of the trained weights.

    That folder is ``model`` or ``adapter`` in ``run.out``; of a cross-validation, ``run.out`` itself. The metrics are
    written to ``run.out/results.json``.

    Raises:
        GmaskError: a mistake in the recipe or the samples, a run of another recipe or of another version of gmask in
            the folder, a full disk, a loss that is not finite.
    """
    recipe = load_tuning_recipe(recipe_path, overrides)
    if recipe.data.folds is not None and recipe.data.fold is None:
        return _run_folds(recipe, resume=resume)
    return Finetuning(recipe, resume=resume).train()


def read_results(folder: Path) -> dict[str, Any]:
    """The content of a run's results.json, by the folder that `run_finetuning` returned.

    Raises:
        GmaskError: it is missing or damaged.
    """
    path = folder / RESULTS_FILE
    return read_object(path if path.is_file() else folder.parent / RESULTS_FILE, remedy="delete it and run again")


def _run_folds(recipe: TuningRecipe, *, resume: bool) -> Path:
    """Makes one run for each fold, and writes the mean and deviation of their metrics."""
    out = Path(recipe.run.out)
    assert recipe.data.folds is not None
    runs = []
    for fold in range(1, recipe.data.folds + 1):
        run = Finetuning(recipe.for_fold(fold), resume=resume)
        run.train()
        runs.append(read_results(run.out))
    summary = summarize_folds(runs)
    if run.is_main:
        write_json(out / RESULTS_FILE, summary)
    run.console.print(fold_rows(summary).to_rich(f"{run.task.name}, {recipe.method.name}, {len(runs)} folds"))
    return out


class Finetuning(TuningRun):
    """One run of a recipe, in this process; under torchrun each process makes its own."""

    recipe: TuningRecipe

    name, unit = "tuning", "samples"

    task: Task

    def __init__(self, recipe: TuningRecipe, *, resume: bool = True) -> None:
        """Reads recipe, task and samples, and checks the folder."""
        super().__init__(with_usual_rate(recipe))
        self.task = read_task({"use": recipe.task} if isinstance(recipe.task, str) else recipe.task)
        self._check_prompts()
        self.settings = make_sampling(recipe.decoding_settings)
        self.splits: Splits = read_splits(self.task, recipe.data, seed=recipe.run.seed)
        self._check_folder(resume=resume)
        self._join_processes()

    def _train(self) -> None:
        """Makes the steps that are left; writes weights, metrics, predictions and the model card."""
        self._show_dtype()
        self.model, self.tokenizer = load_tuned_model(self.recipe, self.task, self.device)
        steps = self._prepare()
        if self.is_main:
            self._write_start()
        began = time.monotonic()
        before = self._score_before()
        self.measured_seconds = time.monotonic() - began
        self.loop = self._make_loop(
            self.model, steps=steps, validate_every=self.evaluate_every if self.validation else steps
        )
        self.loop.restore()
        self.loop.fit()
        self.loop.load_best()
        self._report(before)

    def _check_prompts(self) -> None:
        """Raises `GmaskError` for a template with trained vectors if the method has none: it would be read as text."""
        marked = PROMPT in f"{self.task.template}{self.task.plain_template or ''}"
        if marked and self.recipe.method.name != "p-tuning":
            raise GmaskError(
                f"the template of {self.task.name} has {PROMPT}, a vector that p-tuning trains: set method.name to "
                f"p-tuning, not {self.recipe.method.name}, or take it out"
            )

    def _read_recipe(self, written: Path) -> TuningRecipe:
        return load_tuning_recipe(written)

    def _hashes(self) -> dict[str, str]:
        """SHA-256 of all that the numbers of the run depend on beside the recipe, by its name in errors."""
        hashes = {f"{file.split} file {file.name}": file.sha256 for file in self.splits.files}
        if isinstance(self.recipe.task, str):  # a name or a file, whose content the recipe does not hold
            hashes[f"task {self.task.name}"] = self.task.fingerprint()
        if texts := self.recipe.forgetting.texts:
            hashes["forgetting.texts"] = hash_file(Path(self.recipe.data.resolve(texts)))
        return hashes

    def _prepare(self) -> int:
        """Prepares model, samples and schedule, and prints the summary of the run; returns the number of steps."""
        recipe, optimization = self.recipe, self.recipe.optimization
        steps = self._count_steps(len(self.splits.train))
        self.trainable = choose_trainable(self.model, recipe, steps=steps)
        self.objective = TaskObjective(self.tokenizer, self.model.config, self.task.kind, recipe.data)
        self.encoded = self.objective.encode(self.splits.train)
        steps = self._count_steps(len(self.encoded.items))  # now that it is known how many rows the samples make
        self.truncated = self.objective.encoder.truncated
        self.validator = Validator(
            self.model,
            self.tokenizer,
            self.task,
            recipe.data,
            settings=self.settings,
            batch_size=optimization.batch_size,
            accelerator=self.accelerator,
            dtype=self.dtype,
        )
        self._show_start(self.objective, self.encoded, steps)
        self.order = self._make_order(self.encoded.lengths, steps=steps)
        self.evaluate_every, scored = self._plan_evaluations(
            len(self.splits.validation), steps=steps, cost=COSTS.get(self.task.kind, 1)
        )
        self.validation = self.splits.validation[:scored]
        self._seed()
        return steps

    # The protocol `Run` of the loop

    def data(self, step: int) -> Iterator[StepData]:
        passes = iter(
            DataLoader(
                range(len(self.encoded.items)),  # type: ignore[arg-type]  # indices: `_collate` takes the items
                batch_sampler=self.order.after(step),
                collate_fn=self._collate,
                pin_memory=self.args.dataloader_pin_memory and self.device.type == "cuda",
            )
        )
        return (self._join(list(islice(passes, self.order.passes))) for _ in range(step, self.order.steps))

    def _collate(self, numbers: list[int]) -> tuple[list[int], Batch]:
        return numbers, self.objective.collate([self.encoded.items[number] for number in numbers])

    def _join(self, passes: Sequence[tuple[list[int], Batch]]) -> StepData:
        batches = [batch for _, batch in passes]
        return StepData(
            batches,
            numbers=[numbers for numbers, _ in passes],
            labelled=sum(count_items(batch) for batch in batches),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        total, _ = self.objective.loss(model, batch)
        return total

    def record(self, result: StepResult) -> dict[str, Any]:
        now, samples = self.loop.progress, self.order.samples_per_step
        return {
            "step": now.step,
            "epoch": now.step * samples / len(self.encoded.items),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "supervised_tokens": result.labelled,
            "all_supervised_tokens": now.labelled,
            "samples_per_second": samples / result.seconds,
            "seconds": now.seconds,
        }

    def validate(self) -> dict[str, Any]:
        """Loss and metrics. Keeps the weights if they are the best so far, and decides on an early stop."""
        if not self.validation:
            return {}
        scores = self.validator.validate(self.validation).scores
        now, value, early_stop = self.loop.progress, scores[self.task.best], self.recipe.optimization.early_stop
        sign = -1 if self.task.best in LOWER_IS_BETTER else 1
        if now.best_value is None or sign * value > sign * now.best_value:
            self.loop.save_best(value)
        evaluations = (now.step - (now.best_step or 0)) / self.loop.schedule.validate_every
        now.stopped = early_stop is not None and evaluations >= early_stop
        return {"validation": {"validation": dict(scores)}}

    def describe(self, data: StepData) -> str:
        names = [self.encoded.describe(number) for numbers in data.numbers for number in numbers]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"({', '.join(names[:8])}{more})"

    def save_weights(self, folder: Path) -> None:
        save_file(self.loop.trained_weights(), folder / TRAINED_FILE)

    def state(self) -> dict[str, Any]:
        return {}

    # Before the first step

    def _show_start(self, objective: TaskObjective, encoded: EncodedSamples, steps: int) -> None:
        recipe = self.recipe
        rate = recipe.optimization.learning_rate
        assert rate is not None
        memory = describe_memory(
            recipe,
            self.model,
            length=max(encoded.lengths),
            labelled=max(encoded.labelled),
            processes=self.accelerator.num_processes,
            device=self.device,
            dtype=self.validator.dtype,
        )
        self.summary = StartSummary(
            recipe=recipe,
            task=self.task,
            example=examples_of(encoded.items[0])[0],
            sop=objective.encoder.reader.special.sop,
            trainable=self.trainable,
            truncated=self.truncated,
            samples=len(self.splits.train),
            dropped=self.splits.dropped,
            steps=steps,
            processes=self.accelerator.num_processes,
            advice=[line for line in (memory, hint_learning_rate(recipe.method.name, rate)) if line],
        )
        self.summary.show(self.console, self.tokenizer)

    def _write_start(self) -> None:
        self._write_start_files()
        file = io.StringIO()
        self.summary.show(Console(file=file, width=120), self.tokenizer)
        write_text(self.out / START_FILE, file.getvalue())

    # What a chat model forgets

    @property
    def _watches_forgetting(self) -> bool:
        return self.task.kind == "chat" and not self.recipe.forgetting.skip

    def _score_general(self) -> GeneralScores:
        general = read_general_set(self.recipe.forgetting, self.recipe.data.resolve)
        return score_general_set(general, self.validator, answers=self.recipe.forgetting.answers)

    def _score_before(self) -> GeneralScores | None:
        """The scores of the model before its first step; a resumed run reads them from a file."""
        path = self.out / GENERAL_BEFORE_FILE
        if not self._watches_forgetting:
            return None
        if last_checkpoint(self.out) is not None and path.is_file():
            return read_general_scores(path)
        scores = self._score_general()
        if self.is_main:
            write_json(path, dataclasses.asdict(scores), indent=None)
        return scores

    def _compare(self, before: GeneralScores) -> Forgetting:
        general = read_general_set(self.recipe.forgetting, self.recipe.data.resolve)
        prompts = [sample.text for sample in general.prompts[: self.recipe.forgetting.answers]]
        return Forgetting(prompts, before, self._score_general())

    # After the last step

    def _report(self, before: GeneralScores | None) -> None:
        """Validates the best weights on all samples, in all processes; the first process writes the results."""
        began = time.monotonic()
        found: dict[str, Evaluation] = {}
        for split, samples in (("validation", self.splits.validation), ("test", self.splits.test)):
            if samples:
                found[split] = self.validator.validate(samples, known=self.splits.train)
                for cut in self.validator.cuts:
                    self.console.print(f"{split}: {cut}", highlight=False, soft_wrap=True)
        forgetting = None if before is None else self._compare(before)
        self.measured_seconds += time.monotonic() - began
        with unsharded(self.model):
            if self.is_main:
                self._write_results(found, forgetting)
        self.accelerator.wait_for_everyone()

    def _write_results(self, found: Mapping[str, Evaluation], forgetting: Forgetting | None) -> None:
        """Writes reports, predictions and weights, and at the end results.json, which marks the run as finished."""
        cut, now = self.truncated, self.loop.progress
        results = TuningResults(
            recipe=self.recipe,
            task=self.task,
            files=self.splits.files,
            trainable_parameters=self.trainable.trainable,
            parameters=self.trainable.total,
            records=read_metrics(self.out / LOG_FILE),
            metrics={split: one.scores for split, one in found.items()},
            majority={split: one.majority for split, one in found.items()},
            best_step=now.best_step,
            stopped_early=now.stopped,
            truncated={"cut": cut.sources, "shortened": cut.targets, "dropped": self.splits.dropped},
            evaluation_seconds=now.validation_seconds + self.measured_seconds,
            peak_memory_bytes=peak_memory(self.device),
            forgetting=forgetting,
        )
        if found:
            last = list(found)[-1]
            samples: Sequence[Sample] = self.splits.test if last == "test" else self.splits.validation
            if found[last].predictions:
                write_predictions(self.out / "predictions.jsonl", found[last].predictions, samples)
        if forgetting:
            write_text(self.out / "forgetting.md", forgetting.to_markdown())
        draw_curves(results.records, self.out / CURVES_FILE)
        write_text(self.out / "README.md", render_tuning_card(results))
        with self._written_export() as folder:
            save_tuned_model(self.model, self.tokenizer, self.recipe, folder, dtype=self.dtype)
        write_json(self.out / RESULTS_FILE, results.to_dict())
        if found:
            self.console.print(metric_rows(results).to_rich(f"{self.task.name}, {self.recipe.method.name}"))
        if advice := results.advise_evaluations(now.validation_seconds):
            self.console.print(advice, highlight=False, markup=False, soft_wrap=True)


SAME_IN_FOLDS = ("task", "method", "seed", "trainable_parameters", "parameters")
"""Keys of results.json that are the same for all folds."""


def summarize_folds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of a cross-validation: means and deviations, and the results of its folds under ``runs``."""
    return {
        **{name: runs[0][name] for name in SAME_IN_FOLDS},
        "folds": len(runs),
        "metrics": _by_split([run["metrics"] for run in runs]),
        "majority": _by_split([run["majority"] for run in runs]),
        "seconds": sum(run["seconds"] for run in runs),
        "evaluation_seconds": sum(run["evaluation_seconds"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "runs": list(runs),
    }


def fold_rows(summary: Mapping[str, Any]) -> Rows:
    """A table of the mean and deviation of every metric over the folds, beside those of the majority baseline."""
    rows = []
    for split, metrics in summary["metrics"].items():
        baseline = summary["majority"].get(split, {})
        for name, found in metrics.items():
            rows.append((split, name, _format(name, found), _format(name, baseline.get(name))))
    return Rows(("split", "metric", "this model", "majority"), rows, n_labels=2)


def summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample deviation of each metric over several runs."""
    return {
        name: {
            "mean": statistics.mean(one[name] for one in metrics),
            "deviation": statistics.stdev(one[name] for one in metrics) if len(metrics) > 1 else 0.0,
        }
        for name in metrics[0]
    }


def _by_split(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    return {split: summarize([one[split] for one in found]) for split in found[0]}


def _format(name: str, found: Mapping[str, float] | None) -> str:
    return "-" if found is None else " ± ".join(format_metric(name, found[key]) for key in ("mean", "deviation"))
