"""Are the metrics those of the official scripts? Every case is small enough to be counted by hand."""

import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmask.errors import GmaskError
from gmask.files import write_json
from gmask.tasks.metrics import (
    METRICS,
    Pair,
    check_metrics,
    cut_chinese,
    cut_words,
    find_language,
    is_answered,
    normalize_english,
    predict_majority,
    read_pairs,
    score_bleu,
    score_groups,
    score_predictions,
    score_reading,
)
from gmask.tasks.records import Prediction, Sample, write_predictions

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)
TEXTS = st.text(alphabet="abc ,.the中国北京，。", max_size=12)


def measure_labels(metric: str, labels: Sequence[int], chosen: Sequence[int], groups: Sequence[str] = ()) -> float:
    groups = groups or ["all"] * len(labels)
    samples = [Sample(label=label, group=group) for label, group in zip(labels, groups, strict=True)]
    return score_predictions([metric], [Prediction(label=label) for label in chosen], samples)[metric]


def measure_text(metric: str, text: str, *references: str) -> float:
    return score_predictions([metric], [Prediction(texts=(text,))], [Sample(references=references)])[metric]


def test_accuracy_is_the_share_of_right_labels() -> None:
    assert measure_labels("accuracy", [0, 1, 1, 0], [0, 1, 0, 0]) == 75.0  # 3 of 4


def test_f1_is_of_class_1() -> None:
    # right 1s: first and last, so tp 2; the third is chosen wrongly, fp 1; the second is missed, fn 1; 4 / (4 + 2)
    assert measure_labels("f1", [1, 1, 0, 0, 1], [1, 0, 1, 0, 1]) == pytest.approx(100 * 4 / 6)
    with pytest.raises(GmaskError, match="one with the index 2: take macro-f1"):
        measure_labels("f1", [0, 1], [0, 2])


def test_macro_f1_counts_every_class_the_same() -> None:
    # class 0: tp 1, fn 1: 2/3; class 1: tp 1, fp 2: 2/4; class 2: tp 0: 0; the mean of the three
    assert measure_labels("macro-f1", [0, 0, 1, 2], [0, 1, 1, 1]) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_one_class_only() -> None:
    assert measure_labels("accuracy", [0, 0], [0, 0]) == 100.0
    assert measure_labels("macro-f1", [0, 0], [0, 0]) == 100.0  # class 1 neither occurs nor is chosen
    assert measure_labels("f1", [0, 0], [0, 0]) == 0.0  # no class 1 was there to be found
    assert measure_labels("f1", [1, 1], [0, 0]) == 0.0


@settings(deadline=None)  # the first example imports the library
@given(LABELS)
def test_labels_are_measured_as_by_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="the extra eval is not installed")
    labels, chosen = [label for label, _ in pairs], [found for _, found in pairs]
    expected = 100 * sklearn.f1_score(labels, chosen, average="macro", zero_division=0)
    assert measure_labels("macro-f1", labels, chosen) == pytest.approx(expected)
    binary = [label % 2 for label in labels], [label % 2 for label in chosen]
    assert measure_labels("f1", *binary) == pytest.approx(100 * sklearn.f1_score(*binary, zero_division=0))
    assert measure_labels("accuracy", labels, chosen) == pytest.approx(100 * sklearn.accuracy_score(labels, chosen))


@given(LABELS, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(pairs: list[tuple[int, int]], rng: random.Random) -> None:
    mixed = rng.sample(pairs, len(pairs))
    for metric in ("accuracy", "macro-f1"):
        before, after = (measure_labels(metric, *zip(*order, strict=True)) for order in (pairs, mixed))
        assert before == pytest.approx(after)
        assert 0 <= before <= 100


def test_multirc_judges_all_answers_and_whole_questions() -> None:
    # question a: both answers judged right; b: its right answer is missed; the answers of b stand apart
    labels, chosen, groups = [1, 1, 0, 0], [1, 0, 0, 0], ["a", "b", "a", "b"]
    assert measure_labels("multirc-em", labels, chosen, groups) == 50.0  # 1 question of 2
    assert measure_labels("multirc-f1a", labels, chosen, groups) == pytest.approx(100 * 2 / 3)  # tp 1, fp 0, fn 1
    with pytest.raises(GmaskError, match="the samples have no group"):
        score_predictions(["multirc-em"], [Prediction(label=0)], [Sample(label=0)])


def test_record_takes_the_best_of_the_references() -> None:
    queries = [
        Sample(answers=("Paris", "The Obama administration"), references=("Barack Obama", "Obama")),
        Sample(answers=("the U.S.", "Cuba"), references=("US", "United States")),
    ]
    found = score_predictions(["record-f1", "record-em"], [Prediction(label=1), Prediction(label=0)], queries)
    # "obama administration" to "barack obama": 2 * 1 / (2 + 2); to "obama": 2 * 1 / (2 + 1); "us" to "us": 1
    assert found == {"record-f1": pytest.approx(100 * (2 / 3 + 1) / 2), "record-em": 50.0}


def test_english_answers_lose_case_marks_and_articles() -> None:
    assert normalize_english("  The U.S., an  Ally of the-Cat") == "us ally of thecat"
    assert measure_text("squad-em", "the  Cat!", "a dog", "cat") == 100.0
    assert measure_text("squad-em", "cats", "cat") == 0.0
    # "on red mat" to "on mat on": shared "on" once and "mat", 2 * 2 / (3 + 3)
    assert measure_text("squad-f1", "on the red mat", "on mat on") == pytest.approx(100 * 4 / 6)


def test_an_empty_answer_shares_nothing() -> None:
    assert [measure_text(name, "", "cat") for name in ("squad-f1", "squad-em", "exact-match")] == [0.0] * 3
    assert [measure_text(name, "the", "a") for name in ("squad-f1", "squad-em")] == [0.0, 100.0]  # as SQuAD 1.1


def test_chinese_answers_are_compared_by_characters() -> None:
    pytest.importorskip("nltk", reason="the extra eval is not installed")
    assert cut_chinese(" 在《1998年》，CBS的3.5% ") == ["在", "1998", "年", "cbs", "的", "3.5", "%"]
    assert measure_text("squad-em", "《北京》。", "北京") == 100.0
    # 1988 年 北 京 to 北 京: a run of 2, 2 * 2 / (4 + 2)
    assert measure_text("squad-f1", "1988年，北京。", "北京") == pytest.approx(100 * 4 / 6)
    # the run must have no gap: 北 上 京 shares 1 character with 北 京, 2 * 1 / (3 + 2)
    assert measure_text("squad-f1", "北上京", "北京") == pytest.approx(100 * 2 / 5)
    # the ellipsis is not among the marks that CMRC's script leaves out: 2 * 2 / (3 + 2)
    assert measure_text("squad-em", "北京…", "北京") == 0.0
    assert measure_text("squad-f1", "北京…", "北京") == pytest.approx(100 * 4 / 5)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_reading_scores_are_symmetric_and_bounded(left: str, right: str) -> None:
    pytest.importorskip("nltk", reason="the extra eval is not installed")
    for language in ("en", "zh"):
        there, back = (score_reading(Pair(*pair), language) for pair in ((left, (right,)), (right, (left,))))
        assert there == pytest.approx(back)
        assert 0 <= there[0] <= 1 and there[1] in (0, 1)
        assert score_reading(Pair(left, (left,)), language)[1] == 1


def test_exact_match_looks_past_spaces_and_at_every_reference() -> None:
    assert measure_text("exact-match", " a  cat\n", "dog", "a cat") == 100.0
    assert measure_text("exact-match", "A cat", "a cat") == 0.0


def test_blanks_are_measured_one_by_one() -> None:
    sample = Sample(text="[MASK] and [MASK]", answers=("salt", "pepper"))
    assert score_predictions(["exact-match"], [Prediction(texts=("salt", "sugar"))], [sample]) == {"exact-match": 50.0}


def test_a_chosen_candidate_is_compared_as_text() -> None:
    sample = Sample(answers=("great", "terrible"), label=0)
    assert read_pairs(Prediction(label=1), sample) == [Pair("terrible", ("great",))]
    assert score_predictions(["exact-match", "accuracy"], [Prediction(label=0)], [sample]) == {
        "exact-match": 100.0,
        "accuracy": 100.0,
    }


def test_the_script_tells_the_language() -> None:
    assert find_language(["ChatGLM是一个模型"]) == "zh"
    assert find_language(["the word 中 means middle"]) == "en"
    assert find_language(["1998"]) == find_language([]) == "en"


def test_english_rouge_stems() -> None:
    pytest.importorskip("rouge_score", reason="the extra eval is not installed")
    text, right = "the cats sat", "The cat sat down."  # cats and cat have one stem: 3 of 3 words, 3 of 4
    assert measure_text("rouge-1", text, right) == pytest.approx(100 * 6 / 7)
    assert measure_text("rouge-2", text, right) == pytest.approx(100 * 4 / 5)  # 2 of 2 pairs, 2 of 3
    assert measure_text("rouge-l", "sat the cats", right) == pytest.approx(100 * 4 / 7)  # the cat: 2 of 3, 2 of 4
    assert measure_text("rouge-l", text, "down", right) == pytest.approx(100 * 6 / 7)
    assert measure_text("rouge-l", "bird\ncat dog", "cat dog\nbird") == pytest.approx(100)  # line by line
    assert measure_text("rouge-1", "", right) == 0.0


def test_chinese_rouge_is_over_words() -> None:
    pytest.importorskip("jieba", reason="the extra eval is not installed")
    pytest.importorskip("rouge_chinese", reason="the extra eval is not installed")
    assert cut_words("我爱北京 天安门") == ["我", "爱", "北京", "天安门"]
    text, right = "我爱北京", "我爱北京天安门"  # 3 of 3 words, 3 of 4
    assert measure_text("rouge-1", text, right) == pytest.approx(100 * 6 / 7)
    assert measure_text("rouge-2", text, right) == pytest.approx(100 * 4 / 5)  # 2 of 2 pairs, 2 of 3
    assert measure_text("rouge-l", "北京我爱", right) == pytest.approx(100 * 4 / 7)  # 我 爱: 2 of 3, 2 of 4
    for empty in ("", " \n", "\u3000"):
        assert [measure_text(name, empty, right) for name in ("rouge-1", "rouge-2", "rouge-l")] == [0.0] * 3


def test_bleu_4_is_over_characters_in_chinese() -> None:
    pytest.importorskip("nltk", reason="the extra eval is not installed")
    # 4 of 5 characters, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples; no penalty at equal length
    product = 4 / 5 * 3 / 4 * 2 / 3 * 1 / 2
    assert measure_text("bleu-4", "甲乙丙丁戊", "甲乙丙丁己") == pytest.approx(100 * product**0.25)
    # 2 of 4, 1 of 3; none of 2 triples counts 1/2 of one, no quadruple 1/4
    product = 2 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1
    assert measure_text("bleu-4", "甲乙丙丁", "甲乙戊己") == pytest.approx(100 * product**0.25)
    assert measure_text("bleu-4", "甲乙丙丁", "甲乙丙丁戊") == pytest.approx(100 * math.exp(1 - 5 / 4))  # too short
    assert measure_text("bleu-4", "", "甲乙丙丁") == 0.0


def test_bleu_4_is_over_words_in_english() -> None:
    pytest.importorskip("nltk", reason="the extra eval is not installed")
    product = 4 / 5 * 3 / 4 * 2 / 3 * 1 / 2
    assert measure_text("bleu-4", "one two three four five", "one two three four.") == pytest.approx(
        100 * product**0.25
    )
    assert score_bleu(Pair("one two three four.", ("one two three four.",)), "en") == {"bleu-4": pytest.approx(1.0)}


def test_sacrebleu_pools_the_counts_of_all_texts() -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    samples = [Sample(answers=("a b c d f",)), Sample(references=("x", "g h i j"))]
    predictions = [Prediction(texts=("a b c d e",)), Prediction(texts=("g h i j",))]
    # matches of both over n-grams of both: 4+4 of 5+4, 3+3 of 4+3, 2+2 of 3+2, 1+1 of 2+1
    product = 8 / 9 * 6 / 7 * 4 / 5 * 2 / 3
    assert score_predictions(["sacrebleu"], predictions, samples)["sacrebleu"] == pytest.approx(100 * product**0.25)
    # its Chinese tokenizer takes characters
    product = 4 / 5 * 3 / 4 * 2 / 3 * 1 / 2
    assert measure_text("sacrebleu", "甲乙丙丁戊", "甲乙丙丁己") == pytest.approx(100 * product**0.25)


@settings(deadline=None)
@given(st.lists(TEXTS.filter(lambda text: any(map(str.isalnum, text))), min_size=1, max_size=4))
def test_the_right_text_is_never_beaten(texts: list[str]) -> None:
    for module in ("nltk", "rouge_score", "rouge_chinese", "jieba", "sacrebleu"):
        pytest.importorskip(module, reason="the extra eval is not installed")
    names = ("exact-match", "squad-em", "rouge-1", "rouge-l", "bleu-4", "sacrebleu")
    samples = [Sample(answers=(text,)) for text in texts]
    right = score_predictions(names, [Prediction(texts=(text,)) for text in texts], samples)
    other = score_predictions(names, [Prediction(texts=(text[::-1],)) for text in texts], samples)
    assert right["exact-match"] == right["squad-em"] == 100
    assert all(0 <= other[name] <= right[name] + 1e-9 <= 100 + 1e-6 for name in names)


def test_jieba_is_silent_and_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("jieba", reason="the extra eval is not installed")
    code = "from gmask.tasks.metrics import cut_words; print(*cut_words('我爱北京天安门'))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.stdout, done.stderr) == ("我 爱 北京 天安门\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_absent_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(GmaskError, match=r"^sacrebleu is not installed; .* pip install 'gmask\[metrics\]'$"):
        measure_text("sacrebleu", "a", "a")


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    known = Sample(label=0, path=tmp_path / "dev.jsonl", line=7)
    with pytest.raises(GmaskError, match="no metric 'acuracy'; the nearest is 'accuracy'"):
        score_predictions(["acuracy"], [Prediction(label=0)], [known])
    with pytest.raises(GmaskError, match="the language 'de' is not known: en or zh"):
        score_predictions(["accuracy"], [Prediction(label=0)], [known], language="de")  # type: ignore[arg-type]
    with pytest.raises(GmaskError, match="no samples"):
        score_predictions(["accuracy"], [], [])
    with pytest.raises(GmaskError, match=r"dev\.jsonl, line 7: a text was written and nothing chosen"):
        score_predictions(["accuracy"], [Prediction(texts=("x",))], [known])
    with pytest.raises(GmaskError, match=r"dev\.jsonl, line 7: a class was chosen and no text"):
        score_predictions(["rouge-l"], [Prediction(label=0)], [known])
    with pytest.raises(GmaskError, match=r"^the label is not known"):
        score_predictions(["accuracy"], [Prediction(label=0)], [Sample(answers=("a", "b"))])
    for unanswered in (Sample(answers=("a", "b")), Sample(answers=("a",))):
        with pytest.raises(GmaskError, match=r"^the right answer is not known"):
            score_predictions(["exact-match"], [Prediction(label=0)], [unanswered])


def test_what_cannot_be_measured_is_told_before_the_prediction() -> None:
    assert check_metrics(["accuracy"], Sample(label=1), "classification") is None
    assert check_metrics(["exact-match"], Sample(answers=("a", "b")), "infill") is None
    assert check_metrics(["record-f1"], Sample(answers=("a", "b"), references=("b",)), "multiple-choice") is None
    with pytest.raises(GmaskError, match="nothing chosen"):
        check_metrics(["accuracy"], Sample(answers=("a",)), "seq2seq")


def test_which_samples_have_an_answer() -> None:
    assert is_answered(Sample(label=0), "classification")
    assert is_answered(Sample(answers=("a",)), "chat")
    assert is_answered(Sample(answers=("a", "b"), references=("b",)), "multiple-choice")
    assert not is_answered(Sample(answers=("a",)), "cloze")
    assert not is_answered(Sample(text="x"), "seq2seq")


def test_the_majority_is_the_most_frequent_label_and_the_lowest_of_equals() -> None:
    known = [Sample(answers=("a", "b", "c"), label=label) for label in (2, 1, 2, 1, 0)]
    assert predict_majority(known, known[:2]) == [Prediction(label=1)] * 2
    assert predict_majority([*known, Sample(answers=("a", "b", "c"))], known) is None  # a label is missing
    assert predict_majority(known, [Sample(answers=("a", "b"), label=0)]) is None  # it may have no such candidate
    assert predict_majority([], known) is None


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.jsonl"
    samples = [Sample(text="好 [MASK]", answers=("a", "b"), label=0), Sample(text="x", answers=("y",))]
    write_predictions(path, [Prediction(label=0, scores=(-0.12346, -2.0)), Prediction(texts=("z",))], samples)
    assert path.read_text(encoding="utf-8") == (
        '{"text": "好 [MASK]", "answers": ["a", "b"], "label": 0, "predicted_label": 0, "scores": [-0.1235, -2.0]}\n'
        '{"text": "x", "answers": ["y"], "predicted_texts": ["z"]}\n'
    )
    write_json(path.with_name("scores.json"), {"accuracy": 1})
    with pytest.raises(TypeError):
        write_json(path.with_name("scores.json"), {"accuracy": object()})
    assert path.with_name("scores.json").read_text(encoding="utf-8") == '{\n "accuracy": 1\n}\n'


def test_every_metric_has_one_name() -> None:
    assert len(METRICS) == len(set(METRICS)) == 22


def scored(*logprobs: float, greedy: Sequence[bool] = (True,)) -> Prediction:
    return Prediction(scores=logprobs, is_greedy=tuple(greedy))


def test_a_given_answer_is_right_if_all_its_tokens_are_the_most_probable_ones() -> None:
    found = [scored(-1.0, -1.0, greedy=(True, True)), scored(-1.0, -2.0, greedy=(True, False)), scored(-4.0)]
    samples = [Sample(answers=("x",))] * 3
    scores = score_predictions(["accuracy", "nats", "perplexity"], found, samples)
    assert scores == {
        "accuracy": pytest.approx(200 / 3),
        "nats": pytest.approx((2 + 3 + 4) / 3),  # of an answer
        "perplexity": pytest.approx(math.exp(9 / 5)),  # of a token: five in all
    }


@given(st.lists(st.lists(st.floats(-20, -0.01), min_size=1, max_size=5), min_size=1, max_size=6))
def test_perplexities_are_those_of_the_evaluation_harness(answers: list[list[float]]) -> None:
    other = pytest.importorskip("lm_eval.api.metrics")
    found = [scored(*logprobs) for logprobs in answers]
    samples = [Sample(answers=("x",), words=len(logprobs) + 3) for logprobs in answers]
    scores = score_predictions(["perplexity", "word-perplexity"], found, samples)
    sums = list(map(sum, answers))
    by_token = [(total, len(logprobs)) for total, logprobs in zip(sums, answers, strict=True)]
    by_word = [(total, len(logprobs) + 2) for total, logprobs in zip(sums, answers, strict=True)]
    assert scores["perplexity"] == pytest.approx(other.weighted_perplexity(by_token))
    assert scores["word-perplexity"] == pytest.approx(other.weighted_perplexity(by_word))


def test_perplexity_of_what_was_not_scored_is_refused() -> None:
    with pytest.raises(GmaskError, match="were not scored"):
        score_predictions(["perplexity"], [Prediction(label=0, scores=(-1.0,))], [Sample(label=0)])
    with pytest.raises(GmaskError, match="word-perplexity is of documents"):
        score_predictions(["word-perplexity"], [scored(-1.0)], [Sample(answers=("x",))])


def test_subjects_and_categories_count_the_same_whatever_their_size() -> None:
    # STEM/a: 1 of 1; STEM/b: 1 of 3; Other/c: 0 of 2
    groups = ["STEM/a", "STEM/b", "STEM/b", "STEM/b", "Other/c", "Other/c"]
    labels, chosen = [0, 1, 1, 1, 2, 2], [0, 1, 0, 0, 0, 0]
    assert measure_labels("accuracy", labels, chosen, groups) == pytest.approx(100 * 2 / 6)
    assert measure_labels("macro-accuracy", labels, chosen, groups) == pytest.approx(100 * (1 + 1 / 3 + 0) / 3)
    assert measure_labels("group-em", labels, chosen, groups) == pytest.approx(100 / 3)
    samples = [Sample(label=label, group=group) for label, group in zip(labels, groups, strict=True)]
    found = score_groups([Prediction(label=label) for label in chosen], samples)
    assert found == {
        "STEM": (pytest.approx(100 * 2 / 3), 4),
        "Other": (0.0, 2),
        "STEM/a": (100.0, 1),
        "STEM/b": (pytest.approx(100 / 3), 3),
        "Other/c": (0.0, 2),
    }
    with pytest.raises(GmaskError, match="the samples have no group"):
        score_predictions(["macro-accuracy"], [Prediction(label=0)], [Sample(label=0)])


def test_filled_texts_have_the_bleu_of_nltk() -> None:
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    samples = [
        Sample(text="the [MASK] sat on a mat [MASK] .", answers=("old cat", "in the sun")),
        Sample(text=r"\[MASK] [MASK] is here to stay", answers=("it",)),
    ]
    found = [Prediction(texts=("old dog", "in the sun")), Prediction(texts=("it",))]
    filled = [
        ["the", "old", "dog", "sat", "on", "a", "mat", "in", "the", "sun", "."],
        ["[MASK]", "it", "is", "here", "to", "stay"],
    ]
    right = [
        ["the", "old", "cat", "sat", "on", "a", "mat", "in", "the", "sun", "."],
        ["[MASK]", "it", "is", "here", "to", "stay"],
    ]
    expected = 100 * bleu.corpus_bleu([[words] for words in right], filled)
    assert score_predictions(["infill-bleu"], found, samples)["infill-bleu"] == pytest.approx(expected)
    whole = [Prediction(texts=sample.answers) for sample in samples]
    assert score_predictions(["infill-bleu"], whole, samples)["infill-bleu"] == pytest.approx(100)


def test_a_written_choice_may_go_on_but_not_as_another_word() -> None:
    for text, reference, expected in [
        ("B. Paris", "B", 100), (" B", "B", 100), ("Both", "B", 0), ("A", "B", 0), ("", "B", 0),
        ("相同的", "相同", 100), ("不相同", "相同", 0), ("Yes, it is", "Yes", 100), ("Yes2", "Yes", 0),
    ]:  # fmt: skip
        assert measure_text("prefix-match", text, reference) == expected
