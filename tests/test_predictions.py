"""Are predictions those of the verbs that users call, and the same in any batch?"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gmask
from gmask.generation.chat import reply_all
from gmask.generation.predict import predict
from gmask.generation.settings import Sampling
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.tasks.records import Prediction, Sample, TaskKind
from gmask.training.examples import SampleEncoder, find_collator
from gmask.training.losses import find_loss
from tiny_folder import make_folder
from tuning_models import Pair, make_chatglm, make_glm, weights_kept

CLOZE = [
    Sample(text="It is [MASK] today.", answers=("sunny", "rainy", "the rainy season")),
    Sample(text="我今天[sMASK]苹果。", answers=("买了一些", "喜欢")),
    Sample(text="The old man took his dog, and [gMASK]", answers=(" the river", "over")),
]
BEHIND = [
    Sample(text="It is [MASK]", answers=("sunny", "rainy", "the rainy season")),
    Sample(text="我今天买了一些[gMASK]", answers=("苹果", "小狗喜欢")),
]
ASKED = [
    Sample(text="小猫喜欢什么？", history=(("你好", "早上好"),)),
    Sample(text="dog?"),
    Sample(text="The old man took his dog and went down to the river?"),
]
DECODINGS = [
    Sampling(max_tokens=8),
    Sampling(max_tokens=8, num_beams=3, length_penalty=1.0, no_repeat_ngram=2, min_tokens=3),
    Sampling(max_tokens=8, temperature=1.2, seed=5),
]


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_glm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chatglm() -> Pair:
    return make_chatglm()


@pytest.fixture(params=["glm", "chatglm"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def assert_same(one: Prediction, other: Prediction) -> None:
    assert (one.label, one.texts) == (other.label, other.texts)
    assert one.scores == pytest.approx(other.scores, abs=1e-4)


@pytest.mark.parametrize("normalization", ["sum", "mean", "unconditional"])
def test_candidates_have_the_scores_of_gmask_score(glm: Pair, normalization) -> None:
    found = predict(*glm, "cloze", CLOZE, normalization=normalization, batch_size=2)
    for sample, prediction in zip(CLOZE, found, strict=True):
        scored = gmask.score(*glm, sample.text, list(sample.answers), normalization=normalization)
        assert prediction.scores == pytest.approx([answer.score for answer in scored.answers], abs=1e-5)
        assert sample.answers[prediction.label] == scored.best.text


@pytest.mark.parametrize("normalization", ["sum", "mean", "unconditional"])
def test_candidates_of_a_chatglm_are_scored_behind_its_prompt(chatglm: Pair, normalization) -> None:
    model, tokenizer = chatglm

    def logprob(prompt: str, answer: str) -> tuple[float, int]:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        context = tokenizer(prompt)["input_ids"]  # with [gMASK] <sop>
        with torch.inference_mode():
            logprobs = model(torch.tensor([[*context, *ids]])).logits[0].log_softmax(-1)
        return sum(float(logprobs[len(context) - 1 + i, token]) for i, token in enumerate(ids)), len(ids)

    found = predict(model, tokenizer, "multiple-choice", BEHIND, normalization=normalization)
    for sample, prediction in zip(BEHIND, found, strict=True):
        for answer, score in zip(sample.answers, prediction.scores, strict=True):
            value, tokens = logprob(sample.text.rpartition("[")[0].rstrip(), answer)
            if normalization == "mean":
                value /= tokens
            elif normalization == "unconditional":
                value -= logprob("", answer)[0]
            assert score == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_blanks_are_filled_as_gmask_infill_fills_them(glm: Pair, decoding: Sampling) -> None:
    samples = [Sample(text="The [MASK] dog [MASK]."), Sample(text="我[MASK]苹果[sMASK]"), Sample(text="It was [gMASK]")]
    found = predict(*glm, "infill", samples, settings=decoding)
    keywords = decoding.keywords()
    for prediction, filled in zip(found, gmask.infill(*glm, [s.text for s in samples], **keywords), strict=True):
        assert prediction.texts == tuple(blank.text for blank in filled.blanks)
        assert prediction.scores == pytest.approx([blank.logprob for blank in filled.blanks], abs=1e-4)
        assert prediction.label is None


def test_replies_are_those_of_chat(pair: Pair) -> None:
    found = predict(*pair, "chat", ASKED, settings=Sampling(max_tokens=10))
    conversations = []
    for sample in ASKED:
        rounds = [*sample.history, (sample.text, "")]
        roles = ("user", "assistant")
        said = [{"role": role, "content": text} for both in rounds for role, text in zip(roles, both, strict=True)]
        conversations.append(said[:-1])
    replies = reply_all(*pair, conversations, max_tokens=10, temperature=0, top_k=0, top_p=1.0)
    assert [prediction.texts for prediction in found] == [(reply.text,) for reply in replies]
    assert [prediction.scores[0] for prediction in found] == pytest.approx([r.logprob for r in replies], abs=1e-4)


KINDS: list[tuple[TaskKind, list[Sample]]] = [
    (
        "seq2seq",
        [Sample(text=text) for text in ("The old man [gMASK]", "我[gMASK]", "It was a sunny day, and [gMASK]")],
    ),
    ("chat", ASKED),
    ("language-model", [Sample(text="The old man"), Sample()]),
    ("cloze", BEHIND),
]


@pytest.mark.parametrize(("kind", "samples"), KINDS)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_batch_gives_what_single_runs_give(pair: Pair, kind: TaskKind, samples, decoding: Sampling) -> None:
    together = predict(*pair, kind, samples, settings=decoding)
    for index, (sample, found) in enumerate(zip(samples, together, strict=True)):
        seed = None if decoding.seed is None else decoding.seed + index
        keywords = decoding.keywords() | {"seed": seed}
        assert_same(predict(*pair, kind, [sample], settings=Sampling(**keywords))[0], found)


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(3)), st.integers(1, 4))
def test_neither_order_nor_batch_size_changes_a_prediction(glm: Pair, order: list[int], batch_size: int) -> None:
    expected = predict(*glm, "cloze", CLOZE)
    found = predict(*glm, "cloze", [CLOZE[index] for index in order], batch_size=batch_size)
    for index, prediction in zip(order, found, strict=True):
        assert_same(prediction, expected[index])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = make_folder(tmp_path_factory.mktemp("model"))
    torch.manual_seed(3)
    model = GLMForSequenceClassification.from_pretrained(folder, num_labels=4)
    return model, gmask.load(folder, device="cpu")[1]


@pytest.mark.parametrize("pool", ["cls", "pad"])
def test_classes_are_those_of_the_head(classifier: Pair, pool: str) -> None:
    model, tokenizer = classifier
    texts = ["The old man", "我今天早上去市场买了一些苹果。", "dog"]
    model.config.pool_token = pool
    model.train()  # as a trainer may hand it over
    try:
        found = predict(model, tokenizer, "classification", [Sample(text=text) for text in texts], batch_size=2)
        assert model.training
        with torch.inference_mode():
            for text, prediction in zip(texts, found, strict=True):
                expected = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].log_softmax(-1)
                assert prediction.scores == pytest.approx(expected.tolist(), abs=1e-5)
                assert prediction.label == int(expected.argmax())
    finally:
        model.config.pool_token = "cls"


@pytest.mark.parametrize("kind", ["seq2seq", "chat"])
def test_a_model_writes_what_it_was_taught(pair: Pair, kind: TaskKind) -> None:
    """The whole way: encoded, trained, asked; in the same words."""
    model, tokenizer = pair
    blank = "[gMASK]" if kind == "seq2seq" else ""
    samples = [
        Sample(text=f"The old man{blank}", answers=("took his dog",)),
        Sample(text=f"小猫喜欢{blank}", answers=("睡觉。",)),
    ]
    encoder = SampleEncoder(tokenizer, model.config, kind, max_source=40, max_target=20)
    batch = find_collator(kind, pad_id=tokenizer.pad_token_id)(encoder.encode_all(samples))
    with weights_kept(model):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(40):
            loss, count = find_loss(kind)(model, batch)
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
        found = predict(model, tokenizer, kind, samples, settings=Sampling(max_tokens=20, num_beams=2))
    assert [prediction.texts for prediction in found] == [sample.answers for sample in samples]


def test_progress_is_told_and_cuts_are(glm: Pair) -> None:
    done: list[int] = []
    samples = [Sample(text="dog " * 40 + "[gMASK]"), Sample(text="dog [gMASK]"), Sample(text="[gMASK]")]
    with pytest.warns(UserWarning, match="of 3 samples 1 were cut to 20 tokens, and 0 earlier rounds"):
        predict(
            *glm, "seq2seq", samples, settings=Sampling(max_tokens=2), batch_size=2, max_source=20,
            on_progress=done.append,
        )  # fmt: skip
    assert done == [2, 1]
    assert predict(*glm, "cloze", []) == []


def test_what_cannot_be_predicted_is_refused(glm: Pair, chatglm: Pair, classifier: Pair) -> None:
    sample = Sample(text="a [MASK]", answers=("b",), path=Path("x.csv"), line=3)
    for pair, kind, samples, keywords, message in [
        (glm, "classification", [sample], {}, "needs a GLMForSequenceClassification"),
        (classifier, "cloze", [sample], {}, "needs a model that writes"),
        (glm, "cloze", [sample], {"normalization": "max"}, "one of sum, mean, unconditional"),
        (glm, "cloze", [sample], {"batch_size": 0}, "at least 1"),
        (glm, "cloze", [Sample(text="a [MASK]", path=Path("x.csv"), line=3)], {}, r"x\.csv:3: .*no candidates"),
        (glm, "cloze", [Sample(text="a", answers=("b",), path=Path("x.csv"), line=3)], {}, r"x\.csv:3: .*no blank"),
        (glm, "seq2seq", [sample], {"settings": Sampling(max_tokens=97)}, "only 96 positions"),
        (chatglm, "chat", [sample], {}, "max_tokens 64 leaves no room"),
        (chatglm, "infill", [Sample(text="[MASK] a [MASK]")], {"max_source": 9}, "must end with its one blank"),
    ]:
        with pytest.raises(gmask.GmaskError, match=message):
            predict(*pair, kind, samples, **keywords)
