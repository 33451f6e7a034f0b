"""How does a run survive being killed? Everything that its next step depends on, written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from gmask.errors import GmaskError
from gmask.models.glm import GLMForConditionalGeneration

PREFIX = "checkpoint-"
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum_buffer",)


@dataclass(frozen=True)
class TrainingState:
    """A checkpoint read back, but for the weights, which are loaded into the model in place."""

    step: int
    progress: dict[str, Any]  # what the caller saved with it


def write_folder(folder: Path, fill: Callable[[Path], None], *, kept: str = "the last complete checkpoint") -> None:
    """Has ``fill`` write a draft beside ``folder`` and puts it in its place; a full disk leaves the old one.

    Raises:
        GmaskError: it cannot be written, with what is ``kept``.
    """
    draft = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        draft.chmod(0o755)
        fill(draft)
        old = folder.with_name(f".{folder.name}-old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(draft, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise GmaskError(f"{folder}: cannot be written ({reason}); {kept} is kept") from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def save_checkpoint(
    out: Path,
    step: int,
    model: GLMForConditionalGeneration,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: dict[str, Any],
    *,
    average: AveragedModel | None = None,
    keep_last: int,
    keep: int | None = None,
) -> None:
    """Writes ``out/checkpoint-STEP`` and removes all but the last ``keep_last`` and that of the step ``keep``.

    The folder loads like any model folder; beside the float32 weights it holds the optimizers' moments, the moving
    average of the weights and the random state (training.safetensors) and ``progress`` (training.json).
    """

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tensors = _optimizer_tensors(model, optimizers) | _average_tensors(average) | _random_state()
        save_file(tensors, folder / "training.safetensors")
        (folder / "training.json").write_text(json.dumps({"step": step, "progress": progress}), encoding="utf-8")

    write_folder(out / f"{PREFIX}{step:08d}", fill)
    for old in list_checkpoints(out)[:-keep_last]:
        if keep is None or old.name != f"{PREFIX}{keep:08d}":
            shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(folder for folder in out.glob(f"{PREFIX}*") if (folder / "training.json").is_file())


def load_checkpoint(
    folder: Path,
    model: GLMForConditionalGeneration,
    optimizers: Sequence[torch.optim.Optimizer],
    average: AveragedModel | None = None,
) -> TrainingState:
    """Loads weights, moments, moving average and random state in place.

    Raises:
        GmaskError: a damaged file, or a model or an optimizer of another kind.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "training.safetensors")
        state = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise GmaskError(f"{folder}: damaged ({error}); delete it to resume from the checkpoint before") from error
    parameters = dict(model.named_parameters())
    if changed := sorted(
        name for name in parameters if parameters[name].shape != weights.get(name, torch.empty(0)).shape
    ):
        raise GmaskError(
            f"{folder}: the recipe's model has another shape than this run's ({changed[0]}); choose another run.out"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    _restore_optimizers(folder, model, optimizers, tensors)
    if average is not None:
        _restore_average(average, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return TrainingState(step=state["step"], progress=state["progress"])


def _optimizer_tensors(
    model: GLMForConditionalGeneration, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """What the optimizers remember of each parameter, as ``exp_avg.NAME`` and so on."""
    return {
        f"{key}.{name}": value.contiguous()
        for optimizer in optimizers
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizers(
    folder: Path,
    model: GLMForConditionalGeneration,
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: dict[str, Tensor],
) -> None:
    for optimizer in optimizers:
        keys = MUON_STATE if isinstance(optimizer, torch.optim.Muon) else ADAMW_STATE
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            if id(parameter) not in own:
                continue
            if lacking := [key for key in keys if f"{key}.{name}" not in tensors]:
                raise GmaskError(
                    f"{folder}: has no {lacking[0]} of {name}, so its run had another optimization.optimizer; "
                    "set it as it was, or choose another run.out"
                )
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else parameter.device) for key in keys
            }


def _average_tensors(average: AveragedModel | None) -> dict[str, Tensor]:
    if average is None:
        return {}
    weights = {f"average.{name}": parameter.detach() for name, parameter in average.module.named_parameters()}
    return weights | {"average_count": average.get_buffer("n_averaged")}


def _restore_average(average: AveragedModel, tensors: dict[str, Tensor]) -> None:
    """A run that had no average so far begins it with its weights."""
    if "average_count" not in tensors:
        return
    with torch.no_grad():
        for name, parameter in average.module.named_parameters():
            parameter.copy_(tensors[f"average.{name}"])
        average.get_buffer("n_averaged").copy_(tensors["average_count"])


def _random_state() -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state
