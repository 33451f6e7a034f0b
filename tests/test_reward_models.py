"""Does a reward model read the whole answer, whatever stands beside it, and come back as it was saved?"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import gmask
from conftest import EOP, GMASK, PAD, SHAPE, SOP, SPECIAL
from gmask.evaluation.rewards import PlainRules, ScoredPair, is_repeated, report_rewards, share_of
from gmask.generation.reward import AnswerEncoder, RewardScorer, pad_rows
from gmask.models.chatglm import ChatGLMForReward
from gmask.models.glm import GLMConfig
from gmask.models.glm_heads import GLMForReward, GLMForSequenceClassification
from gmask.tasks.preferences import Question
from tiny_folder import make_folder
from tuning import build_chatglm, build_glm_of

CORPUS = Path(__file__).parents[2] / "shared" / "corpus" / "preference"
ROWS = [
    [20, 21, 22, GMASK, SOP, 30, 31, EOP],
    [40, GMASK, SOP, 41, EOP],
    [17, 18, 19, 20, 21, 22, 23, GMASK, SOP, 30, 31, 32, 33, EOP],
    [17, 18, 19, 20, 21, 22, 23, GMASK, SOP, 30],
]
CLASSES = {"glm": (GLMForReward, build_glm_of), "chatglm": (ChatGLMForReward, build_chatglm)}


def build(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    reward_class, builder = CLASSES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return reward_class(builder().config).to(dtype).eval()


def restate(model: Any, row: list[int], sop: int = SOP) -> Tensor:
    """The reward of one unpadded row, from a layout and a mask that are written down here."""
    length, start = len(row), row.index(sop)
    blank = row.index(model.config.gmask_token_id)
    first = [*range(start), *[blank] * (length - start)]
    second = [*[0] * start, *range(1, length - start + 1)]
    visible = torch.ones(length, length, dtype=torch.long).tril()
    visible[:, :start] = 1
    body = model.base_model
    states = body(
        input_ids=torch.tensor([row]),
        layout=torch.tensor([[first, second]]),
        attention_mask=visible[None, None],
    ).last_hidden_state
    return (states[0, -1].double() @ model.score.weight[0].double()).detach()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_padded_batch_gives_the_rewards_of_single_rows(
    kind: str, dtype: torch.dtype, close: float, side: str
) -> None:
    model = build(kind, dtype)
    ids, mask = pad_rows(ROWS, pad=PAD)
    if side == "left":
        ids, mask = (
            torch.stack([row.roll(ids.shape[1] - len(one)) for row, one in zip(values, ROWS, strict=True)])
            for values in (ids, mask)
        )
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        whole = model(input_ids=ids, attention_mask=mask, every_token=True).logits
    expected = torch.stack([restate(model, row) for row in ROWS])
    assert (found.double() - expected).abs().max() < close
    last = (mask * torch.arange(mask.shape[1])).amax(-1)
    assert torch.equal(whole[torch.arange(len(ROWS)), last], found)


@pytest.mark.parametrize("kind", CLASSES)
def test_only_the_last_token_is_read_and_it_sees_all(kind: str) -> None:
    model = build(kind)
    scores = [model(input_ids=torch.tensor([row])).logits.item() for row in (ROWS[0], [*ROWS[0][:5], 33, *ROWS[0][6:]])]
    assert abs(scores[0] - scores[1]) > 1e-4


def test_the_head_of_a_classifier_refuses_answers_that_it_cannot_see() -> None:
    """Every pooled state of it stands before the answer: the loss of pairs would stay ln 2 for ever."""
    config = GLMConfig(**SHAPE, **SPECIAL, num_labels=1)
    for pool in ("cls", "start", "pad"):
        config.pool_token = pool
        model = GLMForSequenceClassification(config).eval()
        with pytest.raises(ValueError, match="GLMForReward"):
            model(input_ids=torch.tensor([ROWS[0]]))
        model(input_ids=torch.tensor([ROWS[0][:5]]))  # a text with its <sop> alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_reward_model_is_read_by_gmask_and_the_auto_class(dtype: str, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base")
    network, tokenizer = gmask.load(base)
    model = GLMForReward(network.config).to(getattr(torch, dtype)).eval()
    model.config.architectures = ["GLMForReward"]
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    row = [[20, 21, 22, tokenizer.gmask_token_id, tokenizer.sop_token_id, 30, 31, tokenizer.eop_token_id]]
    expected = RewardScorer(model, tokenizer).score_ids(row)
    loaded, _ = gmask.load(tmp_path / "reward", dtype=dtype)
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=dtype)
    for again in (loaded, auto):
        assert isinstance(again, GLMForReward)
        assert {parameter.dtype for parameter in again.parameters()} == {getattr(torch, dtype)}
        assert RewardScorer(again, tokenizer).score_ids(row) == expected


def test_the_auto_class_reads_a_chatglm_with_a_reward_head(tmp_path: Path) -> None:
    model = build("chatglm")
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(again, ChatGLMForReward)
    ids = torch.tensor([ROWS[0]])
    assert torch.equal(again.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_model_without_the_head_is_refused(tmp_path: Path) -> None:
    network, tokenizer = gmask.load(make_folder(tmp_path))
    with pytest.raises(gmask.GmaskError, match="gives no rewards"):
        RewardScorer(network, tokenizer)


def test_ids_without_a_blank_and_sop_are_refused(tmp_path: Path) -> None:
    network, tokenizer = gmask.load(make_folder(tmp_path))
    encoder = AnswerEncoder(tokenizer, network.config, max_source=64, max_target=32)
    sop, gmask_id = encoder.special.sop, encoder.special.gmask
    good, _ = encoder.encode_question(Question("the old man"))
    assert encoder.encode_question(Question(ids=good)) == (good, 0)
    for ids in ((20, 21), (20, sop), (gmask_id, 20), (gmask_id, sop, 20, sop)):
        with pytest.raises(gmask.GmaskError, match="apply_chat_template"):
            encoder.encode_question(Question(ids=ids))
    with pytest.raises(gmask.GmaskError, match="holds <sop>"):
        encoder.encode_answer((20, sop))


def pair_of(
    chosen: float, rejected: float, kind: str = "sums", lengths: tuple[int, int] = (3, 2), rules: float = 0.5
) -> ScoredPair:
    return ScoredPair(kind, chosen, rejected, *lengths, shuffled_chosen=0.0, shuffled_rejected=0.0, rules=rules)


def test_the_report_counts_by_kind_with_intervals_beside_plain_rules() -> None:
    pairs = [pair_of(2, 0), pair_of(0, 1), pair_of(1, 1), pair_of(3, 0, "other", (1, 4))]
    report = report_rewards(pairs)
    assert report.accuracy["sums"].share == 0.5
    assert report.accuracy["all"].share == 2.5 / 4
    assert report.shuffled["all"].share == 0.5  # equal rewards are half right
    assert report.longer_wins.share == 3 / 4
    assert report.mean_margin == pytest.approx(1.0)
    assert report.length_correlation != 0
    assert [row[0] for row in report.to_rows().rows] == ["other", "sums", "all", "longer wins"]


def test_plain_rules_find_the_stock_answers_in_the_training_pairs() -> None:
    train = [("Rangoon.", "I don't know."), ("Paris.", "I don't know."), ("Rome.", "Oslo."), ("Oslo.", "Rome.")]
    rules = PlainRules.learn([*train, ("good", "one"), ("one", "two"), ("three", "one"), ("one", "four")])
    assert rules.stock == {"I don't know."}  # "one" is as often the better answer
    for chosen, rejected, expected in (
        ("Paris.", " I don't know.", 1.0),
        ("I don't know.", "Paris.", 0.0),
        ("a dog", "a dog a dog a dog", 1.0),
        ("不痛。", "不痛。不痛。不痛。不", 1.0),
        ("the old man went home", "the old m", 1.0),
        ("12 + 9 = 21", "12 + 9 = 31", 0.5),
        ("a dog", "a dog", 0.5),
    ):
        assert rules.judge(chosen, rejected) == expected
    assert PlainRules.learn(train[:1]).stock == frozenset()  # one pair says nothing
    assert not any(map(is_repeated, ("", "a", "aa", "a dog", "that is that")))
    report = report_rewards([pair_of(0, 1, rules=1.0), pair_of(1, 0, rules=0.5)])
    assert (report.rules["sums"].share, report.accuracy["sums"].share) == (0.75, 0.5)
    assert report.to_dict()["plain_rules"]["all"]["accuracy"] == 0.75
    assert report.to_rows().rows[0][-1] == "75.0 %"


@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs the corpus beside the checkout")
def test_plain_rules_reach_three_quarters_of_the_corpus() -> None:
    """Which is as much as a first reward model reached: an overall accuracy says little."""
    train, validation = (
        [json.loads(line) for line in (CORPUS / f"synthetic_pairs.{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("train", "val")
    )
    rules = PlainRules.learn((one["chosen"], one["rejected"]) for one in train)
    assert len(rules.stock) == 5
    judged = [rules.judge(one["chosen"], one["rejected"]) for one in validation]
    assert sum(judged) / len(judged) == pytest.approx(0.75, abs=0.005)


def test_wrong_sums_are_new_and_as_long_as_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))
    import sums
    import wrong_sums

    seen = sums.draw(2000, set(), random.Random(0))
    pairs = wrong_sums.draw_pairs(200, set(seen), random.Random(1))
    assert len({sums.asked_sum(pair["prompt"]) for pair in pairs} - set(seen)) == 200
    for pair in pairs:
        assert len(pair["chosen"]) == len(pair["rejected"])
        grades = [sums.grade_answer(pair["prompt"], pair[name]) for name in ("chosen", "rejected")]
        assert grades == [1.0, sums.IN_FORM]
    assert wrong_sums.draw_pairs(200, set(seen), random.Random(1)) == pairs


def test_the_interval_is_wilsons() -> None:
    share = share_of([1.0] * 41 + [0.0] * 21)
    assert (share.share, share.count) == (41 / 62, 62)
    assert (share.low, share.high) == (pytest.approx(0.5368, abs=1e-3), pytest.approx(0.7665, abs=1e-3))
    assert share_of([1.0] * 10).high == 1.0


def test_calibration_compares_probability_and_accuracy() -> None:
    certain = [pair_of(5, 0)] * 3 + [pair_of(0, 5)]
    report = report_rewards(certain)
    (found,) = report.calibration
    assert (found["pairs"], found["accuracy"]) == (4, 0.75)
    assert report.calibration_error == pytest.approx(found["probability"] - 0.75)


def test_ids_are_rewarded_as_they_are_and_a_cut_answer_gets_no_end(tmp_path: Path) -> None:
    """Silent error 8: TRL decodes a sampled answer and encodes it again, which ends an answer that had no end."""
    network, tokenizer = gmask.load(make_folder(tmp_path))
    scorer = RewardScorer(GLMForReward(network.config).eval(), tokenizer)
    prompt, _ = scorer.encoder.encode_question(Question("the old man"))
    whole = scorer.encoder.encode_answer("took his dog")
    cut, ended = scorer.score_ids([(*prompt, *whole[:-1]), (*prompt, *whole)])
    assert cut == pytest.approx(restate(scorer.model, [*prompt, *whole[:-1]], tokenizer.sop_token_id).item(), abs=1e-5)
    assert abs(cut - ended) > 1e-4
    assert scorer.score(Question("the old man"), [whole[:-1]]) == pytest.approx([cut], abs=1e-5)
