"""Fine-tuning by a recipe, on the loop of `gmask.training.loop`; with cross-validation where the recipe asks for it."""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import enable_full_determinism, logging, set_seed

from gmask.config import to_yaml
from gmask.errors import GmaskError
from gmask.estimation.training import describe_memory
from gmask.evaluation.harness import Evaluation
from gmask.files import read_object, write_json, write_text, written_folder
from gmask.generation.encoding import PROMPT
from gmask.generation.settings import make_sampling
from gmask.hardware import describe_training_dtype
from gmask.recipes.tuning import USUAL_RATES, TuningRecipe, differing_keys, hint_learning_rate, load_tuning_recipe
from gmask.tasks.metrics import LOWER_IS_BETTER, Rows
from gmask.tasks.records import Sample, hash_file, write_predictions
from gmask.tasks.task import Task, read_task
from gmask.training.accelerator import (
    forward_dtype,
    make_accelerator,
    make_learning_rate,
    make_optimizer,
    named_dtype,
    training_arguments,
)
from gmask.training.examples import Batch, BatchOrder, Splits, read_splits, steps_of
from gmask.training.loop import Loop, Schedule, StepData, StepResult, unsharded
from gmask.training.losses import EncodedSamples, TaskObjective, count_items, examples_of
from gmask.training.methods import choose_trainable, load_tuned_model, peak_memory, save_tuned_model
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
    FILES_FILE,
    LOG_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    START_FILE,
    TRAINED_FILE,
    TuningRun,
    last_checkpoint,
    read_metrics,
)
from gmask.training.validation import (
    Forgetting,
    GeneralScores,
    Validator,
    read_general_scores,
    read_general_set,
    score_general_set,
)

TASK_FILE = "task.yaml"
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
    advice = "start again in another run.out, with a lower optimization.learning_rate"

    def __init__(self, recipe: TuningRecipe, *, resume: bool = True) -> None:
        """Reads recipe, task and samples, and checks the folder: mistakes are reported before a model is loaded."""
        rate = recipe.optimization.learning_rate or USUAL_RATES[recipe.method.name]
        optimization = dataclasses.replace(recipe.optimization, learning_rate=rate)
        self.recipe = dataclasses.replace(recipe, optimization=optimization)
        self.out = Path(recipe.run.out)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        self.task: Task = read_task({"use": recipe.task} if isinstance(recipe.task, str) else recipe.task)
        self._check_prompts()
        self.settings = make_sampling(recipe.decoding_settings)
        self.splits: Splits = read_splits(self.task, recipe.data, seed=recipe.run.seed)
        self._check_folder(resume=resume)
        self.args = training_arguments(self.recipe)
        self.accelerator = make_accelerator(self.args)
        self.device = self.args.device
        self.is_main = self.accelerator.is_main_process
        self.console = Console(stderr=True, quiet=not self.is_main)

    def train(self) -> Path:
        """Makes the steps that are left; writes weights, metrics, predictions and the model card."""
        if self.is_finished:
            self.console.print(f"{self.out} holds this run, finished", highlight=False)
            return self.export
        self.console.print(
            describe_training_dtype(named_dtype(self.recipe, self.device.type), self.device),
            highlight=False,
            markup=False,
        )
        self.model, self.tokenizer = load_tuned_model(self.recipe, self.task, self.device)
        steps = self._prepare()
        if self.is_main:
            self._write_start()
        began = time.monotonic()
        before = self._score_before()
        self.measured_seconds = time.monotonic() - began
        self.loop = self._make_loop(steps)
        self.loop.restore()
        self.loop.fit()
        self.loop.load_best()
        self._report(before)
        return self.export

    def _check_prompts(self) -> None:
        """Raises `GmaskError` for a template with trained vectors if the method has none: it would be read as text."""
        marked = PROMPT in f"{self.task.template}{self.task.plain_template or ''}"
        if marked and self.recipe.method.name != "p-tuning":
            raise GmaskError(
                f"the template of {self.task.name} has {PROMPT}, a vector that p-tuning trains: set method.name to "
                f"p-tuning, not {self.recipe.method.name}, or take it out"
            )

    def _differing_keys(self, written: Path) -> list[str]:
        return differing_keys(load_tuning_recipe(written), self.recipe)

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
        per_step = optimization.batch_size * optimization.accumulation
        steps = optimization.steps or steps_of(
            optimization.epochs or 0, len(self.splits.train), samples_per_step=per_step
        )
        self.trainable = choose_trainable(self.model, recipe, steps=steps)
        self.objective = TaskObjective(self.tokenizer, self.model.config, self.task.kind, recipe.data)
        self.encoded = self.objective.encode(self.splits.train)
        if optimization.steps is None:  # now that it is known how many rows the samples make
            steps = steps_of(optimization.epochs or 0, len(self.encoded.items), samples_per_step=per_step)
        self.truncated = self.objective.encoder.truncated
        self.validator = Validator(
            self.model,
            self.tokenizer,
            self.task,
            recipe.data,
            settings=self.settings,
            batch_size=optimization.batch_size,
            accelerator=self.accelerator,
            dtype=forward_dtype(recipe, self.device.type),
        )
        self._show_start(self.objective, self.encoded, steps)
        self.order = BatchOrder(
            self.encoded.lengths,
            steps=steps,
            batch_size=optimization.batch_size,
            accumulation=optimization.accumulation,
            seed=recipe.run.seed,
            length_grouped=optimization.length_grouped,
            processes=self.accelerator.num_processes,
            process=self.accelerator.process_index,
        )
        self.learning_rate = make_learning_rate(self.args, steps=steps)
        self.validation = self.splits.validation[: recipe.data.validation_limit]
        self.evaluate_every = optimization.evaluate_every or max(1, steps // 10)
        logging.set_verbosity(self.args.get_process_log_level())
        (enable_full_determinism if recipe.run.deterministic else set_seed)(recipe.run.seed)
        return steps

    def _make_loop(self, steps: int) -> Loop:
        optimization = self.recipe.optimization
        if self.args.report_to:
            self.accelerator.init_trackers("gmask", config=self.recipe.to_dict())
        return Loop(
            self,
            self.model,
            [make_optimizer(self.model, self.args, steps=steps)],
            accelerator=self.accelerator,
            out=self.out,
            schedule=Schedule(
                steps=steps,
                validate_every=self.evaluate_every if self.validation else steps,
                log_every=self.recipe.run.log_every,
                save_every=optimization.save_every or max(1, min(100, steps // 10)),
                keep_last=optimization.keep_last,
            ),
            clip_norm=optimization.clip_norm,
            empty_cache_every=self.args.torch_empty_cache_steps,
        )

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
        evaluations = (now.step - (now.best_step or 0)) / self.evaluate_every
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
        write_text(self.out / RECIPE_FILE, self.recipe.to_yaml())
        write_text(self.out / TASK_FILE, to_yaml(self.task))
        write_json(self.out / FILES_FILE, self._hashes())
        with (self.out / START_FILE).open("w", encoding="utf-8") as file:
            self.summary.show(Console(file=file, width=120), self.tokenizer)

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
        with written_folder(self.export, kept="the run, to be resumed,") as folder:
            self._fill_export(folder)
        write_json(self.out / RESULTS_FILE, results.to_dict())
        if found:
            self.console.print(metric_rows(results).to_rich(f"{self.task.name}, {self.recipe.method.name}"))
        if advice := results.advise_evaluations(now.validation_seconds):
            self.console.print(advice, highlight=False, markup=False, soft_wrap=True)

    def _fill_export(self, folder: Path) -> None:
        dtype = forward_dtype(self.recipe, self.device.type)
        save_tuned_model(self.model, self.tokenizer, self.recipe, folder, dtype=dtype)
        for name in ("README.md", CURVES_FILE, LOG_FILE):
            (folder / name).write_bytes((self.out / name).read_bytes())
        (folder / TASK_FILE).write_text(to_yaml(self.task), "utf-8")
        (folder / RECIPE_FILE).write_text(self.recipe.portable().to_yaml(), "utf-8")


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
