"""Do the NEON kernels equal the portable ones? They are built for aarch64 and run under qemu, if both are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "src/gmask/native/csrc"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.slow
@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user-static")
def test_neon_equals_the_portable_kernels(tmp_path: Path) -> None:
    assert COMPILER is not None and EMULATOR is not None
    sources = [*map(str, sorted(FOLDER.glob("*.cpp"))), str(Path(__file__).with_name("native_neon.cpp"))]
    program = tmp_path / "check"
    flags = ["-O2", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-static", f"-I{FOLDER}", "-pthread"]
    subprocess.run([COMPILER, *flags, *sources, "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "agree" in done.stdout
