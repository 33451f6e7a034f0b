"""Does a layer with int8 or int4 weights keep them exactly, whatever is done to the model around it?"""

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from torch import Tensor, nn

from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig
from gmask.quantization import kernels
from gmask.quantization.calibration import calibrate_model, cut_texts, round_columns
from gmask.quantization.formats import dequantize, quantize
from gmask.quantization.linear import QuantEmbedding, QuantLinear
from gmask.quantization.quantizer import QuantizationConfig, quantize_model, quantized_layers

FORMS = [(8, None), (8, 64), (4, None), (4, 32)]
IN, OUT = 128, 96


def make_layer(bits: int = 4, group_size: int | None = None, *, used: bool = True) -> QuantLinear:
    """A layer with random weights, which by default is repacked for the kernels."""
    torch.manual_seed(bits)
    layer = QuantLinear.from_linear(nn.Linear(IN, OUT), bits=bits, group_size=group_size)
    if used:
        layer(torch.ones(1, IN))
    return layer


def is_packed(layer: nn.Module) -> bool:
    return hasattr(layer._parameters["weight"], "packed")


def numbers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    state = layer.state_dict()
    return state["weight"].clone(), state["weight_scale"].clone()


@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_a_layer_computes_with_the_weight_that_its_integers_stand_for(bits: int, group_size: int | None) -> None:
    layer = make_layer(bits, group_size)
    x = torch.randn(2, 5, IN)
    expected = x @ layer.dequantize().T + layer.bias
    torch.testing.assert_close(layer(x), expected, atol=2e-6, rtol=1e-5)
    assert layer.half()(x.half()).dtype == torch.float16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda layer: layer.half(),
    "float": lambda layer: layer.float(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "to dtype": lambda layer: layer.to(torch.float64),
    "type": lambda layer: layer.type(torch.float16),
    "to device": lambda layer: layer.to("cpu"),
    "there and back": lambda layer: layer.half().float(),
    "deepcopy": copy.deepcopy,
    "use": lambda layer: layer(torch.ones(1, IN)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_no_cast_touches_integers_or_scales(bits: int, group_size: int | None, used: bool, change: str) -> None:
    layer = make_layer(bits, group_size, used=used)
    integers, scale = numbers(make_layer(bits, group_size, used=False))
    result = CHANGES[change](layer)
    for one in (layer, result) if isinstance(result, nn.Module) else (layer,):
        assert one.weight.dtype == torch.int8 and one.weight_scale.dtype == torch.float16
        assert torch.equal(one.weight, integers) and torch.equal(one.weight_scale, scale)


def test_one_copy_of_the_weight_is_held() -> None:
    layer = make_layer(4, 32)
    assert is_packed(layer)
    held = [parameter.untyped_storage().nbytes() for parameter in layer.parameters()]
    assert held == [1, 2, 4 * OUT]
    assert layer._parameters["weight"].packed.product.nbytes == OUT * IN // 2 + OUT * IN // 32 * 2
    assert [tuple(parameter.shape) for parameter in layer.parameters()] == [(OUT, IN // 2), (OUT, IN // 32), (OUT,)]
    assert layer.half().float() is layer and is_packed(layer)  # a cast does not unpack it


def test_a_write_to_the_weight_is_heeded() -> None:
    layer = make_layer(8)
    x = torch.randn(3, IN)
    with torch.no_grad():
        layer.weight_scale.mul_(2)
        torch.testing.assert_close(layer(x), x @ layer.dequantize().T + layer.bias, atol=4e-6, rtol=1e-5)
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
        assert torch.equal(layer(x), layer.bias.expand(3, -1))


@pytest.mark.parametrize("used", [True, False])
def test_a_state_dict_comes_through_every_file_format(used: bool) -> None:
    layer = make_layer(4, 32, used=used)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    for state in (torch.load(buffer, weights_only=True), load(save(layer.state_dict()))):
        other = QuantLinear(IN, OUT, bits=4, group_size=32)
        nn.init.zeros_(other.weight)
        nn.init.ones_(other.weight_scale)
        if used:
            other(torch.ones(1, IN))
        other.load_state_dict(state)
        x = torch.randn(2, IN)
        assert torch.equal(other(x), layer(x))
        assigned = QuantLinear(IN, OUT, bits=4, group_size=32, device="meta")
        assigned.load_state_dict(state, assign=True)
        assert torch.equal(assigned(x), layer(x))


def test_gradients_are_those_of_the_dequantized_layer() -> None:
    layer = make_layer(4, 32)
    plain = nn.Linear(IN, OUT)
    plain.load_state_dict({"weight": layer.dequantize(), "bias": layer.bias.detach()})
    inputs = [torch.randn(7, IN, requires_grad=True) for _ in range(2)]
    inputs[1].data = inputs[0].data
    for one, x in zip((layer, plain), inputs, strict=True):
        one(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("bits", "group_size"), FORMS)
@pytest.mark.parametrize("path", ["native", "torch", "aten"])
def test_embedding_and_head_share_one_weight(
    monkeypatch: pytest.MonkeyPatch, bits: int, group_size: int | None, path: str
) -> None:
    if path != "native":
        monkeypatch.setenv(kernels.PATH_VARIABLE, path)
    embedding = QuantEmbedding.from_embedding(nn.Embedding(OUT + 32, IN), bits=bits, group_size=group_size)
    head = QuantLinear(IN, OUT + 32, bits=bits, group_size=group_size, bias=False)
    head.weight, head.weight_scale = embedding.weight, embedding.weight_scale
    table, ids = embedding.dequantize(), torch.tensor([[0, 31, 32], [95, 127, 0]])
    assert torch.equal(embedding(ids), table[ids])
    for _ in range(2):
        x = torch.randn(2, IN)
        torch.testing.assert_close(head(x), x @ table.T, atol=1e-5, rtol=1e-4)
        assert torch.equal(embedding(ids), table[ids])
        assert torch.equal(embedding.half()(ids), table[ids].half())
        embedding.float()
    assert head.weight is embedding.weight


def test_threads_may_be_the_first_to_use_a_layer_together() -> None:
    layer, x = make_layer(4, 32, used=False), torch.randn(3, IN)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(layer(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, results[0]) for result in results)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_lora_trains_on_quantized_weights(build_glm: Callable[..., Any]) -> None:
    model = quantize_model(build_glm(), bits=4, group_size=32)
    before = {name: numbers(layer) for name, layer in quantized_layers(model)}
    tuned = get_peft_model(model, LoraConfig(target_modules=["query_key_value", "dense_h_to_4h"], r=4)).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-2)
    ids = torch.tensor([[20, 21, 7, 8, 30, 31, 32, 33]])
    labels = torch.tensor([[-100, -100, -100, 30, 31, 32, 33, 9]])
    losses = []
    for _ in range(12):
        loss = tuned(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    after = {name: numbers(layer) for name, layer in quantized_layers(model)}
    assert len(before) == len(after) == 8
    for ours, theirs in zip(before.values(), after.values(), strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "4 or 8 bits, not in 5"),
        ({"bits": 0}, "4 or 8 bits, not in 0"),
        ({"bits": 4, "group_size": 48}, "a group of 48 columns: choose 32, 64 or 128"),
        ({"bits": 4, "group_size": 64}, "a group of 64 columns: .*a divisor of the weight's 32"),
    ],
)
def test_a_form_that_does_not_fit_leaves_the_model_as_it_was(
    build_glm: Callable[..., Any], change: dict[str, int], message: str
) -> None:
    model = build_glm()
    with pytest.raises(GmaskError, match=message):
        model.quantize(**change)
    assert not list(quantized_layers(model))


def test_a_model_is_quantized_once(build_glm: Callable[..., Any]) -> None:
    model = build_glm().quantize(8)
    with pytest.raises(GmaskError, match="quantized already"):
        model.quantize(8)


def test_calibration_lowers_the_error_of_what_a_layer_puts_out() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    inputs = torch.randn(512, 16) @ torch.randn(16, 128) + 0.3 * torch.randn(512, 128)
    for bits, group in ((4, None), (4, 32), (8, None)):
        integers, scale = round_columns(weight, inputs.T @ inputs, bits=bits, group_size=group)
        plain = dequantize(*quantize(weight, bits, group_size=group))
        lowest, highest = int(integers.min()), int(integers.max())
        assert scale.dtype == torch.float16 and -(2 ** (bits - 1)) <= lowest < 0 < highest < 2 ** (bits - 1)
        error, plain_error = (
            (inputs @ (weight - rounded).T).square().mean() for rounded in (dequantize(integers, scale), plain)
        )
        assert error < 0.5 * plain_error


@pytest.mark.parametrize("group_size", [None, 32])
def test_rounding_in_blocks_is_rounding_column_by_column(group_size: int | None) -> None:
    """By the update of the paper's equation 2 and the removal of its equation 3, in float64."""
    torch.manual_seed(1)
    weight = torch.randn(16, 320)
    inputs = (torch.randn(900, 20) @ torch.randn(20, 320) + torch.randn(900, 320)) * torch.rand(320)
    moments = inputs.T @ inputs
    integers, scale = round_columns(weight, moments, bits=4, group_size=group_size)
    damped = moments.double() + 0.01 * moments.diagonal().mean() * torch.eye(320)
    inverse, left = torch.linalg.inv(damped), weight.double()
    scales = scale.double().view(16, -1).repeat_interleave(group_size or 320, dim=1)
    plain = torch.empty_like(integers)
    for column in moments.diagonal().argsort(descending=True).tolist():
        rounded = (left[:, column] / scales[:, column]).round().clamp(-8, 7)
        plain[:, column] = rounded.to(torch.int8)
        error = (left[:, column] - rounded * scales[:, column]) / inverse[column, column]
        left = left - torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert (plain == integers).double().mean() > 0.99


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), used=st.integers(0, 32), group=st.sampled_from([None, 32]))
def test_inputs_that_say_little_do_no_harm(seed: int, used: int, group: int | None) -> None:
    """Columns that are always zero, fewer inputs than columns, rows of zeros."""
    torch.manual_seed(seed)
    weight = torch.randn(8, 32)
    weight[seed % 8] = 0
    inputs = torch.zeros(5, 32)
    inputs[:, :used] = torch.randn(5, used)
    integers, scale = round_columns(weight, inputs.T @ inputs, bits=4, group_size=group)
    found = dequantize(integers, scale)
    assert found.isfinite().all() and (found[seed % 8] == 0).all()
    assert (found - weight).abs().max() < 0.6 * weight.abs().max()


@torch.no_grad()
def test_a_calibrated_model_is_one_like_the_others(build_glm: Callable[..., Any]) -> None:
    model = build_glm()
    torch.manual_seed(0)
    batches = [{"input_ids": torch.tensor([[*row, 7, 8, 40]])} for row in torch.randint(16, 48, (16, 20)).tolist()]
    plain = [build_glm()(**batch).logits for batch in batches]
    calibrated = calibrate_model(model, batches, bits=4, group_size=32, embeddings=True)
    assert calibrated is model and len(list(quantized_layers(model))) == 10
    assert str(model.config.quantization_config) == str(QuantizationConfig(4, 32, True))
    rounded = build_glm().quantize(4, group_size=32, embeddings=True)
    errors = [
        sum(float((one(**batch).logits - logits).square().mean()) for batch, logits in zip(batches, plain, strict=True))
        for one in (calibrated, rounded)
    ]
    assert errors[0] < errors[1]


class Words:
    """A tokenizer that gives each character an id of its own."""

    cls_token_id = 3

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(range(100, 100 + len(text)))


@pytest.mark.parametrize("kind", ["glm", "chatglm"])
def test_no_token_of_a_text_is_lost_or_read_twice_in_calibration(build_glm: Callable[..., Any], kind: str) -> None:
    config: Any = build_glm().config
    if kind == "chatglm":
        config = ChatGLMConfig(mask_token_id=5, gmask_token_id=7, bos_token_id=8, eos_token_id=9)
    pieces = cut_texts(Words(), config, ["a" * 130, "b" * 300], length=50, pieces=6)  # type: ignore[arg-type]
    masks = [5, 6, 7, 5, 6, 7] if kind == "glm" else [7] * 6
    assert len(pieces) == 6
    for number, (piece, mask) in enumerate(zip(pieces, masks, strict=True)):
        ids, (places, steps) = piece["input_ids"][0].tolist(), piece["layout"][0].tolist()
        context = steps.index(1)
        assert ids[context] == config.sop_token_id and (ids[0] == 3) == (kind == "glm")
        assert places[:context] == list(range(context)) and set(steps[:context]) == {0}
        restored = ids[:context]
        answers: dict[int, list[int]] = {}
        for token, place, step in zip(ids[context:], places[context:], steps[context:], strict=True):
            answers.setdefault(place, [])
            assert step == len(answers[place]) + 1 and restored[place] == mask
            answers[place].append(token)
        text = [token for place, one in enumerate(restored) for token in answers.get(place, [None, one])[1:]]
        whole = [*range(100, 230), *range(100, 400)]
        first = number * 50
        assert text[1 if kind == "glm" else 0 :] == whole[first : first + 50]
    with pytest.raises(GmaskError, match="fewer than 20 tokens"):
        cut_texts(Words(), config, ["a"], length=20)  # type: ignore[arg-type]
