"""What a PPO run is made of before its first step, and the checks of its first rollout."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from gmask.errors import GmaskError
from gmask.infilling.blanks import NOT_SCORED
from gmask.models.base import stop_dropout
from gmask.models.glm import GLMConfig
from gmask.recipes.ppo import PPORecipe, load_ppo_recipe
from gmask.tasks.records import read_records
from gmask.tasks.task import read_task
from gmask.training.examples import Batch
from gmask.training.loop import Loop
from gmask.training.losses import TaskObjective
from gmask.training.methods import choose_trainable
from gmask.training.policies import (
    WHOLE_VOCABULARY,
    ActorCritic,
    Reference,
    TokenDistribution,
    can_switch_off,
    copy_frozen,
    make_critic,
)
from gmask.training.rewarded_run import CHECKED_ALONE, RewardedRun
from gmask.training.rollouts import Rollout, collate_rollouts


class PPOSetup(RewardedRun):
    """A run of a recipe without its steps: models, samples that are mixed in, checks."""

    recipe: PPORecipe
    algorithm = "PPO"
    clock = staticmethod(time.monotonic)  # by which a rollout is timed
    loop: Loop
    average: AveragedModel | None

    def __init__(self, recipe: PPORecipe, *, folders: Sequence[Path] = (), resume: bool = True) -> None:
        super().__init__(recipe, folders=folders, resume=resume)
        self._join_processes()
        frozen = recipe.critic.kind == "frozen"  # there is nothing that a value loss could change
        self.updates = dataclasses.replace(recipe.ppo, value_weight=0.0) if frozen else recipe.ppo

    @property
    def steps_per_rollout(self) -> int:
        return int(self.recipe.ppo.epochs * self.recipe.ppo.minibatches)

    def _read_recipe(self, written: Path) -> PPORecipe:
        return load_ppo_recipe(written)

    def prepare(self) -> None:
        """Loads the models, and prints the summary of the run."""
        recipe = self.recipe
        self._show_dtype()
        self._load()
        is_foreign = self.reward_model is not None and not self.reward_model.reads_ids
        if is_foreign and recipe.critic.kind in ("joint", "frozen"):
            raise GmaskError(f"critic.kind {recipe.critic.kind} needs a reward model with the same tokenizer")
        scorer = None if self.reward_model is None else self.reward_model.model
        critic, head = make_critic(self.policy, recipe.critic, reward=scorer)
        self.trainable = choose_trainable(self.policy, self.tuning, steps=recipe.optimization.rollouts)
        self._read_prompts()
        distribution = TokenDistribution(recipe.rollout.temperature, self.writer.forbidden_ids)
        apart = recipe.critic.kind == "head"
        self.module = ActorCritic(self.policy, distribution, critic=critic, head=head, is_apart=apart)
        stop_dropout(self.module)
        self.reference = None
        if recipe.kl.weight > 0:
            switches = recipe.method.makes_adapter and recipe.model.adapter is None and can_switch_off(self.policy)
            self.reference = Reference(self.policy, None if switches else copy_frozen(self.policy))
        self.mixed = self._read_mixed()
        named = "none" if self.reference is None else "a frozen copy" if self.reference.copy else "the adapter off"
        self._show_start(self.steps_per_rollout, f"values: {recipe.critic.kind}; reference: {named}")
        self._seed()

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

    # Checks of the first rollout

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

    def to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def frozen_values(self, rollouts: Sequence[Rollout], values: Tensor) -> Tensor:
        """The values ``[n]`` of the frozen reward model, if it is the critic; else those given."""
        if self.recipe.critic.kind != "frozen":
            return values
        assert self.reward_model is not None, "the recipe names it"
        return self.reward_model.values(rollouts)

    def _export_weights(self) -> None:
        super()._export_weights()
        if self.average is not None:
            self._export(self.average.module.policy, self.export.with_name(f"{self.export.name}-average"))
