"""Are the records of a task found where they lie, in the forms of the archives and of the hub?"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation_data import write_lines
from gmask.errors import GmaskError
from gmask.evaluation.results import read_published
from gmask.evaluation.suite import load_suite, plan_tasks, suite_names
from gmask.tasks.metrics import METRICS
from gmask.tasks.sources import DataSource, MissingDataError, find_records
from gmask.tasks.task import load_task, task_names

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
SOURCE = DataSource(
    files=("a/val.jsonl", "b/val_*.jsonl"), train=("a/train.jsonl",), url="https://x.org", licence="CC0"
)


def test_the_first_name_that_is_there_is_taken_in_the_folder_or_one_deeper(tmp_path: Path) -> None:
    def find(split: Any = "validation") -> list[Any]:
        found = find_records(SOURCE, tmp_path, split, name="t")
        return [record.values["n"] for record in found.stream(None, None)]

    with pytest.raises(
        MissingDataError, match=r"t: no records in .*: get them from https://x.org \(licence: CC0\); lo"
    ):
        find()
    write_lines(tmp_path / "deep" / "b" / "val_2.jsonl", [{"n": 2}])
    write_lines(tmp_path / "deep" / "b" / "val_1.jsonl", [{"n": 1}])
    write_lines(tmp_path / "deeper" / "b" / "val_1.jsonl", [{"n": 9}])
    assert find() == [1, 2]  # of one folder alone: sets do not mix
    write_lines(tmp_path / "b" / "val_0.jsonl", [{"n": 0}])
    assert find() == [0]
    write_lines(tmp_path / "deep" / "a" / "val.jsonl", [{"n": 3}])
    assert find() == [3]
    with pytest.raises(MissingDataError, match=r"no training records for the examples in .*looked for: a/train\.jsonl"):
        find("train")
    assert len(find_records(SOURCE, tmp_path, "validation", name="t").hashes()["val.jsonl"]) == 64


def test_a_folder_whose_name_looks_like_a_pattern_is_found(tmp_path: Path) -> None:
    write_lines(tmp_path / "[data]*" / "a" / "val.jsonl", [{"n": 1}])
    found = find_records(SOURCE, tmp_path / "[data]*", "validation", name="t")
    assert [record.values["n"] for record in found.stream(None, None)] == [1]


def test_a_set_of_the_hub_is_not_asked_for_where_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task("superglue/rte")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDataError, match="on the hub it is aps/super_glue/rte:validation, which is read where"):
        find_records(task.data, tmp_path, "validation", name="rte")
    with pytest.raises(MissingDataError, match="on the hub needs pip install datasets"):
        find_records(task.data, None, "validation", name="rte")


def test_where_the_records_are_is_no_part_of_what_a_task_is() -> None:
    task = load_task("superglue/rte")
    assert replace(task, data=SOURCE).fingerprint() == task.fingerprint()
    assert replace(task, template="{premise} [MASK]").fingerprint() != task.fingerprint()


def test_every_benchmark_says_where_its_data_are_and_under_which_licence() -> None:
    for name in task_names():
        data = load_task(name).data
        if name.startswith(("superglue/", "clue/", "exams/")):
            assert data.files and data.train, name
        if data.files:
            assert data.url and data.licence, name


def test_suites_hold_tasks_and_published_numbers_are_of_tasks() -> None:
    assert {"paper", "superglue", "clue", "language-model", "generation", "offline"} <= set(suite_names())
    for suite in suite_names():
        names = [planned.name for planned in plan_tasks([], suite)]
        assert len(set(names)) == len(names)
    for score in read_published():
        assert score.task in task_names()
        assert score.metric in METRICS


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "- superglue/copa\n- {task: superglue/copa, shots: 2}\n- superglue/copa\n"
        "- {task: {use: superglue/rte, metrics: [f1]}, name: rte by F1, data: x.jsonl}\n",
        "utf-8",
    )
    planned = plan_tasks(["superglue/w*"], str(path), limit=3)
    assert [one.name for one in planned] == [
        "superglue/wic", "superglue/wsc", "superglue/wsc-referent", "superglue/copa", "superglue/copa, 2-shot",
        "superglue/copa (2)", "rte by F1",
    ]  # fmt: skip
    assert planned[-1].task.data.files == ("x.jsonl",)
    assert {one.entry.limit for one in planned} == {3}
    for text, message in (
        ("a: b", "a suite is a list of tasks"),
        ("- {task: superglue/copa, shot: 1}", "entry 1.*no key 'shot'; the nearest is 'shots'"),
        ("- {task: superglue/copa, shots: -1}", "entry 1: shots is -1"),
        ("- {task: superglue/copa, decoding: {max_token: 1}}", "entry 1: there is no setting 'max_token'"),
        ("- {shots: 1}", "task is missing"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(GmaskError, match=message):
            load_suite(str(path))


@pytest.mark.skipif(not (CORPUS / "eval").is_dir(), reason="the small sets are not beside this checkout")
def test_the_offline_sets_are_found_and_read() -> None:
    for planned in plan_tasks([], "offline"):
        found = find_records(planned.task.data, CORPUS, "validation", name=planned.name)
        assert next(planned.task.stream(found.stream(2, None))).path is not None
