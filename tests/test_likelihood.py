"""Are given answers and whole texts scored exactly, each token once, and the same in every batch?"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gmask
from gmask.errors import GmaskError
from gmask.generation.encoding import encode_plain, format_of
from gmask.generation.perplexity import DocumentScorer, Perplexity, cut_windows, perplexity
from gmask.generation.predict import SampleReader, predict
from gmask.generation.settings import Sampling
from gmask.tasks.records import Direction, LikelihoodSettings, Sample
from tuning_models import Pair, make_chatglm, make_glm

DIRECTIONS: tuple[Direction, ...] = ("both", "left")
LEFT = LikelihoodSettings(direction="left")
LAST_WORDS = [
    Sample(text="The old man took his dog and went down to the [MASK]", answers=("river",)),
    Sample(text="我今天早上去市场买了一些[MASK]", answers=("苹果。",)),
    Sample(text="It was a sunny [MASK]", answers=("day",)),
]
DOCUMENT = (
    "The old man took his dog and went down to the river. 我今天早上去市场买了一些苹果。 It was a sunny day, and " * 3
)


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_glm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chatglm() -> Pair:
    return make_chatglm()


@pytest.fixture(params=["glm", "chatglm"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def is_glm(pair: Pair) -> bool:
    return isinstance(pair[0].config, gmask.GLMConfig)


def restate(pair: Pair, context: Sequence[int], blank: int, ids: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Log-probabilities of an answer to the blank at an index, and which tokens are the most probable ones.

    In float64, from one row without padding or cache; its layout and its mask are written down, not derived.
    """
    model = copy.deepcopy(pair[0]).double().eval()
    sop = format_of(model.config, pair[1]).special.sop
    row = [*context, sop, *ids[:-1]]
    length, known = len(row), len(context)
    layout = torch.zeros(1, 2, length, dtype=torch.long)
    visible = torch.zeros(1, 1, length, length, dtype=torch.bool)
    for query in range(length):
        is_answer = query >= known
        layout[0, 0, query] = blank if is_answer else query
        layout[0, 1, query] = query - known + 1 if is_answer else 0
        for key in range(length):
            visible[0, 0, query, key] = key < known or (is_answer and key <= query)
    with torch.inference_mode():
        mask = visible if is_glm(pair) else ~visible  # as published: 1 is visible to a GLM, hidden to a ChatGLM
        hidden = model.base_model(
            input_ids=torch.tensor([row]), layout=layout, attention_mask=mask, use_cache=False
        ).last_hidden_state
        logprobs = model.lm_head(hidden)[0, known:].log_softmax(-1)
    assert logprobs.dtype == torch.float64
    return (
        [float(logprobs[index, token]) for index, token in enumerate(ids)],
        [int(logprobs[index].argmax()) == token for index, token in enumerate(ids)],
    )


def frame(pair: Pair, body: Sequence[int], *, ends: bool) -> tuple[list[int], int]:
    """A context of these tokens and a blank behind them, and the blank's index."""
    special = format_of(pair[0].config, pair[1]).special
    if not is_glm(pair):
        return [*body, special.gmask], len(body)
    return [special.cls, *body, special.mask, *([special.eos] if ends else [])], len(body) + 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_given_answer_has_its_log_probabilities_in_double_precision(pair: Pair, direction: Direction) -> None:
    found = predict(*pair, "likelihood", LAST_WORDS, likelihood=LikelihoodSettings(direction=direction), batch_size=2)
    for sample, prediction in zip(LAST_WORDS, found, strict=True):
        before, has_space = sample.text.removesuffix("[MASK]"), sample.text.endswith(" [MASK]")
        body = encode_plain(pair[1], before.rstrip())
        word = encode_plain(pair[1], (" " if has_space and is_glm(pair) else "") + sample.answers[0])
        kept = len(body) if direction == "both" else 1
        context, blank = frame(pair, body[:kept], ends=True)
        logprobs, is_greedy = restate(pair, context, blank, [*body[kept:], *word])
        assert prediction.scores == pytest.approx(logprobs[-len(word) :], abs=1e-4), "only the word counts"
        assert list(prediction.is_greedy) == is_greedy[-len(word) :]


def test_candidates_have_their_log_probabilities_in_double_precision(pair: Pair) -> None:
    samples = [
        Sample(text="It is [MASK]" if not is_glm(pair) else "It is [MASK] today.", answers=("sunny", "the old dog")),
        Sample(text="我今天买了一些[MASK]", answers=("苹果", "小狗喜欢", "一")),
    ]
    for sample, prediction in zip(samples, predict(*pair, "cloze", samples, batch_size=2), strict=True):
        before, _, after = sample.text.partition("[MASK]")
        special = format_of(pair[0].config, pair[1]).special
        body = encode_plain(pair[1], before.rstrip())
        context, blank = frame(pair, body, ends=False)
        if is_glm(pair):
            context += [*encode_plain(pair[1], after), special.eos]
        space = " " if before.endswith(" ") and is_glm(pair) else ""
        expected = [sum(restate(pair, context, blank, encode_plain(pair[1], space + a))[0]) for a in sample.answers]
        assert prediction.scores == pytest.approx(expected, abs=1e-4)
        assert prediction.label == expected.index(max(expected))


def restate_windows(pair: Pair, ids: Sequence[int], window: int, step: int, direction: Direction) -> list[float]:
    """As the published evaluation describes its windows: where each begins, and a mask of what counts in it."""
    scored: dict[int, float] = {}
    for number in range(max(math.ceil(max(len(ids) - window, 0) / step) + 1, 1)):
        piece = ids[number * step : number * step + window]
        prompt = 1 if number == 0 or direction == "left" else window - step
        counts = [True] * len(piece)
        if number > 0 and direction == "left":  # all but the last ``step`` places of a whole window
            counts = [place >= window - step for place in range(len(piece))]
        context, blank = frame(pair, piece[:prompt], ends=False)
        logprobs, _ = restate(pair, context, blank, piece[prompt:])
        for place, logprob in enumerate(logprobs, prompt):
            if counts[place]:
                assert number * step + place not in scored, "a token counts twice"
                scored[number * step + place] = logprob
    assert sorted(scored) == list(range(1, len(ids))), "a token does not count"
    return [scored[index] for index in sorted(scored)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("length", [2, 12, 13, 17, 22, 33])  # around one window and several steps of 5
def test_windows_are_the_published_ones_in_double_precision(pair: Pair, direction: Direction, length: int) -> None:
    ids = encode_plain(pair[1], DOCUMENT)[:length]
    settings = LikelihoodSettings(direction=direction, window=12, stride=5)
    (found,) = DocumentScorer(*pair, settings, batch_size=3).score([ids])
    assert found.ids == tuple(ids[1:])
    assert found.logprobs == pytest.approx(restate_windows(pair, ids, 12, 5, direction), abs=1e-4)


@given(st.integers(0, 200), st.integers(2, 40), st.data(), st.sampled_from(DIRECTIONS))
def test_every_token_but_the_first_counts_once(length: int, window: int, data, direction: Direction) -> None:
    stride = data.draw(st.integers(1, window - 1))
    windows = list(cut_windows(length, window, stride, direction))
    counted = [token for one in windows for token in range(one.scored, one.end)]
    assert counted == list(range(1, length))
    for one in windows:
        assert one.start < one.written <= one.scored < one.end <= one.start + window
        assert one.scored - one.start >= window - stride or one.start == 0, (
            "but in the first, what counts has a context"
        )


def test_public_perplexity_counts_tokens_and_words(pair: Pair) -> None:
    texts = [DOCUMENT[:60], "It was a sunny day"]
    found = perplexity(*pair, texts, window=20, stride=10)
    one, other = (perplexity(*pair, text, window=20, stride=10, batch_size=1) for text in texts)
    assert found.nats == pytest.approx(one.nats + other.nats, abs=1e-3)
    assert (found.tokens, found.words) == (one.tokens + other.tokens, one.words + other.words)
    assert other.words == 4, "five words, of which the first is not scored"
    assert found.perplexity == pytest.approx(math.exp(found.nats / found.tokens))
    assert found.word_perplexity == pytest.approx(math.exp(found.nats / found.words))
    assert Perplexity(nats=3.0, tokens=2, words=0).word_perplexity == math.inf
    assert gmask.perplexity is perplexity


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(glm: Pair) -> None:
    model = copy.deepcopy(glm[0])
    with torch.no_grad():
        model.glm.word_embeddings.weight.zero_()  # the tied head: all logits are 0
    for direction in DIRECTIONS:
        found = perplexity(model, glm[1], DOCUMENT, window=30, stride=7, direction=direction)
        assert found.perplexity == pytest.approx(model.config.vocab_size, rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_document_as_a_sample_is_scored_as_perplexity_scores_it(pair: Pair, direction: Direction) -> None:
    settings = LikelihoodSettings(direction=direction, window=20, stride=10)
    samples = [Sample(answers=(text,)) for text in (DOCUMENT, "It was a sunny day", "a")]
    found = predict(*pair, "language-model", samples, likelihood=settings, settings=Sampling(max_tokens=2))
    for sample, prediction in zip(samples[:2], found, strict=False):
        alone = perplexity(*pair, sample.answers[0], window=20, stride=10, direction=direction)
        assert (-sum(prediction.scores), len(prediction.scores)) == (pytest.approx(alone.nats, abs=1e-3), alone.tokens)
    assert len(found[2].scores) == len(encode_plain(pair[1], "a")) - 1


@pytest.mark.parametrize("likelihood", [LikelihoodSettings(), LEFT])
def test_a_batch_gives_what_single_runs_give(pair: Pair, likelihood: LikelihoodSettings) -> None:
    together = predict(*pair, "likelihood", LAST_WORDS, likelihood=likelihood)
    for sample, found in zip(LAST_WORDS, together, strict=True):
        (alone,) = predict(*pair, "likelihood", [sample], likelihood=likelihood, batch_size=1)
        assert found.scores == pytest.approx(alone.scores, abs=1e-4)
        assert found.is_greedy == alone.is_greedy


def test_logits_in_pieces_are_those_of_one_product(glm: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predict(*glm, "likelihood", LAST_WORDS, likelihood=LEFT)
    monkeypatch.setattr("gmask.generation.score.LOGITS_AT_ONCE", 2 * glm[0].config.vocab_size)
    for one, other in zip(whole, predict(*glm, "likelihood", LAST_WORDS, likelihood=LEFT), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_long_text_is_cut_on_its_left_and_its_answer_is_not(pair: Pair, direction: Direction) -> None:
    model, tokenizer = pair
    positions = model.config.max_position_embeddings
    words = "dog river sunny " * positions
    reader = SampleReader(tokenizer, model.config, "likelihood", max_source=positions, direction=direction)
    read = reader.read(Sample(text=f"{words} [MASK]", answers=("the old man",)))
    assert read.tokens_cut > 0
    total = len(read.context.ids) + len(read.answers[0])
    assert total + 1 <= positions + (len(read.answers[0]) + 1 if is_glm(pair) and direction == "both" else 0)
    body = encode_plain(tokenizer, words.rstrip())
    before = [*read.context.ids[: read.context.blanks[0]], *read.answers[0][: read.unscored]]
    before = before[1:] if is_glm(pair) else before  # without [CLS]
    assert before == body[-len(before) :], "the end of the text stays"
    with pytest.warns(UserWarning, match="of 1 samples 1 were cut"):
        (found,) = predict(*pair, "likelihood", [Sample(text=f"{words} [MASK]", answers=("river",))], likelihood=LEFT)
    assert found.scores


def test_what_cannot_be_scored_is_one_line(glm: Pair, chatglm: Pair) -> None:
    path = Path("x.jsonl")
    behind = Sample(text="It is [MASK] today.", answers=("sunny",), path=path, line=2)
    for pair, samples, keywords, message in [
        (glm, [behind], {"likelihood": LEFT}, r"x\.jsonl:2: direction left .* text follows it: take both"),
        (glm, [Sample(text="It is [MASK]", path=path, line=3)], {}, r"x\.jsonl:3: the sample has no answer"),
        (glm, [Sample(text="a [MASK] [MASK]", answers=("b",))], {}, "2 blanks, likelihood takes one"),
        (chatglm, [behind], {}, "must end with its one blank"),
    ]:
        with pytest.raises(GmaskError, match=message):
            predict(*pair, "likelihood", samples, **keywords)
    for keywords, message in [
        ({"window": 1}, "a window of this model has 2 to 95 tokens, not 1"),
        ({"window": 200}, "2 to 95 tokens, not 200"),
        ({"window": 10, "stride": 10}, "stride is 10: give less than the window of 10, at least 1"),
        ({"direction": "right"}, "direction must be both or left"),
        ({"blank": "[xMASK]"}, r"no \[xMASK\]: take"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ]:
        with pytest.raises(GmaskError, match=message):
            perplexity(*glm, DOCUMENT, **keywords)
    for direction in DIRECTIONS:
        assert perplexity(*glm, DOCUMENT, window=95, stride=1 + 93 * (direction == "left"), direction=direction).tokens
    with pytest.raises(GmaskError, match="no text has two tokens"):
        perplexity(*glm, ["", ""])
