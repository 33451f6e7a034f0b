"""A run that learns from rewards of answers that it samples itself: prompts, rewards, answers before and after."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmask.checkpoints.load import load
from gmask.errors import GmaskError
from gmask.files import write_json, write_text
from gmask.generation.predict import SampleReader
from gmask.generation.settings import Sampling
from gmask.recipes.tuning import RunRecipe, hint_learning_rate
from gmask.tasks.records import Sample, hash_file
from gmask.tasks.task import Task, read_task
from gmask.training.methods import TrainableTable, load_tuned_model, peak_memory, save_tuned_model
from gmask.training.report import CURVES_FILE
from gmask.training.rollout_report import (
    Answered,
    RolloutResults,
    draw_reward_curves,
    render_rollout_card,
    render_samples,
)
from gmask.training.rollouts import (
    FunctionReward,
    ModelReward,
    Rollout,
    RolloutWriter,
    check_lengths,
    read_prompt_splits,
    rollout_seeds,
)
from gmask.training.run_folder import LOG_FILE, RESULTS_FILE, START_FILE, read_fields, read_metrics
from gmask.training.tuning_run import TuningRun
from gmask.training.validation import plan_evaluations

BEFORE_FILE = "before.json"
SAMPLES_FILE = "samples.md"

CHECKED_ALONE = 7
"""Answers that are scored alone before the first step, beside the longest one."""

VALIDATION_ROLLOUT = 2**31
"""The number in place of a rollout's in the seeds of validations."""


class RewardedRun(TuningRun):
    """The parts of such a run that do not depend on how it learns.

    ``recipe`` has the sections of PPO's for data, reward and rollouts.
    """

    algorithm: str  # its name in reports
    task: Task
    trainable: TrainableTable
    policy: Any

    def __init__(self, recipe: RunRecipe, *, folders: Sequence[Path] = (), resume: bool = True) -> None:
        """Reads prompts and reward function, and checks the folder: mistakes are reported before a model is loaded.

        folders: where the module of the reward function is looked for first.
        """
        super().__init__(recipe)
        settings = self.recipe
        self.task = read_task({"use": settings.task} if isinstance(settings.task, str) else settings.task)
        self.prompts = read_prompt_splits(self.task, settings.data, seed=settings.run.seed)
        named = settings.reward.function
        self.function = None if named is None else FunctionReward(named, folders)
        self._check_folder(resume=resume)

    def _hashes(self) -> dict[str, str]:
        """SHA-256 of what the numbers of the run depend on beside the recipe, by its name in errors."""
        hashes = {f"{file.split} file {file.name}": file.sha256 for file in self.prompts.files}
        if isinstance(self.recipe.task, str):
            hashes[f"task {self.task.name}"] = self.task.fingerprint()
        if self.function is not None and self.function.path is not None:
            hashes["reward.function"] = hash_file(self.function.path)
        return hashes

    def _load(self) -> None:
        """Loads the policy, before a method is applied to it, its tokenizer and the reward model."""
        self.policy, self.tokenizer = load_tuned_model(self.tuning, self.task, self.device)
        check_lengths(self.policy.config, self.recipe.data)
        self.reward_model = self._load_reward()

    def _load_reward(self) -> ModelReward | None:
        name, adapter = self.recipe.reward.model, self.recipe.reward.adapter
        if name is None:
            return None
        model, tokenizer = load(name, device=self.device, adapter=adapter)
        found = ModelReward(model, self.tokenizer, tokenizer, batch_size=self.recipe.optimization.batch_size)
        if not found.reads_ids:
            self.console.print(
                f"{name} has another tokenizer: it scores the texts of the answers, encoded anew", highlight=False
            )
        return found

    def _read_prompts(self) -> None:
        """Encodes the prompts, once a method is applied to the policy that answers them."""
        data = self.recipe.data
        reader = SampleReader(
            self.tokenizer, self.policy.config, self.task.kind, max_source=data.max_source, truncation=data.truncation
        )
        self.special = reader.special
        self.writer = RolloutWriter(self.policy, self.tokenizer, reader, rows=self.recipe.rollout.rows)
        self.contexts = self.writer.read(self.prompts.train)
        self.validation = self.prompts.validation[: data.validation_limit]
        self.validation_contexts = self.writer.read(self.validation)

    @property
    def evaluate_every(self) -> int:
        """The rollouts between two validations."""
        recipe, count = self.recipe, len(self.validation)
        every, _ = plan_evaluations(
            recipe.optimization.evaluate_every,
            count,
            samples=count,
            steps=recipe.optimization.rollouts,
            samples_per_step=recipe.answers,
            cost=1,
        )
        return every

    def _show_start(self, steps: int, *more: str) -> None:
        """Prints the summary of the run, and writes its first files.

        steps: of the optimizer, after each rollout.
        """
        recipe, method, cut = self.recipe, self.recipe.method.name, self.writer.cut
        lines = [
            f"{self.task.name}: {len(self.contexts)} prompts, {recipe.optimization.rollouts} rollouts of "
            f"{recipe.rollout.prompts} x {recipe.rollout.answers} answers, {steps} steps after each, learning rate "
            f"{recipe.optimization.learning_rate:g}",
            *more,
            *([f"{cut} prompts were cut to data.max_source {recipe.data.max_source}"] if cut else []),
            *filter(None, [hint_learning_rate(method, recipe.optimization.learning_rate)]),
        ]
        self.console.print(self.trainable.to_rows().to_rich(f"What trains ({method})"))
        self.console.print("\n".join(lines), highlight=False, markup=False)
        if self.is_main:
            self._write_start_files()
            write_text(self.out / START_FILE, "\n".join([*lines, ""]))

    # The reward

    def reward(self, samples: Sequence[Sample], rollouts: Sequence[Rollout]) -> list[float]:
        """The score of each answer, before it is clipped."""
        settings, total = self.recipe.reward, [0.0] * len(rollouts)
        if self.function is not None:
            found = self.function(samples, rollouts)
            total = [old + settings.function_weight * new for old, new in zip(total, found, strict=True)]
        if self.reward_model is not None:
            found = self.reward_model(samples, rollouts)
            total = [old + settings.model_weight * new for old, new in zip(total, found, strict=True)]
        if settings.cut is not None:
            total = [value if one.is_finished else settings.cut for value, one in zip(total, rollouts, strict=True)]
        return total

    def clip(self, rewards: Sequence[float]) -> list[float]:
        limit = self.recipe.reward.clip
        return list(rewards) if limit is None else [max(-limit, min(limit, value)) for value in rewards]

    # Checks before the first step

    @property
    def tolerance(self) -> float:
        """By how many nats log-probabilities that should be equal may differ."""
        return 1e-4 if self.dtype == torch.float32 else 5e-2

    def _check_equal(self, one: Tensor, other: Tensor, fault: str) -> None:
        gap = float((one - other).abs().max())
        if not gap <= self.tolerance:
            raise GmaskError(
                f"before the first step {fault}: {gap:.2g} nats apart, more than {self.tolerance:g}; nothing was learnt"
            )

    # Evaluations

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Within it the policy samples, in the precision of its forward passes; behind it, it may train again."""
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                yield
        finally:
            self.policy.train()

    def answer_validation(self) -> Answered:
        """Greedy answers to the validation prompts, and what they are worth. Each process answers all of them."""
        sampling = Sampling(max_tokens=self.recipe.data.max_target, min_tokens=0)
        seeds = rollout_seeds(self.recipe.run.seed, VALIDATION_ROLLOUT, range(len(self.validation)))
        with self.generating():
            found = self.writer.write(self.validation_contexts, sampling, seeds=seeds)
        rollouts = [group[0] for group in found]
        rewards = self.reward(self.validation, rollouts) if rollouts else []
        return Answered([one.text for one in rollouts], [len(one.actions) for one in rollouts], rewards)

    def read_or_write_before(self) -> Answered | None:
        """The answers of the model before its first step; a resumed run reads them from a file."""
        path = self.out / BEFORE_FILE
        if not self.validation:
            return None
        if self._has_checkpoint() and path.is_file():
            return read_fields(Answered, path)
        answered = self.answer_validation()
        if self.is_main:
            write_json(path, dataclasses.asdict(answered), indent=None)
        return answered

    # Results

    def report(self, before: Answered | None) -> None:
        """Answers the validation prompts; the first process writes weights, samples, curves, card, results."""
        after = self.answer_validation() if before is not None else None
        if self.is_main:
            self._write_results(before, after)
        self.accelerator.wait_for_everyone()

    def _write_results(self, before: Answered | None, after: Answered | None) -> None:
        results = RolloutResults(
            algorithm=self.algorithm,
            recipe=self.recipe,
            task=self.task.name,
            records=read_metrics(self.out / LOG_FILE),
            before=before,
            after=after,
            trainable_parameters=self.trainable.trainable,
            parameters=self.trainable.total,
            peak_memory_bytes=peak_memory(self.device),
        )
        if before is not None and after is not None:
            text = render_samples([sample.text for sample in self.validation], before, after)
            write_text(self.out / SAMPLES_FILE, text)
        draw_reward_curves(results.records, self.out / CURVES_FILE)
        write_text(self.out / "README.md", render_rollout_card(results))
        self._export_weights()
        write_json(self.out / RESULTS_FILE, results.to_dict())
        for line in results.summary():
            self.console.print(line, highlight=False)

    def _export_weights(self) -> None:
        self._export(self.policy, self.export)

    def _export(self, policy: Any, target: Path) -> None:
        with self._written_export(target) as folder:
            save_tuned_model(policy, self.tokenizer, self.tuning, folder, dtype=self.dtype)
