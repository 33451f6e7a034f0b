"""Does the launcher for a Ray cluster run the verb in each worker? One test asks Ray, the others a stand-in for it."""

import os
import runpy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gmask
from feedback_data import write_feedback_recipe
from gmask.training.pretrain import run_pretraining
from gmask.training.run_folder import read_metrics
from pretraining_data import NO_DROPOUT, write_recipe
from tuning_data import read_log

SCRIPT = Path(__file__).parents[1] / "recipes" / "train_with_ray.py"


@dataclass
class Config:
    """Any of Ray's configuration classes; it has the keywords that it was given."""

    given: dict[str, Any] = field(default_factory=dict)


def make_config(**given: Any) -> Config:
    return Config(given)


class TorchTrainer:
    """Runs the loop of one worker in this process."""

    made: "list[TorchTrainer]" = []  # noqa: RUF012

    def __init__(
        self, train_loop_per_worker: Any, *, train_loop_config: Any, scaling_config: Config, run_config: Config
    ) -> None:
        self.loop, self.config = train_loop_per_worker, train_loop_config
        self.scaling, self.run = scaling_config, run_config
        self.made.append(self)

    def fit(self) -> None:
        self.loop(self.config)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> type[TorchTrainer]:
    modules = {name: ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch")}
    for name in ("FailureConfig", "RunConfig", "ScalingConfig"):
        setattr(modules["ray.train"], name, make_config)
    modules["ray.train.torch"].TorchTrainer = TorchTrainer  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    TorchTrainer.made.clear()
    return TorchTrainer


def test_each_worker_runs_the_verb_on_the_recipe(
    ray: type[TorchTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Path(write_feedback_recipe(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = ["reward", recipe.name, "--workers", "3", "--restarts", "2", "--set", "optimization.steps=2"]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (made,) = ray.made
    assert made.scaling.given == {"num_workers": 3, "use_gpu": False}
    assert made.run.given["failure_config"].given == {"max_failures": 2}
    assert made.config["recipe"] == str(recipe)
    assert len(read_log(tmp_path / "out")) == 2 and (tmp_path / "out" / "results.json").is_file()


def test_a_mistake_in_the_recipe_reaches_the_user(ray: type[TorchTrainer], tmp_path: Path) -> None:
    recipe = write_feedback_recipe(tmp_path)
    train = runpy.run_path(str(SCRIPT))["train"]
    with pytest.raises(gmask.GmaskError, match="the nearest is 'steps'"):
        train({"verb": "reward", "recipe": recipe, "overrides": ["optimization.step=2"]})


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_of_ray_train_make_the_steps_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray.train.torch")
    recipe = write_recipe(tmp_path)
    settings = [*NO_DROPOUT, "optimization.steps=6", "run.validate_every=6", "run.save_every=3"]
    run_pretraining(str(recipe), [*settings, f"run.out={tmp_path / 'one'}"])
    changed = [*settings, "parallel.shard=true", f"run.out={tmp_path / 'two'}"]
    options = [argument for setting in changed for argument in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "pretrain", str(recipe), "--workers", "2", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [record["tokens"] for record in two] == [record["tokens"] for record in one]
    for name in ("loss", "gradient_norm"):
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-5)
    assert (tmp_path / "two" / "checkpoint-00000006" / "sharded").is_dir()
