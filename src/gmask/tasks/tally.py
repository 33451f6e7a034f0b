"""What the metrics of a task need of each sample, as numbers: tens of thousands of samples are measured in little
memory, and resampled for intervals.

Shape letters: N samples, U units (what a bootstrap draws: samples, or the samples of one group), R resamples.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from gmask.tasks.metrics import (
    COUNT_METRICS,
    GROUP_METRICS,
    LIKELIHOOD_METRICS,
    NOT_PER_CENT,
    PAIR_METRICS,
    ChoiceCounts,
    Floats,
    MetricLanguage,
    Pair,
    add_categories,
    find_language,
    join_words,
    load_library,
    read_choice,
    read_pairs,
    score_predictions,
)
from gmask.tasks.records import Prediction, Sample

BOOTSTRAP_RESAMPLES = 1000
WEIGHTS_AT_ONCE = 1_000_000
"""Weights of samples that are in memory: a resample has one for each."""

BLEU_COUNTS = 10
"""Numbers from which BLEU is computed: two lengths, and the matches and the n-grams of four orders."""

BLEU_SMOOTHING: dict[str, Literal["exp", "none"]] = {"sacrebleu": "exp", "infill-bleu": "none"}


@dataclass
class Tally:
    """Collects what `score_predictions` computes its scores from.

    The scores are the same. Each sample leaves some numbers; it is kept itself for ``sacrebleu`` without a language,
    whose tokenizer depends on all texts, and for metrics that are not known here.
    """

    metrics: Sequence[str]
    language: MetricLanguage | None = None
    units: array[int] = field(default_factory=lambda: array("q"))  # [N], from 0
    groups: array[int] = field(default_factory=lambda: array("q"))  # [N], from 0, for metrics of groups
    pairs: array[int] = field(default_factory=lambda: array("q"))  # [N], indices of `pair_names`
    pair_names: dict[tuple[int, int], int] = field(default_factory=dict)  # by chosen and right index
    sums: dict[str, array[float]] = field(default_factory=dict)  # [N] for each metric of texts: the sum over its blanks
    blanks: array[int] = field(default_factory=lambda: array("q"))  # [N]
    nats: array[float] = field(default_factory=lambda: array("d"))  # [N], of a given answer; with its tokens and words:
    tokens: array[int] = field(default_factory=lambda: array("q"))
    words: array[int] = field(default_factory=lambda: array("q"))  # without the first
    bleu: dict[str, array[float]] = field(default_factory=dict)  # [N, BLEU_COUNTS], in one row
    texts: list[list[Pair]] = field(default_factory=list)  # [N]
    others: list[tuple[Prediction, Sample]] = field(default_factory=list)  # [N]
    _group_ids: dict[str | None, int] = field(default_factory=dict)
    _n_groups: int = 0

    def __post_init__(self) -> None:
        self.counted = [name for name in self.metrics if name in COUNT_METRICS]
        self.of_groups = [name for name in self.metrics if name in GROUP_METRICS]
        self.of_texts = [name for names in PAIR_METRICS for name in names if name in self.metrics]
        self.of_tokens = [name for name in self.metrics if name in LIKELIHOOD_METRICS]
        known = {*self.counted, *self.of_groups, *self.of_texts, *self.of_tokens, *BLEU_SMOOTHING}
        self.unknown = [name for name in self.metrics if name not in known]
        self.draws_groups = "macro-accuracy" not in self.metrics  # whose groups are subjects, not questions

    def __len__(self) -> int:
        return len(self.units)

    def add(self, prediction: Prediction, sample: Sample) -> None:
        """Raises `GmaskError` as `score_predictions`."""
        group = self._find_group(sample.group)
        self.units.append(group if self.draws_groups else len(self.units))
        if self.counted or self.of_groups:
            choice = read_choice(prediction, sample)
            if self.of_groups:
                if sample.group is None:
                    score_predictions(self.of_groups, [prediction], [sample])  # raises
                self.groups.append(group)
            pair = (choice.chosen, choice.label)
            self.pairs.append(self.pair_names.setdefault(pair, len(self.pair_names)))
        if self.of_texts or "sacrebleu" in self.metrics:
            self._add_texts(read_pairs(prediction, sample))
        if "infill-bleu" in self.metrics:
            filled, right = (join_words(sample.text, texts) for texts in (prediction.texts, sample.answers))
            self._add_bleu("infill-bleu", [Pair(filled, (right,))], "none")
        if self.of_tokens:
            if ("word-perplexity" in self.metrics and sample.words is None) or not prediction.is_greedy:
                score_predictions(self.of_tokens, [prediction], [sample])  # raises
            self.nats.append(-math.fsum(prediction.scores))
            self.tokens.append(len(prediction.scores))
            self.words.append((sample.words or 1) - 1)
        if self.unknown:
            self.others.append((prediction, replace(sample, history=())))

    def scores(self) -> dict[str, float]:
        """The score of each metric, in per cent but for those of `NOT_PER_CENT`."""
        measured = self._measure(np.ones((1, self.n_units)))
        return {name: float(measured[name][0]) for name in self.metrics}

    def resample(self, *, seed: int = 0, resamples: int = BOOTSTRAP_RESAMPLES) -> dict[str, Floats]:
        """The scores ``[R]`` of each metric on samples that are drawn with replacement from these.

        What is drawn are samples, or the groups of them that belong to one question. Two tallies of the same samples
        draw alike.
        """
        rng = np.random.default_rng(seed)
        found: dict[str, list[Floats]] = {name: [] for name in self.metrics}
        at_once = max(1, WEIGHTS_AT_ONCE // max(1, len(self)))
        for start in range(0, resamples, at_once):
            weights = np.empty((min(at_once, resamples - start), self.n_units))
            for row in weights:
                row[:] = np.bincount(rng.integers(len(row), size=len(row)), minlength=len(row))
            for name, scores in self._measure(weights).items():
                found[name].append(scores)
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def score_groups(self) -> dict[str, tuple[float, int]]:
        """As `gmask.tasks.metrics.score_groups`, where groups are subjects; else empty."""
        if self.draws_groups:
            return {}
        groups, pairs = np.asarray(self.groups), np.asarray(self.pairs)
        right = np.array([chosen == label for chosen, label in self.pair_names])[pairs]
        held, hits = (np.bincount(groups, weights, self._n_groups) for weights in (None, right))
        return add_categories(
            {name: (float(100 * hits[g] / held[g]), int(held[g])) for name, g in self._group_ids.items() if name}
        )

    @property
    def n_units(self) -> int:
        """What a bootstrap draws from."""
        return self._n_groups if self.draws_groups else len(self)

    def lacks_positive(self) -> bool:
        """True if F1 is asked for, and no sample is of class 1: it is 0 whatever is answered."""
        return bool({"f1", "multirc-f1a"} & set(self.counted)) and all(label != 1 for _, label in self.pair_names)

    def _find_group(self, group: str | None) -> int:
        """A sample without a group is one of its own."""
        if group in self._group_ids:
            return self._group_ids[group]
        if group is not None:
            self._group_ids[group] = self._n_groups
        self._n_groups += 1
        return self._n_groups - 1

    def _add_texts(self, pairs: list[Pair]) -> None:
        self.blanks.append(len(pairs))
        for computed, score in PAIR_METRICS.items():
            if set(computed).isdisjoint(self.of_texts):
                continue
            found = [score(pair, self.language or find_language(pair.references)) for pair in pairs]
            for name in set(computed) & set(self.of_texts):
                self.sums.setdefault(name, array("d")).append(sum(each[name] for each in found))
        if "sacrebleu" in self.metrics and self.language is None:
            self.texts.append(pairs)
        elif "sacrebleu" in self.metrics:
            self._add_bleu("sacrebleu", pairs, tokenizer_of(self.language))

    def _add_bleu(self, name: str, pairs: Sequence[Pair], tokenizer: str) -> None:
        scorer = load_library("sacrebleu.metrics").BLEU(tokenize=tokenizer, force=True)
        self.bleu.setdefault(name, array("d")).extend(np.sum([_count(scorer, pair) for pair in pairs], axis=0))

    def _measure(self, weights: Floats) -> dict[str, Floats]:
        """The scores ``[R]`` of each metric where unit u counts ``weights[r, u]`` times: ``[R, U]``."""
        samples = weights[:, np.asarray(self.units)]  # [R, N]
        found = dict(self._measure_choices(samples)) | dict(self._measure_tokens(samples))
        for name in self.of_texts:
            found[name] = (samples @ np.asarray(self.sums[name])) / (samples @ np.asarray(self.blanks))
        for name, smoothing in BLEU_SMOOTHING.items():
            if name in self.metrics:
                found[name] = self._measure_bleu(name, smoothing, samples)
        scores = {name: found[name] * (1 if name in NOT_PER_CENT else 100) for name in found}
        return scores | (self._measure_others(samples) if self.unknown else {})

    def _measure_choices(self, samples: Floats) -> Iterator[tuple[str, Floats]]:
        if not self.pairs:
            return
        pairs = np.asarray(self.pairs)
        names = np.array(list(self.pair_names), np.int64)
        count: Floats = np.stack([np.bincount(pairs, row, len(names)) for row in samples]).astype(np.float64)
        for name in self.counted:
            yield name, COUNT_METRICS[name](ChoiceCounts(names[:, 0], names[:, 1], count))
        if self.of_groups:
            groups, right = np.asarray(self.groups), (names[:, 0] == names[:, 1])[pairs]
            size = self._n_groups
            held = np.stack([np.bincount(groups, row, size) for row in samples])  # [R, G]
            hits = np.stack([np.bincount(groups, row * right, size) for row in samples])
        for name in self.of_groups:
            if name == "macro-accuracy":
                yield name, (hits / np.where(held > 0, held, 1)).sum(-1) / (held > 0).sum(-1)
            else:  # a group that is drawn k times has k times its samples
                times = held / np.bincount(groups, minlength=size)
                yield name, (times * (hits == held)).sum(-1) / times.sum(-1)

    def _measure_tokens(self, samples: Floats) -> Iterator[tuple[str, Floats]]:
        if not self.of_tokens:
            return
        nats = samples @ np.asarray(self.nats)
        divisors = {
            "perplexity": samples @ np.asarray(self.tokens),
            "word-perplexity": samples @ np.asarray(self.words),
            "nats": samples.sum(-1),
        }
        for name in self.of_tokens:
            # a resample may be made of documents of one word alone
            mean = nats / np.maximum(divisors[name], 1)
            yield name, mean if name == "nats" else np.exp(mean)

    def _measure_bleu(self, name: str, smoothing: str, samples: Floats) -> Floats:
        """BLEU from the summed counts of the texts, which is how sacrebleu makes that of a corpus."""
        if name == "sacrebleu" and self.language is None:
            right = [text for pairs in self.texts for pair in pairs for text in pair.references]
            self.bleu.pop(name, None)
            for pairs in self.texts:
                self._add_bleu(name, pairs, tokenizer_of(find_language(right)))
        sums = samples @ np.asarray(self.bleu[name]).reshape(-1, BLEU_COUNTS)
        return np.array([_score_counts(row, smoothing) / 100 for row in sums])

    def _measure_others(self, samples: Floats) -> dict[str, Floats]:
        rows = []
        for row in samples.astype(np.int64):
            chosen = [self.others[index] for index in np.repeat(np.arange(len(row)), row)]
            predictions, answered = zip(*chosen, strict=True)
            rows.append(score_predictions(self.unknown, predictions, answered, language=self.language))
        return {name: np.array([found[name] for found in rows]) for name in self.unknown}


def tokenizer_of(language: MetricLanguage | None) -> str:
    """sacrebleu's tokenizer."""
    return "zh" if language == "zh" else "13a"


def _count(scorer: Any, pair: Pair) -> list[float]:
    """The lengths of a text and of its nearest reference, then the matches and the n-grams of each order."""
    found = scorer.corpus_score([pair.text], [[reference] for reference in pair.references])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def _score_counts(sums: Floats, smoothing: str) -> float:
    written, right, *counts = sums.astype(int).tolist()
    orders = len(counts) // 2
    found = load_library("sacrebleu.metrics").BLEU.compute_bleu(
        correct=counts[:orders], total=counts[orders:], sys_len=written, ref_len=right, smooth_method=smoothing
    )
    return float(found.score)


def interval(resampled: Floats, *, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled scores ``[R]``."""
    low, high = np.quantile(resampled, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
