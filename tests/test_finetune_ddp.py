"""Two processes that share a run make the steps that one makes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gmask.training import finetune
from test_finetune import TASKS
from tuning_data import read_log, write_recipe

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent


def run_in_two(recipe: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*start, str(TESTS / "finetune_worker.py"), recipe, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(("kind", "method"), [("seq2seq", "full"), ("cloze", "lora")])
def test_two_processes_make_the_steps_of_one(tmp_path: Path, kind: str, method: str) -> None:
    task, records = TASKS[kind]
    path = write_recipe(
        tmp_path, task=task, records=records, method={"name": method},
        optimization={"steps": 6, "batch_size": 2, "accumulation": 3, "evaluate_every": 3, "save_every": 3},
    )  # fmt: skip
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'one'}"])
    done = run_in_two(path, f"run.out={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [r["supervised_tokens"] for r in one] == [r["supervised_tokens"] for r in two]
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)
    assert [r["gradient_norm"] for r in one] == pytest.approx([r["gradient_norm"] for r in two], rel=1e-3)
    for ours, theirs in zip(one, two, strict=True):
        if "validation" in ours:
            expected = pytest.approx(theirs["validation"]["validation"], rel=1e-3)
            assert ours["validation"]["validation"] == expected
    first, second = (load_file(tmp_path / name / "best.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for name in first:
        # Adam divides by the gradient's size, so that tiny gradients differ by their sign in the first steps.
        assert torch.allclose(first[name], second[name], atol=2e-3)
    told = [(tmp_path / name / "predictions.jsonl").read_text("utf-8").count("\n") for name in ("one", "two")]
    assert told[0] == told[1] > 0


def test_a_run_of_two_processes_resumes_exactly(tmp_path: Path) -> None:
    task, records = TASKS["seq2seq"]
    path = write_recipe(tmp_path, task=task, records=records, method={"name": "lora", "dropout": 0.2})
    whole = run_in_two(path, f"run.out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr[-4000:]
    again = tmp_path / "again"
    assert run_in_two(path, f"run.out={again}").returncode == 0
    (again / "results.json").unlink()
    shutil.rmtree(again / "checkpoint-00000004")  # as if it had been killed after its second step
    resumed = run_in_two(path, f"run.out={again}")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    losses = [[record["loss"] for record in read_log(folder)] for folder in (tmp_path / "whole", again)]
    assert losses[0] == losses[1]


def test_samples_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, optimization={"batch_size": 3})
    done = run_in_two(path)
    assert done.returncode != 0
    assert "a multiple of 2" in done.stderr
