"""Processes that share a pretraining run make the steps of one process, and go on in any number of them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gmask.training import pretrain
from gmask.training.run_folder import read_metrics
from pretraining_data import NO_DROPOUT

TESTS = Path(__file__).parent
COMMON = [*NO_DROPOUT, "optimization.steps=20", "optimization.ema=0.9", "run.save_every=10", "run.timeout=300"]
SHARD = "parallel.shard=true"
MUON = ["optimization.optimizer=muon", "optimization.steps=5"]
Jobs = Mapping[str, Sequence[str]]


def run_together(recipe: Path, jobs: Jobs, *, processes: int = 2) -> None:
    """Runs jobs, one after the other, in several processes of one launch."""
    path = recipe.parent / f"jobs-{processes}.json"
    path.write_text(json.dumps(jobs))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *(str(TESTS / "pretrain_worker.py"), str(recipe), str(path)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def run_alone(recipe: Path, *overrides: str) -> Path:
    pretrain.run_pretraining(str(recipe), overrides)
    (out,) = (Path(one.removeprefix("run.out=")) for one in overrides if one.startswith("run.out="))
    return out


def numbers(out: Path) -> dict[str, list[Any]]:
    """The columns of a log that do not depend on the time."""
    records = read_metrics(out / "metrics.jsonl")
    names = ("step", "loss", "gradient_norm", "tokens", "labelled_tokens", "learning_rate")
    return {name: [record[name] for record in records] for name in names}


def check_same_run(found: Path, expected: Path) -> None:
    """The same tokens, and losses, norms, validations and weights but for the order of sums."""
    ours, theirs = numbers(found), numbers(expected)
    assert ours["step"] == list(range(1, 21))
    for name in ("step", "tokens", "labelled_tokens", "learning_rate"):
        assert ours[name] == theirs[name], name
    for name in ("loss", "gradient_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    for mine, other in zip(*(read_metrics(out / "metrics.jsonl") for out in (found, expected)), strict=True):
        assert mine.get("validation", {}).get("toy", {}) == pytest.approx(
            other.get("validation", {}).get("toy", {}), rel=1e-5
        )
    one, many = (load_file(out / "model" / "model.safetensors") for out in (expected, found))
    assert one.keys() == many.keys()
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=2e-3, rtol=2e-2, msg=name)  # of bfloat16


def out_of(recipe: Path, name: str) -> str:
    return f"run.out={recipe.parent / name}"


def branch(recipe: Path, source: Path, name: str) -> str:
    """Copies a run as it was at its tenth step; returns the override that continues the copy."""
    shutil.copytree(source, recipe.parent / name)
    shutil.rmtree(recipe.parent / name / "checkpoint-00000020")
    return out_of(recipe, name)


def test_two_processes_make_the_steps_of_one(recipe_path: Path) -> None:
    folder = recipe_path.parent
    one = run_alone(recipe_path, *COMMON, out_of(recipe_path, "one"))
    muon = run_alone(recipe_path, *COMMON, *MUON, out_of(recipe_path, "muon-one"))
    selective = "optimization.gradient_checkpointing=selective"
    jobs = {
        "ddp": [*COMMON, out_of(recipe_path, "ddp")],
        "uneven": [*COMMON, "optimization.rows_per_step=3", out_of(recipe_path, "uneven")],
        "shards": [*COMMON, SHARD, "optimization.loss_chunk=16", out_of(recipe_path, "shards")],
        "then": [*COMMON, SHARD, selective, branch(recipe_path, one, "then")],
        "offload": [*COMMON, SHARD, "parallel.offload=true", out_of(recipe_path, "offload")],
        "muon": [*COMMON, SHARD, *MUON, out_of(recipe_path, "muon")],
    }
    for name in ("ddp", "shards", "muon"):
        shutil.copytree(one / "tokenizer", folder / name / "tokenizer")
    run_together(recipe_path, jobs)
    # "then" goes on divided from the tenth step of the one process.
    for name in ("ddp", "shards", "then"):
        check_same_run(folder / name, one)
    assert numbers(folder / "muon")["tokens"] == numbers(muon)["tokens"]
    # Muon's products are in bfloat16, and are summed in another order.
    assert numbers(folder / "muon")["loss"] == pytest.approx(numbers(muon)["loss"], rel=1e-3)
    assert not (folder / "shards" / "checkpoint-00000010" / "model.safetensors").exists()
    for rank in range(2):
        for name, message in (("uneven", "rows_per_step is 3, which 2 processes cannot share"), ("offload", "GPUs")):
            assert message in (folder / f"jobs-2.json.{name}.{rank}").read_text("utf-8")
            assert not (folder / name).exists()
    # A checkpoint of two processes is continued by one, whole or divided.
    for name in ("ddp", "shards"):
        run_alone(recipe_path, *COMMON, branch(recipe_path, folder / name, f"{name}-alone"))
        check_same_run(folder / f"{name}-alone", one)
