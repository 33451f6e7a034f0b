"""Is a conversion that cannot be right refused, and does one that fails leave everything as it was?"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conversions import GOLDEN, RANKS, assert_same, tensors_of, write_checkpoint
from gmask.checkpoints import tensor_files
from gmask.checkpoints.convert import convert
from gmask.checkpoints.folder import read_config
from gmask.checkpoints.rewrite import OWN_FILES
from gmask.checkpoints.tensor_files import SafetensorsWriter
from gmask.errors import GmaskError
from gmask.models.glm import GLMForConditionalGeneration
from tiny_folder import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ours with its tokenizer."""
    return make_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def ranks(folder: Path, tmp_path: Path) -> Path:
    """The same as a checkpoint of the training code."""
    convert(folder, tmp_path / "ranks", to="megatron", parts=2)
    return tmp_path / "ranks"


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(GmaskError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_target_that_is_in_use_or_would_harm_the_source_is_refused(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "a" / "source"
    convert(folder, source)
    (tmp_path / "link").symlink_to(source)
    before = sorted(tmp_path.rglob("*"))
    for target, fault in (
        (source, "is what is read"),
        (tmp_path / "link", "is what is read"),
        (source / "new", "lies in"),
        (tmp_path / "a", "holds"),
        (folder, "exists; name a new folder, or use --force"),
        (source / "config.json", "lies in"),
        (folder / "config.json", "is a file"),
    ):
        if target == tmp_path / "a" or fault.startswith(("is", "lies")):
            assert fault in refusal(source, target, force=True)
        assert fault in refusal(source, target)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_checkpoint_is_replaced_only_when_told_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    target.mkdir()  # empty: nothing is lost
    convert(folder, target, to="megatron", parts=2)
    convert(folder, target, force=True)
    assert_same(tensors_of(target), tensors_of(folder))
    assert not list(target.glob("*.pt")) and [path.name for path in tmp_path.iterdir()] == ["new"]
    for name in ("notes.docx", "runs/events"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("mine")
        assert "which is no part of a checkpoint" in refusal(folder, target, force=True)
        (target / name).unlink()
    (target / "runs").rmdir()
    for iteration in ("1", "2"):
        (target / iteration).mkdir()
        (target / iteration / RANKS.format(0)).write_text("other iterations")
    assert "holds 1" in refusal(folder, target, force=True)
    assert "*.pt" not in OWN_FILES


@pytest.fixture(params=["while writing", "while reading back", "wrong bits", "at the last rename"])
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes conversions fail in one of the ways in which they can."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    def set_up() -> None:
        if request.param == "while writing":
            monkeypatch.setattr(SafetensorsWriter, "_finish", fail)
        elif request.param == "while reading back":
            monkeypatch.setattr("gmask.checkpoints.save.read_tokenizer", fail)
        elif request.param == "wrong bits":
            real = tensor_files.as_bytes
            monkeypatch.setattr(tensor_files, "as_bytes", lambda tensor: real(-tensor))
        else:
            real_rename = Path.rename
            monkeypatch.setattr(
                Path, "rename", lambda self, to: fail() if self.suffix == ".partial" else real_rename(self, to)
            )

    yield set_up


@pytest.mark.parametrize("exists", [False, True])
def test_a_conversion_that_fails_leaves_all_as_it_was(fault, exists: bool, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    if exists:
        convert(folder, target, to="megatron")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    fault()
    with pytest.raises((GmaskError, OSError), match=r"No space left|not on the disk as it was written"):
        convert(folder, target, force=exists)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"to": "onnx"}, "--to onnx: no such form; there are gmask, mapped, huggingface, megatron"),
        ({"dtype": "int8"}, "--dtype int8: no such dtype"),
        ({"parts": 2}, "--parts 2: only --to megatron divides weights"),
        ({"to": "megatron", "parts": 0}, "--parts 0"),
        ({"to": "megatron", "tokenizer": Path("x")}, "--tokenizer: the training code keeps no vocabulary"),
        ({"heads": 4, "like": "GLM-Base"}, "not both"),
        ({"heads": 0}, "--heads 0"),
        ({"heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({}, "do not tell which GLM it is; give like=NAME (gmask convert: --like NAME, or --heads with"),
        ({"like": "GLM-Base"}, "but GLM-Base 12 layers of width 768"),
        ({"like": "BERT"}, "no such GLM"),
        (
            {"heads": 4, "tokenizer": None},
            "no vocabulary beside it: give tokenizer=FOLDER (gmask convert: --tokenizer FOLDER)",
        ),
        ({"heads": 4, "tokenizer": Path("nowhere")}, "nowhere: no such folder"),
        ({"to": "megatron", "parts": 3}, "448 tokens cannot be divided among 3 ranks; possible are 1, 2, 4"),
        ({"to": "megatron", "parts": 8, "heads": 4}, "448 tokens and 4 heads cannot be divided among 8 ranks"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_in_one_line(options, fault, folder, ranks, tmp_path) -> None:
    if options.get("to") != "megatron" and "tokenizer" not in options:
        options = {**options, "tokenizer": folder}
    assert fault in refusal(ranks, tmp_path / "new", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["ranks"]


def test_sources_that_are_not_what_they_should_be_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere", tmp_path / "new")
    assert "leave out --like and --heads" in refusal(folder, tmp_path / "new", heads=4)
    config = read_config(folder)
    config.tie_word_embeddings = False
    GLMForConditionalGeneration(config).save_pretrained(tmp_path / "untied")
    for to in ("megatron", "huggingface"):
        options = {"tokenizer": folder} if to == "huggingface" else {}
        assert "output head is not the word embedding" in refusal(
            tmp_path / "untied", tmp_path / "new", to=to, **options
        )
    convert(tmp_path / "untied", tmp_path / "new", tokenizer=folder)
    assert "lm_head.weight" in tensors_of(tmp_path / "new")


def test_a_disk_that_is_too_small_is_told_beforehand(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    assert "of the disk, 0.0 MB are free" in refusal(folder, tmp_path / "new")


def test_numbers_beyond_a_dtype_are_refused_and_not_made_infinite(tmp_path: Path) -> None:
    weights = torch.load(GOLDEN / "ckpt" / "1234" / RANKS.format(0), weights_only=True)["module"]
    weights["transformer.final_layernorm.weight"][3] = 70000.0
    write_checkpoint(tmp_path / "source", weights)
    message = refusal(tmp_path / "source", tmp_path / "new", to="megatron", dtype="float16")
    assert "transformer.final_layernorm.weight has numbers beyond the range of float16" in message
    assert not (tmp_path / "new").exists()
    convert(tmp_path / "source", tmp_path / "new", to="megatron", dtype="bfloat16")
