"""What a PPO run is made of before its first step, the checks of its first rollout, and its evaluations and results."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from transformers import enable_full_determinism, logging, set_seed

from gmask.checkpoints.load import load
from gmask.config import to_yaml
from gmask.errors import GmaskError
from gmask.files import read_object, write_json, write_text, written_folder
from gmask.generation.predict import SampleReader
from gmask.generation.settings import Sampling
from gmask.hardware import describe_training_dtype
from gmask.infilling.blanks import NOT_SCORED
from gmask.models.glm import GLMConfig
from gmask.recipes.ppo import PPORecipe, load_ppo_recipe
from gmask.recipes.tuning import differing_keys, hint_learning_rate
from gmask.tasks.records import Sample, hash_file, read_records
from gmask.tasks.task import Task, read_task
from gmask.training.accelerator import forward_dtype, make_accelerator, named_dtype, training_arguments
from gmask.training.examples import Batch
from gmask.training.finetune import TASK_FILE
from gmask.training.loop import Loop
from gmask.training.losses import TaskObjective
from gmask.training.methods import choose_trainable, load_tuned_model, peak_memory, save_tuned_model
from gmask.training.policies import (
    WHOLE_VOCABULARY,
    ActorCritic,
    Reference,
    TokenDistribution,
    can_switch_off,
    copy_frozen,
    make_critic,
    stop_dropout,
)
from gmask.training.ppo_report import (
    Answered,
    PPOResults,
    draw_reward_curves,
    render_ppo_card,
    render_samples,
)
from gmask.training.report import CURVES_FILE
from gmask.training.rollouts import (
    FunctionReward,
    ModelReward,
    Rollout,
    RolloutWriter,
    check_lengths,
    collate_rollouts,
    read_prompt_splits,
    rollout_seeds,
)
from gmask.training.run_folder import (
    FILES_FILE,
    LOG_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    START_FILE,
    TuningRun,
    last_checkpoint,
    read_metrics,
)

BEFORE_FILE = "before.json"
SAMPLES_FILE = "samples.md"
CHECKED_ALONE = 7
"""Answers that are scored alone before the first step, and the longest one."""

VALIDATION_ROLLOUT = 2**31
"""The number in place of a rollout's in the seeds of validations."""


class PPOSetup(TuningRun):
    """A run of a recipe without its steps: models, prompts, reward, checks, results."""

    recipe: PPORecipe

    clock = staticmethod(time.monotonic)  # by which a rollout is timed
    loop: Loop
    average: AveragedModel | None

    def __init__(self, recipe: PPORecipe, *, folders: Sequence[Path] = (), resume: bool = True) -> None:
        """Reads prompts and reward function, and checks the folder: mistakes are reported before a model is loaded.

        folders: where the module of the reward function is looked for first.
        """
        self.recipe, self.tuning, self.out = recipe, recipe.tuning, Path(recipe.run.out)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        self.task: Task = read_task({"use": recipe.task} if isinstance(recipe.task, str) else recipe.task)
        self.prompts = read_prompt_splits(self.task, recipe.data, seed=recipe.run.seed)
        named = recipe.reward.function
        self.function = None if named is None else FunctionReward(named, folders)
        self._check_folder(resume=resume)
        self.args = training_arguments(self.tuning)
        self.accelerator = make_accelerator(self.args)
        self.device, self.is_main = self.args.device, self.accelerator.is_main_process
        self.console = Console(stderr=True, quiet=not self.is_main)
        frozen = recipe.critic.kind == "frozen"  # there is nothing that a value loss could change
        self.updates = dataclasses.replace(recipe.ppo, value_weight=0.0) if frozen else recipe.ppo

    @property
    def steps_per_rollout(self) -> int:
        return self.recipe.ppo.epochs * self.recipe.ppo.minibatches

    def _differing_keys(self, written: Path) -> list[str]:
        return differing_keys(load_ppo_recipe(written), self.recipe)

    def _hashes(self) -> dict[str, str]:
        """SHA-256 of what the numbers of the run depend on beside the recipe, by its name in errors."""
        hashes = {f"{file.split} file {file.name}": file.sha256 for file in self.prompts.files}
        if isinstance(self.recipe.task, str):
            hashes[f"task {self.task.name}"] = self.task.fingerprint()
        if self.function is not None and self.function.path is not None:
            hashes["reward.function"] = hash_file(self.function.path)
        return hashes

    def prepare(self) -> None:
        """Loads the models, and prints the summary of the run."""
        recipe, data = self.recipe, self.recipe.data
        named = named_dtype(self.tuning, self.device.type)
        self.console.print(describe_training_dtype(named, self.device), highlight=False, markup=False)
        self.policy, self.tokenizer = load_tuned_model(self.tuning, self.task, self.device)
        check_lengths(self.policy.config, data)
        self.reward_model = self._load_reward()
        scorer = None if self.reward_model is None else self.reward_model.model
        critic, head = make_critic(self.policy, recipe.critic, reward=scorer)
        self.trainable = choose_trainable(self.policy, self.tuning, steps=recipe.optimization.rollouts)
        reader = SampleReader(
            self.tokenizer, self.policy.config, self.task.kind, max_source=data.max_source, truncation=data.truncation
        )
        self.special = reader.special
        self.writer = RolloutWriter(self.policy, self.tokenizer, reader, rows=recipe.rollout.rows)
        self.contexts = self.writer.read(self.prompts.train)
        self.validation = self.prompts.validation[: data.validation_limit]
        self.validation_contexts = self.writer.read(self.validation)
        distribution = TokenDistribution(recipe.rollout.temperature, self.writer.forbidden_ids)
        apart = recipe.critic.kind == "head"
        self.module = ActorCritic(self.policy, distribution, critic=critic, head=head, is_apart=apart)
        stop_dropout(self.module)
        self.reference = None
        if recipe.kl.weight > 0:
            switches = recipe.method.makes_adapter and recipe.model.adapter is None and can_switch_off(self.policy)
            self.reference = Reference(self.policy, None if switches else copy_frozen(self.policy))
        self.mixed = self._read_mixed()
        self._show_start()
        logging.set_verbosity(self.args.get_process_log_level())
        (enable_full_determinism if recipe.run.deterministic else set_seed)(recipe.run.seed)

    def _load_reward(self) -> ModelReward | None:
        reward = self.recipe.reward
        if reward.model is None:
            return None
        model, tokenizer = load(reward.model, device=self.device)
        found = ModelReward(model, self.tokenizer, tokenizer, batch_size=self.recipe.optimization.batch_size)
        if not found.reads_ids:
            if self.recipe.critic.kind in ("joint", "frozen"):
                raise GmaskError(f"critic.kind {self.recipe.critic.kind} needs a reward model with the same tokenizer")
            self.console.print(
                f"{reward.model} has another tokenizer: it scores the texts of the answers, encoded anew",
                highlight=False,
            )
        return found

    def _show_start(self) -> None:
        recipe, method = self.recipe, self.recipe.method.name
        cut = self.writer.cut
        lines = [
            f"{self.task.name}: {len(self.contexts)} prompts, {recipe.optimization.rollouts} rollouts of "
            f"{recipe.rollout.prompts} x {recipe.rollout.answers} answers, {self.steps_per_rollout} steps after each, "
            f"learning rate {recipe.optimization.learning_rate:g}",
            f"values: {recipe.critic.kind}; reference: "
            + ("none" if self.reference is None else "a frozen copy" if self.reference.copy else "the adapter off"),
            *([f"{cut} prompts were cut to data.max_source {recipe.data.max_source}"] if cut else []),
            *filter(None, [hint_learning_rate(method, recipe.optimization.learning_rate)]),
        ]
        self.console.print(self.trainable.to_rows().to_rich(f"What trains ({method})"))
        self.console.print("\n".join(lines), highlight=False, markup=False)
        if self.is_main:
            write_text(self.out / RECIPE_FILE, recipe.to_yaml())
            write_text(self.out / TASK_FILE, to_yaml(self.task))
            write_json(self.out / FILES_FILE, self._hashes())
            write_text(self.out / START_FILE, "\n".join([*lines, ""]))

    # Samples that are mixed in

    def _read_mixed(self) -> Any:
        mix = self.recipe.mix
        if mix is None:
            return None
        task = self.task
        if mix.task is not None:
            task = read_task({"use": mix.task} if isinstance(mix.task, str) else mix.task)
        self.objective = TaskObjective(self.tokenizer, self.policy.config, task.kind, self.recipe.data)
        return self.objective.encode(task.samples(read_records(self.recipe.data.resolve(mix.train))))

    def mix_batches(self, labelled: int) -> list[Batch]:
        """This process's part of the samples that are mixed into a step of so many sampled tokens.

        Their mean loss, times the recipe's weight, is added to that of the step.
        """
        mix = self.recipe.mix
        if mix is None:
            return []
        rng = np.random.default_rng([self.recipe.run.seed, 1, self.loop.progress.step])
        chosen = rng.choice(len(self.mixed.items), min(mix.batch_size, len(self.mixed.items)), replace=False).tolist()
        tokens = sum(self.mixed.labelled[number] for number in chosen)
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        if not mine:
            return []
        batch = self.objective.collate([self.mixed.items[number] for number in mine])
        labels = batch.pop("labels")
        is_glm = isinstance(self.policy.config, GLMConfig)  # whose labels stand where they are predicted
        targets = labels if is_glm else F.pad(labels[:, 1:], (0, 1), value=NOT_SCORED)
        return [{**batch, "targets": targets, "weight": torch.tensor(mix.weight * labelled / tokens)}]

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

    # Checks of the first rollout

    @property
    def tolerance(self) -> float:
        """By how many nats log-probabilities that should be equal may differ."""
        return 1e-4 if forward_dtype(self.tuning, self.device.type) == torch.float32 else 5e-2

    @torch.no_grad()
    def check_start(self, rollouts: Sequence[Rollout], logprobs: Tensor, reference: Tensor) -> None:
        """Checks, before anything is learnt, that the policy is its reference and that it is scored as it sampled.

        Raises:
            GmaskError: the divergence is not 0; the log-probabilities of a batch are not those of single rows, or not
                those that the stepper reported.
        """
        self._check_equal(logprobs, reference, "the policy's log-probabilities are not those of its reference")
        order = sorted(rollouts, key=lambda one: one.length)
        places = [len(order) * index // CHECKED_ALONE for index in range(CHECKED_ALONE)]
        few = [*(order[place] for place in places), order[-1]]  # of unequal lengths
        together = self._score_plainly(few, self.module.distribution)
        alone = [self._score_plainly([one], self.module.distribution) for one in few]
        self._check_equal(together, torch.cat(alone), "a batch of answers is scored otherwise than a single answer")
        whole = torch.cat([self._score_plainly([one], WHOLE_VOCABULARY) for one in few])
        reported = torch.tensor([value for one in few for value in one.logprobs])
        self._check_equal(whole, reported, "answers are scored otherwise than they were sampled")

    def _score_plainly(self, rollouts: Sequence[Rollout], distribution: TokenDistribution) -> Tensor:
        batch = self.to_device(collate_rollouts(rollouts, sop=self.special.sop, pad=self.special.pad))
        with self.accelerator.autocast():
            logprobs: Tensor = ActorCritic(self.policy, distribution)(batch).logprobs
        return logprobs.float().cpu()

    def check_ratio(self, difference: Tensor) -> None:
        """Raises `GmaskError` unless the policy that is to learn gives the probabilities of the one that sampled."""
        self._check_equal(difference, torch.zeros_like(difference), "the ratio of probabilities is not 1")

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
        dtype = forward_dtype(self.tuning, self.device.type)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                yield
        finally:
            self.module.train()

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
        if last_checkpoint(self.out) is not None and path.is_file():
            return Answered(**read_object(path, remedy="delete it, and it is written anew"))
        answered = self.answer_validation()
        if self.is_main:
            write_json(path, dataclasses.asdict(answered), indent=None)
        return answered

    def to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def frozen_values(self, rollouts: Sequence[Rollout], values: Tensor) -> Tensor:
        """The values ``[n]`` of the frozen reward model, if it is the critic; else those given."""
        if self.recipe.critic.kind != "frozen":
            return values
        assert self.reward_model is not None, "the recipe names it"
        return self.reward_model.values(rollouts)

    # Results

    def report(self, before: Answered | None) -> None:
        """Answers the validation prompts; the first process writes weights, samples, curves, card, results."""
        after = self.answer_validation() if before is not None else None
        if self.is_main:
            self._write_results(before, after)
        self.accelerator.wait_for_everyone()

    def _write_results(self, before: Answered | None, after: Answered | None) -> None:
        results = PPOResults(
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
        write_text(self.out / "README.md", render_ppo_card(results))
        if self.average is not None:
            self._export(self.average.module.policy, self.export.with_name(f"{self.export.name}-average"))
        self._export(self.policy, self.export)
        write_json(self.out / RESULTS_FILE, results.to_dict())
        for line in results.summary():
            self.console.print(line, highlight=False)

    def _export(self, policy: Any, target: Path) -> None:
        dtype = forward_dtype(self.tuning, self.device.type)
        with written_folder(target, kept="the run, to be resumed,") as folder:
            save_tuned_model(policy, self.tokenizer, self.tuning, folder, dtype=dtype)
            for name in ("README.md", CURVES_FILE, LOG_FILE):
                (folder / name).write_bytes((self.out / name).read_bytes())
            (folder / TASK_FILE).write_text(to_yaml(self.task), "utf-8")
            (folder / RECIPE_FILE).write_text(self.recipe.portable().to_yaml(), "utf-8")
