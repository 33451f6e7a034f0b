"""Are scores of given answers exact, the published ones, and the same in batches?"""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gmask
from gmask.checkpoints.load import load_model
from gmask.generation.answers import rank_scores
from gmask.generation.encoding import Context
from gmask.generation.score import AnswerRow, AnswerScorer, Scorer, Scoring, score
from gmask.infilling.blanks import BlankTokens
from tiny_folder import CHINESE, ENGLISH, make_folder

GOLDEN = Path(__file__).parent / "golden"
TEXTS = [
    "It is [MASK] today.",
    "我今天[sMASK]苹果。",
    "The old man took his dog, and [gMASK]",
    r"\[MASK] [MASK] x [",
    "[MASK]",
]
ANSWERS = [
    ["sunny", "rainy", "the rainy season"],
    ["买了一些", "喜欢"],
    [" the river", "over"],
    ["dog"],
    ["A day", "A"],
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")), device="cpu")


def score_plainly(pair, text: str, answer: str) -> list[float]:
    """Log-probabilities of the answer's tokens and of its end, from one full pass that keeps no cache."""
    model, tokenizer = pair
    question = Scorer(*pair).read(text, [answer])
    context, (ids,) = list(question.blanked.context.ids), question.ids
    (place,) = question.blanked.context.blanks
    layout = [[*range(len(context))] + [place] * (len(ids) + 1), [0] * len(context) + [*range(1, len(ids) + 2)]]
    with torch.inference_mode():
        rows = torch.tensor([[*context, tokenizer.sop_token_id, *ids]])
        logprobs = model(rows, layout=torch.tensor([layout]), use_cache=False).logits[0, len(context) :].log_softmax(-1)
    of_end = logprobs[-1, [tokenizer.eop_token_id, tokenizer.eos_token_id]].max()
    return [*(float(logprobs[i, token]) for i, token in enumerate(ids)), float(of_end)]


def test_a_score_is_what_a_full_pass_over_text_and_answer_gives(pair) -> None:
    for text, answers in zip(TEXTS, ANSWERS, strict=True):
        for answer, found in zip(answers, score(*pair, text, answers).answers, strict=True):
            *tokens, end = score_plainly(pair, text, answer)
            assert [token.logprob for token in found.tokens] == pytest.approx(tokens, abs=1e-5)
            assert found.end_logprob == pytest.approx(end, abs=1e-5)
            assert found.logprob == found.score == pytest.approx(sum(tokens), abs=1e-5), "the end is no part of it"
            assert found.text == answer == "".join(token.text for token in found.tokens).strip() or answer[0] == " "


def test_choices_cost_one_read_of_their_context_and_score_as_one_by_one(pair) -> None:
    """The answers of a text stand behind the keys and values of one context, so its tokens are run once."""
    model, _ = pair
    text, answers = (
        "The old man took his dog to the river, and it was [MASK] there.",
        ["sunny", "the rainy season", "a"],
    )
    ran = list[int]()
    hook = model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: ran.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = [answer.logprob for answer in score(*pair, text, answers).answers]
    together, ran[:] = list(ran), []
    alone = [score(*pair, text, [answer]).best.logprob for answer in answers]
    hook.remove()
    assert found == pytest.approx(alone, abs=1e-4)
    question = Scorer(*pair).read(text, answers)
    context, longest = len(question.blanked.context.ids), max(map(len, question.ids)) + 1
    assert together == [context, len(answers) * longest], "the context, and the answers with <sop> and padding"
    assert sum(ran[::2]) == len(answers) * context


@pytest.mark.parametrize("flavour", ["hf-glm-tiny", "hf-glm-10b-tiny", "hf-glm-tiny-fullvocab"])
def test_sums_are_those_of_the_published_multiple_choice(flavour: str) -> None:
    folder = GOLDEN / flavour
    model = load_model(folder / "model", device="cpu")
    config = model.config
    blanks = BlankTokens(*config.blank_token_ids, config.sop_token_id, config.eop_token_id, config.pad_token_id, -1, -1)
    compared = 0
    for case in json.loads((folder / "case.json").read_text("utf-8"))["multiple_choice"]:
        contexts = []
        for ids in case["input_ids"]:
            real = ids[: ids.index(config.eos_token_id) + 1]  # what follows is padding, then the answers
            contexts.append(Context(tuple(real), (real.index(config.mask_token_id),)))
        rows = [AnswerRow(i, (tuple(ids),)) for i, found in enumerate(case["choice_ids"]) for ids in found]
        scored = AnswerScorer(model, contexts, blanks, batch_size=3).score(rows)
        sums = [sum(answer.logprobs) for (answer,) in scored]
        assert sums == pytest.approx([value for row in case["logits"] for value in row], abs=1e-4)
        compared += len(sums)
    assert compared >= 5


def assert_same(one: Scoring, other: Scoring) -> None:
    assert (one.text, one.best.text) == (other.text, other.best.text)
    for mine, theirs in zip(one.answers, other.answers, strict=True):
        assert [(t.id, t.text) for t in mine.tokens] == [(t.id, t.text) for t in theirs.tokens]
        for name in ("logprob", "score", "probability", "end_logprob"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), abs=1e-5)


@pytest.mark.parametrize("normalization", ["sum", "mean", "unconditional"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_batch_gives_what_single_runs_give(pair, normalization, batch_size: int) -> None:
    together = score(*pair, TEXTS, ANSWERS, normalization=normalization, batch_size=batch_size)
    for text, answers, found in zip(TEXTS, ANSWERS, together, strict=True):
        assert_same(found, score(*pair, text, answers, normalization=normalization))


words = st.lists(st.sampled_from([*ENGLISH.split(), *CHINESE[:8]]), min_size=1, max_size=4).map(" ".join)
questions = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=20)
@given(questions, st.integers(1, 4))
def test_neither_order_nor_company_changes_a_score(pair, asked, batch_size: int) -> None:
    texts, answers = [f"{text} [MASK]." for text, _ in asked], [found for _, found in asked]
    forwards = score(*pair, texts, answers, batch_size=batch_size)
    backwards = score(*pair, texts[::-1], [found[::-1] for found in answers[::-1]])
    for one, other in zip(forwards, backwards[::-1], strict=True):
        mine = [answer.logprob for answer in one.answers]
        assert mine == pytest.approx([answer.logprob for answer in other.answers[::-1]], abs=1e-5)


@pytest.mark.parametrize(
    ("scores", "ranking"),
    [
        ([-2.0, -1.0, -3.0], [1, 0, 2]),
        ([-1.0, -1.0 + 4e-6, -1.0 - 4e-6], [0, 1, 2]),
        ([-3.0, -1.0 - 4e-6, -1.0], [1, 2, 0]),
        ([-1.0 - 1.6e-5, -1.0 - 8e-6, -1.0], [1, 2, 0]),  # equal to the best, not to each other in a chain
        ([-math.inf, -1.0, -math.inf], [1, 0, 2]),
    ],
)
def test_scores_equal_to_rounding_are_ranked_as_given(scores: list[float], ranking: list[int]) -> None:
    assert rank_scores(scores) == ranking


def test_one_answer_given_twice_is_ranked_as_given(pair) -> None:
    answers = ["old", "small", "old"]
    for batch_size in (1, 2, 16):
        found = score(*pair, [TEXTS[0]] * 3, [answers] * 3, batch_size=batch_size)
        for scoring in found:
            ranked = [next(n for n, own in enumerate(scoring.answers) if own is one) for one in scoring.ranked]
            assert ranked.index(0) < ranked.index(2)


def test_normalizations_are_what_they_are_defined_to_be(pair) -> None:
    text, answers = TEXTS[0], ANSWERS[0]
    found = {name: score(*pair, text, answers, normalization=name) for name in ("sum", "mean", "unconditional")}
    for index, answer in enumerate(answers):
        summed = found["sum"].answers[index]
        assert found["mean"].answers[index].score == pytest.approx(summed.logprob / len(summed.tokens))
        alone = sum(score_plainly(pair, "[MASK]", f" {answer}")[:-1])  # the same tokens, with their space
        assert found["unconditional"].answers[index].score == pytest.approx(summed.logprob - alone, abs=1e-5)
        assert {name: scoring.answers[index].logprob for name, scoring in found.items()} == pytest.approx(
            dict.fromkeys(found, summed.logprob)
        )


def test_the_unconditional_context_has_the_blank_of_the_text(pair) -> None:
    for text, alone in (("we [sMASK]", "[sMASK]"), ("we [gMASK]", "[gMASK]")):
        (found,) = score(*pair, text, ["took his dog"], normalization="unconditional").answers
        baseline = sum(score_plainly(pair, alone, " took his dog")[:-1])
        assert found.score == pytest.approx(found.logprob - baseline, abs=1e-5)


def test_answers_keep_their_order_and_their_probabilities_are_a_softmax(pair) -> None:
    found = score(*pair, TEXTS[0], ANSWERS[0], normalization="mean")
    assert [answer.text for answer in found.answers] == ANSWERS[0]
    weights = [math.exp(answer.score) for answer in found.answers]
    assert [answer.probability for answer in found.answers] == pytest.approx([w / sum(weights) for w in weights])
    assert found.best.score == max(answer.score for answer in found.answers)


def test_an_answer_and_its_end_are_the_choice_that_infill_scores(pair) -> None:
    found = score(*pair, TEXTS[0], ANSWERS[0])
    chosen = gmask.infill(*pair, TEXTS[0], choices=ANSWERS[0])
    expected = {combination.texts[0]: combination.logprob for combination in chosen.choices.combinations}
    assert {a.text: a.logprob + a.end_logprob for a in found.answers} == pytest.approx(expected, abs=1e-5)


def test_one_list_of_answers_serves_all_texts(pair) -> None:
    texts = [TEXTS[0], TEXTS[4]]
    shared = score(*pair, texts, ["sunny", "rainy"])
    assert shared == score(*pair, texts, [["sunny", "rainy"]] * 2)
    assert score(*pair, [], []) == []


MISTAKES = [
    ("a [MASK] b [MASK]", ["x"], {}, r"2 blanks.*gmask\.infill\(choices"),
    ("no blank", ["x"], {}, "no blank"),
    ("[MASK]", [], {}, "no answers"),
    ("[MASK]", ["x", ""], {}, "an answer is empty"),
    ("[MASK]", "sunny|rainy", {}, "must be a list of texts"),
    ("[MASK]", ["day " * 100], {}, "96 positions hold fewer"),
    ("day " * 100 + "[MASK]", ["x"], {}, "only 96 positions"),
    ("[MASK]", ["x"], {"normalization": "max"}, "one of sum, mean, unconditional"),
    ("[MASK]", ["x"], {"batch_size": 0}, "at least 1"),
    (["[MASK]"], [["x"], ["y"]], {}, "answers for 2 texts, but there are 1"),
]


@pytest.mark.parametrize(("text", "answers", "keywords", "message"), MISTAKES)
def test_mistakes_are_named(pair, text, answers, keywords, message: str) -> None:
    with pytest.raises(gmask.GmaskError, match=message):
        score(*pair, text, answers, **keywords)
