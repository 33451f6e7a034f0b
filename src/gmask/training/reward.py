"""Reward models: a head on a language model, its losses, and the run that trains it on the loop of gmask.

Shape letters: B pairs, T positions.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gmask.architectures import architecture_of
from gmask.checkpoints.load import load
from gmask.evaluation.rewards import PlainRules, RewardReport, ScoredPair, report_rewards
from gmask.files import write_json, write_json_lines, write_text
from gmask.generation.reward import RewardScorer, pad_rows
from gmask.models.base import stop_dropout
from gmask.models.reward import RewardHead
from gmask.recipes.feedback import FeedbackRecipe, RewardLoss, RewardSettings, load_feedback_recipe
from gmask.training.examples import Batch
from gmask.training.feedback import EncodedPair, FeedbackRun, PreferenceEncoder, show_pair
from gmask.training.loop import StepData, StepResult
from gmask.training.methods import choose_trainable, peak_memory, save_tuned_model
from gmask.training.parallel import unsharded
from gmask.training.report import CURVES_FILE, draw_curves
from gmask.training.run_folder import LOG_FILE, RESULTS_FILE, TRAINED_FILE, read_metrics

PREDICTIONS_FILE = "predictions.jsonl"


def run_reward(recipe_path: str, overrides: Sequence[str] = (), *, resume: bool = True) -> Path:
    """Trains a reward model by a recipe, resuming from the last checkpoint; returns the folder of its weights.

    ``run.out/results.json`` has the accuracy by kind, that of plain rules and with exchanged prompts, calibration and
    length correlation on the validation pairs, ``predictions.jsonl`` the reward of each of their answers.

    Raises:
        GmaskError: a mistake in the recipe or the data, a run of another recipe in the folder, a loss that is not
            finite.
    """
    return RewardTraining(load_feedback_recipe(recipe_path, "reward", overrides), resume=resume).train()


def as_reward_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model with a new reward head in place of its own; a reward model stays as it is.

    The head has the dtype of the activations, or float32 beside integers.
    """
    if isinstance(model, RewardHead):
        return model
    architecture = architecture_of(model.config)
    reward_class = next(architecture.find_class(name) for name in architecture.classes if name.endswith("ForReward"))
    config = copy.deepcopy(model.config)
    config.num_labels, config.architectures = 1, [reward_class.__name__]
    with torch.device("meta"):
        made: Any = reward_class(config)
    setattr(made, made.base_model_prefix, model.base_model)
    made.score.to_empty(device=model.device)
    nn.init.normal_(made.score.weight, std=config.initializer_range)
    made.score.to(model.dtype)
    made.name_or_path = model.name_or_path
    found: PreTrainedModel = made.eval()
    return found


def collate_pairs(pairs: Sequence[EncodedPair], *, pad: int) -> Batch:
    """The rows of pairs, first all that were chosen, then all that were rejected, padded on the right.

    Returns:
        ``input_ids``, ``attention_mask [2 B, T]``; ``margin [B]``; ``first [B]``, the column from which the rows of a
        pair differ.
    """
    rows = [(*pair.prompt, *pair.chosen) for pair in pairs] + [(*pair.prompt, *pair.rejected) for pair in pairs]
    input_ids, mask = pad_rows(rows, pad=pad)
    first = [len(pair.prompt) + _first_difference(pair.chosen, pair.rejected) for pair in pairs]
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "margin": torch.tensor([pair.margin for pair in pairs]),
        "first": torch.tensor(first),
    }


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first index at which two answers differ; of one that begins with the other, the last common one."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter - 1)


def reward_loss(model: nn.Module, batch: Mapping[str, Tensor], settings: RewardSettings) -> Tensor:
    """The sum over the pairs of ``-log sigmoid(r_chosen - r_rejected - margin)``, in nats."""
    every_token = settings.loss == "per-token"
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rewards = model(**inputs, every_token=every_token).logits
    if every_token:
        return per_token_loss(rewards, batch, center=settings.center)
    chosen, rejected = rewards[:, 0].chunk(2)
    loss = -F.logsigmoid(chosen - rejected - batch["margin"].to(rewards)).sum()
    return loss + settings.center * (chosen + rejected).square().sum() if settings.center else loss


def per_token_loss(rewards: Tensor, batch: Mapping[str, Tensor], *, center: float = 0.0) -> Tensor:
    """As published: the mean over the columns from the first that differs to the end of the longer answer, summed.

    Behind the end of the shorter answer its last reward counts; the published code compared with rewards of padding.

    Args:
        rewards: ``[2 B, T]``.
    """
    column = torch.arange(rewards.shape[1], device=rewards.device)
    last = (batch["attention_mask"] * column).amax(-1, keepdim=True)
    held = rewards.gather(1, torch.minimum(column.expand_as(rewards), last))
    chosen, rejected = held.chunk(2)
    end = torch.maximum(*last.chunk(2))
    counts = ((column >= batch["first"][:, None]) & (column <= end)).to(rewards)
    losses = -F.logsigmoid(chosen - rejected - batch["margin"].to(rewards)[:, None])
    if center:
        losses = losses + center * (chosen + rejected).square()
    return ((losses * counts).sum(-1) / counts.sum(-1)).sum()


class RewardTraining(FeedbackRun):
    """One run that trains a reward model; the protocol `Run` of the loop."""

    stage = "reward"
    name, unit = "reward", "pairs"

    def __init__(self, recipe: FeedbackRecipe, *, resume: bool = True) -> None:
        super().__init__(recipe, resume=resume)
        self._join_processes()

    def _train(self) -> None:
        """Makes the steps that are left; writes weights, report and predictions."""
        settings, optimization = self.recipe.model, self.recipe.optimization
        network, self.tokenizer = load(
            settings.name, dtype=settings.dtype, device=self.device, quantize=settings.quantize
        )
        torch.manual_seed(self.recipe.run.seed)
        self.model = as_reward_model(network)
        stop_dropout(self.model)  # that of an adapter, which the method adds below, stays
        encoder = PreferenceEncoder(self.tokenizer, self.model.config, self.recipe)
        self.pad = encoder.answers.special.pad
        self.pairs = encoder.encode_pairs(self.splits.train, self.intake_of("train"))
        self.validation = (
            encoder.encode_pairs(self.splits.validation, self.intake_of("validation")) if self.splits.validation else []
        )
        per_step, steps = optimization.batch_size * optimization.accumulation, self._count_steps(len(self.pairs))
        trainable = choose_trainable(self.model, self.tuning, steps=steps)
        if self.is_main:
            lines = [
                f"{len(self.pairs)} pairs, {steps} steps of {per_step}, {trainable.trainable:,} of {trainable.total:,} "
                "parameters train",
                show_pair(self.pairs[0], self.tokenizer),
            ]
            self.write_start(self.console, lines)
        self.order = self._make_order([pair.length for pair in self.pairs], steps=steps)
        self._seed()
        every, self.scored = self._plan_evaluations(len(self.validation), steps=steps)
        self.loop = self._make_loop(self.model, steps=steps, validate_every=every if self.validation else steps)
        self.loop.restore()
        self.loop.fit()
        self.loop.load_best()
        with unsharded(self.model):
            if self.is_main:
                self._write_results(trainable.trainable, trainable.total)
        self.accelerator.wait_for_everyone()

    # The protocol `Run` of the loop

    def data(self, step: int) -> Iterator[StepData]:
        passes = self.order.after(step)
        for _ in range(step, self.order.steps):
            numbers = list(islice(passes, self.order.passes))
            batches = [collate_pairs([self.pairs[index] for index in part], pad=self.pad) for part in numbers]
            yield StepData(batches, numbers=numbers, labelled=sum(map(len, numbers)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return reward_loss(model, batch, self.recipe.reward)

    def record(self, result: StepResult) -> dict[str, Any]:
        now = self.loop.progress
        return {
            "step": now.step,
            "epoch": now.labelled / len(self.pairs),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "pairs_per_second": result.labelled / result.seconds,
            "seconds": now.seconds,
        }

    def validate(self) -> dict[str, Any]:
        """Loss and accuracy on validation pairs. Keeps the weights of the lowest loss."""
        if not self.validation:
            return {}
        pairs = self.validation[: self.scored]
        chosen, rejected = self._rewards(pairs)
        differences = torch.tensor(chosen) - torch.tensor(rejected)
        scores = {
            "loss": float(-F.logsigmoid(differences).mean()),
            "accuracy": float(((differences > 0).float() + 0.5 * (differences == 0)).mean()),
        }
        now, early_stop = self.loop.progress, self.recipe.optimization.early_stop
        if now.best_value is None or scores["loss"] < now.best_value:
            self.loop.save_best(scores["loss"])
        evaluations = (now.step - (now.best_step or 0)) / self.loop.schedule.validate_every
        now.stopped = early_stop is not None and evaluations >= early_stop
        return {"validation": {"validation": scores}}

    def describe(self, data: StepData) -> str:
        names = [self.pairs[number].location for numbers in data.numbers for number in numbers]
        return f"({'; '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''})"

    def save_weights(self, folder: Path) -> None:
        save_file(self.loop.trained_weights(), folder / TRAINED_FILE)

    def state(self) -> dict[str, Any]:
        return {}

    # After the last step

    def _rewards(
        self, pairs: Sequence[EncodedPair], prompts: Sequence[tuple[int, ...]] | None = None
    ) -> tuple[list[float], list[float]]:
        """The rewards of the chosen and of the rejected answers, behind their own prompts or others."""
        asked = prompts or [pair.prompt for pair in pairs]
        rows = [(*prompt, *pair.chosen) for prompt, pair in zip(asked, pairs, strict=True)]
        rows += [(*prompt, *pair.rejected) for prompt, pair in zip(asked, pairs, strict=True)]
        scorer = RewardScorer(self.model, self.tokenizer, 2 * self.recipe.optimization.batch_size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            found = scorer.score_ids(rows)
        return found[: len(pairs)], found[len(pairs) :]

    def _write_results(self, trainable: int, total: int) -> None:
        """Writes report, predictions and weights, and at the end results.json, which marks the run as finished."""
        records, results = read_metrics(self.out / LOG_FILE), dict[str, Any]()
        if self.validation:
            report, predictions = self._evaluate()
            results = report.to_dict()
            write_json_lines(self.out / PREDICTIONS_FILE, predictions)
            self.console.print(report.to_rows().to_rich("reward"))
        draw_curves(records, self.out / CURVES_FILE)
        now = self.loop.progress
        results |= {
            "stage": self.stage,
            "method": self.recipe.method.name,
            "seed": self.recipe.run.seed,
            "steps": now.step,
            "best_step": now.best_step,
            "seconds": now.seconds,
            "pairs": {split: one.to_dict() for split, one in self.splits.intakes.items()},
            "trainable_parameters": trainable,
            "parameters": total,
            "peak_memory_bytes": peak_memory(self.device),
        }
        write_text(self.out / "README.md", render_card(self.recipe, results))
        with self._written_export() as folder:
            save_tuned_model(self.model, self.tokenizer, self.tuning, folder, dtype=self.dtype)
        write_json(self.out / RESULTS_FILE, results)

    def _evaluate(self) -> tuple[RewardReport, list[dict[str, Any]]]:
        def read(ids: tuple[int, ...]) -> str:
            text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
            return text

        pairs = self.validation
        chosen, rejected = self._rewards(pairs)
        shuffled = self._rewards(pairs, exchange_prompts(pairs))
        rules = PlainRules.learn((read(pair.chosen), read(pair.rejected)) for pair in self.pairs)
        scored, predictions = list[ScoredPair](), list[dict[str, Any]]()
        for index, pair in enumerate(pairs):
            texts = read(pair.chosen), read(pair.rejected)
            scored.append(
                ScoredPair(
                    kind=pair.kind,
                    chosen=chosen[index],
                    rejected=rejected[index],
                    chosen_length=len(pair.chosen),
                    rejected_length=len(pair.rejected),
                    shuffled_chosen=shuffled[0][index],
                    shuffled_rejected=shuffled[1][index],
                    rules=rules.judge(*texts),
                )
            )
            for role, text, score in zip(("chosen", "rejected"), texts, (chosen[index], rejected[index]), strict=True):
                line = {"prompt": read(pair.prompt), "answer": text, "score": score, "role": role, "kind": pair.kind}
                predictions.append(line)
        return report_rewards(scored), predictions


def exchange_prompts(pairs: Sequence[EncodedPair]) -> list[tuple[int, ...]]:
    """A prompt of another pair for each pair; the same one if there is no other."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    numbers = {prompt: index for index, prompt in enumerate(prompts)}
    shift = max(1, len(prompts) // 2)
    return [prompts[(numbers[pair.prompt] + shift) % len(prompts)] for pair in pairs]


def render_card(recipe: FeedbackRecipe, results: Mapping[str, Any]) -> str:
    """The README of a reward model."""
    lines = [
        "# A reward model",
        "",
        f"{recipe.model.name} with a head that rewards answers, tuned by gmask ({recipe.method.name}, "
        f"{results['steps']} steps, loss {_loss_name(recipe.reward.loss)}). `gmask score --reward FOLDER` and "
        "`gmask.load` read it.",
    ]
    if "accuracy" in results:
        lines += [
            "",
            "| pairs | accuracy | 95 % interval | prompts exchanged | plain rules | number |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for kind, one in results["accuracy"].items():
            other, rules = (results[name][kind]["accuracy"] for name in ("prompt_shuffled", "plain_rules"))
            lines.append(
                f"| {kind} | {one['accuracy']:.1%} | {one['low']:.1%} to {one['high']:.1%} | {other:.1%} | "
                f"{rules:.1%} | {one['pairs']} |"
            )
        lines += [
            "",
            "The plain rules read no prompt: worse is an answer that was often rejected in training, one that repeats "
            "itself, one that is the beginning of the other; else a coin decides.",
            f"The longer answer is the better one in {results['longer_wins']['accuracy']:.1%}. Reward and length: "
            f"correlation {results['length_correlation']:.2f}. Calibration error {results['calibration_error']:.3f}.",
        ]
    return "\n".join(lines) + "\n"


def _loss_name(loss: RewardLoss) -> str:
    return "of the last token" if loss == "last-token" else "of every token"
