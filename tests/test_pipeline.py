"""Does a pipeline run its stages in order, resume exactly, refuse what does not fit, and report true numbers?"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import gmask
from feedback_data import PAIRS
from gmask.cli import main
from gmask.errors import GmaskError
from gmask.recipes.pipeline import load_pipeline_recipe
from gmask.training.pipeline import count_samples, run_pipeline
from ppo_data import NUMBERS, SHORT, make_killing, run_until_killed
from tiny_folder import make_folder
from tuning_data import write_lines

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")

TIMES = {"seconds", "folder"}
LENGTHS = {"max_source": 32, "max_target": 8}


def write_pipeline(folder: Path, *, source: str = SHORT, sft: str = "full", **sections: Any) -> str:
    """A pipeline on the tiny GLM: tuning, a reward model, DPO, PPO, and the report; a few steps each. Its path."""
    folder.mkdir(parents=True, exist_ok=True)
    module = f"judge_of_test_{next(NUMBERS)}"
    (folder / f"{module}.py").write_text(source, "utf-8")
    if not (folder / "base").is_dir():
        make_folder(folder / "base")
    write_lines(folder / "pairs.jsonl", PAIRS)
    write_lines(folder / "said.jsonl", [{"prompt": one["prompt"], "completion": one["chosen"]} for one in PAIRS])
    write_lines(folder / "asked.jsonl", [{"instruction": one["prompt"], "input": "", "output": ""} for one in PAIRS])
    data = {"root": str(folder), **LENGTHS}
    steps = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "save_every": 1}
    method = {"name": sft} if sft == "full" else {"name": sft, "rank": 2}
    pairs = {"data": {**data, "train": "pairs.jsonl"}, "method": {"name": "lora", "rank": 2}, "optimization": steps}
    write_yaml(
        folder / "ppo.yaml",
        {
            "run": {"out": "elsewhere"},
            "task": "chat/alpaca",
            "data": {**data, "train": "asked.jsonl"},
            "reward": {"function": f"{module}:grade"},
            "rollout": {"prompts": 4, "answers": 2},
            "ppo": {"epochs": 1, "minibatches": 2},
            "method": {"name": "full"},
            "optimization": {"rollouts": 2, "batch_size": 4, "learning_rate": 1e-3, "save_every": 1},
        },
    )
    tree: dict[str, Any] = {
        "run": {"out": str(folder / "out"), "device": "cpu"},
        "stages": {
            "sft": {
                "model": {"name": str(folder / "base")}, "data": {**data, "train": "said.jsonl"}, "method": method,
                "optimization": steps, "forgetting": {"skip": True},
            },
            "reward": {"model": "sft", **pairs},
            "pairs": {"verb": "dpo", "model": "sft", **pairs},
            "ppo": {"recipe": "ppo.yaml", "model": "sft", "reward": {"model": "reward", "model_weight": 0.1}},
        },
        "report": {
            "prompts": "asked.jsonl", "root": str(folder), "reward": {"function": f"{module}:grade", "model": "reward"},
            "samples": 2, "batch_size": 4, **LENGTHS,
        },
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
    return write_yaml(folder / "pipeline.yaml", tree)


def write_yaml(path: Path, tree: Any) -> str:
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), "utf-8")
    return str(path)


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def without_times(values: Any) -> Any:
    """The numbers of results that a repeated run must give again."""
    if isinstance(values, dict):
        return {key: without_times(value) for key, value in values.items() if key not in TIMES}
    return [without_times(one) for one in values] if isinstance(values, list) else values


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    files = [path for path in out.glob("*/*/*.safetensors") if path.parent.name in ("model", "adapter", "merged")]
    return {
        f"{path.relative_to(out)}:{name}": tensor for path in sorted(files) for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose pipeline has run; its stages are not to be changed."""
    folder = tmp_path_factory.mktemp("pipeline")
    run_pipeline(write_pipeline(folder, sft="lora"))
    return folder


def test_the_stages_run_in_order_and_are_compared(finished: Path) -> None:
    out = finished / "out"
    results = read(out / "results.json")
    assert list(results["stages"]) == ["sft", "reward", "pairs", "ppo"]
    assert results["stages"]["ppo"]["from"] == ["sft", "reward"]
    assert results["stages"]["pairs"]["verb"] == "dpo"
    report = results["report"]
    assert list(report["ways"]) == ["greedy", "sampled"]
    assert [one["name"] for one in report["ways"]["greedy"]] == ["sft", "pairs", "ppo"]
    assert report["general"].keys() == {"sft", "pairs", "ppo"}
    for stage in report["ways"]["greedy"]:
        assert len(stage["texts"]) == len(PAIRS)
        assert stage["kl"] == pytest.approx(0, abs=1e-6) if stage["name"] == "sft" else stage["kl"] > 0
        assert set(stage["leads"]) == (set() if stage["name"] == "sft" else set(report["judges"]))
    page = (out / "report.md").read_text("utf-8")
    assert page.count("\n| ppo |") == 2 * 3 + 1  # greedy and sampled: by two judges, and what they are like; forgotten
    assert "## Answers side by side" in page and (out / "stages.png").stat().st_size > 10_000
    card = (out / "README.md").read_text("utf-8")
    assert "| ppo | ppo | sft, reward | full |" in card and "optimization:" in card
    assert list(load_pipeline_recipe(out / "pipeline.yaml").stages) == list(results["stages"])


def test_an_adapter_is_merged_for_the_stages_after_it(finished: Path) -> None:
    out = finished / "out"
    assert (out / "sft" / "adapter").is_dir() and (out / "sft" / "merged").is_dir()
    assert not (out / "pairs" / "merged").exists()  # nothing begins with it
    merged, _ = gmask.load(out / "sft" / "merged", device="cpu")
    apart, _ = gmask.load(finished / "base", adapter=out / "sft" / "adapter", device="cpu")
    ids = torch.tensor([[20, 21, 7, 8, 30]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, apart(ids).logits, atol=1e-4)
    started = yaml.safe_load((out / "pairs" / "stage.yaml").read_text("utf-8"))
    assert started["model"]["name"] == str(out / "sft" / "merged")


def test_a_finished_pipeline_is_left_alone(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "out").rglob("*.safetensors")}
    monkeypatch.setattr(sys, "argv", ["gmask", "pipeline", str(finished / "pipeline.yaml"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr()
    assert json.loads(said.out)["stages"].keys() == {"sft", "reward", "pairs", "ppo"}
    assert said.err.count("finished before") == 4 and "stage 3 of 4: pairs (dpo), from sft" in said.err
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "out").rglob("*.safetensors")}
    with pytest.raises(GmaskError, match="holds a pipeline already"):
        run_pipeline(str(finished / "pipeline.yaml"), resume=False)


def test_a_changed_recipe_of_a_finished_stage_is_refused(finished: Path) -> None:
    path = str(finished / "pipeline.yaml")
    with pytest.raises(
        GmaskError, match=r"stages\.reward: .* optimization\.steps differs; set it back, remove .*: ppo"
    ):
        run_pipeline(path, ["stages.reward.optimization.steps=3"])
    with pytest.raises(GmaskError, match=r"stages\.pairs: .*: verb differs"):
        run_pipeline(path, ["stages.pairs.verb=kto"])
    with pytest.raises(GmaskError, match=r"stages\.sft: .*method\.rank differs.*made of it: reward, pairs, ppo"):
        run_pipeline(path, ["stages.sft.method.rank=3"])


def test_a_stage_is_not_mixed_with_another_result_of_an_earlier_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "sft")
    overrides = [f"run.out={tmp_path / 'out'}", "stages.sft.optimization.steps=1"]
    with pytest.raises(GmaskError, match=r"stages\.reward: .* was made from another result of sft: remove"):
        run_pipeline(str(finished / "pipeline.yaml"), overrides)
    shutil.rmtree(tmp_path / "out" / "sft")  # the same recipe makes the same weights, and all that follows stays
    run_pipeline(str(finished / "pipeline.yaml"), overrides[:1])
    one, other = (read(folder / "out" / "results.json") for folder in (finished, tmp_path))
    assert without_times(one) == without_times(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "last", [pytest.param(3, id="in a stage"), pytest.param(6, id="in the report", marks=pytest.mark.slow)]
)
def test_a_pipeline_that_is_killed_ends_as_one_that_is_not(tmp_path: Path, last: int) -> None:
    path = write_pipeline(tmp_path, source=make_killing(tmp_path, last=last))
    override = "stages.ppo.optimization.rollouts=4"
    run_until_killed("gmask.training.pipeline:run_pipeline", path, [override])
    assert not (tmp_path / "out" / "results.json").exists()
    assert (tmp_path / "out" / "ppo" / "results.json").exists() == (last == 6)
    resumed = run_pipeline(path, [override])
    whole = run_pipeline(path, [override, f"run.out={tmp_path / 'whole'}"])
    one, other = weights_of(resumed), weights_of(whole)
    assert one.keys() == other.keys() and len(one) > 20
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert without_times(read(resumed / "results.json")) == without_times(read(whole / "results.json"))


@pytest.mark.slow
def test_two_processes_make_the_stages_of_one(finished: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gmask"]
    done = subprocess.run(
        [*start, "pipeline", str(finished / "pipeline.yaml"), f"run.out={tmp_path / 'two'}", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 1  # the first process alone prints
    one, two = (read(folder / "results.json")["report"] for folder in (finished / "out", tmp_path / "two"))
    assert [stage["name"] for stage in two["ways"]["greedy"]] == ["sft", "pairs", "ppo"]
    for kind in ("text_loss", "reply_loss"):
        assert one["general"]["sft"][kind] == pytest.approx(two["general"]["sft"][kind], rel=1e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.pairs.model=sftt", r"stages\.pairs\.model\.name: sftt: no such folder.* nearest stage .* is 'sft'"),
        ("stages.reward.model=ppo", r"stages\.reward\.model\.name: the stage ppo does not come before it: move it up"),
        ("stages.pairs.model=reward", r"the stage reward makes a model that rewards, and one that writes is needed"),
        ("stages.ppo.reward.model=sft", r"stages\.ppo\.reward\.model: the stage sft makes a model that writes"),
        ("report.baseline=spt", r"report\.baseline: spt: no such folder"),
        ("stages.ppoo.optimization.rollouts=20", r"stages\.ppoo has no verb: choose .* is 'ppo' meant\?"),
        ("stages.ppo.verb=pppo", r"stages\.ppo\.verb is 'pppo': choose sft, "),
        ("stages.ppo.optimization.rolouts=20", r"stages\.ppo: optimization has no key 'rolouts'; .* 'rollouts'"),
        ("stages.sft.optimisation.steps=20", r"stages\.sft: the recipe has no key 'optimisation'.*'optimization'"),
        ("stage.ppo.verb=ppo", r"the recipe has no key 'stage'; the nearest is 'stages'"),
        ("stages.ppo.run.out=x", r"stages\.ppo\.run\.out: the folder of a stage is run\.out/ppo"),
        ("stages.ppo.recipe=none.yaml", r"none\.yaml"),
        ("stages.ppo.data.train=none.jsonl", r"stages\.ppo: .*none\.jsonl"),
        ("stages.ppo.reward.function=nowhere:grade", r"stages\.ppo: reward\.function nowhere:grade: cannot import"),
        ("stages.sft.method={name: p-tuning-v2}", r"of sft would have to be merged for it, and p-tuning-v2 cannot be"),
        ("stages.sft.data.folds=2", r"stages\.sft\.data\.folds: a stage has one result"),
        ("report.prompts=none.jsonl", r"report: .*none\.jsonl"),
        ("report.reward={function: null}", r"report\.reward: name a function"),
        ("stages={}", r"stages is empty"),
    ],
)
def test_a_mistake_is_found_before_the_first_stage(tmp_path: Path, override: str, message: str) -> None:
    path = write_pipeline(tmp_path)
    with pytest.raises(GmaskError, match=message):
        run_pipeline(path, [override])
    assert not (tmp_path / "out").exists()


def test_a_stage_takes_its_recipe_from_a_file_and_lays_its_own_keys_over_it(tmp_path: Path) -> None:
    recipe = load_pipeline_recipe(write_pipeline(tmp_path), ["stages.ppo.optimization.rollouts=20", "run.seed=5"])
    *_, stage = recipe.read_stages()
    found = stage.recipe
    assert (found.optimization.rollouts, found.optimization.batch_size, found.rollout.prompts) == (20, 4, 4)
    assert (found.run.seed, found.run.out) == (5, str(tmp_path / "out" / "ppo"))
    assert (found.model.name, found.reward.model, found.reward.model_weight) == ("sft", "reward", 0.1)
    assert count_samples(found, 8) == 20 * 8
    tuned = recipe.read_stages()[0].recipe
    assert tuned.task == "chat/trl" and count_samples(tuned, 8) == 8


def test_grpo_is_a_stage_like_ppo(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path)
    tree = yaml.safe_load(Path(path).read_text("utf-8"))
    stage = yaml.safe_load((tmp_path / "ppo.yaml").read_text("utf-8")) | {"model": "sft", "trl": {"beta": 0.1}}
    del stage["ppo"], stage["run"]
    tree["stages"] = {"sft": tree["stages"]["sft"], "grpo": stage}
    tree["report"] |= {"reward": {"function": tree["report"]["reward"]["function"]}, "samples": 0, "limit": 3}
    out = run_pipeline(write_yaml(tmp_path / "short.yaml", tree))
    report = read(out / "report.json")
    assert [one["name"] for one in report["ways"]["greedy"]] == ["sft", "grpo"]
    assert report["ways"]["greedy"][1]["kl"] > 0


def test_without_tuning_the_first_model_is_what_is_beaten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pipeline(tmp_path)
    tree = yaml.safe_load(Path(path).read_text("utf-8"))
    tree["stages"] = {"pairs": {**tree["stages"]["pairs"], "model": str(tmp_path / "base")}}
    tree["report"] |= {"reward": {"function": tree["report"]["reward"]["function"]}, "samples": 0, "limit": 3}
    monkeypatch.setattr(sys, "argv", ["gmask", "pipeline", write_yaml(tmp_path / "short.yaml", tree), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)  # nothing else is there, although DPO's trainer prints its log
    report = read(Path(printed["folder"]) / "report.json")
    assert [one["name"] for one in report["ways"]["greedy"]] == [str(tmp_path / "base"), "pairs"]
    assert list(report["ways"]) == ["greedy"] and len(report["prompts"]) == 3


def test_the_recipe_of_the_tutorial_is_valid_and_its_wrong_answers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Path(__file__).parents[1] / "recipes"
    stages = load_pipeline_recipe(recipes / "pipeline-sums.yaml").read_stages()
    assert [stage.name for stage in stages] == ["sft", "reward", "dpo", "ppo"]
    assert stages[3].recipe.critic.rate == 10.0 and stages[3].recipe.data.validation is None  # of ppo-sums.yaml; ours
    monkeypatch.syspath_prepend(str(recipes))
    import pipeline_data
    import sums

    rng = random.Random(0)
    for record in sums.draw(50, set(), rng).values():
        pair = pipeline_data.pair_of(record, rng)
        assert sums.grade([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]]) == [1.0, sums.IN_FORM]
