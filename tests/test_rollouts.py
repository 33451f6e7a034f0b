"""Are answers sampled, marked and rewarded as they were written, and are the mistakes of a reward told in one line?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gmask
from gmask.errors import GmaskError
from gmask.generation.predict import SampleReader
from gmask.generation.settings import Sampling
from gmask.recipes.tuning import TuningDataSettings
from gmask.tasks.records import Sample
from gmask.tasks.task import load_task
from gmask.training.policies import WHOLE_VOCABULARY, ActorCritic, TokenDistribution
from gmask.training.rollouts import (
    FunctionReward,
    ModelReward,
    Rollout,
    RolloutWriter,
    check_lengths,
    collate_rollouts,
    count_groups_without_spread,
    describe_rollouts,
    load_function,
    read_prompt_splits,
    rollout_seeds,
)
from tuning_data import write_lines
from tuning_models import Pair, make_chatglm, make_glm

SAMPLES = [Sample(text="dog?"), Sample(text="The old man took his dog"), Sample(text="我今天")]


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_glm(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["glm", "chatglm"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue("glm") if request.param == "glm" else make_chatglm()


def make_writer(pair: Pair, kind: Any = "chat") -> RolloutWriter:
    reader = SampleReader(pair[1], pair[0].config, kind, max_source=24)
    return RolloutWriter(*pair, reader, rows=5)


def write(writer: RolloutWriter, temperature: float = 1.0, most: int = 5) -> list[Rollout]:
    sampling = Sampling(n=4, max_tokens=most, min_tokens=0, temperature=temperature)
    found = writer.write(writer.read(SAMPLES), sampling, seeds=rollout_seeds(0, 0, range(len(SAMPLES))))
    return [one for group in found for one in group]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_what_samples_is_what_scores(pair: Pair, temperature: float) -> None:
    writer = make_writer(pair)
    rollouts = write(writer, temperature)
    special = writer.reader.special
    assert len({one.actions for one in rollouts}) > 3
    for one in rollouts:
        assert 1 <= len(one.actions) <= 6 and len(one.logprobs) == len(one.actions)
        assert one.is_finished == (one.actions[-1] == special.eop)
        assert special.eop not in one.actions[:-1], "a cut answer has no end, and a finished one has one"
        assert not set(one.actions) & set(writer.forbidden_ids)
    assert {special.sop} <= set(writer.forbidden_ids)
    batch = collate_rollouts(rollouts, sop=special.sop, pad=special.pad)
    with torch.no_grad():
        module = ActorCritic(pair[0], WHOLE_VOCABULARY)
        together = module(batch).logprobs
    reported = [value for one in rollouts for value in one.logprobs]
    assert together.tolist() == pytest.approx(reported, abs=2e-5)


def test_the_frequencies_of_sampled_tokens_are_the_scored_probabilities(glm: Pair) -> None:
    """2,000 first tokens at temperature 2 against the scored distribution: a chi-squared test."""
    writer, count = make_writer(glm), 2000
    writer.stepper.scheduler.budget = type(writer.stepper.scheduler.budget)(rows=count)
    sampling = Sampling(n=count // 2, max_tokens=1, min_tokens=0, temperature=2.0)
    found = [one for seed in (1, 2) for one in writer.write(writer.read(SAMPLES[:1]), sampling, seeds=[seed])[0]]
    seen = torch.bincount(torch.tensor([one.actions[0] for one in found]), minlength=448)
    distribution = TokenDistribution(2.0, writer.forbidden_ids)
    tokens = torch.arange(448)
    special, context = writer.reader.special, found[0].context
    with torch.no_grad():
        logits = glm[0](torch.tensor([[*context.ids, special.sop]])).logits[0, -1]
    expected = count * distribution.score(logits.expand(448, -1), tokens)[0].exp()
    assert float(expected.sum()) == pytest.approx(count, rel=1e-4)
    often = expected > 5
    rest = torch.stack((seen[~often].sum(), expected[~often].sum()))
    statistic = float(((seen - expected)[often] ** 2 / expected[often]).sum() + (rest[0] - rest[1]) ** 2 / rest[1])
    freedom = int(often.sum())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert int(seen[list(writer.forbidden_ids)].sum()) == 0


def test_answers_hang_on_their_seeds_alone(glm: Pair) -> None:
    writer = make_writer(glm)
    contexts, sampling = writer.read(SAMPLES), Sampling(n=2, max_tokens=4, min_tokens=0, temperature=1.0)
    seeds = rollout_seeds(3, 7, range(3))
    together = writer.write(contexts, sampling, seeds=seeds)
    alone = [writer.write([context], sampling, seeds=[seed])[0] for context, seed in zip(contexts, seeds, strict=True)]
    assert [[one.actions for one in group] for group in together] == [[one.actions for one in g] for g in alone]
    assert len({*seeds, *rollout_seeds(3, 8, range(3)), *rollout_seeds(4, 7, range(3))}) == 9
    assert rollout_seeds(3, 7, [1]) == seeds[1:2]


def test_prompts_need_no_answers_and_one_blank(glm: Pair, tmp_path: Path) -> None:
    write_lines(tmp_path / "p.jsonl", [{"instruction": "dog?", "input": ""}, {"instruction": "小猫", "input": ""}])
    data = TuningDataSettings(train="p.jsonl", root=str(tmp_path), validation=0.5)
    found = read_prompt_splits(load_task("chat/alpaca"), data, seed=0)
    assert (len(found.train), len(found.validation)) == (1, 1)
    with pytest.raises(GmaskError, match="of the kind cloze: ppo needs a task that writes: chat, seq2seq, infill"):
        read_prompt_splits(load_task("superglue/rte"), data, seed=0)
    with pytest.raises(GmaskError, match=r"the text has 2 blanks, and ppo answers one"):
        make_writer(glm, "infill").read([Sample(text="The [MASK] dog [MASK].")])
    with pytest.raises(GmaskError, match="need 200 positions, and the model has 96"):
        check_lengths(glm[0].config, TuningDataSettings(train="x", max_source=200, max_target=8))
    check_lengths(glm[0].config, TuningDataSettings(train="x", max_source=96, max_target=95))


# Rewards


ROLLOUTS = [
    Rollout(gmask.generation.encoding.Context((2, 20, 7), (2,)), (30, 31, 9), True, "a b", ()),
    Rollout(gmask.generation.encoding.Context((2, 21, 7), (2,)), (32,), False, "c", ()),
]
FAULTS = {
    "raises": ("raise RuntimeError('no network')", r"raised RuntimeError: no network$"),
    "none": ("return None", r"returned None: it must return a number for each answer$"),
    "one none": ("return [1.0, None]", r"returned \[1\.0, None\]: it must return a number"),
    "text": ("return ['good', 'bad']", r"returned \['good', 'bad'\]: it must return a number"),
    "too few": ("return [1.0]", "returned 1 numbers for 2 answers$"),
    "nan": ("return [1.0, float('nan')]", "returned nan for answer 2 of 2: rewards must be finite$"),
    "infinite": ("return [float('-inf'), 0]", "returned -inf for answer 1 of 2: rewards must be finite$"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_function_at_fault_is_told_in_one_line(tmp_path: Path, fault: str) -> None:
    body, message = FAULTS[fault]
    name = f"reward_at_fault_{list(FAULTS).index(fault)}"
    (tmp_path / f"{name}.py").write_text(f"def grade(**_):\n    {body}\n", "utf-8")
    reward = FunctionReward(f"{name}:grade", [tmp_path])
    with pytest.raises(GmaskError, match=message) as raised:
        reward(SAMPLES[:2], ROLLOUTS)
    assert str(raised.value).startswith(f"reward.function {name}:grade ") and "\n" not in str(raised.value)


def test_a_reward_function_gets_texts_ids_and_known_answers(tmp_path: Path) -> None:
    (tmp_path / "reward_that_looks.py").write_text(
        "seen = []\ndef grade(**given):\n    seen.append(given)\n    return [1, 2.5]\n", "utf-8"
    )
    samples = [Sample(text="2 + 2?", answers=("4",)), Sample(text="dog")]
    reward = FunctionReward("reward_that_looks:grade", [tmp_path])
    assert reward(samples, ROLLOUTS) == [1.0, 2.5]
    assert reward.path == tmp_path / "reward_that_looks.py"
    (given,) = __import__("sys").modules["reward_that_looks"].seen
    assert given == {
        "prompts": ["2 + 2?", "dog"],
        "completions": ["a b", "c"],
        "completion_ids": [[30, 31, 9], [32]],
        "references": [["4"], []],
        "finished": [True, False],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grade", "reward.function is 'grade': write module:function"),
        ("no_such_module_anywhere:grade", r"cannot import no_such_module_anywhere \(No module named"),
        ("math:sqroot", "math has no function 'sqroot'; the nearest is 'sqrt'"),
    ],
)
def test_a_function_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(GmaskError, match=message):
        load_function(name)


class TinyReward(nn.Module):
    """A reward model: the body of a model, and a head."""

    def __init__(self, model: Any, seed: int = 0) -> None:
        super().__init__()
        self.base_model, self.config = model.base_model, model.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.score = nn.Linear(model.config.hidden_size, 1)

    @property
    def device(self) -> torch.device:
        return self.score.weight.device


def test_a_reward_model_scores_the_last_sampled_token_and_values_those_before(pair: Pair) -> None:
    writer = make_writer(pair)
    rollouts = write(writer)
    model = TinyReward(pair[0])
    reward = ModelReward(model, pair[1], pair[1], batch_size=3)
    assert reward.reads_ids
    scores = reward([SAMPLES[0]] * len(rollouts), rollouts)
    values = reward.values(rollouts).split([len(one.actions) for one in rollouts])
    sop = writer.reader.special.sop
    for one, score, value in zip(rollouts, scores, values, strict=True):
        ids = torch.tensor([[*one.context.ids, sop, *one.actions]])
        with torch.no_grad():
            plain = model.score(model.base_model(input_ids=ids).last_hidden_state[0, len(one.context.ids) :])[:, 0]
        assert score == pytest.approx(float(plain[-1]), abs=1e-5)
        assert value.tolist() == pytest.approx(plain[:-1].tolist(), abs=1e-5)


def test_a_reward_model_of_another_tokenizer_reads_the_text_anew(glm: Pair) -> None:
    chatglm = make_chatglm()
    rollouts = write(make_writer(glm))
    reward = ModelReward(TinyReward(chatglm[0]), glm[1], chatglm[1], batch_size=4)
    assert not reward.reads_ids
    scores = reward([SAMPLES[0]] * len(rollouts), rollouts)
    assert len(scores) == len(rollouts)
    by_text = {(one.text, one.is_finished): score for one, score in zip(rollouts, scores, strict=True)}
    for one, score in zip(rollouts, scores, strict=True):
        assert score == pytest.approx(by_text[one.text, one.is_finished], abs=1e-5)
    with pytest.raises(GmaskError, match="has no head that scores an answer"):
        ModelReward(glm[0], glm[1], glm[1], batch_size=4)


def test_equal_rewards_and_answers_without_text_are_counted() -> None:
    assert count_groups_without_spread([1, 1, 0, 1, 2, 2], 2) == pytest.approx(2 / 3)
    context = ROLLOUTS[0].context
    rollouts = [
        ROLLOUTS[0],
        ROLLOUTS[1],
        Rollout(context, (9,), True, "", ()),
        Rollout(context, (3, 4, 9), True, "", ()),  # control tokens alone
    ]
    numbers = describe_rollouts(rollouts, [1.0, 1.0, 0.0, 0.0], 2)
    assert numbers == {
        "reward": 0.5,
        "reward_deviation": 0.5,
        "length": 2.0,
        "repetition": 0.0,
        "truncated": 0.25,
        "without_text": 0.5,
        "groups_without_spread": 1.0,
    }
