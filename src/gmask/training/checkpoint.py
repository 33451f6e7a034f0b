"""How does a run survive being killed? Everything that its next step depends on, written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gmask.errors import GmaskError
from gmask.models.glm import GLMForConditionalGeneration

PREFIX = "checkpoint-"


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
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    *,
    keep_last: int,
) -> None:
    """Writes ``out/checkpoint-STEP`` and removes all but the last ``keep_last``.

    The folder loads like any model folder; beside the float32 weights it holds the optimizer's moments and the random
    state (training.safetensors) and ``progress`` (training.json).
    """

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        save_file(_optimizer_tensors(model, optimizer) | _random_state(), folder / "training.safetensors")
        (folder / "training.json").write_text(json.dumps({"step": step, "progress": progress}), encoding="utf-8")

    write_folder(out / f"{PREFIX}{step:08d}", fill)
    for old in list_checkpoints(out)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(folder for folder in out.glob(f"{PREFIX}*") if (folder / "training.json").is_file())


def load_checkpoint(
    folder: Path, model: GLMForConditionalGeneration, optimizer: torch.optim.Optimizer
) -> TrainingState:
    """Loads weights, moments and random state in place.

    Raises:
        GmaskError: a damaged file, or a model of another shape.
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
            optimizer.state[parameter] = {
                "step": tensors[f"step.{name}"],
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return TrainingState(step=state["step"], progress=state["progress"])


def _optimizer_tensors(model: GLMForConditionalGeneration, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": optimizer.state[parameter][key].contiguous()
        for name, parameter in model.named_parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def _random_state() -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state
