"""A run that tunes a model by a recipe: its processes, its folder, its start files and the trained model it leaves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainingArguments, enable_full_determinism, logging, set_seed

from gmask.config import to_yaml
from gmask.errors import GmaskError
from gmask.files import read_object, write_json, write_text, written_folder
from gmask.hardware import describe_training_dtype
from gmask.recipes.tuning import Recipe, differing_keys
from gmask.tasks.task import Task
from gmask.training.accelerator import (
    forward_dtype,
    make_accelerator,
    make_learning_rate,
    make_optimizer,
    named_dtype,
    training_arguments,
)
from gmask.training.examples import BatchOrder, steps_of
from gmask.training.loop import Loop, Schedule
from gmask.training.report import CURVES_FILE
from gmask.training.run_folder import FILES_FILE, LOG_FILE, RECIPE_FILE, RESULTS_FILE, last_checkpoint

TASK_FILE = "task.yaml"


class TuningRun:
    """A run that tunes a model by a recipe and writes it into its folder, ``out``, in this process.

    A subclass reads the data, checks the folder (`_check_folder`) and joins the other processes (`_join_processes`) as
    it is made, so that mistakes are reported before a model is loaded; `train` makes its steps.
    """

    advice = "start again in another run.out, with a lower optimization.learning_rate"
    task: Task | None = None
    args: TrainingArguments

    def __init__(self, recipe: Recipe) -> None:
        self.recipe: Any = recipe
        self.tuning, self.out = recipe.tuning, Path(recipe.run.out)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)

    def _join_processes(self) -> None:
        self.args = training_arguments(self.tuning)
        self.accelerator = make_accelerator(self.args)
        self.device, self.is_main = self.args.device, self.accelerator.is_main_process
        self.console = Console(stderr=True, quiet=not self.is_main)

    def train(self) -> Path:
        """Makes the steps that are left; writes weights and results. Returns the folder of the weights."""
        if self.is_finished:
            self.console.print(f"{self.out} holds this run, finished", highlight=False)
        else:
            self._train()
        return self.export

    def _train(self) -> None:
        raise NotImplementedError

    @property
    def export(self) -> Path:
        """The folder that the trained weights are written to."""
        return self.out / ("adapter" if self.recipe.method.makes_adapter else "model")

    @property
    def is_finished(self) -> bool:
        return self.export.is_dir() and (self.out / RESULTS_FILE).is_file()

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward pass."""
        return forward_dtype(self.tuning, self.args.device.type)

    # The folder

    def _check_folder(self, *, resume: bool) -> None:
        """Raises `GmaskError` if the folder holds a run that this one cannot continue."""
        if not (self.out / RESULTS_FILE).is_file() and not self._has_checkpoint():
            return
        if not resume:
            raise GmaskError(f"{self.out} holds a run already: resume it, or choose another run.out")
        keys = differing_keys(self._read_recipe(self.out / RECIPE_FILE), self.recipe)
        hashes = read_object(self.out / FILES_FILE, required=False, remedy="choose another run.out")
        keys += [f"the content of {name}" for name, sha in self._hashes().items() if hashes.get(name) != sha]
        if keys:
            raise GmaskError(
                f"{self.out} holds a run of another recipe: {', '.join(keys)} {'differ' if keys[1:] else 'differs'}; "
                "resume with that recipe, or choose another run.out"
            )

    def _has_checkpoint(self) -> bool:
        return last_checkpoint(self.out) is not None

    def _read_recipe(self, written: Path) -> Recipe:
        """The recipe of the run that the folder holds."""
        raise NotImplementedError

    def _hashes(self) -> dict[str, str]:
        """SHA-256 of all that the numbers of the run depend on beside the recipe, by its name in errors."""
        raise NotImplementedError

    def _write_start_files(self) -> None:
        """Writes recipe, task and the hashes of the data."""
        write_text(self.out / RECIPE_FILE, self.recipe.to_yaml())
        if self.task is not None:
            write_text(self.out / TASK_FILE, to_yaml(self.task))
        write_json(self.out / FILES_FILE, self._hashes())

    @contextmanager
    def _written_export(self, target: Path | None = None) -> Iterator[Path]:
        """Gives a draft of the folder of the weights to fill; adds card, curves, log, task and recipe."""
        with written_folder(target or self.export, kept="the run, to be resumed,") as folder:
            yield folder
            for name in ("README.md", CURVES_FILE, LOG_FILE):
                (folder / name).write_bytes((self.out / name).read_bytes())
            if self.task is not None:
                (folder / TASK_FILE).write_text(to_yaml(self.task), "utf-8")
            (folder / RECIPE_FILE).write_text(self.recipe.portable().to_yaml(), "utf-8")

    # The steps of a run on the house's loop

    def _show_dtype(self) -> None:
        line = describe_training_dtype(named_dtype(self.tuning, self.device.type), self.device)
        self.console.print(line, highlight=False, markup=False)

    def _seed(self) -> None:
        logging.set_verbosity(self.args.get_process_log_level())
        (enable_full_determinism if self.recipe.run.deterministic else set_seed)(self.recipe.run.seed)

    def _count_steps(self, samples: int) -> int:
        """The steps that the recipe gives so many samples."""
        settings = self.recipe.optimization
        per_step = settings.batch_size * settings.accumulation
        return settings.steps or steps_of(settings.epochs or 0, samples, samples_per_step=per_step)

    def _make_order(self, lengths: Sequence[int], *, steps: int) -> BatchOrder:
        """The order of samples of these lengths."""
        settings = self.recipe.optimization
        return BatchOrder(
            lengths,
            steps=steps,
            batch_size=settings.batch_size,
            accumulation=settings.accumulation,
            seed=self.recipe.run.seed,
            length_grouped=settings.length_grouped,
            processes=self.accelerator.num_processes,
            process=self.accelerator.process_index,
        )

    def _make_loop(self, model: Any, *, steps: int, validates: bool) -> Loop:
        """The loop of a run that validates and saves as its recipe says, each tenth of it by default."""
        settings = self.recipe.optimization
        if self.args.report_to:
            self.accelerator.init_trackers("gmask", config=self.recipe.to_dict())
        self.learning_rate = make_learning_rate(self.args, steps=steps)
        run: Any = self
        return Loop(
            run,
            model,
            [make_optimizer(model, self.args, steps=steps)],
            accelerator=self.accelerator,
            out=self.out,
            schedule=Schedule(
                steps=steps,
                validate_every=(settings.evaluate_every or max(1, steps // 10)) if validates else steps,
                log_every=self.recipe.run.log_every,
                save_every=settings.save_every or max(1, min(100, steps // 10)),
                keep_last=settings.keep_last,
            ),
            clip_norm=settings.clip_norm,
            empty_cache_every=self.args.torch_empty_cache_steps,
        )
