"""The spans of a text that are hidden.

Every law here is that of the published sampler (THUDM/GLM blocklm_utils.py); randomness is an argument.
A span is a row `(start, end)` of an int64 array, end exclusive.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from gmask.infilling.blanks import BlankTokens, IntArray

BoolArray = npt.NDArray[np.bool_]

LONGEST_SPAN = 39
SENTENCE_MARKS = ".?!;:。\n" + "？！；："  # as published; its tokenizer folded the last four into ASCII


@cache
def span_length_cdf(mean: float = 3.0, longest: int = LONGEST_SPAN) -> npt.NDArray[np.float64]:
    """[longest]: the chance that a span has at most 1, 2, ... tokens; Poisson restricted to 1..longest."""
    lengths = np.arange(1, longest + 1)
    log_factorials = np.cumsum(np.log(lengths))
    cdf = np.cumsum(np.exp(lengths * math.log(mean) - log_factorials))
    cdf /= cdf[-1]
    cdf.setflags(write=False)  # it is shared by every caller
    return cdf


def draw_span_lengths(total: int, *, mean: float = 3.0, rng: np.random.Generator) -> IntArray:
    """Span lengths, drawn until they add up to at least `total`; in random order. None are drawn for 0."""
    if total <= 0:
        return np.empty(0, np.int64)
    # A span has one token or more, so `total` draws always suffice.
    lengths = span_length_cdf(mean).searchsorted(rng.random(total), side="right") + 1
    lengths = lengths[: lengths.cumsum().searchsorted(total) + 1]
    rng.shuffle(lengths)  # else the last one, which crossed the line, would be longer than the others
    return lengths


def find_documents(tokens: IntArray, *, special: BlankTokens) -> list[tuple[int, int]]:
    """The maskable part `(start, end)` of each document in a row [L], the longest last.

    `[CLS]` and the end-of-text token are outside, and so is the last token of a row that was cut inside a
    document. Documents of equal length come from right to left, as published.
    """
    documents = []
    start = 0
    for stop in np.flatnonzero(tokens == special.eos).tolist():
        documents.append((start + int(tokens[start] == special.cls), stop))
        start = stop + 1
    if start < len(tokens):
        start += int(tokens[start] == special.cls)
    documents.append((start, max(start, len(tokens) - 1)))
    documents.reverse()
    documents.sort(key=lambda document: document[1] - document[0])
    return documents


def place_spans(lengths: IntArray, start: int, end: int, *, rng: np.random.Generator) -> IntArray:
    """[N, 2]: spans of these lengths, in this order, inside `[start, end)` with a token or more between them.

    The places are sorted uniform draws of where the k-th span starts in the text that is left when all spans
    and one token behind each are taken out. This is the published law; it leaves exactly one token between
    two spans less often than a uniform choice among all arrangements would.
    """
    used = (lengths + 1).cumsum()
    free = end - start - int(used[-1]) + 1  # nothing has to follow the last span
    assert free >= 0, f"spans cannot take {used[-1] - 1} of {end - start} tokens"
    spans = np.empty((len(lengths), 2), np.int64)
    places = rng.integers(0, free + 1, len(lengths))
    places.sort()
    places += start
    places[1:] += used[:-1]
    spans[:, 0] = places
    spans[:, 1] = places + lengths
    return spans


def place_in_documents(
    lengths: IntArray, documents: Sequence[tuple[int, int]], *, ratio: float, rng: np.random.Generator
) -> IntArray | None:
    """[N, 2] ascending: spans of these lengths that stay inside documents, or None where they do not all fit.

    Each document but the last takes, from the front of `lengths` (one or more), what stays within `ratio` of
    it; the last (the longest) takes all the rest.
    """
    placed: list[IntArray] = []
    for start, end in documents[:-1]:
        count = int(lengths.cumsum().searchsorted(int((end - start) * ratio), side="right"))
        if count:
            placed.append(place_spans(lengths[:count], start, end, rng=rng))
            lengths = lengths[count:]
    if len(lengths):
        start, end = documents[-1]
        if int(lengths.sum()) + len(lengths) - 1 > end - start:
            return None
        placed.append(place_spans(lengths, start, end, rng=rng))
    if len(placed) == 1:
        return placed[0]
    spans = np.concatenate(placed)
    return spans[spans[:, 0].argsort()]


def mark_sentence_ends(pieces: Sequence[str]) -> BoolArray:
    """[V]: does the text of each vocabulary entry hold one of SENTENCE_MARKS?

    Pass the decoded text of every id, with "" for the special tokens.
    """
    return np.fromiter((not set(piece).isdisjoint(SENTENCE_MARKS) for piece in pieces), np.bool_, len(pieces))


def mark_word_edges(pieces: Sequence[str]) -> BoolArray:
    """[2, V]: can the text of each vocabulary entry go on with a word (row 0), and can a word go on behind it (row 1)?

    Words are runs of letters other than Han, with an ending such as 's; the bytes of one character stay together too.
    Pass the text of every id as its token spells it, with "" for the special tokens.
    """
    edges = np.zeros((2, len(pieces)), np.bool_)
    for index, piece in enumerate(pieces):
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            value = int(byte[1], 16)
            edges[:, index] = 0x80 <= value < 0xC0, value >= 0x80
        elif piece:
            edges[:, index] = bool(re.match(r"['’]?[^\W\d_]", piece)), piece[-1].isalpha()
            han = [unicodedata.name(char, "").startswith("CJK ") for char in (piece[0], piece[-1])]
            edges[:, index] &= ~np.array(han)
    return edges


def widen_to_words(spans: IntArray, tokens: IntArray, word_edges: BoolArray) -> IntArray:
    """[M, 2]: the spans [N, 2] of a row [L], each widened to whole words; M < N where one swallows its neighbour.

    `word_edges` is a table [2, V] (see `mark_word_edges`).
    """
    inside = np.zeros(len(tokens) + 1, np.bool_)  # a position that goes on with the word before it
    inside[1:-1] = word_edges[0, tokens[1:]] & word_edges[1, tokens[:-1]]
    edges = np.flatnonzero(~inside)
    widened = np.empty_like(spans)
    widened[:, 0] = edges[edges.searchsorted(spans[:, 0], side="right") - 1]
    widened[:, 1] = edges[edges.searchsorted(spans[:, 1])]
    widened[1:, 0] = np.maximum(widened[1:, 0], widened[:-1, 1])
    return widened[widened[:, 0] < widened[:, 1]]


def find_sentences(tokens: IntArray, *, sentence_ends: BoolArray, special: BlankTokens) -> IntArray:
    """[S, 2]: the sentences of a row, left to right. `sentence_ends` is a table [V].

    A sentence ends behind a token that the table marks. Words between the last such token and the end of a
    document are no sentence; at the end of the row they are (both as published). `[CLS]` is outside: the
    published code lets the first sentence of the second and later documents begin with it.
    """
    closed = sentence_ends[tokens]
    stops = np.flatnonzero(closed | (tokens == special.eos))
    sentences = np.empty((len(stops) + 1, 2), np.int64)
    sentences[0, 0] = 0
    sentences[1:, 0] = stops + 1
    sentences[:-1, 1] = stops + 1
    sentences[-1, 1] = len(tokens)
    sentences[:, 0] += tokens.take(sentences[:, 0], mode="clip") == special.cls
    keep = sentences[:, 0] < sentences[:, 1]
    keep[:-1] &= closed[stops]
    return sentences[keep]


def choose_sentences(sentences: IntArray, total: int, *, rng: np.random.Generator) -> IntArray:
    """[N, 2] ascending: random sentences, one or more, until they hold `total` tokens or none is left."""
    shuffled = rng.permutation(len(sentences))
    lengths = (sentences[:, 1] - sentences[:, 0])[shuffled]
    chosen = shuffled[: lengths.cumsum().searchsorted(total) + 1]
    chosen.sort()
    return sentences[chosen]


def split_short(
    tokens: IntArray,
    *,
    row_length: int,
    sentence_ends: BoolArray,
    special: BlankTokens,
    rng: np.random.Generator,
) -> list[IntArray]:
    """Random short pieces of one row [L], about one row length in all; published as `short_seq_prob`.

    One length of 32 to `row_length - 2` tokens is drawn for all pieces. A piece starts at a sentence and ends
    with one if that leaves half the length or more. Each has its own `[CLS]` in front; pieces may overlap.
    """
    length = int(rng.integers(32, row_length - 1))
    count = (row_length - 1) // length
    body = tokens[1:] if tokens[0] == special.cls else tokens
    if length >= len(body):
        return [np.concatenate(((special.cls,), body))] * count
    is_eos = body == special.eos
    breaks = np.flatnonzero(sentence_ends[body] | is_eos) + 1  # behind a sentence or a document
    starts = np.append(0, breaks[:-1] if breaks.size and breaks[-1] == len(body) else breaks)
    starts = starts[(starts == 0) | ~is_eos[starts]]
    pieces = []
    for draw in rng.integers(0, len(body) - length, count).tolist():
        start = int(starts[starts.searchsorted(draw, side="right") - 1])
        end = int(breaks[: breaks.searchsorted(start + length, side="right")].max(initial=start))
        if end - start < length // 2:
            end = start + length
        start += int(body[start] == special.cls)  # a further document brings its own
        pieces.append(np.concatenate(((special.cls,), body[start:end])))
    return pieces
