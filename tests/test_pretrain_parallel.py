"""Processes that share a pretraining run make the steps of one process, and go on in any number of them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from gmask.training.run_folder import read_metrics
from pretraining_data import NO_DROPOUT, write_recipe

TESTS = Path(__file__).parent
SHARD, TENSOR = "parallel.shard=true", "parallel.tensor=2"
SELECTIVE = "optimization.gradient_checkpointing=selective"
MUON = "optimization.optimizer=muon"
HALF = "optimization.dtype=bfloat16"
SHORT = ["optimization.steps=4", "run.save_every=2", "run.validate_every=4"]
LONG = ["optimization.steps=20", "run.save_every=10", "run.validate_every=10", "model.num_attention_heads=4"]


class Job(NamedTuple):
    """A run: its processes, the keys that it changes, the run whose first half it goes on from, and the CPU's lack."""

    processes: int
    overrides: Sequence[str] = ()
    begins: str | None = None
    lacks_bfloat16: bool = False


class Runs:
    """Runs of one recipe, made by one launch. What a job was told in place of a run is in `refused`."""

    def __init__(self, folder: Path, common: Sequence[str]) -> None:
        self.folder, self.common, self.recipe = (
            folder,
            [*NO_DROPOUT, "optimization.ema=0.9", *common],
            write_recipe(folder),
        )
        self.refused: dict[str, set[str]] = {}

    def make(self, jobs: Mapping[str, Job]) -> None:
        """Makes the runs, one after the other. The first of all learns the tokenizer."""
        path = self.folder / "jobs.json"
        described = {
            name: {
                "processes": job.processes,
                "overrides": [*self.common, *job.overrides, f"run.out={self.folder / name}"],
                "begins": job.begins and str(self.folder / job.begins),
                "lacks_bfloat16": job.lacks_bfloat16,
            }
            for name, job in jobs.items()
        }
        path.write_text(json.dumps(described))
        done = subprocess.run(
            [sys.executable, str(TESTS / "pretrain_worker.py"), str(self.recipe), str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        for fault in self.folder.glob("jobs.json.*"):
            self.refused.setdefault(fault.name.split(".")[2], set()).add(fault.read_text("utf-8"))

    def columns(self, name: str) -> dict[str, list[Any]]:
        """The columns of a log that do not depend on the time."""
        records = read_metrics(self.folder / name / "metrics.jsonl")
        names = ("step", "loss", "gradient_norm", "tokens", "labelled_tokens", "learning_rate")
        return {name: [record[name] for record in records] for name in names}

    def expect_same(self, found: str, expected: str, *, tolerance: float = 1e-5) -> None:
        """The same tokens, and losses, norms, validations and weights but for the order of sums."""
        assert found not in self.refused, self.refused
        ours, theirs = self.columns(found), self.columns(expected)
        assert ours["step"] == list(range(1, len(theirs["step"]) + 1))
        for name in ("step", "tokens", "labelled_tokens", "learning_rate"):
            assert ours[name] == theirs[name], name
        for name in ("loss", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance), name
        logs = (read_metrics(self.folder / name / "metrics.jsonl") for name in (found, expected))
        for mine, other in zip(*logs, strict=True):
            validated = (record.get("validation", {}).get("toy", {}) for record in (mine, other))
            assert next(validated) == pytest.approx(next(validated), rel=tolerance)
        many, one = (load_file(self.folder / name / "model" / "model.safetensors") for name in (found, expected))
        assert one.keys() == many.keys()
        for name in one:
            torch.testing.assert_close(many[name], one[name], atol=2e-3, rtol=2e-2, msg=name)  # of bfloat16


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    runs = Runs(tmp_path, SHORT)
    runs.make(
        {
            "one": Job(1),
            "shards": Job(2, [SHARD, "optimization.loss_chunk=16"]),
            "shards then tensor": Job(2, [TENSOR, SELECTIVE], begins="shards"),
            "tensor then one": Job(1, begins="shards then tensor"),
            "uneven": Job(2, ["optimization.rows_per_step=3"]),
            "offload": Job(2, [SHARD, "parallel.offload=true"]),
            "odd": Job(2, ["parallel.tensor=3"]),
            "heads": Job(2, [TENSOR, "model.num_attention_heads=1"]),
            "whole": Job(2, [TENSOR, MUON]),
            "streams, uneven": Job(2, ["data.streams=3"]),
        }
    )
    for name in ("shards", "shards then tensor", "tensor then one"):
        runs.expect_same(name, "one")
    assert not (tmp_path / "shards" / "checkpoint-00000002" / "model.safetensors").exists()
    for name, message in (
        ("uneven", "rows_per_step is 3, which 2 processes cannot share"),
        ("offload", "GPUs"),
        ("odd", "parallel.tensor is 3, and there are 2 processes"),
        ("heads", "1 attention heads cannot be divided among 2 processes"),
        ("whole", "Muon needs whole matrices"),
        ("streams, uneven", "data.streams is 3: it must divide"),
    ):
        (told,) = runs.refused.pop(name)
        assert message in told and "\n" not in told
        assert [path.name for path in (tmp_path / name).iterdir()] == ["tokenizer"], "which it was given"
    assert not runs.refused


@pytest.mark.slow
def test_two_processes_with_streams_muon_and_dropout(tmp_path: Path) -> None:
    runs = Runs(tmp_path, SHORT)
    dropout = ["model.hidden_dropout=0.1", "model.embedding_dropout=0.1"]
    runs.make(
        {
            "one": Job(1),
            "ddp": Job(2),
            "one then shards": Job(2, [SHARD, SELECTIVE], begins="one"),
            "streams": Job(1, ["data.streams=4"]),
            "streams in two": Job(2, [SHARD, "data.streams=4"]),
            "streams, then one": Job(1, ["data.streams=4"], begins="streams in two"),
            "bfloat16": Job(1, [HALF]),
            "bfloat16 in shards": Job(2, [SHARD, HALF]),
            "muon": Job(1, [MUON]),
            "muon in shards": Job(2, [SHARD, MUON]),
            "muon in float32": Job(1, [MUON], lacks_bfloat16=True),
            "muon in float32 in shards": Job(2, [SHARD, MUON], begins="muon in float32", lacks_bfloat16=True),
            "muon, then in float32": Job(1, [MUON], begins="muon", lacks_bfloat16=True),
            "dropout": Job(1, dropout),
            "dropout in tensor": Job(2, [*dropout, TENSOR]),
            "wider": Job(2, [SHARD, "model.hidden_size=64"], begins="one then shards"),
            "fewer streams": Job(1, ["data.streams=2"], begins="streams"),
        }
    )
    for name in ("ddp", "one then shards"):
        runs.expect_same(name, "one")
    for name in ("streams in two", "streams, then one"):  # of which each process draws two
        runs.expect_same(name, "streams")
    runs.expect_same("bfloat16 in shards", "bfloat16", tolerance=1e-2)
    # Muon's products are in bfloat16, and are summed in another order.
    runs.expect_same("muon in shards", "muon", tolerance=1e-3)
    runs.expect_same("muon in float32 in shards", "muon in float32")
    runs.expect_same("muon, then in float32", "muon", tolerance=1e-3)
    # The processes that divide a matrix leave out the same activations.
    runs.expect_same("dropout in tensor", "dropout")
    for name, message in (
        ("wider", "the recipe's model has another shape than this run's"),
        ("fewer streams", "data.streams was 4 and is now 2"),
    ):
        (told,) = runs.refused.pop(name)
        assert message in told and "\n" not in told
    assert not runs.refused


@pytest.mark.slow
def test_four_processes_make_the_steps_of_one_and_any_number_goes_on(tmp_path: Path) -> None:
    runs = Runs(tmp_path, LONG)
    jobs = {
        "one": Job(1),
        "ddp": Job(4),
        "shards": Job(4, [SHARD]),
        "tensor": Job(4, ["parallel.tensor=4"]),
        "both": Job(4, [TENSOR, SHARD]),
        "both, blocks again": Job(4, [TENSOR, SHARD, "optimization.gradient_checkpointing=true"]),
    }
    for name in ("ddp", "shards", "tensor", "both"):
        jobs[f"{name} then one"] = Job(1, begins=name)
        jobs[f"{name} then two"] = Job(2, [SHARD], begins=name)
    jobs["shards then both"] = Job(4, [TENSOR, SHARD], begins="shards")
    jobs["both then tensor"] = Job(2, [TENSOR], begins="both")
    runs.make(jobs)
    for name in jobs.keys() - {"one"}:
        runs.expect_same(name, "one")
