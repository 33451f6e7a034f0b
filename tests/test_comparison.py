"""Are win rates, repetition and warnings those of cases that were worked out by hand?"""

import math
from typing import Any

import pytest
import torch

from conftest import GMASK, SOP
from gmask.evaluation.comparison import (
    AnswerFigures,
    JudgedAnswer,
    Lead,
    are_of_like_length,
    find_lead,
    share_repeated,
    warn_of_change,
    warn_of_lengths,
)
from gmask.evaluation.rewards import WinRate, share_of
from gmask.generation.encoding import Context
from gmask.generation.sampling import find_repeats
from gmask.recipes.ppo import read_ppo_recipe
from gmask.training.pipeline_report import StageComparison, StageFigures, score_tokens
from gmask.training.rollout_report import RolloutResults, render_rollout_card
from gmask.training.rollouts import Rollout
from tuning import BUILDERS


def answer(length: int, reward: float, first: int = 20) -> JudgedAnswer:
    return JudgedAnswer(tuple(range(first, first + length)), reward)


def test_a_win_rate_counts_ties_half_and_has_wilsons_interval() -> None:
    ours = [[answer(4, 1.0)], [answer(4, 0.0)], [answer(4, 0.5)], [answer(9, 1.0)]]
    theirs = [[answer(4, 0.0, 40)], [answer(4, 1.0, 40)], [answer(4, 0.5, 40)], [answer(4, 0.0)]]
    lead = find_lead(ours, theirs)
    assert (lead.all.share, lead.all.count) == (2.5 / 4, 4)
    z, n, p = 1.959964, 4, 2.5 / 4
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (lead.all.low, lead.all.high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert lead.like_length is not None
    assert (lead.like_length.share, lead.like_length.count) == (0.5, 3)  # the last pair has 9 and 4 tokens


def test_the_same_answer_is_a_tie_whatever_the_last_digit_of_its_reward() -> None:
    assert find_lead([[answer(3, 0.1234567)]], [[answer(3, 0.1)]]).all.share == 0.5
    assert find_lead([[answer(3, 0.12345678)]], [[answer(3, 0.12345679, 40)]]).all.share == 0.5
    assert find_lead([[answer(3, 0.1235)]], [[answer(3, 0.1234, 40)]]).all.share == 1.0


def test_several_answers_to_a_prompt_meet_each_other_and_count_once() -> None:
    lead = find_lead([[answer(3, 1.0), answer(3, 0.0)]], [[answer(3, 0.5, 40), answer(30, 0.0, 40)]])
    assert (lead.all.share, lead.all.count) == ((1 + 1 + 0 + 0.5) / 4, 1)
    assert lead.like_length is not None and lead.like_length.share == 0.5


@pytest.mark.parametrize(
    ("one", "other", "alike"), [(1, 2, True), (1, 3, False), (10, 11, True), (27, 30, True), (26, 30, False)]
)
def test_like_lengths_differ_by_a_tenth_or_a_token(one: int, other: int, alike: bool) -> None:
    assert are_of_like_length(answer(one, 0), answer(other, 0)) is alike
    assert are_of_like_length(answer(other, 0), answer(one, 0)) is alike


def test_without_pairs_of_like_length_there_is_no_rate_of_them() -> None:
    assert find_lead([[answer(3, 1.0)]], [[answer(9, 0.0)]]).like_length is None


@pytest.mark.parametrize(
    ("ids", "share"), [([1, 2, 3], 0), ([1, 2], 0), ([], 0), ([5] * 6, 3 / 4), ([1, 2, 3, 1, 2, 3], 1 / 4)]
)
def test_what_is_repeated_is_what_a_ban_on_repetition_would_forbid(ids: list[int], share: float) -> None:
    assert share_repeated(ids) == pytest.approx(share)
    banned = sum(ids[end] in find_repeats(ids[:end], 3) for end in range(2, len(ids)))
    assert share_repeated(ids) == pytest.approx(banned / max(1, len(ids) - 2))


BEFORE = AnswerFigures(reward=0.5, length=10.0, repetition=0.02, entropy=0.4)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (AnswerFigures(0.6, 10.0, 0.02, 0.4), []),
        (AnswerFigures(0.6, 15.1, 0.02, 0.4), ["grew with the reward, from 10 to 15 tokens"]),
        (AnswerFigures(0.6, 14.9, 0.02, 0.4), []),
        (AnswerFigures(0.4, 30.0, 0.5, 0.4), []),  # the reward fell
        (AnswerFigures(0.6, 10.0, 0.08, 0.4), ["repeat themselves with the reward, from 2 % of their 3-grams to 8 %"]),
        (AnswerFigures(0.4, 10.0, 0.02, 0.03), ["the entropy is nearly gone"]),
        (AnswerFigures(0.6, 20.0, 0.2, 0.01), ["grew", "repeat", "entropy"]),
    ],
)
def test_a_change_is_warned_of_if_it_may_be_what_the_reward_rose_by(after: AnswerFigures, words: list[str]) -> None:
    found = warn_of_change(BEFORE, after)
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


def rate(wins: int, of: int) -> WinRate:
    return share_of([1.0] * wins + [0.0] * (of - wins))


@pytest.mark.parametrize(
    ("lead", "warns"),
    [
        (Lead(rate(80, 100), rate(26, 50)), True),
        (Lead(rate(80, 100), None), True),
        (Lead(rate(80, 100), rate(40, 50)), False),
        (Lead(rate(80, 100), rate(8, 10)), False),  # as high, though of few
        (Lead(rate(55, 100), rate(10, 50)), False),  # no lead that could be gone
    ],
)
def test_a_lead_that_is_gone_among_like_lengths_is_warned_of(lead: Lead, warns: bool) -> None:
    assert bool(warn_of_lengths(lead)) is warns


# The reports


def stage_of(name: str, reward: float, lead: Lead | None, **changed: Any) -> StageFigures:
    values: dict[str, Any] = dict(length=10.0, truncated=0.0, repetition=0.0, entropy=0.4, kl=0.1)
    return StageFigures(
        name=name, rewards={"judge": reward}, leads={} if lead is None else {"judge": lead}, texts=["a|b"],
        text_rewards={"judge": [reward]}, **{**values, **changed},
    )  # fmt: skip


def test_a_comparison_warns_by_stage_and_comes_back_from_json() -> None:
    lead = Lead(rate(80, 100), rate(50, 100))
    stages = [stage_of("sft", 0.5, None), stage_of("dpo", 0.4, Lead(rate(40, 100), None)),
              stage_of("ppo", 0.9, lead, length=30.0)]  # fmt: skip
    losses = {name: {"text_loss": 3.0, "reply_loss": None} for name in ("sft", "dpo", "ppo")}
    comparison = StageComparison(["question"], ["judge"], {"greedy": stages}, losses)
    warnings = comparison.warnings()
    assert [line.split(":")[0] for line in warnings] == ["ppo, greedy answers, by judge"] * 2
    assert "grew with the reward" in warnings[0] and "only 50.0 %" in warnings[1]
    assert StageComparison.from_dict(comparison.to_dict()) == comparison
    assert "| ppo | judge | 0.900 | 80.0 [71.1, 86.7] | 50.0 [40.4, 59.6] | 100 |" in comparison.summary()


@pytest.mark.parametrize("kind", BUILDERS)
def test_entropy_and_divergence_are_those_of_the_whole_distribution(kind: str) -> None:
    model, other = BUILDERS[kind](), BUILDERS[kind](seed=1)
    contexts = [Context((20, 21, 22, GMASK), (3,)), Context((40, GMASK), (1,))]
    rollouts = [Rollout(context, (30, 31, 32), True, "", ()) for context in contexts]
    found = score_tokens(model, other, rollouts, sop=SOP, pad=0)
    expected = []
    for context in contexts:
        ids = torch.tensor([[*context.ids, SOP, 30, 31]])
        start = len(context.ids)
        with torch.no_grad():
            one, two = (part(ids).logits[0, start:].double().log_softmax(-1) for part in (model, other))
        expected.append(torch.stack((-(one.exp() * one).sum(-1), (one.exp() * (one - two)).sum(-1)), -1))
    assert torch.allclose(found.double(), torch.cat(expected), atol=1e-5)
    assert (found[:, 1] > 0).all()
    assert torch.equal(score_tokens(model, model, rollouts, sop=SOP, pad=0)[:, 1], torch.zeros(6))


FIRST = {
    "step": 1, "rollout": 1, "seconds": 1.0, "reward": 0.5, "kl": 0.0, "entropy": 1.0, "length": 10.0,
    "repetition": 0.0, "truncated": 0.0, "without_text": 0.0, "groups_without_spread": 0.25,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"reward": 0.6}, []),
        ({"reward": 0.6, "length": 16.0}, ["answers grew with the reward"]),
        ({"reward": 0.6, "repetition": 0.3}, ["answers repeat themselves with the reward"]),
        ({"entropy": 0.05}, ["the entropy is nearly gone"]),
        ({"groups_without_spread": 0.95}, ["all answers had the same reward"]),
        ({"without_text": 0.1}, ["10 % of the answers had no text"]),
    ],
)
def test_a_ppo_run_warns_in_its_card_and_says_how_many_groups_have_no_spread(
    changed: dict[str, float], words: list[str]
) -> None:
    recipe = read_ppo_recipe(
        {"run": {"out": "out"}, "task": "chat/alpaca", "data": {"train": "train.jsonl"}, "method": {"name": "full"},
         "reward": {"function": "rewards:grade"}, "optimization": {"rollouts": 2}}
    )  # fmt: skip
    last = {**FIRST, "step": 2, "rollout": 2, **changed}
    results = RolloutResults("PPO", recipe, "task", [FIRST, last], None, None, 1, 1, 1)
    card = render_rollout_card(results)
    assert card.count("- warning: ") == len(words)
    assert all(word in card for word in words)
    share = 100 * last["groups_without_spread"]
    assert f"- prompts whose answers all had the same reward: 25 % at first, {share:.0f} % at last" in card
    assert f"| groups_without_spread | 0.25 | {last['groups_without_spread']:.4g} |" in card
    assert results.to_dict()["last_rollout"]["repetition"] == last["repetition"]
