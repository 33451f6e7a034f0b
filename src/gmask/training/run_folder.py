"""The folder of a run: checkpoints written whole or not at all, the log of metrics, curves, what a run shows before it
starts.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.infilling.blanks import NOT_SCORED
from gmask.models.glm import GLMForConditionalGeneration
from gmask.recipes.tuning import TuningRecipe
from gmask.tasks.task import Task
from gmask.training.examples import Example, Truncated
from gmask.training.methods import TrainableTable

logger = logging.getLogger(__name__)
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


class MetricsLog:
    """metrics.jsonl, one record a line, and the same in TensorBoard's format where that is installed.

    A resumed run forgets the records after its checkpoint and writes them anew.
    """

    def __init__(self, out: Path, *, after_step: int) -> None:
        self.path = out / "metrics.jsonl"
        kept = [record for record in read_records(self.path) if record["step"] <= after_step]
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        draft.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = _open_board(out, after_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def add(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board is None:
            return
        for name, value in record.items():
            if name not in ("step", "validation", "blanks"):
                self.board.add_scalar(f"training/{name}", value, record["step"])
        for source, losses in record.get("validation", {}).items():
            for objective, loss in losses.items():
                self.board.add_scalar(f"validation_{objective}/{source}", loss, record["step"])
        for group, values in record.get("blanks", {}).items():
            for name in ("top1", "nats"):
                self.board.add_scalar(f"blanks_{name}/{group}", values[name], record["step"])

    def draw_curves(self) -> Path:
        """Draws curves.png from the whole log."""
        return draw_curves(read_records(self.path), self.path.with_name("curves.png"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: an unfinished line is left out", path)
    return records


def draw_curves(records: list[dict[str, Any]], path: Path) -> Path:
    """Draws training loss, mean validation loss of each objective, learning rate and gradient norm over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    millions = [record["tokens"] / 1e6 for record in records]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=[3, 1], layout="constrained")
    top.plot(millions, [record["loss"] for record in records], color="0.7", linewidth=1, label="training")
    validated = [record for record in records if "validation" in record]
    objectives = sorted({name for record in validated for losses in record["validation"].values() for name in losses})
    for objective in objectives:
        means = [_mean([losses[objective] for losses in record["validation"].values()]) for record in validated]
        top.plot(
            [record["tokens"] / 1e6 for record in validated],
            means,
            marker="o",
            markersize=3,
            label=f"validation, {objective}",
        )
    top.set_ylabel("loss (nats per labelled token)")
    top.grid(alpha=0.3)
    top.legend()
    draw_rates(bottom, millions, records)
    bottom.set_xlabel("tokens seen (millions)")
    return save_picture(figure, path)


def draw_rates(panel: Any, places: Sequence[float], records: Sequence[Mapping[str, Any]]) -> None:
    """Draws learning rate and gradient norm of the records over their places."""
    panel.plot(places, [record["learning_rate"] for record in records], color="tab:blue")
    panel.set_ylabel("learning rate", color="tab:blue")
    norms = panel.twinx()
    norms.plot(places, [record["gradient_norm"] for record in records], color="tab:orange", alpha=0.6, linewidth=1)
    norms.set_ylabel("gradient norm", color="tab:orange")


def save_picture(figure: Any, path: Path) -> Path:
    """Writes a figure, whole or not at all, and forgets it."""
    from matplotlib import pyplot as plt

    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=120, format="png")
    plt.close(figure)
    draft.replace(path)
    return path


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _open_board(out: Path, after_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("TensorBoard is not installed, so no events are written: pip install 'gmask[train]'")
        return None
    return SummaryWriter(out / "tensorboard", purge_step=after_step + 1)


SUPERVISED_STYLE = "bold green"
SHOWN = 2000
"""Characters of a part of the sample; more are left out of its middle."""


@dataclass(frozen=True, slots=True)
class Start:
    """All that is shown."""

    recipe: TuningRecipe
    task: Task
    example: Example
    sop: int
    trainable: TrainableTable
    truncated: Truncated
    samples: int
    dropped: int  # records that could not be used
    steps: int
    processes: int
    advice: Sequence[str]  # a line each

    def show(self, console: Console, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prints it, in colours on a terminal; elsewhere what is supervised stands in ⟦ ⟧."""
        optimization = self.recipe.optimization
        shared = f" in {self.processes} processes" if self.processes > 1 else ""
        console.print(
            f"{self.task.name}: {self.task.kind}, {self.samples} samples, {self.steps} steps of "
            f"{optimization.batch_size * optimization.accumulation}{shared}, learning rate "
            f"{optimization.learning_rate:g}",
            highlight=False,
        )
        console.print(self.trainable.to_rows().to_rich(f"What trains ({self.recipe.method.name})"))
        console.print(self._render(console, tokenizer), soft_wrap=True, highlight=False)
        for line in (*self._counts(), *self.advice):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render(self, console: Console, tokenizer: PreTrainedTokenizerBase) -> Text:
        told = "green" if console.is_terminal else "⟦ ⟧"
        text = Text(f"The first sample as the model reads it; what the loss is of, in {told}:\n")
        for piece, supervised in render_example(self.example, tokenizer, sop=self.sop):
            if supervised and not console.is_terminal:
                text.append(f"⟦{piece}⟧")
            else:
                text.append(piece, style=SUPERVISED_STYLE if supervised else "")
        if self.example.choice is not None:
            text.append(f" → {'class' if self.task.kind == 'classification' else 'candidate'} {self.example.choice}")
        return text

    def _counts(self) -> Iterator[str]:
        if self.truncated.sources or self.truncated.targets or self.truncated.rounds:
            yield (
                f"cut: {self.truncated}; questions lose tokens on the {self.recipe.data.truncation} (data.truncation); "
                f"raise data.max_source ({self.recipe.data.max_source}) or data.max_target "
                f"({self.recipe.data.max_target}) to keep them whole"
            )
        if self.dropped:
            yield f"{self.dropped} records could not be used and are left out"


def render_example(example: Example, tokenizer: PreTrainedTokenizerBase, *, sop: int) -> list[tuple[str, bool]]:
    """The parts of an example as a model reads and predicts them, and of each whether it is supervised.

    sop: the id that begins an answer. What it predicts stands behind it, whether the labels are shifted or not.
    """
    tokens = list[tuple[int, bool]]()
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        if label == NOT_SCORED and tokens and tokens[-1] == (token, True):
            continue  # the last token of a candidate: it was shown as a label already
        if label == NOT_SCORED or token == sop:
            tokens.append((token, False))
        if label != NOT_SCORED:
            tokens.append((label, True))
    parts = groupby(tokens, key=lambda one: one[1])
    return [(_decode([token for token, _ in part], tokenizer), supervised) for supervised, part in parts]


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of ids, with the names of control tokens; trained vectors, whose ids are none of its, are shown as ▢."""

    def name(token: int) -> str | None:
        if token >= len(tokenizer):
            return "▢"
        return None if tokenizer.decode([token]) else str(tokenizer.convert_ids_to_tokens(token))

    parts = [(found, list(group)) for found, group in groupby(ids, key=name)]
    text = "".join(tokenizer.decode(part) if found is None else found * len(part) for found, part in parts)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
