"""Does a process keep freed memory, unless it is told otherwise, and give it back when asked?"""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from gmask.allocator import keep_freed_memory

changed = keep_freed_memory() if "keep" in sys.argv else False
for _ in range(3):
    torch.ones(3 << 22)  # 48 MB, which the heap does not have yet
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(3 << 22)
print(int(changed), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

RETURNED = """
import psutil
import torch
from gmask.allocator import give_back_freed_memory, keep_freed_memory

keep_freed_memory()
held = [torch.ones(1 << 18) for _ in range(200)]  # 1 MB each
del held[:-1]  # the last one stays, at the end of the heap
before = psutil.Process().memory_info().rss
print(int(give_back_freed_memory()), before - psutil.Process().memory_info().rss)
"""

is_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of GNU's C library")


def run_alone(program: str, *arguments: str, **environment: str) -> tuple[int, int]:
    """The two numbers that a program prints in a process of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=own | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    return first, second


def count_faults(*arguments: str, **environment: str) -> tuple[int, int]:
    """Whether a process changed the setting, and the pages that it asked the system for."""
    return run_alone(FAULTS, *arguments, **environment)


@is_glibc
def test_kept_memory_is_given_back_when_asked_for() -> None:
    was_given, returned = run_alone(RETURNED)
    assert was_given == 1
    assert returned > 150 << 20


@is_glibc
def test_freed_memory_is_used_again() -> None:
    (changed, kept), (_, returned) = count_faults("keep"), count_faults()
    assert changed == 1
    assert kept < returned / 4  # 48 MB are 12,288 pages, and they were freed 20 times


@is_glibc
@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_what_the_environment_sets_stays(setting: dict[str, str]) -> None:
    changed, faults = count_faults("keep", **setting)
    assert changed == 0
    assert faults > 10 * 12288


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from gmask import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
    assert allocator.give_back_freed_memory() is False
