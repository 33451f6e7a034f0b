"""How good a reward model is: accuracy by kind of pair, beside plain rules, with prompts exchanged, and calibration."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from gmask.tasks.metrics import Rows

CALIBRATION_BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STOCK_SHARE = 0.01
"""An answer that is the worse one in so many of the training pairs, and in two at least, is a stock answer."""


@dataclass(frozen=True, slots=True)
class PlainRules:
    """Rules that read no prompt. What a reward model adds to them is what it has learnt beyond such traces of the data.

    The first that tells two answers apart decides: a stock answer is worse; one that repeats itself is worse; one that
    is the beginning of the other is worse. Else a coin is tossed.
    """

    stock: frozenset[str]

    @classmethod
    def learn(cls, pairs: Iterable[tuple[str, str]]) -> "PlainRules":
        """Finds the stock answers of training pairs, each a better and a worse answer."""
        better, worse = Counter[str](), Counter[str]()
        for chosen, rejected in pairs:
            better[chosen.strip()] += 1
            worse[rejected.strip()] += 1
        least = max(2, STOCK_SHARE * worse.total())
        return cls(frozenset(text for text, count in worse.items() if count >= least and count > better[text]))

    def judge(self, chosen: str, rejected: str) -> float:
        """Returns 1 if the rules prefer the answer that was chosen, 0 if the other one, 0.5 if the coin decides."""
        one, other = chosen.strip(), rejected.strip()
        for faults in (
            (one in self.stock, other in self.stock),
            (is_repeated(one), is_repeated(other)),
            (other.startswith(one), one.startswith(other)),
        ):
            if faults[0] != faults[1]:
                return float(faults[1])
        return 0.5


def is_repeated(text: str) -> bool:
    """Whether a text is a passage that is written again and again, twice at least; the last time it may break off."""
    return any(text.startswith(text[size:]) for size in range(2, (len(text) + 1) // 2 + 1))


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
    rules: float = 0.5  # as of `PlainRules.judge`


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
    rules: dict[str, WinRate]  # the same by `PlainRules`
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
            "plain_rules": plain(self.rules),
            "longer_wins": plain({"all": self.longer_wins})["all"],
            "calibration": self.calibration,
            "calibration_error": self.calibration_error,
            "length_correlation": self.length_correlation,
            "mean_margin": self.mean_margin,
        }

    def to_rows(self) -> Rows:
        """A table of the accuracies, one row a kind."""
        rows = [
            (kind, str(one), str(self.shuffled[kind]), f"{100 * self.rules[kind].share:.1f} %")
            for kind, one in self.accuracy.items()
        ]
        return Rows(
            ("pairs", "accuracy (95 % interval)", "prompts exchanged", "plain rules"),
            [*rows, ("longer wins", str(self.longer_wins), "", "")],
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
    rules = {kind: share_of([one.rules for one in group]) for kind, group in groups.items()}
    rewards = np.array([value for pair in pairs for value in (pair.chosen, pair.rejected)])
    lengths = np.array([value for pair in pairs for value in (pair.chosen_length, pair.rejected_length)], float)
    varies = rewards.std() > 0 and lengths.std() > 0
    bins, error = _calibrate(pairs)
    return RewardReport(
        accuracy=wins,
        shuffled=shuffled,
        rules=rules,
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
