"""Does a published ChatGLM become safetensors with every bit, integers and scales too, and come back as it was?"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import gmask
from conversions import assert_same, tensors_of
from gmask.checkpoints import save
from gmask.checkpoints.convert import ConversionReport, convert
from gmask.checkpoints.folder import read_config
from gmask.quantization.quantizer import form_of
from gmask.tokenizers.chatglm import ChatGLMTokenizer, ChatGLMTokenizerV0
from test_chatglm_loading import SHARED, change_config, load, make_first_folder, publish
from test_chatglm_parity import TINY
from tiny_folder import make_folder

INTEGERS = ["chatglm-tiny-int8", "chatglm-tiny-int4", "chatglm-tiny-int4-qe"]
CASES = [TINY, *INTEGERS]
FORMS = ["gmask", "huggingface"]
HEAD = {"lm_head.weight", "lm_head.weight_scale"}
TEXT = "a  b\n你好 [MASK]"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the tiny vocabulary is not here")


def without_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model takes: no head that the embedding is, no table that nothing reads."""
    return {key: value for key, value in tensors.items() if key not in HEAD and not key.endswith("inv_freq")}


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(gmask.GmaskError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_every_bit_every_number_and_every_token_come_along(case: str, to: str, tmp_path: Path) -> None:
    source = publish(tmp_path / "source", case)
    report = convert(source, tmp_path / "new", to=to)
    found, stored = tensors_of(tmp_path / "new"), tensors_of(source)
    assert_same(without_head(found), without_head(stored))
    assert to == "gmask" or stored.keys() <= found.keys()
    assert "model.safetensors" in report.files and not any(name.endswith((".bin", ".py")) for name in report.files)
    (one, words), (other, other_words) = load(source), load(tmp_path / "new")
    assert report.parameters == (one if case == TINY else load(publish(tmp_path / "tiny"))[0]).num_parameters()
    ids = words(TEXT, return_tensors="pt").input_ids
    assert torch.equal(other(ids).logits, one(ids).logits)
    assert other_words(TEXT).input_ids == ids[0].tolist()
    assert str(form_of(other.config)) == str(form_of(one.config))


@torch.no_grad()
@pytest.mark.parametrize("case", [TINY, "chatglm-tiny-int4-qe"])
def test_the_published_form_is_that_of_the_published_folder(case: str, tmp_path: Path) -> None:
    source = publish(tmp_path / "source", case)
    convert(source, tmp_path / "ours")
    assert not HEAD & load_file(tmp_path / "ours" / "model.safetensors").keys()
    convert(tmp_path / "ours", tmp_path / "back", to="huggingface")
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    assert_same(
        {key: value for key, value in tensors.items()},
        {key: value for key, value in tensors_of(source).items() if not key.endswith("inv_freq")}
        | {key: tensors[key] for key in HEAD & tensors.keys()},
    )
    embedding = "transformer.word_embeddings.weight"
    assert torch.equal(tensors["lm_head.weight"], tensors[embedding]), "the published code asks for a head"
    if case != TINY:
        assert torch.equal(tensors["lm_head.weight_scale"], tensors[f"{embedding}_scale"])
    published = json.loads((source / "config.json").read_text())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    machine = {"_name_or_path", "auto_map", "transformers_version"}
    assert {key: written.get(key) for key in published.keys() - machine} == {
        key: value for key, value in published.items() if key not in machine
    }
    assert not {"quantization_config", "auto_map"} & written.keys()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    found = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert {key: found.get(key) for key in settings.keys() - {"auto_map", "name_or_path"}} == {
        key: value for key, value in settings.items() if key not in ("auto_map", "name_or_path")
    }


@torch.no_grad()
@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("case", [TINY, "chatglm-tiny-int4"])
def test_files_of_a_part_each_are_read_by_gmask_and_by_transformers(
    case: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "SHARD_BYTES", 20_000)
    source = publish(tmp_path / "source", case)
    report = convert(source, tmp_path / "new", to=to)
    shards = [name for name in report.files if name.startswith("model-")]
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and set(index["weight_map"].values()) == set(shards)
    assert index["weight_map"].keys() == {key for name in shards for key in load_file(tmp_path / "new" / name)}
    convert(tmp_path / "new", tmp_path / "again", to="gmask")
    assert_same(tensors_of(tmp_path / "again"), without_head(tensors_of(source)))
    ids = torch.tensor([[20, 21, 513, 516, 30]])
    expected = load(source)[0](ids).logits
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "new").eval()(ids).logits, expected)
    assert type(AutoTokenizer.from_pretrained(tmp_path / "new")) is ChatGLMTokenizer


@pytest.mark.parametrize("to", FORMS)
def test_the_first_vocabulary_stays_the_first(to: str, tmp_path: Path) -> None:
    source = publish(tmp_path / "source")
    make_first_folder(source)
    convert(source, tmp_path / "new", to=to)
    _, words = load(source)
    for folder in (tmp_path / "new",):
        found = load(folder)[1]
        assert type(found) is ChatGLMTokenizerV0
        assert (found(TEXT).input_ids, found.eos_token_id) == (words(TEXT).input_ids, words.eos_token_id)
    settings = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert settings["num_image_tokens"] == 20000
    assert settings.get("eop_token" if to == "huggingface" else "end_token") == "<eop>"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_is_for_what_is_no_integer_and_no_scale(dtype: str, tmp_path: Path) -> None:
    source = publish(tmp_path / "source", "chatglm-tiny-int4")
    report = convert(source, tmp_path / "new", dtype=dtype)
    assert set(report.dtypes) == {dtype, "float16", "int8"}
    wanted = getattr(torch, dtype)
    for key, tensor in tensors_of(tmp_path / "new").items():
        is_kept = tensor.dtype == torch.int8 or key.endswith("weight_scale")
        assert is_kept or tensor.dtype == wanted, key
    assert read_config(tmp_path / "new").dtype == wanted
    assert_same(
        without_head(tensors_of(tmp_path / "new")),
        {
            key: tensor if tensor.dtype == torch.int8 or key.endswith("weight_scale") else tensor.to(wanted)
            for key, tensor in without_head(tensors_of(source)).items()
        },
    )


def test_our_groups_of_columns_stay_ours(tmp_path: Path) -> None:
    model, tokenizer = load(publish(tmp_path / "source"))
    model.quantize(4, group_size=32).save_pretrained(tmp_path / "groups")
    tokenizer.save_pretrained(tmp_path / "groups")
    convert(tmp_path / "groups", tmp_path / "new")
    assert_same(tensors_of(tmp_path / "new"), tensors_of(tmp_path / "groups"))
    message = refusal(tmp_path / "groups", tmp_path / "published", to="huggingface")
    assert "has int4, a scale for 32 columns, and the published form has a scale a row; convert it to gmask" in message
    assert not (tmp_path / "published").exists()


def test_settings_that_the_published_code_does_not_know_are_told(tmp_path: Path) -> None:
    source = publish(tmp_path / "source")
    assert convert(source, tmp_path / "usual", to="huggingface").notes == ()
    change_config(source, residual_alpha=2.0)
    (note,) = convert(source, tmp_path / "new", to="huggingface").notes
    assert note.startswith("config.json says residual_alpha 2, which gmask heeds")
    assert read_config(tmp_path / "new").residual_alpha == 2.0


def test_what_has_no_other_form_is_refused(tmp_path: Path) -> None:
    source = publish(tmp_path / "source")
    assert "is a ChatGLM, which the training code of GLM does not know" in refusal(
        source, tmp_path / "new", to="megatron"
    )
    make_folder(tmp_path / "glm")
    model, tokenizer = gmask.load(tmp_path / "glm", device="cpu")
    model.quantize(8).save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    for to in ("gmask", "huggingface", "megatron"):
        message = refusal(tmp_path / "int8", tmp_path / "new", to=to)
        assert "is quantized (int8, a scale a row), for which GLM has this form alone" in message
    lost = publish(tmp_path / "lost", "chatglm-tiny-int4")
    change_config(lost, quantization_bit=None)
    assert "config.json says nothing of it; take all files from one revision" in refusal(lost, tmp_path / "new")
    (source / "ice_text.model").unlink()
    assert "ice_text.model: missing" in refusal(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_report_tells_the_parameters_of_the_model(tmp_path: Path) -> None:
    source = publish(tmp_path / "source", "chatglm-tiny-int4-qe")
    report = convert(source, tmp_path / "new")
    assert ConversionReport(**report.to_dict()) == report
    assert report.parameters > 4 * 12 * 64 * 64  # not the bytes that two of them share
