"""What do the runs of a cross-validation say together?"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gmask.tasks.tables import Rows
from gmask.training.tuning.report import format_metric

SHARED = ("task", "method", "seed", "trainable_parameters", "parameters")
"""What the results of all folds have alike."""


def summarize_folds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of a cross-validation, from those of its folds, which stand under ``runs``."""
    return {
        **{name: runs[0][name] for name in SHARED},
        "folds": len(runs),
        "metrics": _by_split([run["metrics"] for run in runs]),
        "majority": _by_split([run["majority"] for run in runs]),
        "seconds": sum(run["seconds"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "runs": list(runs),
    }


def fold_rows(summary: Mapping[str, Any]) -> Rows:
    """Mean and deviation of every metric over the folds, beside those of the majority baseline."""
    rows = []
    for split, metrics in summary["metrics"].items():
        baseline = summary["majority"].get(split, {})
        for name, found in metrics.items():
            rows.append((split, name, _render(name, found), _render(name, baseline.get(name))))
    return Rows(("split", "metric", "this model", "majority"), rows, n_labels=2)


def summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample deviation of each metric over several runs."""
    return {
        name: {
            "mean": statistics.mean(one[name] for one in metrics),
            "deviation": statistics.stdev(one[name] for one in metrics) if len(metrics) > 1 else 0.0,
        }
        for name in metrics[0]
    }


def _by_split(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    return {split: summarize([one[split] for one in found]) for split in found[0]}


def _render(name: str, found: Mapping[str, float] | None) -> str:
    return "-" if found is None else " ± ".join(format_metric(name, found[key]) for key in ("mean", "deviation"))
