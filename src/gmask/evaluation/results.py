"""What an evaluation found, and by what: for JSON and back. Published numbers to set beside it."""

import dataclasses
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gmask.checkpoints.formats import open_checkpoint
from gmask.config import build_settings, read_yaml
from gmask.errors import GmaskError
from gmask.files import read_object, write_json
from gmask.tasks.records import TaskKind, hash_file

EVALUATION_FILE = "results.json"
PUBLISHED_FILE = Path(__file__).parent / "published.yaml"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A score with its 95 % interval over samples; over several seeds their mean, and the deviation of the seeds."""

    value: float
    low: float | None = None  # None where there is but one sample
    high: float | None = None
    deviation: float | None = None  # of the scores of the seeds, by n - 1; None of one seed


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The scores of a model on a task, in per cent but for perplexities and nats. Without answers there are none."""

    name: str
    task: str
    kind: TaskKind
    samples: int
    scores: Mapping[str, TaskScore]
    majority: Mapping[str, float] = field(default_factory=dict)  # of the label most frequent in these samples
    chance: float | None = None  # accuracy of a random choice
    groups: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # accuracy and samples, by subject
    seeds: Sequence[int] = (0,)
    by_seed: Sequence[Mapping[str, float]] = ()
    shots: int = 0
    shuffled_labels: bool = False
    data: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the files; of a set on the hub its commit
    settings: Mapping[str, Any] = field(default_factory=dict)
    resumed: int = 0  # predictions of an earlier run
    left_out: int = 0  # records that could not be used
    notes: Sequence[str] = ()
    seconds: float = 0.0
    samples_per_second: float | None = None  # of those that were predicted now


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A task that was not measured."""

    name: str
    reason: str
    is_missing: bool = False  # its records are not on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """By what the numbers of a run were found."""

    model: str
    adapter: str | None
    weights: Mapping[str, str]  # SHA-256 of the model's files, by their names
    dtype: str
    device: str
    processes: int
    threads: int
    versions: Mapping[str, str]
    commit: str | None  # of gmask's sources, where they are a checkout
    started: str  # ISO 8601, UTC
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """The name of the model in tables."""
        name = self.model.rstrip("/").rpartition("/")[2] if "/" in self.model else self.model
        return f"{name} + {Path(self.adapter).name}" if self.adapter else name


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """All that a run found."""

    run: RunRecord
    tasks: Sequence[TaskResult]
    refused: Sequence[Refusal] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> None:
        write_json(folder / EVALUATION_FILE, self.to_dict())


def read_report(folder: Path) -> EvaluationReport:
    """The results in the folder of a run.

    Raises:
        GmaskError: there are none, or they are of another form.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        raise GmaskError(f"{folder}: holds no {EVALUATION_FILE}: name the folder that gmask evaluate wrote with --out")
    values = read_object(path, remedy="measure again")
    try:
        tasks = [
            TaskResult(
                **{
                    **task,
                    "scores": {name: TaskScore(**score) for name, score in task["scores"].items()},
                    "groups": {name: (found[0], found[1]) for name, found in task["groups"].items()},
                }
            )
            for task in values["tasks"]
        ]
        refused = [Refusal(**one) for one in values["refused"]]
        return EvaluationReport(run=RunRecord(**values["run"]), tasks=tasks, refused=refused)
    except (TypeError, LookupError, AttributeError) as error:
        raise GmaskError(
            f"{path}: not the results of this version of gmask evaluate ({error}); measure again"
        ) from error


def hash_weights(folder: Path, adapter: Path | None) -> dict[str, str]:
    """SHA-256 of the files that the weights of a model are read from, of its config, and of all files of an adapter."""
    checkpoint = open_checkpoint(folder)
    files = {path.relative_to(folder).as_posix(): path for path in checkpoint.files}
    checkpoint.close()
    if (folder / "config.json").is_file():
        files["config.json"] = folder / "config.json"
    if adapter is not None:
        files |= {f"adapter/{path.name}": path for path in sorted(adapter.iterdir()) if path.is_file()}
    return {name: hash_file(path) for name, path in sorted(files.items())}


def list_versions() -> dict[str, str]:
    return {name: version(name) for name in ("gmask", "torch", "transformers", "tokenizers", "numpy")}


def find_commit() -> str | None:
    """The commit of gmask's sources, with a plus sign if files differ from it; None outside of a checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    commands = (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(root), *command],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedScore:
    """A number that was published, not measured here."""

    task: str
    metric: str
    model: str
    value: float
    how: str  # it was measured
    source: str


def read_published() -> list[PublishedScore]:
    entries = read_yaml(PUBLISHED_FILE)
    return [build_settings(PublishedScore, entry, f"{PUBLISHED_FILE.name}: ") for entry in entries]
