"""What this machine can compute with: bfloat16 by instructions of its own, and how fast that is where it has none."""

import platform
import time

import torch


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
