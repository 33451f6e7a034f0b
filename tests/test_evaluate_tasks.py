"""Does `gmask evaluate --task` measure what the predictions file holds, and say in one line what is wrong?"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gmask.cli import main
from gmask.errors import GmaskError
from gmask.evaluation import harness
from gmask.evaluation.harness import run_task

REVIEWS = [
    {"text": "I liked it very much.", "label": "good"},
    {"text": "It was a waste of time.", "label": "bad"},
    {"text": "A great joy for all of us.", "label": "good"},
    {"text": "他说这很好。", "label": "good"},
    {"text": "Never again.", "label": "bad"},
]
CLOZE = """
kind: cloze
template: "{text} It was [MASK]."
label: label
choices: {good: great, bad: terrible}
metrics: [accuracy, macro-f1]
"""
SEQ2SEQ = """
kind: seq2seq
template: "{text} It was [gMASK]"
target: "{label}"
metrics: [exact-match]
"""

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | list[dict[str, Any]]) -> str:
        path = tmp_path / name
        lines = content if isinstance(content, str) else "".join(f"{json.dumps(line)}\n" for line in content)
        path.write_text(lines, encoding="utf-8")
        return str(path)

    return write


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_scores_are_those_of_the_predictions_that_are_written(write: Write, tmp_path: Path) -> None:
    task, data, out = write("mood.yaml", CLOZE), write("dev.jsonl", REVIEWS), tmp_path / "out"
    report = run_task(task=task, data=data, out=str(out), batch_size=2, device="cpu", tables=False)
    lines = read_lines(out / "predictions.jsonl")
    assert [line["label"] for line in lines] == [0, 1, 0, 0, 1]
    assert [line["answers"] for line in lines] == [["great", "terrible"]] * 5
    assert all(line["scores"][line["predicted_label"]] == max(line["scores"]) for line in lines)
    right = sum(line["label"] == line["predicted_label"] for line in lines)
    assert report.scores["accuracy"] == 100 * right / 5
    # the majority is "good": 3 of 5; F1 of it 2 * 3 / (2 * 3 + 2), of "bad" 0
    assert report.majority == {"accuracy": 60.0, "macro-f1": pytest.approx(100 * (6 / 8 + 0) / 2)}
    assert json.loads((out / "scores.json").read_text(encoding="utf-8")) == json.loads(json.dumps(asdict(report)))
    assert sorted(path.name for path in out.iterdir()) == ["predictions.jsonl", "scores.json"]


def test_written_answers_follow_the_settings_and_have_no_majority(write: Write, tmp_path: Path) -> None:
    task, data, out = write("mood.yaml", SEQ2SEQ), write("dev.jsonl", REVIEWS[:3]), tmp_path / "out"
    report = run_task(task=task, data=data, out=str(out), settings={"max_tokens": 2}, device="cpu", tables=False)
    lines = read_lines(out / "predictions.jsonl")
    right = sum(line["predicted_texts"][0].split() == line["answers"][0].split() for line in lines)
    assert report.scores == {"exact-match": pytest.approx(100 * right / 3)}
    assert report.majority == {}
    assert report.settings["max_tokens"] == 2
    assert all(len(line["predicted_texts"]) == 1 for line in lines)


def test_without_answers_there_are_predictions_and_no_scores(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, out = write("mood.yaml", CLOZE), tmp_path / "out"
    data = write("test.jsonl", [{"text": line["text"]} for line in REVIEWS])
    report = run_task(task=task, data=data, out=str(out), limit=2, device="cpu")
    assert (report.samples, report.scores, report.majority) == (2, {}, {})
    assert ["predicted_label" in line for line in read_lines(out / "predictions.jsonl")] == [True] * 2
    assert "2 samples without answers, so there is nothing to measure" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_measured_is_told_before_the_model_is_loaded(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(harness, "load", lambda *arguments, **keywords: loaded.append(arguments))
    data = write("dev.jsonl", REVIEWS)
    with pytest.raises(GmaskError, match="a text was written and nothing chosen"):
        run_task(task=write("mood.yaml", SEQ2SEQ.replace("exact-match", "accuracy")), data=data)
    partly = write("partly.jsonl", [*REVIEWS, {"text": "x"}])
    with pytest.raises(GmaskError, match=r"partly\.jsonl, line 6: the answer is not known.* 1 samples of 6"):
        run_task(task=write("mood.yaml", CLOZE), data=partly)
    with pytest.raises(GmaskError, match="there is no setting 'max_token'; the nearest is 'max_tokens'"):
        run_task(task=write("mood.yaml", SEQ2SEQ), data=data, settings={"max_token": 2})
    assert loaded == []


def run_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, ...]:
    monkeypatch.setattr(sys, "argv", ["gmask", "evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return (ended.value.code or 0, *capsys.readouterr())


def test_the_verb_prints_a_table_or_json(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", write("mood.yaml", CLOZE), "--data", write("dev.jsonl", REVIEWS)]
    code, shown, _ = run_verb(monkeypatch, capsys, *arguments, "--json")
    report = json.loads(shown)
    assert (code, report["samples"], report["majority"]["accuracy"]) == (0, 5, 60.0)
    code, table, _ = run_verb(monkeypatch, capsys, "bundled", *arguments)
    row = next(line for line in table.splitlines() if "accuracy" in line)
    assert (code, row.split()) == (
        0,
        ["accuracy", f"{report['scores']['accuracy']:.2f}", "60.00"],
    )


def test_options_that_miss_each_other_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--task", "superglue/rte"], "--task needs the records to measure: name their file with --data"),
        (["--adapter", "folder"], "--adapter and --set are for a task"),
        (["--set", "max_tokens=2"], "--adapter and --set are for a task"),
    ):
        code, out, error = run_verb(monkeypatch, capsys, *arguments)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert message in error
