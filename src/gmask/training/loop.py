"""The training loop: steps, checks of every step, validation, log, checkpoints, exact resume.

`Loop` drives a `Run`, which provides data, loss and validation. accelerate provides device, precision, processes and
sharding (`gmask.training.accelerator`). A step may have several passes in several processes: the losses are sums, which
are divided once by the number of labelled tokens in all of them.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import DistributedType, broadcast_object_list, gather_object  # type: ignore[import-untyped]
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from gmask.errors import GmaskError, StoppedError
from gmask.files import writing, written
from gmask.training.accelerator import uses_deepspeed
from gmask.training.diagnostics import SKIPS_IN_A_ROW, SpikeGuard, layer_norms
from gmask.training.examples import Batch
from gmask.training.methods import RankSchedule
from gmask.training.parallel import Grid, Meeting, is_divided, placed_like, unsharded
from gmask.training.run_folder import (
    BEST_FILE,
    KEPT_ON_ERROR,
    SHARDED_FOLDER,
    MetricsLog,
    RunProgress,
    average_tensors,
    last_checkpoint,
    optimizer_state,
    random_state,
    read_checkpoint,
    read_tensors,
    set_random_state,
    write_state,
    write_tensors,
    written_checkpoint,
)
from gmask.training.sharded_checkpoint import wait_for_shards, write_shards


@dataclass(frozen=True, slots=True)
class StepData:
    """The data of one step in one process."""

    batches: Sequence[Batch]  # one for each forward and backward pass
    numbers: Sequence[Sequence[int]]  # of the rows or samples in each batch, to name them
    labelled: int  # terms of the sum of losses: tokens, or samples if candidates or classes are compared
    tokens: int = 0  # read by the model; 0 if they are not counted


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step, over all processes."""

    loss: float  # the mean over all that is labelled, in nats
    learning_rate: float
    gradient_norm: float  # before clipping
    labelled: int
    tokens: int
    seconds: float
    is_skipped: bool = False  # its loss was a spike, and no weight has changed
    layers: dict[str, dict[str, float]] = field(default_factory=dict)  # the norms of each, if they are measured


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often a run validates, logs and saves, and when it ends; in steps."""

    steps: int
    validate_every: int
    log_every: int
    save_every: int | None  # None: at the end, and where the run itself calls `Loop.save`
    keep_last: int  # checkpoints
    keep: int | None = None  # the step of one more checkpoint that is kept


class Termination:
    """Notes SIGTERM, by which machines that are shared or about to stop ask a run to end, instead of dying of it.

    Python handles signals in the main thread only; elsewhere SIGTERM does what it did before.
    """

    def __init__(self) -> None:
        self.is_requested = False

    def __enter__(self) -> "Termination":
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *received: object) -> None:
        self.is_requested = True


class Run(Protocol):
    """The part of a training run that differs between pretraining and fine-tuning."""

    name: str  # of the progress bar
    unit: str  # of batches: rows, samples
    advice: str  # what to do about a loss that is not finite

    def data(self, step: int) -> Iterator[StepData]:
        """The data of this process for the steps after ``step``. It depends on nothing but the seed."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the losses of a batch. The model is as accelerate prepared it."""

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""

    def record(self, result: StepResult) -> dict[str, Any]:
        """The line of a step in the log."""

    def validate(self) -> dict[str, Any]:
        """The values that a validation adds to that line."""

    def describe(self, data: StepData) -> str:
        """The names of the rows or samples of a step, for errors."""

    def save_weights(self, folder: Path) -> None:
        """Writes the weights that train into a checkpoint. Called in the first process only."""

    def state(self) -> dict[str, Any]:
        """The run's own state for a checkpoint, ready for JSON. All processes call this together."""


class Loop:
    """Makes the steps of a run, and saves and restores weights, optimizers, moving average and random state."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        accelerator: Accelerator,
        out: Path,
        schedule: Schedule,
        clip_norm: float,
        average: AveragedModel | None = None,
        empty_cache_every: int | None = None,
        timeout: float = 1800,
        time_limit: float | None = None,
        guard: SpikeGuard | None = None,
        layers_every: int | None = None,
        tensor: int = 1,
    ) -> None:
        """
        Args:
            optimizers: of the parameters that train, each of which has one.
            clip_norm: of all gradients together; 0 clips nothing.
            average: a moving average of the weights, brought up to date after every step.
            empty_cache_every: steps after which the device's unused memory is given back.
            timeout: seconds that a process waits for the others.
            time_limit: seconds from now after which the run saves and stops, as by SIGTERM.
            guard: of the loss.
            layers_every: steps after which the norms of each layer are measured.
            tensor: processes that divide the matrices of the model, and share their rows.
        """
        self.run, self.accelerator, self.out, self.schedule = run, accelerator, out, schedule
        self.clip_norm, self.average, self.empty_cache_every = clip_norm or math.inf, average, empty_cache_every
        self.progress, self.termination, self.is_stopping = RunProgress(), Termination(), False
        self.bare_model, self.bare_optimizers = model, list(optimizers)  # as they were before accelerate wrapped them
        # A model that is divided already has all that accelerate would wrap it in.
        prepared = accelerator.prepare(*(optimizers if is_divided(model) else [model, *optimizers]))
        prepared = list(prepared) if isinstance(prepared, (tuple, list)) else [prepared]
        self.model = model if is_divided(model) else prepared.pop(0)
        self.optimizers: list[Any] = prepared
        self.rank_schedule = RankSchedule.of(model, steps=schedule.steps)  # of adalora
        self.guard, self.layers_every = guard, layers_every
        self.deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        self.uses_deepspeed = uses_deepspeed(accelerator)
        self.grid = Grid(accelerator.num_processes, accelerator.process_index, tensor)
        self.is_divided = is_divided(model)
        self.meeting, self.timeout = Meeting(timeout=timeout), timeout
        self.saving: tuple[Future[Any], ExitStack] | None = None  # the checkpoint that is being written, and its draft
        if self.is_divided:
            self.saving_group = distributed.new_group(backend="gloo")
            # A process that is about to refuse its checkpoint must not end while another still looks for it.
            distributed.barrier(self.saving_group)

    # Steps

    @property
    def is_finished(self) -> bool:
        return self.progress.stopped or self.progress.step >= self.schedule.steps

    def fit(self) -> None:
        """Makes the steps that are left, with log, validations and checkpoints.

        Raises:
            StoppedError: SIGTERM came to one of the processes; the step was finished, and a checkpoint written.
        """
        if self.is_finished:
            return
        now, is_main = self.progress, self.accelerator.is_main_process
        random = random_state()
        data = self.run.data(now.step)
        if now.step:
            set_random_state(random)  # a new DataLoader draws a number, and this run drew one when it first began
        self._train_mode()
        bar = tqdm(
            initial=now.step, total=self.schedule.steps, unit="step", desc=self.run.name, dynamic_ncols=True,
            disable=not is_main,
        )  # fmt: skip
        with ExitStack() as stack:
            stack.enter_context(bar)
            stack.callback(self.finish_saving)
            stack.enter_context(self.termination)
            log = None
            if is_main:
                trackers = self.accelerator.trackers
                log = stack.enter_context(MetricsLog(self.out, after_step=now.step, trackers=trackers))
            while not self.is_finished:
                record = self._advance(data)
                if log is not None and ("validation" in record or self._is_due(self.schedule.log_every)):
                    log.add(record)
                alone = self.accelerator.num_processes == 1  # and need not agree with others, which a step does
                stops = (self.is_stopping or (alone and self._is_asked_to_stop)) and not self.is_finished
                if self.saving is not None and self.saving[0].done():
                    self.finish_saving()
                if self._is_due(self.schedule.save_every) or (stops and self.schedule.save_every):
                    self.save()
                speed = f", {record['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in record else ""
                bar.set_postfix_str(f"loss {record['loss']:.3f}{speed}")
                bar.update()
                if stops:
                    self.finish_saving()
                    self.accelerator.wait_for_everyone()  # so that all of them name the checkpoint just written
                    raise StoppedError(self._describe_stop())

    @property
    def _is_asked_to_stop(self) -> bool:
        return self.termination.is_requested or time.monotonic() >= self.deadline

    def _describe_stop(self) -> str:
        saved = last_checkpoint(self.out)
        goes_on = "from its beginning" if saved is None else f"from {saved.name}"
        cause = "SIGTERM" if time.monotonic() < self.deadline else "run.time_limit"
        return f"stopped by {cause} after step {self.progress.step}; the same command goes on {goes_on}"

    def _advance(self, data: Iterator[StepData]) -> dict[str, Any]:
        """Makes a step, and a validation if one is due; returns the record of both."""
        started = time.monotonic()
        self.meeting.wait(self.progress.step + 1)
        try:
            result = self.step(next(data), started=started)
        except RuntimeError as error:
            self.meeting.explain(self.progress.step + 1, error)
        now = self.progress
        now.step += 1
        now.tokens += result.tokens
        now.labelled += result.labelled
        now.seconds += result.seconds
        record = self.run.record(result)
        if self._is_due(self.schedule.validate_every):
            began = time.monotonic()
            record |= self.run.validate()
            now.validation_seconds += time.monotonic() - began
            self._train_mode()
        return record

    def _is_due(self, every: int | None) -> bool:
        return self.is_finished or (every is not None and self.progress.step % every == 0)

    def _train_mode(self) -> None:
        self.model.train()
        for optimizer in self.optimizers:
            optimizer.train()

    def step(self, data: StepData, *, started: float) -> StepResult:
        """Makes one step of the optimizers.

        started: the time from which its seconds are counted.

        Raises:
            GmaskError: nothing is labelled; a loss or a gradient that is not finite, before a weight has changed.
        """
        number, grid = self.progress.step + 1, self.grid
        *counts, stops = self._sums(data.labelled, data.tokens, int(self._is_asked_to_stop))
        labelled, tokens = (count // grid.tensor for count in counts)  # which all processes of a group counted
        self.is_stopping = stops > 0  # all processes stop behind the same step
        if not labelled:
            raise GmaskError(
                f"step {number}: no token of its {self.run.unit} is supervised, so there is nothing to learn from "
                f"{self.run.describe(data)}"
            )
        rate = self.run.learning_rate(number - 1)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group.get("rate_factor", 1.0)
        losses = []
        for index, batch in enumerate(data.batches, 1):
            with self._synchronizing(index == len(data.batches)):
                batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
                loss = self.run.loss(self.model, batch) / labelled
                losses.append(loss.detach())
                loss = loss * grid.replicas  # of whose gradients the mean is taken
                if self.rank_schedule is not None:
                    loss = loss + self.rank_schedule.penalty() / len(data.batches)
                self.accelerator.backward(loss, **self._backward_options(rate))
        local = torch.stack(losses).sum()
        total = float(self.accelerator.reduce(local, reduction="sum") if grid.processes > 1 else local) / grid.tensor
        measures = self.layers_every is not None and number % self.layers_every == 0
        layers = layer_norms(self.bare_model) if measures else {}
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        gradient_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not (math.isfinite(total) and math.isfinite(gradient_norm)):
            self._refuse_step(data, total, gradient_norm)
        is_skipped = self._skips(total, data)
        self._update(number, changes=not is_skipped)
        return StepResult(
            loss=total,
            learning_rate=rate,
            gradient_norm=gradient_norm,
            labelled=labelled,
            tokens=tokens,
            seconds=time.monotonic() - started,
            is_skipped=is_skipped,
            layers=layers,
        )

    def _skips(self, loss: float, data: StepData) -> bool:
        """Whether the guard has a step skipped; notes its loss.

        Raises:
            GmaskError: the run is to end at a spike, or has skipped too many steps in a row. No weight has changed.
        """
        if self.guard is None:
            return False
        now = self.progress
        if not self.guard.is_spike(loss, now.recent_losses):
            now.recent_losses = [*now.recent_losses, loss][-self.guard.window :]
            now.skipped_in_a_row = 0
            return False
        now.skipped, now.skipped_in_a_row = now.skipped + 1, now.skipped_in_a_row + 1
        if self.guard.stops or now.skipped_in_a_row >= SKIPS_IN_A_ROW:
            many = f", the {now.skipped_in_a_row}th in a row," if not self.guard.stops else ""
            raise GmaskError(
                f"step {now.step + 1}: the loss is {loss:.3f}{many} more than {self.guard.factor:g} times the median "
                f"of the last {self.guard.window}, in {self.run.unit} {self.run.describe(data)}; lower "
                "optimization.learning_rate and resume, or set optimization.spike_factor higher"
            )
        return True

    def _backward_options(self, rate: float) -> dict[str, Any]:
        if self.accelerator.has_lomo_optimizer:
            return {"learning_rate": rate}  # LOMO updates weights within the backward pass
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return {"scale_wrt_gas": False}  # the losses have been divided
        return {}

    def _update(self, number: int, *, changes: bool = True) -> None:
        """Makes the step of the optimizers if it ``changes`` weights; drops the gradients in any case."""
        for optimizer in self.optimizers if changes else ():
            optimizer.step()
        if self.rank_schedule is not None and changes:
            self.rank_schedule.update(number)  # weighs the ranks by the gradients
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.average is not None and changes:
            self.average.update_parameters(self.bare_model)
        if self.empty_cache_every and number % self.empty_cache_every == 0:
            clear_device_cache()

    @contextmanager
    def _synchronizing(self, is_last: bool) -> Iterator[None]:
        """Lets the processes sum their gradients in the last pass of a step, or in each if the recipe asks for it."""
        at_once = is_last or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        self.accelerator.sync_gradients = is_last  # if set, DeepSpeed makes its step in this backward pass
        try:
            # A divided model sums its gradients in every pass: else each process would hold those of the whole model.
            with nullcontext() if at_once or self.is_divided else self.accelerator.no_sync(self.model):
                yield
        finally:
            self.accelerator.sync_gradients = True

    def _sums(self, *counts: int) -> list[int]:
        """The sums of some numbers over all processes."""
        if self.accelerator.num_processes == 1:
            return list(counts)
        found: Tensor = self.accelerator.reduce(torch.tensor(counts, device=self.accelerator.device), reduction="sum")
        return [int(count) for count in found]

    def _refuse_step(self, data: StepData, loss: float, norm: float) -> None:
        """Saves the batches of a step that is not finite, and raises `GmaskError`."""
        step = self.progress.step + 1
        rank = f"-process-{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        path = self.out / f"bad-batch-{step:08d}{rank}.pt"
        batches = [{self.run.unit: list(n), **batch} for n, batch in zip(data.numbers, data.batches, strict=True)]
        kept = f"are kept in {path}"
        try:
            with written(path) as draft:
                torch.save(batches, draft)
        except GmaskError as error:
            kept = f"are not kept ({error})"
        raise GmaskError(
            f"step {step}: the loss is {loss} and the gradient's norm {norm}; its {self.run.unit} "
            f"{self.run.describe(data)} {kept}; {self.run.advice}"
        )

    # Checkpoints

    def save(self) -> None:
        """Writes ``checkpoint-STEP`` whole or not at all. All processes must call this together.

        Of a model that they divide, they write copies of their parts while the run goes on; `finish_saving` ends that.
        """
        self.finish_saving()
        step, schedule = self.progress.step, self.schedule
        own: dict[str, Tensor] = {}
        if self.rank_schedule is not None:
            own |= {f"ranks.{name}": value for name, value in self.rank_schedule.state().items()}
        for replica, random in enumerate(gather_object([random_state()])[:: self.grid.tensor]):
            suffix = f".{replica}" if replica else ""
            own |= {f"random.{name}{suffix}": value for name, value in random.items()}
        optimizers = [] if self.uses_deepspeed else self.bare_optimizers
        tensors, numbers = optimizer_state(self.bare_model, optimizers)
        tensors |= average_tensors(self.average)
        state, sharded = self.run.state(), self.out / f".sharded-{step:08d}"
        if self.uses_deepspeed:
            self.accelerator.save_state(str(sharded))
        with ExitStack() as stack:
            place: list[str | None] = [None, None]  # the draft, or why there is none
            if self.accelerator.is_main_process:
                try:
                    folder = stack.enter_context(
                        written_checkpoint(self.out, step, keep_last=schedule.keep_last, keep=schedule.keep)
                    )
                    if self.uses_deepspeed:
                        os.replace(sharded, folder / SHARDED_FOLDER)
                    elif not self.is_divided:
                        self.run.save_weights(folder)
                    whole = own if self.is_divided else own | tensors
                    write_state(folder, self.progress, state, whole, numbers)
                    place = [str(folder / SHARDED_FOLDER), None]
                except GmaskError as error:
                    place = [None, str(error)]
                    if not self.is_divided:
                        raise
            if self.is_divided:
                draft, fault = broadcast_object_list(place)
                if draft is None:
                    raise GmaskError(fault)
                weights = {f"weights.{name}": value.detach() for name, value in self.bare_model.named_parameters()}
                self.saving = write_shards(Path(draft), weights | tensors, self.saving_group), stack.pop_all()
        if not self.is_divided:
            self.accelerator.wait_for_everyone()

    def finish_saving(self) -> None:
        """Waits for the checkpoint that is being written, if there is one, and gives it its name.

        Raises:
            GmaskError: a process could not write its part; the last complete checkpoint is kept.
        """
        if self.saving is None:
            return
        (future, draft), self.saving = self.saving, None
        with writing(self.out, self.out, kept=KEPT_ON_ERROR), draft:
            wait_for_shards(future)

    def restore(self) -> dict[str, Any]:
        """Loads the last checkpoint in place, if there is one; returns the state that `Run.state` saved in it.

        Raises:
            GmaskError: a damaged file, a checkpoint of another version of gmask, another model or another optimizer.
        """
        folder = last_checkpoint(self.out)
        if folder is None:
            return {}
        checkpoint = read_checkpoint(folder, self.bare_model)
        if self.uses_deepspeed:
            self.accelerator.load_state(str(folder / SHARDED_FOLDER))
        else:
            checkpoint.load_weights(self.bare_model)
            checkpoint.load_optimizers(self.bare_model, self.bare_optimizers)
        if self.average is not None:
            checkpoint.load_average(self.average)
        if self.rank_schedule is not None:
            self.rank_schedule.restore(checkpoint.group("ranks"))
        checkpoint.load_random_state(self.grid.replica)
        self.progress = checkpoint.progress
        return checkpoint.state

    # What trains

    def trained_weights(self) -> dict[str, Tensor]:
        """Copies of the parameters that train, by name, on the CPU. Sharded parameters are put together."""
        trained = [name for name, parameter in self.bare_model.named_parameters() if parameter.requires_grad]
        if self.uses_deepspeed:
            state = self.accelerator.get_state_dict(self.model)
            return {name: state[name].cpu() for name in trained}
        with unsharded(self.bare_model):
            parameters = dict(self.bare_model.named_parameters())
            return {name: parameters[name].detach().cpu().clone() for name in trained}

    def save_best(self, value: float) -> None:
        """Saves the current weights as the best so far."""
        self.progress.best_step, self.progress.best_value = self.progress.step, value
        weights = self.trained_weights()
        if self.accelerator.is_main_process:
            write_tensors(weights, self.out / BEST_FILE)

    def load_best(self) -> None:
        """Loads the best weights into the model, if any were saved."""
        if self.progress.best_step is None:
            return
        parameters = dict(self.bare_model.named_parameters())
        with torch.no_grad():
            for name, weight in read_tensors(self.out / BEST_FILE).items():
                parameters[name].copy_(placed_like(weight, parameters[name]))
