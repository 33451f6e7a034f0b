"""Every format of data file gives the same records, each with its line; a bad one is named by its line."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmask.errors import GmaskError
from gmask.tasks.questions import make_samples
from gmask.tasks.records import FILE_READERS, read_records
from gmask.tasks.task import read_task

ROWS = [
    {"question": "Is it “good”?", "label": "yes"},
    {"question": 'A "quoted", comma', "label": "no"},
    {"question": "天气好吗？", "label": "不知道"},
]


def write_table(rows: list[dict[str, str]], **options: Any) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def write_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_parquet(rows: list[dict[str, str]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FORMATS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "a.jsonl": write_lines,
    "a.jsonl.zst": lambda rows: zstandard.compress(write_lines(rows)),
    "array.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "data.json": lambda rows: json.dumps({"version": "1", "meta": {"data": []}, "data": rows}).encode(),
    "lines.json": write_lines,
    "mark.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode(),
    "mark.jsonl": lambda rows: b"\xef\xbb\xbf" + write_lines(rows),
    "a.csv": write_table,
    "mark.csv": lambda rows: b"\xef\xbb\xbf" + write_table(rows),
    "a.tsv": lambda rows: write_table(rows, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name](ROWS))
    records = read_records(path)
    assert [record.values for record in records] == ROWS
    assert {record.path for record in records} == {path}


def test_source_and_target_lie_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "v1.train.source").write_text("one \r\n\u2028two\nthree")
    (tmp_path / "v1.train.target").write_text("1\n2\n3\n")
    records = read_records(tmp_path / "v1.train.*")
    assert [record.values for record in records] == [
        {"source": "one", "target": "1"},
        {"source": "two", "target": "2"},
        {"source": "three", "target": "3"},
    ]
    assert [record.line for record in records] == [1, 2, 3]


def test_a_source_without_target_has_no_answers(tmp_path: Path) -> None:
    (tmp_path / "test.source").write_text("one\n")
    assert [record.values for record in read_records(tmp_path / "test.source")] == [{"source": "one"}]


@pytest.mark.parametrize(("longer", "shorter"), [("source", "target"), ("target", "source")])
def test_source_and_target_of_unequal_length_are_refused(longer: str, shorter: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{longer}").write_text("1\n2\n")
    (tmp_path / f"a.{shorter}").write_text("1\n")
    with pytest.raises(GmaskError, match=rf"a\.{longer} has a line 2, a has none"):
        read_records(tmp_path / "a.source")


def test_files_of_a_glob_come_by_name_up_to_the_limit(tmp_path: Path) -> None:
    for number in (2, 1):
        (tmp_path / f"{number}.jsonl").write_bytes(write_lines(ROWS))
    records = read_records(str(tmp_path / "*.jsonl"), limit=4)
    assert [(record.path.name, record.line) for record in records] == [
        ("1.jsonl", 1), ("1.jsonl", 2), ("1.jsonl", 3), ("2.jsonl", 1),
    ]  # fmt: skip


def test_a_table_counts_the_lines_of_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",a\n\nplain,b\n')
    assert [(record.line, record.values["label"]) for record in read_records(path)] == [(2, "a"), (5, "b")]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_cell_may_be_long_and_keeps_its_line_ends(name: str, tmp_path: Path) -> None:
    long = "q" * 200_000
    (tmp_path / name).write_bytes(b"text\r\n" + long.encode() + b"\r\n" + (b'"a\r\nb"\r\n' if name == "a.csv" else b""))
    texts = [record.values["text"] for record in read_records(tmp_path / name)]
    assert texts == [long, "a\r\nb"][: 2 if name == "a.csv" else 1]


def test_a_table_of_one_column_may_hold_other_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\n"Hi; you | all"\n')
    assert [record.values for record in read_records(path)] == [{"text": "Hi; you | all"}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=6), max_size=3), min_size=1, max_size=4),
    indent=st.sampled_from([None, 0, 3]),
    wrapped=st.booleans(),
)
def test_records_of_an_array_name_their_lines(
    rows: list[dict[str, str]], indent: int | None, wrapped: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    text = json.dumps({"data": rows} if wrapped else rows, indent=indent)
    path.write_text(text)
    records = read_records(path)
    assert [record.values for record in records] == rows
    lines = text.split("\n")
    assert all("{" in lines[record.line - 1] for record in records)
    if indent is not None:
        assert len({record.line for record in records}) == len(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: not JSON \(Expecting value at column"),
        ("a.jsonl", b'{"a": 1}\n["a"]\n', r"a\.jsonl, line 2: not an object"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8"),
        ("a.jsonl.zst", b"nonsense", "zstd file is damaged"),
        ("a.json", b'{"a": 1}\n{"a": 2\n', r"a\.json, line 2: not JSON"),
        ("a.json", b'[\n{"a": 1},\n{"a": }]', r"a\.json, line 3: not JSON"),
        ("a.json", b'[\n{"a": 1},\n\n2]', r"a\.json, line 4: not an object"),
        ("a.json", b"", r"a\.json, line 1: not JSON"),
        ("a.json", b"\xff", r"a\.json, line 1: not UTF-8 text; save the file as UTF-8"),
        ("a.csv", b"a,b\n1,2\n1\n", r"a\.csv, line 3: 1 values for the 2 columns a, b"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv, line 1: two columns have the same name"),
        ("a.csv", b"text;label\nHi, you;1\n", r"a\.csv, line 1: the table seems to be separated by ';': separate its"),
        (
            "a.csv",
            b"text\tlabel\nHi\t1\n",
            r"separated by '\\t': separate its columns by commas, or by tabs in a \.tsv",
        ),
        ("a.tsv", b"text|label\nHi|1\n", r"a\.tsv, line 1: the table seems to be separated by '\|'"),
        ("a.csv", b'a,b\n1,"2"x\n', r"a\.csv, line 2: not a table"),
        ("a.csv", "a\n天".encode("gbk"), r"a\.csv, line 2: not UTF-8 text; save the file as UTF-8"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), r"a\.csv: UTF-16 text; save the file as UTF-8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), r"a\.jsonl: UTF-16 text; save the file as UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"b": NaN}\n', r"a\.jsonl, line 2: holds NaN, which JSON cannot say: write null"),
        ("a.jsonl", rb'{"a": "half \ud83d"}', r"a\.jsonl, line 1: a text holds half of a character"),
        ("a.json", b'[{"a": 1},\n{"a": -Infinity}]', r"a\.json, line 2: holds an infinite number"),
        ("a.json", b"3", r"a\.json, line 1: not an object"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r"a\.jsonl: a Git LFS pointer"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", r"a\.csv: a Git LFS pointer"),
        ("a.source", b"fine\n\xff\n", r"a\.source, line 2: not UTF-8"),
        ("a.csv", b"a,b\n", "there is no record"),
        ("a.jsonl", b"\n \n", "there is no record"),
        ("a.json", b"[]", "there is no record"),
        ("a.parquet", b"nonsense", r"a\.parquet: cannot be read as parquet"),
        ("a.xlsx", b"x", r"a\.xlsx: only \.jsonl, .* files are read"),
        ("a.target", b"x", "a .target file by its .source file"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(GmaskError, match=message) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}\n', [2, 3, 4]),
        ("a.json", b'[{"a": 1},\n5,\n{"a": 2}]', [2]),
        ("a.json", rb'[{"a": 1}, {"a": NaN},' + b'\n{"a": "\\ud83d"},\n{"a": 2}]', [1, 2]),
        ("a.jsonl", b'{"a": 1}\n{"a": NaN}\n{"a": 2}', [2]),
        ("a.csv", b"a,b\n1,x\n1\n2,x\n", [3]),
    ],
)
def test_lines_that_are_no_records_can_be_told_and_left_out(
    name: str, content: bytes, bad: list[int], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    told: list[GmaskError] = []
    records = read_records(path, on_bad=told.append)
    assert [str(record.values["a"]) for record in records] == ["1", "2"]
    assert [str(error).partition(":")[0] for error in told] == [f"{path}, line {line}" for line in bad]


def test_no_file_and_no_limit_below_one(tmp_path: Path) -> None:
    with pytest.raises(GmaskError, match="no text file at"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(GmaskError, match="at least 1, not 0"):
        read_records(tmp_path / "absent.jsonl", limit=0)


def test_a_pointer_of_git_lfs_is_called_so_in_every_format(tmp_path: Path) -> None:
    for ending in FILE_READERS:
        path = tmp_path / f"a{ending}"
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n")
        with pytest.raises(GmaskError, match="a Git LFS pointer, not the file itself"):
            read_records(path)


def test_a_pipe_is_no_file_of_records(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GmaskError, match="pipe: is no file; name a file"):
        read_records(tmp_path / "pipe")


def test_nan_in_any_column_of_parquet_is_a_missing_cell(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    nan = float("nan")
    columns = {"float": [nan], "list": [["a", None]], "numbers": [[1.0, nan]], "struct": [{"a": nan, "b": "c"}]}
    half = pyarrow.array([np.float16("nan")], pyarrow.float16())
    parquet.write_table(pyarrow.table({**columns, "half": half}), tmp_path / "a.parquet")
    (record,) = read_records(tmp_path / "a.parquet")
    expected = {"float": None, "list": ["a", None], "numbers": [1.0, None], "struct": {"a": None, "b": "c"}}
    assert record.values == {**expected, "half": None}


def test_a_history_of_nan_is_none(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"q": ["a"], "a": ["b"], "before": [float("nan")]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    task = read_task({"kind": "chat", "template": "{q}", "target": "{a}", "history": "before"})
    (sample,) = task.samples(read_records(tmp_path / "a.parquet"))
    assert (sample.history, sample.text, sample.answers) == ((), "a", ("b",))


def test_a_row_of_parquet_that_no_json_could_hold_is_left_out(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": [1.0, float("inf")]}), tmp_path / "a.parquet")
    with pytest.raises(GmaskError, match=r"a\.parquet, line 2: holds an infinite number"):
        read_records(tmp_path / "a.parquet")
    told = list[GmaskError]()
    assert [record.values for record in read_records(tmp_path / "a.parquet", on_bad=told.append)] == [{"a": 1.0}]
    assert len(told) == 1
    bytes_as_text = pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"a": bytes_as_text}), tmp_path / "b.parquet")
    with pytest.raises(GmaskError, match=r"b\.parquet: cannot be read as parquet"):
        read_records(tmp_path / "b.parquet")


@pytest.mark.parametrize("cell", ["nan", "None", "null"])
def test_missing_cells_of_parquet_are_empty_and_words_are_words(tmp_path: Path, cell: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": ["a", None, cell], "label": [1.0, float("nan"), 0.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    first, missing, word = read_records(tmp_path / "a.parquet")
    task = read_task({"kind": "classification", "template": "{text}", "label": "label", "choices": ["no", "yes"]})
    assert make_samples(task, [first], require_answers=True)[0].label == 1
    assert make_samples(task, [word], require_answers=True)[0].text == cell
    with pytest.raises(GmaskError, match="column 'text' is empty"):
        make_samples(task, [missing], require_answers=True)
