"""Two processes that share a PPO run sample the answers, and make the steps, that one makes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gmask.training.ppo import run_ppo
from ppo_data import read_numbers, write_ppo_recipe

pytestmark = pytest.mark.slow


def run_in_two(recipe: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gmask"]
    return subprocess.run(
        [*start, "ppo", recipe, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_make_the_steps_of_one_and_resume_exactly(tmp_path: Path, method: str) -> None:
    path = write_ppo_recipe(
        tmp_path, method={"name": method}, mix={"train": "train.jsonl", "batch_size": 3},
        kl={"kind": "adaptive", "early_stop": 1.0}, optimization={"average": 0.9},
    )  # fmt: skip
    run_ppo(path, [f"run.out={tmp_path / 'one'}"])
    done = run_in_two(path, f"run.out={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (read_numbers(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 12
    for ours, theirs in zip(one, two, strict=True):
        for name in ("reward", "length", "truncated", "groups_without_spread"):
            assert ours[name] == theirs[name], "the same answers are sampled"
        for name in ("loss", "gradient_norm", "kl", "value_loss", "entropy", "update_kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-4)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "two", again)
    (again / "results.json").unlink()
    shutil.rmtree(again / "checkpoint-00000012")
    assert run_in_two(path, f"run.out={again}").returncode == 0
    assert read_numbers(again) == two
