"""Are the published int8 and int4 checkpoints of ChatGLM read, computed with and made exactly as the originals?

Each case states its tolerance: integers, scales and dequantized weights are exact.
"""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import gmask
from gmask.checkpoints.convert import convert, quantize_folder
from gmask.checkpoints.load import load_model
from gmask.cli.models import quantize as quantize_verb
from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMMLP
from gmask.models.glm import GLMForConditionalGeneration
from gmask.quantization.calibration import calibrate_model, cut_texts
from gmask.quantization.formats import dequantize, pack_integers, quantize, unpack_integers
from gmask.quantization.linear import QuantEmbedding, QuantLinear
from gmask.quantization.quantizer import QuantizationConfig, quantized_layers

GOLDEN = Path(__file__).parent / "golden"
FLOAT = GOLDEN / "chatglm-tiny" / "model"
CASES = ["chatglm-tiny-int8", "chatglm-tiny-int4", "chatglm-tiny-int4-qe"]
GIVEN = {"in.attention_mask"}

app = typer.Typer()
app.command("quantize")(quantize_verb)
app.callback()(lambda: None)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@cache
def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = GOLDEN / name
    return json.loads((folder / "case.json").read_text("utf-8")), load_file(folder / "tensors.safetensors")


@cache
def load_published(name: str) -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(GOLDEN / name / "model").eval()


def load_float(**options: Any) -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(FLOAT, **options).eval()


def quantize_as(name: str, model: ChatGLMForConditionalGeneration) -> ChatGLMForConditionalGeneration:
    config = read_case(name)[0]["config"]
    return model.quantize(config["quantization_bit"], embeddings=config.get("quantization_embeddings", False))


@torch.no_grad()
def logits_of(model: ChatGLMForConditionalGeneration, name: str) -> Tensor:
    case, tensors = read_case(name)
    ids, places = (torch.tensor(case["inputs"][key]) for key in ("input_ids", "position_ids"))
    return model(ids, position_ids=places, attention_mask=tensors["in.attention_mask"].bool()).logits


def our_numbers(name: str) -> dict[str, Tensor]:
    """What we compute under the names of the golden tensors."""
    case, _ = read_case(name)
    model, bits = load_published(name), case["config"]["quantization_bit"]
    found = {"logits_float32": logits_of(model, name)}
    half = copy.deepcopy(model).half()
    half.config.rotary_dtype = "module"
    found["logits_float16"] = logits_of(half, name)
    for path, layer in quantized_layers(model):
        found[f"deq32.{path}"], found[f"deq16.{path}"] = layer.dequantize(), layer.dequantize(torch.float16)
    weight = load_float().transformer.layers[0].attention.query_key_value.weight.detach()
    integers, scale = quantize(weight, bits, dtype=torch.float32)
    found |= {"cpu_fp32_quantize.weight": pack_integers(integers, bits), "cpu_fp32_quantize.weight_scale": scale}
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_published_tensor(name: str) -> None:
    case, tensors = read_case(name)
    ours = our_numbers(name)
    real = torch.tensor(case["inputs"]["input_ids"]) != case["config"]["pad_token_id"]
    for key, published in tensors.items():
        if key in GIVEN:
            continue
        assert ours[key].dtype == published.dtype
        if key == "logits_float32":
            torch.testing.assert_close(ours[key], published, atol=5e-5, rtol=0)
        elif key == "logits_float16":
            assert (ours[key].float() - published.float())[real].abs().max() <= 3e-2
        else:
            assert torch.equal(ours[key], published), key


@pytest.mark.parametrize("name", CASES)
def test_no_published_tensor_is_left_out(name: str) -> None:
    assert read_case(name)[1].keys() - our_numbers(name).keys() == GIVEN


@pytest.mark.parametrize("name", CASES)
def test_integers_and_scales_are_those_of_the_file(name: str) -> None:
    case, _ = read_case(name)
    stored = torch.load(GOLDEN / name / "model" / "pytorch_model.bin", weights_only=True)
    state = load_published(name).state_dict()
    compared = 0
    for key, (dtype, shape) in case["checkpoint"]["keys"].items():
        assert list(stored[key].shape) == shape and stored[key].dtype == getattr(torch, dtype)
        if "rotary_emb" in key:
            continue
        assert torch.equal(state[key], stored[key].to(state[key].dtype)), key
        if key.endswith("weight_scale") or stored[key].dtype == torch.int8:
            assert state[key].dtype == stored[key].dtype
            compared += 1
    assert compared == 2 * len(list(quantized_layers(load_published(name)))) >= 32


@pytest.mark.parametrize("name", CASES)
def test_every_published_checksum(name: str) -> None:
    case, _ = read_case(name)
    layers = dict(quantized_layers(load_published(name)))
    assert case["checksums"].keys() == layers.keys() - {"transformer.word_embeddings", "lm_head"}
    for path, sums in case["checksums"].items():
        layer = layers[path]
        assert int(unpack_integers(layer.weight, layer.bits).sum(dtype=torch.int64)) == sums["sum_int"], path
        assert float(layer.weight_scale.double().sum()) == pytest.approx(sums["sum_scale"], rel=1e-12), path


@pytest.mark.parametrize("name", CASES)
def test_every_published_generation(name: str) -> None:
    model = load_published(name)
    for found in read_case(name)[0]["greedy_float32"]:
        wanted = found["output_ids"][0]
        prompt = torch.tensor([wanted[: wanted.index(model.config.sop_token_id) + 1]])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_length=len(wanted), do_sample=False, pad_token_id=3
        )
        assert output[0].tolist() == wanted, found["text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_quantizing_gives_the_published_integers_and_scales(name: str, dtype: torch.dtype) -> None:
    published = load_published(name).state_dict()
    in_memory = quantize_as(name, load_float(dtype=dtype))
    config = load_published(name).config.quantization_config
    on_load = load_float(dtype=dtype, quantization_config=copy.deepcopy(config))
    for model in (in_memory, on_load):
        state = model.state_dict()
        assert state.keys() == published.keys() and model.dtype == dtype
        assert all(torch.equal(state[key].to(published[key].dtype), published[key]) for key in state)
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "scale" in name)


@pytest.mark.parametrize("name", CASES)
def test_loading_in_bfloat16_does_not_round_before_it_quantizes(name: str) -> None:
    config = copy.deepcopy(load_published(name).config.quantization_config)
    state = load_float(dtype=torch.bfloat16, quantization_config=config).state_dict()
    published = load_published(name).state_dict()
    for key, tensor in state.items():
        if tensor.dtype == torch.int8 or key.endswith("weight_scale"):
            assert torch.equal(tensor, published[key]), key
        else:
            assert tensor.dtype == torch.bfloat16, key


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_is_read_back_the_same(name: str, tmp_path: Path) -> None:
    model = load_published(name)
    expected = logits_of(model, name)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert values["quantization_config"]["bits"] == read_case(name)[0]["config"]["quantization_bit"]
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    state, saved = model.state_dict(), again.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in state)
    assert torch.equal(logits_of(again, name), expected)
    if name.endswith("qe"):
        assert again.lm_head.weight is again.transformer.word_embeddings.weight
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_the_published_call_gives_a_half_precision_model_with_whole_integers() -> None:
    model = load_float(dtype=torch.float16).quantize(8).half()
    expected = load_published("chatglm-tiny-int8").state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[key].float(), expected[key].float()) for key in expected)
    assert model.dtype == torch.float16 and model.is_quantized
    assert model.float().dtype == torch.float32
    assert torch.equal(
        logits_of(model, "chatglm-tiny-int8"), logits_of(load_published("chatglm-tiny-int8"), "chatglm-tiny-int8")
    )


def test_quantized_embeddings_are_shared_with_the_head_through_copies_and_casts() -> None:
    model = copy.deepcopy(load_published("chatglm-tiny-int4-qe"))
    logits_of(model, "chatglm-tiny-int4-qe")
    other = copy.deepcopy(model).bfloat16()
    for one in (model, other):
        embedding, head = one.transformer.word_embeddings, one.lm_head
        assert isinstance(embedding, QuantEmbedding) and isinstance(head, QuantLinear)
        assert head.weight is embedding.weight and head.weight_scale is embedding.weight_scale
    assert other.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert logits_of(other, "chatglm-tiny-int4-qe").dtype == torch.bfloat16


@pytest.mark.parametrize("group_size", [32, 64])
def test_groups_are_saved_too_and_nearer_to_the_unquantized_weights(group_size: int, tmp_path: Path) -> None:
    name = "chatglm-tiny-int4"
    model = load_float().quantize(4, group_size=group_size, embeddings=True)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits_of(ChatGLMForConditionalGeneration.from_pretrained(tmp_path), name), logits_of(model, name)
    )
    for path, layer in quantized_layers(model.transformer.layers):
        weight, rows = (one.transformer.layers.get_submodule(path) for one in (load_float(), load_published(name)))
        assert (layer.dequantize() - weight.weight).norm() <= (rows.dequantize() - weight.weight).norm()


@torch.no_grad()
def test_calibration_brings_the_logits_nearer_to_those_of_the_unquantized_model() -> None:
    plain = load_float()
    torch.manual_seed(0)
    gmask_id, sop_id = plain.config.gmask_token_id, plain.config.sop_token_id
    rows = torch.randint(20, 500, (24, 30)).tolist()
    batches = [{"input_ids": torch.tensor([[*row[:20], gmask_id, sop_id, *row[20:]]])} for row in rows]
    models = [load_float().quantize(4), calibrate_model(load_float(), batches[:16], bits=4, group_size=None)]
    errors = [
        sum(float((model(**batch).logits - plain(**batch).logits).square().mean()) for batch in batches[16:])
        for model in models
    ]
    assert errors[1] < 0.9 * errors[0]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_dequantized_weights_are_those_that_the_integers_stand_for() -> None:
    layer = load_published("chatglm-tiny-int4").transformer.layers[1].mlp.dense_4h_to_h
    assert torch.equal(layer.dequantize(), dequantize(unpack_integers(layer.weight, 4), layer.weight_scale))


def write_folder(folder: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    values = json.loads((GOLDEN / "chatglm-tiny-int4" / "model" / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_integers_without_scales_are_refused_in_one_line(tmp_path: Path) -> None:
    state = torch.load(GOLDEN / "chatglm-tiny-int4" / "model" / "pytorch_model.bin", weights_only=True)
    write_folder(tmp_path, {key: tensor for key, tensor in state.items() if not key.endswith("weight_scale")})
    ways = (ChatGLMForConditionalGeneration.from_pretrained, lambda folder: load_model(folder, device="cpu"))
    for load in ways:
        with pytest.raises(GmaskError, match=r"^[^\n]*no scales, .* download[^\n]*$"):
            load(tmp_path)
    one = next(key for key in state if key.endswith("weight_scale"))
    write_folder(tmp_path, {key: tensor for key, tensor in state.items() if key != one})
    for load in ways:
        with pytest.raises(GmaskError, match=r"lack their scales \(transformer.*download"):
            load(tmp_path)


def test_unquantized_weights_under_a_quantized_config_are_refused(tmp_path: Path) -> None:
    shards = sorted(FLOAT.glob("*.bin"))
    state = {key: tensor for path in shards for key, tensor in torch.load(path, weights_only=True).items()}
    for bits in (4, 8):
        write_folder(tmp_path, state, quantization_bit=bits)
        with pytest.raises(GmaskError, match=r"are not quantized, though config\.json says so"):
            ChatGLMForConditionalGeneration.from_pretrained(tmp_path)


def test_bits_that_no_layer_has_are_refused() -> None:
    with pytest.raises(GmaskError, match="4 or 8 bits, not in 3"):
        ChatGLMConfig(quantization_bit=3)
    with pytest.raises(GmaskError, match="quantized already"):
        load_float().quantize(8).quantize(4)
    assert getattr(ChatGLMConfig(quantization_bit=0), "quantization_config", None) is None
    assert ChatGLMConfig(quantization_bit=4).quantization_config == QuantizationConfig(4).to_dict()


@pytest.mark.parametrize("name", CASES)
def test_gmask_loads_a_published_folder_the_same(name: str) -> None:
    model, expected = load_model(GOLDEN / name / "model", device="cpu"), load_published(name)
    state, published = model.state_dict(), expected.state_dict()
    assert state.keys() == published.keys() and all(torch.equal(state[key], published[key]) for key in state)
    assert torch.equal(logits_of(model, name), logits_of(expected, name))
    assert model.is_quantized and str(model.config.quantization_config) == str(expected.config.quantization_config)
    half = load_model(GOLDEN / name / "model", device="cpu", dtype="float16")
    assert half.dtype == torch.float16 and torch.equal(
        logits_of(half, name), logits_of(copy.deepcopy(expected).half(), name)
    )


def quantize_bundled(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["quantize", "bundled", *map(str, arguments)])


FORMS = [("--bits", "8"), ("--group-size", "32", "--embeddings")]


@pytest.mark.parametrize("options", FORMS)
def test_the_command_writes_a_folder_that_loads_as_the_model_quantized_in_memory(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    target = tmp_path / "small"
    result = quantize_bundled(target, *options, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["bytes_after"] < 0.72 * report["bytes_before"]
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in load_file(target / "model.safetensors").values())
    form = {"bits": 8} if "8" in options else {"bits": 4, "group_size": 32, "embeddings": True}
    expected = gmask.load(dtype="bfloat16", device="cpu")[0].quantize(**form)
    loaded, _ = gmask.load(target, dtype="bfloat16", device="cpu")
    from_folder = GLMForConditionalGeneration.from_pretrained(target, dtype=torch.bfloat16)
    for model in (loaded, from_folder):
        state, wanted = model.state_dict(), expected.state_dict()
        assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_the_command_calibrates_by_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old man walked down to the river, for he had lived there all his life. " * 15, "utf-8")
    target = tmp_path / "small"
    result = quantize_bundled(target, "--group-size", "64", "--calibrate", text)
    assert result.exit_code == 0 and "calibrated" in result.stdout
    plain, rounded, found = (gmask.load(*name, device="cpu")[0] for name in ((), (), (target,)))
    rounded.quantize(4, group_size=64)
    tokenizer = gmask.load(target)[1]
    batches = cut_texts(tokenizer, plain.config, [text.read_text("utf-8")])
    with torch.no_grad():
        errors = [
            sum(float((one(**batch).logits - plain(**batch).logits).square().mean()) for batch in batches)
            for one in (found, rounded)
        ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "5"), "4 or 8 bits, not in 5"),
        (("--group-size", "48"), "a group of 48 columns"),
        (("--calibrate", "no-such.txt"), "no-such.txt: cannot be read"),
    ],
)
def test_the_command_refuses_in_one_line(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = quantize_bundled(tmp_path / "small", *options)
    assert isinstance(result.exception, GmaskError) and message in str(result.exception)
    assert not any(tmp_path.iterdir())


def test_a_target_in_use_and_a_quantized_source_are_refused(tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert quantize_bundled(first, "--bits", "8").exit_code == 0
    assert "--force" in str(quantize_bundled(first, "--bits", "8").exception)
    assert quantize_bundled(first, "--bits", "4", "--force").exit_code == 0
    with pytest.raises(GmaskError, match=r"is quantized \(int4, a scale a row\).* nothing to convert"):
        convert(first, tmp_path / "second")
    with pytest.raises(GmaskError, match="quantized already"):
        quantize_folder(first, tmp_path / "second", QuantizationConfig(8))


@torch.no_grad()
def test_the_second_half_of_a_block_is_computed_at_once_or_by_its_modules() -> None:
    name = "chatglm-tiny-int4"
    model = copy.deepcopy(load_published(name)).bfloat16()
    at_once, called = logits_of(model, name), []
    mlps = [module for module in model.modules() if isinstance(module, ChatGLMMLP)]
    for mlp in mlps:
        mlp.dense_h_to_4h.register_forward_hook(lambda *_: called.append(1))
    one_by_one = logits_of(model, name)
    assert len(called) == len(mlps)  # hooks see the calls of their modules
    assert (at_once - one_by_one).abs().max() <= 2**-6 * one_by_one.abs().max()
