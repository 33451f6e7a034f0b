"""Does `gmask.infill` keep its promises: exact scores, batches like single runs, choices, streams, limits?"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import gmask
from gmask.errors import GmaskError
from gmask.generation import score as choices_module
from gmask.generation.sampling import draw_tokens
from gmask.generation.settings import Sampling, SettingsKeywords
from tiny_folder import make_folder

TEXTS = ["The [MASK] dog [MASK].", "我[MASK]苹果[sMASK]", "It was [gMASK]", r"[MASK] [MASK], \[MASK] river [MASK] x"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="module")
def one_by_one(pair) -> list[gmask.Infilling]:
    return [gmask.infill(*pair, text, max_tokens=8) for text in TEXTS]


def ids_of(infilling: gmask.Infilling) -> list[list[int]]:
    return [[token.id for token in blank.tokens] for blank in infilling.blanks]


def assert_same(one: gmask.Infilling, other: gmask.Infilling) -> None:
    assert (one.text, ids_of(one)) == (other.text, ids_of(other))
    assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    for mine, theirs in zip((one, *one.alternatives), (other, *other.alternatives), strict=True):
        assert (mine.text, ids_of(mine)) == (theirs.text, ids_of(theirs))
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_a_filled_text_says_where_its_answers_are_and_what_they_are_worth(one_by_one) -> None:
    finishes = set()
    for infilling in one_by_one:
        assert infilling.logprob == pytest.approx(sum(blank.logprob for blank in infilling.blanks))
        for blank in infilling.blanks:
            finishes.add(blank.finish)
            assert infilling.text[blank.start : blank.end] == blank.text
            assert 1 <= len(blank.tokens) <= 8
            assert blank.finished == (blank.end_logprob is not None)
            assert blank.logprob == pytest.approx(sum(t.logprob for t in blank.tokens) + (blank.end_logprob or 0))
            assert "".join(token.text for token in blank.tokens).strip(" ") == blank.text.strip(" ")
    assert finishes == {"end", "length"}, "the test should see both"
    assert [len(infilling.blanks) for infilling in one_by_one] == [2, 2, 1, 3]


@pytest.mark.parametrize("batch_size", [2, 16])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 7, "n": 2}, {"n": 2}, {"num_beams": 3}]
)
def test_a_batch_gives_what_single_runs_give(pair, settings: SettingsKeywords, batch_size: int) -> None:
    together = gmask.infill(*pair, TEXTS, max_tokens=8, batch_size=batch_size, **settings)
    for index, (text, filled) in enumerate(zip(TEXTS, together, strict=True)):
        alone: SettingsKeywords = {**settings}
        if "seed" in settings:
            alone["seed"] = settings["seed"] + index
        assert_same(gmask.infill(*pair, text, max_tokens=8, **alone), filled)


def test_special_tokens_and_padding_rows_are_never_answers(pair) -> None:
    drawn = gmask.infill(*pair, TEXTS[0], n=16, temperature=3.0, seed=0, max_tokens=12)
    for infilling in (drawn, *drawn.alternatives):
        assert all(16 <= token < 440 for ids in ids_of(infilling) for token in ids)


def test_alternatives_are_ranked_and_a_search_gives_different_texts(pair) -> None:
    found = gmask.infill(*pair, TEXTS[0], n=5, max_tokens=4)
    ranked = [found, *found.alternatives]
    assert len({infilling.text for infilling in ranked}) == len(ranked) == 5
    assert [i.logprob for i in ranked] == sorted((i.logprob for i in ranked), reverse=True)
    drawn = gmask.infill(*pair, TEXTS[0], n=5, max_tokens=4, temperature=1.0, seed=1)
    assert len(drawn.alternatives) == 4
    assert drawn == gmask.infill(*pair, TEXTS[0], n=5, max_tokens=4, temperature=1.0, seed=1)
    assert drawn != gmask.infill(*pair, TEXTS[0], n=5, max_tokens=4, temperature=1.0, seed=2)


def test_draws_follow_the_tempered_and_cut_distribution() -> None:
    """Against transformers' warpers: equally spaced quantiles must hit each token by its probability."""
    logprobs = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for temperature, top_k, top_p in [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (1.0, 6, 0.5), (1.0, 1, 1.0)]:
        scores = TemperatureLogitsWarper(temperature)(None, logprobs)
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        draws = (torch.arange(2000) + 0.5) / 2000
        cut = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        tokens = draw_tokens(logprobs.expand(2000, -1), draws, **cut)
        shares = torch.bincount(tokens, minlength=12) / 2000
        torch.testing.assert_close(shares, scores.softmax(-1)[0], atol=1e-3, rtol=0)


def test_choices_are_scored_jointly_and_exactly(pair) -> None:
    lists = [["old", "rainy day"], ["ran", "was sunny", "took"]]
    found = gmask.infill(*pair, TEXTS[0], choices=lists, n=6)
    assert found.choices.exact and len(found.choices.combinations) == 6
    assert sum(combination.probability for combination in found.choices.combinations) == pytest.approx(1)
    ranked = [found, *found.alternatives]
    for combination, infilling in zip(found.choices.combinations, ranked, strict=True):
        first, second = combination.texts
        assert infilling.text == f"The {first} dog {second}."
        assert (
            combination.logprob
            == pytest.approx(infilling.logprob)
            == pytest.approx(joint_logprob(pair, infilling), abs=2e-5)
        )
        ratio = math.exp(combination.logprob - found.choices.combinations[0].logprob)
        assert combination.probability / found.choices.combinations[0].probability == pytest.approx(ratio)


def joint_logprob(pair, infilling: gmask.Infilling) -> float:
    """The answers' log-probability from one pass over context and answers."""
    model, tokenizer = pair
    context = tokenizer(TEXTS[0])["input_ids"]
    ids, places, steps, targets = list(context), list(range(len(context))), [0] * len(context), [-1] * len(context)
    blanks = [place for place, token in enumerate(context) if token == tokenizer.mask_token_id]
    for place, answer in zip(blanks, ids_of(infilling), strict=True):
        ids += [tokenizer.sop_token_id, *answer]
        places += [place] * (len(answer) + 1)
        steps += range(1, len(answer) + 2)
        targets += [*answer, tokenizer.eop_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), layout=torch.tensor([[places, steps]])).logits[0]
    logprobs = logits.log_softmax(-1)
    ends = [tokenizer.eop_token_id, tokenizer.eos_token_id]
    return sum(
        float(logprobs[place, ends].max() if target == ends[0] else logprobs[place, target])
        for place, target in enumerate(targets)
        if target >= 0
    )


def test_beyond_the_limit_choices_are_searched_and_it_says_so(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [["old", "rainy", "sunny"], ["ran", "was", "took"]]
    exact = gmask.infill(*pair, TEXTS[0], choices=lists)
    monkeypatch.setattr(choices_module, "EXACT_LIMIT", 8)
    searched = gmask.infill(*pair, TEXTS[0], choices=lists)
    assert exact.choices.exact and not searched.choices.exact
    for one, other in zip(searched.choices.combinations, exact.choices.combinations, strict=True):
        assert one.texts == other.texts
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    monkeypatch.setattr(choices_module, "BEAM_WIDTH", 1)
    assert len(gmask.infill(*pair, TEXTS[0], choices=lists).choices.combinations) == 1


def test_choices_may_be_given_in_three_ways(pair) -> None:
    one = gmask.infill(*pair, "It was [MASK].", choices=["sunny", "rainy"])
    assert one == gmask.infill(*pair, "It was [MASK].", choices=[["sunny", "rainy"]])
    assert one == gmask.infill(*pair, "It was [MASK].", choices={0: ["sunny", "rainy"]})
    assert one.blanks[0].text in ("sunny", "rainy")
    for wrong in (["a"], [["a"], []], {0: ["a"]}, {0: ["a"], 2: ["b"]}, [["a"], ["b"], ["c"]]):
        with pytest.raises(gmask.GmaskError, match="blank"):
            gmask.infill(*pair, TEXTS[0], choices=wrong)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 3}, {"stop": ("t", "��")}])
def test_a_stream_joins_to_the_answers(pair, text: str, settings: SettingsKeywords) -> None:
    stream = gmask.stream_infill(*pair, text, max_tokens=12, **settings)
    told: dict[int, str] = {}
    while True:
        try:
            fragment = next(stream)
        except StopIteration as end:
            filled = end.value
            break
        assert fragment.text
        assert fragment.blank >= max(told, default=0)
        told[fragment.blank] = told.get(fragment.blank, "") + fragment.text
    assert filled == gmask.infill(*pair, text, max_tokens=12, **settings)
    assert [told.get(index, "") for index in range(len(filled.blanks))] == [blank.text for blank in filled.blanks]


def test_streams_and_several_alternatives_do_not_go_together(pair) -> None:
    with pytest.raises(gmask.GmaskError, match="n=1"):
        gmask.stream_infill(*pair, TEXTS[0], n=2)


def test_a_stop_text_ends_an_answer_across_tokens_and_is_not_part_of_it(pair) -> None:
    whole = gmask.infill(*pair, TEXTS[2], max_tokens=12).blanks[0]
    raw = "".join(token.text for token in whole.tokens)
    first, second = whole.tokens[0].text, whole.tokens[1].text
    stop = first[-1] + second[0]  # half in one token, half in the next
    assert stop in raw
    stopped = gmask.infill(*pair, TEXTS[2], max_tokens=12, stop=stop).blanks[0]
    assert stopped.finish == "stop" and stopped.finished and stopped.end_logprob is None
    assert stopped.text == raw[: raw.index(stop)].lstrip(" ")
    assert len(stopped.tokens) == 2


def test_more_tokens_than_positions_are_refused_with_both_counts(pair) -> None:
    with pytest.raises(gmask.GmaskError, match=r"\d{3} tokens, .* 96 positions"):
        gmask.infill(*pair, "dog " * 200 + "[MASK]")
    with pytest.raises(gmask.GmaskError, match=r"max_tokens is 97, .* 96 positions"):
        gmask.infill(*pair, "[MASK]", max_tokens=97)
    assert len(gmask.infill(*pair, "[gMASK]", max_tokens=96, min_tokens=96).blanks[0].tokens) == 96
    assert len(gmask.infill(*pair, "[MASK]" * 94, max_tokens=1).blanks) == 94  # with [CLS] and <|endoftext|>: 96
    with pytest.raises(gmask.GmaskError, match="97 tokens"):
        gmask.infill(*pair, "[MASK]" * 95)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 1.0}, "nearest is 'temperature'"),
        ({"n": 0}, "n is 0: it must be above 0"),
        ({"n": True}, "n is True: expected int"),
        ({"top_p": 0}, "top_p"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "number"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"num_beams": 2, "temperature": 1.0}, "one of the two"),
        ({"batch_size": 0}, "batch_size"),
        ({"choices": [["a"], ["b"]], "temperature": 1.0}, "scored, not drawn"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(pair, settings: dict[str, object], message: str) -> None:
    with pytest.raises(gmask.GmaskError, match=message):
        gmask.infill(*pair, TEXTS[0], **settings)


def test_weights_that_give_no_numbers_are_an_error_and_not_an_answer(tmp_path: Path) -> None:
    model, tokenizer = gmask.load(make_folder(tmp_path), device="cpu")
    with torch.no_grad():
        model.glm.transformer.final_layernorm.bias[0] = torch.nan
    with pytest.raises(gmask.GmaskError, match="not numbers"):
        gmask.infill(model, tokenizer, TEXTS[0])


def test_the_keywords_are_the_settings() -> None:
    served = {"repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "constraint", "top_logprobs"}
    assert {*SettingsKeywords.__annotations__, *served} == set(Sampling.__dataclass_fields__)
    assert Sampling().keywords().keys() == SettingsKeywords.__annotations__.keys()


NO_TEXTS: list[tuple[object, str]] = [
    (None, "the texts are None: give a list of texts"),
    (3, "the texts are an int: give a list of texts"),
    (b"a [MASK]", "the texts are a bytes: give a list of texts"),
    ({"text": "a [MASK]"}, "the texts are a dict: give a list of texts"),
    ([None], "the text is None, where a text is expected"),
    (["The [MASK].", float("nan")], "the text is a float, where a text is expected"),
    ([b"a [MASK]"], "the text is a bytes, where a text is expected"),
    ([["a [MASK]"]], "the text is a list, where a text is expected"),
    (["a\ud83d [MASK]"], "the text holds half of a character"),
]


@pytest.mark.parametrize(("texts", "message"), NO_TEXTS)
def test_what_is_no_text_is_one_line_everywhere(pair, texts: Any, message: str) -> None:
    ways: list[Callable[[], object]] = [
        lambda: gmask.infill(*pair, texts, max_tokens=1),
        lambda: gmask.score(*pair, texts, ["a", "b"]),
        lambda: gmask.embed(*pair, texts),
        lambda: gmask.embed(*pair, texts, truncate=True),
    ]
    for way in ways:
        with pytest.raises(GmaskError, match=message):
            way()


def test_texts_of_an_iterator_or_an_array_are_a_list(pair) -> None:
    texts = ["The [MASK] dog.", "A [MASK]."]
    expected = gmask.infill(*pair, texts, max_tokens=2)
    assert gmask.infill(*pair, (text for text in texts), max_tokens=2) == expected
    assert gmask.infill(*pair, np.array(texts), max_tokens=2) == expected
    assert gmask.score(*pair, iter(texts), ["a", "b"]) == gmask.score(*pair, texts, ["a", "b"])
    assert (gmask.embed(*pair, iter(texts)) == gmask.embed(*pair, texts)).all()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("ab", "choices is 'ab': give a list of texts"),
        (3, "choices is 3: give a list of texts"),
        ([1], r"the choices of a blank must be a list of texts, not 1"),
        ([["a", None]], r"the choices of a blank must be a list of texts, not \['a', None\]"),
        ({0: 3}, "the choices of a blank must be a list of texts, not 3"),
        (["a", "\ud83d"], "holds half of a character"),
    ],
)
def test_choices_that_are_no_lists_of_texts_are_one_line(pair, choices: Any, message: str) -> None:
    with pytest.raises(GmaskError, match=message):
        gmask.infill(*pair, "The [MASK] dog.", choices=choices)


def test_a_choice_is_a_text_and_not_its_letters(pair) -> None:
    expected = gmask.infill(*pair, "The [MASK] dog.", choices=["old man"])
    assert gmask.infill(*pair, "The [MASK] dog.", choices={0: "old man"}) == expected


def test_half_of_a_character_is_no_stop_text(pair) -> None:
    with pytest.raises(GmaskError, match="a stop text holds half of a character"):
        gmask.infill(*pair, "The [MASK] dog.", stop=["a", "\ud83d"])
