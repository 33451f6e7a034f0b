"""After `import gmask`, do transformers' Auto classes read published GLMs, strictly, and GLM-4 as before?"""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GlmConfig,
    GlmForCausalLM,
)

import gmask
from gmask import registration
from gmask.models.glm import GLMConfig
from tiny_folder import make_folder

GOLDEN = Path(__file__).parent / "golden" / "hf-glm-tiny" / "model"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
AUTO_CLASSES = {
    AutoModel: "GLMModel",
    AutoModelForCausalLM: "GLMForConditionalGeneration",
    AutoModelForSeq2SeqLM: "GLMForConditionalGeneration",
    AutoModelForMultipleChoice: "GLMForMultipleChoice",
    AutoModelForSequenceClassification: "GLMForSequenceClassification",
}
IDS = dict(
    pad_token_id=470, sop_token_id=476, eop_token_id=477, mask_token_id=473, smask_token_id=478, gmask_token_id=479
)
GLM4 = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
TRUST = [{}, {"trust_remote_code": True}, {"trust_remote_code": False}]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as published, with code beside the weights that leaves a mark when it is run."""
    folder = tmp_path / "glm-tiny"
    shutil.copytree(GOLDEN, folder)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755)
    for name in ("configuration_glm", "modeling_glm", "tokenization_glm"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'mark')!r}, 'w').close()\nclass GLMConfig: pass\n")
    return folder


@pytest.fixture
def weights(published: Path) -> dict[str, torch.Tensor]:
    return torch.load(published / "pytorch_model.bin", weights_only=True)


def load_error(load: Callable[..., Any], *args: Any, **settings: Any) -> str:
    with pytest.raises(gmask.GmaskError) as caught:
        load(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("trust", TRUST)
@pytest.mark.parametrize("auto", AUTO_CLASSES)
def test_published_folders_give_our_classes_and_never_run_their_code(
    published: Path, auto: Any, trust: dict[str, bool]
) -> None:
    config = AutoConfig.from_pretrained(published, **trust)
    model = auto.from_pretrained(published, **trust)
    assert type(config) is GLMConfig is type(model.config)
    assert type(model).__name__ == AUTO_CLASSES[auto]
    assert type(model).__module__.startswith("gmask.")
    assert not (published / "mark").exists()


@pytest.mark.parametrize("trust", TRUST)
@pytest.mark.skipif(not SHARED.is_dir(), reason="the published vocabularies are not in this checkout")
def test_the_tokenizer_of_a_published_folder_is_ours_and_never_its_own_code(
    published: Path, trust: dict[str, bool]
) -> None:
    for name in ("cog-pretrain.model", "tokenizer_config.json"):
        shutil.copyfile(SHARED / "hf-glm-tiny" / "model" / name, published / name)
    assert "auto_map" in json.loads((published / "tokenizer_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(published, **trust)
    assert type(tokenizer).__module__ == "gmask.tokenizers.glm"
    assert tokenizer.eop_token_id == IDS["eop_token_id"]
    assert not (published / "mark").exists()


def test_the_ids_that_published_configs_lack_are_filled_in_by_every_door(published: Path) -> None:
    stated = json.loads((published / "config.json").read_text())
    assert "sop_token_id" not in stated and "hidden_act" not in stated
    configs = [
        AutoConfig.from_pretrained(published),
        AutoConfig.from_pretrained(str(published / "config.json")),
        GLMConfig.from_pretrained(published),
        AutoModelForSeq2SeqLM.from_pretrained(published).config,
        gmask.GLMForConditionalGeneration.from_pretrained(published).config,
    ]
    for config in configs:
        assert {role: getattr(config, role) for role in IDS} == IDS
        assert (config.hidden_act, config.auto_map) == ("gelu", {})


def test_a_snapshot_in_the_cache_is_read_by_its_name(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "cache" / "models--somebody--glm-tiny"
    shutil.copytree(published, repository / "snapshots" / "f00d")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("f00d")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = AutoConfig.from_pretrained("somebody/glm-tiny")
    assert {role: getattr(config, role) for role in IDS} == IDS
    assert type(AutoModelForSeq2SeqLM.from_pretrained("somebody/glm-tiny")) is gmask.GLMForConditionalGeneration


def test_glm_4_stays_what_transformers_makes_of_it(tmp_path: Path) -> None:
    assert type(AutoConfig.for_model("glm", **GLM4)) is GlmConfig
    saved = GlmForCausalLM(GlmConfig(**GLM4)).eval()
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "glm"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (type(loaded), type(loaded.config)) == (GlmForCausalLM, GlmConfig)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, saved(ids).logits)
    assert type(AutoModelForCausalLM.from_config(GlmConfig(**GLM4))) is GlmForCausalLM
    message = load_error(gmask.GLMForConditionalGeneration.from_pretrained, tmp_path)
    assert "GLM-4" in message and "AutoModelForCausalLM" in message


def test_what_we_save_comes_back_through_the_auto_classes_and_gmask_alike(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "made")
    ours, tokenizer = gmask.load(folder, device="cpu")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder)
    ids = torch.tensor([[20, 5, 21, 8, 30, 31]])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "glm_blank"
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("The old man").input_ids == tokenizer("The old man").input_ids


def test_published_weights_give_the_same_logits_through_the_auto_classes_and_gmask(published: Path) -> None:
    for name in ("cog-pretrain.model", "tokenizer_config.json"):
        if SHARED.is_dir():
            shutil.copyfile(SHARED / "hf-glm-tiny" / "model" / name, published / name)
    from gmask.checkpoints.load import load_model

    ids = torch.tensor([[472, 20, 473, 30, 476, 40]])
    theirs = AutoModelForSeq2SeqLM.from_pretrained(published)
    assert torch.equal(theirs(ids).logits, load_model(published, device="cpu")(ids).logits)
    saved = published.parent / "saved"
    theirs.save_pretrained(saved)
    values = json.loads((saved / "config.json").read_text())
    assert values["model_type"] == "glm_blank" and not values.get("auto_map")
    assert torch.equal(load_model(saved, device="cpu")(ids).logits, theirs(ids).logits)


def test_without_a_dtype_the_weights_are_float32_as_in_the_published_code(
    published: Path, weights: dict[str, torch.Tensor]
) -> None:
    torch.save({key: tensor.half() for key, tensor in weights.items()}, published / "pytorch_model.bin")
    values = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**values, "torch_dtype": "float16"}))
    asked = [{}, {"dtype": "auto"}, {"dtype": torch.bfloat16}, {"torch_dtype": torch.float16}]
    found = [AutoModelForSeq2SeqLM.from_pretrained(published, **dtype).dtype for dtype in asked]
    assert found == [torch.float32, torch.float16, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("prefix", ["", "glm."])
@pytest.mark.parametrize("form", ["bin", "shards", "safetensors"])
def test_bare_and_prefixed_keys_load_from_every_form_of_file(
    published: Path, weights: dict[str, torch.Tensor], prefix: str, form: str
) -> None:
    (published / "pytorch_model.bin").unlink()
    named = {prefix + key: tensor.contiguous() for key, tensor in weights.items()}
    if form == "safetensors":
        save_file(named, published / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(named, published / "pytorch_model.bin")
    else:
        keys = sorted(named)
        shards = {"pytorch_model-00001-of-00002.bin": keys[::2], "pytorch_model-00002-of-00002.bin": keys[1::2]}
        for name, members in shards.items():
            torch.save({key: named[key] for key in members}, published / name)
        index = {"metadata": {}, "weight_map": {key: name for name, members in shards.items() for key in members}}
        (published / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for auto in AUTO_CLASSES:
        model = auto.from_pretrained(published)
        base = getattr(model, "glm", model).state_dict()
        assert all(torch.equal(base[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("auto", AUTO_CLASSES)
def test_missing_unexpected_and_ill_shaped_weights_are_named(
    published: Path, weights: dict[str, torch.Tensor], auto: Any
) -> None:
    path = published / "pytorch_model.bin"
    bias = "transformer.layers.1.mlp.dense_4h_to_h.bias"
    torch.save({key: tensor for key, tensor in weights.items() if key != bias}, path)
    assert f"lack {bias};" in load_error(auto.from_pretrained, published)
    torch.save({**weights, "transformer.layers.7.mlp.bias": torch.ones(2)}, path)
    assert "unexpected" in (message := load_error(auto.from_pretrained, published))
    assert "layers.7.mlp.bias" in message
    torch.save({**weights, bias: torch.ones(2)}, path)
    message = load_error(auto.from_pretrained, published)
    assert bias in message and "[2]" in message and "[64]" in message


def test_a_head_may_be_new_as_a_whole_but_not_in_part_and_is_kept_when_it_is_there(
    published: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    new, info = AutoModelForSequenceClassification.from_pretrained(published, num_labels=3, output_loading_info=True)
    heads = {f"{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")}
    assert info["missing_keys"] == heads
    new.save_pretrained(tmp_path / "tuned")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert torch.equal(again.out_proj.weight, new.out_proj.weight) and again.config.num_labels == 3
    # Without a head the classes take the body of a tuned checkpoint; a head of another kind is not what was asked for.
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path / "tuned").word_embeddings.weight, new.glm.word_embeddings.weight
    )
    assert "not those of GLMForConditionalGeneration" in load_error(
        AutoModelForSeq2SeqLM.from_pretrained, tmp_path / "tuned"
    )
    part = {key: new.state_dict()[key] for key in sorted(heads)[1:]}
    torch.save({**weights, **part}, published / "pytorch_model.bin")
    load = AutoModelForSequenceClassification.from_pretrained
    assert "lack dense.bias;" in load_error(load, published, num_labels=3)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_git_lfs_pointers_and_damaged_files_are_refused_in_one_line(published: Path, name: str) -> None:
    whole = (published / "pytorch_model.bin").read_bytes()
    (published / "pytorch_model.bin").unlink()
    (published / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 811266\n")
    message = load_error(AutoModelForSeq2SeqLM.from_pretrained, published)
    assert message.startswith(str(published / name)) and "git lfs pull" in message
    (published / name).write_bytes(whole[: len(whole) // 2])
    assert "download or copy it again" in load_error(AutoModelForSeq2SeqLM.from_pretrained, published)


def test_gmask_may_be_imported_after_transformers() -> None:
    done = run_python(
        "from transformers import AutoModel, AutoConfig\nimport gmask, sys\n"
        "assert 'gmask.models.glm' not in sys.modules\n"
        f"config = AutoConfig.from_pretrained({str(GOLDEN)!r})\n"
        "print(type(config).__name__, type(AutoModel.from_config(config)).__name__, config.sop_token_id)\n"
        "print(AutoConfig.for_model('glm').__class__.__name__, AutoConfig.for_model('glm_blank').__class__.__name__)\n"
    )
    assert done.stdout.splitlines() == ["GLMConfig GLMModel 476", "GlmConfig GLMConfig"], done.stderr


def test_the_classes_are_known_as_soon_as_ours_are_imported() -> None:
    done = run_python(
        "from gmask.models.glm import GLMModel\n"
        "from transformers import AutoModelForSeq2SeqLM\n"
        "import transformers, gmask\n"
        "config = gmask.GLMConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)\n"
        "print(type(AutoModelForSeq2SeqLM.from_config(config)) is transformers.GLMForConditionalGeneration)\n"
    )
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_registration_can_be_repeated_taken_back_and_made_anew(published: Path) -> None:
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    ours, finders = mapping["glm"], list(sys.meta_path)
    importlib.reload(registration).register()
    assert mapping["glm"] is ours
    assert sys.meta_path == finders
    registration.unregister()
    try:
        assert mapping["glm"] is GlmConfig
        assert "glm_blank" not in mapping
        assert not hasattr(transformers, "GLMForConditionalGeneration")
        assert type(AutoConfig.from_pretrained(published)) is GlmConfig
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForSeq2SeqLM.from_config(GLMConfig())
        registration.unregister()
    finally:
        registration.register()
    assert type(AutoModelForSeq2SeqLM.from_pretrained(published)) is gmask.GLMForConditionalGeneration
    assert transformers.GLMForConditionalGeneration is gmask.GLMForConditionalGeneration


def test_gmask_may_be_imported_first_and_threads_may_ask_at_once() -> None:
    # For configs: transformers itself does not load weights in several threads at once.
    done = run_python(
        "import sys, threading, gmask\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}\n"
        "from transformers import AutoModelForSeq2SeqLM, AutoConfig\n"
        "assert 'gmask.models.glm' not in sys.modules\n"
        "found = []\n"
        "def ask():\n"
        f"    found.append(AutoConfig.from_pretrained({str(GOLDEN)!r}))\n"
        "threads = [threading.Thread(target=ask) for _ in range(4)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "classes = {type(AutoModelForSeq2SeqLM.from_config(config)) for config in found}\n"
        "print(len(found), classes == {gmask.GLMForConditionalGeneration})\n"
        "assert 'gmask.models.chatglm' not in sys.modules\n"
        "small = dict(vocab_size=32, hidden_size=16, num_layers=1, num_attention_heads=2, inner_hidden_size=32)\n"
        "config = AutoConfig.for_model('chatglm', **small)\n"
        "print(type(config).__name__, type(AutoModelForSeq2SeqLM.from_config(config)).__name__)\n"
    )
    assert done.stdout == "4 True\nChatGLMConfig ChatGLMForConditionalGeneration\n", done.stderr
