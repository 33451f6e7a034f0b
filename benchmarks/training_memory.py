"""Does training take the memory that `gmask estimate` says?

    python benchmarks/training_memory.py [--shape 335M] [--method lora ...] [--size 1x128 ...] [--as-it-comes]

A model of that shape is made in a process of its own, made ready by `gmask.training.methods`, and makes two steps with
the loss of `gmask finetune` or of a stage of feedback, AdamW and, for bfloat16, accelerate's autocast; or by a recipe
of pretraining (`--method pretraining ...`), with its optimizers and average. Measured is the largest resident memory of
the process (VmHWM), against the estimated peak; and without what the process held before the model was made, against
the peak without the libraries. Both ought to be within 15 % of each other. What is freed goes back at once
(MALLOC_MMAP_THRESHOLD_=65536); with `--as-it-comes` the allocator of the C library keeps some of it, which no estimate
counts. Full tuning at 335M takes 6 GB.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from estimate import config_of, read_quantization, resident_bytes
from machine import describe_machine

GLM: dict[str, Any] = {"kind": "glm", "max_position_embeddings": 512, "hidden_act": "gelu_pytorch_tanh"}
SHAPES: dict[str, dict[str, Any]] = {
    "335M": {**GLM, "vocab_size": 50304, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "small": {**GLM, "vocab_size": 20000, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8},
    "chat": {"kind": "chatglm", "vocab_size": 20000, "hidden_size": 512, "num_hidden_layers": 8,
             "num_attention_heads": 8, "intermediate_size": 2048},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "full bf16": {"name": "full", "autocast": True},
    "full checkpointing": {"name": "full", "checkpointing": True},
    "frozen-embeddings": {"name": "frozen-embeddings"},
    "lora": {"name": "lora"},
    "lora bf16": {"name": "lora", "dtype": "bfloat16", "autocast": True},
    "lora checkpointing": {"name": "lora", "checkpointing": True},
    "dora": {"name": "dora"},
    "adalora": {"name": "adalora"},
    "ia3": {"name": "ia3"},
    "qlora int8": {"name": "qlora", "quantize": "int8"},
    "qlora int4": {"name": "qlora", "quantize": "int4"},
    "p-tuning-v2": {"name": "p-tuning-v2"},
    "p-tuning-v2 int4": {"name": "p-tuning-v2", "quantize": "int4"},
    "p-tuning": {"name": "p-tuning"},
}
FEEDBACK: dict[str, dict[str, Any]] = {
    "reward full": {"name": "full", "stage": "reward"},
    "reward lora": {"name": "lora", "stage": "reward"},
    "dpo full": {"name": "full", "stage": "dpo"},
    "dpo lora": {"name": "lora", "stage": "dpo"},
    "kto lora": {"name": "lora", "stage": "kto"},
    "grpo full": {"name": "full", "stage": "grpo"},
    "grpo full, no reference": {"name": "full", "stage": "grpo", "reference": False},
    "grpo lora": {"name": "lora", "stage": "grpo"},
    "ppo full": {"name": "full", "stage": "ppo"},
    "ppo lora": {"name": "lora", "stage": "ppo"},
    "ppo full, own critic, reward model": {"name": "full", "stage": "ppo", "critic": "own", "reward_model": True},
}
"""Learning from feedback; the rows are pairs with reward and dpo."""

PRETRAINING: dict[str, dict[str, Any]] = {
    "pretraining": {"recipe": {"dtype": "float32"}},
    "pretraining bf16": {"recipe": {"dtype": "bfloat16"}},
    "pretraining checkpointing": {"recipe": {"dtype": "float32", "gradient_checkpointing": True}},
    "pretraining bf16 checkpointing": {"recipe": {"dtype": "bfloat16", "gradient_checkpointing": True}},
    "pretraining muon ema": {"recipe": {"dtype": "float32", "optimizer": "muon", "ema": 0.999}},
}
"""Pretraining by a recipe with these keys of its section optimization, in two passes a step."""

METHODS |= FEEDBACK | PRETRAINING
STEPS = 2  # from the second on the optimizer has its state
TINY = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_batch(batch_size: int, length: int) -> dict[str, Any]:
    """Rows of a context and an answer of half the tokens each."""
    import torch

    context = length // 2
    layout = torch.zeros(batch_size, 2, length, dtype=torch.int64)
    layout[:, 0] = torch.arange(length).clamp(max=context - 1)
    layout[:, 1, context:] = torch.arange(1, length - context + 1)
    labels = torch.full((batch_size, length), -100)
    labels[:, context:] = 10
    ids = torch.full((batch_size, length), 10)
    return {"input_ids": ids, "layout": layout, "labels": labels, "sequence_ids": torch.zeros_like(ids)}


def train(config: Any, case: dict[str, Any], *, batch_size: int, length: int) -> None:
    """Makes the model and its steps."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from gmask.estimation.inference import shape_at
    from gmask.quantization.quantizer import finish
    from gmask.recipes.tuning import MethodSettings
    from gmask.training.losses import token_loss
    from gmask.training.methods import apply_method

    form = read_quantization(case)
    model = shape_at(config, dtype=getattr(torch, case.get("dtype", "float32")), form=form)
    values = {name: torch.full_like(weight, 0.01 if weight.is_floating_point() else 1, device="cpu")
              for name, weight in model.named_parameters()}  # fmt: skip
    model.load_state_dict(values, strict=False, assign=True)
    del values
    model.tie_weights()
    if form is not None:
        finish(model, form)
    loss_of = None
    if case.get("stage"):
        model, loss_of = make_loss(model, case, batch_size=batch_size, length=length)
    else:
        apply_method(model, MethodSettings(name=case["name"]), steps=100)
    if case.get("checkpointing"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one was forked from
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if case.get("autocast") else "no")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-5, fused=True))
    batch = make_batch(batch_size, length)
    for _ in range(STEPS):
        total, tokens = (loss_of(prepared), 1) if loss_of else token_loss(prepared, batch)
        accelerator.backward(total / tokens)
        del total
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.free_memory()


def make_recipe(case: dict[str, Any], shape: dict[str, Any], *, batch_size: int, length: int) -> Any:
    """The recipe of a case of pretraining."""
    from gmask.recipes.pretraining import read_recipe

    rates = dict.fromkeys(("embedding_dropout", "attention_dropout", "hidden_dropout"), 0.0)
    return read_recipe(
        {
            "run": {"out": "nowhere"},
            "data": {"row_length": length, "sources": [{"name": "made", "train": "nowhere.txt"}]},
            "tokenizer": {"vocab_size": shape["vocab_size"]},
            "model": {key: value for key, value in shape.items() if key not in ("kind", "vocab_size")} | rates,
            "optimization": {"steps": 2, "rows_per_step": 2 * batch_size, "rows_per_pass": batch_size} | case["recipe"],
        }
    )


def pretrain(recipe: Any) -> None:
    """Makes the model of a recipe and two steps, with as many labels as the estimate expects."""
    import torch
    from torch.optim.swa_utils import AveragedModel

    from gmask.estimation.pretraining import config_of_recipe, count_labels
    from gmask.models.glm import GLMForConditionalGeneration
    from gmask.training.pretrain import make_optimizers, moving_average

    settings = recipe.optimization
    with torch.device("meta"):
        model = GLMForConditionalGeneration(config_of_recipe(recipe))
    values = {name: torch.full_like(weight, 0.01, device="cpu") for name, weight in model.named_parameters()}
    model.load_state_dict(values, strict=False, assign=True)
    del values
    model.tie_weights()
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
    average = None if settings.ema is None else AveragedModel(model, multi_avg_fn=moving_average(settings.ema))
    optimizers = make_optimizers(model.train(), settings)
    batch = make_batch(settings.rows_per_pass, recipe.data.row_length)
    labelled = round(count_labels(recipe).most * recipe.data.row_length)
    batch["labels"][:, : recipe.data.row_length - labelled] = -100
    batch["labels"][:, recipe.data.row_length - labelled :] = 10
    for _ in range(STEPS):
        for _ in range(settings.rows_per_step // settings.rows_per_pass):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                losses = model.token_losses(**batch)
            losses.sum().backward()
            del losses
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)


def make_loss(model: Any, case: dict[str, Any], *, batch_size: int, length: int) -> tuple[Any, Any]:
    """The module that trains in a stage of feedback, and its loss of a step; its other models are made beside it."""
    import copy

    import torch
    from torch.nn import functional as F
    from trl.trainer.utils import add_fused_lm_head

    from gmask.recipes.ppo import CriticSettings, UpdateSettings
    from gmask.recipes.tuning import MethodSettings
    from gmask.training.methods import apply_method
    from gmask.training.policies import ActorCritic, TokenDistribution, copy_frozen, make_critic
    from gmask.training.ppo import step_losses
    from gmask.training.reward import as_reward_model

    stage, method = case["stage"], MethodSettings(name=case["name"])
    pairs = make_batch(batch_size * (2 if stage in ("reward", "dpo") else 1), length)
    if stage == "reward":
        model = as_reward_model(model)
        apply_method(model, method, steps=100)
        rows = {name: pairs[name] for name in ("input_ids", "layout")}

        def compare_rewards(module: Any) -> Any:
            chosen, rejected = module(**rows).logits[:, 0].chunk(2)
            return -F.logsigmoid(chosen - rejected).sum()

        return model, compare_rewards
    if stage in ("dpo", "kto", "grpo"):
        apply_method(model, method, steps=100)
        has_copy = not method.makes_adapter and case.get("reference", True)
        copied = copy.deepcopy(model).requires_grad_(False) if has_copy else None
        for one in filter(None, (model, copied)):
            more = () if stage == "grpo" else ("mean_logits", "is_top1")
            add_fused_lm_head(one, outputs=("log_probs", "entropy", *more))
        shifted = torch.cat([torch.full_like(pairs["labels"][:, :1], -100), pairs["labels"][:, :-1]], 1)
        inputs = {"input_ids": pairs["input_ids"], "layout": pairs["layout"], "labels": shifted}

        def prefer(module: Any) -> Any:
            logprobs = module(**inputs, fused_lm_head=True, use_cache=False).log_probs.sum(-1)
            if copied is not None:
                with torch.no_grad():
                    other = copied(**inputs, fused_lm_head=True, use_cache=False).log_probs.sum(-1)
                logprobs = logprobs - other
            return -F.logsigmoid(logprobs[: len(logprobs) // 2] - logprobs[len(logprobs) // 2 :]).sum()

        def clip_ratios(module: Any) -> Any:
            logprobs = module(**inputs, fused_lm_head=True, use_cache=False).log_probs
            ratio = torch.exp(logprobs - logprobs.detach())
            loss = -torch.min(ratio, ratio.clamp(0.8, 1.2))
            if copied is not None:
                with torch.no_grad():
                    other = copied(**inputs, fused_lm_head=True, use_cache=False).log_probs
                loss = loss + torch.exp(other - logprobs) - (other - logprobs) - 1
            return loss.sum()

        return model, clip_ratios if stage == "grpo" else prefer
    reward = as_reward_model(copy.deepcopy(model)).requires_grad_(False) if case.get("reward_model") else None
    critic, head = make_critic(model, CriticSettings(kind=case.get("critic", "shared")), reward=reward)
    apply_method(model, method, steps=100)
    reference = None if method.makes_adapter else copy_frozen(model)
    module = ActorCritic(model, TokenDistribution(1.0, (9,)), critic=critic, head=head)
    batch = {name: pairs[name] for name in ("input_ids", "layout", "sequence_ids")} | {"targets": pairs["labels"]}
    tokens = int((pairs["labels"] != -100).sum())
    batch |= {name: torch.zeros(tokens) for name in ("logprobs", "values", "returns", "advantages")}
    module.beside = (reference, reward)
    return module, lambda wrapped: step_losses(wrapped(batch), batch, UpdateSettings())["loss"]


def warm_up() -> None:
    """Has the libraries load what they need."""
    for kind in ({"kind": "glm"}, {"kind": "chatglm", "intermediate_size": 256}):
        train(config_of({**TINY, **kind}), {"name": "lora"}, batch_size=1, length=8)


def measure(cases: list[dict[str, Any]]) -> None:
    """Prints for each case the resident memory of this process, and the largest with what the case adds to it.

    Each case has a process of its own, which starts as a copy of this one and spares the seconds of the imports.
    """
    import gc

    from gmask.training import finetune  # noqa: F401 - what a run imports

    if any(case["method"].get("stage") for case in cases):
        from trl.trainer import utils  # noqa: F401

        from gmask.training import ppo, reward  # noqa: F401

    warm_up()
    gc.collect()
    held = resident_bytes("VmRSS")
    for case in cases:
        child = os.fork()
        if child == 0:
            warm_up()  # a copy has none of the libraries' pages until it reads them
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            before = resident_bytes("VmRSS")
            size = {name: case[name] for name in ("batch_size", "length")}
            if "recipe" in case["method"]:
                pretrain(make_recipe(case["method"], case["shape"], **size))
            else:
                train(config_of(case["shape"]), case["method"], **size)
            print(json.dumps({"before": held, "peak": held + resident_bytes("VmHWM") - before}), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{case}: failed")


def estimate(case: dict[str, Any]) -> Any:
    import torch

    from gmask.estimation.training import estimate_training
    from gmask.recipes.tuning import MethodSettings

    method, length = case["method"], case["length"]
    if "recipe" in method:
        from gmask.estimation.pretraining import estimate_memory

        recipe = make_recipe(method, case["shape"], batch_size=case["batch_size"], length=length)
        return estimate_memory(recipe, device_kind="cpu")
    return estimate_training(
        config_of(case["shape"]),
        method=MethodSettings(name=method["name"]),
        dtype=getattr(torch, method.get("dtype", "float32")),
        autocast=method.get("autocast", False),
        form=read_quantization(method),
        batch_size=case["batch_size"],
        length=length,
        answer_length=length - length // 2,
        gradient_checkpointing=method.get("checkpointing", False),
        stage=method.get("stage"),
        critic=method.get("critic", "shared"),
        reward_model=method.get("reward_model", False),
        reference=method.get("reference", True),
    )


def compare(cases: list[dict[str, Any]], *, threads: int, return_freed: bool) -> Iterator[dict[str, Any]]:
    """A record for each case."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if return_freed:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, __file__, "--process", json.dumps(cases)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for case, line in zip(cases, process.stdout, strict=False):
            measured, found = json.loads(line), estimate(case)
            grown = measured["peak"] - measured["before"]
            yield {
                **{name: case[name] for name in ("shape_name", "method_name", "batch_size", "length")},
                "trainable": found.gradients // 4,
                "estimated": found.peak,
                "measured": measured["peak"],
                "before": measured["before"],
                "ratio": measured["peak"] / found.peak,
                "ratio_of_model": grown / (found.peak - found.runtime),
            }
    if process.returncode:
        raise SystemExit(process.returncode)


def print_table(records: Iterator[dict[str, Any]]) -> None:
    print("\n| shape | method | rows x tokens | trainable | estimated, MB | measured | measured / it | of the model |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for record in records:
        sizes = f"{record['trainable']:,} | {record['estimated'] / 1e6:.0f} | {record['measured'] / 1e6:.0f}"
        ratios = f"{record['ratio']:.2f} | {record['ratio_of_model']:.2f}"
        place = f"{record['shape_name']} | {record['method_name']} | {record['batch_size']} x {record['length']}"
        print(f"| {place} | {sizes} | {ratios} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["335M"])
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, default=[name for name in METHODS if name not in FEEDBACK | PRETRAINING]
    )
    parser.add_argument("--size", nargs="+", default=["1x128"], help="rows x tokens, such as 4x128")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--as-it-comes", action="store_true", help="let the allocator keep what it likes")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each case")
    parser.add_argument("--process", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        measure(options.process)
        return
    sizes = [tuple(map(int, size.split("x"))) for size in options.size]
    cases = [
        {"shape": SHAPES[shape], "method": METHODS[method], "batch_size": rows, "length": tokens,
         "shape_name": shape, "method_name": method}
        for shape in options.shape for method in options.method for rows, tokens in sizes
    ]  # fmt: skip
    machine = describe_machine(options.threads)
    records = compare(cases, threads=options.threads, return_freed=not options.as_it_comes)
    if options.json:
        for record in records:
            print(json.dumps(record), flush=True)
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print_table(records)


if __name__ == "__main__":
    main()
