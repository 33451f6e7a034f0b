"""GRPO and RLOO: TRL's trainers, on answers that gmask's stepper writes and on rewards of the ids that it sampled.

TRL's own sampling decodes, templates and encodes answers again; here ids stay ids. Tokens that are never written, such
as ``<sop>``, have no probability in the policy's head, so that one distribution samples, is scored and is the
reference's. The seed and the number of a rollout decide its answers, in any number of processes and after a resume.
"""

import copy
import importlib
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from torch import Tensor
from transformers import PreTrainedModel

from gmask.errors import GmaskError, one_line
from gmask.generation.padding import check_numbers
from gmask.generation.settings import Sampling
from gmask.models.base import stop_dropout
from gmask.recipes.grpo import GRPORecipe, load_grpo_recipe
from gmask.training.accelerator import RECIPE_KEYS, is_sharded
from gmask.training.examples import BatchOrder
from gmask.training.methods import apply_method, count_trainable
from gmask.training.rewarded_run import CHECKED_ALONE, RewardedRun
from gmask.training.rollouts import Rollout, rollout_seeds
from gmask.training.run_folder import LOG_FILE, read_metrics
from gmask.training.trl_run import LogCallback, TRLRun, last_trainer_checkpoint, refuse_adapter_in_place

NEVER = -1e4
"""The score of a token that is never written, in any precision of the head: its probability is 0."""

STEP_KEYS = {
    name: "optimization.rollouts, rollout and grpo.minibatches"
    for name in ("num_train_epochs", "max_steps", "gradient_accumulation_steps")
}


def run_grpo(recipe_path: str, overrides: Sequence[str] = (), *, resume: bool = True) -> Path:
    """Trains a policy by a recipe, resuming from the last checkpoint; returns the folder of its weights.

    Raises:
        GmaskError: a mistake in the recipe, the prompts or the reward; a check of the first step that fails; a policy
            that has left its reference; a loss that is not finite.
    """
    recipe = load_grpo_recipe(recipe_path, overrides)
    return GRPO(recipe, folders=(Path(recipe_path).parent, Path.cwd()), resume=resume).train()


class GRPO(TRLRun, RewardedRun):
    """One run of GRPO or RLOO, in this process; under torchrun each process makes its own."""

    recipe: GRPORecipe
    recipe_keys = RECIPE_KEYS | STEP_KEYS

    def __init__(self, recipe: GRPORecipe, *, folders: Sequence[Path] = (), resume: bool = True) -> None:
        super().__init__(recipe, folders=folders, resume=resume)
        self.algorithm = recipe.grpo.algorithm.upper()
        self._join_processes()

    def _read_recipe(self, written: Path) -> GRPORecipe:
        return load_grpo_recipe(written)

    def _make_arguments(self) -> Any:
        recipe, optimization = self.recipe, self.recipe.optimization
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        passes, rest = divmod(recipe.answers, processes * optimization.batch_size)
        if rest or passes % recipe.grpo.minibatches or recipe.answers // processes % recipe.rollout.answers:
            raise GmaskError(
                f"a rollout has {recipe.answers} answers (rollout.prompts x rollout.answers), which "
                f"{recipe.grpo.minibatches} minibatches (grpo.minibatches) of passes of {optimization.batch_size} "
                f"(optimization.batch_size) in {processes} processes cannot share evenly: change one of them"
            )
        iterations = recipe.trl.get("num_iterations", 1)
        if type(iterations) is not int or iterations < 1:
            raise GmaskError(f"trl.num_iterations is {iterations!r}: it must be a whole number above 0")
        self.steps_per_rollout = recipe.grpo.minibatches * iterations
        name = f"{self.algorithm}Config"
        kind = getattr(importlib.import_module("trl"), name)
        self.beta = recipe.trl.get("beta", kind.__dataclass_fields__["beta"].default)
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or not 0 <= self.beta < math.inf:
            raise GmaskError(f"trl.beta is {self.beta!r}: it must be a number from 0")
        warmup = optimization.warmup  # rollouts, or a share of them
        return self._arguments(
            name,
            left_out=("beta",),
            beta=0.0,  # with another one TRL reloads a reference by its name; the reference of a run is a copy
            gradient_accumulation_steps=passes // recipe.grpo.minibatches,
            steps_per_generation=passes,
            num_generations=recipe.rollout.answers,
            max_completion_length=recipe.data.max_target,
            temperature=recipe.rollout.temperature,
            warmup_steps=warmup * self.steps_per_rollout if warmup >= 1 else warmup,
            max_steps=optimization.rollouts * self.steps_per_rollout,
            logging_steps=1,  # the log thins its records itself
            save_steps=optimization.save_every * self.steps_per_rollout,  # never within a rollout
            shuffle_dataset=False,
            pad_to_multiple_of=None,
        )

    def _train(self) -> None:
        """Makes the steps that are left; writes weights, samples and report."""
        self._show_dtype()
        self._load()
        trainer = self._make_trainer()
        self.accelerator = trainer.accelerator
        if is_sharded(self.accelerator):
            raise GmaskError("grpo samples with the whole policy in each process: leave fsdp and deepspeed out")
        reference = "none" if not self.beta else "the adapter off" if trainer.ref_model is None else "a frozen copy"
        self._show_start(self.steps_per_rollout, f"{self.algorithm}, beta {self.beta:g}; reference: {reference}")
        before = self.read_or_write_before()
        self._fit(trainer, self.callback)
        self.report(before)

    def _export_weights(self) -> None:
        self._export_trainer(self.trainer.model)

    # The trainer

    def _make_trainer(self) -> Any:
        trl: Any = importlib.import_module("trl")
        refuse_adapter_in_place(self.policy)
        if not self.recipe.method.makes_adapter:
            apply_method(self.policy, self.recipe.method)
        self._read_prompts()
        forbid_tokens(self.policy, self.writer.forbidden_ids)
        self.callback = RolloutLog(self)
        try:
            self.trainer = with_own_answers(getattr(trl, f"{self.algorithm}Trainer"))(
                model=self.policy,
                reward_funcs=self.score,
                args=self.args,
                train_dataset=self._as_dataset(),
                processing_class=self.tokenizer,
                peft_config=self._adapter_config(),
                callbacks=[self.callback],
            )
        except (ValueError, NotImplementedError) as error:
            raise GmaskError(f"trl: {one_line(error)}") from error
        trainer, trainer_model = self.trainer, self.trainer.model
        trainer.gmask_run = self
        stop_dropout(trainer_model)
        self.trainable = count_trainable(trainer_model)
        trainer.beta = self.beta
        if self.beta and not self.recipe.method.makes_adapter:
            frozen = copy.deepcopy(trainer_model).requires_grad_(False).eval()
            trainer.ref_model = trainer.accelerator.prepare_model(frozen, evaluation_mode=True)
        return trainer

    def _as_dataset(self) -> Any:
        """The prompts of the whole run in the order of its seed, as one epoch: a resume finds its place in it."""
        rollouts, prompts = self.recipe.optimization.rollouts, self.recipe.rollout.prompts
        lengths = [len(context.ids) for context in self.contexts]
        order = BatchOrder(lengths, steps=rollouts, batch_size=prompts, accumulation=1, seed=self.recipe.run.seed)
        numbers = [number for rollout in order for number in rollout]
        return Dataset.from_dict({"prompt": [self.prompts.train[n].text for n in numbers], "number": numbers})

    # What the trainer calls

    def sample(self, numbers: Sequence[int]) -> None:
        """Writes the answers of this process's part of a rollout.

        numbers: of the prompts, each as often as it has answers.
        """
        recipe, trainer = self.recipe, self.trainer
        copies = recipe.rollout.answers
        self.numbers, own = list(numbers), list(numbers[::copies])
        first = trainer.accelerator.process_index * len(own)
        rollout = trainer._step // (trainer.args.steps_per_generation * trainer.num_iterations)
        seeds = rollout_seeds(recipe.run.seed, rollout, range(first, first + len(own)))
        sampling = Sampling(
            n=copies, max_tokens=recipe.data.max_target, min_tokens=0, temperature=recipe.rollout.temperature
        )
        with self.generating():
            found = self.writer.write([self.contexts[number] for number in own], sampling, seeds=seeds)
        self.rollouts: list[Rollout] = [one for group in found for one in group]

    def prompt_ids(self, one: Rollout) -> list[int]:
        """What is read before an answer."""
        return [*one.context.ids, self.special.sop]

    def score(self, completion_ids: Sequence[Sequence[int]], log_metric: Any, **_: Any) -> list[float]:
        """The rewards of a rollout, for TRL."""
        assert [list(one.actions) for one in self.rollouts] == [list(ids) for ids in completion_ids]
        found = self.reward([self.prompts.train[number] for number in self.numbers], self.rollouts)
        log_metric("unclipped_reward", sum(found) / len(found))
        log_metric("without_text", sum(not one.text.strip() for one in self.rollouts) / len(found))
        return self.clip(found)

    # Checks of the first rollout

    @torch.no_grad()
    def check_start(self, output: Mapping[str, Tensor], scored: Sequence[Tensor]) -> None:
        """Checks, before anything is learnt, that the policy is its reference and that it is scored as it sampled.

        Args:
            output: what TRL made of the rollout.
            scored: the log-probabilities that TRL computed for it; if there is a reference, its own are the last.

        Raises:
            GmaskError: the divergence is not 0, the ratio of probabilities is not 1, or the log-probabilities of a
                batch are not those of single rows, or not those that the stepper reported.
        """
        mask = output["completion_mask"].bool()  # without answers that were cut, if the recipe leaves them out
        order = sorted((i for i in range(len(mask)) if mask[i].any()), key=lambda i: self.rollouts[i].length)
        if not order:
            return
        places = [*(len(order) * index // CHECKED_ALONE for index in range(CHECKED_ALONE)), -1]
        few = [order[place] for place in places]  # of unequal lengths
        chosen, trainer = mask[few], self.trainer
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)[few]
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)[few]
        alone = [self._score_alone(self.rollouts[index]) for index in few]
        drawn = torch.cat([one for one, _ in alone])
        together = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.shape[1])[0]
        self._check_equal(together[chosen], drawn, "a batch of answers is scored otherwise than a single answer")
        reported = drawn.new_tensor([value for index in few for value in self.rollouts[index].logprobs])
        plain = torch.cat([one for _, one in alone])
        self._check_equal(plain, reported, "answers are scored otherwise than they were sampled")
        old, reference = (scored[:-1], scored[-1:]) if self.beta else (scored, ())
        for one in reference:
            self._check_equal(one[few][chosen], drawn, "the policy's log-probabilities are not those of its reference")
        for one in old:
            self._check_equal(one[few][chosen], drawn, "the ratio of probabilities is not 1")

    def _score_alone(self, one: Rollout) -> tuple[Tensor, Tensor]:
        """The log-probabilities of an answer in a row of its own, at the temperature of the run and at 1."""
        prompt = self.prompt_ids(one)
        ids = torch.tensor([[*prompt, *one.actions]], device=self.device)
        self.policy.eval()
        with self.accelerator.autocast():
            logits = self.policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        self.policy.train()
        check_numbers(logits)
        targets = ids[0, len(prompt) :, None]
        drawn, plain = (
            (logits / temperature).log_softmax(-1).gather(1, targets)[:, 0]
            for temperature in (self.recipe.rollout.temperature, 1.0)
        )
        return drawn, plain


def forbid_tokens(model: PreTrainedModel, forbidden: Sequence[int]) -> None:
    """Takes the probability of tokens away in the head of a model, in place; it is not saved with the model."""
    head: Any = model.lm_head
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    bias[list(forbidden)] = NEVER
    del head.bias  # None in these models
    head.register_buffer("bias", bias, persistent=False)


def with_own_answers(base: Any) -> Any:
    """A trainer of TRL that learns from the answers of `GRPO.sample`; its attribute ``gmask_run`` is that run."""

    class OwnAnswers(base):
        gmask_run: GRPO

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
            self.gmask_run.sample([one["number"] for one in inputs])
            self.scored: list[Tensor] | None = []
            output: dict[str, Tensor] = super()._generate_and_score_completions(inputs)
            scored, self.scored = self.scored, None
            if self._step == 0:
                self.gmask_run.check_start(output, scored)
            return output

        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
            run = self.gmask_run
            return [run.prompt_ids(one) for one in run.rollouts], None, {}

        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **keywords: Any) -> Any:
            ids = [list(one.actions) for one in self.gmask_run.rollouts]
            return (ids, None) if self.gmask_run.algorithm == "GRPO" else ids

        def _get_per_token_logps_and_entropies(self, *args: Any, **keywords: Any) -> tuple[Any, ...]:
            found: tuple[Any, ...] = super()._get_per_token_logps_and_entropies(*args, **keywords)
            if getattr(self, "scored", None) is not None:
                self.scored.append(found[0])  # type: ignore[union-attr]
            return found

    return OwnAnswers


TRL_NAMES = {
    "grad_norm": "gradient_norm", "reward": "clipped_reward", "unclipped_reward": "reward",
    "reward_std": "reward_deviation", "frac_reward_zero_std": "groups_without_spread",
    "completions/mean_length": "length", "completions/clipped_ratio": "truncated",
    "clip_ratio/region_mean": "clip_fraction",
}  # fmt: skip
"""The names in gmask's logs of numbers in TRL's."""


class RolloutLog(LogCallback):
    """The log of a run: numbers of a rollout beside those of each of its steps, and validations."""

    def __init__(self, run: GRPO) -> None:
        super().__init__(run.out)
        self.run, self.numbers, self.validation = run, dict[str, Any](), dict[str, Any]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.run.trainer._step = state.global_step * args.gradient_accumulation_steps  # TRL counts a resumed run from 0
        done = [one for one in read_metrics(self.out / LOG_FILE) if one["step"] <= state.global_step]
        self.before, self.began = done[-1]["seconds"] if done else 0.0, time.monotonic()
        self.last = state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = self.run.steps_per_rollout
        if self.run.validation and state.global_step % (self.run.evaluate_every * steps) == 0:
            answered = self.run.answer_validation()
            self.validation = {"validation": {"reward": answered.reward, "length": answered.length}}
        super().on_step_end(args, state, control, **kwargs)

    def may_stop(self, step: int) -> bool:
        return step % self.run.steps_per_rollout == 0  # the other steps of a rollout are made of its answers

    def read(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        if "loss" not in logs:
            return {}
        found = {
            TRL_NAMES.get(name, name): float(value)
            for name, value in logs.items()
            if isinstance(value, int | float) and not name.startswith("rewards/")
        }
        self.numbers |= found  # those of a rollout come with its first step
        if "kl" in found:  # of a token
            name = "kl" if self.run.algorithm == "RLOO" else "kl_k3"  # by the estimate that the algorithm learns from
            self.numbers[name] = found["kl"] * self.numbers["length"]
            if name != "kl":
                del self.numbers["kl"]
        record = {**self.numbers, "seconds": self.before + time.monotonic() - self.began}
        if self.validation:
            record, self.validation = record | {"validation": self.validation}, {}
        return record

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises `GmaskError` as well for a policy that has left its reference; a checkpoint of it is removed."""
        super().check(record)
        kl, limit = record.get("kl", record.get("kl_k3")), self.run.recipe.grpo.limit
        if kl is None or limit is None or kl <= limit:
            return
        rollout, last = self.rollout_of(record["step"]), last_trainer_checkpoint(self.out)
        sampled_by = f"checkpoint-{(rollout - 1) * self.run.steps_per_rollout}"
        if last is not None and last.name == sampled_by and self.run.is_main:
            shutil.rmtree(last)  # of the policy that was found to be so far away
        good = last_trainer_checkpoint(self.out)
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint was written before"
        raise GmaskError(
            f"rollout {rollout}: the policy is {kl:.1f} nats an answer from its reference, beyond grpo.limit "
            f"{limit:g}; {kept}; start again in another run.out, with a lower rate or a higher trl.beta"
        )

    def add(self, record: dict[str, Any]) -> None:
        step, every = record["step"], self.run.recipe.run.log_every
        if step % every == 0 or step in (1, self.last) or "validation" in record:
            super().add({"step": step, "rollout": self.rollout_of(step), **record})

    def rollout_of(self, step: int) -> int:
        """The number of a step's rollout, counted from 1."""
        return -(-step // self.run.steps_per_rollout)
