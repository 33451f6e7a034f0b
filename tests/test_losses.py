"""Is what is trained what generation asks for, in any batch?"""

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

import gmask
from gmask.generation.predict import SampleReader
from gmask.generation.score import AnswerRow, AnswerScorer
from gmask.infilling.blanks import NOT_SCORED
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.tasks.records import Sample, TaskKind
from gmask.training.examples import SampleEncoder, find_collator, pack_examples
from gmask.training.losses import choice_logprobs, choice_loss, class_loss, find_loss, token_loss
from tiny_folder import make_folder
from tuning_models import Pair, make_chatglm, make_glm, weights_kept

CLOZE = [
    Sample(text="It is [MASK]", answers=("sunny", "the rainy season", "a dog"), label=1),
    Sample(text="我今天早上去市场买了一些[MASK]", answers=("苹果。", "小狗"), label=0),
    Sample(
        text="The old man took his dog and went down to the [MASK]", answers=("river", "day", "old man", "it"), label=3
    ),
]
WRITTEN: list[tuple[TaskKind, list[Sample]]] = [
    (
        "seq2seq",
        [
            Sample(text="The old man took his dog [gMASK]", answers=("and went down to the river.",)),
            Sample(text="我[gMASK]", answers=("苹果",)),
            Sample(text="It was a sunny day, and [gMASK]", answers=("dog",)),
        ],
    ),
    (
        "chat",
        [
            Sample(text="小猫喜欢什么？", answers=("睡觉。",), history=(("你好", "早上好"), ("一", "二"))),
            Sample(text="dog?", answers=("The old man took his dog",)),
        ],
    ),
    ("language-model", [Sample(answers=("It was a sunny day.",)), Sample(answers=("小狗",))]),
]
INFILL = [
    Sample(text="The [MASK] man took [MASK] dog, [gMASK]", answers=("old", "his", "and the river")),
    Sample(text="我[sMASK]苹果[MASK]", answers=("去市场买了一些", "。")),
]


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_glm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chatglm() -> Pair:
    return make_chatglm()


@pytest.fixture(scope="module")
def chatglm_with_prefix() -> Pair:
    return make_chatglm("chatglm-tiny-ptuning-projection")


@pytest.fixture(params=["glm", "chatglm", "chatglm_with_prefix"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def encode(pair: Pair, kind: TaskKind, samples: list[Sample]):
    model, tokenizer = pair
    encoder = SampleEncoder(tokenizer, model.config, kind, max_source=60, max_target=40)
    return encoder.encode_all(samples)


def make_batch(pair: Pair, kind: TaskKind, items):
    return find_collator(kind, pad_id=pair[1].pad_token_id)(items)


def generation_logprobs(pair: Pair, kind: TaskKind, samples: list[Sample]) -> list[tuple[float, float]]:
    """Of each sample: the log-probability of its answers by generation's cache, and of their ends."""
    model, tokenizer = pair
    reader = SampleReader(tokenizer, model.config, kind, max_source=60)
    found = []
    for question in map(reader.read, samples):
        (answers,) = AnswerScorer(model, [question.context], reader.special, batch_size=4).score(
            [AnswerRow(0, question.answers)]
        )
        found.append((sum(sum(one.logprobs) for one in answers), sum(one.end_logprob for one in answers)))
    return found


@torch.inference_mode()
def end_loss(pair: Pair, kind: TaskKind, samples: list[Sample]) -> float:
    """What the ends cost: the loss of a batch in which nothing else is taught."""
    batch = make_batch(pair, kind, encode(pair, kind, samples))
    reader = SampleReader(pair[1], pair[0].config, kind, max_source=60)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] != reader.special.eop, NOT_SCORED)
    return float(token_loss(pair[0], batch)[0])


@pytest.mark.parametrize(("kind", "samples"), WRITTEN)
def test_what_is_trained_is_what_generation_scores(pair: Pair, kind: TaskKind, samples: list[Sample]) -> None:
    with torch.inference_mode():
        total, count = token_loss(pair[0], make_batch(pair, kind, encode(pair, kind, samples)))
    expected = generation_logprobs(pair, kind, samples)
    assert float(total) - end_loss(pair, kind, samples) == pytest.approx(-sum(a for a, _ in expected), abs=1e-4)
    assert end_loss(pair, kind, samples) >= -sum(end for _, end in expected) - 1e-4, "of two ends the better is told"
    assert count == sum(int((example.labels != NOT_SCORED).sum()) for example in encode(pair, kind, samples))


def test_later_blanks_are_taught_in_the_sight_of_earlier_answers(glm: Pair) -> None:
    with torch.inference_mode():
        total, _ = token_loss(glm[0], make_batch(glm, "infill", encode(glm, "infill", INFILL)))
    expected = -sum(answers for answers, _ in generation_logprobs(glm, "infill", INFILL))
    assert float(total) - end_loss(glm, "infill", INFILL) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("kind", "samples"), WRITTEN)
def test_padded_and_packed_rows_cost_what_single_ones_do(pair: Pair, kind: TaskKind, samples: list[Sample]) -> None:
    assert_company_costs_nothing(pair, kind, samples)


def test_several_blanks_cost_alike_in_padded_and_packed_rows(glm: Pair) -> None:
    assert_company_costs_nothing(glm, "infill", INFILL)


def assert_company_costs_nothing(pair: Pair, kind: TaskKind, samples: list[Sample]) -> None:
    examples = encode(pair, kind, samples)
    with torch.inference_mode():
        alone = [token_loss(pair[0], make_batch(pair, kind, [example])) for example in examples]
        padded = token_loss(pair[0], make_batch(pair, kind, examples))
        rows = pack_examples([*examples, *examples[:1]], row_length=sum(example.length for example in examples))
        packed = token_loss(pair[0], make_batch(pair, kind, rows))
    assert any(len(row) > 1 for row in rows)
    assert float(padded[0]) == pytest.approx(sum(float(total) for total, _ in alone), rel=1e-5)
    assert padded[1] == sum(count for _, count in alone)
    assert float(packed[0]) == pytest.approx(float(padded[0]) + float(alone[0][0]), rel=1e-5)
    assert packed[1] == padded[1] + alone[0][1]


def test_a_batch_is_what_the_model_itself_takes(pair: Pair) -> None:
    kind, samples = WRITTEN[0]
    batch = make_batch(pair, kind, encode(pair, kind, samples))
    with torch.inference_mode():
        total, count = token_loss(pair[0], batch)
        assert float(pair[0](**batch).loss) == pytest.approx(float(total) / count, rel=1e-5)


@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_candidates_are_scored_as_generation_scores_them(pair: Pair, normalization) -> None:
    model, tokenizer = pair
    with torch.inference_mode():
        batch = make_batch(pair, "cloze", encode(pair, "cloze", CLOZE))
        found = choice_logprobs(model, batch, normalization=normalization)
        total, count = choice_loss(model, batch, normalization=normalization)
    reader = SampleReader(tokenizer, model.config, "cloze", max_source=60)
    costs = 0.0
    for row, sample in zip(found.tolist(), CLOZE, strict=True):
        question = reader.read(sample)
        scorer = AnswerScorer(model, [question.context], reader.special, batch_size=4)
        answers = [scored for (scored,) in scorer.score([AnswerRow(0, (ids,)) for ids in question.answers])]
        expected = [sum(one.logprobs) / (len(one.ids) if normalization == "mean" else 1) for one in answers]
        assert row[: len(expected)] == pytest.approx(expected, rel=1e-6, abs=1e-5)
        assert row[len(expected) :] == [-torch.inf] * (len(row) - len(expected))
        costs -= float(torch.tensor(expected).log_softmax(-1)[sample.label])
    assert (float(total), count) == (pytest.approx(costs, abs=1e-4), 3)


def test_gradients_go_through_all_candidates(pair: Pair) -> None:
    """They are those of each candidate in a pass of its own, and a candidate that is not the right one has some."""
    model = pair[0]
    examples = encode(pair, "cloze", CLOZE)
    total, _ = choice_loss(model, make_batch(pair, "cloze", examples))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packed = torch.autograd.grad(total, parameters)
    plain = sum(_plain_choice_loss(pair, sample) for sample in CLOZE)
    assert total.item() == pytest.approx(plain.item(), rel=1e-5)
    for mine, theirs in zip(packed, torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def _plain_choice_loss(pair: Pair, sample: Sample) -> torch.Tensor:
    """The candidates one by one, as answers to a seq2seq question, without their ends."""
    values = []
    for answer in sample.answers:
        batch = make_batch(pair, "seq2seq", encode(pair, "seq2seq", [Sample(text=sample.text, answers=(answer,))]))
        end = (batch["labels"] != NOT_SCORED).nonzero()[-1, 1]
        batch["labels"][0, end] = NOT_SCORED
        values.append(-token_loss(pair[0], batch)[0])
    return F.cross_entropy(torch.stack(values)[None], torch.tensor([sample.label]), reduction="sum")


def test_training_on_a_cloze_raises_the_right_candidates(pair: Pair) -> None:
    model = pair[0]
    batch = make_batch(pair, "cloze", encode(pair, "cloze", CLOZE))
    with weights_kept(model):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(12):
            loss, _ = choice_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            assert choice_logprobs(model, batch).argmax(-1).tolist() == [sample.label for sample in CLOZE]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A language model's weights below a new head."""
    folder = make_folder(tmp_path_factory.mktemp("language-model"))
    _, tokenizer = gmask.load(folder, device="cpu")
    torch.manual_seed(0)
    model = GLMForSequenceClassification.from_pretrained(folder, num_labels=3)
    return model.eval(), tokenizer


TOPICS = [
    Sample(text="The old man took his dog", label=2),
    Sample(text="苹果", label=0),
    Sample(text="It was a", label=1),
]


def test_a_head_over_a_language_model_keeps_its_weights(classifier: Pair, glm: Pair) -> None:
    body = classifier[0].glm.state_dict()
    for name, tensor in glm[0].glm.state_dict().items():
        assert torch.equal(tensor, body[name])
    assert classifier[0].out_proj.weight.shape == (3, 32)


@pytest.mark.parametrize("pool", ["cls", "pad"])
def test_classes_cost_what_they_cost_alone(classifier: Pair, pool: str) -> None:
    model, tokenizer = classifier
    model.config.pool_token = pool
    try:
        with torch.inference_mode():
            total, count = class_loss(
                model, make_batch(classifier, "classification", encode(classifier, "classification", TOPICS))
            )
            alone = [
                model(**tokenizer(sample.text, return_tensors="pt"), labels=torch.tensor([sample.label])).loss
                for sample in TOPICS
            ]
    finally:
        model.config.pool_token = "cls"
    assert (float(total), count) == (pytest.approx(float(sum(alone)), abs=1e-5), 3)


def test_a_class_that_the_head_lacks_is_refused(classifier: Pair) -> None:
    examples = encode(classifier, "classification", [Sample(text="dog", label=3)])
    with pytest.raises(gmask.GmaskError, match="label 3 is not one of the 3 classes"):
        class_loss(classifier[0], make_batch(classifier, "classification", examples))


def test_a_pooling_that_needs_sop_is_refused(classifier: Pair) -> None:
    config: PreTrainedConfig = type(classifier[0].config)(**{**classifier[0].config.to_dict(), "pool_token": "start"})
    with pytest.raises(gmask.GmaskError, match="take cls or pad"):
        SampleEncoder(classifier[1], config, "classification", max_source=9, max_target=9)


def test_a_batch_that_teaches_nothing_is_refused(pair: Pair) -> None:
    kind, samples = WRITTEN[0]
    batch = make_batch(pair, kind, encode(pair, kind, samples))
    batch["labels"][:] = NOT_SCORED
    with pytest.raises(gmask.GmaskError, match="no token to learn"):
        token_loss(pair[0], batch)


def test_each_kind_has_its_loss(glm: Pair) -> None:
    assert find_loss("classification") is class_loss
    assert find_loss("chat") is token_loss
    batch = make_batch(glm, "cloze", encode(glm, "cloze", CLOZE))
    with torch.inference_mode():
        mean = find_loss("multiple-choice", normalization="mean")(glm[0], batch)[0]
        assert torch.equal(mean, choice_loss(glm[0], batch, normalization="mean")[0])
    with pytest.raises(gmask.GmaskError, match="sum or mean"):
        find_loss("cloze", normalization="unconditional")


def test_a_wrapper_sees_every_call(glm: Pair) -> None:
    """DDP adds up gradients only if it is called itself."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **inputs):
            self.calls += 1
            return self.module(**inputs)

    wrapper = Wrapper(glm[0])
    for kind, samples in [("seq2seq", WRITTEN[0][1]), ("cloze", CLOZE)]:
        batch = make_batch(glm, kind, encode(glm, kind, samples))
        with torch.inference_mode():
            assert torch.equal(find_loss(kind)(wrapper, batch)[0], find_loss(kind)(glm[0], batch)[0])
    assert wrapper.calls == 2
