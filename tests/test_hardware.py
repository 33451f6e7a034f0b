"""The type of a training pass follows the device, and the slower choice is warned about with a measured factor."""

import math
import re

import pytest
import torch

from gmask import hardware

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        ("amx", torch.bfloat16),
        ("avx512_bf16", torch.bfloat16),
        ("neon_bf16", torch.bfloat16),
        ("avx2", torch.float32),
        ("avx512", torch.float32),
        ("neon", torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_the_cpu_has_instructions_for_it(
    found: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpu_instructions", lambda: found)
    assert hardware.training_dtype("auto", CPU) == dtype
    assert str(dtype).removeprefix("torch.") in hardware.describe_training_dtype("auto", CPU)
    assert found in hardware.describe_training_dtype("auto", CPU)


def test_a_named_type_is_taken_and_the_slow_one_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_instructions", lambda: "avx2")
    assert hardware.training_dtype("bfloat16", CPU) == torch.bfloat16
    warning = hardware.describe_training_dtype("bfloat16", CPU)
    assert re.search(r"^warning: .*takes \d+\.\d times as long as in float32 here", warning)
    assert "warning" not in hardware.describe_training_dtype("float32", CPU)


def test_this_machine_is_known() -> None:
    assert hardware.cpu_instructions() in ("amx", "avx512_bf16", "avx512", "avx2", "neon", "neon_bf16", "default")
    assert hardware.bfloat16_slowdown(rows=64, width=64, repeats=2) > 0


@pytest.mark.parametrize(
    ("vendor", "found", "least"),
    [
        ("AuthenticAMD", "AVX512", 0),
        ("AuthenticAMD", "AVX2", 1_000_000),
        ("AuthenticAMD", "DEFAULT", math.inf),
        ("GenuineIntel", "AVX2", math.inf),
        (None, "AVX2", math.inf),
    ],
)
def test_onednn_is_taken_where_it_was_measured(
    vendor: str | None, found: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: found)
    monkeypatch.setattr(hardware, "_cpu_field", lambda name: vendor)
    monkeypatch.setattr(hardware.platform, "processor", lambda: "")
    choose = hardware.onednn_from.__wrapped__
    assert choose() == least
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert choose() == math.inf
