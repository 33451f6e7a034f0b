"""What the metrics of a task need of each sample, as numbers: tens of thousands of samples are measured in little
memory, and resampled for intervals.

Shape letters: N samples, U units (what a bootstrap draws: samples, or the samples of one group), R resamples.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gmask.tasks.metrics import (
    COUNT_METRICS,
    PAIR_METRICS,
    ChoiceCounts,
    MetricLanguage,
    Pair,
    find_language,
    load_library,
    read_choice,
    read_pairs,
    score_predictions,
)
from gmask.tasks.records import Prediction, Sample

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
WEIGHTS_AT_ONCE = 1_000_000
"""Weights of samples that are in memory: a resample has one for each."""


@dataclass
class Tally:
    """Collects what `score_predictions` computes its scores from.

    The scores are the same. Choices are kept as numbers, scores of texts by sample; texts themselves for ``sacrebleu``
    alone, whose tokenizer depends on all of them. Of metrics that are not known here the answered samples are kept.
    """

    metrics: Sequence[str]
    language: MetricLanguage | None = None
    units: array[int] = field(default_factory=lambda: array("q"))  # [N], from 0
    pairs: array[int] = field(default_factory=lambda: array("q"))  # [N], indices of `pair_names`
    pair_names: dict[tuple[int, int], int] = field(default_factory=dict)
    sums: dict[str, array[float]] = field(default_factory=dict)  # [N] for each metric of texts: the sum over its blanks
    blanks: array[int] = field(default_factory=lambda: array("q"))  # [N]
    texts: list[list[Pair]] = field(default_factory=list)  # [N], for sacrebleu
    others: list[tuple[Prediction, Sample]] = field(default_factory=list)  # [N], for metrics that are not known here
    _groups: dict[str, int] = field(default_factory=dict)
    _n_units: int = 0

    def __post_init__(self) -> None:
        self.counted = [name for name in self.metrics if name in COUNT_METRICS]
        self.of_texts = [name for names in PAIR_METRICS for name in names if name in self.metrics]
        known = {*self.counted, *self.of_texts, "multirc-em", "sacrebleu"}
        self.unknown = [name for name in self.metrics if name not in known]

    def __len__(self) -> int:
        return len(self.units)

    def add(self, prediction: Prediction, sample: Sample) -> None:
        """Raises `GmaskError` as `score_predictions`."""
        self.units.append(self._find_unit(sample.group))
        if self.counted or "multirc-em" in self.metrics:
            choice = read_choice(prediction, sample)
            if "multirc-em" in self.metrics and sample.group is None:
                score_predictions(["multirc-em"], [prediction], [sample])  # raises
            pair = (choice.chosen, choice.label)
            self.pairs.append(self.pair_names.setdefault(pair, len(self.pair_names)))
        if self.of_texts or "sacrebleu" in self.metrics:
            pairs = read_pairs(prediction, sample)
            self.blanks.append(len(pairs))
            self._add_texts(pairs)
            if "sacrebleu" in self.metrics:
                self.texts.append(pairs)
        if self.unknown:
            self.others.append((prediction, replace(sample, history=())))

    def scores(self) -> dict[str, float]:
        """The score of each metric, in per cent."""
        measured = self._measure(np.ones((1, self._n_units)))
        return {name: float(measured[name][0]) for name in self.metrics}

    def resample(self, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Floats]:
        """The scores ``[R]`` of each metric on samples that are drawn with replacement from these, in per cent.

        What is drawn are samples, or groups of them where they have some. Two tallies of the same samples draw alike.
        """
        rng = np.random.default_rng(seed)
        found: dict[str, list[Floats]] = {name: [] for name in self.metrics}
        at_once = max(1, WEIGHTS_AT_ONCE // max(1, len(self)))
        for start in range(0, resamples, at_once):
            rows = min(at_once, resamples - start)
            weights = np.empty((rows, self._n_units))
            for row in weights:
                row[:] = np.bincount(rng.integers(self._n_units, size=self._n_units), minlength=self._n_units)
            for name, scores in self._measure(weights).items():
                found[name].append(scores)
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def lacks_positive(self) -> bool:
        """True if F1 is asked for, and no sample is of class 1: it is 0 whatever is answered."""
        return bool({"f1", "multirc-f1a"} & set(self.counted)) and all(label != 1 for _, label in self.pair_names)

    def _find_unit(self, group: str | None) -> int:
        if group is None:
            self._n_units += 1
            return self._n_units - 1
        if group not in self._groups:
            self._groups[group] = self._n_units
            self._n_units += 1
        return self._groups[group]

    def _add_texts(self, pairs: Sequence[Pair]) -> None:
        for computed, score in PAIR_METRICS.items():
            if set(computed).isdisjoint(self.of_texts):
                continue
            found = [score(pair, self.language or find_language(pair.references)) for pair in pairs]
            for name in set(computed) & set(self.of_texts):
                self.sums.setdefault(name, array("d")).append(sum(each[name] for each in found))

    def _measure(self, weights: Floats) -> dict[str, Floats]:
        """The scores ``[R]`` of each metric where unit u counts ``weights[r, u]`` times: ``[R, U]``."""
        samples = weights[:, np.asarray(self.units)]  # [R, N]
        found = {name: 100 * scores for name, scores in self._measure_choices(weights, samples)}
        for name in self.of_texts:
            found[name] = 100 * (samples @ np.asarray(self.sums[name])) / (samples @ np.asarray(self.blanks))
        if "sacrebleu" in self.metrics:
            found["sacrebleu"] = self._measure_bleu(samples)
        if self.unknown:
            found |= self._measure_others(samples)
        return {name: found[name] for name in self.metrics}

    def _measure_choices(self, weights: Floats, samples: Floats) -> Iterator[tuple[str, Floats]]:
        if not self.pairs:
            return
        pairs = np.asarray(self.pairs)
        names = np.array(list(self.pair_names), np.int64)
        count = np.stack([np.bincount(pairs, row, len(names)) for row in samples])
        for name in self.counted:
            yield name, COUNT_METRICS[name](ChoiceCounts(names[:, 0], names[:, 1], count))
        if "multirc-em" in self.metrics:
            wrong = np.bincount(np.asarray(self.units), (names[:, 0] != names[:, 1])[pairs], self._n_units)
            yield "multirc-em", (weights @ (wrong == 0)) / weights.sum(-1)

    def _measure_bleu(self, samples: Floats) -> Floats:
        """sacrebleu's score from the summed counts of the sentences, which is how it makes that of a corpus."""
        corpus = [pair for pairs in self.texts for pair in pairs]
        language = self.language or find_language([text for pair in corpus for text in pair.references])
        bleu = load_library("sacrebleu.metrics").BLEU(tokenize="zh" if language == "zh" else "13a", force=True)
        sums = np.array([np.sum([_bleu_counts(bleu, pair) for pair in pairs], axis=0) for pairs in self.texts])
        return np.array([_bleu_of(bleu, row) for row in samples @ sums])

    def _measure_others(self, samples: Floats) -> dict[str, Floats]:
        rows = []
        for row in samples.astype(np.int64):
            chosen = [self.others[index] for index in np.repeat(np.arange(len(row)), row)]
            predictions, answered = zip(*chosen, strict=True)
            rows.append(score_predictions(self.unknown, predictions, answered, language=self.language))
        return {name: np.array([found[name] for found in rows]) for name in self.unknown}


def _bleu_counts(bleu: Any, pair: Pair) -> list[float]:
    """The lengths of a text and of its nearest reference, then the matches and the n-grams of each order."""
    found = bleu.corpus_score([pair.text], [[reference] for reference in pair.references])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def _bleu_of(bleu: Any, sums: Floats) -> float:
    lengths, counts = sums[:2].astype(int).tolist(), sums[2:].astype(int).tolist()
    orders = len(counts) // 2
    found = bleu.compute_bleu(
        correct=counts[:orders], total=counts[orders:], sys_len=lengths[0], ref_len=lengths[1], smooth_method="exp"
    )
    return float(found.score)


def interval(resampled: Floats, *, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled scores ``[R]``."""
    low, high = np.quantile(resampled, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
