"""Is a text that nothing has room for refused or cut by its characters, before it becomes tokens, at every entrance?"""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

import gmask
from gmask.generation.embed import Embedder
from gmask.generation.encoding import Context
from gmask.generation.predict import SampleReader
from gmask.generation.reward import AnswerEncoder
from gmask.tasks.records import Sample
from gmask.training.rollouts import ModelReward, Rollout
from tuning_models import Pair, make_chatglm, make_glm

HUGE = "the river " * 200_000  # 2 MB: seconds of tokenizing, and far more memory
LARGE = 400_000
"""More than what the tiny models' positions hold in the longest tokens, and far less than the text."""


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_glm(tmp_path_factory.mktemp("glm"))


@pytest.fixture(scope="module")
def chatglm() -> Pair:
    return make_chatglm()


@pytest.fixture(autouse=True)
def small_texts_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test in which a tokenizer reads a huge text."""
    tokenize = PreTrainedTokenizerBase.__call__

    def spy(self: Any, text: Any, *args: Any, **others: Any) -> Any:
        assert len(text) < LARGE, "a huge text is tokenized"
        return tokenize(self, text, *args, **others)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", spy)
    yield


@pytest.mark.parametrize("pooling", ["mean", "last", "mask"])
def test_embed_cuts_a_huge_text_where_it_cuts_a_long_one(glm: Pair, pooling: Any) -> None:
    embedder = Embedder(*glm, pooling=pooling, truncate=True)
    assert embedder.read(HUGE) == embedder.read("the river " * 400)
    with pytest.raises(gmask.GmaskError, match=f"the text has {len(HUGE)} characters"):
        Embedder(*glm, pooling=pooling).read(HUGE)


def test_a_blank_behind_a_huge_text_is_still_told(glm: Pair) -> None:
    with pytest.raises(gmask.GmaskError, match="the blank is beyond the 96 positions"):
        Embedder(*glm, pooling="mask", truncate=True).read(HUGE + "[MASK]")


@pytest.mark.parametrize("limit", [{"max_new_tokens": 8}, {"max_length": 10**9}, {"max_length": 64}])
def test_a_published_chat_refuses_a_huge_text_under_any_limit(chatglm: Pair, limit: dict[str, int]) -> None:
    model, tokenizer = chatglm
    for history, query in ((None, HUGE * 3), ([(HUGE * 3, "yes")], "hello")):
        with pytest.raises(gmask.GmaskError, match=r"the conversation has \d{7} characters"):
            model.chat(tokenizer, query, history, **limit)
        with pytest.raises(gmask.GmaskError, match=r"the conversation has \d{7} characters"):
            next(model.stream_chat(tokenizer, query, history, **limit))


def test_a_context_length_that_no_model_has_is_refused(glm: Pair) -> None:
    for wrong in (10**12, 2**15 + 1):
        with pytest.raises(gmask.GmaskError, match=f"context_length is {wrong}: it must be at most 32768"):
            gmask.Chat(*glm, context_length=wrong)


SOURCES = [
    ("cloze", HUGE + "[MASK]", HUGE[:4000] + "[MASK]"),
    ("cloze", "dog [MASK] " + HUGE, "dog [MASK] " + HUGE[:4000]),
    ("seq2seq", HUGE + "[gMASK]", HUGE[:4000] + "[gMASK]"),
    ("language-model", HUGE, HUGE[:4000]),
    ("chat", HUGE, HUGE[:4000]),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "huge", "long"), SOURCES)
@pytest.mark.parametrize("family", ["glm", "chatglm"])
def test_a_sample_is_cut_as_a_shorter_one_is(
    family: str, kind: Any, huge: str, long: str, side: Any, request: pytest.FixtureRequest
) -> None:
    model, tokenizer = request.getfixturevalue(family)
    if family == "chatglm" and kind == "cloze":
        huge, long = (text.replace("[MASK]", " ") + "[gMASK]" for text in (huge, long))
    reader = SampleReader(tokenizer, model.config, kind, max_source=30, truncation=side)
    read, expected = (reader.read(Sample(text=text, answers=("dog",))) for text in (huge, long))
    assert read.context == expected.context and read.answers == expected.answers
    assert read.tokens_cut > 0


def test_an_answer_is_cut_or_refused_as_a_shorter_one_is(glm: Pair, chatglm: Pair) -> None:
    for model, tokenizer in (glm, chatglm):
        written = SampleReader(tokenizer, model.config, "seq2seq", max_source=30)
        (ids,) = written.read(Sample(text="dog [gMASK]", answers=(HUGE,))).answers
        (expected,) = written.read(Sample(text="dog [gMASK]", answers=(HUGE[:4000],))).answers
        assert ids[: len(expected) // 2] == expected[: len(expected) // 2]
        assert len(ids) > model.config.max_position_embeddings
        with pytest.raises(gmask.GmaskError, match=f"the answer 'the river .*' has {len(HUGE)} characters"):
            SampleReader(tokenizer, model.config, "cloze", max_source=30).read(
                Sample(text="dog [gMASK]", answers=("cat", HUGE))
            )
        judged = AnswerEncoder(tokenizer, model.config, max_source=20, max_target=20)
        assert len(judged.encode_answer(HUGE)) > 20


class TinyReward(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self.base_model = model.config, copy.deepcopy(model.base_model)  # which the reward freezes
        self.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
        self.device = torch.device("cpu")


def test_a_reward_model_of_another_tokenizer_reads_no_more_than_it_has_positions_for(glm: Pair, chatglm: Pair) -> None:
    for (model, own), (_, tokenizer) in ((glm, chatglm), (chatglm, glm)):
        reward = ModelReward(TinyReward(model), tokenizer, own, batch_size=2)
        rollout = Rollout(Context((1, 2), (1,)), (5,), True, "yes", ())
        assert np.isfinite(reward([Sample(text=HUGE), Sample(text="dog")], [rollout, rollout])).all()
        with pytest.raises(gmask.GmaskError, match=r"reward.model has \d+ positions, and an answer \d+ tokens"):
            reward([Sample(text="dog")], [SimpleNamespace(text=HUGE, is_finished=True)])  # type: ignore[list-item]
