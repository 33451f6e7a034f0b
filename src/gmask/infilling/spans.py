"""The spans of a text that are hidden.

All distributions are those of the published sampler (THUDM/GLM blocklm_utils.py). A span is a row `(start, end)` of an
int64 array, end exclusive.
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
SENTENCE_MARKS = ".?!;:。\n" + "？！；："  # as published; the tokenizer there made ASCII of the last four


@cache
def span_length_cdf(mean: float = 3.0, longest: int = LONGEST_SPAN) -> npt.NDArray[np.float64]:
    """The probability that a span has at most 1, 2, ... tokens: [longest]; Poisson restricted to 1..longest."""
    lengths = np.arange(1, longest + 1)
    log_factorials = np.cumsum(np.log(lengths))
    cdf = np.cumsum(np.exp(lengths * math.log(mean) - log_factorials))
    cdf /= cdf[-1]
    cdf.setflags(write=False)  # all callers share it
    return cdf


def draw_span_lengths(total: int, *, mean: float = 3.0, rng: np.random.Generator) -> IntArray:
    """Draws span lengths until their sum is at least `total`; returns them in random order."""
    if total <= 0:
        return np.empty(0, np.int64)
    # A span has one token or more, so `total` draws always suffice.
    lengths = span_length_cdf(mean).searchsorted(rng.random(total), side="right") + 1
    lengths = lengths[: lengths.cumsum().searchsorted(total) + 1]
    rng.shuffle(lengths)  # else the last one, which reached the total, would tend to be the longest
    return lengths


def find_documents(tokens: IntArray, *, special: BlankTokens) -> list[tuple[int, int]]:
    """The part `(start, end)` of each document in a row [L] that can be hidden, the longest last.

    It excludes `[CLS]`, the end-of-text token, and the last token of a row that ends inside a document. Documents of
    equal length come from right to left, as published.
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
    """Spans of these lengths, in this order, inside `[start, end)`, with a token or more between them: [N, 2].

    Take all spans, and one token behind each, out of the text: the starts of the spans in what is left are sorted
    uniform draws. This is the published distribution. It leaves exactly one token between two spans less often than a
    uniform choice among all arrangements would.
    """
    used = (lengths + 1).cumsum()
    free = end - start - int(used[-1]) + 1  # behind the last span no token is needed
    assert free >= 0, f"spans cannot take {used[-1] - 1} of {end - start} tokens"
    spans = np.empty((len(lengths), 2), np.int64)
    starts = rng.integers(0, free + 1, len(lengths))
    starts.sort()
    starts += start
    starts[1:] += used[:-1]
    spans[:, 0] = starts
    spans[:, 1] = starts + lengths
    return spans


def place_in_documents(
    lengths: IntArray, documents: Sequence[tuple[int, int]], *, ratio: float, rng: np.random.Generator
) -> IntArray | None:
    """Spans of these lengths inside documents, ascending: [N, 2]; None where they do not all fit.

    Each document but the last takes from the front of `lengths` as many spans as stay within `ratio` of it. The last
    document, which is the longest, takes the others.
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
    """Marks the vocabulary entries whose text holds one of SENTENCE_MARKS: [V].

    Args:
        pieces: the decoded text of each id, "" for special tokens.
    """
    return np.fromiter((not set(piece).isdisjoint(SENTENCE_MARKS) for piece in pieces), np.bool_, len(pieces))


def mark_word_edges(pieces: Sequence[str]) -> BoolArray:
    """Marks the entries that can continue a word (row 0), and those that a word can continue after (row 1): [2, V].

    Words are runs of letters other than Han, with an ending such as 's; the bytes of one character stay together, too.

    Args:
        pieces: the text of each id as its token spells it, "" for special tokens.
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
    """Widens the spans [N, 2] of a row [L] to whole words: [M, 2], with M < N where a span covers the next one.

    Args:
        word_edges: [2, V], of `mark_word_edges`.
    """
    inside = np.zeros(len(tokens) + 1, np.bool_)  # positions that continue the word before them
    inside[1:-1] = word_edges[0, tokens[1:]] & word_edges[1, tokens[:-1]]
    edges = np.flatnonzero(~inside)
    widened = np.empty_like(spans)
    widened[:, 0] = edges[edges.searchsorted(spans[:, 0], side="right") - 1]
    widened[:, 1] = edges[edges.searchsorted(spans[:, 1])]
    widened[1:, 0] = np.maximum(widened[1:, 0], widened[:-1, 1])
    return widened[widened[:, 0] < widened[:, 1]]


def find_sentences(tokens: IntArray, *, sentence_ends: BoolArray, special: BlankTokens) -> IntArray:
    """The sentences of a row, from left to right: [S, 2].

    A sentence ends with a token that `sentence_ends` [V] marks. The tokens between the last such token and the end of a
    document are no sentence; at the end of the row they are one (both as published). `[CLS]` is no part of a sentence:
    in the published code the first sentence of the second and later documents begins with it.
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
    """Chooses random sentences, one or more, until they hold `total` tokens or none is left: [N, 2], ascending."""
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
    """Cuts random short pieces out of a row [L], about one row length in all; published as `short_seq_prob`.

    All pieces have one length, drawn from 32 to `row_length - 2` tokens. A piece starts with a sentence, and ends with
    one if that leaves half the length or more. Each begins with its own `[CLS]`; pieces may overlap.
    """
    length = int(rng.integers(32, row_length - 1))
    count = (row_length - 1) // length
    body = tokens[1:] if tokens[0] == special.cls else tokens
    if length >= len(body):
        return [np.concatenate(((special.cls,), body))] * count
    is_eos = body == special.eos
    breaks = np.flatnonzero(sentence_ends[body] | is_eos) + 1  # ends of sentences and documents
    starts = np.append(0, breaks[:-1] if breaks.size and breaks[-1] == len(body) else breaks)
    starts = starts[(starts == 0) | ~is_eos[starts]]
    pieces = []
    for draw in rng.integers(0, len(body) - length, count).tolist():
        start = int(starts[starts.searchsorted(draw, side="right") - 1])
        end = int(breaks[: breaks.searchsorted(start + length, side="right")].max(initial=start))
        if end - start < length // 2:
            end = start + length
        start += int(body[start] == special.cls)  # a further document has its own [CLS]
        pieces.append(np.concatenate(((special.cls,), body[start:end])))
    return pieces
