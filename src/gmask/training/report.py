"""What does a run leave to look at? A log of records, TensorBoard events, and a picture of the curves."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


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
