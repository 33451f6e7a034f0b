"""Is the memory that a model takes known before it is loaded?"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gmask.checkpoints.zoo import FAMILIES, Family, find_family
from gmask.cli import app
from gmask.cli.estimate import WeightForm, advise_form
from gmask.errors import GmaskError
from gmask.estimation.inference import (
    INFERENCE_RUNTIME_BYTES,
    MemoryEstimate,
    config_of_family,
    estimate_inference,
    shape_at,
    weight_bytes,
)
from gmask.hardware import format_bytes
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.quantization.quantizer import QuantizationConfig, read_form

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden")
SHAPE: dict[str, Any] = dict(
    vocab_size=40000, hidden_size=1024, num_hidden_layers=6, num_attention_heads=16, max_position_embeddings=1024
)
SHAPES: dict[str, dict[str, Any]] = {"glm": SHAPE, "chatglm": {**SHAPE, "intermediate_size": 4096}}
CONFIGS: dict[str, Any] = {"glm": GLMConfig, "chatglm": ChatGLMConfig}
FORMS: list[dict[str, Any]] = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "float32", "quantize": "int8"},
    {"dtype": "bfloat16", "quantize": "int4"},
]


def run_gmask(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["estimate", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return str(done.stdout)


def estimate_rows(*arguments: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run_gmask(*arguments, "--json"))["estimates"]
    return rows


def measure(cases: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """What the benchmark's process measures, where what is freed goes back at once."""
    command = [sys.executable, str(ROOT / "benchmarks" / "estimate.py"), "--return-freed", "--measure"]
    done = subprocess.run([*command, json.dumps(cases)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    records: list[dict[str, int]] = json.loads(done.stdout)
    return records


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="measured as Linux counts it")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glm", "chatglm"])
def test_the_estimate_is_within_a_tenth_of_what_a_process_takes(kind: str) -> None:
    cases: list[dict[str, Any]] = [
        {"shape": {"kind": kind, **SHAPES[kind]}, "form": form, "context_length": length}
        for form in FORMS
        for length in (128, 1024)
    ]
    for case, measured in zip(cases, measure(cases), strict=True):
        form = case["form"]
        estimate = estimate_inference(
            CONFIGS[kind](**SHAPES[kind]),
            dtype=getattr(torch, form["dtype"]),
            form=read_form(form.get("quantize")),
            context_length=case["context_length"],
        )
        assert estimate.peak == pytest.approx(measured["peak"], rel=0.1), case
        of_the_model = measured["peak"] - measured["before"]  # the constant of the libraries hides nothing
        assert estimate.peak - estimate.runtime == pytest.approx(of_the_model, rel=0.1), case


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_weights_are_those_of_the_catalog_to_the_byte(family: Family) -> None:
    config = config_of_family(family)
    half = weight_bytes(shape_at(config, dtype=torch.float16))
    assert half == family.memory(f"int{family.bits}" if family.bits else "float16")


@pytest.mark.parametrize(("bits", "embeddings"), [(8, False), (4, False), (4, True)])
def test_published_integers_take_what_quantizing_would_give(bits: int, embeddings: bool) -> None:
    names = {(8, False): "ChatGLM-6B-int8", (4, False): "ChatGLM-6B-int4", (4, True): "ChatGLM-6B-int4-qe"}
    published, plain = find_family(names[bits, embeddings]), find_family("ChatGLM-6B")
    assert published is not None and plain is not None
    form = QuantizationConfig(bits, embeddings=embeddings)
    as_stored = estimate_inference(config_of_family(published), dtype=torch.bfloat16)
    assert as_stored == estimate_inference(config_of_family(plain), dtype=torch.bfloat16, form=form)


@pytest.mark.parametrize("kind", ["glm", "chatglm"])
@pytest.mark.parametrize("form", [None, (8, None, False), (4, 32, False), (4, 32, True)])
def test_weights_are_counted_as_a_model_has_them(kind: str, form: tuple[int, int | None, bool] | None) -> None:
    config = CONFIGS[kind](
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        **({"intermediate_size": 256} if kind == "chatglm" else {}),
    )  # fmt: skip
    model_class: Any = GLMForConditionalGeneration if kind == "glm" else ChatGLMForConditionalGeneration
    model = model_class(config).to(torch.bfloat16)
    if form is not None:
        model.quantize(form[0], group_size=form[1], embeddings=form[2])
    held = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}  # a tied head once
    quantized = None if form is None else QuantizationConfig(*form)
    assert weight_bytes(shape_at(config, dtype=torch.bfloat16, form=quantized)) == sum(held.values())


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 2047), batch=st.integers(1, 64), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)  # fmt: skip
def test_more_tokens_and_more_prompts_never_take_less(length: int, batch: int, dtype: torch.dtype) -> None:
    config = ChatGLMConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)

    def estimate(length: int, batch: int) -> MemoryEstimate:
        return estimate_inference(config, dtype=dtype, context_length=length, batch_size=batch)

    here = estimate(length, batch)
    assert here.cache <= estimate(length + 1, batch).cache and here.peak < estimate(length + 1, batch).peak
    assert estimate(length, 2 * batch).cache == 2 * here.cache
    keys_and_values = 2 * 2 * batch * length * 64 * dtype.itemsize
    assert here.cache >= keys_and_values
    assert here.resident == here.weights + here.cache + INFERENCE_RUNTIME_BYTES["cpu"] < here.peak


def test_a_checkpoint_of_the_training_code_needs_no_word_about_its_heads() -> None:
    (halved,) = estimate_rows(str(GOLDEN / "thudm-glm-tiny" / "ckpt_MP2"), "--quantize", "int4")
    (whole,) = estimate_rows(str(GOLDEN / "thudm-glm-tiny" / "ckpt"), "--quantize", "int4")
    assert halved == whole


def test_a_published_model_is_told_of_without_fetching_it() -> None:
    rows = estimate_rows("THUDM/chatglm-6b", "--context-length", "2048")
    assert [(row["dtype"], row["quantize"]) for row in rows] == [
        ("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4")
    ]  # fmt: skip
    assert [row["weights"] for row in rows] == [24693145600, 12346572800, 6711492608, 3892920320]
    assert all(row["peak"] == sum(row[part] for part in ("weights", "cache", "working", "runtime")) for row in rows)


def test_context_lengths_stop_at_the_positions_of_the_model() -> None:
    assert {row["context_length"] for row in estimate_rows("bundled")} == {512}
    assert {row["context_length"] for row in estimate_rows("GLM-10B")} == {512, 1024}


def test_the_table_ends_with_what_to_choose() -> None:
    printed = run_gmask()
    for word in ("float32", "bfloat16", "int8, else bfloat16", "int4, else bfloat16", "32.6 MB"):
        assert word in printed
    assert printed.splitlines()[-1].endswith("--dtype float32 is the most exact.")


def test_the_most_exact_form_that_fits_is_advised() -> None:
    choices = [
        WeightForm("float32", None, None), WeightForm("bfloat16", None, None),
        WeightForm("bfloat16", "int4", QuantizationConfig(4)),
    ]  # fmt: skip
    peaks = {choice: 10**9 * size for choice, size in zip(choices, (8, 4, 2), strict=True)}

    def advice(free: int) -> str:
        return advise_form(peaks, free, device="cpu", length=512)

    assert "all of this fits" in advice(8 * 10**9) and "--dtype float32 is" in advice(8 * 10**9)
    assert advice(8 * 10**9 - 1).endswith("Choose --dtype bfloat16.")
    assert advice(4 * 10**9 - 1).endswith("Choose --dtype bfloat16 --quantize int4.")
    assert f"nothing of this fits at 512 tokens, the smallest needs {format_bytes(2 * 10**9)}." in advice(2 * 10**9 - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense: no such folder"),
        (["bundled", "--context-length", "513"], "a context of 513 tokens: the model has 512 positions"),
        (["bundled", "--context-length", "0"], "a context length of 0"),
        (["bundled", "--batch-size", "0"], "a batch size of 0"),
        (["bundled", "--dtype", "int3"], "dtype 'int3' is not one of float32, bfloat16, float16"),
        (["bundled", "--quantize", "int5"], "quantize 'int5' is not one of int8, int4"),
        (["bundled", "--group-size", "32"], "add --quantize int4"),
        (["bundled", "--embeddings"], "add --quantize int4"),
        (["bundled", "--quantize", "int4", "--group-size", "48"], "a group of 48 columns"),
        (["THUDM/chatglm-6b-int4", "--quantize", "int8"], "the weights are int4, a scale a row already"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(GmaskError) as raised:
        run_gmask(*arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)
