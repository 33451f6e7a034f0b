"""This machine: the best device and dtype, free memory, and whether something fits into it.

oneDNN, which multiplies bfloat16 matrices, caches a primitive for each of up to 1024 shapes; at the head of a small
model each takes 4 MB. Texts of many lengths would fill gigabytes with primitives that are seldom used again, so the
cache is bounded here.
"""

import math
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from gmask.errors import GmaskError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> str:
    """Returns the fastest device of this machine: CUDA, Apple's MPS, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns the dtype of a name; None for ``"auto"``.

    Raises:
        GmaskError: no such name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return None
    if dtype not in DTYPES:
        raise GmaskError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def cpu_instructions() -> str:
    """Returns the CPU's instruction set for products, in bfloat16 if it has one: ``"amx"``, ``"avx512_bf16"``, ..."""
    if _has("amx_bf16", "_is_amx_tile_supported"):
        return "amx"
    if _has("avx512_bf16", "_is_avx512_bf16_supported"):
        return "avx512_bf16"
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "neon_bf16" if _has("arm_bf16", "_is_arm_bf16_supported") else "neon"
    return torch.backends.cpu.get_cpu_capability().lower()


def has_bfloat16(device: torch.device) -> bool:
    """Returns True if the device has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpu_instructions() in ("amx", "avx512_bf16", "neon_bf16")


ONEDNN_FROM = {"AVX512": 0, "AVX2": 1_000_000}
"""On AMD's CPUs, by what torch makes use of: oneDNN multiplies by float32 weights of so many numbers faster than MKL.

Of an AVX-512 vector MKL makes use of one half there. With AVX2 it is slower for weights that the caches do not hold.
"""


@cache
def onednn_from() -> float:
    """Returns the entry of `ONEDNN_FROM` for this CPU; infinity where torch's own choice, MKL, was not found slower."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_both or not is_amd():
        return math.inf
    return ONEDNN_FROM.get(torch.backends.cpu.get_cpu_capability(), math.inf)


def is_amd() -> bool:
    """Returns True if the CPU is one of AMD's."""
    return "AuthenticAMD" in (_cpu_field("vendor_id") or platform.processor())


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of a training pass: ``"float32"`` or ``"bfloat16"`` as named; ``"auto"`` is the faster one."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def describe_training_dtype(name: str, device: torch.device) -> str:
    """Describes the dtype that `training_dtype` chooses in one line; warns, with a measurement, if it is slower."""
    chosen = str(training_dtype(name, device)).removeprefix("torch.")
    if device.type != "cpu":
        return f"training in {chosen} on {device}"
    found = cpu_instructions()
    if chosen == "bfloat16" and not has_bfloat16(device):
        factor = bfloat16_slowdown()
        return (
            f"warning: this CPU ({found}) has no bfloat16 instructions: a product in bfloat16 takes {factor:.1f} times "
            "as long as in float32 here; optimization.dtype=auto or float32 is the better choice"
        )
    return f"training in {chosen}: the CPU has {found}"


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Returns whether Muon is to multiply in bfloat16, as in PyTorch: everywhere but on CPUs without instructions."""
    return device.type != "cpu" or has_bfloat16(device)


def bfloat16_slowdown(*, rows: int = 512, width: int = 512, repeats: int = 5) -> float:
    """Measures the time of a bfloat16 product ``[rows, width] @ [width, width]`` on this CPU, relative to float32."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        rounds = []
        for _ in range(repeats + 1):  # the first one prepares the kernel
            started = time.perf_counter()
            left @ right
            rounds.append(time.perf_counter() - started)
        times[dtype] = min(rounds[1:])
    return times[torch.bfloat16] / times[torch.float32]


def _has(capability: str, probe: str) -> bool:
    """Returns True if torch reports a capability of the CPU. Older versions of torch have a function for some."""
    listed: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if capability in listed:
        return bool(listed[capability])
    return bool(getattr(torch.cpu, probe, lambda: False)())


CONTROL_GROUP = Path("/sys/fs/cgroup")


def describe_device(device: torch.device) -> str:
    """The name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str:
    """Returns what Linux says of the first CPU under a name; empty elsewhere, and where there is no such name."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text("utf-8", "replace").splitlines() if table.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a device; for the CPU and Apple's GPU, within the limit of the container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit = _container_room(CONTROL_GROUP)
    return available if limit is None else min(available, limit)


def check_room(source: Path, needed: int, device: torch.device, *, advise: Callable[[], str] = str) -> None:
    """Raises `GmaskError`, with the numbers, if a device has less than ``needed`` bytes free.

    ``source``: the file or folder to load; ``advise``: returns what would need less memory; it may take a second.
    """
    free = free_bytes(device)
    if needed <= free:
        return
    numbers = f"needs {format_bytes(needed)} of memory on {device}, {format_bytes(free)} are free"
    advice = advise()
    raise GmaskError(f"{source}: {numbers}{advice and '; '}{advice}")


def format_bytes(count: int) -> str:
    """Formats a number of bytes in decimal units, such as ``7.2 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def _container_room(group: Path) -> int | None:
    """Returns the bytes up to the memory limit of the container; None without one. File caches count as free."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdecimal():
        return None
    return max(0, int(limit) - int(used) + int(cached.get("inactive_file", 0)) + int(cached.get("active_file", 0)))


PRIMITIVE_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
PRIMITIVE_CACHE_SHAPES = 64  # shapes; a model's own, with one length of texts, are about a dozen


def bound_primitive_cache() -> None:
    """Bounds oneDNN's primitive cache, unless the environment does. It must be called before the first product."""
    os.environ.setdefault(PRIMITIVE_CACHE, str(PRIMITIVE_CACHE_SHAPES))
