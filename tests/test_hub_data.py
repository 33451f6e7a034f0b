"""Are the data sets of the hub read by the library datasets, in the columns that they have there?"""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_hub import FakeHub
from gmask.errors import GmaskError
from gmask.evaluation.harness import run_tasks
from gmask.tasks.records import Sample
from gmask.tasks.sources import DataSource, MissingDataError, find_records, name_classes
from gmask.tasks.task import load_task, task_names
from tiny_folder import make_folder

datasets = pytest.importorskip("datasets")

SUPERGLUE, CLUE = "aps/super_glue", "clue/clue"
YES_NO, NLI = ["False", "True"], ["neutral", "entailment", "contradiction"]
PAIR = {"sentence1": "甲。", "sentence2": "乙。", "idx": 0}
QUESTION = {"question": "1+1?", "A": "1", "B": "2", "C": "3", "D": "4"}
SETS: dict[str, tuple[str, str, str, dict[str, Any], list[str], str, int | str]] = {
    "superglue/boolq": (
        SUPERGLUE, "boolq", "validation", {"question": "is it", "passage": "It is.", "idx": 0, "label": 1}, YES_NO,
        "It is. Question: is it? Answer: [MASK].", 1,
    ),
    "superglue/cb": (
        SUPERGLUE, "cb", "validation", {"premise": "He may.", "hypothesis": "He does.", "idx": 0, "label": 2},
        ["entailment", "contradiction", "neutral"], '"He does"? [MASK], "He may."', 2,
    ),
    "superglue/copa": (
        SUPERGLUE, "copa", "validation",
        {"premise": "It rained.", "choice1": "We left.", "choice2": "We sang.", "question": "effect", "idx": 0,
         "label": 1},
        ["choice1", "choice2"], '"we left" or "we sang"? It rained, so [MASK].', 1,
    ),
    "superglue/multirc": (
        SUPERGLUE, "multirc", "validation",
        {"paragraph": "Ann ate.", "question": "Who ate?", "answer": "Ann", "label": 1,
         "idx": {"paragraph": 3, "question": 7, "answer": 1}},
        YES_NO, "Ann ate. Question: Who ate? Is it Ann? [MASK].", 1,
    ),
    "superglue/record": (
        SUPERGLUE, "record", "validation",
        {"passage": "Ann met Bob.", "query": "@placeholder left.", "entities": ["Ann", "Bob"], "answers": ["Bob"],
         "entity_spans": {"text": ["Ann", "Bob"], "start": [0, 8], "end": [3, 11]}, "idx": {"passage": 1, "query": 2}},
        [], "Ann met Bob.  [MASK] left.", 1,
    ),
    "superglue/rte": (
        SUPERGLUE, "rte", "validation", {"premise": "Ann ate.", "hypothesis": "She ate.", "idx": 0, "label": 1},
        ["entailment", "not_entailment"], '"She ate"? [MASK], "Ann ate."', 1,
    ),
    "superglue/wic": (
        SUPERGLUE, "wic", "validation",
        {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "start1": 2, "start2": 4, "end1": 6,
         "end2": 8, "idx": 0, "label": 0},
        YES_NO, '"A bank." / "The bank." Similar sense of "bank"? [MASK].', 0,
    ),
    "superglue/wsc": (
        SUPERGLUE, "wsc.fixed", "validation",
        {"text": "Mark told Pete lies. He did.", "span1_index": 0, "span2_index": 4, "span1_text": "Mark",
         "span2_text": "He", "idx": 0, "label": 1},
        YES_NO, "Mark told Pete lies. *He* did. In the passage above, does the pronoun '*He*' refer to Mark? [MASK].",
        1,
    ),
    "clue/afqmc": (CLUE, "afqmc", "validation", {**PAIR, "label": 1}, ["0", "1"], "“甲。”和“乙。”的意思[MASK]。", 1),
    "clue/c3": (
        CLUE, "c3", "validation",
        {"id": 0, "context": ["男：我来了。"], "question": "谁？", "choice": ["他", "她"], "answer": "她"}, [],
        "男：我来了。\n问：谁？ 答：[MASK]", 1,
    ),
    "clue/chid-clue": (
        CLUE, "chid", "validation",
        {"idx": 0, "candidates": ["一", "二"], "content": ["甲#idiom1#乙"],
         "answers": {"text": ["二"], "candidate_id": [1]}},
        [], "甲[MASK]乙", 1,
    ),
    "clue/cluewsc": (  # whose classes are the other way round on the hub
        CLUE, "cluewsc2020", "validation",
        {"idx": 0, "text": "我见他。", "label": 1,
         "target": {"span1_text": "我", "span2_text": "他", "span1_index": 0, "span2_index": 2}},
        ["true", "false"], "我见【他】。 其中的“他”[MASK]指“我”。", 0,
    ),
    "clue/cmnli": (
        CLUE, "cmnli", "validation", {**PAIR, "label": 1}, NLI, "“甲。”由此可知“乙。”，这是[MASK]。", 0,
    ),
    "clue/cmrc": (
        CLUE, "cmrc2018", "validation",
        {"id": "1", "context": "北京是首都。", "question": "首都？",
         "answers": {"text": ["北京", "北京"], "answer_start": [0, 0]}},
        [], "问题：首都？ 答案：[MASK] 北京是首都。", "北京",
    ),
    "clue/csl": (
        CLUE, "csl", "validation",
        {"idx": 0, "corpus_id": 9, "abst": "摘要。", "label": 1, "keyword": ["甲", "乙"]}, ["0", "1"],
        "关键词：甲、乙。这些词[MASK]下文的关键词：摘要。", 1,
    ),
    "clue/iflytek": (
        CLUE, "iflytek", "validation", {"sentence": "好用", "label": 3, "idx": 0}, [str(i) for i in range(119)],
        "这是一款[MASK]应用：好用", 3,
    ),
    "clue/ocnli": (
        CLUE, "ocnli", "validation", {**PAIR, "label": 2}, NLI, "“甲。”由此可知“乙。”，这是[MASK]。", 2,
    ),
    "clue/tnews": (
        CLUE, "tnews", "validation", {"sentence": "球赛", "label": 3, "idx": 0},
        ["100", "101", "102", "103", "104", "106", "107", "108", "109", "110", "112", "113", "114", "115", "116"],
        "这是一则[MASK]新闻：球赛", 3,
    ),
    "exams/mmlu": (
        "cais/mmlu", "all", "test",
        {"question": "1+1?", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 1},
        ["A", "B", "C", "D"], "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: [MASK]", 1,
    ),
    "exams/ceval": (  # each subject is a part
        "ceval/ceval-exam", "law", "val", {"id": 0, **QUESTION, "answer": "B", "explanation": ""}, [],
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\n答案：[MASK]", 1,
    ),
    "language-model/lambada": (
        "EleutherAI/lambada_openai", "default", "test", {"text": "He saw a dog"}, [], "He saw a [MASK]", "dog",
    ),
    "seq2seq/cnndm": (
        "abisee/cnn_dailymail", "3.0.0", "test", {"article": "Long.", "highlights": "Short.", "id": "x"}, [],
        "[sMASK] Content: Long.", "Short.",
    ),
    "seq2seq/adgen": (
        "shibing624/AdvertiseGen", "", "dev", {"content": "类型#裤", "summary": "好裤。"}, [],
        "类型#裤 [gMASK]", "好裤。",
    ),
}  # fmt: skip
"""By task: the set, its part and split, a row, the names of its classes; the sample's text, its label or its answer."""


WIKITEXT = ["", " = Bob = \n", "", " Bob ran @-@ fast , and fell . \n", ""]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    cache = tmp_path_factory.mktemp("hub")
    with FakeHub() as hub, pytest.MonkeyPatch.context() as patches:
        patches.setattr(constants, "ENDPOINT", hub.url)
        patches.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patches.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patches.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patches.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        for module in (constants, datasets.config):
            patches.setattr(module, "HF_HUB_OFFLINE", False)
        datasets.disable_progress_bars()
        publish(hub)
        yield hub


def publish(hub: FakeHub) -> None:
    """All sets: a card that names the parts and a file of each split; without parts a file named by the split."""
    parts = dict[str, dict[str, dict[str, bytes]]]()
    for repository, config, split, row, classes, _, _ in SETS.values():
        splits = {split: to_parquet([row], classes)}
        if repository == SUPERGLUE:
            splits["train"] = to_parquet([row] * 3, classes)
        parts.setdefault(repository, {})[config] = splits
    parts["ceval/ceval-exam"]["logic"] = {"val": to_parquet([{"id": 0, **QUESTION, "answer": "D", "explanation": ""}])}
    for config in ("wikitext-2-v1", "wikitext-103-v1"):
        parts.setdefault("Salesforce/wikitext", {})[config] = {
            "test": to_parquet([{"text": line} for line in WIKITEXT])
        }
    for repository, configs in parts.items():
        if "" in configs:
            row = next(row for name, _, _, row, *_ in SETS.values() if name == repository)
            hub.add(f"datasets/{repository}", {f"{split}.json": json.dumps(row).encode() for split in ("dev", "train")})
            continue
        card = [
            {"config_name": name, "data_files": [{"split": one, "path": f"{name}/{one}-*"} for one in splits]}
            for name, splits in configs.items()
        ]
        files = {f"{name}/{one}-0.parquet": data for name, splits in configs.items() for one, data in splits.items()}
        hub.add(f"datasets/{repository}", {"README.md": f"---\nconfigs: {json.dumps(card)}\n---\n".encode(), **files})
    xsum = "datasets/EdinburghNLP/xsum"
    hub.add(xsum, {"README.md": b"", "xsum.py": b"raise SystemExit('code of the hub')"})
    rows = to_parquet([{"document": "Long.", "summary": "Short.", "id": "1"}])
    hub.add(
        xsum, {f"default/{split}/0000.parquet": rows for split in ("train", "test")}, refs=("refs/convert/parquet",)
    )


def to_parquet(rows: list[dict[str, Any]], classes: list[str] | None = None) -> bytes:
    made = datasets.Dataset.from_list(rows)
    if classes:
        made = made.cast_column("label" if "label" in rows[0] else "answer", datasets.ClassLabel(names=classes))
    made.to_parquet(file := io.BytesIO())
    return file.getvalue()


def read_hub(name: str, split: Any = "validation") -> list[Sample]:
    task = load_task(name)
    found = find_records(task.data, None, split, name=name, labels=tuple(task.choices))
    return list(task.stream(found.stream(None, None), require_answers=False))


@pytest.mark.parametrize("name", SETS)
def test_a_task_reads_its_set_as_it_is_on_the_hub(hub: FakeHub, name: str) -> None:
    *_, text, right = SETS[name]
    sample = read_hub(name)[0]
    assert (sample.text, sample.answers[0] if isinstance(right, str) else sample.label) == (text, right)


def test_each_set_that_a_task_names_is_tried_here() -> None:
    tried = {SETS[name][0] for name in SETS} | {"EdinburghNLP/xsum", "Salesforce/wikitext"}
    named = {load_task(name).data.hub for name in task_names()} - {None}
    assert named == tried


def test_a_set_without_training_records_is_not_asked_for_them(hub: FakeHub) -> None:
    asked = len(hub.asked)
    with pytest.raises(MissingDataError, match=r"name their file with --train$"):
        read_hub("language-model/lambada", "train")
    assert len(hub.asked) == asked


def test_a_part_for_each_subject_is_one_task_with_groups(hub: FakeHub) -> None:
    assert [(one.group, one.label) for one in read_hub("exams/ceval")] == [
        ("Humanities/law", 1), ("Humanities/logic", 3)
    ]  # fmt: skip


def test_the_lines_of_wikitext_are_one_text_as_in_its_file(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    # the published file has a space in its empty lines
    (tmp_path / "wikitext2" / "test.txt").write_text("".join(line or " \n" for line in WIKITEXT), "utf-8")
    task = load_task("language-model/wikitext2")
    files = find_records(task.data, tmp_path, "validation", name="wikitext2")
    (sample,), (same,) = read_hub("language-model/wikitext2"), task.stream(files.stream(None, None))
    assert (sample.answers, sample.words) == (same.answers, same.words)
    assert "ran-fast, and fell." in sample.answers[0]


def test_no_script_of_the_hub_is_run_and_the_converted_branch_is_read(hub: FakeHub) -> None:
    (sample,) = read_hub("seq2seq/xsum")
    assert (sample.text, sample.answers) == ("[sMASK] Content: Long.", ("Short.",))
    assert "xsum.py" not in hub.downloads()
    hub.add("datasets/a/script", {"README.md": b"", "script.py": b"raise SystemExit('code of the hub')"})
    with pytest.raises(MissingDataError, match=r"scripts are no longer supported, but found script\.py"):
        find_records(DataSource(hub="a/script"), None, "validation", name="t")


def test_a_task_is_measured_on_the_hub_as_on_its_file(hub: FakeHub, tmp_path: Path) -> None:
    model = str(make_folder(tmp_path / "model"))
    run = {"tasks": ["superglue/rte"], "device": "cpu", "tables": False, "shots": 1}
    (tmp_path / "RTE").mkdir()
    line = json.dumps({"premise": "Ann ate.", "hypothesis": "She ate.", "idx": 0, "label": "not_entailment"}) + "\n"
    (tmp_path / "RTE" / "val.jsonl").write_text(line, "utf-8")
    with pytest.raises(GmaskError, match="aps/super_glue/rte:train: has 0 samples, too few for 1 examples"):
        run_tasks(model, **run)  # a sample is never its own example
    run["shots"] = 0
    (online,) = run_tasks(model, **run).tasks
    (local,) = run_tasks(model, data=str(tmp_path), **run).tasks
    assert online.scores == local.scores and online.data == "aps/super_glue/rte:validation"
    assert online.hashes == {"aps/super_glue": hub.refs["datasets/aps/super_glue", "main"]}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DataSource(hub="a/damaged"), r"a/damaged:validation on the hub cannot be read \(.*JSON"),
        (DataSource(hub="a/torn"), r"a/torn:validation on the hub cannot be read \(.*[Pp]arquet"),
        (DataSource(hub="a/gated"), "a/gated:validation on the hub cannot be read .*is a gated dataset"),
        (DataSource(hub="a/none"), "a/none:validation on the hub cannot be read .*doesn't exist on the Hub"),
        (DataSource(hub=SUPERGLUE, config="rt"), "super_glue/rt:validation on the hub cannot be read .*'rt' not found"),
        (DataSource(hub=SUPERGLUE, config="rte", split="dev"), "cannot be read .*Unknown split"),
    ],
)
def test_a_set_that_cannot_be_read_is_one_line(hub: FakeHub, source: DataSource, message: str) -> None:
    hub.add("datasets/a/damaged", {"validation.jsonl": b'{"a": 1}\n{"a": \n'})
    hub.add("datasets/a/torn", {"data/validation-0.parquet": b"PAR1" * 9})
    hub.add("datasets/a/gated", {"data/validation-0.parquet": b"PAR1"})
    hub.refused["datasets/a/gated"] = (403, "GatedRepo")
    with pytest.raises(MissingDataError, match=message) as caught:
        find_records(replace(source, files=("x",), url="https://x.org"), None, "validation", name="t")
    assert "\n" not in str(caught.value) and "get them from https://x.org" in str(caught.value)


def test_without_a_connection_the_cache_is_read_and_the_rest_told_at_once(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (known,) = read_hub("superglue/rte")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    asked = len(hub.asked)
    assert read_hub("superglue/rte") == [known]
    with pytest.raises(MissingDataError, match=r"a/new:validation: the hub cannot be reached, and its cache"):
        find_records(DataSource(hub="a/new"), None, "validation", name="t")
    assert len(hub.asked) == asked and not constants.HF_HUB_OFFLINE


def test_classes_of_the_hub_are_named_as_the_task_names_its_labels() -> None:
    row, classes = {"label": 1, "other": 0}, {"label": ["False", "True"]}
    assert name_classes(row, classes, ("false", "true")) == {"label": "true", "other": 0}
    assert name_classes(row, classes, ("0", "1")) == row
    assert name_classes({"label": -1}, classes, ("false", "true")) == {"label": -1}
