"""The fine-tuning loop on transformers' `Trainer`: steps, order of the samples, validation, checkpoints, exact resume.

transformers' `Trainer` runs the loop: devices, mixed precision, DistributedDataParallel, FSDP, DeepSpeed, optimizer and
schedule. What is ours: the loss (a sum over the labelled tokens of a step, in whatever process they are, divided by
their number), the order of the samples, the checks of every step, evaluation by the task's metrics, and checkpoints
that are written whole or not at all.
"""

import copy
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from gmask.config import check_keys
from gmask.errors import GmaskError, one_line
from gmask.hardware import best_device, training_dtype
from gmask.recipes.tuning import TuningRecipe
from gmask.training.examples import Batch
from gmask.training.losses import Encoded, Objective, count_items
from gmask.training.methods import RankSchedule
from gmask.training.run_folder import PREFIX, MetricsLog

STATE_FILE = "trainer_state.json"
WEIGHTS_FILE = "trained.safetensors"
PROGRESS_FILE = "progress.json"
BEST_FILE = "best.safetensors"
RANKS_FILE = "ranks.pt"


@dataclass(frozen=True)
class Schedule:
    """When a run logs, saves, evaluates and stops; in steps."""

    log_every: int
    save_every: int
    keep_last: int
    evaluate_every: int
    early_stop: int | None = None  # evaluations in a row without a new best
    best: str = "loss"  # the metric of the best checkpoint

    @property
    def greater_is_better(self) -> bool:
        return self.best != "loss"


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint."""

    supervised_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    stopped: bool = False  # early


class _DropRanks(TrainerCallback):
    """adalora: weighs the ranks while the gradients of a step are still there."""

    def __init__(self, ranks: RankSchedule) -> None:
        self.ranks = ranks

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.ranks.update(state.global_step + 1)


class BatchOrder(Sampler[list[int]]):
    """The passes of one process over a whole run, step after step; it depends on nothing but its arguments.

    The samples come in an endless row of epochs, each shuffled anew, and every step takes the next
    ``batch_size * accumulation`` of them, over the end of an epoch if need be. The processes share the samples of a
    step, so that it is the same step whatever their number. A resumed run skips the passes that it has made.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        steps: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        length_grouped: bool = False,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        """
        Args:
            lengths: of the samples, in tokens.
            batch_size: samples of one pass, at most.
            accumulation: passes of a step, for one process.
            length_grouped: samples of like length come in the same step, and in the same pass.

        Raises:
            GmaskError: the samples of a step cannot be shared evenly.
        """
        self.lengths, self.steps, self.seed, self.length_grouped = lengths, steps, seed, length_grouped
        self.process, self.processes = process, processes
        self.samples_per_step = batch_size * accumulation
        self.passes = -(-accumulation // processes)
        if self.samples_per_step % processes:
            raise GmaskError(
                f"a step of {self.samples_per_step} samples cannot be shared by {processes} processes: make "
                f"optimization.batch_size x optimization.accumulation a multiple of {processes}"
            )

    def __len__(self) -> int:
        """Passes of this process in the whole run."""
        return self.steps * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        stream = self._stream()
        for _ in range(self.steps):
            samples = list(islice(stream, self.samples_per_step))
            if self.length_grouped:
                samples.sort(key=lambda sample: -self.lengths[sample])
            mine = samples[self.process :: self.processes]
            yield from (part.tolist() for part in np.array_split(mine, self.passes))

    def _stream(self) -> Iterator[int]:
        epoch = 0
        while True:
            yield from self._epoch(epoch)
            epoch += 1

    def _epoch(self, epoch: int) -> list[int]:
        (state,) = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state))
        if self.length_grouped:
            grouped: list[int] = get_length_grouped_indices(
                list(self.lengths), self.samples_per_step, generator=generator
            )
            return grouped
        return torch.randperm(len(self.lengths), generator=generator).tolist()


class TuningTrainer(Trainer):
    """Fits the parameters of a model that require gradients."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        objective: Objective,
        encoded: Encoded,
        order: BatchOrder,
        validate: Callable[[], dict[str, float]] | None,
        schedule: Schedule,
    ) -> None:
        """
        Args:
            encoded: the items that `order` counts.
            validate: loss and metrics on held-out samples, all processes together; None without any.
        """
        with _accepted(model):
            super().__init__(model=model, args=args)
        if args.fsdp and not self.is_fsdp_enabled:
            raise GmaskError(
                "optimization.trainer.fsdp shards the weights on GPUs, and this run is on the CPU: leave it out"
            )
        self.remove_callback(PrinterCallback)
        self.objective, self.encoded, self.order = objective, encoded, order
        self.validate, self.schedule = validate, schedule
        self.out = Path(str(args.output_dir))
        self.progress = Progress()
        self._recorded = 0  # the last step that was
        self._loss, self._items, self._started = torch.zeros(()), 0, 0.0  # of the step that is being made
        self._seen: list[tuple[list[int], Batch]] = []  # this step's, to be named if they are bad
        self.ranks = RankSchedule.of(model, steps=order.steps)
        if self.ranks is not None:
            self.add_callback(_DropRanks(self.ranks))

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One pass over it is the whole run."""

        def prepare(numbers: list[int]) -> dict[str, Any]:
            return {
                "numbers": numbers,
                "batch": self.objective.collate([self.encoded.items[number] for number in numbers]),
            }

        return DataLoader(
            range(len(self.encoded.items)),  # type: ignore[arg-type]  # numbers, which `prepare` makes a batch of
            batch_sampler=self.order,
            collate_fn=prepare,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Labelled tokens of the step, of all its passes in all processes."""
        items = torch.tensor(sum(count_items(inputs["batch"]) for inputs in batch_samples), device=device)
        if self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        self._seen = []
        self._loss = torch.zeros((), device=device)
        self._items, self._started = int(items), time.monotonic()
        if not self._items:
            self._seen = [(inputs["numbers"], inputs["batch"]) for inputs in batch_samples]
            raise GmaskError(
                f"step {self.state.global_step + 1}: no token of its samples is supervised, so there is nothing to "
                f"learn from ({self._name_samples()})"
            )
        return items

    # One step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This pass's part of the mean over the items of the step."""
        self._seen.append((inputs["numbers"], inputs["batch"]))
        total, _ = self.objective.loss(model, inputs["batch"])
        mean = total / self._items
        self._loss += mean.detach()
        loss: Tensor = mean * self.args.world_size  # the processes' gradients are averaged
        if self.ranks is not None:
            loss = loss + self.ranks.penalty() / self.order.passes
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Before the weights change: refuses a step that would spoil them."""
        norm = float(super()._get_grad_norm(model, grad_norm))
        if not (math.isfinite(norm) and bool(torch.isfinite(self._loss))):
            self._refuse(norm)
        return norm

    def _refuse(self, norm: float) -> None:
        step = self.state.global_step + 1
        rank = f"-process-{self.args.process_index}" if self.args.world_size > 1 else ""
        path = self.out / f"bad-batch-{step:08d}{rank}.pt"
        torch.save([{"samples": numbers, **batch} for numbers, batch in self._seen], path)
        raise GmaskError(
            f"step {step}: the loss is {float(self._loss)} and the gradient's norm {norm}; its samples "
            f"({self._name_samples()}) are kept in {path}; start again in another run.out, with a lower "
            "optimization.learning_rate"
        )

    def _name_samples(self) -> str:
        names = [self.encoded.describe(number) for numbers, _ in self._seen for number in numbers]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return ", ".join(names[:8]) + more

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, *others: Any, learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        """What follows a step: its record, the evaluation, the checkpoint."""
        step, last = self.state.global_step, self.state.max_steps
        if step == self._recorded:  # transformers comes by once more at the end of the data
            return
        self._recorded = step
        record = self._record(grad_norm, learning_rate)
        if self.validate is not None and (step % self.schedule.evaluate_every == 0 or step == last):
            record["validation"] = {"validation": self._evaluate_now()}
        ends = step == last or self.progress.stopped
        if self._log is not None and (step % self.schedule.log_every == 0 or ends or "validation" in record):
            self._log.add(record)
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}")
        self._bar.update()
        if step % self.schedule.save_every == 0 or ends:
            self._save_checkpoint()
        if self.progress.stopped:
            self.control.should_training_stop = True

    def _record(self, grad_norm: float, learning_rate: float | None) -> dict[str, Any]:
        loss = self.accelerator.reduce(self._loss, reduction="sum") if self.args.world_size > 1 else self._loss
        seconds = time.monotonic() - self._started
        self.progress.supervised_tokens += self._items
        self.progress.seconds += seconds
        samples = self.state.global_step * self.order.samples_per_step
        return {
            "step": self.state.global_step,
            "epoch": samples / len(self.encoded.items),
            "loss": float(loss),
            "learning_rate": learning_rate,
            "gradient_norm": grad_norm,
            "supervised_tokens": self._items,
            "all_supervised_tokens": self.progress.supervised_tokens,
            "samples_per_second": self.order.samples_per_step / seconds,
            "seconds": self.progress.seconds,
        }

    # Evaluation

    def _evaluate_now(self) -> dict[str, float]:
        """Loss and metrics; keeps the weights if they are the best so far, and decides on an early stop."""
        assert self.validate is not None
        metrics = self.validate()
        step, value = self.state.global_step, metrics[self.schedule.best]
        sign = 1 if self.schedule.greater_is_better else -1
        if self.progress.best_value is None or sign * value > sign * self.progress.best_value:
            self.progress.best_step, self.progress.best_value = step, value
            self._save_best()
        evaluations = (step - (self.progress.best_step or 0)) / self.schedule.evaluate_every
        self.progress.stopped = self.schedule.early_stop is not None and evaluations >= self.schedule.early_stop
        return metrics

    def _save_best(self) -> None:
        weights = self.trained_weights()
        if self.args.should_save:
            draft = self.out / f".{BEST_FILE}"
            with refuse_full_disk(self.out / BEST_FILE, draft):
                save_file(weights, draft)
                draft.replace(self.out / BEST_FILE)

    def load_best(self) -> None:
        """Puts the weights of the best evaluation back into the model, if there was one."""
        if self.progress.best_step is not None:
            self._fill(self.out / BEST_FILE)

    def trained_weights(self) -> dict[str, Tensor]:
        """The parameters that train by their names in the model, on the CPU; whole ones of a sharded model."""
        trained = [name for name, parameter in self.bare_model.named_parameters() if parameter.requires_grad]
        if self.is_deepspeed_enabled:
            state = self.accelerator.get_state_dict(self.model_wrapped)
            return {name: state[name].cpu() for name in trained}
        with unsharded(self.bare_model):
            parameters = dict(self.bare_model.named_parameters())
            return {name: parameters[name].detach().cpu().clone() for name in trained}

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model without what wraps it."""
        model: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        return model

    # Checkpoints

    def fit(self) -> None:
        """Trains from the last checkpoint, if there is one, to the end."""
        checkpoint = last_checkpoint(self.out)
        step = 0
        if checkpoint is not None:
            step = int(json.loads((checkpoint / STATE_FILE).read_text("utf-8"))["global_step"])
            self.progress = Progress(**json.loads((checkpoint / PROGRESS_FILE).read_text("utf-8")))
        if self.progress.stopped or step >= self.order.steps:
            assert checkpoint is not None
            self._load_from_checkpoint(str(checkpoint))
            return
        self._recorded = step
        is_main = self.is_world_process_zero()
        bar = tqdm(
            initial=step, total=self.order.steps, unit="step", desc="tuning", dynamic_ncols=True, disable=not is_main
        )
        with ExitStack() as stack:
            self._bar = stack.enter_context(bar)
            self._log = stack.enter_context(MetricsLog(self.out, after_step=step)) if is_main else None
            try:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except ImportError as error:  # of what an optimizer of optimization.trainer needs
                raise GmaskError(f"optimization.trainer: {one_line(error)}") from error

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Writes ``checkpoint-STEP``: what trains, optimizer, schedule, random state; the last ones are kept."""
        place = self.out / f"{PREFIX}{self.state.global_step:08d}"
        draft = place.with_name(f".{place.name}")
        if self.args.should_save:
            shutil.rmtree(draft, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with refuse_full_disk(place, draft):
            draft.mkdir(parents=True, exist_ok=True)
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.args.should_save:
                save_file(self.trained_weights(), draft / WEIGHTS_FILE)
            if self.ranks is not None and self.args.should_save:
                torch.save(self.ranks.state(), draft / RANKS_FILE)
            self._save_optimizer_and_scheduler(str(draft))
            self._save_scaler(str(draft))
            self._save_rng_state(str(draft))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (draft / PROGRESS_FILE).write_text(json.dumps(asdict(self.progress)), "utf-8")
                self.state.save_to_json(str(draft / STATE_FILE))
                shutil.rmtree(place, ignore_errors=True)
                os.replace(draft, place)
                for old in list_checkpoints(self.out)[: -self.schedule.keep_last]:
                    shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._fill(Path(resume_from_checkpoint) / WEIGHTS_FILE)
        if self.ranks is not None:
            self.ranks.restore(torch.load(Path(resume_from_checkpoint) / RANKS_FILE, weights_only=True))

    def _fill(self, path: Path) -> None:
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise GmaskError(f"{path}: damaged ({error}); delete its folder to resume from before") from error
        parameters = dict(self.bare_model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                place = parameters[name]
                if isinstance(place, DTensor):
                    weight = distribute_tensor(weight.to(place.device), place.device_mesh, place.placements)
                place.copy_(weight)


def list_checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(folder for folder in out.glob(f"{PREFIX}*") if (folder / STATE_FILE).is_file())


def last_checkpoint(out: Path) -> Path | None:
    checkpoints = list_checkpoints(out)
    return checkpoints[-1] if checkpoints else None


@contextmanager
def _accepted(model: PreTrainedModel) -> Iterator[None]:
    """transformers knows of no adapters of integers but PEFT's, and would refuse a prefix; what else it refuses is told
    in one line."""
    was_quantized = getattr(model, "is_quantized", False)
    if was_quantized:
        model.is_quantized = False
    try:
        yield
    except ValueError as error:  # settings of optimization.trainer that do not go together
        raise GmaskError(f"optimization.trainer: {one_line(error)}") from error
    finally:
        if was_quantized:
            model.is_quantized = True


@contextmanager
def refuse_full_disk(place: Path, draft: Path) -> Iterator[None]:
    """Turns what goes wrong in writing a draft into one line, and removes the draft."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises the last
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise GmaskError(f"{place}: cannot be written ({reason}); the last complete checkpoint is kept") from error


OWN = {
    "output_dir": "run.out", "seed": "run.seed", "data_seed": "run.seed", "full_determinism": "run.deterministic",
    "use_cpu": "run.device", "logging_steps": "run.log_every", "resume_from_checkpoint": "--resume or --no-resume",
    "num_train_epochs": "optimization.epochs", "max_steps": "optimization.steps",
    "per_device_train_batch_size": "optimization.batch_size",
    "gradient_accumulation_steps": "optimization.accumulation", "learning_rate": "optimization.learning_rate",
    "lr_scheduler_type": "optimization.schedule", "warmup_steps": "optimization.warmup",
    "weight_decay": "optimization.weight_decay", "max_grad_norm": "optimization.clip_norm",
    "bf16": "optimization.dtype", "fp16": "optimization.dtype",
    "gradient_checkpointing": "optimization.gradient_checkpointing",
    "activation_checkpointing": "optimization.gradient_checkpointing",
    "train_sampling_strategy": "optimization.length_grouped", "eval_steps": "optimization.evaluate_every",
    "eval_strategy": "optimization.evaluate_every", "save_steps": "optimization.save_every",
    "save_strategy": "optimization.save_every", "save_total_limit": "optimization.keep_last",
    "metric_for_best_model": "task.best", "load_best_model_at_end": "task.best", "greater_is_better": "task.best",
}  # fmt: skip
"""Arguments that a recipe has keys of its own for."""

HEEDED = {
    "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs",
    "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "ddp_backend", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_timeout", "dataloader_pin_memory", "tf32",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "log_level",
}  # fmt: skip
"""Arguments that mean something to a run; what the Trainer would log, evaluate, load or save is done otherwise."""


def check_trainer_keys(values: dict[str, Any]) -> None:
    """Raises `GmaskError` for a key that the Trainer does not know, that has another place in a recipe, or none."""
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    check_keys(values, known, "optimization.trainer")
    for key in values:
        if key in OWN:
            raise GmaskError(f"optimization.trainer.{key}: set {OWN[key]} instead")
        if key not in HEEDED:
            raise GmaskError(f"optimization.trainer.{key} has no effect on a run: leave it out")


def training_arguments(recipe: TuningRecipe) -> TrainingArguments:
    """The arguments of this process; under torchrun or ``accelerate launch`` it joins the others here.

    Raises:
        GmaskError: an unknown key in ``optimization.trainer``, or a value that the Trainer refuses; a device that is
            not there.
    """
    optimization, device = recipe.optimization, find_device(recipe.run.device)
    check_trainer_keys(optimization.trainer)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    values: dict[str, Any] = {
        "output_dir": recipe.run.out,
        "seed": recipe.run.seed,
        "full_determinism": recipe.run.deterministic,
        "use_cpu": device == "cpu",
        "num_train_epochs": 1,  # one pass over the order of the whole run
        "per_device_train_batch_size": optimization.batch_size,
        "gradient_accumulation_steps": -(-optimization.accumulation // processes),
        "learning_rate": optimization.learning_rate,
        "lr_scheduler_type": optimization.schedule,
        "warmup_steps": optimization.warmup,
        "weight_decay": optimization.weight_decay,
        "max_grad_norm": optimization.clip_norm,
        "bf16": forward_dtype(recipe, device) == torch.bfloat16,
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if device == "cpu" and processes > 1 else None,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "use_cache": True,  # as the model's config has it, which is saved; the forward of a step keeps none
        "disable_tqdm": True,
        "report_to": "none",
    }
    values |= dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "no")
    try:
        arguments = TrainingArguments(**values | copy.deepcopy(optimization.trainer))  # which it fills in
        _ = arguments.device
    except (ValueError, TypeError, ImportError) as error:
        raise GmaskError(f"optimization: {' '.join(str(error).split())}") from error
    if processes == 1:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs: one process each, by torchrun
    return arguments


def find_device(name: str | None) -> str:
    """``cpu``, ``cuda`` or ``mps``. Raises `GmaskError` for another, or one that is not there."""
    kind = name or best_device()
    if kind not in ("cpu", "cuda", "mps"):
        raise GmaskError(f"run.device is {kind}: choose cpu, cuda or mps (of several GPUs by CUDA_VISIBLE_DEVICES)")
    is_there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_there[kind]:
        raise GmaskError(f"run.device is {kind}, which this machine does not have")
    return kind


def forward_dtype(recipe: TuningRecipe, device: str) -> torch.dtype:
    """What the forward pass computes in; the weights that train are float32 whatever it is."""
    return training_dtype(named_dtype(recipe, device), torch.device(device))


def named_dtype(recipe: TuningRecipe, device: str) -> str:
    """The recipe's word for the type of a pass, or the default of the device."""
    return recipe.optimization.dtype or ("bfloat16" if device == "cuda" else "float32")


def steps_of(epochs: float, samples: int, *, samples_per_step: int) -> int:
    """Steps in which every sample is seen ``epochs`` times; the last step may see a few once more."""
    return max(1, int(np.ceil(epochs * samples / samples_per_step)))


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Every process holds all weights meanwhile, and may call the model as often as it likes without the others.

    All processes must come here together. A model that is not sharded stays as it is.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
