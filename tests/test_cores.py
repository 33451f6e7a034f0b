"""Do threads leave the cores to other programs that these use?"""

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from gmask import cores

FIELDS = ("user", "nice", "system", "idle", "steal")


class Machine:
    """A machine with four cores, of which this process may use three; seconds of each core by name."""

    def __init__(self) -> None:
        self.now = 100.0
        self.used = [dict.fromkeys(FIELDS, 0.0) for _ in range(4)]
        self.own = 0.0

    def pass_time(self, seconds: float, own: float = 0.0, **others: dict[int, float]) -> None:
        """Lets time pass: ``own`` cores are used by this process, and parts of the others as named."""
        self.now += seconds
        self.own += own * seconds
        self.used[0]["user"] += own * seconds
        for name, parts in others.items():
            for core, part in parts.items():
                self.used[core][name] += part * seconds

    def cpu_times(self, percpu: bool = False) -> list[Any]:
        assert percpu
        return [SimpleNamespace(_asdict=lambda core=core: dict(core)) for core in self.used]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    found = Machine()
    process = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=found.own, system=0.0))
    monkeypatch.setattr(psutil, "cpu_times", found.cpu_times)
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(cores.time, "monotonic", lambda: found.now)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield found
    torch.set_num_threads(before)


def threads_after(free: cores.FreeCores) -> int:
    free.follow()
    return torch.get_num_threads()


def test_each_busy_program_is_left_a_core(machine: Machine) -> None:
    free = cores.FreeCores()
    machine.pass_time(1.5, own=3)
    assert threads_after(free) == 3
    machine.pass_time(1.5, own=2.5, user={1: 0.5})  # one that shares its core with a thread
    assert threads_after(free) == 2
    machine.pass_time(1.5, own=2, user={1: 1.0})  # and alone on it
    assert threads_after(free) == 2
    machine.pass_time(1.5, own=1, user={0: 0.6, 1: 1.0}, steal={2: 0.9})
    assert threads_after(free) == 1  # never none
    machine.pass_time(1.5, own=1)
    assert threads_after(free) == 3


def test_neither_other_cores_nor_yielding_programs_nor_a_little_work_count(machine: Machine) -> None:
    free = cores.FreeCores()
    machine.pass_time(2, own=2, user={3: 1.0, 1: 0.2}, nice={1: 0.8, 2: 1.0})
    assert threads_after(free) == 3


def test_what_passed_in_an_instant_or_long_ago_tells_nothing(machine: Machine) -> None:
    free = cores.FreeCores()
    machine.pass_time(0.5, user={0: 1.0, 1: 1.0})
    assert threads_after(free) == 3
    machine.pass_time(600, user={0: 1.0, 1: 1.0})
    assert threads_after(free) == 3
    machine.pass_time(1, user={0: 1.0, 1: 1.0})
    assert threads_after(free) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "1000 True"),
        ({"OMP_NUM_THREADS": "2"}, "1000 False"),
        ({"OMP_WAIT_POLICY": "active"}, "None True"),
        ({"GOMP_SPINCOUNT": "7", "MKL_NUM_THREADS": "1"}, "7 False"),
    ],
)
def test_the_environment_has_the_last_word(variables: dict[str, str], expected: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os\n"
            f"for name in {(*cores.THREADS, *cores.WAITING)!r}: os.environ.pop(name, None)\n"
            f"os.environ.update({variables!r})\n"
            "from gmask import cores\n"
            "cores.follow_free_cores()\n"  # nobody asked for it yet
            "cores.share_cores()\n"
            "print(os.environ.get('GOMP_SPINCOUNT'), cores._free is not None)",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert done.stdout.strip() == expected
