"""Is every folder of vocabulary files read, or refused by the name of the file at fault?"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gmask.errors import GmaskError
from gmask.tokenizers.folder import CLASSES, read_tokenizer
from gmask.tokenizers.glm import read_ids
from gmask.training.tokenizer import save_tokenizer
from published_vocabularies import FILES, SHARED, copy_vocabulary, needs_vocabularies
from tiny_folder import make_folder, train_tiny_tokenizer

pytestmark = needs_vocabularies


def published_settings(kind: str) -> dict[str, Any]:
    """The tokenizer_config.json of a kind of vocabulary."""
    record = json.loads((SHARED / "tokenizers" / f"hf-{kind}.json").read_text("utf-8"))
    return record["config"]  # type: ignore[no-any-return]


DAMAGE = {
    "chinese": ["cog-pretrain.model"],
    "gpt2": ["vocab.json", "merges.txt"],
    "bert": ["vocab.txt"],
    "roberta": ["vocab.json", "merges.txt"],
}


@pytest.mark.parametrize("fault", ["missing", "damaged"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in DAMAGE.items() for name in names])
@pytest.mark.parametrize("is_published", [True, False])
def test_a_vocabulary_file_at_fault_is_named(
    kind: str, name: str, fault: str, is_published: bool, tmp_path: Path
) -> None:
    copy_vocabulary(kind, tmp_path)
    if is_published:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(published_settings(kind)), "utf-8")
    if fault == "missing":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n\xff")
    with pytest.raises(GmaskError) as caught:
        read_tokenizer(tmp_path, kind=kind)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "tokenizer.json"])
def test_another_file_at_fault_is_named(name: str, tmp_path: Path) -> None:
    if name != "tokenizer.json":
        copy_vocabulary("gpt2", tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(published_settings("gpt2")), "utf-8")
    (tmp_path / name).write_text('{"model": ', "utf-8")
    with pytest.raises(GmaskError, match=name) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, None, "LlamaTokenizer"),
        ({"tokenizer_class": "GLMGPT2Tokenizer", "spacing": "wide"}, None, "spacing 'wide'"),
        ({}, "cpm", "cpm: no such kind"),
    ],
)
def test_what_is_not_a_glm_is_refused(settings: dict[str, Any], kind: str | None, message: str, tmp_path: Path) -> None:
    copy_vocabulary("gpt2", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(GmaskError, match=message):
        read_tokenizer(tmp_path, kind=kind)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GmaskError, match="no vocabulary there"):
        read_tokenizer(tmp_path)
    with pytest.raises(GmaskError, match="no such folder"):
        read_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", FILES)
def test_the_files_tell_their_kind(kind: str, tmp_path: Path) -> None:
    assert type(read_tokenizer(copy_vocabulary(kind, tmp_path))) is CLASSES[kind]


@pytest.mark.parametrize("name", ["hf-glm-tiny", "hf-glm-10b-tiny", "hf-glm-tiny-fullvocab"])
def test_published_folders_are_read(name: str) -> None:
    folder = SHARED / name / "model"
    tokenizer = read_tokenizer(folder)
    assert json.loads((folder / "added_tokens.json").read_text("utf-8")).items() <= tokenizer.get_added_vocab().items()
    assert tokenizer.spacing == "published"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((("model_max_length"), value) for value in ("abc", "", [], {}, -1, 0, True)),
        *(("tokenizer_class", value) for value in ([], {}, 3, True)),
        *(("unk_token", value) for value in ("", 3, [], {}, {"content": ""})),
    ],
)
def test_absurd_values_of_a_config_are_one_line(tmp_path: Path, key: str, value: object) -> None:
    folder = make_folder(tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(GmaskError, match=rf"tokenizer_config\.json: {key} is .*; download or copy it again$"):
        read_tokenizer(folder)


def test_ids_below_0_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": -1}')
    with pytest.raises(GmaskError, match="expected a JSON object of tokens and their ids"):
        read_ids(str(tmp_path / "vocab.json"))


@pytest.mark.parametrize("kind", [*DAMAGE, "ours"])
def test_a_mark_is_no_part_of_any_file_of_a_tokenizer(kind: str, tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    plain.mkdir()
    if kind == "ours":
        save_tokenizer(train_tiny_tokenizer(), plain)
    else:
        copy_vocabulary(kind, plain)
        (plain / "tokenizer_config.json").write_text(json.dumps(published_settings(kind)), "utf-8")
    expected = read_tokenizer(plain)
    expected.save_pretrained(tmp_path / "expected")
    marked.mkdir()
    for path in plain.iterdir():
        mark = b"" if path.suffix == ".model" else b"\xef\xbb\xbf"
        (marked / path.name).write_bytes(mark + path.read_bytes())
    found = read_tokenizer(marked)
    assert found(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert Path(found.name_or_path) == marked
    found.save_pretrained(tmp_path / "saved")
    again = read_tokenizer(tmp_path / "saved")
    assert again(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        path.name for path in (tmp_path / "expected").iterdir()
    }


TEXT = "The dog [MASK] home."


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_pointer_is_called_so_by_the_auto_class(kind: str, tmp_path: Path) -> None:
    copy_vocabulary(kind, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(published_settings(kind)), "utf-8")
    names = [path.name for path in tmp_path.iterdir() if path.name != "tokenizer_config.json"]  # transformers reads it
    for name in names:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        with pytest.raises(GmaskError, match=f"{name}: a Git LFS pointer, not the file itself"):
            AutoTokenizer.from_pretrained(tmp_path)
        (tmp_path / name).write_bytes(content)
    AutoTokenizer.from_pretrained(tmp_path)
