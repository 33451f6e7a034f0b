"""Are files whole or absent, is every text read by one set of rules, and is what goes wrong one line?"""

import errno
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gmask.errors import GmaskError
from gmask.files import (
    check_text,
    check_values,
    parse_json,
    read_json,
    read_json_lines,
    read_lines,
    read_object,
    read_text,
    remove_drafts,
    write_json,
    write_json_lines,
    write_text,
    writing,
    written,
    written_folder,
)

MARK = b"\xef\xbb\xbf"
HALF = "\ud83d"


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def full_disk(*args: object, **settings: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- writing a file ---------------------------------------------------------------------------------------------------


def test_a_file_takes_its_place_when_its_block_ends_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "scores.bin"
    with written(path) as draft:
        draft.write_bytes(b"new")
        assert not path.exists() and draft.parent == path.parent
    assert path.read_bytes() == b"new" and only(path.parent) == ["scores.bin"]
    with written(str(path)) as draft:
        draft.write_bytes(b"newer")
        assert path.read_bytes() == b"new"
    assert path.read_bytes() == b"newer" and only(path.parent) == ["scores.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GmaskError, RuntimeError])
def test_an_error_of_the_block_is_its_own_and_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error, match=r"^mine$"), written(path) as draft:
        draft.write_text("half")
        raise error("mine")
    assert path.read_text() == "old" and only(tmp_path) == ["a.txt"]


def test_what_a_library_writes_can_be_read_by_others(tmp_path: Path, usual_umask: None) -> None:
    path = tmp_path / "model.safetensors"
    with written(path) as draft:
        save_file({"a": torch.ones(2)}, draft)
        assert draft.stat().st_mode & 0o777 == 0o600, "else the next line says nothing"
    assert path.stat().st_mode & 0o777 == 0o644
    with written_folder(tmp_path / "model") as folder:
        (folder / "deep").mkdir()
        save_file({"a": torch.ones(2)}, folder / "deep" / "model.safetensors")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "model" / "deep" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_umask_of_the_user_counts(tmp_path: Path, usual_umask: None) -> None:
    os.umask(0o077)
    write_text(tmp_path / "a.txt", "secret")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o600


def test_texts_json_and_json_lines_are_written_as_they_are_read(tmp_path: Path) -> None:
    values = {"b": ["天气", 1.5, None], "a": "\r\n\u2028"}
    write_json(tmp_path / "a.json", values, indent=2)
    assert (tmp_path / "a.json").read_text("utf-8") == json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    assert read_json(tmp_path / "a.json") == values
    write_json(tmp_path / "sorted.json", values, indent=None, sort_keys=True)
    assert (tmp_path / "sorted.json").read_text("utf-8").startswith('{"a": ')
    write_json_lines(tmp_path / "a.jsonl", iter([values, [], "x"]))
    assert list(read_json_lines(tmp_path / "a.jsonl")) == [(1, values), (2, []), (3, "x")]
    write_text(tmp_path / "a.txt", (piece for piece in ("一\n", "two")))
    assert (tmp_path / "a.txt").read_bytes() == "一\ntwo".encode()


@pytest.mark.parametrize("fault", ["replace", "fsync"])
def test_a_full_disk_is_one_line_that_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(os, fault, full_disk)
    with pytest.raises(GmaskError) as caught:
        write_json(tmp_path / "a.json", {}, kept="the last complete checkpoint")
    assert str(caught.value) == (
        f"{tmp_path / 'a.json'}: cannot be written (No space left on device); the last complete checkpoint is kept"
    )
    assert (tmp_path / "a.json").read_text() == "old" and only(tmp_path) == ["a.json"]


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        ("draft.write_bytes(bytes(9999))", "File too large"),
        ("import torch; torch.save(torch.ones(9999), draft)", "the disk may be full"),
        (
            "import torch; from safetensors.torch import save_file; save_file({'a': torch.ones(9999)}, draft)",
            "too large",
        ),
    ],
)
def test_a_disk_that_fills_while_a_library_writes_is_one_line_too(tmp_path: Path, save: str, reason: str) -> None:
    code = (
        "import sys; from gmask.errors import GmaskError; from gmask.files import written\n"
        "try:\n"
        f"    with written(sys.argv[1]) as draft: {save}\n"
        "except GmaskError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, tmp_path / "a.bin"], capture_output=True, text=True, preexec_fn=limit_files
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path / 'a.bin'}: cannot be written (")
    assert re.search(reason, line)
    assert only(tmp_path) == []


@pytest.mark.parametrize("way", [written, written_folder])
def test_an_error_names_another_file_that_was_read(
    tmp_path: Path, way: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    with (
        pytest.raises(GmaskError, match=r"a: cannot be written \(.*absent: No such file or directory\)$"),
        way(tmp_path / "a"),
    ):
        (tmp_path / "absent").read_text()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(GmaskError, match=r"file/a: cannot be written \((Not a directory|File exists)\)$"),
        way(tmp_path / "file" / "a"),
    ):
        pass
    assert only(tmp_path) == ["file"]


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(GmaskError, match=rf"{name}: is no file"):
            write_text(tmp_path / name, "")
    assert only(tmp_path) == ["folder", "pipe"]


def test_half_of_a_character_is_not_written(tmp_path: Path) -> None:
    for write in (lambda path: write_text(path, HALF), lambda path: write_json_lines(path, [{"a": HALF}])):
        with pytest.raises(GmaskError, match=r"cannot be written \(a text in it holds half of a character\)$"):
            write(tmp_path / "a.txt")
    assert only(tmp_path) == []


# --- writing a folder -------------------------------------------------------------------------------------------------


def test_a_folder_takes_its_place_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "model"
    for content in ("first", "second"):
        with written_folder(folder) as draft:
            (draft / content).write_text(content)
            assert not (folder / content).exists()
        assert only(folder) == [content], "nothing of the one before is left"
        assert only(folder.parent) == ["model"]


def test_an_error_leaves_the_folder_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    with pytest.raises(KeyboardInterrupt), written_folder(tmp_path / "model") as draft:
        (draft / "new").write_text("")
        raise KeyboardInterrupt
    assert only(tmp_path) == ["model"] and only(tmp_path / "model") == ["old"]
    real_rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        return full_disk() if self.suffix == ".partial" else real_rename(self, target)  # type: ignore[return-value]

    monkeypatch.setattr(Path, "rename", fail_once)
    with (
        pytest.raises(GmaskError, match=r"model: cannot be written \(No space left on device\); the run is kept$"),
        written_folder(tmp_path / "model", kept="the run") as draft,
    ):
        (draft / "new").write_text("")
    assert only(tmp_path) == ["model"] and only(tmp_path / "model") == ["old"]


def test_a_folder_is_only_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with written_folder(folder, replace=False) as draft:
        (draft / "a").write_text("")
    assert only(folder) == ["a"], "an empty folder is no loss"
    with (
        pytest.raises(GmaskError, match=r"model: is there already; name a new folder, or remove it$"),
        written_folder(folder, replace=False),
    ):
        raise AssertionError("it is refused before anything is done")
    (tmp_path / "file").write_text("")
    with pytest.raises(GmaskError, match=r"file: is a file; name a new folder$"), written_folder(tmp_path / "file"):
        raise AssertionError("it is refused before anything is done")
    assert only(tmp_path) == ["file", "model"]


def test_one_that_appears_meanwhile_is_not_replaced_either(tmp_path: Path) -> None:
    with (
        pytest.raises(GmaskError, match="cannot be written"),
        written_folder(tmp_path / "model", replace=False) as draft,
    ):
        (draft / "a").write_text("")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").write_text("")
    assert only(tmp_path / "model") == ["theirs"] and only(tmp_path) == ["model"]


def test_a_link_to_a_folder_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").write_text("")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    with written_folder(tmp_path / "model") as draft:
        (draft / "new").write_text("")
    assert only(tmp_path / "model") == ["new"] and only(tmp_path / "elsewhere") == ["old"]
    assert only(tmp_path) == ["elsewhere", "model"]


def test_drafts_of_killed_processes_can_be_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from gmask.files import written, written_folder\n"
        "with written(sys.argv[1] + '/a.json'), written_folder(sys.argv[1] + '/checkpoint'): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    mine = [".a.json.partial", ".b.json.01234567.partial", "a.json.01234567.partial"]
    for name in mine:
        (tmp_path / name).write_text("")
    assert len(only(tmp_path)) == 5
    remove_drafts(tmp_path / "a.json")
    remove_drafts(tmp_path / "checkpoint")
    remove_drafts(tmp_path / "absent" / "checkpoint")
    assert only(tmp_path) == mine


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", MARK])
def test_a_text_is_read_without_its_mark_and_with_plain_line_ends(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(mark + "一\r\ntwo\rthree\n".encode())
    assert read_text(tmp_path / "a.txt") == "一\ntwo\nthree\n"


BAD_FILES: list[tuple[bytes, str]] = [
    ("a\nb\n天".encode("gbk"), r"a\.x, line 3: not UTF-8 text; save the file as UTF-8$"),
    ('{"a": 1}'.encode("utf-16"), r"a\.x: UTF-16 text; save the file as UTF-8$"),
    (b"\xfe\xff" + '{"a": 1}'.encode("utf-16-be"), r"a\.x: UTF-16 text"),
    ('{"a": 1}'.encode("utf-16-le"), r"a\.x: UTF-16 text; save the file as UTF-8$"),
    ("a,b\n1,2\n".encode("utf-16-be"), r"a\.x: UTF-16 text; save the file as UTF-8$"),
    (b"version https://git-lfs.github.com/spec/v1\noid ...", r"a\.x: a Git LFS pointer, not the file itself"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_file_that_is_no_text_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.x"
    path.write_bytes(content)
    for read in (read_text, read_json):
        with pytest.raises(GmaskError, match=message):
            read(path)
    if "line" not in message:
        with pytest.raises(GmaskError, match=message):
            list(read_json_lines(path, on_bad_line=lambda error: None))


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    for read in (read_text, read_json, lambda path: list(read_lines(path)), lambda path: list(read_json_lines(path))):
        with pytest.raises(GmaskError, match=r"absent: cannot be read \(No such file or directory\)$"):
            read(tmp_path / "absent")
        with pytest.raises(GmaskError, match=r"cannot be read \(Is a directory\)$"):
            read(tmp_path)


LONE = "a text holds half of a character (a lone surrogate), or a byte that is not UTF-8,"
BAD_VALUES = [
    ('{"a": ', "not JSON (Expecting value at column 7)"),
    ('{"a": NaN}', "holds NaN, which JSON cannot say: write null, or leave it out"),
    ('{"a": [1, -Infinity]}', "holds an infinite number, which JSON cannot say: write null, or leave it out"),
    ("1e999", "holds an infinite number, which JSON cannot say: write null, or leave it out"),
    (r'{"a": [{"b": "see \ud83d."}]}', f"{LONE} in 'see "),
    (r'{"\ude00": 1}', LONE + r" in '\ude00'"),
    ("[" * 100_000, "not read, since its values are nested too deeply"),
    ("9" * 5000, "not JSON (Exceeds the limit (4300 digits) for integer string conversion"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_VALUES)
def test_a_bad_value_is_one_line_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GmaskError) as caught:
        parse_json(text)
    assert str(caught.value).startswith(message)
    path = tmp_path / "a.jsonl"
    path.write_text(f"1\n\n{text}\n2\n")
    told: list[GmaskError] = []
    assert list(read_json_lines(path, on_bad_line=told.append)) == [(1, 1), (4, 2)]
    assert [str(error) for error in told] == [f"{path}, line 3: {caught.value}"]
    with pytest.raises(GmaskError) as first:
        list(read_json_lines(path))
    assert str(first.value) == str(told[0])


def test_an_error_in_a_json_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n"a": 1,\n"b": }')
    with pytest.raises(GmaskError, match=r"a\.json, line 3: not JSON \(Expecting value at column 6\)$"):
        read_json(path)
    path.write_text('{"a": NaN}')
    with pytest.raises(GmaskError, match=r"a\.json: holds NaN"):
        read_json(path)


def test_characters_and_numbers_that_only_look_odd_are_read() -> None:
    assert parse_json(r'["\ud83d\ude00", "\\ud83d", "é\u0000", 1e308, -0.0]') == ["😀", r"\ud83d", "é\0", 1e308, -0.0]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(), lambda part: st.lists(part) | st.dictionaries(st.text(), part)))  # fmt: skip
def test_every_value_that_json_can_say_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value


@given(st.text(st.characters(exclude_categories=())))
def test_a_text_is_refused_exactly_if_it_has_no_utf8(text: str) -> None:
    has_utf8 = not any("\ud800" <= character <= "\udfff" for character in text)
    for check in (check_text, check_values, lambda text: parse_json(json.dumps([text]))):
        if has_utf8:
            check(text)
        else:
            with pytest.raises(GmaskError, match="half of a character") as caught:
                check(text)
            assert str(caught.value).encode() and "\n" not in str(caught.value)


def test_bytes_of_an_argument_are_told_by_their_name() -> None:
    with pytest.raises(
        GmaskError, match=r"^--prompt holds half of a character \(a lone surrogate\), or a byte that is not UTF-8, in '"
    ):
        check_text(os.fsdecode("你好".encode("gbk")), "--prompt")
    assert check_text("你好") == "你好"


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("pack", [bytes, zstandard.compress], ids=["plain", "zst"])
def test_lines_keep_their_ends_and_numbers(tmp_path: Path, mark: bytes, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("a.jsonl" if pack is bytes else "a.jsonl.zst")
    path.write_bytes(pack(mark + "one\r\n\u2028two\u0085\n\n".encode() + b"\xff\nlast"))
    lines = list(read_lines(path))
    assert [number for number, _ in lines] == [1, 2, 3, 4, 5]
    assert [str(line) for _, line in lines] == ["one\r\n", "\u2028two\u0085\n", "\n", "not UTF-8 text", "last"]
    assert isinstance(lines[3][1], GmaskError)
    assert [number for number, _ in read_lines(path, start=3)] == [4, 5]
    assert list(read_lines(path, start=9)) == []


def test_a_long_line_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + b"1234\n" + b"x" * 3_000_000 + b"\n12345678\n123456789\n\nend")
    lines = list(read_lines(path, max_bytes=9))
    assert [str(line) for _, line in lines] == [
        "1234\n", "longer than 9 bytes, so it is not read", "12345678\n", "longer than 9 bytes, so it is not read",
        "\n", "end",
    ]  # fmt: skip
    assert [str(line) for _, line in read_lines(path, max_bytes=9, start=4)] == ["\n", "end"]


def test_damaged_compression_names_the_line_before(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b"1\n" * 100_000)[:-3] + b"abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(GmaskError, match=r"a\.jsonl\.zst, after line \d+: the zstd file is damaged"):
        list(read_json_lines(path))


def test_an_object_of_a_model_folder_may_hold_what_a_vocabulary_needs(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    assert read_object(path, required=False) == {}
    path.write_bytes(MARK + rb'{"\ud83d": Infinity}')
    assert read_object(path) == {HALF: float("inf")}


BAD_OBJECTS = [
    (b"[]", r"a\.json: expected a JSON object; {}$"),
    (b'{\n"a": }', r"a\.json, line 2: not JSON \(Expecting value at column 6\); {}$"),
    (b"[" * 100_000, r"a\.json: not read, since its values are nested too deeply; {}$"),
    (b"9" * 5000, r"a\.json: not JSON \(Exceeds the limit .*\); {}$"),
    (b"", r"a\.json: truncated or damaged, {} \(it is empty\)$"),
    (None, r"a\.json: missing; {}$"),
    ("天".encode("gbk"), r"a\.json, line 1: not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "message"), BAD_OBJECTS)
def test_an_object_that_cannot_be_read_is_one_line_that_says_where_and_what_to_do(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GmaskError, match=message.format("download or copy it again")):
        read_object(path)
    with pytest.raises(GmaskError, match=message.format("delete it")) as caught:
        read_object(path, remedy="delete it")
    assert "\n" not in str(caught.value)


def test_numbers_that_json_does_not_have_are_read_where_they_are_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"loss": NaN}\n{"loss"')
    told: list[GmaskError] = []
    ((number, record),) = read_json_lines(path, told.append, checked=False)
    assert number == 1 and math.isnan(record["loss"])
    assert [str(error) for error in told] == [f"{path}, line 2: not JSON (Expecting ':' delimiter at column 8)"]


def test_an_object_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(70 << 20)  # a sparse file
    with pytest.raises(GmaskError, match=r"config\.json: has 70 MB, and no such file is as large"):
        read_object(path)


@pytest.mark.skipif(not Path("/dev/zero").is_char_device(), reason="a device of Unix")
def test_a_device_is_refused_for_it_has_no_end() -> None:
    for read in (read_text, lambda path: list(read_lines(path))):
        with pytest.raises(GmaskError, match=r"^/dev/zero: is a device, where a file is expected$"):
            read("/dev/zero")


@pytest.mark.parametrize("name", ["a\0b", "cut \ud83d"])
def test_names_that_no_file_can_have_are_one_line(name: str) -> None:
    for read in (read_text, lambda path: list(read_lines(path))):
        with pytest.raises(GmaskError, match="cannot be read"):
            read(name)


def test_a_name_that_a_library_cannot_write_is_told_as_the_name(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    for name, reason in (
        (path, "its name holds bytes that are not UTF-8"),
        (tmp_path / "a", "a text in it holds half"),
    ):
        with pytest.raises(GmaskError, match=reason), writing(name, name):
            "\udcff".encode()
