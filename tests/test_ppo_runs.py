"""Does a PPO run find known optima, resume exactly, and stop in time with its last good checkpoint?"""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gmask
from feedback_data import make_chatglm_folder, write_feedback_recipe
from gmask.errors import GmaskError
from gmask.generation.encoding import QuestionAnswerFormat
from gmask.generation.reward import RewardScorer
from gmask.generation.settings import Sampling
from gmask.models.glm import GLMConfig, GLMModel, GLMPreTrainedModel
from gmask.recipes.ppo import load_ppo_recipe, read_ppo_recipe
from gmask.training import ppo_setup, rewarded_run
from gmask.training.policies import Reference
from gmask.training.ppo import PPO, run_ppo
from gmask.training.reward import run_reward
from gmask.training.rollouts import RolloutWriter, load_function
from gmask.training.run_folder import list_checkpoints
from ppo_data import RECORDS, make_killing, read_numbers, run_until_killed, write_ppo_recipe
from test_chatglm_chat import VOCABULARY, needs_vocabulary
from tiny_folder import make_folder

SUMS = Path(__file__).parents[1] / "recipes" / "ppo-sums.yaml"

# A bandit


ARMS = """
def grade(completion_ids, **_):
    return [(ids[0] % 3) / 2 for ids in completion_ids]
"""
"""One token is one arm: its id says what it is worth."""


def first_token(folder: Path) -> Tensor:
    """The probabilities of the first token of an answer to the only prompt."""
    model, tokenizer = gmask.load(folder, device="cpu")
    form = QuestionAnswerFormat(tokenizer)
    context = form.encode("dog?", ())
    forbidden = {*form.forbidden_ids, form.special.sop, form.special.eos, *range(len(tokenizer), 448)}
    with torch.no_grad():
        logits = model(torch.tensor([[*context.ids, form.special.sop]])).logits[0, -1].float()
    logits[list(forbidden)] = -torch.inf
    return logits.softmax(-1)


def divergence_between(one: Tensor, other: Tensor) -> float:
    kept = one > 0
    return float((one[kept] * (one[kept] / other[kept]).log()).sum())


def run_bandit(folder: Path, weight: float, **sections: Any) -> Path:
    return run_ppo(
        write_ppo_recipe(
            folder,
            source=ARMS,
            records=RECORDS[:1],
            data={"max_target": 1, "validation": None},
            rollout={"prompts": 64, "answers": 8},
            kl={"weight": weight},
            ppo={"epochs": 1, "minibatches": 2},
            optimization={
                "rollouts": 30,
                "batch_size": 256,
                "learning_rate": 3e-3,
                "schedule": "linear",
                "save_every": 100,
            },
            **sections,
        )
    )


@pytest.mark.parametrize("critic", ["shared", pytest.param("own", marks=pytest.mark.slow)])
def test_a_bandit_ends_at_the_optimum_of_its_regularised_reward(tmp_path: Path, critic: str) -> None:
    folder = run_bandit(tmp_path, 0.4, critic={"kind": critic, "rate": 3.0})
    start, found = first_token(tmp_path / "model"), first_token(folder)
    worth = torch.arange(448) % 3 / 2
    optimum = start * (worth / 0.4).exp()  # p_ref exp(r / beta)
    optimum = optimum / optimum.sum()
    assert divergence_between(start, optimum) > 0.4
    assert divergence_between(found, optimum) < 0.03
    assert float(start @ worth) < 0.5
    assert float(found @ worth) == pytest.approx(float(optimum @ worth), abs=0.04)


@pytest.mark.slow
def test_a_bandit_without_a_reference_takes_the_best_arms(tmp_path: Path) -> None:
    folder = run_bandit(tmp_path, 0.0)
    assert float(first_token(folder) @ (torch.arange(448) % 3 / 2)) > 0.97
    assert "kl" not in read_numbers(tmp_path / "out")[-1]


def test_answers_of_several_tokens_learn_what_is_rewarded(tmp_path: Path) -> None:
    path = write_ppo_recipe(
        tmp_path, rollout={"prompts": 16, "answers": 4}, kl={"weight": 0.01}, ppo={"epochs": 2, "minibatches": 2},
        optimization={"rollouts": 20, "batch_size": 64, "learning_rate": 2e-3, "save_every": 100},
        source="def grade(completion_ids, **_):\n    return [-float(len(ids)) / 4 for ids in completion_ids]\n",
    )  # fmt: skip
    run_ppo(path)
    log = read_numbers(tmp_path / "out")
    assert log[-1]["length"] < 0.5 * log[0]["length"]
    assert log[-1]["reward"] > 0.5 * log[0]["reward"]
    assert log[-1]["value_loss"] < 0.5 * log[0]["value_loss"]
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results["validation"]["after"]["reward"] > results["validation"]["before"]["reward"]


# Exact resume


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"name": "lora", "rank": 2, "dropout": 0.3}, "critic": {"kind": "own"}},
        {
            "kl": {"kind": "adaptive", "early_stop": 0.01},
            "optimization": {"average": 0.9},
            "mix": {"train": "train.jsonl"},
        },
    ],
    ids=["lora", "full"],
)
def test_a_run_that_is_killed_in_the_middle_of_a_rollout_goes_on_bit_for_bit(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    sections = {**sections, "optimization": {"rollouts": 6, "save_every": 2, **sections.get("optimization", {})}}
    path = write_ppo_recipe(tmp_path, source=make_killing(tmp_path, last=8), **sections)
    run_until_killed("gmask.training.ppo:run_ppo", path)
    done = read_numbers(tmp_path / "out")
    assert done and done[-1]["rollout"] < 6 and not (tmp_path / "out" / "results.json").exists()
    resumed = run_ppo(path)
    whole = run_ppo(path, [f"run.out={tmp_path / 'whole'}"])
    assert read_numbers(tmp_path / "out") == read_numbers(tmp_path / "whole")
    names = ["adapter_model.safetensors"] if "method" in sections else ["model.safetensors"]
    for folder in ("", "-average") if "average" in sections["optimization"] else ("",):
        for name in names:
            one, other = (load_file(f"{run}{folder}/{name}") for run in (resumed, whole))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
    samples = [(tmp_path / name / "samples.md").read_text("utf-8") for name in ("out", "whole")]
    assert samples[0] == samples[1]


def test_a_finished_run_is_left_alone_and_another_recipe_is_refused(tmp_path: Path) -> None:
    path = write_ppo_recipe(tmp_path)
    folder = run_ppo(path)
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert (results["steps"], results["rollouts"], results["answers"]) == (12, 3, 48)
    assert set(results["validation"]) == {"before", "after"}
    assert {"curves.png", "README.md", "samples.md", "metrics.jsonl"} <= {p.name for p in (tmp_path / "out").iterdir()}
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert run_ppo(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(GmaskError, match=r"another recipe: kl\.weight differs"):
        run_ppo(path, ["kl.weight=0.2"])
    with pytest.raises(GmaskError, match="holds a run already"):
        run_ppo(path, resume=False)
    (module,) = tmp_path.glob("reward_of_test_*.py")
    module.write_text(module.read_text("utf-8") + "\n# changed\n", "utf-8")
    with pytest.raises(GmaskError, match=r"the content of reward\.function differs"):
        run_ppo(path)


# Other models and settings


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatglm") / "model"
    shutil.copytree(VOCABULARY.parent, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


@needs_vocabulary
@pytest.mark.parametrize("method", ["full", "lora", "p-tuning-v2"])
def test_a_chatglm_is_trained_too(tmp_path: Path, chatglm: Path, method: str) -> None:
    extra = {"prefix_length": 3} if method == "p-tuning-v2" else {}
    path = write_ppo_recipe(tmp_path, model={"name": str(chatglm)}, method={"name": method, **extra})
    folder = run_ppo(path, ["optimization.rollouts=2"])
    log = read_numbers(tmp_path / "out")
    assert log[0]["kl"] == pytest.approx(0, abs=1e-4) and log[-1]["kl"] != 0
    model, _ = gmask.load(chatglm, adapter=folder) if method != "full" else gmask.load(folder)
    assert model.config.model_type == "chatglm"


@pytest.mark.parametrize("method", ["lora", "ia3", "p-tuning-v2"])
def test_an_adapter_is_trained_and_loads(tmp_path: Path, method: str) -> None:
    extra = {"prefix_length": 3} if method == "p-tuning-v2" else {}
    path = write_ppo_recipe(tmp_path, method={"name": method, **extra}, optimization={"gradient_checkpointing": True})
    folder = run_ppo(path)
    assert folder.name == "adapter"
    gmask.load(tmp_path / "model", adapter=folder, device="cpu")
    again = write_ppo_recipe(tmp_path, method={"name": method, **extra}, model={"adapter": str(folder)})
    run_ppo(again, [f"run.out={tmp_path / 'again'}"])  # whose reference is the model with the first adapter
    assert read_numbers(tmp_path / "again")[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_a_rollout_is_left_when_the_policy_has_moved_too_far(tmp_path: Path) -> None:
    path = write_ppo_recipe(
        tmp_path, kl={"early_stop": 1e-3, "limit": None}, ppo={"epochs": 4}, optimization={"learning_rate": 0.01}
    )
    run_ppo(path)
    log = read_numbers(tmp_path / "out")
    assert len(log) < 24 and log[-1]["rollout"] == 3
    for one, following in itertools.pairwise(log):
        assert (following["rollout"] > one["rollout"]) == (one["update_kl"] > 1e-3) or one["step"] % 8 == 0


# What stops a run


def test_a_policy_that_has_left_its_reference_stops_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"kl": {"limit": 0.3}, "optimization": {"rollouts": 40, "learning_rate": 5e-4}}
    path = write_ppo_recipe(tmp_path, **sections)
    with pytest.raises(GmaskError, match=r"rollout \d+: the policy is .* nats an answer from its reference, beyond "):
        run_ppo(path)
    good = list_checkpoints(tmp_path / "out")[-1]
    log = read_numbers(tmp_path / "out")
    state = json.loads((good / "training.json").read_text("utf-8"))
    assert state["step"] < log[-1]["step"], "the weights that had left were not saved"
    with pytest.raises(GmaskError, match=str(good.name)):
        run_ppo(path)


FAILING = """
rollouts = 0
def grade(completions, **_):
    global rollouts
    rollouts += len(completions) == 16
    if rollouts < 3 or len(completions) < 16:
        return [float(len(text)) for text in completions]
    {fault}
"""


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raise OSError('no network')", "raised OSError: no network"),
        ("return None", "returned None: it must return a number for each answer"),
        ("return [float('nan')] * 16", "returned nan for answer 1 of 16: rewards must be finite"),
        ("return [1.0]", "returned 1 numbers for 16 answers"),
    ],
)
def test_a_reward_that_fails_in_the_middle_leaves_the_last_good_checkpoint(
    tmp_path: Path, fault: str, told: str
) -> None:
    path = write_ppo_recipe(tmp_path, source=FAILING.format(fault=fault))
    with pytest.raises(GmaskError, match=told) as raised:
        run_ppo(path)
    assert "\n" not in str(raised.value)
    assert [folder.name for folder in list_checkpoints(tmp_path / "out")] == ["checkpoint-00000004"]


def test_rewards_that_are_all_equal_are_counted_and_teach_nothing_wrong(tmp_path: Path) -> None:
    source = "def grade(completions, **_):\n    return [1.0] * len(completions)\n"
    long = {"instruction": "the old man took his dog " * 20, "input": "", "output": "dog"}
    run_ppo(write_ppo_recipe(tmp_path, source=source, records=[*RECORDS, long]))
    for record in read_numbers(tmp_path / "out"):
        assert record["groups_without_spread"] == 1.0
        assert all(abs(record[name]) < 1e3 for name in ("loss", "gradient_norm", "policy_loss"))  # and no NaN
    assert "2 prompts were cut to data.max_source 24" in (tmp_path / "out" / "start.txt").read_text("utf-8")


def test_the_checks_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ppo_recipe(tmp_path)
    honest = Reference.logprobs
    monkeypatch.setattr(Reference, "logprobs", lambda *args: honest(*args) + 0.001)
    with pytest.raises(GmaskError, match=r"not those of its reference: 0\.001 nats apart, more than 0\.0001; nothing"):
        run_ppo(path)
    monkeypatch.undo()
    batched = ppo_setup.collate_rollouts

    def blind(rollouts: Any, **keywords: Any) -> Any:
        batch = batched(rollouts, **keywords)
        return {**batch, "sequence_ids": torch.zeros_like(batch["sequence_ids"])}  # padding is read as text

    monkeypatch.setattr(ppo_setup, "collate_rollouts", blind)
    with pytest.raises(GmaskError, match="a batch of answers is scored otherwise than a single answer"):
        run_ppo(path)
    monkeypatch.undo()
    write = RolloutWriter.write

    def forget(self: RolloutWriter, *args: Any, **keywords: Any) -> Any:
        found = write(self, *args, **keywords)
        return [[dataclasses.replace(one, logprobs=tuple(p - 1 for p in one.logprobs)) for one in g] for g in found]

    monkeypatch.setattr(RolloutWriter, "write", forget)
    with pytest.raises(GmaskError, match="answers are scored otherwise than they were sampled"):
        run_ppo(path)
    monkeypatch.undo()
    score = PPO._score

    def shift(self: PPO, rollouts: Any) -> Any:
        logprobs, reference, values = score(self, rollouts)
        return logprobs - 0.01, reference, values

    monkeypatch.setattr(PPO, "_score", shift)
    monkeypatch.setattr(PPO, "check_start", lambda *args: None)
    with pytest.raises(GmaskError, match=r"the ratio of probabilities is not 1: 0\.01 nats"):
        run_ppo(path)
    monkeypatch.undo()
    assert not list_checkpoints(tmp_path / "out"), "nothing was learnt"
    run_ppo(path)


def test_a_model_with_dropout_passes_the_checks(tmp_path: Path) -> None:
    path = write_ppo_recipe(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    config |= {"hidden_dropout": 0.3, "attention_dropout": 0.3, "embedding_dropout": 0.3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), "utf-8")
    run_ppo(path, ["optimization.rollouts=1"])
    assert list_checkpoints(tmp_path / "out")


# A reward model


class GLMScore(GLMPreTrainedModel):
    """A reward model in the form that transformers has: a body and a linear head ``score``."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()


@pytest.fixture
def reward_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any folder that is named as a reward model is a body with a head on it."""

    def load(folder: str, **keywords: Any) -> Any:
        model, tokenizer = gmask.load(folder, **keywords)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            scorer = GLMScore(model.config)
        scorer.glm.load_state_dict(model.glm.state_dict())
        return scorer.eval(), tokenizer

    monkeypatch.setattr(rewarded_run, "load", load)


@pytest.mark.usefixtures("reward_model")
@pytest.mark.parametrize("critic", ["shared", "head", "own", "joint", "frozen"])
def test_a_reward_model_is_trained_against_and_may_be_the_critic(tmp_path: Path, critic: str) -> None:
    path = write_ppo_recipe(
        tmp_path, critic={"kind": critic}, reward={"model": str(tmp_path / "model"), "function": None}
    )
    run_ppo(path)
    log = read_numbers(tmp_path / "out")
    assert log[0]["reward"] != log[-1]["reward"] and log[0]["reward_deviation"] > 0
    weights = load_file(tmp_path / "out" / "checkpoint-00000012" / "trained.safetensors")
    kinds = {name.split(".")[0] for name in weights}
    assert kinds == {"shared": {"policy", "head"}, "head": {"policy", "head"}, "frozen": {"policy"}}.get(
        critic, {"policy", "critic", "head"}
    )
    if critic == "frozen":
        assert {record["loss"] == pytest.approx(record["policy_loss"], abs=1e-6) for record in log} == {True}
    both = write_ppo_recipe(
        tmp_path, reward={"model": str(tmp_path / "model"), "model_weight": 0.5, "function_weight": 2}
    )
    run_ppo(both, [f"run.out={tmp_path / 'both'}", "optimization.rollouts=1"])


@pytest.mark.usefixtures("reward_model")
def test_a_low_rank_critic_trains_its_layers_and_its_head(tmp_path: Path) -> None:
    path = write_ppo_recipe(
        tmp_path, method={"name": "lora"}, critic={"kind": "joint", "method": {"name": "lora", "rank": 2}},
        reward={"model": str(tmp_path / "model")},
    )  # fmt: skip
    run_ppo(path)
    weights = load_file(tmp_path / "out" / "checkpoint-00000012" / "trained.safetensors")
    assert all("lora_" in name or name == "head.weight" for name in weights)
    assert any(name.startswith("critic.") for name in weights)


# A reward model that gmask reward trained


def train_reward(folder: Path, base: Path, method: str) -> dict[str, str]:
    """What the section ``reward`` of a recipe says of a reward model that is trained here."""
    trained = run_reward(
        write_feedback_recipe(
            folder, model=base, method={"name": method}, optimization={"steps": 4, "learning_rate": 1e-2}
        )
    )
    return {"model": str(trained)} if method == "full" else {"model": str(base), "adapter": str(trained)}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["glm", "chatglm"])
def test_a_run_is_rewarded_by_the_folder_of_gmask_reward(tmp_path: Path, family: str, method: str) -> None:
    base = (make_folder if family == "glm" else make_chatglm_folder)(tmp_path / "model")
    reward = train_reward(tmp_path / "feedback", base, method)
    path = write_ppo_recipe(
        tmp_path,
        reward={**reward, "function": None, "clip": None},
        critic={"kind": "joint"},
        optimization={"rollouts": 1},
    )
    run = PPO(load_ppo_recipe(path))
    run.train()
    (log,) = {record["reward"]: record for record in read_numbers(tmp_path / "out")}.values()
    assert log["reward_deviation"] > 0
    assert run.reward_model is not None and run.reward_model.reads_ids
    answers = run.writer.write(run.contexts[:3], Sampling(max_tokens=6, min_tokens=0, temperature=1), seeds=[1, 2, 3])
    rollouts = [one for group in answers for one in group]
    scorer = RewardScorer(*gmask.load(reward["model"], device="cpu", adapter=reward.get("adapter")))
    rows = [(*one.context.ids, run.special.sop, *one.actions) for one in rollouts]
    found = run.reward_model(run.prompts.train[:3], rollouts)
    assert found == pytest.approx(scorer.score_ids(rows), abs=1e-5)


def test_a_reward_model_without_a_head_or_of_another_tokenizer_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_ppo_recipe(tmp_path, reward={"function": None}, optimization={"rollouts": 1})
    with pytest.raises(GmaskError, match=r"reward\.model .*model: has no head that scores an answer"):
        run_ppo(path, [f"reward.model={tmp_path / 'model'}"])
    with pytest.raises(GmaskError, match=r"reward\.adapter goes with reward\.model"):
        run_ppo(path, [f"reward.adapter={tmp_path}", f"reward.function={load_ppo_recipe(SUMS).reward.function}"])
    other = make_chatglm_folder(tmp_path / "other")
    reward = train_reward(tmp_path / "feedback", other, "full")
    with pytest.raises(GmaskError, match=r"critic\.kind joint needs a reward model with the same tokenizer"):
        run_ppo(path, [f"reward.model={reward['model']}", "critic.kind=joint"])
    assert not list_checkpoints(tmp_path / "out")
    capsys.readouterr()
    run_ppo(path, [f"reward.model={reward['model']}"])
    told = "".join(capsys.readouterr().err.split())  # without the ends of its lines
    assert "has another tokenizer: it scores the texts of the answers, encoded anew".replace(" ", "") in told
    assert read_numbers(tmp_path / "out")[0]["reward_deviation"] > 0


# The recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.clipp=0.1", r"ppo has no key 'clipp'; the nearest is 'clip'"),
        ("ppo.trace=1.5", r"ppo\.trace is 1\.5: it must be from 0 to 1"),
        ("ppo.minibatches=3", r"a rollout has 16 answers .* which 3 minibatches cannot share evenly"),
        ("reward.function=null", r"reward: name a function \(module:function\), or a reward model"),
        ("critic.kind=joint", r"critic\.kind joint is made of reward\.model, which is not set"),
        ("critic.method={name: lora}", r"critic\.method is of a critic of its own: with shared leave it out"),
        ("method.name=adalora", "adalora and p-tuning are not for ppo"),
        ("data.folds=3", r"data\.folds is for fine-tuning: leave it out"),
        ("task=superglue/rte", "ppo needs a task that writes"),
        ("data.max_target=96", "need 97 positions, and the model has 96"),
        ("reward.function=rewards:grade", "cannot import rewards"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(GmaskError, match=message):
        run_ppo(write_ppo_recipe(tmp_path), [override])
    assert not list_checkpoints(tmp_path / "out")


def test_the_recipe_of_the_sums_is_read_and_its_reward_checks_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Path(__file__).parents[1] / "recipes"
    recipe = load_ppo_recipe(recipes / "ppo-sums.yaml")
    assert read_ppo_recipe(recipe.to_dict()) == recipe
    monkeypatch.syspath_prepend(str(recipes))
    reward = load_function(str(recipe.reward.function), [recipes])
    answers = {
        "12 + 9 = 21": 1.0, "12 + 9 = 21.": 1.0, "12 plus 9 is 21.": 1.0, "12加9等于21。": 1.0, "12 + 9 = 22": 0.1,
        "12 + 8 = 20": 0.0, "21": 0.0, "": 0.0, "12 + 9 = 21 = 21": 0.0, "12 + 9 = 21. 1": 0.0,
    }  # fmt: skip
    assert reward(prompts=["What is 12 + 9?"] * len(answers), completions=list(answers)) == list(answers.values())
