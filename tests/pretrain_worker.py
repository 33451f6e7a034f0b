"""Processes that pretrain together. Started by test_pretrain_parallel.py.

    python pretrain_worker.py RECIPE JOBS

JOBS is a JSON file: for each job its number of processes, the overrides of its recipe, the folder of a run that it
goes on from, at its first checkpoint, or null, and whether the CPU is to be taken for one without bfloat16. What a job
raised goes to JOBS.NAME.RANK. The processes are forks of this one, which has imported what takes long to import. All
runs have the tokenizer of the first.
"""

import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 - for the forks
import torch
import torch.utils.tensorboard

from gmask import hardware
from gmask.errors import GmaskError
from gmask.training.pretrain import run_pretraining


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def run_rank(recipe: str, overrides: Sequence[str], faults: Path) -> int:
    """Runs a job in this process; returns its exit status."""
    try:
        run_pretraining(recipe, overrides)
    except GmaskError as error:
        faults.write_text(str(error))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def begin(out: Path, first: Path, begins: str | None) -> None:
    """Copies the half of a run that a job goes on from, or the tokenizer alone."""
    if begins is None:
        if (first / "tokenizer").exists():
            shutil.copytree(first / "tokenizer", out / "tokenizer")
        return
    shutil.copytree(begins, out)
    for folder in (sorted(out.glob("checkpoint-*"))[-1], out / "model"):
        shutil.rmtree(folder)


def run_job(recipe: str, faults: str, processes: int, overrides: Sequence[str], *, lacks_bfloat16: bool) -> None:
    """Runs a job in forks of this process, and exits with 1 if one of them fails."""
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(find_port()), "WORLD_SIZE": str(processes)}
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
            if lacks_bfloat16:
                hardware.has_bfloat16 = lambda device: False
            status = run_rank(recipe, overrides, Path(f"{faults}.{rank}"))
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(f"{faults}: a process has failed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe, jobs = sys.argv[1:]
    described = json.loads(Path(jobs).read_text())
    outs = [Path(job["overrides"][-1].removeprefix("run.out=")) for job in described.values()]
    for out, (name, job) in zip(outs, described.items(), strict=True):
        begin(out, outs[0], job["begins"])
        faults, lacks = f"{jobs}.{name}", job["lacks_bfloat16"]
        run_job(recipe, faults, job["processes"], job["overrides"], lacks_bfloat16=lacks)
