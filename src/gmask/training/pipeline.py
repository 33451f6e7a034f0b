"""A pipeline: its stages one after the other, each a run of its verb, and the report over them.

A stage that is finished is left alone, one that was interrupted goes on from its own checkpoint. ``stage.json`` in the
folder of a stage says what it was made of, so that a result is never mixed with that of another recipe.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from gmask.checkpoints.convert import merge_folder
from gmask.checkpoints.load import find_folder
from gmask.config import to_yaml
from gmask.errors import GmaskError
from gmask.files import read_object, write_json, write_text
from gmask.recipes.pipeline import PipelineRecipe, PipelineStage, Verb, load_pipeline_recipe
from gmask.recipes.pretraining import base_name
from gmask.tasks.metrics import Rows
from gmask.tasks.records import hash_file, read_records
from gmask.tasks.task import read_task
from gmask.training.accelerator import find_device, make_arguments
from gmask.training.finetune import read_results, run_finetuning
from gmask.training.grpo import run_grpo
from gmask.training.pipeline_report import (
    STAGES_FILE,
    Contestant,
    StageComparison,
    compare_stages,
    draw_stages,
    render_stages,
)
from gmask.training.ppo import run_ppo
from gmask.training.preference_tuning import run_preference_tuning
from gmask.training.reward import run_reward
from gmask.training.rollouts import importing_from, load_function
from gmask.training.run_folder import RESULTS_FILE

PIPELINE_FILE = "pipeline.yaml"
STAGE_FILE = "stage.json"
STAGE_RECIPE_FILE = "stage.yaml"
STAGES_REPORT_FILE = "report.json"

RUNS: Mapping[Verb, Callable[[str], Path]] = {
    "sft": run_finetuning,
    "reward": run_reward,
    "dpo": lambda path: run_preference_tuning(path, "dpo"),
    "kto": lambda path: run_preference_tuning(path, "kto"),
    "grpo": run_grpo,
    "ppo": run_ppo,
}
"""Each makes the run of a recipe, or goes on with it; returns the folder of the weights."""

KEPT_NUMBERS = ("method", "steps", "trainable_parameters")
"""The numbers of a stage's results.json that those of the pipeline repeat."""

PASSES: Mapping[Verb, int] = {"sft": 3, "reward": 6, "dpo": 8, "kto": 5, "grpo": 6, "ppo": 6}
"""Roughly the passes of a sequence through a model for each sample or answer, one backwards counted as two."""


def run_pipeline(recipe_path: str, overrides: Sequence[str] = (), *, resume: bool = True) -> Path:
    """Makes the stages of a recipe that are left, and the report over all; returns the folder ``run.out``.

    Every stage's recipe, data and models are checked before the first one starts.

    Raises:
        GmaskError: a mistake in the recipe; a stage whose folder holds the result of another recipe; whatever the run
            of a stage raises, with the name of the stage.
    """
    recipe = load_pipeline_recipe(recipe_path, overrides)
    return Pipeline(recipe, folders=(Path(recipe_path).parent, Path.cwd()), resume=resume).run()


class Pipeline:
    """One pipeline, in this process; under torchrun each process makes its own, and the first one writes."""

    def __init__(self, recipe: PipelineRecipe, *, folders: Sequence[Path] = (), resume: bool = True) -> None:
        """Checks all stages. Raises `GmaskError`; nothing is written.

        folders: where the modules of reward functions are looked for first.
        """
        self.recipe, self.out, self.folders = recipe, Path(recipe.run.out), folders
        self.stages = recipe.read_stages()
        self.is_main = os.environ.get("RANK", "0") == "0"
        self.console = Console(stderr=True, quiet=not self.is_main)
        if not resume and (self.out / PIPELINE_FILE).is_file():
            raise GmaskError(f"{self.out} holds a pipeline already: resume it, or choose another run.out")
        with importing_from(folders):
            self.work = {stage.name: self._check_data(stage) for stage in self.stages}
            self._check_report_data()
        for stage in self.stages:
            self._check_kept(stage)

    def run(self) -> Path:
        """Makes the stages that are left, and the report; returns the folder."""
        device = find_device(self.recipe.run.device)
        backend = "gloo" if device == "cpu" and os.environ.get("WORLD_SIZE", "1") != "1" else None
        make_arguments(str(self.out), device=device, dtype=torch.float32, ddp_backend=backend)  # joins the processes
        if self.is_main:
            write_text(self.out / PIPELINE_FILE, self.recipe.to_yaml())
        with importing_from(self.folders):
            for number, stage in enumerate(self.stages, 1):
                try:
                    self._run_stage(number, stage)
                except GmaskError as error:
                    raise GmaskError(f"stage {stage.name}: {error}") from error
            comparison = self._compare()
        if self.is_main:
            self._write(comparison)
        self._wait()
        return self.out

    # Before the first stage

    def _check_data(self, stage: PipelineStage) -> float:
        """Reads the data of a stage, and loads its reward function; returns its amount of work, in passes."""
        recipe, data = stage.recipe, stage.recipe.data
        on_bad = (lambda error: None) if getattr(data, "skip_bad_lines", False) else None
        try:
            patterns = [getattr(data, split, None) for split in ("train", "validation", "test")]
            counts = [
                len(read_records(data.resolve(pattern), limit=data.limit, on_bad=on_bad)) if pattern else 0
                for pattern in (one if isinstance(one, str) else None for one in patterns)
            ]
            if function := getattr(recipe.reward, "function", None) if hasattr(recipe, "reward") else None:
                load_function(function, self.folders)
        except GmaskError as error:
            raise GmaskError(f"stages.{stage.name}: {error}") from error
        return PASSES[stage.verb] * count_samples(recipe, counts[0])

    def _check_report_data(self) -> None:
        report = self.recipe.report
        if report is None:
            return
        try:
            read_task({"use": report.task} if isinstance(report.task, str) else report.task)
            read_records(Path(report.root) / report.prompts, limit=1)
            if report.reward.function is not None:
                load_function(report.reward.function, self.folders)
        except GmaskError as error:
            raise GmaskError(f"report: {error}") from error

    def _check_kept(self, stage: PipelineStage) -> None:
        """Raises `GmaskError` if the folder of a stage holds what was made by another recipe, or of other stages."""
        folder, state = self._folder(stage), self._state(stage)
        if not state:
            return
        later = [one.name for one in self.stages if stage.name in self._all_sources(one)]
        remedy = f"remove {folder} to make it anew" + (f" (and those made of it: {', '.join(later)})" if later else "")
        if keys := stage.differing_keys(state["recipe"]):
            raise GmaskError(
                f"stages.{stage.name}: {folder} holds this stage by another recipe: {', '.join(keys)} "
                f"{'differ' if keys[1:] else 'differs'}; set it back, {remedy}, or choose another run.out"
            )
        for source, was in state["made_from"].items():
            found = self._state_of(source).get("sha256")
            if found is not None and found != was:
                raise GmaskError(
                    f"stages.{stage.name}: {folder} was made from another result of {source}: {remedy}, or choose "
                    "another run.out"
                )

    def _all_sources(self, stage: PipelineStage) -> set[str]:
        """The stages that a stage hangs on, also through others."""
        names = [one.name for one in self.stages]
        found = set(stage.sources(names))
        for one in self.stages:
            if one.name in found and one.name != stage.name:
                found |= self._all_sources(one)
        return found

    # A stage

    def _run_stage(self, number: int, stage: PipelineStage) -> None:
        folder, state = self._folder(stage), self._state(stage)
        sources = stage.sources([one.name for one in self.stages])
        self._check_kept(stage)  # once more: now the stages before it are finished
        said = f"stage {number} of {len(self.stages)}: {stage.name}"
        if stage.name != stage.verb:
            said += f" ({stage.verb})"
        if sources:
            said += f", from {', '.join(sources)}"
        if state.get("sha256"):
            self._say(f"{said}: finished before")
            return
        self._say(f"{said}{' goes on' if state else ''}{self._describe_time_left(number)}")
        models = {name: self._model_of(name) for name in sources}
        if self.is_main:
            made_from = {name: self._state_of(name)["sha256"] for name in sources}
            write_json(folder / STAGE_FILE, {"recipe": stage.values(), "made_from": made_from})
            write_text(folder / STAGE_RECIPE_FILE, stage.resolve(models, folder))
        self._wait()
        started = time.monotonic()
        result = RUNS[stage.verb](str(folder / STAGE_RECIPE_FILE))
        seconds = time.monotonic() - started
        if self.is_main:
            state = self._state(stage) | {"result": result.name, "sha256": hash_result(result), "seconds": seconds}
            write_json(folder / STAGE_FILE, state)
        self._wait()
        self._say(f"{said}: finished in {describe_seconds(seconds)}")

    def _model_of(self, name: str) -> Path:
        """The folder of a stage's model. An adapter is merged into its model first, once."""
        stage = next(one for one in self.stages if one.name == name)
        folder = self._folder(stage)
        if not stage.makes_adapter:
            return folder / str(self._state_of(name)["result"])
        merged, base = folder / "merged", self._base_of(stage)
        if self.is_main and not merged.is_dir():
            merge_folder(find_folder(str(base)), folder / str(self._state_of(name)["result"]), merged)
            self._say(f"the adapter of {name} is merged into {base_name(str(base))}, for the stages that begin with it")
        self._wait()
        return merged

    def _base_of(self, stage: PipelineStage) -> str | Path:
        """The model that a stage begins with."""
        name = stage.recipe.model.name
        return self._model_of(name) if name in self.recipe.stages else name

    def _describe_time_left(self, number: int) -> str:
        """The time that the stages from a number on may take, by the pace of those before; empty for the first."""
        names = [stage.name for stage in self.stages]
        seconds = sum(self._state_of(name).get("seconds", 0.0) for name in names[: number - 1])
        done, left = (sum(self.work[name] for name in part) for part in (names[: number - 1], names[number - 1 :]))
        return f"; the stages left may take {describe_seconds(seconds / done * left)}" if seconds and done else ""

    # The report

    def _compare(self) -> StageComparison | None:
        """The report over the stages. It is made anew when its settings or a stage have changed."""
        settings = self.recipe.report
        if settings is None:
            return None
        writers = [stage for stage in self.stages if stage.writes]
        first = next((stage for stage in writers if stage.verb == "sft"), None)
        baseline = settings.baseline or (first.name if first else str(writers[0].recipe.model.name))
        made_of = {
            "settings": yaml.safe_load(to_yaml(settings)),
            "stages": {stage.name: self._state(stage)["sha256"] for stage in self.stages},
        }
        path = self.out / STAGES_REPORT_FILE
        kept = read_object(path, required=False, remedy="delete it, and it is made anew")
        if kept.get("made_of") == made_of:
            self._say("the report is made already")
            return StageComparison.from_dict(kept)
        self._say(f"report: {', '.join(stage.name for stage in writers)} beside {baseline}")
        judge = settings.reward.model
        if judge in self.recipe.stages:
            judge = str(self._model_of(str(judge)))
        comparison = compare_stages(
            settings,
            [self._contestant(baseline), *(self._contestant(one.name) for one in writers if one.name != baseline)],
            judge=judge,
            folders=self.folders,
            run=self.recipe.run,
        )
        if self.is_main:
            write_json(path, {"made_of": made_of, **comparison.to_dict()})
            draw_stages(comparison, self.out / STAGES_FILE)
            write_text(self.out / "report.md", render_stages(comparison))
        return comparison

    def _contestant(self, name: str) -> Contestant:
        """A stage, or a model that is none, for the report."""
        stage = next((one for one in self.stages if one.name == name), None)
        if stage is None:
            return Contestant(name, name)
        folder = self._folder(stage) / str(self._state(stage)["result"])
        if stage.makes_adapter:
            return Contestant(name, str(self._base_of(stage)), str(folder), stage.recipe.model.quantize)
        return Contestant(name, str(folder))

    def _write(self, comparison: StageComparison | None) -> None:
        stages: dict[str, dict[str, Any]] = {}
        for stage in self.stages:
            state, numbers = self._state(stage), read_results(self._folder(stage))
            stages[stage.name] = {
                "verb": stage.verb,
                "from": stage.sources([one.name for one in self.stages]),
                "folder": str(self._folder(stage) / state["result"]),
                "seconds": state["seconds"],
            }
            stages[stage.name] |= {key: numbers[key] for key in KEPT_NUMBERS if key in numbers}
        results = {"stages": stages, "report": None if comparison is None else comparison.to_dict()}
        write_text(self.out / "README.md", self._render_card(stages, comparison))
        write_json(self.out / RESULTS_FILE, results)
        if comparison is not None:
            self.console.print(comparison.win_rows("greedy").to_rich("Greedy answers"))
            self.console.print(comparison.figure_rows("greedy").to_rich(""))
            self.console.print(comparison.general_rows().to_rich("Nats a token on the general set"))
            for line in comparison.warnings():
                self._say(f"warning: {line}")

    def _render_card(self, stages: Mapping[str, Mapping[str, Any]], comparison: StageComparison | None) -> str:
        """The README of the run folder, with the front matter of model hubs."""
        matter = {
            "base_model": base_name(next(s.recipe.model.name for s in self.stages)),
            "library_name": "gmask",
            "tags": ["glm", "pipeline", *dict.fromkeys(stage.verb for stage in self.stages)],
        }
        rows = [
            (name, one["verb"], ", ".join(one["from"]) or base_name(stage.recipe.model.name), stage.recipe.method.name,
             f"[{name}/{Path(one['folder']).name}]({name}/)", describe_seconds(one["seconds"]))
            for stage, (name, one) in zip(self.stages, stages.items(), strict=True)
        ]  # fmt: skip
        parts = [
            f"---\n{yaml.safe_dump(matter, allow_unicode=True, sort_keys=False)}---",
            f"# A pipeline: {', '.join(stages)}",
            Rows(("stage", "verb", "from", "method", "weights", "time"), rows, n_labels=5).to_markdown(),
            "" if comparison is None else comparison.summary(),
            f"```yaml\n{self.recipe.to_yaml().rstrip()}\n```",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    # State

    def _folder(self, stage: PipelineStage) -> Path:
        return self.out / stage.name

    def _state(self, stage: PipelineStage) -> dict[str, Any]:
        return self._state_of(stage.name)

    def _state_of(self, name: str) -> dict[str, Any]:
        """What is known of a stage's result; empty if it was never begun, without ``sha256`` if it is not finished."""
        return read_object(self.out / name / STAGE_FILE, required=False, remedy=f"remove {self.out / name}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _wait(self) -> None:
        """Waits for the other processes."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def count_samples(recipe: Any, records: int) -> float:
    """Samples or answers that a run learns from, for its share of the time; ``records``: of its training data."""
    optimization = recipe.optimization
    if hasattr(optimization, "rollouts"):
        return float(optimization.rollouts * recipe.answers)
    per_step = optimization.batch_size * optimization.accumulation
    return float(optimization.steps * per_step if optimization.steps else optimization.epochs * records)


def hash_result(folder: Path) -> str:
    """The SHA-256 of the weights of a model or an adapter; of several files, of all of them."""
    return "-".join(hash_file(path) for path in sorted(folder.glob("*.safetensors")))


def describe_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
