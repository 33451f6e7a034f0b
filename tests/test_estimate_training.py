"""Is the memory that tuning takes known before anything is loaded?"""

import json
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gmask.cli import app
from gmask.errors import GmaskError
from gmask.estimation.training import Step, TrainingEstimate, block_bytes, end_bytes, estimate_training, state_between
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.quantization.quantizer import QuantizationConfig
from gmask.recipes.tuning import LINEARS, MethodSettings
from gmask.training.losses import token_loss
from gmask.training.methods import apply_method

SIZE, VOCABULARY, ROWS, TOKENS = 64, 96, 2, 32
SHAPE: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=SIZE, num_hidden_layers=2, num_attention_heads=4)
IDS: dict[str, Any] = dict(pad_token_id=3, bos_token_id=4, eos_token_id=5, mask_token_id=6, gmask_token_id=7)
METHODS: list[dict[str, Any]] = [
    {"name": "full"},
    {"name": "frozen-embeddings"},
    {"name": "lora"},
    {"name": "lora", "dropout": 0.1, "targets": "all-linear"},
    {"name": "dora"},
    {"name": "adalora"},
    {"name": "ia3"},
    {"name": "qlora"},
    {"name": "p-tuning-v2", "prefix_length": 8},
    {"name": "p-tuning"},
]


def make_config(kind: str, *, dropout: float = 0.0, **values: Any) -> Any:
    if kind == "chatglm":
        return ChatGLMConfig(**SHAPE | {"intermediate_size": 4 * SIZE} | IDS | values)
    rates = dict.fromkeys(("hidden_dropout", "attention_dropout", "embedding_dropout"), dropout)
    return GLMConfig(**SHAPE | rates | {"hidden_act": "gelu_pytorch_tanh"} | values)


def make_model(config: Any, method: MethodSettings, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    is_glm = isinstance(config, GLMConfig)
    model: Any = (GLMForConditionalGeneration if is_glm else ChatGLMForConditionalGeneration)(config).to(dtype)
    if method.name == "qlora":
        model.quantize(8)
    apply_method(model, method, steps=100)
    return model.train()


def make_batch() -> dict[str, torch.Tensor]:
    context = TOKENS // 2
    layout = torch.zeros(ROWS, 2, TOKENS, dtype=torch.int64)
    layout[:, 0] = torch.arange(TOKENS).clamp(max=context - 1)
    layout[:, 1, context:] = torch.arange(1, TOKENS - context + 1)
    labels = torch.full((ROWS, TOKENS), -100)
    labels[:, context:] = 11
    ids = torch.full((ROWS, TOKENS), 10)
    return {"input_ids": ids, "layout": layout, "labels": labels, "sequence_ids": torch.zeros_like(ids)}


class Kept:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_bytes(model: Any, *, autocast: bool) -> int:
    """What torch keeps of a forward pass and its loss, beside the parameters; shared memory counts once."""
    batch = make_batch()
    with torch.no_grad():
        token_loss(model, batch)  # repacks integers
    found: list[weakref.ref[Kept]] = []

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        found.append(weakref.ref(kept))
        return kept

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        loss, _ = token_loss(model, batch)
    storages = [kept.tensor.untyped_storage() for one in found if (kept := one()) is not None]
    assert loss.requires_grad
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum({one.data_ptr(): one.nbytes() for one in storages if one.data_ptr() not in own}.values())


def make_step(config: Any, method: MethodSettings, dtype: torch.dtype, *, autocast: bool) -> Step:
    return Step(
        config=config,
        method=method,
        dtype=dtype,
        autocast=autocast,
        quantized=frozenset(LINEARS if method.name == "qlora" else ()),
        batch_size=ROWS,
        length=TOKENS,
        answer_length=TOKENS // 2,
        is_fused=False,
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["as stored", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", METHODS, ids=lambda values: "-".join(map(str, values.values())))
@pytest.mark.parametrize(("kind", "dropout"), [("glm", 0.0), ("glm", 0.1), ("chatglm", 0.0)])
def test_a_block_keeps_what_torch_keeps(
    kind: str, dropout: float, values: dict[str, Any], dtype: torch.dtype, autocast: bool
) -> None:
    method = MethodSettings(**values)
    if kind == "chatglm" and method.name == "p-tuning":
        pytest.skip("ChatGLM has no vectors in its texts")
    if method.name == "adalora" and dtype == torch.bfloat16:
        pytest.skip("adalora's scale keeps tensors beside bfloat16 weights that show at this size alone")
    two, three = (
        kept_bytes(
            make_model(make_config(kind, dropout=dropout, num_hidden_layers=layers), method, dtype), autocast=autocast
        )
        for layers in (2, 3)
    )
    step = make_step(make_config(kind, dropout=dropout), method, dtype, autocast=autocast)
    assert block_bytes(step, is_first=False) == pytest.approx(three - two, rel=0.02)
    whole = block_bytes(step, is_first=True) + block_bytes(step, is_first=False) + end_bytes(step)
    if method.name != "p-tuning":  # whose network keeps a few numbers for each vector, and at this size they show
        assert whole == pytest.approx(two, rel=0.08)


def test_with_checkpointing_a_block_keeps_its_input() -> None:
    config, method = make_config("glm", dropout=0.1), MethodSettings(name="full")
    kept = []
    for layers in (2, 3):
        model = make_model(make_config("glm", dropout=0.1, num_hidden_layers=layers), method, torch.float32)
        model.activation_checkpointing_enable({"use_reentrant": False})
        kept.append(kept_bytes(model, autocast=False))
    inputs = state_between(make_step(config, method, torch.float32, autocast=False)).nbytes
    assert kept[1] - kept[0] <= 1.1 * inputs
    assert inputs == ROWS * TOKENS * SIZE * 4


@pytest.mark.parametrize("values", METHODS, ids=lambda values: "-".join(map(str, values.values())))
@pytest.mark.parametrize("kind", ["glm", "chatglm"])
def test_trainable_numbers_and_weights_are_those_of_the_model(kind: str, values: dict[str, Any]) -> None:
    method = MethodSettings(**values)
    if kind == "chatglm" and method.name == "p-tuning":
        pytest.skip("ChatGLM has no vectors in its texts")
    model = make_model(make_config(kind), method, torch.bfloat16 if method.makes_adapter else torch.float32)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    form = QuantizationConfig(8) if method.name == "qlora" else None
    found = estimate_training(make_config(kind), method=method, dtype=torch.bfloat16, form=form, length=TOKENS)
    assert found.trainable == trainable
    assert (found.gradients, found.optimizer) == (4 * trainable, 8 * trainable)
    held = sum(parameter.nbytes for name, parameter in model.named_parameters() if "ranknum" not in name)
    assert found.weights == held


def estimate(config: Any = None, name: Any = "full", **values: Any) -> TrainingEstimate:
    return estimate_training(config or make_config("glm", dropout=0.1), method=MethodSettings(name=name), **values)


@settings(deadline=None, max_examples=25)
@given(length=st.integers(2, 255), batch=st.integers(1, 8), name=st.sampled_from(["full", "lora", "p-tuning-v2"]))
def test_more_tokens_never_take_less_and_checkpointing_never_more(length: int, batch: int, name: str) -> None:
    here = estimate(name=name, length=length, batch_size=batch)
    assert here.peak < estimate(name=name, length=2 * length, batch_size=batch).peak
    assert here.peak <= estimate(name=name, length=length, batch_size=batch + 1).peak
    assert here.peak <= estimate(name=name, length=length, batch_size=batch, accumulation=2).peak
    spared = estimate(name=name, length=length, batch_size=batch, gradient_checkpointing=True)
    assert spared.activations < here.activations and spared.weights == here.weights
    assert here.peak <= sum(
        (here.weights, here.gradients, here.optimizer, here.activations, here.working, here.runtime)
    )


def test_shards_divide_weights_gradients_and_optimizer() -> None:
    whole, shared = estimate(length=32), estimate(length=32, shards=4)
    parts = ("weights", "gradients", "optimizer")
    assert [getattr(shared, part) for part in parts] == [getattr(whole, part) // 4 for part in parts]
    assert shared.activations == whole.activations and shared.trainable == whole.trainable


def test_the_optimizer_is_counted_by_its_state() -> None:
    assert estimate(optimizer="adamw_bnb_8bit").optimizer == estimate().trainable * 2
    assert estimate(optimizer="sgd").optimizer == 0


def test_more_gpus_take_less_each_of_a_large_model() -> None:
    config = ChatGLMConfig()
    peaks = [estimate(config, shards=count, device_kind="cuda", dtype=torch.bfloat16).peak for count in (1, 2, 8)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 96e9  # float32 weights, gradients and two moments


def test_attention_dropout_is_what_long_rows_pay_for() -> None:
    config = make_config("glm", dropout=0.1)
    without = make_config("glm", dropout=0.1, attention_dropout=0.0)
    one, other = (
        block_bytes(
            replace(make_step(shape, MethodSettings(name="full"), torch.float32, autocast=False), length=256),
            is_first=False,
        )
        for shape in (config, without)
    )
    scores = ROWS * 4 * 256 * 256 * 4
    assert 2.5 * scores < one - other < 3.5 * scores


def run_gmask(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["estimate", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return str(done.stdout)


def estimate_rows(*arguments: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run_gmask(*arguments, "--json"))["estimates"]
    return rows


def test_the_verb_tells_of_the_forms_that_a_method_can_tune() -> None:
    def forms(method: str) -> list[str | None]:
        return [row["quantize"] for row in estimate_rows("THUDM/chatglm-6b", "--method", method, "--length", "128")]

    assert forms("full") == [None, None] and forms("qlora") == ["int8", "int4"]
    assert forms("lora") == [None, None, "int8", "int4"]


def test_the_verb_passes_everything_on() -> None:
    options = ["--method", "lora", "--set", "rank=16", "--set", "answer_length=8", "--batch-size", "4"]
    options += ["--length", "64", "--dtype", "float32", "--gradient-checkpointing"]
    (row,) = [row for row in estimate_rows("GLM-10B", *options) if row["quantize"] is None]
    assert row["trainable"] == 48 * 16 * (4096 + 3 * 4096)
    assert row["settings"]["gradient_checkpointing"] and row["settings"]["answer_length"] == 8
    printed = run_gmask("GLM-10B", *options, "--gpus", "8")
    assert "For each of 8 GPUs" in printed and "lora: 12,582,912 numbers train." in printed
    assert "are free on cpu" in run_gmask("bundled", "--method", "p-tuning") or torch.cuda.is_available()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundled", "--gpus", "2"], "add --method lora"),
        (["bundled", "--method", "lorra"], "method.name is 'lorra': choose full"),
        (["bundled", "--method", "lora", "--set", "ranc=4"], "rank"),
        (["bundled", "--method", "lora", "--set", "rank"], "write it as key=value"),
        (["bundled", "--method", "lora", "--set", "optimizer=adam9"], "optimizer 'adam9' is not one of adamw"),
        (["bundled", "--method", "lora", "--set", "accumulation=many"], "accumulation is 'many': expected int"),
        (["bundled", "--method", "lora", "--length", "513"], "rows of 513 tokens: the model has 512 positions"),
        (["bundled", "--method", "lora", "--batch-size", "0"], "a batch size of 0"),
        (["bundled", "--method", "lora", "--gpus", "0"], "a number of processes of 0"),
        (["bundled", "--method", "full", "--quantize", "int8"], "full cannot tune int8"),
        (["THUDM/chatglm-6b", "--method", "p-tuning"], "for a ChatGLM choose p-tuning-v2"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(GmaskError) as raised:
        run_gmask(*arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def feedback_estimate(kind: str = "glm", method: str = "full", **settings: Any) -> TrainingEstimate:
    return estimate_training(
        make_config(kind), method=MethodSettings(name=method), batch_size=2, length=TOKENS, **settings
    )


@pytest.mark.parametrize("kind", ["glm", "chatglm"])
def test_the_models_beside_the_one_that_learns_are_counted(kind: str) -> None:
    """The reference is a copy where no adapter can be switched off; critic and reward model are bodies of their own."""
    plain = feedback_estimate(kind)
    for stage in ("dpo", "kto", "grpo", "ppo"):
        assert feedback_estimate(kind, stage=stage).others == plain.weights
        assert feedback_estimate(kind, "lora", stage=stage).others == 0
    assert feedback_estimate(kind, stage="grpo", reference=False).others == 0
    assert feedback_estimate(kind, "p-tuning-v2", stage="ppo").others > 0
    assert feedback_estimate(kind, stage="reward").others == 0
    ppo = feedback_estimate(kind, "lora", stage="ppo")
    own = feedback_estimate(kind, "lora", stage="ppo", critic="own")
    both = feedback_estimate(kind, "lora", stage="ppo", critic="joint", reward_model=True)
    body = 4 * (own.trainable - ppo.trainable)
    assert own.weights - ppo.weights == own.gradients - ppo.gradients == body
    assert own.optimizer - ppo.optimizer == 2 * body
    assert (own.others, both.others, both.peak - own.peak) == (0, body, body)
    assert feedback_estimate(kind, "lora", stage="grpo", reward_model=True).others == body
    assert feedback_estimate(kind, stage="dpo").activations > feedback_estimate(kind, stage="kto").activations


def test_a_stage_that_there_is_not_is_one_line() -> None:
    for wrong, told in (
        ({"stage": "rlhf"}, "stage 'rlhf' is not one of reward, dpo, kto, grpo, ppo"),
        ({"stage": "ppo", "critic": "big"}, "critic 'big' is not one of shared"),
        ({"stage": "dpo", "critic": "own"}, "critic goes with the stage ppo"),
        ({"stage": "dpo", "method": "ia3"}, "dpo takes full, lora, dora, qlora, not ia3"),
        ({"stage": "grpo", "method": "ia3"}, "grpo takes full, lora, dora, qlora, not ia3"),
        ({"stage": "dpo", "reward_model": True}, "reward_model goes with the stages grpo and ppo"),
        ({"stage": "ppo", "reference": False}, "reference=false goes with the stage grpo"),
        ({"stage": "ppo", "method": "adalora"}, "adalora is not for ppo"),
    ):
        with pytest.raises(GmaskError, match=told):
            feedback_estimate(**wrong)


def test_the_command_estimates_a_stage() -> None:
    options = ["--method", "lora", "--dtype", "float32", "--length", "128", "--json"]
    ppo = ["--stage", "ppo", "--set", "critic=own", "--set", "reward_model=true"]
    plain, found = (
        json.loads(CliRunner().invoke(app, ["estimate", "bundled", *options, *more]).stdout)["estimates"][0]
        for more in ([], ppo)
    )
    assert found["settings"]["stage"] == "ppo" and plain["settings"]["stage"] is None
    assert found["others"] > 0 == plain["others"] and found["peak"] > plain["peak"] + 4 * found["others"]
    refused = CliRunner().invoke(app, ["estimate", "bundled", "--stage", "ppo"])
    assert refused.exit_code and "add --method lora" in str(refused.exception)
