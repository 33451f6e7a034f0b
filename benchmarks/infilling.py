"""How fast are training sequences built, beside a plain program that follows the same published rules?

    python benchmarks/infilling.py [--json] [--length 512] [--samples 2000]

`PlainInfilling` is that program: one sample at a time, Python's `random`, small arrays joined together. It
draws random numbers in the published order, so from a published seed it gives the published record, id for id
(tests/test_infilling_published.py), and the tests hold the package's construction equal to it. It leaves out
what slows the published program beyond its rules: copies, a check of the answers, tensors made from lists.
One process, one thread; both sides are timed in turns and the median round counts.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gmask.infilling.blanks import BlankTokens
from gmask.infilling.objectives import OBJECTIVES, Mixture, Objective
from gmask.infilling.spans import LONGEST_SPAN, SENTENCE_MARKS, mark_sentence_ends

Span = tuple[int, int]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlainExample:
    """A training sequence in the published form: `labels` repeat the context, `loss_mask` leaves it out."""

    input_ids: IntArray  # [T]
    labels: IntArray  # [T]
    loss_mask: IntArray  # [T]
    layout: IntArray  # [2, T]
    context_length: int


@dataclass
class PlainInfilling:
    """The published rules, written as one would say them."""

    special: BlankTokens
    pieces: Sequence[str]  # the text of each id
    ratio: float = 0.15
    min_ratio: float = 0.25
    suffix_prob: float = 0.5
    block_mask_prob: float = 0.0
    context_mask_ratio: float = 0.0
    shuffle: bool = True

    def __post_init__(self) -> None:
        self.dblock = self.special.dblock or 0
        self.lengths = range(1, LONGEST_SPAN + 1)
        self.length_weights = [math.exp(-3) * 3**n / math.factorial(n) for n in self.lengths]

    def token(
        self, tokens: IntArray, rng: random.Random, hide_rng: random.Random, *, single_span: bool = False
    ) -> PlainExample | None:
        lengths: list[int] = []
        total = 1 if single_span else int(self.ratio * len(tokens))
        while sum(lengths) < total:
            lengths += rng.choices(self.lengths, weights=self.length_weights)
        spans = self.place(tokens, lengths, rng)
        if len(spans) < len(lengths):
            return None
        example = self.build(tokens, self.in_order(spans, rng), self.special.mask, hide_rng)
        self.hide_context(example, spans, len(tokens), rng)
        return example

    def sentence(self, tokens: IntArray, rng: random.Random) -> PlainExample:
        sentences = self.sentences(tokens)
        rng.shuffle(sentences)
        chosen: list[Span] = []
        for sentence in sentences:
            chosen.append(sentence)
            if sum(end - start for start, end in chosen) >= int(self.ratio * len(tokens)):
                break
        return self.build(tokens, self.in_order(chosen, rng), self.special.smask)

    def document(self, tokens: IntArray, rng: random.Random) -> PlainExample:
        length = rng.randint(int(self.min_ratio * len(tokens)), len(tokens) - 2)
        if self.special.eos in tokens[:-1].tolist() or rng.random() < self.suffix_prob:
            return self.cut(tokens, length)
        spans = self.place(tokens, [length], rng)
        return self.build(tokens, self.in_order(spans, rng), self.special.gmask)

    def sentences(self, tokens: IntArray) -> list[Span]:
        sentences, start = [], 1 if tokens[0] == self.special.cls else 0
        for place, token in enumerate(tokens.tolist()):
            if self.ends_sentence(self.pieces[token]):
                sentences.append((start, place + 1))
                start = place + 1
            elif token == self.special.eos:
                start = place + 1
        if start < len(tokens):
            sentences.append((start, len(tokens)))
        return sentences

    @staticmethod
    def ends_sentence(piece: str) -> bool:
        for mark in SENTENCE_MARKS:  # noqa: SIM110 - any() over a generator would be slower, and it is timed
            if mark in piece:
                return True
        return False

    def documents(self, tokens: IntArray) -> list[Span]:
        """(start, length) of the maskable part of each document, from right to left."""
        documents, behind = [], len(tokens)
        for stop in [*reversed(np.flatnonzero(tokens == self.special.eos).tolist()), -1]:
            start = stop + 1
            if start < len(tokens) and tokens[start] == self.special.cls:
                start += 1
            length = behind - start
            if behind == len(tokens):
                length = max(length - 1, 0)  # a cut row: its last token stays
            documents.append((start, length))
            behind = stop
        return documents

    def place(self, tokens: IntArray, lengths: list[int], rng: random.Random) -> list[Span]:
        rng.shuffle(lengths)
        rng.shuffle(lengths)  # twice, as published
        spans: list[Span] = []
        documents = sorted(self.documents(tokens), key=lambda document: document[1])
        for i, (start, size) in enumerate(documents):
            is_longest = i == len(documents) - 1
            room = size if is_longest else int(size * self.ratio)
            taken: list[int] = []
            for length in lengths[len(spans) :]:
                if sum(taken) + length + (len(taken) if is_longest else 0) > room:
                    break
                taken.append(length)
            free = size - sum(taken) - len(taken) + 1
            for place, length in zip(sorted(rng.randrange(free + 1) for _ in taken), taken, strict=True):
                spans.append((start + place, start + place + length))
                start += length + 1
        return spans

    def in_order(self, spans: list[Span], rng: random.Random) -> list[Span]:
        spans = list(spans)
        if self.shuffle:
            rng.shuffle(spans)
        else:
            spans.sort()
        return spans

    def build(
        self, tokens: IntArray, spans: Sequence[Span], mask: int, hide_rng: random.Random | None = None
    ) -> PlainExample:
        """One sequence from spans in the order of their answers."""
        context: list[Any] = []
        place_of, done = {}, 0
        for start, end in sorted(spans):
            context += [tokens[done:start], [mask]]
            place_of[start] = sum(map(len, context)) - 1
            done = end
        context.append(tokens[done:])
        context_length = sum(map(len, context))
        inputs: list[Any] = []
        labels: list[Any] = []
        places, blocks = [np.arange(context_length)], [np.zeros(context_length, np.int64)]
        for start, end in spans:
            answer = tokens[start:end].copy()
            if hide_rng is not None and self.block_mask_prob > 0:
                for i in range(len(answer)):
                    if hide_rng.random() < self.block_mask_prob:
                        answer[i] = self.dblock
            inputs += [[self.special.sop], answer]
            labels += [tokens[start:end], [self.special.eop]]
            places.append(np.full(end - start + 1, place_of[start]))
            blocks.append(np.arange(1, end - start + 2))
        input_ids = np.concatenate(context + inputs)
        loss_mask = np.ones(len(input_ids), np.int64)
        loss_mask[:context_length] = 0
        layout = np.stack((np.concatenate(places), np.concatenate(blocks)))
        return PlainExample(input_ids, np.concatenate(context + labels), loss_mask, layout, context_length)

    def cut(self, tokens: IntArray, length: int) -> PlainExample:
        context, answer = tokens[: len(tokens) - length], tokens[len(tokens) - length :]
        input_ids = np.concatenate((context, [self.special.gmask, self.special.sop], answer[:-1]))
        labels = np.concatenate((context, [self.special.gmask], answer))
        loss_mask = np.concatenate((np.zeros(len(context) + 1, np.int64), answer != self.special.cls))
        places = np.concatenate((np.arange(len(context)), np.full(length + 1, len(context))))
        blocks = np.concatenate((np.zeros(len(context), np.int64), np.arange(length + 1)))
        return PlainExample(input_ids, labels, loss_mask, np.stack((places, blocks)), len(context) + 1)

    def hide_context(self, example: PlainExample, spans: list[Span], length: int, rng: random.Random) -> None:
        count = int(self.context_mask_ratio * length)
        if not count:
            return
        candidates: set[int] = set()
        segment, done = 0, 0  # where a stretch between two masks starts: in the context, in the text
        for start, end in [*sorted(spans), (length, length)]:
            segment_end = segment + start - done
            if segment:
                candidates.update(range(segment, min(segment_end, segment + 3)))
            candidates.update(range(max(segment, segment_end - 3), segment_end))
            segment, done = segment_end + 1, end
        example.input_ids[rng.sample(tuple(candidates), count)] = self.dblock


def made_text(length: int) -> tuple[IntArray, list[str], BlankTokens]:
    """A row of one cut document with a sentence end every 10 tokens or so, its vocabulary and special ids."""
    rng = np.random.default_rng(0)
    pieces = [""] * 16 + [f"piece{i}" for i in range(50_000)]
    stops = rng.choice(np.arange(16, len(pieces)), len(pieces) // 10, replace=False)
    for stop in stops.tolist():
        pieces[stop] += "."
    special = BlankTokens(pad=0, eos=1, cls=2, mask=5, smask=6, gmask=7, sop=8, eop=9, dblock=10)
    tokens = rng.integers(16, len(pieces), length)
    tokens[0] = special.cls
    return tokens, pieces, special


def seconds_a_sample(build: Callable[[], object], samples: int) -> float:
    start = time.perf_counter()
    for _ in range(samples):
        build()
    return (time.perf_counter() - start) / samples


def measure(length: int, samples: int, rounds: int = 7) -> dict[Objective, dict[str, float]]:
    """Tokens of text (before masks and answers are added) a second, for each objective."""
    tokens, pieces, special = made_text(length)
    mixture = Mixture(special, mark_sentence_ends(pieces))
    plain = PlainInfilling(special, pieces)
    rng, plain_rng = np.random.default_rng(0), random.Random(0)
    plain_of: dict[Objective, Callable[[], object]] = {
        "token": lambda: plain.token(tokens, plain_rng, plain_rng),
        "sentence": lambda: plain.sentence(tokens, plain_rng),
        "document": lambda: plain.document(tokens, plain_rng),
    }
    results: dict[Objective, dict[str, float]] = {}
    for objective in OBJECTIVES:
        ours_of = partial(mixture.sample, tokens, rng, objective)
        times = [
            [seconds_a_sample(build, samples // rounds) for build in (ours_of, plain_of[objective])]
            for _ in range(rounds)
        ]
        ours, theirs = (length / statistics.median(column) for column in zip(*times, strict=True))
        results[objective] = {"gmask": ours, "plain": theirs, "ratio": ours / theirs}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=2000, help="samples of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    results = measure(options.length, options.samples)
    if options.json:
        settings = {"length": options.length, "samples": options.samples}
        print(json.dumps({**settings, "tokens_per_second": results}))
        return
    print(f"million tokens/s, samples of {options.length} tokens, one core")
    print(f"{'objective':10} {'gmask':>8} {'plain':>8} {'ratio':>8}")
    for objective, row in results.items():
        print(f"{objective:10} {row['gmask'] / 1e6:8.2f} {row['plain'] / 1e6:8.2f} {row['ratio']:7.1f}x")


if __name__ == "__main__":
    main()
