"""The cores of this machine that other programs leave to this one: as many threads compute.

The threads of a product wait for each other at its end, so one that shares its core with a busy program holds up all:
two threads beside such a program took twice as long as one alone. Where a core is left to each busy program, nothing
waits; and threads that wait for a short time only, before they sleep, take little from the others.
"""

import math
import os
import time
from typing import Any

import psutil  # type: ignore[import-untyped]

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables of the environment. What they say of the number of threads, and of how they wait, is not changed."""

SPINS = "1000"
"""Rounds that GNU's threads wait before they sleep: what they do, too, where they know that cores are too few."""


class FreeCores:
    """Counts free cores by the time that passes between two looks, and sets the number of torch's threads.

    Programs of a low priority (nice) yield, and do not count.
    """

    PERIOD, LONGEST = 1.0, 10.0
    """Seconds between two looks: the system counts in hundredths of them, and long ago tells nothing of now."""

    SHARE = 0.25
    """Of a core: what others may take before it counts as theirs. One that shares a core with a thread gets half."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        self._most: int | None = None
        self._threads = 1
        self._seen = self._look()

    def _look(self) -> tuple[float, float, int]:
        """Returns the time, the seconds that others have used of our cores so far, and the number of these."""
        cores: list[Any] = psutil.cpu_times(percpu=True)
        if self._cores is not None:
            cores = [cores[core] for core in self._cores if core < len(cores)]
        others = ("idle", "iowait", "nice", "guest", "guest_nice")  # the user's time has a guest's in it
        busy = sum(value for core in cores for name, value in core._asdict().items() if name not in others)
        own = self._process.cpu_times()
        return time.monotonic(), busy - own.user - own.system, len(cores)

    def follow(self) -> None:
        """Gives torch as many threads as there are free cores, and at most those it had; looks again if it is time."""
        import torch

        if self._most is None:
            self._most = self._threads = torch.get_num_threads()
        before, passed = self._seen, time.monotonic() - self._seen[0]
        if passed >= self.PERIOD:
            self._seen = self._look()
            if passed < self.LONGEST:
                taken = (self._seen[1] - before[1]) / (self._seen[0] - before[0])
                self._threads = min(self._most, max(1, self._seen[2] - math.ceil(taken - self.SHARE)))
        if torch.get_num_threads() != self._threads:  # each thread of Python has a number of its own
            torch.set_num_threads(self._threads)


_free: FreeCores | None = None


def share_cores() -> None:
    """From now on threads wait for a short time only, and their number follows the free cores (`follow_free_cores`).

    It holds for the whole process, and is to be called before torch is imported. Programs call it, and libraries do
    not: the command ``gmask`` does. What the environment says (`THREADS`, `WAITING`) stays.
    """
    global _free
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS
    if _free is None and not any(name in os.environ for name in THREADS):
        _free = FreeCores()


def follow_free_cores() -> None:
    """Follows the free cores, if `share_cores` was called. It is called between the steps of a model."""
    if _free is not None:
        _free.follow()
