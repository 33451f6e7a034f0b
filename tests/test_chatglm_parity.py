"""Does our ChatGLM compute the numbers that the published code computes from the published files?

The goldens hold tiny checkpoints with random weights and what the originals gave for them on transformers 4.27.1.
Each case states its tolerance; ids are exact. The published code is sequence-first inside, ours batch-first.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gmask.models.chatglm import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    inverse_frequencies,
    read_chat_layout,
    rotary_tables,
)

pytestmark = pytest.mark.filterwarnings("ignore:labels stand in a context")  # as in the published cases

GOLDEN = Path(__file__).parent / "golden"
TINY, DEEP, VERSION_0 = "chatglm-tiny", "chatglm-tiny-l28", "chatglm-tiny-v0"
PREFIXES = ["chatglm-tiny-ptuning", "chatglm-tiny-ptuning-projection"]
ATTENTION = ["eager", "sdpa"]
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
NOT_OURS = {"model_type", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "auto_map"}
CLOSE = dict(atol=2e-5, rtol=1e-4)
DEEP_CLOSE = dict(atol=5e-5, rtol=2e-4)
HALF_CLOSE = {torch.float16: 3e-2, torch.bfloat16: 0.25}
# Of the logits processors, which belong to chat and are held to the goldens there.
CHAT = re.compile(r"(sampling|invalid)\..*")
GIVEN = re.compile(r".*in\.(batch_)?attention_mask")


@cache
def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = GOLDEN / name
    return json.loads((folder / "case.json").read_text("utf-8")), load_file(folder / "tensors.safetensors")


@cache
def load_chatglm(name: str = TINY, attention: str = "sdpa", **changes: Any) -> ChatGLMForConditionalGeneration:
    """The checkpoint of a case, by the config that the case states."""
    config = make_config(read_case(name)[0]["config"] | changes, attention)
    folder = GOLDEN / (name if (GOLDEN / name / "model").is_dir() else TINY) / "model"
    model, report = ChatGLMForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    missing = {key for key in report.pop("missing_keys") if "prefix_encoder" not in key}
    assert not missing and not any(report.values()), (missing, report)
    prefix = GOLDEN / name / "ptuning" / "pytorch_model.bin"
    if prefix.is_file():
        trained = torch.load(prefix, weights_only=True)
        state = model.load_state_dict(trained, strict=False)
        assert not state.unexpected_keys and len(trained) == sum("prefix" in key for key in model.state_dict())
    return model.eval()


def make_config(published: Mapping[str, Any], attention: str = "sdpa") -> ChatGLMConfig:
    config = ChatGLMConfig(**{key: value for key, value in published.items() if key not in NOT_OURS})
    config._attn_implementation = attention
    return config


def forward_inputs(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the published forward was given."""
    inputs = {key: torch.tensor(case["inputs"][key]) for key in ("input_ids", "position_ids") if key in case["inputs"]}
    if "labels" in case["inputs"]:
        inputs["labels"] = torch.tensor(case["inputs"]["labels"])
    if "attention_mask" in case["inputs"]:
        inputs["attention_mask"] = tensors[case["inputs"]["attention_mask"]["tensor"]].bool()
    return inputs


def states_of(prefix: str, output: Any) -> dict[str, Tensor]:
    """Hidden states and cache under the published names and in the published order of axes."""
    found = {f"{prefix}hidden.{index}": states.transpose(0, 1) for index, states in enumerate(output.hidden_states)}
    for index, layer in enumerate(output.past_key_values.layers):
        found[f"{prefix}past.{index}.key"] = layer.keys.permute(2, 0, 1, 3)
        found[f"{prefix}past.{index}.value"] = layer.values.permute(2, 0, 1, 3)
    return found


@torch.no_grad()
def tiny_numbers(attention: str) -> dict[str, Tensor]:
    case, tensors = read_case(TINY)
    model = load_chatglm(TINY, attention)
    own_alpha = load_chatglm(TINY, attention, residual_alpha=(2 * case["config"]["num_layers"]) ** 0.5)
    ours: dict[str, Tensor] = {}
    for forward in case["forward_cases"]:
        tag, inputs = forward["tag"], forward_inputs(forward, tensors)
        output = model(**inputs, use_cache=True, output_hidden_states=True)
        ours |= {f"{tag}.logits": output.logits, f"{tag}.logits_alpha_cfg": own_alpha(**inputs).logits}
        ours |= states_of(f"{tag}.", output)
        if output.loss is not None:
            ours[f"{tag}.loss"] = output.loss
    ours |= stepwise_numbers(model, case["stepwise"])
    ids = torch.tensor(case["rope1d"]["input_ids"])
    in_line = torch.tensor(case["rope1d"]["position_ids"])[:, None].expand(-1, 2, -1)
    visible = read_chat_layout(model.config, ids, None, None, None)
    one_rotary = load_chatglm(TINY, attention, position_encoding_2d=False)
    layout = torch.stack((in_line[:, 0], visible[:, 1]), dim=1)
    ours["rope1d.logits"] = one_rotary(ids, layout=layout).logits
    untied = load_chatglm(TINY, attention, tie_word_embeddings=False)
    untied.lm_head.weight.data = tensors["untied.lm_head.weight"].float()
    ours |= {"untied.logits": untied(ids).logits, "untied.lm_head.weight": untied.lm_head.weight}
    return ours


def stepwise_numbers(model: ChatGLMForConditionalGeneration, case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The last logits of the context, then those of each token fed by itself."""
    context = torch.tensor(case["context_ids"])
    layout = read_chat_layout(model.config, context, None, None, None)
    output = model(context, layout=layout, use_cache=True)
    steps = [output.logits[:, -1:]]
    for step, token_id in enumerate(case["fed"]):
        place = layout[:, :, -1:] + torch.tensor([[0], [step + 1]])
        if model.config.position_rule == "v0":
            place[:, 0] = layout[:, 0, -2]
        output = model(torch.tensor([[token_id]]), layout=place, past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits)
    return {
        "stepwise.logits": torch.cat(steps, dim=1),
        "stepwise.past0.key_final": output.past_key_values.layers[0].keys.permute(2, 0, 1, 3),
    }


def rotary_numbers() -> dict[str, Tensor]:
    """Tables of one group of channels, for the tiny head and for the real one in three precisions."""
    case, _ = read_case(TINY)
    small = inverse_frequencies(8)
    found = {"rotary.inv_freq_half": small.half()}
    cos, sin = rotary_tables(torch.arange(40)[None, None], small, dtype=torch.float32)
    found |= {"rotary.cos": cos[0, 0, :, 0], "rotary.sin": sin[0, 0, :, 0]}
    places = torch.tensor(case["rotary64"]["positions"])[None, None]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        cos, sin = rotary_tables(places, inverse_frequencies(64), dtype=dtype)
        found |= {f"rotary64.{name}.cos": cos[0, 0, :, 0].float(), f"rotary64.{name}.sin": sin[0, 0, :, 0].float()}
    return found


@torch.no_grad()
def deep_numbers(attention: str) -> dict[str, Tensor]:
    ids = torch.tensor(read_case(DEEP)[0]["input_ids"])
    output = load_chatglm(DEEP, attention)(ids, output_hidden_states=True, use_cache=True)
    return {"logits": output.logits, **states_of("", output)}


@torch.no_grad()
def version_0_numbers(attention: str) -> dict[str, Tensor]:
    case, _ = read_case(VERSION_0)
    model = load_chatglm(VERSION_0, attention, position_rule="v0")
    ids = torch.tensor(case["gmask_full"]["input_ids"])
    full = model(ids, labels=ids)
    assert full.loss.item() == pytest.approx(case["gmask_full"]["loss"], abs=1e-5)
    steps = stepwise_numbers(model, case["stepwise"])
    return {
        "gmask_full.logits": full.logits,
        "mask_full.logits": model(torch.tensor(case["mask_full"]["input_ids"])).logits,
        "stepwise.logits": steps["stepwise.logits"],
    }


@torch.no_grad()
def prefix_numbers(name: str, attention: str) -> dict[str, Tensor]:
    case, tensors = read_case(name)
    model = load_chatglm(name, attention)
    single = torch.tensor(case["inputs"]["single"])
    layout = read_chat_layout(model.config, single, None, None, None)
    output = model(single, layout=layout, use_cache=True)
    keys = output.past_key_values.layers[0].keys.permute(2, 0, 1, 3).clone()
    step = model(
        torch.tensor([[case["step"]["appended"]]]),
        layout=layout[:, :, -1:] + torch.tensor([[0], [1]]),
        past_key_values=output.past_key_values,
        use_cache=True,
    )
    batch = model(
        torch.tensor(case["inputs"]["batch_input_ids"]),
        position_ids=torch.tensor(case["inputs"]["batch_position_ids"]),
        attention_mask=tensors["in.batch_attention_mask"].bool(),
    )
    prefix = model.transformer.prefix_encoder()  # [2 L, N, P, D]
    found = {"prefix_raw": prefix.permute(2, 0, 1, 3).flatten(1)[None], "single.logits": output.logits}
    found |= {"single.past0.key": keys, "batch.logits": batch.logits, "step.logits": step.logits}
    for layer in range(len(prefix) // 2):
        found[f"prefix.{layer}"] = prefix[2 * layer : 2 * layer + 2].transpose(1, 2)[:, :, None]
    return found


@torch.no_grad()
def half_numbers(name: str) -> dict[str, Tensor]:
    """Logits in half precision, with tables in half precision, where a token stands."""
    case, _ = read_case(name)
    found: dict[str, Tensor] = {}
    if name == TINY:
        forward = next(forward for forward in case["forward_cases"] if forward["tag"] == "batch_leftpad")
        inputs, stem = forward_inputs(forward, read_case(TINY)[1]), "batch_leftpad.logits"
    elif name == DEEP:
        inputs, stem = {"input_ids": torch.tensor(case["input_ids"])}, "logits"
    else:
        inputs, stem = {"input_ids": torch.tensor(case["inputs"]["single"])}, "single.logits"
    for dtype in (torch.float16, torch.bfloat16):
        weights = load_chatglm(name).state_dict()
        model = ChatGLMForConditionalGeneration(make_config(case["config"] | {"rotary_dtype": "module"}))
        model.load_state_dict(weights)
        found[f"{stem}_{str(dtype).removeprefix('torch.')}"] = model.eval().to(dtype)(**inputs).logits
    return found


def our_numbers(name: str, attention: str) -> dict[str, Tensor]:
    if name == TINY:
        return tiny_numbers(attention) | rotary_numbers()
    if name == DEEP:
        return deep_numbers(attention)
    return version_0_numbers(attention) if name == VERSION_0 else prefix_numbers(name, attention)


CASES = [TINY, DEEP, VERSION_0, *PREFIXES]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CASES)
def test_every_published_tensor(name: str, attention: str) -> None:
    ours, tensors = our_numbers(name, attention), read_case(name)[1]
    wrong = {}
    for key in sorted(tensors.keys() & ours.keys()):
        published = tensors[key].float()
        computed = ours[key].detach().float()
        limits = DEEP_CLOSE if name == DEEP else CLOSE
        exact = key.startswith("rotary64")
        if published.shape != computed.shape or not torch.allclose(
            computed, published, **({"atol": 1e-6, "rtol": 0.0} if exact else limits)
        ):
            wrong[key] = (computed - published).abs().max().item()
    assert wrong == {}


@pytest.mark.parametrize("name", [TINY, DEEP, *PREFIXES])
def test_half_precision_stays_as_near_as_the_published_one(name: str) -> None:
    tensors = read_case(name)[1]
    compared = 0
    for key, computed in half_numbers(name).items():
        if key not in tensors:
            continue
        real = torch.ones(computed.shape[:2], dtype=torch.bool)
        if name == TINY:
            real = torch.tensor(read_case(TINY)[0]["forward_cases"][2]["inputs"]["input_ids"]) != 3
        difference = (computed.float() - tensors[key].float())[real].abs().max()
        assert difference <= (0.1 if name == DEEP else HALF_CLOSE[computed.dtype]), key
        compared += 1
    assert compared >= 1


@pytest.mark.parametrize("name", CASES)
def test_no_published_tensor_is_left_out(name: str) -> None:
    tensors = read_case(name)[1]
    halves = half_numbers(name).keys() if name != VERSION_0 else set()
    left = tensors.keys() - our_numbers(name, "sdpa").keys() - halves
    assert {key for key in left if not CHAT.fullmatch(key) and not GIVEN.fullmatch(key)} == set()


def test_masks_and_places_are_the_published_ones() -> None:
    case, _ = read_case(TINY)
    config = make_config(case["config"])
    errors = 0
    for found in case["masks_and_positions"]:
        ids = torch.tensor(found["input_ids"])
        if "prepare_error" in found:
            with pytest.raises(ValueError, match=r"no <sop>|no \[gMASK\]"):
                read_chat_layout(config, ids, None, None, None)
            errors += 1
            continue
        layout = read_chat_layout(config, ids, None, None, None)
        assert layout.tolist() == found["prepare_position_ids"], found["input_ids"]
        places = torch.arange(ids.shape[1])
        hidden = ~((layout[:, None, 1] == 0) | (places[None, :, None] >= places))
        assert hidden.long().tolist() == found["get_masks"]
    assert errors == 2


def test_places_of_the_first_published_code_are_there_when_asked_for() -> None:
    case, _ = read_case(VERSION_0)
    config = make_config(case["config"] | {"position_rule": "v0"})
    found = case["masks_and_positions"]
    for one in found[:-1]:  # in the last one a row overwrites the places of another, which is not reproduced
        layout = read_chat_layout(config, torch.tensor(one["input_ids"]), None, None, None)
        assert layout.tolist() == one["position_ids"], one["input_ids"]
    last = read_chat_layout(config, torch.tensor(found[-1]["input_ids"]), None, None, None)
    assert last[0, 0].tolist() == [0, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("caching", CACHES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_published_generation(attention: str, caching: str) -> None:
    case, tensors = read_case(TINY)
    padded = next(forward for forward in case["forward_cases"] if forward["tag"] == "batch_leftpad")
    model, wrong = load_chatglm(TINY, attention), []
    for found in case["greedy"]:
        inputs = {"input_ids": torch.tensor(found["input_ids"])}
        if "position_ids" in found["given"]:
            inputs = forward_inputs(padded, tensors)
        else:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        settings = {key: found[key] for key in ("max_length", "num_beams", "eos_token_id") if key in found}
        output = model.generate(**inputs, **settings, **CACHES[caching], pad_token_id=3, do_sample=False)
        if output.tolist() != found["output_ids"]:
            wrong.append(found["tag"])
    assert wrong == []


@pytest.mark.parametrize("caching", CACHES)
@pytest.mark.parametrize("name", PREFIXES)
def test_every_published_generation_behind_a_prefix(name: str, caching: str) -> None:
    case, tensors = read_case(name)
    model = load_chatglm(name)
    for found in case["greedy"]:
        length = found["output_ids"][0].index(516) + 1
        ids = torch.tensor(found["output_ids"])[:, :length]
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_length=len(found["output_ids"][0]), do_sample=False,
            pad_token_id=3, **CACHES[caching],
        )  # fmt: skip
        assert output.tolist() == found["output_ids"], found["text"]
    batch = model.generate(
        torch.tensor(case["inputs"]["batch_input_ids"]),
        position_ids=torch.tensor(case["inputs"]["batch_position_ids"]),
        attention_mask=tensors["in.batch_attention_mask"].bool(),
        max_length=len(case["greedy_batch"][0]), do_sample=False, pad_token_id=3, **CACHES[caching],
    )  # fmt: skip
    assert batch.tolist() == case["greedy_batch"]


def test_greedy_ids_of_the_deep_and_of_the_first_published_model() -> None:
    case, _ = read_case(DEEP)
    ids = torch.tensor(case["input_ids"])
    output = load_chatglm(DEEP).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_length=len(case["greedy_output_ids"][0]),
        pad_token_id=3,
        do_sample=False,
    )
    assert output.tolist() == case["greedy_output_ids"]
    case, _ = read_case(VERSION_0)
    model = load_chatglm(VERSION_0, position_rule="v0")
    for found in case["greedy"]:
        ids = torch.tensor(found["input_ids"])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_length=len(found["output_ids"][0]),
            pad_token_id=3,
            do_sample=False,
        )
        assert output.tolist() == found["output_ids"], found["text"]
