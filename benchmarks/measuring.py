"""How does a benchmark time two systems in turns? Each is a process of its own that measures when it is asked to."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Measurer:
    """A measuring process, as those see it who ask it to measure.

    It prints ``ready``, and then for each line that it reads, a number of steps, a JSON object of what it measured.

    Args:
        arguments: of the script that was started, by which it knows that it is to measure. ``{folder}`` in one of them
            becomes a folder that is there as long as the process.
    """

    def __init__(self, arguments: Sequence[str], *, threads: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name, "log.txt")
        filled = [argument.replace("{folder}", self.folder.name) for argument in arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, sys.argv[0], *filled],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"a measuring process ended early:\n{self.log.read_text()[-2000:]}")
        return line

    def measure(self, steps: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        result: dict[str, float] = json.loads(self._read())
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def take_turns(commands: Sequence[Sequence[str]], *, threads: int, rounds: int, steps: int) -> list[Any]:
    """What each of several processes measured in each round; each goes first in turn."""
    measurers = [Measurer(command, threads=threads) for command in commands]
    found = []
    for number in range(rounds):
        turns = measurers[:: -1 if number % 2 else 1]
        measured = {id(measurer): measurer.measure(steps) for measurer in turns}
        found.append([measured[id(measurer)] for measurer in measurers])
    for measurer in measurers:
        measurer.close()
    return list(zip(*found, strict=True))


def compare(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], name: str) -> list[float]:
    """The ratio of each round, the lowest first."""
    return sorted(our[name] / their[name] for our, their in zip(ours, theirs, strict=True))


def spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def make_gpt2(*, hidden_size: int, layers: int, heads: int, vocab_size: int, positions: int, **settings: Any) -> Any:
    """The peer of a GLM of the same shape; ``settings`` are more of its config."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_embd=hidden_size,
            n_layer=layers,
            n_head=heads,
            n_positions=positions,
            activation_function="gelu_pytorch_tanh",  # the same function as its default, in one kernel
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=1,
            **settings,
        )
    )
