"""The folder of a run: its checkpoints, each written whole or not at all, and its log of metrics.

A checkpoint holds the weights that train (``trained.safetensors``, or ``model.safetensors`` in a folder that loads like
any model folder), ``training.safetensors`` (the optimizers' moments as ``exp_avg.NAME`` and so on, the moving average
of the weights as ``average.NAME``, adalora's ranks, random states) and ``training.json`` (`RunProgress` and the numbers
of the optimizers). A run whose processes divide the model keeps weights, moments and average in ``sharded``, in the
form of torch.distributed.checkpoint, which any number of processes reads; with DeepSpeed these are its own files.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from gmask.config import build_settings
from gmask.errors import GmaskError, one_line
from gmask.files import (
    read_json_lines,
    read_object,
    remove_drafts,
    write_json_lines,
    writing,
    written,
    written_folder,
)
from gmask.training.muon import Float32Muon
from gmask.training.parallel import placed_like
from gmask.training.sharded_checkpoint import read_shards

logger = logging.getLogger(__name__)
_Fields = TypeVar("_Fields")
CHECKPOINT_PREFIX = "checkpoint-"
STATE_FILE = "training.json"
TENSORS_FILE = "training.safetensors"
TRAINED_FILE = "trained.safetensors"
MODEL_FILE = "model.safetensors"
SHARDED_FOLDER = "sharded"
BEST_FILE = "best.safetensors"
KEPT_ON_ERROR = "the last complete checkpoint"
LOG_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.yaml"
FILES_FILE = "data.json"
RESULTS_FILE = "results.json"
START_FILE = "start.txt"
OPTIMIZER_KEYS: Mapping[type[Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
    Float32Muon: ("momentum_buffer",),
}
"""The state that these optimizers keep of each parameter: a checkpoint without it is of another optimizer."""

OTHER_GROUPS = ("average", "ranks", "random")
"""The prefixes of the tensors in a checkpoint that belong to no optimizer."""


@dataclass
class RunProgress:
    """How far a run has come; saved with each checkpoint."""

    step: int = 0
    tokens: int = 0  # read by the model, without padding
    labelled: int = 0  # tokens, or samples, that something was learnt from
    seconds: float = 0.0  # of the steps
    validation_seconds: float = 0.0  # of the validations between them
    decay_start: int | None = None  # the step at which pretraining's last part begins, once it has begun
    best_step: int | None = None
    best_value: float | None = None
    recent_losses: list[float] = dataclasses.field(default_factory=list)  # of the steps before, to know a spike by
    skipped: int = 0  # steps, whose loss was a spike
    skipped_in_a_row: int = 0
    stopped: bool = False  # early, by optimization.early_stop
    arithmetic: str = ""  # dtype and CPU instructions of the forward pass: a run is bit-exact on the same ones only


# Checkpoints


def list_checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(folder for folder in out.glob(f"{CHECKPOINT_PREFIX}*") if (folder / STATE_FILE).is_file())


def last_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if there is no checkpoint.

    Raises:
        GmaskError: the newest checkpoint has no ``training.json``, so that a run cannot continue from it. Fine-tuning
            by earlier versions wrote such folders. To begin anew beside them would lose that run without a warning.
    """
    checkpoints = list_checkpoints(out)
    last = checkpoints[-1] if checkpoints else None
    newest = max(
        (folder for folder in out.glob(f"{CHECKPOINT_PREFIX}*") if folder.is_dir()), key=_step_of, default=last
    )
    # An older folder may be incomplete: a process was killed while it removed that checkpoint.
    if newest is not None and _step_of(newest) > (-1 if last is None else _step_of(last)):
        raise GmaskError(
            f"{newest}: has no {STATE_FILE}: another version of gmask wrote it, and this one cannot continue from it; "
            "choose another run.out, or delete that checkpoint"
        )
    return last


def _step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 if there is none."""
    step = checkpoint.name.removeprefix(CHECKPOINT_PREFIX)
    return int(step) if step.isdecimal() else -1


@contextmanager
def written_checkpoint(out: Path, step: int, *, keep_last: int, keep: int | None = None) -> Iterator[Path]:
    """Gives a draft of ``out/checkpoint-STEP`` to fill; then removes all but the last ``keep_last`` and ``keep``.

    keep: the step of one more checkpoint that stays.

    Raises:
        GmaskError: the checkpoint cannot be written.
    """
    folder = out / f"{CHECKPOINT_PREFIX}{step:08d}"
    remove_drafts(folder)
    with written_folder(folder, kept=KEPT_ON_ERROR) as draft:
        yield draft
    for old in list_checkpoints(out)[:-keep_last]:
        if keep is None or old.name != f"{CHECKPOINT_PREFIX}{keep:08d}":
            shutil.rmtree(old, ignore_errors=True)


def write_state(
    folder: Path,
    progress: RunProgress,
    state: Mapping[str, Any],
    tensors: dict[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Writes a checkpoint's files beside its weights.

    Args:
        state: the run's own state beside its progress, ready for JSON.
        numbers: of the optimizers, as of `optimizer_state`.
    """
    save_file(tensors, folder / TENSORS_FILE)
    values = {"step": progress.step, "progress": {**dataclasses.asdict(progress), **state}, "optimizers": numbers}
    (folder / STATE_FILE).write_text(json.dumps(values), encoding="utf-8")


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises `GmaskError` if the file cannot be written."""
    with written(path, kept=KEPT_ON_ERROR) as draft:
        save_file(tensors, draft)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises `GmaskError` if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise GmaskError(f"{path}: damaged ({error}); delete its folder to resume from before") from error


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """A checkpoint in memory. Each method loads a part of it into an object."""

    folder: Path
    progress: RunProgress
    state: dict[str, Any]  # the run's own
    weights: Mapping[str, Tensor]  # on the CPU, like all tensors here
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]  # of the optimizers, as of `optimizer_state`

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named ``PREFIX.NAME``, by NAME."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }

    def load_weights(self, model: nn.Module) -> None:
        """Raises `GmaskError` for a model of another shape."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if changed := sorted(
            name for name in trained if trained[name].shape != self.weights.get(name, torch.empty(0)).shape
        ):
            raise GmaskError(
                f"{self.folder}: the recipe's model has another shape than this run's ({changed[0]}); "
                "choose another run.out"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(placed_like(self.weights[name], parameter))

    def load_optimizers(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Raises `GmaskError` where the checkpoint is of other optimizers."""
        found: dict[str, dict[str, Any]] = {}
        for full_name, value in {**self.tensors, **self.numbers.get("state", {})}.items():
            key, _, name = full_name.partition(".")
            if key not in OTHER_GROUPS:
                found.setdefault(name, {})[key] = value
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = self.numbers.get("groups", [])
        for number, optimizer in enumerate(optimizers):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states = {index: found.get(names[id(p)], {}) for index, p in enumerate(parameters)}
            for index, kept in states.items():
                lacking = [key for key in OPTIMIZER_KEYS.get(type(optimizer), ()) if kept and key not in kept]
                if lacking:
                    raise GmaskError(
                        f"{self.folder}: has no {lacking[0]} of {names[id(parameters[index])]}, so its run had another "
                        "optimization.optimizer; set it as it was, or choose another run.out"
                    )
            whole = optimizer.state_dict()
            whole["state"] = {
                index: {
                    key: placed_like(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value
                    for key, value in states[index].items()
                }
                for index, p in enumerate(parameters)
                if states[index]
            }
            for group, changed in zip(whole["param_groups"], groups[number] if groups else (), strict=False):
                group.update(changed)
            optimizer.load_state_dict(whole)

    def load_average(self, average: AveragedModel) -> None:
        """A run that had no average so far begins it with its weights."""
        if "average_count" not in self.tensors:
            return
        with torch.no_grad():
            for name, parameter in average.module.named_parameters():
                parameter.copy_(placed_like(self.tensors[f"average.{name}"], parameter))
            average.get_buffer("n_averaged").copy_(self.tensors["average_count"])

    def load_random_state(self, replica: int) -> None:
        """Sets the random state of a process, by the number of its `Grid.replica`, whose processes share it.

        A checkpoint of fewer replicas has none for it, and sets nothing.
        """
        suffix = f".{replica}" if replica else ""
        states = {name: self.tensors.get(f"random.{name}{suffix}") for name in ("cpu", "cuda")}
        set_random_state({name: state for name, state in states.items() if state is not None})


def read_checkpoint(folder: Path, model: nn.Module) -> RunCheckpoint:
    """Reads a checkpoint, also one that an earlier version of gmask wrote in pretraining.

    Of a divided one, each process reads the parts that it holds of this model. All processes must call this together.

    Raises:
        GmaskError: a damaged file.
    """
    remedy = "delete it to resume from the checkpoint before"
    values = read_object(folder / STATE_FILE, remedy=f"delete {folder} to resume from the checkpoint before")
    saved = values.get("progress")
    if not isinstance(saved, dict):
        raise GmaskError(f"{folder}: damaged ({STATE_FILE} has no progress); {remedy}")
    try:
        paths = [path for name in (MODEL_FILE, TRAINED_FILE) if (path := folder / name).is_file()]
        weights = {name: tensor for path in paths for name, tensor in load_file(path).items()}
        tensors = load_file(folder / TENSORS_FILE)
        if (folder / SHARDED_FOLDER / ".metadata").is_file():
            for key, tensor in read_shards(folder / SHARDED_FOLDER, dict(model.named_parameters())).items():
                group, _, name = key.partition(".")
                (weights if group == "weights" else tensors)[name if group == "weights" else key] = tensor
    except CheckpointException as error:
        fault, _ = next(iter(error.failures.values()))
        raise GmaskError(f"{folder}: damaged ({one_line(Exception(fault))}); {remedy}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise GmaskError(f"{folder}: damaged ({one_line(error)}); {remedy}") from error
    known = {field.name for field in dataclasses.fields(RunProgress)}
    progress = RunProgress(**{name: value for name, value in saved.items() if name in known})
    state = {name: value for name, value in saved.items() if name not in known}
    return RunCheckpoint(folder, progress, state, weights, tensors, values.get("optimizers", {}))


def optimizer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the optimizers for each parameter, as ``KEY.NAME``: its tensors, and its numbers under ``state``.

    The numbers under ``groups`` are those that an optimizer changes in its groups, such as an estimate of the learning
    rate. The settings that a recipe makes there are left out: they may change when the run is resumed.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    stored = set[int]()
    for optimizer in optimizers:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, PLAIN):
                    numbers[f"{key}.{name}"] = value
                elif isinstance(value, DTensor):
                    tensors[f"{key}.{name}"] = value
                elif isinstance(value, Tensor):
                    # safetensors refuses tensors that share storage, and 8-bit optimizers share their tables.
                    tensors[f"{key}.{name}"] = value.clone() if value.data_ptr() in stored else value.contiguous()
                    stored.add(value.data_ptr())
    groups = [
        [_changed_settings(group, optimizer.defaults) for group in optimizer.param_groups] for optimizer in optimizers
    ]
    return tensors, {"state": numbers, "groups": groups}


PLAIN = (bool, int, float, str, type(None))
SET_BY_RECIPE = ("params", "lr", "initial_lr", "betas", "weight_decay")


def _changed_settings(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in group.items()
        if key not in SET_BY_RECIPE and isinstance(value, PLAIN) and value != defaults.get(key)
    }


def average_tensors(average: AveragedModel | None) -> dict[str, Tensor]:
    if average is None:
        return {}
    weights = {f"average.{name}": parameter.detach() for name, parameter in average.module.named_parameters()}
    return weights | {"average_count": average.get_buffer("n_averaged")}


def random_state() -> dict[str, Tensor]:
    """The random state of this process, on the CPU and the GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def read_fields(kind: type[_Fields], path: Path) -> _Fields:
    """An instance of a dataclass, which `write_json` wrote into a run's folder.

    Raises:
        GmaskError: a damaged file, or one without these fields.
    """
    remedy = "delete it, and it is written anew"
    values = read_object(path, remedy=remedy)
    try:
        return build_settings(kind, values, title=str(path))
    except GmaskError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise GmaskError(f"{where}{error}; {remedy}") from error


# The log


class MetricsLog:
    """Writes metrics.jsonl, one record a line, and the same numbers for TensorBoard where that is installed.

    A resumed run drops the records after its checkpoint, and writes them anew.
    """

    def __init__(self, out: Path, *, after_step: int, trackers: Sequence[Any] = ()) -> None:
        """
        Args:
            trackers: accelerate's, which get the same numbers.
        """
        self.path = out / LOG_FILE
        write_json_lines(self.path, [record for record in read_metrics(self.path) if record["step"] <= after_step])
        self.file = self.path.open("a", encoding="utf-8")
        self.board, self.trackers = _open_board(out, after_step), trackers

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with writing(self.path, self.path, kept=KEPT_ON_ERROR), self.file:
                if self.board is not None:
                    self.board.close()
        except GmaskError:
            if error is None:  # else it is the same full disk again
                raise
        for tracker in self.trackers:
            tracker.finish()

    def add(self, record: dict[str, Any]) -> None:
        """Raises `GmaskError` if the record cannot be written."""
        scalars, step = dict(flatten_record(record)), record["step"]
        with writing(self.path, self.path, kept=KEPT_ON_ERROR):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            if self.board is not None:
                for name, value in scalars.items():
                    self.board.add_scalar(name, value, step)
        for tracker in self.trackers:
            tracker.log(scalars, step=step)


def flatten_record(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record by the names that they have in TensorBoard."""
    for name, value in record.items():
        if name not in ("step", "validation", "blanks", "layers"):
            yield f"training/{name}", value
    for layer, norms in record.get("layers", {}).items():
        for name, value in norms.items():
            yield f"{name}/{layer}", value
    for source, found in record.get("validation", {}).items():
        for name, value in found.items():
            yield f"validation_{name}/{source}", value
    for group, found in record.get("blanks", {}).items():
        for name in ("top1", "nats"):
            yield f"blanks_{name}/{group}", found[name]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A line that is not JSON, cut short by a kill, is left out with a warning."""
    if not path.exists():
        return []

    def warn(error: GmaskError) -> None:
        logger.warning("%s; the line is left out", error)

    return [record for _, record in read_json_lines(path, on_bad_line=warn, checked=False)]


def _open_board(out: Path, after_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("TensorBoard is not installed, so no events are written: pip install 'gmask[train]'")
        return None
    return SummaryWriter(out / "tensorboard", purge_step=after_step + 1)
