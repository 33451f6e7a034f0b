"""Do GRPO and RLOO learn from the ids that were sampled, as single rows give them, and stop where it is wrong?"""

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import gmask
from feedback_data import make_chatglm_folder
from gmask.errors import GmaskError
from gmask.generation.reward import RewardScorer
from gmask.recipes.grpo import load_grpo_recipe, read_grpo_recipe
from gmask.training.grpo import GRPO, NEVER, run_grpo
from gmask.training.reward import as_reward_model
from gmask.training.rollouts import RolloutWriter
from grpo_data import write_grpo_recipe
from ppo_data import make_killing, read_numbers, run_until_killed
from tiny_folder import make_folder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")

FOLDERS = {"glm": make_folder, "chatglm": make_chatglm_folder}
LORA = {"name": "lora", "rank": 4, "targets": "all-linear"}


# The losses


def restate(run: GRPO, model: Any, one: Any) -> Tensor:
    """The log-probability of each token of an answer: one row, with a layout and a mask that are written down here."""
    prompt = [*one.context.ids, run.special.sop]
    row, start, blank = [*prompt, *one.actions], len(prompt) - 1, one.context.blanks[0]
    first = [*range(start), *[blank] * (len(row) - start)]
    second = [*[0] * start, *range(1, len(row) - start + 1)]
    visible = torch.ones(len(row), len(row), dtype=torch.long).tril()
    visible[:, :start] = 1
    states = model.base_model(
        input_ids=torch.tensor([row]), layout=torch.tensor([[first, second]]), attention_mask=visible[None, None]
    ).last_hidden_state
    logits = F.linear(states[0, start:-1], model.get_output_embeddings().weight).double() / 0.8
    logits[:, list(run.writer.forbidden_ids)] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(one.actions)[:, None])[:, 0]


def restate_grpo(rewards: Tensor, new: Any, old: Any, reference: Any, kind: str) -> Tensor:
    groups = rewards.view(-1, 4)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    answers = []
    for advantage, now, before, other in zip(advantages, new, old, reference, strict=True):
        ratio = (now - before).exp()
        kl = ((other - now).exp() - (other - now) - 1) * ratio
        answers.append(0.3 * kl - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    if kind == "grpo":
        return torch.stack([one.mean() for one in answers]).mean()
    return torch.cat(answers).sum() / (16 * 6 if kind == "dr_grpo" else sum(len(one) for one in answers))


def restate_rloo(rewards: Tensor, new: Any, old: Any, reference: Any, kind: str) -> Tensor:
    paid = rewards - 0.3 * torch.stack([(b - r).sum() for b, r in zip(old, reference, strict=True)])
    groups = paid.view(-1, 4)
    advantages = (groups - (groups.sum(1, keepdim=True) - groups) / 3).flatten()
    ratio = torch.stack([(n - b).sum() for n, b in zip(new, old, strict=True)]).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def move(model: Any, seed: int, *, by: float) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn_like(parameter)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 2e-6)], ids=["float32", "float64"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "rloo"])
def test_the_loss_is_that_of_single_rows(
    kind: str, dtype: torch.dtype, close: float, method: str, loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's head gives log-probabilities in float32, whatever the dtype of the model."""
    FOLDERS[kind](tmp_path / "model")
    path = write_grpo_recipe(
        tmp_path, algorithm="rloo" if loss == "rloo" else "grpo", rollout={"temperature": 0.8},
        method=LORA if method == "lora" else {"name": "full"}, optimization={"batch_size": 16},
        trl={"beta": 0.3, "num_iterations": 2, **({} if loss == "rloo" else {"loss_type": loss})},
    )  # fmt: skip
    run = GRPO(load_grpo_recipe(path), folders=[tmp_path])
    run._load()
    trainer = run._make_trainer()
    run.accelerator = trainer.accelerator
    monkeypatch.setattr(run, "check_start", lambda *args: None)  # the policy is no longer its reference
    for model in filter(None, (trainer.model, trainer.ref_model)):
        model.to(dtype)
    policy, adapted, by = run.policy, method == "lora", 0.1 if method == "lora" else 0.02
    move(trainer.model, 1, by=by)
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"prompt": "", "number": n // 4} for n in range(16)])
    assert len({len(run.prompt_ids(one)) for one in run.rollouts}) > 1, "prompts are unequal"
    rewards = torch.tensor(run.clip(run.reward([run.prompts.train[n // 4] for n in range(16)], run.rollouts))).double()
    with torch.no_grad():
        old = [restate(run, policy, one) for one in run.rollouts]
        with trainer.model.disable_adapter() if adapted else nullcontext():
            start = policy if adapted else trainer.ref_model
            reference = [restate(run, start, one) for one in run.rollouts]
        move(trainer.model, 2, by=by)
        new = [restate(run, policy, one) for one in run.rollouts]
        trainer.current_gradient_accumulation_steps = 1
        found = trainer._compute_loss(trainer.model, output)
        expected = (restate_rloo if loss == "rloo" else restate_grpo)(rewards, new, old, reference, loss)
    assert abs(expected) > 2e-4
    assert found.item() == pytest.approx(expected.item(), abs=close)


# Runs


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_run_begins_at_the_model_itself_and_learns(algorithm: str, method: str, tmp_path: Path) -> None:
    path = write_grpo_recipe(
        tmp_path, algorithm=algorithm, rollout={"prompts": 16},
        method={"name": "full"} if method == "full" else {**LORA, "name": method},
        model={"quantize": "int8"} if method == "qlora" else {}, trl={"beta": 0.01},
        optimization={"rollouts": 12, "batch_size": 64, "learning_rate": 2e-3 if method == "full" else 2e-2},
        source="def grade(completion_ids, **_):\n    return [-float(len(ids)) / 4 for ids in completion_ids]\n",
    )  # fmt: skip
    folder = run_grpo(path)
    log, out = read_numbers(tmp_path / "out"), tmp_path / "out"
    assert log[0]["kl" if algorithm == "rloo" else "kl_k3"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["reward"] > 0.75 * log[0]["reward"] and log[-1]["length"] < 0.8 * log[0]["length"]
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert (results["steps"], results["rollouts"], results["answers"]) == (12, 12, 768)
    assert results["validation"]["after"]["reward"] >= results["validation"]["before"]["reward"]
    assert {"curves.png", "README.md", "samples.md", "start.txt", "recipe.yaml"} <= {p.name for p in out.iterdir()}
    assert f"trained with {algorithm.upper()}" in (folder / "README.md").read_text("utf-8")
    names = load_file(next(folder.glob("*.safetensors"))).keys()
    assert not any("lm_head" in name for name in names), "what forbids tokens is not saved"
    adapter = {} if method == "full" else {"adapter": folder, "quantize": "int8" if method == "qlora" else None}
    again, _ = gmask.load(folder if method == "full" else tmp_path / "model", device="cpu", **adapter)
    plain, _ = gmask.load(tmp_path / "model", device="cpu")
    ids = torch.tensor([[20, 21, plain.config.gmask_token_id, plain.config.sop_token_id, 30]])
    assert not torch.equal(again(input_ids=ids).logits, plain(input_ids=ids).logits)
    written = (out / "results.json").stat().st_mtime_ns
    assert run_grpo(path) == folder and (out / "results.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_chatglm_is_trained_too(algorithm: str, tmp_path: Path) -> None:
    make_chatglm_folder(tmp_path / "model")
    run_grpo(write_grpo_recipe(tmp_path, algorithm=algorithm, optimization={"rollouts": 2}))
    assert len(read_numbers(tmp_path / "out")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "method"), [("grpo", {"name": "full"}), ("rloo", {**LORA, "dropout": 0.3})], ids=["grpo", "rloo"]
)
def test_a_run_that_is_killed_in_the_middle_of_a_rollout_goes_on_bit_for_bit(
    algorithm: str, method: dict[str, Any], tmp_path: Path
) -> None:
    """Six prompts, four in a rollout: the third begins a second round of them."""
    path = write_grpo_recipe(
        tmp_path, algorithm=algorithm, source=make_killing(tmp_path, last=8), method=method,
        grpo={"minibatches": 2}, trl={"num_iterations": 2}, optimization={"rollouts": 6, "save_every": 2},
    )  # fmt: skip
    run_until_killed("gmask.training.grpo:run_grpo", path)
    assert not (tmp_path / "out" / "results.json").exists() and list((tmp_path / "out").glob("checkpoint-*"))
    resumed = run_grpo(path)
    whole = run_grpo(path, [f"run.out={tmp_path / 'whole'}"])
    logs = [
        [{name: value for name, value in line.items() if name != "step_time"} for line in read_numbers(tmp_path / name)]
        for name in ("out", "whole")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 24
    name = "model.safetensors" if method["name"] == "full" else "adapter_model.safetensors"
    one, other = (load_file(folder / name) for folder in (resumed, whole))
    assert all(torch.equal(one[key], other[key]) for key in other)
    samples = [(tmp_path / name / "samples.md").read_text("utf-8") for name in ("out", "whole")]
    assert samples[0] == samples[1]
    with pytest.raises(GmaskError, match=r"another recipe: trl\.beta differs"):
        run_grpo(path, ["trl.beta=0.2"])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_make_the_steps_of_one(algorithm: str, method: str, tmp_path: Path) -> None:
    path = write_grpo_recipe(tmp_path, algorithm=algorithm, method={"name": method})
    start = {
        "one": [sys.executable, "-m", "gmask"],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "gmask"],
    }
    for name, command in start.items():
        arguments = [*command, "grpo", path, f"run.out={tmp_path / name}", "run.threads=1"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    one, two = (read_numbers(tmp_path / name) for name in start)
    for ours, theirs in zip(one, two, strict=True):
        assert (ours["length"], ours["truncated"]) == (theirs["length"], theirs["truncated"]), "the same answers"
        for name in ("loss", "gradient_norm", "reward", "entropy", "groups_without_spread"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)


# What is sampled, and what it is worth


def prepared(folder: Path, **sections: Any) -> GRPO:
    """A run with its models, whose trainer has made no step."""
    run = GRPO(load_grpo_recipe(write_grpo_recipe(folder, **sections)), folders=[folder])
    run._load()
    run._make_trainer()
    return run


@torch.no_grad()
def test_sop_is_never_sampled_and_has_no_probability_anywhere(tmp_path: Path) -> None:
    run = prepared(tmp_path, model={"dtype": None})
    sop = run.special.sop
    assert sop in run.writer.forbidden_ids
    run.policy.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits + 1e3 * (torch.arange(logits.shape[-1]) == sop)
    )  # far more probable than all others, were it not forbidden
    for temperature in (1.0, 0.5):
        run.recipe = dataclasses.replace(
            run.recipe, rollout=dataclasses.replace(run.recipe.rollout, temperature=temperature)
        )
        run.sample([n // 4 for n in range(16)])
        assert all(sop not in one.actions for one in run.rollouts)
    ids = torch.tensor([[20, 21, run.special.gmask, sop, 30]])
    for model in (run.policy, run.trainer.ref_model, run.policy.to(torch.bfloat16)):
        logits = model(input_ids=ids).logits.float()
        assert float(logits[..., run.writer.forbidden_ids].amax()) < 0.2 * NEVER
        assert float(logits.softmax(-1)[..., run.writer.forbidden_ids].sum()) == 0


def test_a_reward_model_scores_the_sampled_ids_and_no_end_that_was_not_written(tmp_path: Path) -> None:
    """Silent error 8: TRL templates the text again, which ends answers that were cut."""
    model, tokenizer = gmask.load(make_folder(tmp_path / "model"))
    torch.manual_seed(3)
    judge = as_reward_model(model)
    torch.nn.init.normal_(judge.score.weight)
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    run = prepared(tmp_path, reward={"model": str(tmp_path / "judge"), "function": None, "clip": None})
    run.sample([n // 4 for n in range(16)])
    assert {one.is_finished for one in run.rollouts} == {True, False}
    found = run.score([one.actions for one in run.rollouts], lambda *_: None)
    rows = [(*run.prompt_ids(one), *one.actions) for one in run.rollouts]
    assert found == pytest.approx(RewardScorer(judge, tokenizer, 4).score_ids(rows), abs=1e-4)


def test_equal_rewards_are_counted_and_teach_nothing(tmp_path: Path) -> None:
    path = write_grpo_recipe(tmp_path, source="def grade(completions, **_):\n    return [0.5] * len(completions)\n")
    run_grpo(path, ["trl.beta=0"])
    log = read_numbers(tmp_path / "out")
    assert [line["groups_without_spread"] for line in log] == [1, 1, 1]
    assert all(abs(line["loss"]) < 1e-7 for line in log)
    assert "of most prompts all answers had the same reward" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_an_answer_that_was_cut_has_the_score_of_the_recipe_or_teaches_nothing(tmp_path: Path) -> None:
    path = write_grpo_recipe(tmp_path, reward={"cut": -2.0})
    run_grpo(path)
    assert read_numbers(tmp_path / "out")[0]["reward"] < -1
    run_grpo(path, ["trl.mask_truncated_completions=true", f"run.out={tmp_path / 'masked'}"])


# What stops a run


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("    raise KeyError('x')", "raised KeyError"),
        ("    return None", "returned None: it must return a number for each answer"),
        ("    return [None] * len(completions)", "it must return a number for each answer"),
        ("    return [float('nan')] * len(completions)", r"returned nan for answer 1 of \d+: rewards must be finite"),
        ("    return [1.0]", r"returned 1 numbers for \d+ answers"),
    ],
)
def test_rewards_that_are_none_stop_the_run_in_one_line(source: str, reason: str, tmp_path: Path) -> None:
    path = write_grpo_recipe(tmp_path, source=f"def grade(completions, **_):\n{source}\n")
    for extra in ([], ["data.validation=null"]):
        with pytest.raises(GmaskError, match=reason):
            run_grpo(path, extra)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_policy_that_has_left_its_reference_stops_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = write_grpo_recipe(
        tmp_path, grpo={"limit": 0.3}, trl={"beta": 0.01}, optimization={"rollouts": 40, "learning_rate": 5e-4}
    )
    with pytest.raises(GmaskError, match=r"rollout \d+: the policy is .* nats an answer from its reference") as error:
        run_grpo(path)
    rollout = int(str(error.value).split()[1].rstrip(":"))
    kept = sorted(int(folder.name.rpartition("-")[2]) for folder in (tmp_path / "out").glob("checkpoint-*"))
    assert kept[-1] == rollout - 2, "the policy that sampled so far away is that of the step before"
    assert f"checkpoint-{kept[-1]}" in str(error.value)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_the_checks_before_the_first_step(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_grpo_recipe(tmp_path, algorithm=algorithm, trl={"num_iterations": 2}, data={"validation": None})
    make = GRPO._make_trainer

    def breaking(change: Any) -> Any:
        def made(self: GRPO) -> Any:
            trainer = make(self)
            change(trainer)
            return trainer

        return made

    def other_reference(trainer: Any) -> None:
        with torch.no_grad():
            next(trainer.ref_model.parameters()).mul_(1.5)

    def blind(trainer: Any) -> None:
        scores = trainer._get_per_token_logps_and_entropies
        trainer._get_per_token_logps_and_entropies = lambda model, ids, mask, *args, **keywords: scores(
            model, ids, torch.ones_like(mask), *args, **keywords
        )

    def dropping(trainer: Any) -> None:
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5

    for change, reason in (
        (other_reference, "log-probabilities are not those of its reference"),
        (blind, "a batch of answers is scored otherwise than a single answer"),
        (dropping, "a batch of answers is scored otherwise than a single answer"),
    ):
        with monkeypatch.context() as patched, pytest.raises(GmaskError, match=f"before the first step.*{reason}"):
            patched.setattr(GRPO, "_make_trainer", breaking(change))
            run_grpo(path)
    write = RolloutWriter.write

    def forget(self: RolloutWriter, *args: Any, **keywords: Any) -> Any:
        found = write(self, *args, **keywords)
        return [[dataclasses.replace(one, logprobs=tuple(p - 1 for p in one.logprobs)) for one in g] for g in found]

    with monkeypatch.context() as patched, pytest.raises(GmaskError, match="otherwise than they were sampled"):
        patched.setattr(RolloutWriter, "write", forget)
        run_grpo(path)
    check = GRPO.check_start

    def stale(self: GRPO, output: Any, scored: Any) -> None:
        check(self, output, [scored[0] - 0.01, *scored[1:]])

    with monkeypatch.context() as patched, pytest.raises(GmaskError, match="the ratio of probabilities is not 1"):
        patched.setattr(GRPO, "check_start", stale)
        run_grpo(path)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("trl.use_vllm=true", "vLLM runs a prefix LM as a causal one"),
        ("trl.vllm_mode=server", "vLLM runs a prefix LM as a causal one"),
        ("trl.use_transformers_continuous_batching=true", "it reads a context in one direction"),
        ("trl.top_p=0.9", "answers are drawn from the whole distribution that is scored"),
        ("trl.generation_kwargs={top_k: 5}", "answers are drawn from the whole distribution that is scored"),
        ("trl.sync_ref_model=true", "the reference of a run is the model that it began with"),
        ("trl.packing=true", "rows are not packed here"),
        ("trl.num_generations=8", r"set rollout\.answers instead"),
        ("trl.max_completion_length=8", r"set data\.max_target instead"),
        ("trl.steps_per_generation=8", r"set grpo\.minibatches instead"),
        ("trl.max_steps=8", r"set optimization\.rollouts, rollout and grpo\.minibatches instead"),
        ("trl.learning_rate=0.1", r"set optimization\.learning_rate instead"),
        ("trl.reward_weights=[2]", r"set reward\.function_weight and reward\.model_weight instead"),
        ("trl.betta=0.1", "the nearest is 'beta'"),
        ("trl.beta=much", r"trl\.beta is 'much': it must be a number from 0"),
        ("trl.num_iterations=0", r"trl\.num_iterations is 0: it must be a whole number above 0"),
        ("trl.loss_type=grpoo", "trl: Unknown loss type: grpoo"),
        ("grpo.algorithm=ppo", r"grpo\.algorithm is 'ppo': choose grpo or rloo"),
        ("grpo.minibatches=3", "a rollout has 16 answers .* which 3 minibatches .* cannot share evenly"),
        ("rollout.answers=1", "rollout.answers is 1: an answer is compared with the others"),
        ("model.adapter=somewhere", "merge it first"),
        ("method.name=p-tuning-v2", "grpo takes full, lora, dora, qlora"),
        ("optimization.average=0.9", "has an effect on `gmask ppo` alone"),
        ("reward.function=null", r"reward: name a function \(module:function\), or a reward model"),
        ("data.packing=64", r"data\.packing is for fine-tuning: leave it out"),
        ("data.max_target=96", "need 97 positions, and the model has 96"),
        ("task=superglue/rte", "needs a task that writes"),
    ],
)
def test_what_would_be_silently_wrong_is_one_line(override: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(GmaskError, match=reason):
        run_grpo(write_grpo_recipe(tmp_path), [override])


def test_an_adapter_in_place_is_refused(tmp_path: Path) -> None:
    """Silent error 6: TRL would reload a reference without it."""
    from gmask.checkpoints.adapters import inject
    from gmask.recipes.tuning import MethodSettings
    from gmask.training.methods import make_peft_config

    run = GRPO(load_grpo_recipe(write_grpo_recipe(tmp_path)), folders=[tmp_path])
    run._load()
    inject(run.policy, make_peft_config(MethodSettings(rank=2)))
    with pytest.raises(GmaskError, match="reloaded without it: merge it first"):
        run._make_trainer()


def test_the_recipe_of_the_sums_is_read() -> None:
    recipe = load_grpo_recipe(Path(__file__).parents[1] / "recipes" / "grpo-sums.yaml")
    assert read_grpo_recipe(recipe.to_dict()) == recipe
