"""Spans widened to whole words hide words and characters, never parts of them, and nothing twice."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gmask.errors import GmaskError
from gmask.infilling.objectives import Mixture
from gmask.infilling.spans import mark_word_edges, widen_to_words
from gmask.recipes.pretraining import find_blank_tokens, make_mixture
from gmask.training.tokenizer import train_tokenizer

TEXTS = [
    "The smaller dogs didn't run over the hills.",
    "今天天气很好，我们去公园散步。",
    "Naïve cafés opened at 10:30.",
] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=440, alphabet_size=30)


def test_edges_of_pieces() -> None:
    pieces = ["", " the", "ing", "'s", "'", "天", "天ing", "<0xE4>", "<0xBD>", "7", "s,"]
    goes_on, can_go_on = mark_word_edges(pieces)
    assert [piece for piece, mark in zip(pieces, goes_on, strict=True) if mark] == ["ing", "'s", "<0xBD>", "s,"]
    assert [piece for piece, mark in zip(pieces, can_go_on, strict=True) if mark] == [
        " the", "ing", "'s", "天ing", "<0xE4>", "<0xBD>",
    ]  # fmt: skip


@given(st.data())
def test_spans_cover_whole_words_and_stay_apart(data: st.DataObject) -> None:
    pieces = ["", " a", "b", "c", ",", "天", "'s", "<0xE4>", "<0xBD>"]
    edges = mark_word_edges(pieces)
    tokens = np.array(data.draw(st.lists(st.integers(0, len(pieces) - 1), min_size=2, max_size=30)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(tokens)), min_size=2, max_size=8)))
    spans = np.array([cuts[i : i + 2] for i in range(0, len(cuts) - 1, 2)])
    widened = widen_to_words(spans, tokens, edges)
    assert (widened[:, 0] < widened[:, 1]).all()
    assert (widened[1:, 0] >= widened[:-1, 1]).all()
    hidden = np.zeros(len(tokens), bool)
    for start, end in widened:
        hidden[start:end] = True
    for start, end in spans:
        assert hidden[start:end].all()  # nothing that was to be hidden is seen
    inside = np.array([False, *(edges[0, tokens[1:]] & edges[1, tokens[:-1]])])
    assert not (hidden[1:] != hidden[:-1])[inside[1:]].any()  # no word is hidden in part


def test_a_mixture_hides_whole_words(tokenizer: Tokenizer) -> None:
    mixture = make_mixture(
        tokenizer, {"token": 1, "sentence": 0, "document": 0, "token_ratio": 0.4, "whole_words": True}
    )
    text = "The smaller dogs didn't run over the hills."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    row = np.array([mixture.special.cls, *ids, mixture.special.eos])
    words = set(re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text))
    seen = 0
    for seed in range(40):
        example = mixture.sample(row, np.random.default_rng(seed), "token")
        if example is None:
            continue
        answers = example.labels[example.context_length :]
        for answer in np.split(answers, np.flatnonzero(answers == mixture.special.eop) + 1)[:-1]:
            found = re.findall(r"[A-Za-z']+", tokenizer.decode(answer[:-1].tolist()))
            assert set(found) <= words, found
            seen += len(found)
    assert seen > 20


def test_whole_words_need_a_table(tokenizer: Tokenizer) -> None:
    with pytest.raises(GmaskError, match="whole_words needs word_edges"):
        Mixture(special=find_blank_tokens(tokenizer), sentence_ends=np.zeros(440, bool), whole_words=True)
