"""The recipe that measures SuperGLUE asks and tunes each task, and says both."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from gmask.errors import GmaskError
from tuning_data import write_lines

SCRIPT = Path(__file__).parents[1] / "recipes" / "superglue.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("superglue_recipe", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_task_is_asked_and_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "sets" / "RTE").mkdir(parents=True)
    rows = [
        {"premise": f"The {animal} sleeps.", "hypothesis": f"The {animal} {verb}.", "label": label}
        for animal in ("dog", "cat", "bird", "fox")
        for verb, label in (("sleeps", "entailment"), ("runs", "not_entailment"))
    ]
    write_lines(tmp_path / "sets" / "RTE" / "train.jsonl", rows)
    write_lines(tmp_path / "sets" / "RTE" / "val.jsonl", rows[:4])
    out = tmp_path / "out"
    changes = ["optimization.epochs=1", "run.threads=1"]
    arguments = ["superglue.py", "--data", str(tmp_path), "--out", str(out), "--tasks", "rte", *changes]
    monkeypatch.setattr("sys.argv", arguments)
    load_script().main()
    assert "| superglue/rte | accuracy | 4 |" in capsys.readouterr().out
    (found,) = json.loads((out / "superglue.json").read_text("utf-8"))["tasks"]
    scores = found["metrics"]["accuracy"]
    assert found["measured"] == "val.jsonl" and scores["majority"] == 50
    assert all(0 <= scores[way] <= 100 for way in ("zero_shot", "tuned"))


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(GmaskError, match=r"superglue/rte: no RTE/train.jsonl in .*: get it from https://super"):
        load_script().find_folder(tmp_path, "rte")
