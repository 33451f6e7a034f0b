"""Does `gmask.load` read every published form of ChatGLM-6B?"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gmask
from fake_hub import FakeHub
from gmask.models.chatglm import ChatGLMForConditionalGeneration
from gmask.tokenizers.chatglm import ChatGLMTokenizer, ChatGLMTokenizerV0
from test_chatglm_parity import CLOSE, DEEP, PREFIXES, TINY, read_case

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
VOCABULARY = SHARED / TINY / "model" / "ice_text.model"
FIRST_VOCABULARY = SHARED / "tokenizers" / "chatglm" / "ice_text.base.model"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the tiny vocabulary is not here")


def publish(folder: Path, case: str = TINY) -> Path:
    """A published folder: shards with heads stored beside the embedding, and numbers that are never read.

    case: whose weights and config it holds.
    """
    folder.mkdir()
    files = (GOLDEN / case / "model").iterdir()
    for path in {GOLDEN / TINY / "model" / "tokenizer_config.json", VOCABULARY, *files}:
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish(tmp_path / "chatglm-6b")


def load(folder: Path, **settings: Any) -> tuple[ChatGLMForConditionalGeneration, ChatGLMTokenizer]:
    model, tokenizer = gmask.load(folder, device="cpu", **settings)
    assert isinstance(model, ChatGLMForConditionalGeneration) and isinstance(tokenizer, ChatGLMTokenizer)
    return model, tokenizer


def load_error(folder: Path, **settings: Any) -> str:
    with pytest.raises(gmask.GmaskError) as caught:
        gmask.load(folder, device="cpu", **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def read_weights(folder: Path) -> dict[str, Tensor]:
    shards = sorted(folder.glob("pytorch_model-*.bin"))
    return {key: value for shard in shards for key, value in torch.load(shard, weights_only=True).items()}


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")


@torch.no_grad()
def test_published_shards_give_the_published_numbers_and_replies(folder: Path) -> None:
    case, tensors = read_case(TINY)
    assert {"lm_head.weight", "transformer.layers.0.attention.rotary_emb.inv_freq"} <= read_weights(folder).keys()
    model, tokenizer = load(folder)
    single = case["forward_cases"][0]
    ids = torch.tensor(single["inputs"]["input_ids"])
    assert torch.allclose(model(ids).logits, tensors[f"{single['tag']}.logits"], **CLOSE)
    for found in case["chat_end_to_end"]:
        history = [tuple(pair) for pair in found["history"]]
        reply, _ = model.chat(tokenizer, found["query"], history, max_length=found["max_length"], do_sample=False)
        assert reply == found["chat_response"]
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert not model.training and model.dtype == torch.float32


@torch.no_grad()
def test_safetensors_and_our_own_folders_give_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    again, words = load(tmp_path / "saved")
    ids = torch.tensor([tokenizer("你好").input_ids])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert words("a  b\n[MASK]").input_ids == tokenizer("a  b\n[MASK]").input_ids
    half, _ = load(folder, dtype="bfloat16")
    assert half.dtype == torch.bfloat16


@torch.no_grad()
def test_the_depth_of_the_published_model_too(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / DEEP / "model", tmp_path / DEEP)
    case, tensors = read_case(DEEP)
    model, _ = load(tmp_path / DEEP, tokenizer=VOCABULARY.parent)
    logits = model(torch.tensor(case["input_ids"])).logits
    assert torch.allclose(logits, tensors["logits"], atol=5e-5, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", PREFIXES)
def test_a_published_p_tuning_prefix_gives_the_published_numbers(folder: Path, name: str) -> None:
    case, tensors = read_case(name)
    model, _ = load(folder, adapter=GOLDEN / name / "ptuning")
    ids = torch.tensor(case["inputs"]["single"])
    assert torch.allclose(model(ids).logits, tensors["single.logits"], **CLOSE)
    found = case["greedy"][0]
    length = found["output_ids"][0].index(516) + 1
    prompt = torch.tensor(found["output_ids"])[:, :length]
    output = model.generate(prompt, max_length=len(found["output_ids"][0]), do_sample=False, pad_token_id=3)
    assert output.tolist() == found["output_ids"]
    half, _ = load(folder, adapter=GOLDEN / name / "ptuning", dtype="bfloat16")
    assert half.transformer.prefix_encoder.embedding.weight.dtype == torch.float32, "as published"
    model.save_pretrained(folder / "whole")
    whole, _ = load(folder / "whole", tokenizer=folder)
    assert torch.equal(whole(ids).logits, model(ids).logits)


def test_prefixes_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    prefix = GOLDEN / PREFIXES[0] / "ptuning"
    assert "load the model that it was trained for, with adapter=" in load_error(prefix, tokenizer=folder)
    assert "is not a P-tuning prefix" in load_error(folder, adapter=folder)
    assert "belongs to a ChatGLM" in load_error("bundled", adapter=prefix)
    write_weights(tmp_path, {"transformer.prefix_encoder.embedding.weight": torch.zeros(8, 24)})
    message = load_error(folder, adapter=tmp_path)
    assert "has the shape [8, 24], but the model asks for [8, 512]" in message
    prefix_key, other = "transformer.prefix_encoder.embedding.weight", "transformer.final_layernorm.bias"
    write_weights(tmp_path, {prefix_key: torch.zeros(8, 512), other: torch.zeros(64)})
    assert f"holds {other}, so it is not a P-tuning prefix" in load_error(folder, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "names no peft_type" in load_error(folder, adapter=tmp_path)


def make_first_folder(folder: Path, **changes: Any) -> None:
    """The folder as it would have been in March 2023: 20000 rows in front, a vocabulary without special pieces."""
    shutil.copyfile(FIRST_VOCABULARY, folder / "ice_text.model")
    size = ChatGLMTokenizerV0(str(FIRST_VOCABULARY)).vocab_size
    first = ChatGLMTokenizerV0(str(FIRST_VOCABULARY))
    ids = {"mask_token_id": first.mask_token_id, "gmask_token_id": first.gmask_token_id, "pad_token_id": 20003}
    ids |= {"bos_token_id": first.bos_token_id, "eos_token_id": first.end_token_id}
    change_config(folder, vocab_size=size, **{**ids, **changes})
    early = {"tokenizer_class": "ChatGLMTokenizer", "eos_token": "</s>", "eop_token": "<eop>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(early))
    weights = {key: value for key, value in read_weights(folder).items() if not key.endswith("embeddings.weight")}
    embedding = torch.randn(size, 64, generator=torch.Generator().manual_seed(0)).half()
    write_weights(folder, {**weights, "transformer.word_embeddings.weight": embedding, "lm_head.weight": embedding})


def test_the_first_vocabulary_gets_its_own_tokenizer_and_a_reply_ends_with_eop(folder: Path) -> None:
    make_first_folder(folder)
    model, tokenizer = load(folder)
    assert type(tokenizer) is ChatGLMTokenizerV0
    ids = tokenizer("你好").input_ids
    assert min(ids) >= 20000 and ids[-2:] == [tokenizer.gmask_token_id, model.config.bos_token_id]
    chat = gmask.Chat(model, tokenizer, temperature=0, max_tokens=4)
    assert chat.chatter.format.special.eop == model.config.eos_token_id != tokenizer.eos_token_id
    assert chat.ask("你好").reply_tokens <= 4
    reply, _ = model.chat(tokenizer, "你好", max_length=len(ids) + 4, do_sample=False)
    assert chat.messages[-1]["content"] == reply


def test_a_published_name_is_fetched_without_its_code_and_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with FakeHub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.add("THUDM/chatglm-6b", {**files, "modeling_chatglm.py": b"raise SystemExit", "LICENSE": b""})
        model, tokenizer = gmask.load("THUDM/chatglm-6b", device="cpu")
        assert {*hub.downloads()} == {*files}
    reply, _ = model.chat(tokenizer, "你是谁？", max_length=60, do_sample=False)
    assert reply == read_case(TINY)[0]["chat_end_to_end"][0]["chat_response"]


def test_what_is_made_for_blanks_says_that_a_chat_model_has_none(folder: Path) -> None:
    message = load_error(folder, model_class=gmask.GLMForConditionalGeneration)
    assert "is a ChatGLM, which has no blanks to fill: use `gmask chat`" in message
    with pytest.raises(gmask.GmaskError, match=r"is a GLM, and ChatGLMForConditionalGeneration is not for one"):
        gmask.load("bundled", device="cpu", model_class=ChatGLMForConditionalGeneration)
