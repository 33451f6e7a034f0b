"""Does `gmask.load(..., quantize=)` give what `gmask quantize` writes, bit for bit, and refuse what it cannot give?"""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import gmask
from gmask.checkpoints import load as checkpoint_load
from gmask.checkpoints.convert import quantize_folder
from gmask.checkpoints.load import load_model
from gmask.models.chatglm import ChatGLMForConditionalGeneration
from gmask.models.glm import GLMForConditionalGeneration
from gmask.models.glm_heads import GLMForMultipleChoice
from gmask.quantization import quantizer
from gmask.quantization.quantizer import QuantizationConfig, quantized_layers

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
needs_vocabulary = pytest.mark.skipif(not SHARED.is_dir(), reason="the tiny vocabularies are not here")
CHATGLM, GLM = "chatglm-tiny", "hf-glm-tiny"
FORMS = [("int8", None), ("int4", None), ("int4", 32)]


def folder_of(name: str) -> Path:
    return GOLDEN / name / "model"


def load(name: str, **settings: Any) -> Any:
    return load_model(folder_of(name), device="cpu", **settings)


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for key, tensor in state.items():
        assert tensor.dtype == wanted[key].dtype and torch.equal(tensor, wanted[key]), key
    assert str(model.config.quantization_config) == str(expected.config.quantization_config)


def integers(model: PreTrainedModel) -> dict[str, Tensor]:
    parts = ("weight", "weight_scale")
    return {f"{name}.{part}": getattr(layer, part).clone() for name, layer in quantized_layers(model) for part in parts}


def assert_integers_equal(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    found, wanted = integers(model), integers(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@needs_vocabulary
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("form", "group_size"), FORMS)
@pytest.mark.parametrize("name", [CHATGLM, GLM])
def test_the_model_is_that_of_the_folder_which_gmask_quantize_writes(
    name: str, form: str, group_size: int | None, dtype: str, tmp_path: Path
) -> None:
    source, target = SHARED / name / "model", tmp_path / "small"
    quantize_folder(source, target, QuantizationConfig(int(form[-1]), group_size))
    written = load_model(target, device="cpu", dtype=dtype)
    loaded, tokenizer = gmask.load(source, device="cpu", dtype=dtype, quantize=form, group_size=group_size)
    assert_same(loaded, written)
    special = [loaded.config.gmask_token_id, loaded.config.sop_token_id]
    ids = torch.tensor([tokenizer("hello", add_special_tokens=False)["input_ids"] + special])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, written(input_ids=ids).logits)


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("name", [CHATGLM, GLM])
def test_it_is_the_model_quantized_in_memory_by_default_settings(name: str, form: str, bits: int) -> None:
    model, expected = load(name, quantize=form), load(name).quantize(bits)
    assert_same(model, expected)
    assert model.is_quantized and not model.training
    unquantized = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert any("word_embeddings" in name for name in unquantized)


@pytest.mark.parametrize("name", [CHATGLM, GLM])
def test_a_weight_that_passes_in_pieces_gets_the_same_integers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(name, quantize="int4", group_size=32)
    for passing in (1, 200, 1000):  # a row, three rows, and a number that divides no weight
        monkeypatch.setattr(quantizer, "CHUNK_NUMBERS", passing)
        assert_same(load(name, quantize="int4", group_size=32), whole)


@pytest.mark.parametrize("name", [CHATGLM, GLM])
def test_integers_and_scales_outlive_casts_copies_and_saving(name: str, tmp_path: Path) -> None:
    model = load(name, quantize="int4", group_size=32)
    expected = integers(model)
    assert len(expected) == 8 * model.config.num_hidden_layers
    model.save_pretrained(tmp_path)
    classes = {CHATGLM: ChatGLMForConditionalGeneration, GLM: GLMForConditionalGeneration}
    for again in (load_model(tmp_path, device="cpu"), classes[name].from_pretrained(tmp_path).eval()):
        assert_same(again, model)
    for cast in (model.half(), copy.deepcopy(model).bfloat16(), model.float()):
        found = integers(cast)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert {tensor.dtype for tensor in found.values()} == {torch.int8, torch.float16}


@needs_vocabulary
def test_a_prefix_stays_beside_the_integers_as_it_was_trained() -> None:
    source, prefix = SHARED / CHATGLM / "model", GOLDEN / "chatglm-tiny-ptuning" / "ptuning"
    settings: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "adapter": prefix}
    tuned, plain = gmask.load(source, **settings, quantize="int8")[0], gmask.load(source, **settings)[0]
    table = tuned.transformer.prefix_encoder.embedding.weight
    assert table.dtype == torch.float32 and torch.equal(table, plain.transformer.prefix_encoder.embedding.weight)
    assert_integers_equal(tuned, load(CHATGLM, quantize="int8"))


def test_a_model_for_another_task_keeps_its_head_as_it_is() -> None:
    model = load(GLM, quantize="int8", model_class=GLMForMultipleChoice)
    assert isinstance(model, GLMForMultipleChoice)
    assert_integers_equal(model, load(GLM, quantize="int8"))


@pytest.mark.parametrize("name", ["chatglm-tiny-int4", "chatglm-tiny-int4-qe"])
def test_a_folder_that_holds_the_form_asked_for_is_read_as_it_is(name: str) -> None:
    assert_same(load(name, quantize="int4"), load(name))


@pytest.mark.parametrize(
    ("name", "form", "group_size", "stored"),
    [
        ("chatglm-tiny-int8", "int4", None, "int8, a scale a row"),
        ("chatglm-tiny-int4", "int8", None, "int4, a scale a row"),
        ("chatglm-tiny-int4-qe", "int4", 32, "int4, a scale a row, with embeddings"),
    ],
)
def test_another_form_than_the_folder_holds_is_refused(
    name: str, form: str, group_size: int | None, stored: str
) -> None:
    with pytest.raises(gmask.GmaskError) as caught:
        load(name, quantize=form, group_size=group_size)
    message = str(caught.value)
    assert f"is quantized already ({stored}); for {form}" in message and "quantize the original" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int5"}, "quantize 'int5' is not one of int8, int4"),
        ({"quantize": "int4", "group_size": 48}, "a group of 48 columns: choose 32, 64 or 128"),
        ({"quantize": "int4", "group_size": 128}, "a group of 128 columns: choose 32, 64 or 128, and a divisor"),
        ({"group_size": 32}, "group_size 32 is for quantized weights: add quantize='int4'"),
    ],
)
def test_what_is_no_form_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(gmask.GmaskError) as caught:
        load(GLM, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_weight_is_not_quantized(tmp_path: Path) -> None:
    shutil.copytree(folder_of(GLM), tmp_path / "model")
    path = tmp_path / "model" / "pytorch_model.bin"
    path.chmod(0o644)
    weights = torch.load(path, weights_only=True)
    key = next(key for key in weights if key.endswith("mlp.dense_h_to_4h.weight"))
    weights[key][3, 5] = torch.nan
    torch.save(weights, path)
    with pytest.raises(gmask.GmaskError, match="holds NaN or a number beyond"):
        load_model(tmp_path / "model", device="cpu", quantize="int8")


@pytest.mark.parametrize(
    ("name", "settings"), [(GLM, {}), (CHATGLM, {"quantize": "int4"}), ("chatglm-tiny-int4", {}), (CHATGLM, {})]
)
def test_on_a_cpu_a_large_model_is_in_bfloat16(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unquantized = load(CHATGLM if name.startswith(CHATGLM) else GLM)
    numbers = sum(parameter.numel() for parameter in unquantized.parameters())
    monkeypatch.setattr(checkpoint_load, "LARGE", numbers)
    assert load(name, **settings).dtype == torch.float32
    monkeypatch.setattr(checkpoint_load, "LARGE", numbers - 1)
    large = load(name, **settings)
    assert large.dtype == torch.bfloat16
    assert load(name, **settings, dtype="float32").dtype == torch.float32
    assert_integers_equal(large, load(name, **settings, dtype="float32"))
