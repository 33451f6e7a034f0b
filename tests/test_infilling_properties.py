"""What holds for every sequence of every objective, whatever the text and the random draws?"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import poisson

from gmask.errors import GmaskError
from gmask.infilling.blanks import BlankTokens, InfillingExample
from gmask.infilling.objectives import OBJECTIVES, Mixture, Objective, token_infilling
from gmask.infilling.spans import find_documents, find_sentences, span_length_cdf, split_short

SPECIAL = BlankTokens(pad=0, eos=1, cls=2, mask=5, smask=6, gmask=7, sop=8, eop=9, dblock=10)
MASKS = (SPECIAL.mask, SPECIAL.smask, SPECIAL.gmask)
SENTENCE_ENDS = np.isin(np.arange(1000), [16, 17, 18])
MIXTURE = Mixture(SPECIAL, SENTENCE_ENDS)

bodies = st.lists(st.integers(16, 40), min_size=0, max_size=60)
rows = st.builds(  # documents, the last of which may be cut
    lambda documents, cut: np.array([t for body in documents for t in (2, *body, 1)][: -1 if cut else None]),
    st.lists(bodies, min_size=1, max_size=4),
    st.booleans(),
)
seeds = st.integers(0, 2**32)
every_row = settings(max_examples=150, deadline=None, derandomize=True)


def pieces_of(example: InfillingExample) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(place of the mask, input ids, labels) of each answer, in their order."""
    starts = np.flatnonzero(example.layout[1] == 1).tolist()
    bounds = pairwise([*starts, len(example.input_ids)])
    return [(int(example.layout[0, a]), example.input_ids[a:b], example.labels[a:b]) for a, b in bounds]


def spans_of(example: InfillingExample) -> list[tuple[int, int]]:
    """The hidden spans of the text, left to right."""
    spans, moved = [], 0
    for place, _, labels in sorted(pieces_of(example), key=lambda piece: piece[0]):
        length = len(labels) - int(labels[-1] == SPECIAL.eop)
        spans.append((place + moved, place + moved + length))
        moved += length - 1
    return spans


def splice(example: InfillingExample) -> list[int]:
    """The text, from the context and the answers' inputs (an open answer's last token from its label)."""
    text: list[int] = []
    answers = {
        place: [*inputs[1:], *(labels[-1:] if labels[-1] != SPECIAL.eop else [])]
        for place, inputs, labels in pieces_of(example)
    }
    for place, token in enumerate(example.input_ids[: example.context_length].tolist()):
        text += answers.pop(place) if token in MASKS else [token]
    assert not answers
    return text


@given(rows, seeds, st.sampled_from(OBJECTIVES), st.booleans())
@every_row
def test_a_sequence_is_the_text_taken_apart(row: np.ndarray, seed: int, objective: Objective, shuffle: bool) -> None:
    example = replace(MIXTURE, shuffle=shuffle).sample(row, np.random.default_rng(seed), objective)
    if example is None:
        return
    context_length, total = example.context_length, len(example.input_ids)
    pieces = pieces_of(example)
    if row[-1] == SPECIAL.cls and pieces[0][2][-1] == -100:
        return  # the one token that stands in no input, and the start of a document is not scored
    assert splice(example) == row.tolist()

    # Places count the context, then each answer repeats its mask's; the second row counts each answer from 1.
    assert example.layout.shape == (2, total)
    np.testing.assert_array_equal(example.layout[0, :context_length], np.arange(context_length))
    assert not example.layout[1, :context_length].any()
    for place, inputs, _ in pieces:
        assert example.input_ids[place] in MASKS
        assert inputs[0] == SPECIAL.sop
    np.testing.assert_array_equal(
        example.layout[:, context_length:],
        np.concatenate([[[place] * len(i), range(1, len(i) + 1)] for place, i, _ in pieces], axis=1),
    )
    if not shuffle:
        assert [place for place, *_ in pieces] == sorted(place for place, *_ in pieces)

    # Labels are an answer's inputs moved by one, and stand on answers only ([CLS] is never scored).
    assert (example.labels[:context_length] == -100).all()
    for _, inputs, labels in pieces:
        scored = inputs[1:] != SPECIAL.cls
        np.testing.assert_array_equal(labels[:-1], np.where(scored, inputs[1:], -100))


@given(rows, seeds, st.booleans())
@every_row
def test_token_spans_stand_apart_inside_documents(row: np.ndarray, seed: int, single: bool) -> None:
    example = token_infilling(row, special=SPECIAL, rng=np.random.default_rng(seed), single_span=single)
    if example is None:
        return
    spans, documents = spans_of(example), find_documents(row, special=SPECIAL)
    assert all(end < start for (_, end), (start, _) in pairwise(spans))
    assert all(any(low <= start and end <= high for low, high in documents) for start, end in spans)
    assert not single or len(spans) == 1
    assert single or sum(end - start for start, end in spans) >= int(0.15 * len(row))


@given(rows, seeds)
@every_row
def test_hidden_sentences_are_whole(row: np.ndarray, seed: int) -> None:
    example = MIXTURE.sample(row, np.random.default_rng(seed), "sentence")
    sentences = find_sentences(row, sentence_ends=SENTENCE_ENDS, special=SPECIAL)
    if example is None:
        assert not len(sentences)
        return
    spans = spans_of(example)
    assert set(spans) <= set(map(tuple, sentences.tolist()))
    enough = sum(end - start for start, end in spans) >= int(0.15 * len(row))
    assert enough or len(spans) == len(sentences)
    for start, end in spans:
        assert not np.isin(row[start:end], [SPECIAL.cls, SPECIAL.eos]).any()


@given(rows, seeds)
@every_row
def test_a_document_answer_has_the_asked_length_and_only_a_cut_one_is_open(row: np.ndarray, seed: int) -> None:
    example = MIXTURE.sample(row, np.random.default_rng(seed), "document")
    if example is None:
        assert len(row) < 3
        return
    ((place, _, labels),) = pieces_of(example)
    is_open = labels[-1] != SPECIAL.eop
    length = len(labels) - int(not is_open)
    assert int(0.25 * len(row)) <= length <= len(row) - 2
    assert not is_open or place + length == len(row)
    assert is_open or SPECIAL.eos not in row[:-1]


@given(rows, seeds)
@every_row
def test_dblock_hides_inputs_only(row: np.ndarray, seed: int) -> None:
    plain = MIXTURE.sample(row, np.random.default_rng(seed), "token")
    mixture = replace(MIXTURE, block_mask_prob=0.5, context_mask_ratio=0.1)
    hiding = mixture.sample(row, np.random.default_rng(seed), "token")
    if plain is None or hiding is None:
        assert plain is hiding
        return
    np.testing.assert_array_equal(hiding.labels, plain.labels)
    np.testing.assert_array_equal(hiding.layout, plain.layout)
    hidden = hiding.input_ids == SPECIAL.dblock
    np.testing.assert_array_equal(hiding.input_ids[~hidden], plain.input_ids[~hidden])
    assert not np.isin(plain.input_ids[hidden], [*MASKS, SPECIAL.sop, SPECIAL.cls]).any()
    masks = np.append([p for p, *_ in pieces_of(plain)], plain.context_length)
    hidden_context = np.flatnonzero(hidden[: plain.context_length])
    assert (abs(hidden_context[:, None] - masks).min(axis=1, initial=4) <= 3).all()
    assert len(hidden_context) <= int(0.1 * len(row))


@given(rows, seeds)
@every_row
def test_short_pieces_are_cuttings_with_their_own_cls(row: np.ndarray, seed: int) -> None:
    pieces = split_short(
        row,
        row_length=64,
        sentence_ends=SENTENCE_ENDS,
        special=SPECIAL,
        rng=np.random.default_rng(seed),
    )
    text = "".join(map(chr, row))
    for piece in pieces:
        assert piece[0] == SPECIAL.cls
        assert "".join(map(chr, piece[1:])) in text
        assert len(piece) <= 64


@pytest.mark.parametrize("mean", [1.0, 3.0, 8.0])
def test_span_lengths_are_poisson_restricted_to_1_to_39(mean: float) -> None:
    weights = poisson.pmf(np.arange(1, 40), mean)
    np.testing.assert_allclose(span_length_cdf(mean), np.cumsum(weights) / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_seed_one_sequence_and_the_text_stays(objective: Objective) -> None:
    row = np.array([2, *range(16, 116), 1], np.uint16)  # as in a token cache
    kept = row.copy()
    first, second = (MIXTURE.sample(row, np.random.default_rng(3), objective) for _ in range(2))
    assert first is not None and second is not None and first.objective == objective
    np.testing.assert_array_equal(first.input_ids, second.input_ids)
    np.testing.assert_array_equal(row, kept)
    assert {a.dtype for a in (first.input_ids, first.labels, first.layout)} == {np.dtype(np.int64)}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("task_mask", [True, False])
def test_each_task_has_its_mask_unless_told_otherwise(objective: Objective, task_mask: bool) -> None:
    row = np.array([2, *range(16, 116), 1])
    example = replace(MIXTURE, task_mask=task_mask).sample(row, np.random.default_rng(0), objective)
    assert example is not None
    expected = dict(zip(OBJECTIVES, MASKS, strict=True))[objective] if task_mask else SPECIAL.mask
    assert set(MASKS) & set(example.input_ids.tolist()) == {expected}


@pytest.mark.parametrize(
    ("row", "objective"),
    [([2, 20, 21, 1], "token"), ([2, 20, 21, 1], "sentence"), ([2, 1], "document"), ([2, 1] * 40, "token")],
)
def test_a_row_with_nothing_to_hide_gives_none(row: list[int], objective: Objective) -> None:
    assert MIXTURE.sample(row, np.random.default_rng(0), objective) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": 0, "sentence": 0, "document": 0}, "shares"),
        ({"token": -1}, "shares"),
        ({"token_ratio": 1.5}, "token_ratio must lie between 0 and 1, not 1.5"),
        ({"mean_span_length": 0}, "mean_span_length must be positive"),
        ({"special": replace(SPECIAL, dblock=None), "block_mask_prob": 0.1}, "dBLOCK"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(GmaskError, match=message):
        replace(MIXTURE, **change)
