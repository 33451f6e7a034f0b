"""What the runs on TRL's trainers share: their arguments, the resume, the log, and the weights that they leave.

A checkpoint is that of transformers' Trainer.
"""

import importlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback

from gmask.checkpoints.adapters import has_layers
from gmask.checkpoints.save import write_tokenizer
from gmask.config import hints_of, read_values
from gmask.errors import GmaskError, StoppedError, one_line
from gmask.files import read_object, write_json, writing
from gmask.training.accelerator import RECIPE_KEYS, find_device, forward_dtype
from gmask.training.loop import Termination
from gmask.training.methods import make_peft_config, save_tuned_model
from gmask.training.run_folder import KEPT_ON_ERROR, MetricsLog
from gmask.training.tuning_run import TuningRun


class TRLRun(TuningRun):
    """A run on a trainer of TRL, whose options are ``trl`` in the recipe."""

    tokenizer: Any
    recipe_keys: Mapping[str, str] = RECIPE_KEYS  # the recipe's own keys for some arguments

    def _join_processes(self) -> None:
        self.device = torch.device(find_device(self.recipe.run.device))
        self.args: Any = self._make_arguments()
        self.device = self.args.device
        self.is_main = self.args.process_index == 0
        self.console = Console(stderr=True, quiet=not self.is_main)

    def _make_arguments(self) -> Any:
        raise NotImplementedError

    def _arguments(self, name: str, *, left_out: Sequence[str] = (), **values: Any) -> Any:
        """The arguments of a trainer by the name of their class, with the keys of the recipe and those of ``trl``.

        Args:
            left_out: keys of ``trl`` that are taken care of elsewhere.

        Raises:
            GmaskError: an unknown key, one that the recipe has itself, values that TRL refuses.
        """
        trl: Any = importlib.import_module("trl")
        kind = getattr(trl, name)
        run, optimization, processes = self.recipe.run, self.recipe.optimization, int(os.environ.get("WORLD_SIZE", "1"))
        own = {**optimization.trainer, **self.recipe.trl}
        if name == "DPOConfig" and isinstance(own.get("loss_type"), str):
            own["loss_type"] = [own["loss_type"]]  # TRL reads both
        own = read_values(own, hints_of(kind), "trl")
        for key in own:
            if key in self.recipe_keys:
                raise GmaskError(f"trl.{key}: set {self.recipe_keys[key]} instead")
        shared = {
            "output_dir": str(self.out),
            "use_cpu": self.device.type == "cpu",
            "bf16": forward_dtype(self.tuning, self.device.type) == torch.bfloat16,
            "seed": run.seed,
            "full_determinism": run.deterministic,
            "per_device_train_batch_size": optimization.batch_size,
            "per_device_eval_batch_size": optimization.batch_size,
            "ddp_backend": "gloo" if self.device.type == "cpu" and processes > 1 else None,
            "ddp_find_unused_parameters": False,
            "learning_rate": optimization.learning_rate,
            "lr_scheduler_type": optimization.schedule,
            "weight_decay": optimization.weight_decay,
            "max_grad_norm": optimization.clip_norm,
            "gradient_checkpointing": optimization.gradient_checkpointing,
            "logging_first_step": True,
            "save_total_limit": optimization.keep_last,
            "report_to": "none",
            "disable_tqdm": False,
        }
        given = {key: value for key, value in own.items() if key not in left_out}
        try:
            return kind(**{**shared, **values, **given})
        except (ValueError, TypeError) as error:
            raise GmaskError(f"trl: {one_line(error)}") from error

    def _adapter_config(self) -> Any:
        """The configuration from which TRL makes the adapter of the method; None if it makes none."""
        if not self.recipe.method.makes_adapter:
            return None
        config = make_peft_config(self.recipe.method)
        config.task_type = "CAUSAL_LM"
        return config

    def _has_checkpoint(self) -> bool:
        return last_trainer_checkpoint(self.out) is not None

    def _fit(self, trainer: Any, log: "LogCallback") -> None:
        """Makes the steps that are left.

        Raises:
            StoppedError: SIGTERM came to one of the processes; the step, or rollout, was finished and saved.
            GmaskError: an option that TRL refuses, a loss that is no number, a file that cannot be written.
        """
        last = last_trainer_checkpoint(self.out)
        try:
            with log.termination, writing(self.out / "checkpoint", self.out, kept=KEPT_ON_ERROR):  # by the Trainer
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except AllStepsMade:
            pass
        except ValueError as error:  # such as an unknown loss_type, which TRL finds at the first step
            if isinstance(error, GmaskError):
                last_trainer_checkpoint(self.out)  # removes what Trainer left half-written
                raise
            raise GmaskError(f"trl: {one_line(error)}") from error
        except (TypeError, ArithmeticError) as error:
            options = [*self.recipe.optimization.trainer, *self.recipe.trl]
            if not options or isinstance(error, FloatingPointError):
                raise
            raise GmaskError(f"trl: {one_line(error)}; check {', '.join(options)}") from error
        finally:
            log.close()
        if log.stopped_at is not None:
            goes_on = f"the same command goes on from checkpoint-{log.stopped_at}"
            raise StoppedError(f"stopped by SIGTERM after step {log.stopped_at}; {goes_on}")

    def _export_trainer(self, model: Any) -> None:
        """Writes the weights of a trainer's model."""
        with self._written_export() as folder:
            if self.recipe.method.makes_adapter:
                model.save_pretrained(folder)
                path = folder / "adapter_config.json"
                write_json(path, {**read_object(path), "base_model_name_or_path": self.recipe.model.name})
                write_tokenizer(self.tokenizer, folder, published=False)
            else:
                save_tuned_model(model, self.tokenizer, self.tuning, folder, dtype=self.dtype)


class AllStepsMade(Exception):
    """A run that was killed behind its last step is resumed: transformers would make one more."""


class LogCallback(TrainerCallback):
    """Writes metrics.jsonl and TensorBoard's events, one record for each entry of the trainer's log.

    A run that SIGTERM asks to stop is ended with a checkpoint behind the first step that `may_stop`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.log: MetricsLog | None = None
        self.termination = Termination()
        self.stopped_at: int | None = None  # step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.log = MetricsLog(self.out, after_step=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AllStepsMade

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.may_stop(state.global_step) or state.global_step >= state.max_steps:
            return
        asked = torch.tensor(float(self.termination.is_requested), device=args.device)
        if args.world_size > 1:  # all processes stop behind the same step
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def may_stop(self, step: int) -> bool:
        """Whether a checkpoint may be written behind a step."""
        return True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        record = {"step": state.global_step, **self.read(logs or {})}
        if len(record) > 1:
            self.check(record)
            self.add(record)

    def read(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of an entry by the names of gmask's logs."""
        raise NotImplementedError

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises `GmaskError` for a loss that is no number."""
        if not math.isfinite(record.get("loss", 0.0)):
            raise GmaskError(
                f"step {record['step']}: the loss is {record['loss']}: start again in another run.out, with a lower "
                "learning rate; the last checkpoint is kept"
            )

    def add(self, record: dict[str, Any]) -> None:
        """Writes a record, in the first process."""
        if self.log is not None:
            self.log.add(record)

    def close(self) -> None:
        """Closes the log, also of a run that was stopped."""
        if self.log is not None:
            self.log.__exit__(None, None, None)
            self.log = None


def refuse_adapter_in_place(model: PreTrainedModel) -> None:
    """Raises `GmaskError` for a model whose adapter gmask put in place: TRL's reference would be without it."""
    if has_layers(model):
        raise GmaskError(
            "the model has an adapter, and the reference would be reloaded without it: merge it first (gmask merge)"
        )


def last_trainer_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of transformers' Trainer; drafts that a killed run left are removed."""
    found = sorted(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    complete = [folder for folder in found if _is_complete(folder)]
    for folder in found:
        if folder not in complete:
            shutil.rmtree(folder, ignore_errors=True)
    return complete[-1] if complete else None


def _is_complete(checkpoint: Path) -> bool:
    """Whether the file that Trainer writes last is whole."""
    try:
        read_object(checkpoint / "trainer_state.json")
    except GmaskError:
        return False
    return True
