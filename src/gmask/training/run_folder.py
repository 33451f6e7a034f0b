"""The folder of a run: checkpoints written whole or not at all, the log of metrics, curves, what a run shows before it
starts.

A checkpoint holds what trains (``trained.safetensors``, or ``model.safetensors`` in a folder that loads like any model
folder), ``training.safetensors`` (the optimizers' moments as ``exp_avg.NAME`` and so on, the moving average of the
weights as ``average.NAME``, adalora's ranks, random states) and ``training.json`` (`Progress` and numbers). A sharded
run keeps accelerate's own files in ``sharded`` instead of weights and moments.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.files import remove_drafts, write_json_lines, written, written_folder
from gmask.infilling.blanks import NOT_SCORED
from gmask.infilling.objectives import OBJECTIVES
from gmask.recipes.tuning import TuningRecipe
from gmask.tasks.task import Task
from gmask.training.examples import Example, Truncated
from gmask.training.methods import TrainableTable

logger = logging.getLogger(__name__)
PREFIX = "checkpoint-"
STATE_FILE = "training.json"
TENSORS_FILE = "training.safetensors"
TRAINED_FILE = "trained.safetensors"
MODEL_FILE = "model.safetensors"
BEST_FILE = "best.safetensors"
KEPT_ON_ERROR = "the last complete checkpoint"
LOG_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
OPTIMIZER_KEYS: Mapping[type[Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}
"""What these keep of a parameter: without it a checkpoint is of another optimizer."""

OTHERS = ("average", "ranks", "random")
"""The first words of tensors in a checkpoint that are no optimizer's."""


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint."""

    step: int = 0
    tokens: int = 0  # real ones, seen by the model
    labelled: int = 0  # tokens, or samples, that something was learnt from
    seconds: float = 0.0
    decay_start: int | None = None  # the step at which pretraining's last part begins, once it has begun
    best_step: int | None = None
    best_value: float | None = None
    stopped: bool = False  # early
    arithmetic: str = ""  # the type of a pass and the instructions of the machine: with others a run is not bit-exact


# Checkpoints


def list_checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(folder for folder in out.glob(f"{PREFIX}*") if (folder / STATE_FILE).is_file())


def last_checkpoint(out: Path) -> Path | None:
    checkpoints = list_checkpoints(out)
    return checkpoints[-1] if checkpoints else None


@contextmanager
def written_checkpoint(out: Path, step: int, *, keep_last: int, keep: int | None = None) -> Iterator[Path]:
    """A draft of ``out/checkpoint-STEP`` to fill; then all but the last ``keep_last`` and that of ``keep`` are removed.

    Raises:
        GmaskError: it cannot be written.
    """
    folder = out / f"{PREFIX}{step:08d}"
    remove_drafts(folder)
    with written_folder(folder, kept=KEPT_ON_ERROR) as draft:
        yield draft
    for old in list_checkpoints(out)[:-keep_last]:
        if keep is None or old.name != f"{PREFIX}{keep:08d}":
            shutil.rmtree(old, ignore_errors=True)


def write_state(
    folder: Path,
    progress: Progress,
    state: Mapping[str, Any],
    tensors: dict[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Writes a checkpoint's files beside its weights.

    Args:
        state: what the run keeps beside its progress, ready for JSON.
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
    """A checkpoint that was read; each part is loaded in place."""

    folder: Path
    progress: Progress
    state: dict[str, Any]  # what the run kept beside it
    weights: Mapping[str, Tensor]  # on the CPU, as all tensors
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]  # of the optimizers, as of `optimizer_state`

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, without it."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }

    def load_weights(self, model: PreTrainedModel) -> None:
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
                parameter.copy_(self.weights[name])

    def load_optimizers(self, model: PreTrainedModel, optimizers: Sequence[Optimizer]) -> None:
        """Raises `GmaskError` where the checkpoint is of other optimizers."""
        found: dict[str, dict[str, Any]] = {}
        for full_name, value in {**self.tensors, **self.numbers.get("state", {})}.items():
            key, _, name = full_name.partition(".")
            if key not in OTHERS:
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
            whole["state"] = {index: kept for index, kept in states.items() if kept}
            for group, changed in zip(whole["param_groups"], groups[number] if groups else (), strict=False):
                group.update(changed)
            optimizer.load_state_dict(whole)

    def load_average(self, average: AveragedModel) -> None:
        """A run that had no average so far begins it with its weights."""
        if "average_count" not in self.tensors:
            return
        with torch.no_grad():
            for name, parameter in average.module.named_parameters():
                parameter.copy_(self.tensors[f"average.{name}"])
            average.get_buffer("n_averaged").copy_(self.tensors["average_count"])

    def load_random_state(self, process: int) -> None:
        """That of one process; a run of fewer processes has none for it, and goes on otherwise than it would have."""
        suffix = f".{process}" if process else ""
        states = {name: self.tensors.get(f"random.{name}{suffix}") for name in ("cpu", "cuda")}
        set_random_state({name: state for name, state in states.items() if state is not None})


def read_checkpoint(folder: Path) -> RunCheckpoint:
    """Reads a checkpoint, also one that an earlier version of gmask wrote in pretraining.

    Raises:
        GmaskError: a damaged file.
    """
    try:
        paths = [path for name in (MODEL_FILE, TRAINED_FILE) if (path := folder / name).is_file()]
        weights = {name: tensor for path in paths for name, tensor in load_file(path).items()}
        tensors = load_file(folder / TENSORS_FILE)
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise GmaskError(f"{folder}: damaged ({error}); delete it to resume from the checkpoint before") from error
    known = {field.name for field in dataclasses.fields(Progress)}
    progress = Progress(**{name: value for name, value in values["progress"].items() if name in known})
    state = {name: value for name, value in values["progress"].items() if name not in known}
    return RunCheckpoint(folder, progress, state, weights, tensors, values.get("optimizers", {}))


def optimizer_state(
    model: PreTrainedModel, optimizers: Sequence[Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What optimizers keep of each parameter: tensors, and the numbers beside them, as ``KEY.NAME``.

    The numbers hold under ``groups`` also what an optimizer changes in its groups, such as an estimate of the learning
    rate; what a recipe sets there may be set otherwise when the run is resumed.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    stored = set[int]()
    for optimizer in optimizers:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, PLAIN):
                    numbers[f"{key}.{name}"] = value
                elif isinstance(value, Tensor):
                    # A file of tensors takes no storage twice, and 8-bit optimizers share their tables.
                    tensors[f"{key}.{name}"] = value.clone() if value.data_ptr() in stored else value.contiguous()
                    stored.add(value.data_ptr())
    groups = [[_changed(group, optimizer.defaults) for group in optimizer.param_groups] for optimizer in optimizers]
    return tensors, {"state": numbers, "groups": groups}


PLAIN = (bool, int, float, str, type(None))
OF_RECIPE = ("params", "lr", "initial_lr", "betas", "weight_decay")


def _changed(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in group.items()
        if key not in OF_RECIPE and isinstance(value, PLAIN) and value != defaults.get(key)
    }


def average_tensors(average: AveragedModel | None) -> dict[str, Tensor]:
    if average is None:
        return {}
    weights = {f"average.{name}": parameter.detach() for name, parameter in average.module.named_parameters()}
    return weights | {"average_count": average.get_buffer("n_averaged")}


def random_state() -> dict[str, Tensor]:
    """That of this process, on the CPU and the GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# The log


class MetricsLog:
    """metrics.jsonl, one record a line, and the same in TensorBoard's format where that is installed.

    A resumed run forgets the records after its checkpoint and writes them anew.
    """

    def __init__(self, out: Path, *, after_step: int, trackers: Sequence[Any] = ()) -> None:
        """
        Args:
            trackers: of accelerate, which are given the same numbers.
        """
        self.path = out / LOG_FILE
        write_json_lines(self.path, [record for record in read_records(self.path) if record["step"] <= after_step])
        self.file = self.path.open("a", encoding="utf-8")
        self.board, self.trackers = _open_board(out, after_step), trackers

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
        for tracker in self.trackers:
            tracker.finish()

    def add(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        scalars, step = dict(flatten_record(record)), record["step"]
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
        for tracker in self.trackers:
            tracker.log(scalars, step=step)


def flatten_record(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record by the names that they have in TensorBoard."""
    for name, value in record.items():
        if name not in ("step", "validation", "blanks"):
            yield f"training/{name}", value
    for source, found in record.get("validation", {}).items():
        for name, value in found.items():
            yield f"validation_{name}/{source}", value
    for group, found in record.get("blanks", {}).items():
        for name in ("top1", "nats"):
            yield f"blanks_{name}/{group}", found[name]


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


LOSSES = ("loss", *OBJECTIVES)
"""Names of validation losses, in nats; what else is validated is a metric in per cent."""


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws the losses, the metrics of a task if there are any, and the learning rate with the gradient norm.

    They are drawn over the tokens seen where those are counted, else over the steps. A validation of several sources is
    drawn as their mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axis = "tokens" if records and "tokens" in records[0] else "step"
    scale = 1e6 if axis == "tokens" else 1
    validated = [
        (record[axis] / scale, list(record["validation"].values())) for record in records if "validation" in record
    ]
    names = sorted({name for _, sources in validated for found in sources for name in found})
    has_metrics = any(name not in LOSSES for name in names)
    ratios = [3, 2, 1] if has_metrics else [3, 1]
    figure, panels = plt.subplots(
        len(ratios), 1, figsize=(9, 2.4 * len(ratios) + 2), sharex=True, height_ratios=ratios, layout="constrained"
    )
    positions = [record[axis] / scale for record in records]
    panels[0].plot(positions, [record["loss"] for record in records], color="0.7", linewidth=1, label="training")
    for name in names:
        means = [sum(found[name] for found in sources) / len(sources) for _, sources in validated]
        panel = panels[0] if name in LOSSES else panels[1]
        label = "validation" if name == "loss" else f"validation, {name}"
        panel.plot([position for position, _ in validated], means, marker="o", markersize=3, label=label)
    panels[0].set_ylabel("loss (nats per labelled token)" if axis == "tokens" else "loss (nats)")
    if has_metrics:
        panels[1].set_ylabel("validation, %")
    for panel in panels[:-1]:
        panel.grid(alpha=0.3)
        panel.legend()
    _draw_rates(panels[-1], positions, records)
    panels[-1].set_xlabel("tokens seen (millions)" if axis == "tokens" else "steps")
    with written(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
    plt.close(figure)
    return path


def _draw_rates(panel: Any, positions: Sequence[float], records: Sequence[Mapping[str, Any]]) -> None:
    panel.plot(positions, [record["learning_rate"] for record in records], color="tab:blue")
    panel.set_ylabel("learning rate", color="tab:blue")
    norms = panel.twinx()
    norms.plot(positions, [record["gradient_norm"] for record in records], color="tab:orange", alpha=0.6, linewidth=1)
    norms.set_ylabel("gradient norm", color="tab:orange")


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
