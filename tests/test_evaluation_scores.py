"""Are answers scored, and blanks filled by counting, as computed by hand?"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmask.evaluation.infilling import Estimate, draw_candidates, estimate_mean
from gmask.evaluation.ngrams import (
    BORDER,
    DISCOUNT,
    NgramModel,
    fill_with_trigrams,
    fill_with_unigrams,
    train_ngrams,
)
from gmask.tasks.heldout import CHINESE, ENGLISH, HeldOutBlank, cut_sentences, draw_sentences, hide_span
from gmask.tasks.metrics import is_exact_match, overlap_f1

TEXT = "a b c. a b d. a b c."


@pytest.fixture(scope="module")
def ngrams() -> NgramModel:
    return train_ngrams([TEXT], ENGLISH)


# --- scores ---


def test_exact_match_ignores_spaces_and_nothing_else() -> None:
    assert is_exact_match(" the  cat ", "the cat")
    assert not is_exact_match("The cat", "the cat")
    assert not is_exact_match("", "the")


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [("the cat", "the cat", 1.0), ("the dog", "the cat", 0.5), ("a", "the cat", 0.0), ("", "the", 0.0)],
)
def test_f1_is_twice_the_shared_words_over_all_words(answer: str, reference: str, f1: float) -> None:
    assert overlap_f1(answer.split(), reference.split()) == pytest.approx(f1)


def test_f1_counts_a_repeated_word_as_often_as_it_is_there() -> None:
    assert overlap_f1(["no", "no", "no"], ["no"]) == pytest.approx(2 * 1 / 4)


def test_the_interval_of_equal_scores_is_a_point() -> None:
    assert estimate_mean([1.0] * 5, rng=np.random.default_rng(0)) == Estimate(1.0, 1.0, 1.0)


def test_the_interval_is_that_of_the_normal_approximation_for_many_scores() -> None:
    scores = np.repeat([0.0, 1.0], [700, 300])
    estimate = estimate_mean(scores, rng=np.random.default_rng(0))
    half_width = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.low == pytest.approx(0.3 - half_width, abs=0.004)
    assert estimate.high == pytest.approx(0.3 + half_width, abs=0.004)


# --- sentences and blanks ---


def test_sentences_end_at_stops_and_not_at_titles() -> None:
    text = 'Mr. Fox ran. "Stop!" cried she. A title\nThe end?'
    assert cut_sentences(text, ENGLISH) == ["Mr. Fox ran.", '"Stop!"', "cried she.", "The end?"]
    assert cut_sentences("他说：“好！”我走了。没完", CHINESE) == ["他说：“好！”", "我走了。"]


def test_a_blank_hides_whole_neighbouring_words() -> None:
    sentence = "The fox, who was old, slept under a tree."
    rng = np.random.default_rng(0)
    size = ENGLISH.spans["2-3 words"]
    for _ in range(50):
        blank = hide_span(sentence, ENGLISH, size, source="s", rng=rng)
        assert blank.left + blank.answer + blank.right == sentence
        assert len(blank.answer.split(" ")) == blank.n_units in (2, 3)
        assert "," not in blank.answer
        assert blank.text == f"{blank.left}[MASK]{blank.right}"


def test_sentences_are_drawn_by_the_sources_weights() -> None:
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = {
        source: [f"The {source} story tells of {a} men and of {b} women in town." for a in names for b in names]
        for source in ("heavy", "light")
    }
    chosen = draw_sentences(texts, {"heavy": 9.0, "light": 1.0}, ENGLISH, 100, rng=np.random.default_rng(0))
    assert len({sentence for _, sentence in chosen}) == 100
    assert 80 <= sum(source == "heavy" for source, _ in chosen) <= 98


def test_candidates_are_different_and_as_long_as_the_answer() -> None:
    blanks = [HeldOutBlank("s", "", answer, "", len(answer)) for answer in ("甲", "乙", "甲", "丙丁", "戊")]
    candidates = draw_candidates(blanks, rng=np.random.default_rng(0))
    assert [sorted(texts) for texts in candidates] == [sorted({"甲", "乙", "戊"})] * 3 + [["丙丁"]] + [
        sorted({"甲", "乙", "戊"})
    ]
    assert [texts[0] for texts in candidates] == [blank.answer for blank in blanks]


# --- counting ---


def test_the_probabilities_are_those_of_absolute_discounting(ngrams: NgramModel) -> None:
    # the stream: | a b c . | a b d . | a b c . |, where | is the border: 16 ids, 7 symbols with the unknown one
    assert len(ngrams.ids) == 16 and len(ngrams.symbols) == 7
    a, b, c = ngrams.encode("abc")
    unigram = (2 + 1) / (16 + 7)
    bigram = (2 - DISCOUNT) / 3 + DISCOUNT * 2 / 3 * unigram  # after b: c twice, d once
    trigram = (2 - DISCOUNT) / 3 + DISCOUNT * 2 / 3 * bigram  # after a b: the same
    assert ngrams.following(a, b)[c] == pytest.approx(trigram)
    assert ngrams.following(c, b)[c] == pytest.approx(bigram)  # c b was never seen
    assert ngrams.following(b, a)[c] == pytest.approx(DISCOUNT * 1 / 3 * unigram)  # nothing but b follows a


@given(st.integers(0, 6), st.integers(0, 6))
def test_one_probability_at_a_time_gives_the_same_as_all_at_once(before: int, last: int) -> None:
    ngrams = train_ngrams([TEXT], ENGLISH)
    following = ngrams.following(before, last)
    one_by_one = ngrams.probability(np.full(7, before), np.full(7, last), np.arange(7))
    np.testing.assert_allclose(one_by_one, following)
    assert following.sum() == pytest.approx(1.0)


def test_the_trigrams_look_to_both_sides() -> None:
    text = "red hat. red hat. red hat. red dog barks. blue dog barks."
    ngrams = train_ngrams([text], ENGLISH)
    assert ngrams.fill(["red"], ["."], 1) == ["hat"]
    assert ngrams.fill(["red"], ["barks", "."], 1) == ["dog"]
    assert ngrams.fill([], ["."], 2) == ["red", "hat"]
    blanks = [HeldOutBlank("s", "red ", "dog", " barks.", 1)]
    assert fill_with_trigrams(ngrams, blanks, ENGLISH) == ["dog"]


def test_a_fill_is_the_answer_of_the_best_score(ngrams: NgramModel) -> None:
    words = ["a", "b", "c", "d"]
    left, right = ["a"], ["c", "."]
    best = max(words, key=lambda word: ngrams.score(left, [word], right))
    assert ngrams.fill(left, right, 1) == [best] == ["b"]
    pairs = [[first, second] for first in words for second in words]
    assert ngrams.fill([], ["c"], 2) == max(pairs, key=lambda pair: ngrams.score([], pair, ["c"]))


def test_a_score_is_the_product_of_five_probabilities(ngrams: NgramModel) -> None:
    a, b, c, stop = ngrams.encode(["a", "b", "c", "."])
    steps = [(BORDER, a, b), (a, b, c), (b, c, stop)]
    expected = sum(math.log(ngrams.following(u, v)[w]) for u, v, w in steps)
    assert ngrams.score(["a"], ["b"], ["c", "."]) == pytest.approx(expected)


def test_the_unigram_model_gives_the_most_frequent_run(ngrams: NgramModel) -> None:
    blanks = [HeldOutBlank("s", "", answer, "", len(answer.split())) for answer in ("x", "x y")]
    assert fill_with_unigrams(ngrams, blanks, ENGLISH) == ["a", "a b"]
    chinese = train_ngrams(["人人人马。马人人。"], CHINESE)
    assert fill_with_unigrams(chinese, [HeldOutBlank("s", "", "甲乙", "", 2)], CHINESE) == ["人人"]


def test_a_word_never_seen_gets_a_probability(ngrams: NgramModel) -> None:
    assert -math.inf < ngrams.score(["zebra"], ["zebra"], ["zebra"]) < ngrams.score(["a"], ["b"], ["c"])
