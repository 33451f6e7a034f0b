"""How good a reward model is: accuracy by kind of pair, beside plain rules, with prompts exchanged, and calibration."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from gmask.tasks.metrics import Rows

CALIBRATION_BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """The rewards of a pair, and the lengths of its answers in tokens."""

    kind: str
    chosen: float
    rejected: float
    chosen_length: int
    rejected_length: int
    shuffled_chosen: float  # behind the prompt of another pair
    shuffled_rejected: float


@dataclass(frozen=True, slots=True)
class WinRate:
    """A share of pairs, with its 95 % interval."""

    share: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f}, of {self.count})"


@dataclass(frozen=True, slots=True)
class RewardReport:
    """What `report_rewards` found."""

    accuracy: dict[str, WinRate]  # by kind; "all" for all pairs
    shuffled: dict[str, WinRate]  # the same with the prompts exchanged
    longer_wins: WinRate
    calibration: list[dict[str, float]]  # by the model's probability of the answer that it prefers
    calibration_error: float  # the mean distance of probability and accuracy, over the pairs
    length_correlation: float  # Pearson's, of reward and length
    mean_margin: float  # of the rewards

    def to_dict(self) -> dict[str, Any]:
        def plain(shares: dict[str, WinRate]) -> dict[str, Any]:
            return {
                kind: {"accuracy": one.share, "low": one.low, "high": one.high, "pairs": one.count}
                for kind, one in shares.items()
            }

        return {
            "accuracy": plain(self.accuracy),
            "prompt_shuffled": plain(self.shuffled),
            "longer_wins": plain({"all": self.longer_wins})["all"],
            "calibration": self.calibration,
            "calibration_error": self.calibration_error,
            "length_correlation": self.length_correlation,
            "mean_margin": self.mean_margin,
        }

    def to_rows(self) -> Rows:
        """A table of the accuracies, one row a kind."""
        rows = [(kind, str(one), str(self.shuffled[kind])) for kind, one in self.accuracy.items()]
        return Rows(
            ("pairs", "accuracy (95 % interval)", "prompts exchanged"),
            [*rows, ("longer wins", str(self.longer_wins), "")],
        )


def report_rewards(pairs: Sequence[ScoredPair]) -> RewardReport:
    """Measures a reward model on scored pairs. Equal rewards count as half right."""
    kinds = sorted({pair.kind for pair in pairs} - {"all"})
    groups = {kind: [pair for pair in pairs if pair.kind == kind] for kind in kinds} | {"all": list(pairs)}
    wins = {kind: share_of([_win(one.chosen, one.rejected) for one in group]) for kind, group in groups.items()}
    shuffled = {
        kind: share_of([_win(one.shuffled_chosen, one.shuffled_rejected) for one in group])
        for kind, group in groups.items()
    }
    rewards = np.array([value for pair in pairs for value in (pair.chosen, pair.rejected)])
    lengths = np.array([value for pair in pairs for value in (pair.chosen_length, pair.rejected_length)], float)
    varies = rewards.std() > 0 and lengths.std() > 0
    bins, error = _calibrate(pairs)
    return RewardReport(
        accuracy=wins,
        shuffled=shuffled,
        longer_wins=share_of([_win(one.chosen_length, one.rejected_length) for one in pairs]),
        calibration=bins,
        calibration_error=error,
        length_correlation=float(np.corrcoef(rewards, lengths)[0, 1]) if varies else 0.0,
        mean_margin=float(np.mean([pair.chosen - pair.rejected for pair in pairs])),
    )


def share_of(wins: Sequence[float], *, level: float = 0.95) -> WinRate:
    """The share of wins, which are 0, 0.5 or 1, with its interval.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    count, share = len(wins), sum(wins) / len(wins)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return WinRate(share, max(0.0, center - half), min(1.0, center + half), count)


def _win(chosen: float, rejected: float) -> float:
    return 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0


def _calibrate(pairs: Sequence[ScoredPair]) -> tuple[list[dict[str, float]], float]:
    """Bins of pairs by the probability of the preferred answer, ``sigmoid(|difference|)``; and the mean distance."""
    differences = np.array([pair.chosen - pair.rejected for pair in pairs])
    probability = 1 / (1 + np.exp(-np.abs(differences)))
    right = np.where(differences == 0, 0.5, differences > 0)
    bins, error = [], 0.0
    for low, high in itertools.pairwise(CALIBRATION_BINS):
        inside = (probability >= low) & ((probability < high) | (high == 1.0))
        if inside.any():
            expected, found = float(probability[inside].mean()), float(right[inside].mean())
            bins.append(
                {"from": low, "to": high, "pairs": int(inside.sum()), "probability": expected, "accuracy": found}
            )
            error += float(inside.mean()) * abs(expected - found)
    return bins, error
