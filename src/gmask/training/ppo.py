"""PPO on answers that the policy samples: advantages, losses, and the run that makes its steps on the house's loop.

A rollout is a number of prompts with several sampled answers each. Every sampled token is an action: its reward is
minus the divergence from the reference there, and the last token has the score of the answer as well. Nothing but
sampled tokens is scored, valued or learnt from. Losses are sums over tokens, which the loop divides.

Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, with the estimate of advantages of "High-
Dimensional Continuous Control Using Generalized Advantage Estimation", 2016; for language models Ziegler et al., 2019.

Shape letters: n sampled tokens of several answers, one answer after the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gmask.errors import GmaskError
from gmask.generation.padding import batches_by_length
from gmask.generation.settings import Sampling
from gmask.recipes.ppo import KLSettings, UpdateSettings, load_ppo_recipe
from gmask.training.accelerator import is_sharded, make_learning_rate, make_optimizer
from gmask.training.examples import Batch, BatchOrder
from gmask.training.loop import Loop, Schedule, StepData, StepResult
from gmask.training.policies import TokenScores
from gmask.training.ppo_setup import PPOSetup
from gmask.training.pretrain import moving_average
from gmask.training.rollouts import Rollout, collate_rollouts, describe_rollouts, rollout_seeds, score_in_batches
from gmask.training.run_folder import TRAINED_FILE, last_checkpoint

# The algorithm


def token_rewards(
    logprobs: Tensor, reference: Tensor, scores: Sequence[float], lengths: Sequence[int], *, weight: float
) -> Tensor:
    """The reward ``[n]`` of each token: ``-weight * (logprob - reference)``, and the score at the last of an answer."""
    rewards = -weight * (logprobs - reference)
    ends = torch.tensor(lengths).cumsum(0) - 1
    return rewards.index_add(0, ends, torch.tensor(scores, dtype=rewards.dtype))


def estimate_advantages(
    rewards: Tensor, values: Tensor, lengths: Sequence[int], *, discount: float, trace: float
) -> Tensor:
    """The generalized advantage estimates ``[n]``. Behind the last token of an answer the value is 0.

    ``advantage[t] = sum_k (discount * trace)**k * (rewards[t+k] + discount * values[t+k+1] - values[t+k])``.
    """
    advantages = torch.empty_like(rewards)
    end = len(rewards)
    for length in reversed(lengths):
        following, advantage = torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
        for index in reversed(range(end - length, end)):
            surprise = rewards[index] + discount * following - values[index]
            advantage = surprise + discount * trace * advantage
            advantages[index], following = advantage, values[index]
        end -= length
    return advantages


def whiten(values: Tensor) -> Tensor:
    """Values with the mean 0 and the deviation 1; with the mean 0 if they are all equal."""
    return (values - values.mean()) / (values.var(unbiased=False) + 1e-8).sqrt()


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """The clipped loss ``[n]`` of each token, and where the clipping is what counts (1 or 0)."""
    ratio = (logprobs - old).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), (clipped > plain).to(logprobs.dtype)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """Half the squared error ``[n]`` of each value, or that of the value held near its old one if it is greater."""
    errors = (values - returns) ** 2
    if clip is not None:
        errors = torch.maximum(errors, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return errors / 2


def divergence(logprobs: Tensor, other: Tensor) -> Tensor:
    """An estimate ``[n]`` of the divergence from another distribution that is never negative (k3).

    Source: Schulman, "Approximating KL Divergence", 2020; ``logprobs - other`` is k1 there.
    """
    ratio = other - logprobs
    return ratio.exp() - 1 - ratio


class KLWeight:
    """The weight of the divergence in the reward: fixed, or led to a target.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, section 2.2.
    """

    def __init__(self, settings: KLSettings) -> None:
        self.settings, self.value = settings, settings.weight

    def update(self, divergence: float, answers: int) -> None:
        """Takes note of the mean divergence of so many answers, in nats an answer."""
        if self.settings.kind == "adaptive":
            error = min(0.2, max(-0.2, divergence / self.settings.target - 1))
            self.value *= 1 + error * answers / self.settings.horizon


@dataclass(frozen=True, slots=True)
class Experience:
    """The answers of a rollout, and what is learnt from: float32 ``[n]`` each."""

    rollouts: Sequence[Rollout]
    logprobs: Tensor  # of the policy that sampled
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        return [len(one.actions) for one in self.rollouts]

    def batch(self, chosen: Sequence[int], *, sop: int, pad: int) -> Batch:
        """The batch of some answers."""
        names = ("logprobs", "values", "advantages", "returns")
        parts = {name: torch.split(getattr(self, name), self.lengths) for name in names}
        taken = {name: torch.cat([parts[name][index] for index in chosen]) for name in names}
        return collate_rollouts([self.rollouts[index] for index in chosen], sop=sop, pad=pad) | taken


def step_losses(scores: TokenScores, batch: Mapping[str, Tensor], settings: UpdateSettings) -> dict[str, Tensor]:
    """The parts of the loss of a batch, each summed over its tokens; ``loss`` is their weighted sum."""
    old = batch["logprobs"]
    losses, is_clipped = policy_loss(scores.logprobs, old, batch["advantages"], clip=settings.clip)
    errors = value_loss(scores.values, batch["values"], batch["returns"], clip=settings.value_clip)
    policy, value, entropy = losses.sum(), errors.sum(), scores.entropy.sum()
    return {
        "loss": policy + settings.value_weight * value - settings.entropy_weight * entropy,
        "policy_loss": policy,
        "value_loss": value,
        "entropy": entropy,
        "clip_fraction": is_clipped.sum(),
        "update_kl": divergence(old, scores.logprobs).sum(),  # of the policy that sampled, from that of now
    }


# The run


def run_ppo(recipe_path: str, overrides: Sequence[str] = (), *, resume: bool = True) -> Path:
    """Trains a policy by a recipe, resuming from the last checkpoint; returns the folder of its weights.

    Raises:
        GmaskError: a mistake in the recipe, the prompts or the reward; a check of the first step that fails; a policy
            that has left its reference; a loss that is not finite.
    """
    recipe = load_ppo_recipe(recipe_path, overrides)
    return PPO(recipe, folders=(Path(recipe_path).parent, Path.cwd()), resume=resume).train()


class PPO(PPOSetup):
    """One run of a recipe, in this process: a `gmask.training.loop.Run`. Under torchrun each process makes its own.

    The weights, the seed and the number of a rollout decide it, so that a checkpoint between two rollouts is enough to
    resume exactly.
    """

    name, unit = "ppo", "answers"

    def _train(self) -> None:
        """Makes the steps that are left; writes weights, samples and report."""
        recipe, steps = self.recipe, self.steps_per_rollout * self.recipe.optimization.rollouts
        self.prepare()
        if is_sharded(self.accelerator):
            raise GmaskError("ppo samples with the whole policy in each process: leave fsdp and deepspeed out")
        self.kl_weight, self.rollout, self.numbers = KLWeight(recipe.kl), 0, dict[str, float]()
        self.sums, self.leaves = dict[str, Tensor](), False
        self.order = BatchOrder(
            [len(context.ids) for context in self.contexts], steps=recipe.optimization.rollouts,
            batch_size=recipe.rollout.prompts, accumulation=1, seed=recipe.run.seed,
            processes=self.accelerator.num_processes, process=self.accelerator.process_index,
        )  # fmt: skip
        decay = recipe.optimization.average
        self.average = AveragedModel(self.module, multi_avg_fn=moving_average(decay)) if decay else None
        self.rate = make_learning_rate(self.args, steps=recipe.optimization.rollouts)
        every = recipe.optimization.evaluate_every or max(1, recipe.optimization.rollouts // 10)
        self.loop = Loop(
            self, self.module, [self._set_rates(make_optimizer(self.module, self.args, steps=steps))],
            accelerator=self.accelerator, out=self.out, clip_norm=recipe.optimization.clip_norm, average=self.average,
            schedule=Schedule(
                steps=steps, validate_every=every * self.steps_per_rollout if self.prompts.validation else steps,
                log_every=recipe.run.log_every, save_every=None, keep_last=recipe.optimization.keep_last,
            ),
        )  # fmt: skip
        before = self.read_or_write_before()
        state = self.loop.restore()
        self.rollout, self.kl_weight.value = state.get("rollout", 0), state.get("kl_weight", recipe.kl.weight)
        self.loop.fit()
        self.report(before)

    def _set_rates(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Gives the weights of the critic groups of their own, of which the loop multiplies the learning rate."""
        factor, own = self.recipe.critic.rate, {id(parameter) for parameter in self.module.critic_parameters()}
        if factor != 1:
            for group in list(optimizer.param_groups):
                mine = [parameter for parameter in group["params"] if id(parameter) in own]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group({**group, "params": mine, "rate_factor": factor})
        return optimizer

    # Rollouts

    def data(self, step: int) -> Iterator[StepData]:
        for numbers in self.order.after(self.rollout):
            experience = self._roll_out(numbers)
            if self.rollout and self.rollout % self.recipe.optimization.save_every == 0:
                self.loop.save()  # only now is it known that these weights are still near the reference
            self.kl_weight.update(self.numbers.get("kl", 0.0), self.recipe.answers)
            self.rollout += 1
            yield from self._minibatches(experience)

    def _roll_out(self, numbers: Sequence[int]) -> Experience:
        """Samples answers to this process's prompts, scores them, and joins them with those of the other processes."""
        started, recipe = self.clock(), self.recipe
        copies, processes = recipe.rollout.answers, self.accelerator.num_processes
        sampling = Sampling(
            n=copies, max_tokens=recipe.data.max_target, min_tokens=0, temperature=recipe.rollout.temperature
        )
        places = [self.accelerator.process_index + index * processes for index in range(len(numbers))]
        seeds = rollout_seeds(recipe.run.seed, self.rollout, places)
        with self.generating():
            found = self.writer.write([self.contexts[number] for number in numbers], sampling, seeds=seeds)
        written = self.clock()
        rollouts = [one for group in found for one in group]
        rewards = self.reward([self.prompts.train[number] for number in numbers for _ in range(copies)], rollouts)
        scores = self._score(rollouts)
        if self.loop.progress.step == 0 and self.rollout == 0:
            self.check_start(rollouts, *scores[:2])
        split = [torch.split(part, [len(one.actions) for one in rollouts]) for part in scores]
        rows = self._join(list(zip(rollouts, rewards, *split, strict=True)), copies)
        experience = self._value(rows)
        self.numbers |= {"generate_seconds": written - started, "score_seconds": self.clock() - written}
        return experience

    def _join(self, rows: list[Any], copies: int) -> list[Any]:
        """The rows of all processes, the prompts in the order of the rollout."""
        if self.accelerator.num_processes == 1:
            return rows
        parts: list[list[Any]] = gather_object([rows])
        groups = range(0, len(parts[0]), copies)
        return [row for start in groups for part in parts for row in part[start : start + copies]]

    @torch.no_grad()
    def _score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the policy and of the reference, and values: ``[n]`` each, on the CPU."""

        def score(chosen: list[Rollout]) -> Tensor:
            batch = self.to_device(collate_rollouts(chosen, sop=self.special.sop, pad=self.special.pad))
            scores = self.loop.model(batch)
            reference = scores.logprobs
            if self.reference is not None:
                with self.accelerator.autocast():
                    reference = self.reference.logprobs(self.module.distribution, batch)
            return torch.stack((scores.logprobs, reference, scores.values), dim=-1).float().cpu()

        def width(one: Rollout) -> int:
            return len(one.actions)

        self.loop.model.eval()
        found = score_in_batches(rollouts, score, width, batch_size=self.recipe.optimization.batch_size)
        self.loop.model.train()
        logprobs, reference, values = found.unbind(-1)
        return logprobs, reference, self.frozen_values(rollouts, values)

    def _value(self, rows: Sequence[Any]) -> Experience:
        """What is learnt from a rollout, and its numbers for the log."""
        rollouts, rewards, logprobs, reference, values = zip(*rows, strict=True)
        lengths = [len(one.actions) for one in rollouts]
        settings = self.recipe.ppo
        policy, other, valued = torch.cat(logprobs), torch.cat(reference), torch.cat(values)
        paid = token_rewards(policy, other, self.clip(rewards), lengths, weight=self.kl_weight.value)
        advantages = estimate_advantages(paid, valued, lengths, discount=settings.discount, trace=settings.trace)
        self.numbers = dict(describe_rollouts(rollouts, rewards, self.recipe.rollout.answers))
        if self.reference is not None:
            self.numbers |= {
                "kl": float((policy - other).sum()) / len(rollouts),  # k1, of an answer
                "kl_k3": float(divergence(policy, other).sum()) / len(rollouts),
                "kl_weight": self.kl_weight.value,
            }
            self._check_divergence()
        return Experience(rollouts, policy, valued, whiten(advantages) if settings.whiten else advantages,
                          advantages + valued)  # fmt: skip

    def _check_divergence(self) -> None:
        kl, limit = self.numbers["kl"], self.recipe.kl.limit
        if limit is not None and not kl <= limit:
            good = last_checkpoint(self.out)
            kept = f"the last good checkpoint is {good}" if good else "no checkpoint was written before"
            raise GmaskError(
                f"rollout {self.rollout + 1}: the policy is {kl:.1f} nats an answer from its reference, beyond "
                f"kl.limit {limit:g}; {kept}; start again in another run.out, with a lower rate or a higher kl.weight"
            )

    # The protocol `Run` of the loop

    def _minibatches(self, experience: Experience) -> Iterator[StepData]:
        """The steps of a rollout. It is left early where the policy has moved too far from the one that sampled."""
        settings, special, lengths = self.recipe.ppo, self.special, experience.lengths
        processes, self.leaves = self.accelerator.num_processes, False
        for epoch in range(settings.epochs):
            order = np.random.default_rng([self.recipe.run.seed, self.rollout, epoch]).permutation(len(lengths))
            for index, chosen in enumerate(np.array_split(order, settings.minibatches)):
                mine = chosen[self.accelerator.process_index :: processes].tolist()
                sizes = [lengths[number] for number in mine]
                passes = [
                    [mine[place] for place in places]
                    for places in batches_by_length(sizes, self.recipe.optimization.batch_size)
                ]
                batches = [experience.batch(numbers, sop=special.sop, pad=special.pad) for numbers in passes]
                mixed = self.mix_batches(sum(lengths[number] for number in chosen))
                is_last = epoch == settings.epochs - 1 and index == settings.minibatches - 1
                self.is_last = is_last and self.rollout == self.recipe.optimization.rollouts
                yield StepData([*mixed, *batches], [[-1]] * len(mixed) + passes, labelled=sum(sizes))
                if self.leaves:
                    return

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        scores: TokenScores = model(batch, plain="weight" in batch)
        unused = 0 * scores.values.sum()  # so that every weight has a gradient in every pass
        if "weight" in batch:
            mixed: Tensor = -(batch["weight"] * scores.logprobs).sum() + unused
            return mixed
        parts = step_losses(scores, batch, self.updates)
        if self.loop.progress.step == 0:
            self.check_ratio(scores.logprobs.detach() - batch["logprobs"])
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()
        return parts["loss"] + unused

    def learning_rate(self, step: int) -> float:
        return self.rate(self.rollout - 1)

    def record(self, result: StepResult) -> dict[str, Any]:
        now, names = self.loop.progress, [name for name in self.sums if name != "loss"]
        sums = torch.stack([self.sums[name] for name in names])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        self.sums = {}
        means = dict(zip(names, (sums / result.labelled).tolist(), strict=True))
        limit = self.recipe.kl.early_stop
        self.leaves = limit is not None and means["update_kl"] > limit
        now.stopped = self.rollout == self.recipe.optimization.rollouts and (self.leaves or self.is_last)
        return {
            "step": now.step,
            "rollout": self.rollout,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            **means,
            **self.numbers,
            "seconds": now.seconds,
        }

    def validate(self) -> dict[str, Any]:
        answered = self.answer_validation()
        return {"validation": {"validation": {"reward": answered.reward, "length": answered.length}}}

    def describe(self, data: StepData) -> str:
        return f"of rollout {self.rollout}"

    def save_weights(self, folder: Path) -> None:
        save_file(self.loop.trained_weights(), folder / TRAINED_FILE)

    def state(self) -> dict[str, Any]:
        return {"rollout": self.rollout, "kl_weight": self.kl_weight.value}
