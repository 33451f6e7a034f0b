"""Which tiny PPO recipes and rewards do several test files share?"""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tiny_folder import make_folder
from tuning_data import write_lines

NUMBERS = itertools.count()
RECORDS = [
    {"instruction": text, "input": "", "output": "dog"}
    for text in ("dog?", "The old man", "小猫", "It was a sunny day, and the rainy season", "我今天早上", "river?")
]
SHORT = """
def grade(completions, completion_ids, **_):
    return [1 / (1 + len(ids)) + 0.5 * ("a" in text) for text, ids in zip(completions, completion_ids)]
"""
"""A reward that short answers get, and those with an "a"."""


def write_ppo_recipe(folder: Path, *, source: str = SHORT, records: Any = RECORDS, **sections: Any) -> str:
    """A recipe for the tiny GLM on a CPU, three rollouts of 4 x 4 answers; its path.

    source: of a module with the function ``grade``, which gets a name of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = f"reward_of_test_{next(NUMBERS)}"
    (folder / f"{module}.py").write_text(source, "utf-8")
    if not (folder / "model").is_dir():
        make_folder(folder / "model")
    write_lines(folder / "train.jsonl", records)
    write_lines(folder / "validation.jsonl", records[:2])
    tree: dict[str, Any] = {
        "run": {"out": str(folder / "out"), "device": "cpu"},
        "model": {"name": str(folder / "model")},
        "task": "chat/alpaca",
        "data": {
            "root": str(folder), "train": "train.jsonl", "validation": "validation.jsonl", "max_source": 24,
            "max_target": 6,
        },
        "reward": {"function": f"{module}:grade"},
        "rollout": {"prompts": 4, "answers": 4},
        "kl": {"weight": 0.05},
        "ppo": {"epochs": 2, "minibatches": 2},
        "method": {"name": "full"},
        "optimization": {"rollouts": 3, "batch_size": 4, "learning_rate": 1e-3, "save_every": 1, "evaluate_every": 1},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), "utf-8")
    return str(path)


TIMES = {"seconds", "generate_seconds", "score_seconds"}


def read_numbers(out: Path) -> list[dict[str, Any]]:
    """The log of a run without its times: what a repeated run must give again, bit for bit."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


KILLING = """
import os, signal, pathlib
def grade(completions, completion_ids, **_):
    calls = pathlib.Path({calls!r})
    with calls.open("a") as file:
        file.write("x")
    if len(calls.read_text()) == {last}:
        os.kill(os.getpid(), signal.SIGKILL)
    return [1 / (1 + len(ids)) + 0.5 * ("a" in text) for text, ids in zip(completions, completion_ids)]
"""


def make_killing(folder: Path, *, last: int) -> str:
    """The source of the reward `SHORT`, which kills its process once, at the call that is counted as ``last``."""
    return KILLING.format(calls=str(folder / "calls"), last=last)


def run_until_killed(function: str, path: str, overrides: Sequence[str] = ()) -> None:
    """Makes a run in a process of its own, on one thread, which has to be killed.

    function: that makes the run, such as ``gmask.training.ppo:run_ppo``.
    """
    module, name = function.split(":")
    code = f"import torch; torch.set_num_threads(1); from {module} import {name}; {name}({path!r}, {list(overrides)!r})"
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert killed.returncode == -signal.SIGKILL
