"""How right is an answer, and how sure is a mean of such scores?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def exact_match(answer: str, reference: str) -> bool:
    """Are the two the same but for spaces around them and their number inside? Case counts."""
    return answer.split() == reference.split()


def overlap_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the units of two texts, as bags (SQuAD's F1, without its clean-up)."""
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0


def estimate_mean(values: npt.ArrayLike, *, rng: np.random.Generator) -> Estimate:
    """The mean of independent scores [N], with the percentile bootstrap over `RESAMPLES` resamples."""
    scores = np.asarray(values, np.float64)
    resampled = scores[rng.integers(len(scores), size=(RESAMPLES, len(scores)))].mean(axis=1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(float(scores.mean()), float(low), float(high))
