"""N-gram models, and how they fill held-out blanks: the baselines of `gmask evaluate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gmask.infilling.blanks import IntArray
from gmask.tasks.heldout import HeldOutBlank, LanguageRules, cut_sentences

FloatArray = npt.NDArray[np.float64]
DISCOUNT = 0.75  # taken off each count, the usual choice
MAX_VOCABULARY = 50_000
BEAM = 64  # partial answers kept while a longer blank is filled from the left
RESCORED = 8_192  # complete answers whose fit to the text on the right is computed
UNKNOWN, BORDER = 0, 1  # ids: of a symbol outside the vocabulary, and of the border between sentences
FIRST_SYMBOL = 2


@dataclass(frozen=True)
class NgramCounts:
    """How often each sequence of n ids occurs. The key of a sequence is the number that its ids spell in base V."""

    keys: IntArray  # [K] ascending
    counts: IntArray  # [K]
    vocabulary_size: int

    @cached_property
    def running(self) -> IntArray:
        """``[K + 1]``: the occurrences of all keys before each one."""
        return np.concatenate(([0], np.cumsum(self.counts)))

    def find(self, keys: IntArray) -> IntArray:
        """The occurrences of each sequence, in the shape of ``keys``."""
        indices = self.keys.searchsorted(keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[indices] == keys, self.counts[indices], 0)

    def continuations(self, contexts: IntArray) -> tuple[IntArray, IntArray]:
        """The range of ``self.keys`` that begins with each context: its start and its end."""
        start = self.keys.searchsorted(contexts * self.vocabulary_size)
        end = self.keys.searchsorted((contexts + 1) * self.vocabulary_size)
        return start, end


def count_ngrams(ids: IntArray, n: int, vocabulary_size: int) -> NgramCounts:
    """Counts the sequences of ``n`` ids in a stream ``[N]``."""
    assert vocabulary_size**n < 2**63, f"{n} ids of {vocabulary_size} do not fit in 64 bits"
    keys = np.zeros(len(ids) - n + 1, np.int64)
    for offset in range(n):
        keys = keys * vocabulary_size + ids[offset : len(ids) - n + 1 + offset]
    unique, counts = np.unique(keys, return_counts=True)
    return NgramCounts(unique, counts.astype(np.int64), vocabulary_size)


@dataclass(frozen=True)
class NgramModel:
    """A trigram model with interpolated absolute discounting.

    P(w|uv) = max(c(uvw) - d, 0) / c(uv) + d * types(uv) / c(uv) * P(w|v), likewise P(w|v) over P(w), and
    P(w) = (c(w) + 1) / (N + V). After a context that was never seen, the shorter context decides alone.
    Source: Ney, Essen and Kneser 1994 ("On structuring probabilistic dependences in stochastic language modelling").
    """

    symbols: Sequence[str]  # [V], by id
    ids: IntArray  # [N]: the text that was counted, with a BORDER between sentences
    ids_of: dict[str, int] = field(repr=False)
    hidable: npt.NDArray[np.bool_]  # [V]: true for the symbols that a blank may hide

    @cached_property
    def tables(self) -> tuple[NgramCounts, NgramCounts]:
        """The counts of pairs and of triples."""
        return count_ngrams(self.ids, 2, len(self.symbols)), count_ngrams(self.ids, 3, len(self.symbols))

    @cached_property
    def unigram(self) -> FloatArray:
        """P(w): ``[V]``."""
        size = len(self.symbols)
        return (np.bincount(self.ids, minlength=size) + 1) / (len(self.ids) + size)

    def following(self, before: int, last: int) -> FloatArray:
        """P(w | before last) of all symbols: ``[V]``."""
        size = len(self.symbols)
        probabilities = self.unigram
        for table, context in zip(self.tables, (last, before * size + last), strict=True):
            start, end = (int(index) for index in table.continuations(np.array(context)))
            if start < end:
                counts = table.counts[start:end]
                total = int(counts.sum())
                probabilities = probabilities * (DISCOUNT * len(counts) / total)
                probabilities[table.keys[start:end] - context * size] += (counts - DISCOUNT) / total
        return probabilities

    def probability(self, before: IntArray, last: IntArray, symbol: IntArray) -> FloatArray:
        """P(symbol | before last), element by element."""
        size = len(self.symbols)
        probabilities = self.unigram[symbol]
        for table, context in zip(self.tables, (last, before * size + last), strict=True):
            start, end = table.continuations(context)
            total = table.running[end] - table.running[start]
            own = np.maximum(table.find(context * size + symbol) - DISCOUNT, 0)
            seen = np.maximum(total, 1)
            backed_off = own / seen + DISCOUNT * (end - start) / seen * probabilities
            probabilities = np.where(total > 0, backed_off, probabilities)
        return probabilities

    def most_frequent(self, length: int) -> list[str]:
        """The run of ``length`` hidable symbols that occurs most often."""
        hidable = np.concatenate(([0], np.cumsum(self.hidable[self.ids])))
        starts = np.flatnonzero(hidable[length:] - hidable[:-length] == length)
        size = len(self.symbols)
        assert size**length < 2**63
        keys = np.zeros(len(starts), np.int64)
        for offset in range(length):
            keys = keys * size + self.ids[starts + offset]
        unique, counts = np.unique(keys, return_counts=True)
        key, run = int(unique[counts.argmax()]), list[str]()
        for _ in range(length):
            key, symbol = divmod(key, size)
            run.insert(0, self.symbols[symbol])
        return run

    def fill(self, left: Sequence[str], right: Sequence[str], length: int) -> list[str]:
        """The most probable ``length`` hidable symbols between two texts.

        The probability is P(answer | two symbols on the left) * P(two symbols on the right | answer). Answers grow from
        the left in a beam of `BEAM`, by the first factor; the `RESCORED` best complete ones are compared by both.
        """
        answers = np.array([[BORDER, BORDER, *self.encode(left)][-2:]], np.int64)  # [beam, 2 + filled]
        scores = np.zeros(1)
        forbidden = np.where(self.hidable, 0.0, -np.inf)
        for filled in range(1, length + 1):
            following = [self.following(int(answer[-2]), int(answer[-1])) for answer in answers]
            extended = scores[:, None] + np.log(np.stack(following)) + forbidden
            keep = min(RESCORED if filled == length else BEAM, int(np.isfinite(extended).sum()))
            best = np.argpartition(-extended, keep - 1, axis=None)[:keep]
            parents, symbols = np.unravel_index(best, extended.shape)
            answers = np.column_stack((answers[parents], symbols))
            scores = extended[parents, symbols]
        scores = scores + self._fit_right(answers, right)
        return [self.symbols[symbol] for symbol in answers[scores.argmax(), 2:]]

    def score(self, left: Sequence[str], answer: Sequence[str], right: Sequence[str]) -> float:
        """The log-probability of one answer, in nats, that `fill` maximises."""
        ids = [BORDER, BORDER, *self.encode(left)][-2:] + self.encode(answer)
        triples = np.array([ids[end - 2 : end + 1] for end in range(2, len(ids))])
        fit_left = np.log(self.probability(*triples.T)).sum()
        return float(fit_left + self._fit_right(np.array([ids]), right)[0])

    def unigram_score(self, answer: Sequence[str]) -> float:
        """The log-probability of an answer as independent symbols."""
        return float(np.log(self.unigram[self.encode(answer)]).sum())

    def _fit_right(self, answers: IntArray, right: Sequence[str]) -> FloatArray:
        """log P(two symbols on the right | the end of each answer): ``[beam]``, of answers ``[beam, 2 + length]``."""
        fit = np.zeros(len(answers))
        for symbol in [*self.encode(right), BORDER][:2]:
            column = np.full(len(answers), symbol)
            fit += np.log(self.probability(answers[:, -2], answers[:, -1], column))
            answers = np.column_stack((answers, column))
        return fit

    def encode(self, symbols: Iterable[str]) -> list[int]:
        return [self.ids_of.get(symbol, UNKNOWN) for symbol in symbols]


def train_ngrams(texts: Sequence[str], language: LanguageRules) -> NgramModel:
    """Counts the symbols of the texts' sentences. Those beyond the `MAX_VOCABULARY` most frequent count as unknown."""
    frequencies = Counter[str]()
    lines = ["\n".join(cut_sentences(text, language)) + "\n" for text in texts]
    for line in lines:
        frequencies.update(language.symbol.findall(line))
    del frequencies["\n"]
    ranked = sorted(frequencies, key=lambda symbol: (-frequencies[symbol], symbol))
    symbols = ["", "\n", *ranked[: MAX_VOCABULARY - FIRST_SYMBOL]]
    ids_of = {symbol: index for index, symbol in enumerate(symbols) if index != UNKNOWN}
    encoded = [
        np.array([ids_of.get(symbol, UNKNOWN) for symbol in language.symbol.findall(line)], np.int64) for line in lines
    ]
    hidable = np.array([bool(language.unit.fullmatch(symbol)) for symbol in symbols])
    return NgramModel(symbols, np.concatenate([[BORDER], *encoded]), ids_of, hidable)


def fill_with_unigrams(model: NgramModel, blanks: Sequence[HeldOutBlank], language: LanguageRules) -> list[str]:
    """The most frequent run of each blank's true length."""
    runs = {length: model.most_frequent(length) for length in {blank.n_units for blank in blanks}}
    return [language.gap.join(runs[blank.n_units]) for blank in blanks]


def fill_with_trigrams(model: NgramModel, blanks: Sequence[HeldOutBlank], language: LanguageRules) -> list[str]:
    """The answers of `NgramModel.fill` for each blank's true length."""
    find = language.symbol.findall
    return [language.gap.join(model.fill(find(b.left), find(b.right), b.n_units)) for b in blanks]
