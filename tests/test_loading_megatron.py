"""Does `gmask.load` read the checkpoints of the original training code, which state neither heads nor vocabulary?"""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import gmask
from gmask.checkpoints import folder as checkpoint_folder
from gmask.checkpoints import zoo
from gmask.checkpoints.convert import quantize_folder
from gmask.checkpoints.folder import read_config
from gmask.checkpoints.formats import open_checkpoint
from gmask.checkpoints.load import load_model
from gmask.models.glm import GLMForConditionalGeneration
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.quantization.quantizer import QuantizationConfig

THUDM = Path(__file__).parent / "golden" / "thudm-glm-tiny"
SHARED = Path(__file__).parents[2] / "shared" / "golden"


@pytest.fixture
def tiny_family(monkeypatch: pytest.MonkeyPatch) -> zoo.Family:
    """A catalog with one row, which has the shape of the THUDM golden."""
    large = zoo.find_family("GLM-Large-Chinese")
    assert large is not None
    special_ids = dict(
        pad_token_id=470, eos_token_id=470, mask_token_id=473, sop_token_id=476, eop_token_id=477, smask_token_id=478,
        gmask_token_id=479,
    )  # fmt: skip
    row = dataclasses.replace(
        large,
        name="GLM-Tiny",
        hub_names=(),
        layers=2,
        hidden_size=48,
        heads=4,
        positions=96,
        vocab_size=512,
        special_ids=special_ids,
        copied_rows={479: 477},
    )
    for module in (zoo, checkpoint_folder):
        monkeypatch.setattr(module, "FAMILIES", (row,))
    return row


@pytest.mark.parametrize("name", ["ckpt", "ckpt_MP2", "ckpt_ds"])
@pytest.mark.parametrize("like", [None, "glm-tiny"])
def test_a_checkpoint_of_the_training_code_loads_with_a_config_from_its_shapes(
    name: str, like: str | None, tiny_family: zoo.Family
) -> None:
    model = load_model(THUDM / name, device="cpu", like=like)
    config = model.config
    assert isinstance(model, GLMForConditionalGeneration)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 48, 4)
    assert (config.vocab_size, config.max_position_embeddings, config.block_position_encoding) == (512, 96, True)
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert (config.sop_token_id, config.blank_token_ids) == (476, [473, 478, 479])
    stored = open_checkpoint(THUDM / "ckpt")
    for key, tensor in model.glm.state_dict().items():
        expected = stored.read(key) if name != "ckpt_ds" else stored.read(key).half().float()
        if key == "word_embeddings.weight":
            expected = expected.clone()
            expected[479] = expected[477]
        assert torch.equal(tensor, expected)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the tiny vocabulary is not here")
@pytest.mark.parametrize("name", ["ckpt", "ckpt_MP2"])
def test_it_is_quantized_with_the_rows_of_its_special_tokens(
    name: str, tiny_family: zoo.Family, tmp_path: Path
) -> None:
    form = QuantizationConfig(8, embeddings=True)
    quantize_folder(THUDM / name, tmp_path / "small", form, tokenizer=SHARED / "hf-glm-tiny" / "model")
    written = load_model(tmp_path / "small", device="cpu").state_dict()
    expected = load_model(THUDM / name, device="cpu").quantize(8, embeddings=True).state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    loaded = load_model(THUDM / name, device="cpu", quantize="int8").state_dict()
    embedding = loaded["glm.word_embeddings.weight"]
    assert torch.equal(embedding[479], embedding[477])
    layers = [key for key in loaded if ".layers." in key]
    assert len(layers) > 30 and all(torch.equal(loaded[key], written[key]) for key in layers)


def test_only_a_token_that_the_training_code_did_not_tell_apart_gets_a_copied_row(
    tiny_family: zoo.Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = open_checkpoint(THUDM / "ckpt").read("word_embeddings.weight")
    shutil.copytree(THUDM / "ckpt", tmp_path / "ckpt")
    config = read_config(THUDM / "ckpt")
    config.save_pretrained(tmp_path / "ckpt")  # the folder is no longer the original one: nothing is assumed
    own = load_model(tmp_path / "ckpt", device="cpu").glm.word_embeddings.weight
    assert torch.equal(own, stored)
    same_id = dataclasses.replace(tiny_family, special_ids={**tiny_family.special_ids, "gmask_token_id": 477})
    monkeypatch.setattr(zoo, "FAMILIES", (same_id,))
    assert torch.equal(load_model(THUDM / "ckpt", device="cpu").glm.word_embeddings.weight, stored)


def test_a_shape_that_no_row_has_asks_for_like() -> None:
    with pytest.raises(gmask.GmaskError, match=r"give like=NAME .*one of GLM-Base, .*GLM-10B-Chinese") as caught:
        load_model(THUDM / "ckpt", device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(gmask.GmaskError, match="no such GLM"):
        load_model(THUDM / "ckpt", like="GLM-11B")
    with pytest.raises(gmask.GmaskError, match="no such GLM"):
        load_model(THUDM / "ckpt", like="ChatGLM-6B")
    with pytest.raises(gmask.GmaskError, match="has 2 layers of width 48, but GLM-10B 48 layers of width 4096"):
        load_model(THUDM / "ckpt", like="GLM-10B")


def test_a_checkpoint_of_the_training_code_asks_for_its_vocabulary(tiny_family: zoo.Family) -> None:
    with pytest.raises(gmask.GmaskError, match=r"give tokenizer=FOLDER .*one that holds cog-pretrain\.model"):
        gmask.load(THUDM / "ckpt", device="cpu")
    with pytest.raises(gmask.GmaskError, match="no such folder"):
        gmask.load(THUDM / "ckpt", device="cpu", tokenizer="nowhere")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the vocabularies are not here")
def test_a_checkpoint_of_the_training_code_loads_with_a_vocabulary_from_elsewhere(tiny_family: zoo.Family) -> None:
    model, tokenizer = gmask.load(THUDM / "ckpt_MP2", device="cpu", tokenizer=SHARED / "hf-glm-tiny" / "model")
    assert tokenizer.sop_token_id == model.config.sop_token_id == 476
    model.generation_config.max_new_tokens = 2
    assert model.generate(torch.tensor([[472, 9, 473, 470, 476]])).shape[1] <= 7


def test_a_classifier_of_the_training_code_becomes_one(tiny_family: zoo.Family, tmp_path: Path) -> None:
    shutil.copytree(THUDM / "ckpt", tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "1234" / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    head = {"pool_layer.weight": torch.randn(48, 48), "pool_layer.bias": torch.randn(48)}
    head |= {"multichoice_head.weight": torch.randn(3, 48), "multichoice_head.bias": torch.randn(3)}
    wrapped = {f"model.{key}": tensor for key, tensor in content["module"].items()}
    torch.save({**content, "module": wrapped | head}, path)
    model = load_model(tmp_path / "ckpt", device="cpu")
    assert isinstance(model, GLMForSequenceClassification) and model.num_labels == 3
    assert torch.equal(model.dense.weight, head["pool_layer.weight"])
    assert torch.equal(model.out_proj.bias, head["multichoice_head.bias"])
