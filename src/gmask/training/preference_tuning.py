"""DPO and KTO: TRL's trainers as they are, on ids that gmask made, with checks of the first step.

TRL makes ids of texts by the chat template, which refuses control words. gmask's own ids have no such limits, and are
put in the place of TRL's dataset before the training begins.
"""

import copy
import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from gmask.checkpoints.load import load
from gmask.errors import GmaskError, one_line
from gmask.files import write_json, write_text
from gmask.generation.padding import check_numbers
from gmask.models.base import stop_dropout
from gmask.models.glm import GLMConfig
from gmask.recipes.feedback import FeedbackRecipe, Stage, load_feedback_recipe
from gmask.recipes.tuning import check_model
from gmask.training.feedback import (
    EncodedJudgement,
    EncodedPair,
    FeedbackRun,
    PreferenceEncoder,
    show_pair,
)
from gmask.training.methods import apply_method, peak_memory
from gmask.training.report import CURVES_FILE, draw_curves
from gmask.training.run_folder import LOG_FILE, RESULTS_FILE, read_metrics
from gmask.training.trl_run import LogCallback, TRLRun, refuse_adapter_in_place

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""By how much the log-probability of an answer may differ, as a share of it and at least in nats."""


def run_preference_tuning(
    recipe_path: str, stage: Stage, overrides: Sequence[str] = (), *, resume: bool = True
) -> Path:
    """Tunes a model on preferences by a recipe, resuming from the last checkpoint; returns the folder of its weights.

    Args:
        stage: dpo or kto.

    Raises:
        GmaskError: a mistake in the recipe or the data, a run of another recipe in the folder, a first step whose
            numbers are not those of the model.
    """
    return PreferenceTuning(load_feedback_recipe(recipe_path, stage, overrides), stage, resume=resume).train()


class PreferenceTuning(TRLRun, FeedbackRun):
    """One run of DPO or KTO."""

    def __init__(self, recipe: FeedbackRecipe, stage: Stage, *, resume: bool = True) -> None:
        self.stage = stage
        super().__init__(recipe, resume=resume)
        self._join_processes()
        self.callback = RunCallback(self)

    def _train(self) -> None:
        """Makes the steps that are left; writes weights and results."""
        settings = self.recipe.model
        model, self.tokenizer = load(
            settings.name, dtype=settings.dtype, device=self.args.device, quantize=settings.quantize
        )
        check_model(
            self.recipe.method,
            is_quantized=getattr(model, "is_quantized", False),
            is_glm=isinstance(model.config, GLMConfig),
        )
        encoder = PreferenceEncoder(self.tokenizer, model.config, self.recipe)
        encode: Any = encoder.encode_judgements if self.stage == "kto" else encoder.encode_pairs
        items = encode(self.splits.train, self.intake_of("train"))
        held = encode(self.splits.validation, self.intake_of("validation")) if self.splits.validation else []
        if self.is_main:
            shown = [show_pair(items[0], self.tokenizer)] if self.stage == "dpo" else []
            self.write_start(self.console, [f"{len(items)} samples, method {self.recipe.method.name}", *shown])
        trainer = self._make_trainer(model, items, held)
        if not self._has_checkpoint():
            check_first_batch(trainer, items, pad=encoder.answers.special.pad, tolerance=TOLERANCE[self.dtype])
        self._fit(trainer, self.callback)
        scores = (find_scores(trainer) or trainer.evaluate()) if held else {}
        if self.is_main:
            self._write_results(trainer, scores)
        trainer.accelerator.wait_for_everyone()

    def _make_arguments(self) -> Any:
        optimization, processes = self.recipe.optimization, int(os.environ.get("WORLD_SIZE", "1"))
        if self.stage == "kto" and self.recipe.trl.get("precompute_ref_log_probs"):
            raise GmaskError("trl.precompute_ref_log_probs is for dpo: leave it out")
        per_pass, passes = optimization.batch_size, optimization.accumulation
        if self.stage == "kto" and passes % processes:  # whose batches are made beforehand
            raise GmaskError(
                f"optimization.accumulation is {passes}, and {processes} processes share the passes of a step: give a "
                f"multiple of {processes}, and a batch_size that is smaller by as much"
            )
        samples, rest = divmod(per_pass * passes, processes)
        if rest:
            raise GmaskError(
                f"a step of {per_pass * passes} pairs (optimization.batch_size x accumulation) cannot be shared evenly "
                f"by {processes} processes: change one of them"
            )
        passes = next(count for count in range(1, samples + 1) if samples % count == 0 and samples // count <= per_pass)
        return self._arguments(
            "KTOConfig" if self.stage == "kto" else "DPOConfig",
            left_out=("precompute_ref_log_probs",),
            per_device_train_batch_size=samples // passes,
            gradient_accumulation_steps=passes,
            warmup_steps=optimization.warmup,
            num_train_epochs=optimization.epochs or 1,
            max_steps=optimization.steps or -1,
            logging_steps=self.recipe.run.log_every,
            save_steps=optimization.save_every or 100,
            eval_strategy="steps" if self.splits.validation else "no",
            eval_steps=optimization.evaluate_every or 100,
            max_length=None,
            **({"train_sampling_strategy": "sequential"} if self.stage == "kto" else {}),
        )

    def _make_trainer(self, model: PreTrainedModel, items: Sequence[Any], held: Sequence[Any]) -> Any:
        trl: Any = importlib.import_module("trl")
        refuse_adapter_in_place(model)
        method = self.recipe.method
        reference = None
        if not method.makes_adapter:
            apply_method(model, method)
            reference = copy.deepcopy(model).requires_grad_(False).eval()
        said = [{"role": "user", "content": "a"}]
        replies = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
        stand_in: dict[str, list[Any]] = {"prompt": [said] * 2, "chosen": replies[:1] * 2, "rejected": replies[1:] * 2}
        if self.stage == "kto":
            stand_in = {"prompt": [said] * 2, "completion": replies, "label": [True, False]}
        kind = trl.KTOTrainer if self.stage == "kto" else trl.DPOTrainer
        try:
            trainer = kind(
                model=model,
                ref_model=reference,
                args=self.args,
                train_dataset=Dataset.from_dict(stand_in),
                eval_dataset=Dataset.from_dict(stand_in) if held else None,
                processing_class=self.tokenizer,
                peft_config=self._adapter_config(),
                callbacks=[self.callback],
            )
        except (ValueError, NotImplementedError) as error:
            raise GmaskError(f"trl: {one_line(error)}") from error
        if self.args.disable_dropout:  # TRL knows modules alone, and the dropout of attention weights is a number
            stop_dropout(trainer.model)
        trainer.train_dataset = self._as_dataset(items, shuffled=True)
        if held:
            trainer.eval_dataset = self._as_dataset(held[: self.recipe.data.validation_limit], shuffled=False)
        if self.recipe.trl.get("precompute_ref_log_probs"):
            precompute_reference(trainer, self.recipe.optimization.batch_size)
        return trainer

    def _as_dataset(self, items: Sequence[Any], *, shuffled: bool) -> Any:
        """The ids in the columns of TRL's collators. KTO's batches are made here, in the order of the seed."""
        if self.stage == "dpo":
            pairs: Sequence[EncodedPair] = items
            return Dataset.from_list(
                [
                    {"prompt_ids": list(one.prompt), "chosen_ids": list(one.chosen), "rejected_ids": list(one.rejected)}
                    for one in pairs
                ]
            )
        order = list(range(len(items)))
        if shuffled:
            order = np.random.default_rng([self.recipe.run.seed, 2]).permutation(len(items)).tolist()
        return Dataset.from_list(kto_rows([items[index] for index in order], self.recipe.optimization.batch_size))

    def _write_results(self, trainer: Any, scores: dict[str, float]) -> None:
        records = join_records(read_metrics(self.out / LOG_FILE))
        draw_curves(records, self.out / CURVES_FILE)
        trained = [one for one in trainer.model.parameters() if one.requires_grad]
        results = {
            "stage": self.stage,
            "method": self.recipe.method.name,
            "seed": self.recipe.run.seed,
            "steps": trainer.state.global_step,
            "samples": {split: one.to_dict() for split, one in self.splits.intakes.items()},
            "validation": {name.removeprefix("eval_"): value for name, value in scores.items() if name[:5] == "eval_"},
            "first_loss": next((one["loss"] for one in records if "loss" in one), None),
            "last_loss": next((one["loss"] for one in reversed(records) if "loss" in one), None),
            "trainable_parameters": sum(one.numel() for one in trained),
            "peak_memory_bytes": peak_memory(self.device),
        }
        write_text(self.out / "README.md", self._card(results))
        self._export_trainer(trainer.model)
        write_json(self.out / RESULTS_FILE, results)

    def _card(self, results: dict[str, Any]) -> str:
        options = json.dumps(self.recipe.trl, ensure_ascii=False)
        lines = [
            f"# {self.recipe.model.name}, tuned by {self.stage.upper()}",
            "",
            f"{results['steps']} steps, method {self.recipe.method.name}, options of TRL: {options}. Loss of the first "
            f"step {results['first_loss']:.4f}, of the last {results['last_loss']:.4f}.",
        ]
        if results["validation"]:
            lines += ["", "| validation | |", "|---|--:|"]
            lines += [
                f"| {name} | {value:.4g} |"
                for name, value in results["validation"].items()
                if isinstance(value, int | float) and "per_second" not in name
            ]
        return "\n".join(lines) + "\n"


def kto_rows(items: Sequence[EncodedJudgement], batch_size: int) -> list[dict[str, Any]]:
    """The rows of KTO. The KL is measured on the answers of a batch, each behind the next prompt, as in TRL.

    A last batch of one has no other answer, and is left out.

    Raises:
        GmaskError: batches of one.
    """
    if batch_size < 2 or len(items) < 2:
        raise GmaskError("kto compares the answers of a batch: make optimization.batch_size 2 at least, with 2 samples")
    rows: list[dict[str, Any]] = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        if len(batch) < 2:
            continue
        for index, one in enumerate(batch):
            rows.append(
                {
                    "prompt_ids": list(one.prompt),
                    "completion_ids": list(one.answer),
                    "KL_completion_ids": list(batch[index - 1].answer),
                    "label": one.is_good,
                }
            )
    return rows


def precompute_reference(trainer: Any, batch_size: int) -> None:
    """Computes the log-probabilities of DPO's reference once, and drops the reference."""
    model = trainer.model if trainer.ref_model is None else trainer.ref_model

    def add(dataset: Any) -> Any:
        columns: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            batch = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(rows).items()}
            for name, values in zip(columns, trainer.compute_ref_log_probs(model, batch), strict=True):
                columns[name] += values.tolist()
        return dataset.add_column("ref_chosen_logps", columns["ref_chosen_logps"]).add_column(
            "ref_rejected_logps", columns["ref_rejected_logps"]
        )

    trainer.train_dataset = add(trainer.train_dataset)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = add(trainer.eval_dataset)
    trainer.precompute_ref_logps, trainer.ref_model = True, None


def answer_logprob(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The log-probability of an answer behind its prompt, in nats: one row, without padding."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    check_numbers(logits)
    found = F.log_softmax(logits.double(), -1)
    return found.gather(1, ids[0, len(prompt) :, None]).sum()


def check_first_batch(trainer: Any, items: Sequence[Any], *, pad: int, tolerance: float) -> None:
    """Compares the reference in a padded batch of TRL's with the model in single rows, before the first step.

    They are the same numbers if the reference is the model as it began, and if the batch reads as a single row does.

    Raises:
        GmaskError: they differ.
    """
    trainer.model.eval()
    count = min(len(trainer.train_dataset), 2 * trainer.args.per_device_train_batch_size, 8)
    rows = [trainer.train_dataset[index] for index in range(count)]
    batch = {name: value.to(trainer.args.device) for name, value in trainer.data_collator(rows).items()}
    if "chosen_ids" in rows[0]:
        answers = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
        found = (
            torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
            if trainer.precompute_ref_logps
            else torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))
        )
    else:
        answers = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
        found = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)[0]
    for (prompt, answer), value in zip(answers, found.tolist(), strict=True):
        expected = float(answer_logprob(trainer.model, prompt, answer))
        if abs(value - expected) > tolerance * max(1.0, abs(expected)):
            raise GmaskError(
                f"the reference gives an answer {value:.4f} nats in a batch, the model {expected:.4f} alone: the "
                "reference is not the model as it begins, or padding is read; merge what was trained, and save it"
            )


class RunCallback(LogCallback):
    """The log of DPO and KTO, with a check of the first loss."""

    def __init__(self, run: PreferenceTuning) -> None:
        super().__init__(run.out)
        self.run = run

    def read(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        return read_log_entry(logs)

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises `GmaskError` as well for a first loss of DPO that is not ln 2."""
        super().check(record)
        if record["step"] != 1 or "loss" not in record:
            return
        loss, options = record["loss"], self.run.recipe.trl
        is_plain = self.run.stage == "dpo" and options.get("loss_type", "sigmoid") in ("sigmoid", ["sigmoid"])
        bound = 1e-3 if self.run.dtype == torch.float32 else 0.05
        if is_plain and not options.get("label_smoothing") and abs(loss - math.log(2)) > bound:
            raise GmaskError(
                f"the first loss is {loss:.4f}, and has to be ln 2 = 0.6931: the reference is not the model as it began"
            )


def find_scores(trainer: Any) -> dict[str, float]:
    """The scores of a validation after the last step; none if it ended with another step."""
    state = trainer.state
    found = [one for one in state.log_history if "eval_loss" in one and one["step"] == state.global_step]
    return dict(found[-1]) if found else {}


def join_records(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a step: transformers logs a validation apart. Those without a loss are left out."""
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        steps.setdefault(record["step"], {}).update(record)
    return [record for record in steps.values() if {"loss", "gradient_norm", "learning_rate"} <= record.keys()]


def read_log_entry(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an entry of transformers' log by the names of gmask's logs."""
    numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
    held = {name.removeprefix("eval_"): value for name, value in numbers.items() if name.startswith("eval_")}
    if held:
        scores = {name: value for name, value in held.items() if "per_second" not in name and name != "runtime"}
        return {"validation": {"validation": scores}}
    if "train_runtime" in numbers:
        return {}
    return {("gradient_norm" if name == "grad_norm" else name): value for name, value in numbers.items()}
