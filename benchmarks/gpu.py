"""What does gmask do on one H100 or H200? All that needs a GPU, in nine minutes.

    python benchmarks/gpu.py [--out runs/gpu] [--parts tests decoding ...] [--limits 1.0]
    python benchmarks/gpu.py --toy      # the same parts at a tiny size on a CPU; its times mean nothing

Each part is a process of its own with a time limit. `results.json` and `tables.md` are written anew behind each part,
so that a run that is cut off keeps what it had. A part that fails or takes too long is told with the end of its output,
and the next one goes on; the exit code is then 1.

- tests: every test that needs a GPU.
- decoding: ChatGLM-6B at its true shape, by `gpu_decode.py`.
- engine: GLM-2B answers 1 to 256 requests at once.
- attention: forward and backward pass over rows of one sequence and of four packed ones: sdpa with a mask,
  flex_attention, and in two parts, the contexts without a mask and the answers with a causal one.
- pretraining: steps of the 335M and 2B shapes in bfloat16, with the share of the GPU's peak (MFU): by sdpa and by
  flex_attention.
- trainer: transformers' Trainer on a GPT-2 of the 335M shape.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine

LIMITS = {"tests": 140, "decoding": 100, "engine": 70, "attention": 50, "pretraining": 130, "trainer": 50}
"""Seconds of each part; together nine minutes."""

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "335M": {"layers": 24, "hidden_size": 1024, "heads": 16, "vocab_size": 30592, "length": 512, "rows": 32},
    "2B": {"layers": 36, "hidden_size": 2048, "heads": 32, "vocab_size": 50304, "length": 1024, "rows": 8},
}
TOY = {"layers": 2, "hidden_size": 64, "heads": 2, "vocab_size": 256, "length": 64, "rows": 2}
ENGINE_ROWS = (1, 4, 16, 64, 256)


def median_seconds(call: Callable[[], object], device: str, *, rounds: int) -> float:
    """The median of several calls; the first one prepares."""
    import torch

    found = []
    for number in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if number:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def run_tests(device: str, toy: bool) -> list[dict[str, Any]]:
    """The last line of pytest; at the toy size tests are collected, not run."""
    found = sorted(path for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8"))
    more = ["--collect-only", "tests/test_static_decoding.py"] if toy else [str(path) for path in found]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    if done.returncode:
        raise SystemExit("\n".join(lines[-40:]))
    return [{"tests": lines[-1]}]


def run_decoding(device: str, toy: bool) -> list[dict[str, Any]]:
    import torch

    from gpu_decode import measure

    size: dict[str, Any] = {"tokens": 128, "prompt_length": 128, "rounds": 3}
    if toy:
        size = {"tokens": 4, "prompt_length": 8, "rounds": 1}
    with torch.inference_mode():
        found = measure(torch.device(device), tiny=toy, **size)
    bandwidth = found["gigabytes_per_second"]
    return [{**record, "gigabytes_per_second": bandwidth} for record in found["results"]]


def make_glm(shape: dict[str, int], device: str) -> Any:
    import torch

    from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
    from pretraining import SPECIAL

    config = GLMConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=shape["length"],
        hidden_act="gelu_pytorch_tanh",
        embedding_dropout=0.0,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        pad_token_id=SPECIAL.pad,
        sop_token_id=SPECIAL.sop,
        mask_token_id=SPECIAL.mask,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return GLMForConditionalGeneration(config)


def run_engine(device: str, toy: bool) -> list[dict[str, Any]]:
    import torch

    from gmask.generation.encoding import Context
    from gmask.generation.engine import Budget, Stepper
    from gmask.generation.sampling import Sampler
    from gmask.generation.settings import Sampling
    from pretraining import SPECIAL

    shape = TOY if toy else SHAPES["2B"]
    prompt, answer = (8, 4) if toy else (64, 64)
    model = make_glm(shape, device).to(torch.bfloat16).eval()
    sampling = Sampling(max_tokens=answer, min_tokens=answer)
    records = []
    for rows in (1, 3) if toy else ENGINE_ROWS:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(16, shape["vocab_size"], (rows, prompt - 1), generator=generator).tolist()
        contexts = [Context((*row, SPECIAL.gmask), (prompt - 1,)) for row in ids]
        budget = Budget(rows=rows)

        def answer_all(contexts: Any = contexts, budget: Any = budget) -> None:
            stepper = Stepper(model, None, Sampler((SPECIAL.eop,)), SPECIAL, budget=budget)  # type: ignore[arg-type]
            stepper.run(contexts, sampling, seeds=range(len(contexts)))

        seconds = median_seconds(answer_all, device, rounds=1)
        records.append({"rows": rows, "seconds": seconds, "answer_tokens_per_second": rows * answer / seconds})
    return records


def run_attention(device: str, toy: bool) -> list[dict[str, Any]]:
    """Contexts of three quarters of a sequence, the rest an answer; two passes each, in bfloat16."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention.flex_attention import flex_attention

    from gmask.models.layout import block_mask, visible_keys

    rows, heads, length, size = (1, 2, 32, 16) if toy else (8, 32, 1024, 64)
    torch.manual_seed(0)
    made = [torch.randn(rows, heads, length, size, device=device, dtype=torch.bfloat16) for _ in range(3)]
    query, key, value = (tensor.requires_grad_() for tensor in made)
    records = []
    for sequences in (1, 4):
        each = length // sequences
        index = torch.arange(length, device=device).expand(rows, -1)
        in_context, sequence_ids = index % each < 3 * each // 4, index // each
        mask = visible_keys(in_context, key_length=length, sequence_ids=sequence_ids)

        def by_mask(mask: Any = mask) -> Any:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

        def in_two_parts(each: int = each) -> Any:
            return attend_in_two_parts(query, key, value, each=each, context=3 * each // 4)

        ways: dict[str, Callable[[], Any]] = {"sdpa with a mask": by_mask, "two parts": in_two_parts}
        if device == "cuda":  # on a CPU it has no backward pass
            compiled, blocks = torch.compile(flex_attention), block_mask(in_context, sequence_ids)
            ways["flex_attention"] = lambda compiled=compiled, blocks=blocks: compiled(
                query, key, value, block_mask=blocks
            )
        expected = by_mask()
        for name, attend in ways.items():
            worst = float((attend() - expected).abs().max())
            seconds = median_seconds(lambda attend=attend: attend().sum().backward(), device, rounds=1 if toy else 10)
            found = {"attention": name, "milliseconds": seconds * 1e3, "largest_difference": worst}
            records.append({"sequences_of_a_row": sequences, **found})
    return records


def attend_in_two_parts(query: Any, key: Any, value: Any, *, each: int, context: int) -> Any:
    """Attention ``[B, N, T, D]`` without a mask: contexts see themselves, answers what comes before them, too.

    Args:
        each: tokens of every sequence; they divide a row.
        context: those of its context.
    """
    import torch
    from torch.nn import functional as F
    from torch.nn.attention.bias import causal_lower_right

    # Sequences of equal length are rows of their own, for which no kernel of packed ones is needed.
    rows, heads, length, size = query.shape
    query, key, value = (
        part.unflatten(2, (-1, each)).transpose(1, 2).reshape(-1, heads, each, size) for part in (query, key, value)
    )
    ahead = F.scaled_dot_product_attention(*(part[:, :, :context] for part in (query, key, value)))
    causal: Any = causal_lower_right(each - context, each)
    behind = F.scaled_dot_product_attention(query[:, :, context:], key, value, attn_mask=causal)
    mixed = torch.cat((ahead, behind), dim=2)
    return mixed.unflatten(0, (rows, -1)).transpose(1, 2).reshape(rows, heads, length, size)


def peak_flops(device: str) -> float | None:
    """Of this GPU, if estimates know it."""
    import torch

    from gmask.estimation.gpus import GPUS

    if device != "cuda":
        return None
    name = torch.cuda.get_device_name().lower()
    return next((gpu.flops for gpu in GPUS.values() if gpu.name.partition("-")[0] in name), None)


def run_pretraining(device: str, toy: bool) -> list[dict[str, Any]]:
    """Steps on made rows of the published mixture: by sdpa, by flex_attention on a GPU, and of the larger shape with
    checkpointing.
    """
    import torch

    from gmask.estimation.pretraining import forward_flops
    from gmask.infilling.collator import collate
    from gmask.recipes.pretraining import OptimizationSettings
    from gmask.training.pretrain import make_optimizers
    from pretraining import SPECIAL, Shape, made_rows

    peak, records = peak_flops(device), []
    for name, shape in ({"toy": TOY} if toy else SHAPES).items():
        ways = [("sdpa", False)] + ([] if name == "335M" else [("sdpa", True)])
        for attention, checkpointing in ways + ([("flex_attention", False)] if device == "cuda" else []):
            model = make_glm(shape, device).train()
            model.set_attn_implementation(attention)
            if checkpointing:
                model.activation_checkpointing_enable()
            (optimizer,) = make_optimizers(model, OptimizationSettings(steps=1))
            length, rows = shape["length"], shape["rows"]
            stream = made_rows(Shape(vocab_size=shape["vocab_size"], row_length=length))
            made = collate([stream.next_row() for _ in range(rows)], row_length=length, pad_id=SPECIAL.pad)
            batch = {key: value.to(device) for key, value in made.items()}
            labelled = int((batch["labels"] != -100).sum())

            def step(model: Any = model, optimizer: Any = optimizer, batch: Any = batch, count: int = labelled) -> None:
                with torch.autocast(device, torch.bfloat16):
                    loss = model.token_losses(**batch).sum() / count
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = median_seconds(step, device, rounds=1 if toy else 8)
            block, head = forward_flops(model.config, length)
            flops = 3 * (rows * length * shape["layers"] * block + labelled * head)
            records.append(
                {
                    "shape": name,
                    "attention": attention,
                    "checkpointing": checkpointing,
                    "seconds": seconds,
                    "positions_per_second": rows * length / seconds,
                    "teraflops_per_second": flops / seconds / 1e12,
                    "mfu": None if peak is None else flops / seconds / peak,
                    "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
                }
            )
            del model, optimizer, step
    return records


def run_trainer(device: str, toy: bool) -> list[dict[str, Any]]:
    """Positions a second of transformers' Trainer, its own way of counting; a GPT-2 of the 335M shape."""
    import tempfile

    import torch
    from transformers import Trainer, TrainingArguments

    from measuring import make_gpt2

    shape = TOY if toy else SHAPES["335M"]
    model = make_gpt2(
        hidden_size=shape["hidden_size"],
        layers=shape["layers"],
        heads=shape["heads"],
        vocab_size=shape["vocab_size"],
        positions=shape["length"],
        use_cache=False,
    )
    steps = 2 if toy else 20
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(16, shape["vocab_size"], (steps * shape["rows"], shape["length"]), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=shape["rows"],
            max_steps=steps,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=device == "cuda",
        )
        found = Trainer(model=model, args=arguments, train_dataset=data).train()
    seconds = float(found.metrics["train_runtime"])
    return [{"shape": "GPT-2", "steps": steps, "positions_per_second": ids.numel() / seconds}]


PARTS: dict[str, Callable[[str, bool], list[dict[str, Any]]]] = {
    "tests": run_tests,
    "decoding": run_decoding,
    "engine": run_engine,
    "attention": run_attention,
    "pretraining": run_pretraining,
    "trainer": run_trainer,
}


def run_part(name: str, *, toy: bool, limit: float) -> dict[str, Any]:
    """What a process of its own finds, or why it finds nothing."""
    command = [sys.executable, __file__, "--part", name, *(["--toy"] if toy else [])]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as late:
        output = late.stderr or late.stdout or b""
        told = output.decode(errors="replace") if isinstance(output, bytes) else output
        return {"error": f"cut off after {limit:.0f} s", "output": told[-2000:], "records": []}
    seconds = time.perf_counter() - started
    if done.returncode:
        return {"error": "failed", "output": (done.stdout + done.stderr)[-4000:], "seconds": seconds, "records": []}
    records = json.loads(done.stdout.strip().splitlines()[-1])
    return {"error": None, "seconds": seconds, "records": records}


def as_tables(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [", ".join(f"{key} {value}" for key, value in found["machine"].items())]
    for name, part in found["parts"].items():
        lines += ["", f"## {name}", ""]
        if part["error"]:
            lines += [f"{part['error']}:", "", "```", part["output"].strip(), "```"]
        columns = list(dict.fromkeys(key for record in part["records"] for key in record))
        if columns:
            lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(show(record.get(key)) for key in columns)} |" for record in part["records"]]
    return "\n".join(lines) + "\n"


def show(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def describe(toy: bool) -> dict[str, Any]:
    import torch

    machine = describe_machine(torch.get_num_threads())
    return machine if toy else {**machine, "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def run(names: Sequence[str], *, out: Path, toy: bool, limits: float) -> bool:
    """Runs the parts one after the other; True if all of them came to their end."""
    from gmask.files import write_text

    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": describe(toy), "toy": toy, "parts": {}}
    for name in names:
        found["parts"][name] = part = run_part(name, toy=toy, limit=limits * LIMITS[name])
        write_text(out / "results.json", json.dumps(found, indent=1) + "\n")
        write_text(out / "tables.md", as_tables(found))
        print(f"{name}: {part['error'] or 'done'} ({part.get('seconds', limits * LIMITS[name]):.0f} s)", flush=True)
    return all(part["error"] is None for part in found["parts"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limits", type=float, default=1.0, help="times the time limits of the parts")
    parser.add_argument("--toy", action="store_true", help="a tiny size on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what the process of a part is started with
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part]("cpu" if options.toy else "cuda", options.toy)))
        return
    if not options.toy:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("this needs a CUDA device: --toy shows that it runs")
    if not run(options.parts, out=options.out, toy=options.toy, limits=options.limits):
        raise SystemExit(1)
    print(f"\n{options.out / 'tables.md'}")


if __name__ == "__main__":
    main()
