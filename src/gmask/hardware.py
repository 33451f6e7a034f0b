"""This machine: which device and dtype to use, how much memory is free, and whether something fits.

oneDNN, which multiplies bfloat16 matrices, keeps what it prepared for each shape, 1024 of them: at the head of a small
model 4 MB each. Texts of ever new lengths would fill gigabytes, and seldom be the same again.
"""

import os
import platform
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from gmask.errors import GmaskError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> str:
    """The fastest device of this machine: CUDA, Apple's MPS, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name; None for ``"auto"``.

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
    """The instructions that decide how fast bfloat16 is multiplied: ``"amx"``, ``"avx512_bf16"``, ``"avx2"`` ..."""
    if _has("amx_bf16", "_is_amx_tile_supported"):
        return "amx"
    if _has("avx512_bf16", "_is_avx512_bf16_supported"):
        return "avx512_bf16"
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "neon_bf16" if _has("arm_bf16", "_is_arm_bf16_supported") else "neon"
    return torch.backends.cpu.get_cpu_capability().lower()


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 by instructions of its own; without them it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpu_instructions() in ("amx", "avx512_bf16", "neon_bf16")


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of a training pass: ``"float32"`` or ``"bfloat16"`` as named; ``"auto"`` takes the faster one."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def describe_training_dtype(name: str, device: torch.device) -> str:
    """One line about the type that `training_dtype` chooses, with a measured warning where it is the slower one."""
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


def bfloat16_slowdown(*, rows: int = 512, width: int = 512, repeats: int = 5) -> float:
    """The time of a bfloat16 product ``[rows, width] @ [width, width]`` on this CPU, in times of the float32 one."""
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
    """Whether torch reports a capability of the CPU; older versions have a probe of their own for some."""
    listed: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if capability in listed:
        return bool(listed[capability])
    return bool(getattr(torch.cpu, probe, lambda: False)())


CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; of the CPU (and Apple's GPU, which shares it), what this process may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit = _container_room(CONTROL_GROUP)
    return available if limit is None else min(available, limit)


def check_room(source: Path, needed: int, device: torch.device, *, advice: str = "") -> None:
    """Raises `GmaskError`, with the numbers, if a device has less than ``needed`` bytes free.

    source: what is to be loaded; advice: what needs less.
    """
    free = free_bytes(device)
    if needed <= free:
        return
    numbers = f"needs {format_bytes(needed)} of memory on {device}, {format_bytes(free)} are free"
    raise GmaskError(f"{source}: {numbers}{advice and '; '}{advice}")


def format_bytes(count: int) -> str:
    """In decimal units, such as ``7.2 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def _container_room(group: Path) -> int | None:
    """Bytes to the limit of the container; None without one. What only caches files is given up when it is needed."""
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
    """Bounds the cache of this process, unless the environment does. To be called before the first product."""
    os.environ.setdefault(PRIMITIVE_CACHE, str(PRIMITIVE_CACHE_SHAPES))
