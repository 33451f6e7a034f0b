"""Are the records of a task found where they lie, in the forms of the archives and of the hub?"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation_data import write_lines
from gmask.errors import GmaskError
from gmask.evaluation.results import read_published
from gmask.evaluation.suite import load_suite, plan_tasks, suite_names
from gmask.tasks.metrics import METRICS
from gmask.tasks.records import Record
from gmask.tasks.sources import DataSource, MissingDataError, find_records, name_classes
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


def test_a_set_of_the_hub_is_read_where_no_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, Any]]):
        def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
            super().__init__(rows)
            self.features = features

    class ClassLabel:
        names = ("entailment", "not_entailment")

    records = [{"premise": "a", "hypothesis": "b", "label": 1}, {"premise": "c", "hypothesis": "d"}]
    rows, asked = Rows(records, {"label": ClassLabel()}), list[Any]()

    def load_dataset(*arguments: Any, **keywords: Any) -> Any:
        asked.append((*arguments, keywords["split"]))
        if len(asked) > 1:
            raise ConnectionError("the hub cannot be reached")
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, ClassLabel=ClassLabel))
    task = load_task("superglue/rte")
    found = find_records(task.data, None, "validation", name="rte", labels=tuple(task.choices))
    (sample,) = task.stream(found.stream(1, None))
    assert asked == [("aps/super_glue", "rte", "validation")]
    assert (found.name, found.hashes(), sample.label) == ("aps/super_glue/rte:validation", {}, 1)
    with pytest.raises(MissingDataError, match=r"on the hub cannot be read \(the hub cannot be reached\)"):
        find_records(task.data, None, "validation", name="rte")
    with pytest.raises(MissingDataError, match="on the hub it is aps/super_glue/rte:validation, which is read where"):
        find_records(task.data, tmp_path, "validation", name="rte")
    assert len(asked) == 2, "with a folder the network is not asked"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDataError, match="on the hub needs pip install datasets"):
        find_records(task.data, None, "validation", name="rte")


def test_classes_of_the_hub_are_named_as_the_task_names_its_labels() -> None:
    row, classes = {"label": 1, "other": 0}, {"label": ["False", "True"]}
    assert name_classes(row, classes, ("false", "true")) == {"label": "true", "other": 0}
    assert name_classes(row, classes, ("0", "1")) == row
    assert name_classes({"label": -1}, classes, ("false", "true")) == {"label": -1}


@pytest.mark.parametrize(
    ("name", "row", "text", "label"),
    [
        (
            "superglue/multirc",
            {"paragraph": "Ann ate.", "question": "Who ate?", "answer": "Ann", "label": 1,
             "idx": {"paragraph": 3, "question": 7, "answer": 1}},
            "Ann ate. Question: Who ate? Is it Ann? [MASK].",
            1,
        ),
        (
            "superglue/record",
            {"passage": "Ann met Bob.", "query": "@placeholder left.", "entities": ["Ann", "Bob"], "answers": ["Bob"],
             "idx": {"passage": 1, "query": 2}},
            "Ann met Bob.  [MASK] left.",
            1,
        ),
        (
            "superglue/wsc",
            {"text": "Mark told Pete lies. He did.", "span1_text": "Mark", "span1_index": 0, "span2_text": "He",
             "span2_index": 4, "label": "true"},
            "Mark told Pete lies. *He* did. In the passage above, does the pronoun '*He*' refer to Mark? [MASK].",
            1,
        ),
        (
            "clue/cmrc",
            {"context": "北京是首都。", "question": "首都？", "answers": {"text": ["北京"] * 2}},
            "问题：首都？ 答案：[MASK] 北京是首都。",
            None,
        ),
    ],
)  # fmt: skip
def test_the_hub_has_one_row_where_the_archive_nests(name: str, row: dict[str, Any], text: str, label: Any) -> None:
    (sample,) = load_task(name).samples([Record(row, Path("hub"), 1)])
    assert (sample.text, sample.label) == (text, label)


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
