"""What happens to a pretraining run of several processes when one is killed or hangs, a disk is full, time is up?"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gmask.training.run_folder import list_checkpoints, read_metrics
from pretraining_data import NO_DROPOUT, write_recipe

TESTS = Path(__file__).parent
COMMON = [*NO_DROPOUT, "optimization.steps=8", "run.save_every=2", "run.validate_every=8", "parallel.shard=true"]
STORE_OF_ITS_OWN = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # without it, a restart finds the addresses of the start before
PATIENCE = 30  # seconds
pytestmark = pytest.mark.slow


def start(recipe: Path, out: Path, *overrides: str, fault: str = "none", restarts: int = 0) -> "subprocess.Popen[str]":
    """Two processes of torchrun that pretrain into a folder."""
    launch = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    return subprocess.Popen(
        [
            *(*launch, "--max-restarts", str(restarts), str(TESTS / "pretrain_fault_worker.py")),
            *(fault, str(recipe), *COMMON, f"run.out={out}", *overrides),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", STORE_OF_ITS_OWN: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit status, and what was printed."""
    printed, _ = process.communicate(timeout=1200)
    return process.returncode, printed


def losses(out: Path) -> list[tuple[int, float, int]]:
    return [(record["step"], record["loss"], record["tokens"]) for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A recipe, and the losses of a run to which nothing happens."""
    folder = tmp_path_factory.mktemp("faults")
    recipe = write_recipe(folder)
    status, printed = finish(start(recipe, folder / "whole"))
    assert status == 0, printed
    return recipe, losses(folder / "whole")


def test_a_process_that_is_killed_in_a_step_is_restarted_and_the_run_ends_the_same(
    whole: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    recipe, expected = whole
    status, printed = finish(start(recipe, tmp_path / "out", fault="killed", restarts=1))
    assert status == 0, printed
    assert re.search(r"exitcode\s*: -9", printed), printed
    assert losses(tmp_path / "out") == expected


def test_a_process_that_hangs_is_named(whole: tuple[Path, list[Any]], tmp_path: Path) -> None:
    recipe, _ = whole
    status, printed = finish(start(recipe, tmp_path / "out", f"run.timeout={PATIENCE}", fault="hangs"))
    assert status != 0
    assert f"step 5: process 1 of 2 has ended, or has not answered for {PATIENCE} s (run.timeout)" in printed
    assert "the same command goes on from the last checkpoint" in printed
    assert list_checkpoints(tmp_path / "out")[-1].name == "checkpoint-00000004"


def test_a_disk_that_is_full_for_one_process_is_one_line_and_loses_nothing(
    whole: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    recipe, expected = whole
    status, printed = finish(start(recipe, tmp_path / "out", fault="full"))
    assert status != 0
    told = [line for line in printed.splitlines() if "cannot be written" in line]
    assert told and all("the disk may be full); the last complete checkpoint" in line for line in told), printed
    # That of step 4 may still have been written when the disk was full.
    kept = [folder.name for folder in list_checkpoints(tmp_path / "out")]
    assert kept in (["checkpoint-00000002"], ["checkpoint-00000002", "checkpoint-00000004"])
    status, printed = finish(start(recipe, tmp_path / "out"))
    assert status == 0, printed
    assert losses(tmp_path / "out") == expected
    assert not list((tmp_path / "out").glob(".*")), "no draft is left"


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(whole: tuple[Path, list[Any]], tmp_path: Path) -> None:
    recipe, _ = whole
    process = start(recipe, tmp_path / "out", "optimization.steps=100000", "optimization.schedule=constant")
    log = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and len(log.read_text("utf-8").splitlines()) > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    status, printed = finish(process)
    assert status == 1 and "exitcode" not in printed, "which is torchrun's own: the processes ended with 0"
    step = losses(tmp_path / "out")[-1][0]
    assert list_checkpoints(tmp_path / "out")[-1].name == f"checkpoint-{step:08d}"
    told = f"stopped by SIGTERM after step {step}; the same command goes on from checkpoint-{step:08d}"
    assert printed.count(told) == 2, printed
