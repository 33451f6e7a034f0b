"""Does the script that measures everything on a GPU run from end to end, at a toy size on a CPU?"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.py"
PARTS = ("tests", "decoding", "engine", "attention", "pretraining", "trainer")


def run_toy(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert (out / "results.json").is_file(), done.stderr
    return done.returncode, json.loads((out / "results.json").read_text("utf-8"))


def test_a_part_writes_json_and_a_table(tmp_path: Path) -> None:
    code, found = run_toy(tmp_path, "--parts", "attention")
    assert code == 0 and found["parts"].keys() == {"attention"}
    records = found["parts"]["attention"]["records"]
    assert [record["attention"] for record in records] == 2 * ["sdpa with a mask", "two parts"]
    assert all(record["largest_difference"] < 0.02 for record in records)  # of bfloat16
    table = (tmp_path / "tables.md").read_text("utf-8")
    assert "## attention" in table and "| sdpa with a mask |" in table


def test_a_part_that_is_cut_off_is_told_and_the_next_one_goes_on(tmp_path: Path) -> None:
    code, found = run_toy(tmp_path, "--parts", "engine", "attention", "--limits", "0.001")
    assert code == 1 and list(found["parts"]) == ["engine", "attention"]
    for part in found["parts"].values():
        assert part["error"].startswith("cut off after") and part["records"] == []
    assert "cut off after" in (tmp_path / "tables.md").read_text("utf-8")


@pytest.mark.slow
def test_all_parts_run(tmp_path: Path) -> None:
    code, found = run_toy(tmp_path, "--limits", "6")
    errors = {name: part["output"] for name, part in found["parts"].items() if part["error"]}
    assert errors == {} and code == 0
    assert tuple(found["parts"]) == PARTS
    records = {name: part["records"] for name, part in found["parts"].items()}
    assert [record["weights"] for record in records["decoding"]] == ["bf16", "int8", "int4"]
    assert all(record["same_tokens"] == 4 for record in records["decoding"])
    assert [record["rows"] for record in records["engine"]] == [1, 3]
    assert [record["shape"] for record in records["pretraining"]] == ["toy", "toy"]
    assert records["trainer"][0]["positions_per_second"] > 0
