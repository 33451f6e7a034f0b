"""Do the Auto classes, after `import gmask`, read ChatGLM-6B, run none of its code, and refuse its successors?"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import gmask
from gmask import registration
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.tokenizers.chatglm import ChatGLMTokenizer, ChatGLMTokenizerV0

GOLDEN = Path(__file__).parent / "golden" / "chatglm-tiny"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
AUTO_CLASSES = [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM]
TRUST = [{}, {"trust_remote_code": True}, {"trust_remote_code": False}]
CODE = ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm")
needs_vocabulary = pytest.mark.skipif(not SHARED.is_dir(), reason="the tiny vocabulary is not here")


def write_code(folder: Path) -> None:
    """Code beside the weights that leaves a mark when it is run."""
    for name in CODE:
        (folder / f"{name}.py").write_text(
            "from transformers import PreTrainedConfig\n"
            f"open({str(folder / 'mark')!r}, 'w').close()\n"
            "class ChatGLMConfig(PreTrainedConfig):\n    model_type = 'chatglm'\n"
        )


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "chatglm-6b"
    shutil.copytree(GOLDEN / "model", folder)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755)
    write_code(folder)
    return folder


@pytest.mark.parametrize("trust", TRUST)
def test_published_folders_give_our_classes_and_never_run_their_code(published: Path, trust: dict[str, bool]) -> None:
    config = AutoConfig.from_pretrained(published, **trust)
    assert (type(config), config.auto_map) == (ChatGLMConfig, {})
    models = [auto.from_pretrained(published, **trust) for auto in AUTO_CLASSES]
    assert {type(model) for model in models} == {ChatGLMForConditionalGeneration}
    assert not (published / "mark").exists()


@needs_vocabulary
@pytest.mark.parametrize("trust", TRUST)
def test_the_tokenizer_is_ours_whichever_the_vocabulary(published: Path, trust: dict[str, bool]) -> None:
    shutil.copyfile(SHARED / "chatglm-tiny" / "model" / "ice_text.model", published / "ice_text.model")
    assert type(AutoTokenizer.from_pretrained(published, **trust)) is ChatGLMTokenizer
    shutil.copyfile(SHARED / "tokenizers" / "chatglm" / "ice_text.base.model", published / "ice_text.model")
    early = {"eos_token": "</s>", "end_token": None, "eop_token": "<eop>", "num_image_tokens": None}
    path = published / "tokenizer_config.json"
    values = json.loads(path.read_text()) | early
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    tokenizer = AutoTokenizer.from_pretrained(published, **trust)
    assert type(tokenizer) is ChatGLMTokenizerV0
    direct = ChatGLMTokenizerV0(str(published / "ice_text.model"))
    assert tokenizer("你好 <eop>").input_ids == direct("你好 <eop>").input_ids
    tokenizer.save_pretrained(published / "saved")
    shutil.copyfile(published / "config.json", published / "saved" / "config.json")
    again = AutoTokenizer.from_pretrained(published / "saved")
    assert (type(again), again("你好").input_ids) == (ChatGLMTokenizerV0, direct("你好").input_ids)
    assert not (published / "mark").exists()


def test_what_is_saved_comes_back_without_a_word_of_remote_code(published: Path) -> None:
    model = AutoModel.from_pretrained(published)
    ids = torch.tensor([[20, 21, 513, 516, 30]])
    model.save_pretrained(published / "saved")
    values = json.loads((published / "saved" / "config.json").read_text())
    assert values["model_type"] == "chatglm" and not values.get("auto_map")
    again = AutoModel.from_pretrained(published / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_ids_that_the_first_configs_lack_are_those_of_their_vocabulary(published: Path) -> None:
    for vocab_size, mask in ((150528, 150000), (130528, 130000)):
        change_config(published, vocab_size=vocab_size, mask_token_id=None, gmask_token_id=None)
        for config in (AutoConfig.from_pretrained(published), ChatGLMConfig.from_pretrained(published)):
            assert (config.mask_token_id, config.gmask_token_id) == (mask, mask + 1)
            assert (config.bos_token_id, config.eos_token_id) == (516, 517), "what is stated stays"


@pytest.mark.parametrize("key", ["multi_query_attention", "padded_vocab_size", "rmsnorm"])
def test_successors_are_refused_by_a_line_that_says_how_to_load_them(tmp_path: Path, key: str) -> None:
    write_code(tmp_path)
    auto_map = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", key: 1, "auto_map": auto_map}))
    for auto in (AutoConfig, AutoModel):
        with pytest.raises(gmask.GmaskError, match=rf"{key} belongs to ChatGLM2.*gmask\.registration\.unregister\(\)"):
            auto.from_pretrained(tmp_path, trust_remote_code=True)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    with pytest.raises(gmask.GmaskError, match=r"ice_text\.model.*unregister\(\)"):
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert not (tmp_path / "mark").exists()
    registration.unregister()
    try:
        config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(config).__module__.startswith("transformers_modules.") and (tmp_path / "mark").exists()
        assert not hasattr(transformers, "ChatGLMForConditionalGeneration")
        assert "chatglm" not in transformers.models.auto.configuration_auto.CONFIG_MAPPING
    finally:
        registration.register()
    assert transformers.ChatGLMForConditionalGeneration is ChatGLMForConditionalGeneration


def test_missing_weights_and_those_of_the_model_with_images_are_named(published: Path) -> None:
    shard = published / "pytorch_model-00001-of-00002.bin"
    index = json.loads((published / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["image_encoder.vit.weight"] = shard.name
    (published / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({**torch.load(shard, weights_only=True), "image_encoder.vit.weight": torch.ones(2)}, shard)
    with pytest.raises(gmask.GmaskError, match=r"image_encoder belongs to VisualGLM"):
        AutoModel.from_pretrained(published)
