"""Do the NEON kernels equal the portable ones? They are built for aarch64 and run under qemu, if both are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "src/gmask/native/csrc"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (COMPILER and EMULATOR):
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user-static")
    sources = [*map(str, sorted(FOLDER.glob("*.cpp"))), str(Path(__file__).with_name("native_neon.cpp"))]
    built = tmp_path_factory.mktemp("neon") / "check"
    flags = ["-O2", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-static", f"-I{FOLDER}", "-pthread"]
    subprocess.run([COMPILER, *flags, *sources, "-o", str(built)], check=True, timeout=300)
    return built


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "sets"), [("cortex-a72", "neon"), ("neoverse-n1", "neon dotprod"), ("max", "neon dotprod i8mm")]
)
def test_neon_equals_the_portable_kernels(program: Path, cpu: str, sets: str) -> None:
    """With the instructions for integers that a CPU has, and without those that it lacks."""
    assert EMULATOR is not None
    done = subprocess.run([EMULATOR, "-cpu", cpu, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(f"{sets}: ") and "agree" in done.stdout
