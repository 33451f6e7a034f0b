"""Is there room for a model?"""

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from gmask.errors import GmaskError

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
