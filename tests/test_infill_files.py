"""Are files filled line by line, and does a stopped run go on without loss?"""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import zstandard

import gmask
from gmask.generation import files
from gmask.generation.files import FileReport, fill_file
from gmask.generation.infill import Infiller
from gmask.generation.settings import Sampling
from tiny_folder import make_folder

TEXTS = [f"The {word} [MASK] dog." for word in ("old", "sunny", "rainy")] + ["我[MASK]苹果[sMASK]", "river [MASK]"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture
def infiller(pair) -> Infiller:
    return Infiller(*pair, Sampling(max_tokens=6, temperature=1.0, seed=11), batch_size=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS), "utf-8")
    return path


def read(path: Path) -> list[dict[str, object] | None]:
    return [json.loads(line) if line else None for line in path.read_text("utf-8").split("\n")[:-1]]


def test_each_line_is_what_a_single_run_gives(pair, infiller: Infiller, source: Path, tmp_path: Path) -> None:
    assert fill_file(infiller, source, tmp_path / "out.jsonl") == FileReport(lines=5, resumed=0, skipped=0)
    filled = read(tmp_path / "out.jsonl")
    for index, (text, line) in enumerate(zip(TEXTS, filled, strict=True)):
        alone = gmask.infill(*pair, text, max_tokens=6, temperature=1.0, seed=11 + index)
        assert line["text"] == alone.text
        assert line["logprob"] == pytest.approx(alone.logprob, abs=1e-5)
        assert set(line) == {"text", "logprob", "blanks"}
        for blank in line["blanks"]:
            assert {"text", "logprob", "tokens"} <= set(blank) <= {"text", "logprob", "tokens", "finished"}
            assert all(set(token) == {"id", "text", "logprob"} for token in blank["tokens"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "texts.jsonl"]


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.txt", "texts.jsonl.zst"])
def test_a_byte_order_mark_is_no_part_of_a_text(infiller: Infiller, tmp_path: Path, name: str) -> None:
    text = b"The old [MASK].\r\n" if name == "texts.txt" else b'{"text": "The old [MASK]."}\r\n'
    data = b"\xef\xbb\xbf" + text
    (tmp_path / name).write_bytes(zstandard.compress(data) if name.endswith("zst") else data)
    fill_file(infiller, tmp_path / name, tmp_path / "out.jsonl")
    (line,) = read(tmp_path / "out.jsonl")
    assert line["text"].startswith("The old ") and line["text"].endswith(".")


def test_plain_text_files_have_a_text_on_each_line_and_empty_lines_stay(infiller: Infiller, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("a [MASK]\r\n\nb [MASK]", "utf-8")
    fill_file(infiller, source, tmp_path / "out.jsonl")
    first, empty, last = read(tmp_path / "out.jsonl")
    assert first["text"].startswith("a ") and empty is None and last["text"].startswith("b ")


def load_infiller(folder: Path, sampling: Sampling) -> Infiller:
    """Runs in processes that are started."""
    return Infiller(*gmask.load(folder, device="cpu"), sampling, batch_size=2)


@pytest.mark.slow
def test_several_processes_give_what_one_gives(
    infiller: Infiller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, load = tmp_path / "texts.txt", partial(load_infiller, Path(infiller.model.name_or_path), infiller.sampling)
    monkeypatch.setattr(files, "FILLED_TOGETHER", 2)
    source.write_text("\n".join(["", *TEXTS * 4, "no blank here", *TEXTS]), "utf-8")
    with pytest.raises(gmask.GmaskError, match=r"line 22: .*no blank"):
        fill_file(infiller, source, tmp_path / "two.jsonl", processes=2, load=load)
    report = fill_file(infiller, source, tmp_path / "two.jsonl", processes=2, load=load, skip_bad_lines=True)
    assert report == FileReport(lines=27, resumed=21, skipped=1)
    fill_file(infiller, source, tmp_path / "one.jsonl", skip_bad_lines=True)
    for two, one in zip(read(tmp_path / "two.jsonl"), read(tmp_path / "one.jsonl"), strict=True):
        assert (two is None) == (one is None) and (two or {}).get("text") == (one or {}).get("text")
    with pytest.raises(gmask.GmaskError, match="processes is 2: give 1, or more and the function"):
        fill_file(infiller, source, tmp_path / "new.jsonl", processes=2)


@pytest.mark.parametrize("torn", [b"", b'{"text": "The old'])
def test_a_stopped_run_goes_on_where_it_stopped(
    infiller: Infiller, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    monkeypatch.setattr(files, "FILLED_TOGETHER", 1)
    fill_file(infiller, source, tmp_path / "whole.jsonl")
    fill = Infiller.fill
    calls = []

    def stop_at_the_second_batch(self: Infiller, texts, *args, **keywords):
        calls.append(list(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fill(self, texts, *args, **keywords)

    monkeypatch.setattr(Infiller, "fill", stop_at_the_second_batch)
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fill_file(infiller, source, target)
    assert not target.exists()
    (partial,) = tmp_path.glob("out.jsonl.*.partial")
    with partial.open("ab") as file:
        file.write(torn)  # as after a kill in the middle of a line
    assert fill_file(infiller, source, target) == FileReport(lines=5, resumed=2, skipped=0)
    assert calls[2] == [infiller.read(text) for text in TEXTS[2:4]]
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_with_other_settings_does_not_take_over_lines(
    pair, infiller: Infiller, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    with source.open("a") as file:
        file.write("{")
    first = Infiller(*pair, Sampling(max_tokens=6), batch_size=2)
    with pytest.raises(gmask.GmaskError, match="line 6"):
        fill_file(first, source, target)
    resumed = []
    for settings, choices in ((Sampling(max_tokens=5), None), (first.sampling, ["old"]), (first.sampling, None)):
        other = Infiller(*pair, settings, batch_size=2)
        resumed.append(fill_file(other, source, target, choices=choices, skip_bad_lines=True).resumed)
        target.unlink()
    assert resumed == [0, 0, 5]


BAD_LINES = {
    b"{": "not JSON",
    b"[1]": 'not an object with a "text"',
    b'{"txt": ""}': 'not an object with a "text"',
    b'{"text": 1}': "not a string",
    b"\xff": "not UTF-8",
    b'{"text": "no blank"}': "no blank",
    b'{"text": "[XMASK]"}': "XMASK",
    rb'{"text": "half \ud83d [MASK]"}': "half of a character",
    b'{"text": "[MASK]", "score": NaN}': "holds NaN",
    b'{"text": "[MASK]", "more": "' + b"word " * 1_000_000 + b'"}': "longer than 4,194,304 bytes, so it is not read",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=BAD_LINES.values())
def test_a_bad_line_is_an_error_with_its_number_or_is_skipped_and_counted(
    infiller: Infiller, source: Path, tmp_path: Path, bad: bytes
) -> None:
    lines = source.read_bytes().splitlines()
    source.write_bytes(b"\n".join([*lines[:3], bad, *lines[3:]]) + b"\n")
    target = tmp_path / "out.jsonl"
    with pytest.raises(gmask.GmaskError, match=rf"texts.jsonl, line 4: .*{BAD_LINES[bad]}"):
        fill_file(infiller, source, target)
    (partial,) = tmp_path.glob("*.partial")
    assert len(read(partial)) == 3, "what came before it is kept"
    report = fill_file(infiller, source, target, skip_bad_lines=True)
    assert report == FileReport(lines=6, resumed=3, skipped=1)
    filled = read(target)
    assert BAD_LINES[bad] in filled[3]["error"]
    assert [line["text"][0] for line in filled if "text" in line] == [text[0] for text in TEXTS]


def test_a_line_that_no_model_could_hold_is_not_cut_into_tokens(
    infiller: Infiller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    lines = ["A [MASK].", "word " * 400_000 + "[MASK]", "word " * 900_000 + "[MASK]", "The [MASK]."]
    source.write_text("\n".join(lines), "utf-8")
    encode = type(infiller.tokenizer).__call__

    def encode_little(tokenizer: object, text: str, **options: object) -> object:
        assert len(text) < 100_000, "it is cut into tokens"
        return encode(tokenizer, text, **options)

    monkeypatch.setattr(type(infiller.tokenizer), "__call__", encode_little)
    assert fill_file(infiller, source, target, skip_bad_lines=True) == FileReport(lines=4, resumed=0, skipped=2)
    first, second, third, last = read(target)
    assert "text" in first and "text" in last
    assert "the text has 2000006 characters" in second["error"] and "bytes" in third["error"]


def test_choices_that_do_not_fit_a_line_are_an_error_of_that_line(pair, source: Path, tmp_path: Path) -> None:
    infiller = Infiller(*pair, Sampling())
    with pytest.raises(gmask.GmaskError, match=r"line 4: choices for 1 blanks, but the text has 2"):
        fill_file(infiller, source, tmp_path / "out.jsonl", choices=["old", "new"])


def test_a_target_that_is_there_is_not_overwritten(infiller: Infiller, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious", "utf-8")
    with pytest.raises(gmask.GmaskError, match="is there already"):
        fill_file(infiller, source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text("utf-8") == "precious"


def test_a_target_that_cannot_be_written_is_an_error(infiller: Infiller, source: Path, tmp_path: Path) -> None:
    with pytest.raises(gmask.GmaskError, match=r"out\.jsonl: cannot be written \(No such file or directory\)"):
        fill_file(infiller, source, tmp_path / "nowhere" / "out.jsonl")


def test_a_line_that_is_nested_deeply_is_that_lines_error(infiller: Infiller, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": ' + "[" * 100_000 + '\n{"text": "It is [MASK]."}\n', "utf-8")
    report = fill_file(infiller, source, tmp_path / "out.jsonl", skip_bad_lines=True)
    assert (report.lines, report.skipped) == (2, 1)
    bad, good = map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines())
    assert "nested too deeply" in bad["error"] and "blanks" in good


def test_a_pipe_is_refused_since_a_source_is_read_twice(infiller: Infiller, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(gmask.GmaskError, match="pipe: is no file, but a folder, a pipe or a device"):
        fill_file(infiller, tmp_path / "pipe", tmp_path / "out.jsonl")
