"""Does our GLM compute the numbers that the published code computes from the published files?

The goldens hold tiny checkpoints with random weights and what the originals gave for them (transformers
4.27.1 for the Hugging Face flavour, THUDM/GLM for the other). Each case states its tolerance; ids are exact.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.models.glm_heads import (
    GLMForMultipleChoice,
    GLMForMultiTokenCloze,
    GLMForSequenceClassification,
    GLMForSingleTokenCloze,
)

HF_CASES = ["hf-glm-tiny", "hf-glm-10b-tiny", "hf-glm-tiny-fullvocab"]
ATTENTION = ["eager", "sdpa"]
SETTINGS = ["max_length", "eos_token_id", "pad_token_id", "num_beams"]
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
# What the originals were given: these tensors are fed to the model, not compared with it.
GIVEN = re.compile(
    r".*\.(in\.attention_mask|attention_mask|generation_attention_mask|text|target|position_id|loss_mask)"
    r"|classification\.head\..*"
)


@dataclass(frozen=True)
class Golden:
    """One case: its description, its tensors and the tolerance that it states."""

    name: str
    case: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        return Path(__file__).parent / "golden" / self.name

    @property
    def tolerance(self) -> dict[str, float]:
        atol, rtol = re.match(r"atol ([\de-]+),? rtol ([\de-]+)", self.case["tolerances"]["float32"]).groups()
        return {"atol": float(atol), "rtol": float(rtol)}

    def tensor(self, value: Any) -> Tensor | None:
        """An input of a forward case: the name of a tensor, or its values and dtype."""
        if value is None:
            return None
        if isinstance(value, str):
            return self.tensors[value]
        return torch.tensor(value["value"], dtype=getattr(torch, value["dtype"].removeprefix("torch.")))

    @property
    def losses(self) -> dict[str, float]:
        """The losses of all cases, which are written beside their inputs."""
        kinds = ("forward_cases", "multiple_choice", "sequence_classification")
        cases = [case for kind in kinds for case in self.case.get(kind, [])]
        return {case.get("tag", case.get("mode")): case["loss"] for case in cases if "loss" in case}


@cache
def read_golden(name: str) -> Golden:
    folder = Path(__file__).parent / "golden" / name
    return Golden(
        name, json.loads((folder / "case.json").read_text("utf-8")), load_file(folder / "tensors.safetensors")
    )


def published_config(golden: Golden, attention: str, **changes: Any) -> GLMConfig:
    """The config beside the weights, as published, and the special ids, which it lacks."""
    published = json.loads((golden.folder / "model" / "config.json").read_text("utf-8"))
    del published["model_type"]
    names = [f"{name}_token_id" for name in ("sop", "eop", "mask", "smask", "gmask")]
    special_ids = {name: golden.case["special_ids"][name] for name in names}
    config = GLMConfig(**{**published, **special_ids, **changes})
    config._attn_implementation = attention
    config.tie_last_hidden_states = False  # the published mems end with what enters the final norm
    return config


@cache
def load_published(
    name: str, attention: str, model_class: type[PreTrainedModel] = GLMForConditionalGeneration
) -> PreTrainedModel:
    golden = read_golden(name)
    model, report = model_class.from_pretrained(
        golden.folder / "model",
        config=published_config(golden, attention),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return model.eval()


@cache
def load_thudm(
    attention: str,
    hidden_act: str = "gelu_pytorch_tanh",
    model_class: type[PreTrainedModel] = GLMForConditionalGeneration,
    pool_token: str = "cls",
) -> PreTrainedModel:
    """The checkpoint of the training code, with the classification head that the goldens hold where it is wanted."""
    golden = read_golden("thudm-glm-tiny")
    checkpoint = torch.load(golden.folder / "ckpt" / "1234" / "mp_rank_00_model_states.pt", weights_only=True)
    config = GLMConfig(**golden.case["config"], hidden_act=hidden_act, pool_token=pool_token, num_labels=3)
    config._attn_implementation = attention
    config.tie_last_hidden_states = False
    model = model_class(config)
    weights = {f"glm.{name}": value for name, value in checkpoint["module"].items()}
    tied = ["lm_head.weight"]
    if model_class is GLMForSequenceClassification:
        head = "classification.head."
        weights |= {key.removeprefix(head): golden.tensors[key] for key in golden.tensors if key.startswith(head)}
        tied = []
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (tied, [])
    return model.eval()


def views_of(logits: Tensor, columns: list[int] | None) -> dict[str, Tensor]:
    """The parts of the logits that the goldens keep."""
    views = {
        "logits": logits,
        "logits_every4": logits[..., ::4],
        "logsumexp": logits.logsumexp(-1),
        "argmax": logits.argmax(-1),
    }
    if columns is not None:
        views["logits_sel"] = logits[..., columns]
    return views


@cache
def our_hf_numbers(name: str, attention: str) -> dict[str, Tensor]:
    """Everything that the published model computed, by ours, under the published names."""
    golden = read_golden(name)
    model = load_published(name, attention)
    columns = golden.case.get("logits_sel_columns")
    ours: dict[str, Tensor] = {}
    memory: tuple[Tensor, ...] = ()  # published mems: the states of all tokens so far
    past = None
    for case in golden.case["forward_cases"]:
        tag = case["tag"]
        inputs = {key: golden.tensor(value) for key, value in case["inputs"].items()}
        if tag == "mask_none":  # without a mask ours reads the layout off the ids; "causal" has to be said
            inputs["attention_mask"] = torch.tensor(0)
        continues = tag.startswith("mem_step")
        with torch.no_grad():
            output = model(
                **inputs,
                past_key_values=past if continues else None,
                use_cache=True,
                output_hidden_states=True,
            )
        past = output.past_key_values
        states = output.hidden_states
        memory = tuple(torch.cat(pair, dim=1) for pair in zip(memory, states, strict=True)) if continues else states
        ours |= {f"{tag}.{view}": value for view, value in views_of(output.logits, columns).items()}
        ours |= {f"{tag}.mems.{layer}": value for layer, value in enumerate(memory)}
        ours[f"{tag}.last_hidden"] = model.glm.transformer.final_layernorm(states[-1]).detach()
        if output.loss is not None:
            ours[f"{tag}.loss"] = output.loss
    for case in golden.case["multiple_choice"]:
        inputs = {key: torch.tensor(case[key]) for key in ("input_ids", "position_ids")}
        mask = golden.tensors[f"{case['tag']}.attention_mask"]
        with torch.no_grad():
            logits = model(**inputs, attention_mask=mask).logits
        ours |= {f"{case['tag']}.lm.{view}": value for view, value in views_of(logits, columns).items()}
    for case in golden.case["extra_flags"]:
        ours[f"{case['tag']}.logits"] = logits_with_flag(golden, attention, case)
    return ours | choice_numbers(golden, attention) | classification_numbers(golden, attention)


def choice_numbers(golden: Golden, attention: str) -> dict[str, Tensor]:
    """The choices of the published `GLMForMultipleChoice`."""
    model = load_published(golden.name, attention, GLMForMultipleChoice)
    ours: dict[str, Tensor] = {}
    for case in golden.case["multiple_choice"]:
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor(case["input_ids"]),
                position_ids=torch.tensor(case["position_ids"]),
                attention_mask=golden.tensors[f"{case['tag']}.attention_mask"],
                choice_ids=case["choice_ids"],
                choice_indices=case["choice_indices"],
                labels=torch.tensor(case["labels"]),
            )
        ours |= {f"{case['tag']}.logits": output.logits, f"{case['tag']}.loss": output.loss}
    return ours


def classification_numbers(golden: Golden, attention: str) -> dict[str, Tensor]:
    """The classes of the published `GLMForSequenceClassification`, whose head lies in a file of its own."""
    ours: dict[str, Tensor] = {}
    for case in golden.case.get("sequence_classification", []):
        tag = case["tag"]
        weights = torch.load(golden.folder / tag / "head_only.bin", weights_only=True)
        base = load_published(golden.name, attention).state_dict()
        weights |= {key: value for key, value in base.items() if key != "lm_head.weight"}
        model = GLMForSequenceClassification(published_config(golden, attention, num_labels=case["num_labels"]))
        model.load_state_dict(weights)
        inputs = {key: torch.tensor(case[key]) for key in ("input_ids", "position_ids", "attention_mask", "labels")}
        with torch.no_grad():
            output = model.eval()(**inputs, output_hidden_states=True)
        ours |= {f"{tag}.logits": output.logits, f"{tag}.loss": output.loss}
        ours[f"{tag}.hidden"] = model.glm.transformer.final_layernorm(output.hidden_states[-1]).detach()
    return ours


def logits_with_flag(golden: Golden, attention: str, case: dict[str, Any]) -> Tensor:
    """The logits after a change of the config; without block positions the place table has one row fewer."""
    config = published_config(golden, attention, **case["config_change"])
    model = GLMForConditionalGeneration(config).eval()
    weights = load_published(golden.name, attention).state_dict()
    layout = torch.tensor(case["position_ids"])
    if not config.block_position_encoding:
        places = "glm.transformer.position_embeddings.weight"
        weights[places] = weights[places][: config.max_position_embeddings]
        del weights["glm.transformer.block_position_embeddings.weight"]
        layout = torch.stack((layout, torch.zeros_like(layout)), dim=1)  # published as [B, T]
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(
            torch.tensor(case["input_ids"]),
            layout=layout,
            attention_mask=torch.tensor(case["attention_mask"]),
        ).logits


@cache
def our_thudm_numbers(attention: str) -> dict[str, Tensor]:
    golden = read_golden("thudm-glm-tiny")
    model = load_thudm(attention, "gelu_pytorch_tanh")
    ours: dict[str, Tensor] = {}
    for case in golden.case["forward_cases"]:
        mode = case["mode"]
        given = {key: golden.tensors[f"{mode}.{key}"] for key in ("text", "target", "position_id", "loss_mask")}
        inputs = dict(
            input_ids=given["text"],
            position_ids=given["position_id"],
            attention_mask=torch.tensor(case["sep"]),
        )
        with torch.no_grad():
            output = model(
                **inputs,
                labels=given["target"].where(given["loss_mask"] == 1, -100),
                output_hidden_states=True,
            )
            erf_logits = load_thudm(attention, "gelu")(**inputs).logits
        ours |= {f"{mode}.{view}": value for view, value in views_of(output.logits, None).items()}
        ours |= {f"{mode}.mems.{layer}": value for layer, value in enumerate(output.hidden_states)}
        ours[f"{mode}.hf_logits_every4"] = erf_logits[..., ::4]
        ours[f"{mode}.loss"] = output.loss
    return ours | thudm_head_numbers(golden, attention)


def thudm_head_numbers(golden: Golden, attention: str) -> dict[str, Tensor]:
    """What the heads of the training code compute from rows of the first batch."""
    names = dict(input_ids="text", position_ids="position_id", target_ids="target", logit_mask="loss_mask")
    batch = {ours: golden.tensors[f"bert.{theirs}"] for ours, theirs in names.items()}
    batch["attention_mask"] = torch.tensor(golden.case["forward_cases"][0]["sep"])
    rows = {name: tensor[:2] for name, tensor in batch.items()}
    pairs = {name: tensor[torch.tensor([[0, 1], [1, 0]])] for name, tensor in batch.items()}
    inputs = {name: rows[name] for name in ("input_ids", "position_ids", "attention_mask")}
    ids = torch.tensor([[20, 21, 22], [30, 31, 32]])
    several = load_thudm(attention, model_class=GLMForMultiTokenCloze)
    single = load_thudm(attention, model_class=GLMForSingleTokenCloze)
    with torch.no_grad():
        ours = {
            "multi_token_cloze.logits": several(**pairs).logits,
            "multi_token_cloze.length_penalty_0.7": several(**rows, length_penalty=0.7).logits,
            "single_token_cloze.logits": single(**inputs, target_ids=ids).logits,
        }
        for pool_token in ("cls", "start", "pad"):
            model = load_thudm(attention, model_class=GLMForSequenceClassification, pool_token=pool_token)
            ours[f"classification.{pool_token}.logits"] = model(**inputs).logits
    return ours


def our_numbers(name: str, attention: str) -> dict[str, Tensor]:
    return our_hf_numbers(name, attention) if name in HF_CASES else our_thudm_numbers(attention)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", [*HF_CASES, "thudm-glm-tiny"])
def test_every_published_tensor(name: str, attention: str) -> None:
    golden, ours = read_golden(name), our_numbers(name, attention)
    wrong = {}
    for key in sorted(golden.tensors.keys() & ours.keys()):
        published, computed = golden.tensors[key], ours[key]
        if published.is_floating_point():
            limits = {"atol": 1e-5, "rtol": 0.0} if key.endswith(".loss") else golden.tolerance
            equal = published.shape == computed.shape and torch.allclose(computed, published, **limits)
        else:
            equal = torch.equal(computed, published.to(computed.dtype))
        if not equal:
            wrong[key] = (computed - published).abs().max().item()
    assert wrong == {}


@pytest.mark.parametrize("name", [*HF_CASES, "thudm-glm-tiny"])
def test_no_published_tensor_is_left_out(name: str) -> None:
    golden = read_golden(name)
    compared = golden.tensors.keys() & our_numbers(name, "eager").keys()
    given = {key for key in golden.tensors if GIVEN.fullmatch(key)}
    assert golden.tensors.keys() == compared | given
    assert not compared & given


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", [*HF_CASES, "thudm-glm-tiny"])
def test_every_published_loss(name: str, attention: str) -> None:
    golden, ours = read_golden(name), our_numbers(name, attention)
    computed = {key.removesuffix(".loss"): loss.item() for key, loss in ours.items() if key.endswith(".loss")}
    assert computed == pytest.approx(golden.losses, abs=1e-5, rel=0.0)


def generation_inputs(golden: Golden, case: dict[str, Any]) -> dict[str, Any]:
    """What the published `build_inputs_for_generation` hands to `generate`."""
    return dict(
        input_ids=torch.tensor(case["input_ids"]),
        position_ids=torch.tensor(case["position_ids"]),
        generation_attention_mask=golden.tensors[f"{case['tag']}.generation_attention_mask"].long(),
    )


@pytest.mark.parametrize("caching", CACHES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", HF_CASES)
def test_every_published_generation(name: str, attention: str, caching: str) -> None:
    golden, model = read_golden(name), load_published(name, attention)
    wrong = []
    for case in golden.case["generation"]:
        settings = {key: case[key] for key in SETTINGS}
        output = model.generate(**generation_inputs(golden, case), **settings, **CACHES[caching], do_sample=False)
        if output.tolist() != case["output_ids"]:
            wrong.append(case["tag"])
    assert wrong == []


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "ids alone"])
@pytest.mark.parametrize("name", HF_CASES)
def test_published_prompts_without_padding_need_no_layout(name: str, masked: bool) -> None:
    golden, model = read_golden(name), load_published(name, "sdpa")
    alone = [case for case in golden.case["generation"] if len(case["prompts"]) == 1]
    assert alone
    for case in alone:
        ids = torch.tensor(case["input_ids"])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if masked else {"input_ids": ids}
        settings = {key: case[key] for key in SETTINGS}
        output = model.generate(**inputs, **settings, do_sample=False)
        assert output.tolist() == case["output_ids"], case["tag"]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", HF_CASES)
def test_greedy_steps_lead_by_the_published_gap(name: str, attention: str) -> None:
    golden, model = read_golden(name), load_published(name, attention)
    greedy = [case for case in golden.case["generation"] if "min_top1_top2_gap" in case]
    assert greedy
    for case in greedy:
        settings = {key: case[key] for key in SETTINGS}
        output = model.generate(
            **generation_inputs(golden, case),
            **settings,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(output.logits, dim=1).topk(2, dim=-1).values  # [B, steps, 2]
        gap = (best[..., 0] - best[..., 1]).min()
        assert torch.allclose(gap, torch.tensor(case["min_top1_top2_gap"]), atol=4e-5, rtol=0.0), case["tag"]
