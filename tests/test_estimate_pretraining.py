"""Is what a pretraining run takes known beforehand: memory, FLOPs, time, cost?"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from gmask.cli import app
from gmask.errors import GmaskError
from gmask.estimation.gpus import GPUS
from gmask.estimation.pretraining import (
    config_of_recipe,
    count_labels,
    estimate_memory,
    estimate_time,
    find_stages,
    forward_flops,
    plan_step,
)
from gmask.estimation.scaling import Assumptions, ParallelLayout, Ring, StepWork, simulate_step
from gmask.estimation.training import Step, block_bytes
from gmask.hardware import has_bfloat16
from gmask.models import base
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.recipes.pretraining import PretrainingRecipe, load_recipe, read_recipe
from gmask.recipes.tuning import MethodSettings

ROOT = Path(__file__).parents[1]
LARGE = str(ROOT / "recipes/published/glm-large.yaml")
SIZE, VOCABULARY, LENGTH = 64, 128, 32


def make_recipe(**optimization: Any) -> PretrainingRecipe:
    rates = dict.fromkeys(("embedding_dropout", "attention_dropout", "hidden_dropout"), 0.0)
    shape = {"hidden_size": SIZE, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
    settings = {"steps": 100, "rows_per_step": 16, "rows_per_pass": 4, "dtype": "float32"} | optimization
    return read_recipe(
        {
            "run": {"out": "nowhere"},
            "data": {"row_length": LENGTH, "sources": [{"name": "made", "train": "nowhere.txt"}]},
            "tokenizer": {"vocab_size": VOCABULARY},
            "model": shape | rates,
            "optimization": settings,
        }
    )


def test_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of_recipe(make_recipe())
    config._attn_implementation = "eager"
    model = GLMForConditionalGeneration(config)
    layout = torch.zeros(2, 2, LENGTH, dtype=torch.int64)
    monkeypatch.setattr(base, "onednn_from", lambda: math.inf)  # its products are not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.full((2, LENGTH), 10), layout=layout)
    block, head = forward_flops(config, LENGTH)
    assert counter.get_total_flops() == 2 * LENGTH * (3 * block + head)


def test_as_many_positions_are_labelled_as_in_the_run_of_the_bundled_model() -> None:
    folder = ROOT / "src/gmask/pretrained"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = next(record for record in reversed(records) if "labelled_tokens" in record)
    recipe = load_recipe(folder / "recipe.yaml")
    parts = [(count_labels(stage).share, steps * stage.data.row_length) for stage, steps in find_stages(recipe)]
    expected = sum(share * positions for share, positions in parts) / sum(positions for _, positions in parts)
    assert expected == pytest.approx(last["labelled_tokens"] / last["tokens"], rel=0.1)


def play_ring(members: int, size: float, speed: float, hop: float) -> float:
    """The seconds of an all-gather, hop by hop: each member passes on the part that it got last."""
    have = [{member} for member in range(members)]
    newest, seconds = list(range(members)), 0.0
    while any(len(parts) < members for parts in have):
        newest = [newest[member - 1] for member in range(members)]
        for member, part in enumerate(newest):
            have[member].add(part)
        seconds += size / members / speed + hop
    return seconds


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_a_collective_takes_as_long_as_a_ring(gpus: int) -> None:
    assumed = Assumptions(link_efficiency=0.5, hop_seconds=1e-3)
    ring = Ring.of_replicas(ParallelLayout(gpus), GPUS["h100"], assumed)
    expected = play_ring(gpus, 1e9, 450e9 * 0.5, 1e-3)
    assert ring.gather(1e9) == pytest.approx(expected) and ring.reduce(1e9) == pytest.approx(2 * expected)


def test_between_machines_a_ring_has_its_part_of_the_links() -> None:
    assumed = Assumptions(link_efficiency=1.0, hop_seconds=1.0, network_hop_seconds=100.0)
    whole = Ring.of_replicas(ParallelLayout(16), GPUS["a100"], assumed)
    assert (whole.bytes_per_second, whole.latency) == (8 * 25e9, 2 * 100.0 + 13)
    quarter = Ring.of_replicas(ParallelLayout(16, "ddp", 4), GPUS["a100"], assumed)
    assert (quarter.members, quarter.bytes_per_second, quarter.latency) == (4, 2 * 25e9, 2 * 100.0 + 1)


WORK = StepWork(
    layers=4, passes=2, block_flops=1e12, head_flops=5e11, block_weights=10**8, table_weights=10**7,
    state_bytes=1e7, optimizer_bytes=1e9,
)  # fmt: skip
NO_WAITING = Assumptions(utilization=0.5, link_efficiency=1e9, hop_seconds=0.0, network_hop_seconds=0.0)


@pytest.mark.parametrize(
    "layout", [ParallelLayout(8), ParallelLayout(16, "fsdp"), ParallelLayout(16, "zero2", 2)], ids=str
)
def test_without_communication_a_step_is_its_products_and_its_update(layout: ParallelLayout) -> None:
    gpu = GPUS["h100"]
    for again in (0.0, 1.0):
        time = simulate_step(replace(WORK, again=again), layout, gpu, NO_WAITING)
        products = 2 * (4 * (3 + again) * 1e12 + 3 * 5e11) / (gpu.flops * 0.5)
        assert time.products == pytest.approx(products)
        assert time.total == pytest.approx(products + time.optimizer)
        assert time.optimizer == 1e9 / (3350e9 * 0.7)


@pytest.mark.parametrize(
    ("text", "gathers", "joins"), [("ddp", 0, 2), ("zero2", 1, 2), ("fsdp", 4, 2)], ids=["ddp", "zero2", "fsdp"]
)
def test_with_free_products_a_step_is_its_collectives(text: str, gathers: int, joins: int) -> None:
    """Two passes of two ways: weights are gathered in bfloat16; DDP sums once, in two halves, the others twice."""
    layout, gpu = ParallelLayout.read(text, 8), replace(GPUS["h100"], flops=1e30)
    time = simulate_step(WORK, layout, gpu, Assumptions(utilization=1.0, hop_seconds=0.0))
    blocks, table = 4 * 10**8, 10**7
    speed = 450e9 * 0.8 / (7 / 8)
    gathered = 2 * (gathers * blocks + (gathers + 1) // 2 * table)
    gathered -= 2 * (2 * 10**8 if text == "fsdp" else 0)  # the last block is still there when it is read backwards
    summed = joins * 4 * (blocks + table)
    assert time.collectives == pytest.approx((gathered + summed) / speed)
    assert time.total == pytest.approx(time.collectives + time.optimizer, rel=1e-6)


def test_a_collective_hides_behind_products_as_far_as_it_can() -> None:
    layout, gpu = ParallelLayout(64, "fsdp"), GPUS["h100"]
    slow, fast = (simulate_step(WORK, layout, replace(gpu, flops=flops), Assumptions()) for flops in (1e12, 1e17))
    assert 0 <= slow.exposed < 0.25 * slow.collectives
    assert fast.exposed > 0.7 * fast.collectives
    assert max(fast.products, fast.collectives) <= fast.total <= fast.products + fast.collectives + fast.optimizer


@pytest.mark.parametrize("text", ["ddp", "zero2", "fsdp"])
def test_more_gpus_are_never_more_efficient(text: str) -> None:
    recipe = load_recipe(LARGE)
    found = [estimate_time(recipe, gpu=GPUS["h100"], layout=ParallelLayout.read(text, n)).mfu for n in (8, 64, 512)]
    assert found == sorted(found, reverse=True) and found[0] < 0.4


def test_the_work_of_a_step_is_six_flops_for_each_weight_and_position() -> None:
    recipe = load_recipe(LARGE)
    work, positions = plan_step(recipe, ParallelLayout(64), "none")
    assert positions == 1024 * 512 and work.passes == 1
    config = config_of_recipe(recipe)
    weights = 24 * 12 * 1024**2
    attention = 12 * 24 * 1024 * 512
    head = 6 * 1024 * config.vocab_size * count_labels(recipe).share
    flops = 3 * (24 * work.block_flops + work.head_flops) * 64
    assert flops == pytest.approx(positions * (6 * weights + attention + head))
    halves, _ = plan_step(recipe, ParallelLayout(64, "ddp", 2), "full")
    assert (halves.passes, halves.again) == (2, 1.0)
    assert halves.block_flops == work.block_flops / 2  # of twice as many rows, in two passes


def test_days_and_cost_follow_from_the_step() -> None:
    time = estimate_time(load_recipe(LARGE), gpu=GPUS["v100"], layout=ParallelLayout(64), price=2.0)
    assert time.days == pytest.approx(160_000 * time.step.total / 86400)
    assert time.cost == pytest.approx(time.days * 24 * 64 * 2.0)


def test_a_last_part_with_longer_rows_is_counted_as_such() -> None:
    short = load_recipe(ROOT / "recipes/bundled.yaml")
    steps = short.optimization.steps
    (_, before), (last, after) = find_stages(short)
    assert before + after == steps
    assert after == round(0.2 * steps)
    assert (last.data.row_length, last.optimization.rows_per_pass, last.objective["token_ratio"]) == (256, 16, 0.15)
    time = estimate_time(short, gpu=GPUS["h100"])
    assert time.days * 86400 > steps * time.step.total * 1.1


def memory(text: str = "ddp", gpus: int = 1, **optimization: Any) -> Any:
    return estimate_memory(make_recipe(**optimization), layout=ParallelLayout.read(text, gpus), device_kind="cpu")


def test_parts_of_memory_are_those_of_the_optimizer_and_the_layout() -> None:
    model = GLMForConditionalGeneration(config_of_recipe(make_recipe()))
    count = sum(parameter.numel() for parameter in model.parameters())
    matrices = 3 * 12 * SIZE**2
    one = memory()
    assert (one.weights, one.gradients, one.optimizer, one.gathered) == (4 * count, 4 * count, 8 * count, 0)
    assert memory(optimizer="muon").optimizer == 8 * count - 4 * matrices
    assert memory(ema=0.99).optimizer == 12 * count
    quarter = memory("fsdp", 4)
    assert (quarter.weights, quarter.optimizer) == (count, 2 * count) and quarter.gathered > 0
    assert memory("zero2", 4).gathered > quarter.gathered
    halves = memory("tp=2", 2)
    assert 0.5 * one.weights < halves.weights < 0.55 * one.weights
    assert memory(rows_per_pass=16).peak > one.peak > memory(gradient_checkpointing=True).peak


def test_selective_checkpointing_keeps_less_than_all_and_more_than_inputs() -> None:
    recipe = load_recipe(LARGE)
    kept = [estimate_memory(recipe, checkpointing=name).activations for name in ("none", "selective", "full")]  # type: ignore[arg-type]
    assert kept[0] > 1.4 * kept[1] > 3 * kept[2]


def test_tensor_parallelism_divides_what_is_between_the_matrices_of_a_pair() -> None:
    rates = dict.fromkeys(("embedding_dropout", "attention_dropout", "hidden_dropout"), 0.0)
    config = GLMConfig(vocab_size=VOCABULARY, hidden_size=SIZE, num_hidden_layers=2, num_attention_heads=4, **rates)
    step = Step(
        config=config, method=MethodSettings(name="full"), dtype=torch.float32, autocast=False, quantized=frozenset(),
        batch_size=2, length=LENGTH, answer_length=8, is_fused=False,
    )  # fmt: skip
    one, two = (block_bytes(replace(step, tensor_parallel=count), is_first=False) for count in (1, 2))
    rows = 2 * LENGTH
    between = 3 * SIZE + SIZE + 4 * SIZE + 4 * SIZE  # queries, keys and values; mixed; wide, before and after GELU
    assert one - two == 4 * rows * (between + 4) // 2  # and a sum for each head


def estimate_run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["estimate", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return str(done.stdout)


def test_the_verb_tells_memory_time_and_cost() -> None:
    options = [LARGE, "--gpus", "64", "--gpu", "h100", "--parallel", "fsdp", "--price", "2"]
    found = json.loads(estimate_run(*options, "--set", "optimization.steps=1000", "--json"))
    assert (found["parameters"], found["steps"], found["gpus"]) == (334_688_256, 1000, 64)
    assert [row["checkpointing"] for row in found["estimates"]] == ["none", "selective", "full"]
    full = found["estimates"][-1]
    assert full["memory"]["weights"] == 4 * 334_688_256 // 64
    assert full["time"]["cost"] == pytest.approx(full["time"]["days"] * 24 * 64 * 2)
    printed = estimate_run(*options, "--checkpointing", "full", "--utilization", "0.3")
    words = " ".join(printed.split())
    assert words.count("fsdp, full") == 2 and "products at 30% of 989 TFLOP/s" in words and "$2.00 an hour" in words


def test_without_gpus_the_verb_tells_what_this_machine_has() -> None:
    printed = estimate_run(str(ROOT / "recipes/bundled.yaml"))
    assert "are free on" in printed and "days" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([LARGE, "--gpus", "8"], "add --gpu h100"),
        ([LARGE, "--gpu", "h1000"], "no GPU 'h1000' is known: choose v100, "),
        ([LARGE, "--gpu", "h100", "--gpus", "8", "--parallel", "pp"], "write ddp, zero2, fsdp, tp=4, or fsdp,tp=4"),
        ([LARGE, "--gpu", "h100", "--gpus", "8", "--parallel", "tp=3"], "8 GPUs cannot be divided into groups of 3"),
        ([LARGE, "--gpu", "h100", "--gpus", "32", "--parallel", "tp=32"], "tensor parallelism stays in a machine"),
        ([LARGE, "--gpu", "h100", "--gpus", "2048"], "rows_per_step is 1024, fewer than the 2048 replicas"),
        ([LARGE, "--gpu", "h100", "--gpus", "0"], "0 GPUs: give at least 1"),
        ([LARGE, "--checkpointing", "some"], "choose none, selective, full"),
        ([LARGE, "--method", "lora"], "is a recipe, which says all but --gpus"),
        ([LARGE, "--set", "optimization.stebs=1"], "the nearest is 'steps'"),
        ([LARGE, "--set", "tokenizer.path=nowhere"], "nowhere: no tokenizer.json there"),
        (["bundled", "--gpu", "h100"], "are for a recipe of pretraining"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(GmaskError) as raised:
        estimate_run(*arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="measured as Linux counts it")
@pytest.mark.slow
def test_the_estimate_is_within_a_tenth_of_what_a_process_takes() -> None:
    names = ["pretraining", "pretraining checkpointing", "pretraining muon ema"]
    if has_bfloat16(torch.device("cpu")):  # without instructions it takes minutes
        names += ["pretraining bf16"]
    command = [sys.executable, str(ROOT / "benchmarks/training_memory.py"), "--shape", "small", "--size", "2x256"]
    done = subprocess.run(
        [*command, "--threads", "1", "--json", "--method", *names], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["method_name"] for record in records] == names
    for record in records:
        assert record["ratio"] == pytest.approx(1, abs=0.1) and record["ratio_of_model"] == pytest.approx(1, abs=0.12)
