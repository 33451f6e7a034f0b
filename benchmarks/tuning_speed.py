"""How fast is a GLM tuned, beside a GPT-2 of the same shape that transformers' Trainer and PEFT tune?

    python benchmarks/tuning_speed.py [--shapes bundled 125M] [--methods lora full] [--dtype float32] [--device cpu]
        [--rounds 5] [--steps 4] [--threads 1] [--json]

Both have the same layers, width, heads, vocabulary, batch and length (64 tokens of a question and 64 of its answer, of
which the loss is), the same AdamW, clipping and arithmetic, LoRA of rank 8 on the same four linear layers of a block,
and random weights in float32. The GLM is tuned by a recipe as `gmask finetune` runs it, with its checks and its log of
every step; GPT-2 by a Trainer that logs nothing, on samples that are tokens already. Each is a process of its own; they
take turns, and a ratio is taken within a round; that of samples in a second of CPU time hangs less on what else the
machine does.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import describe_machine
from measuring import compare, make_gpt2, spread, take_turns

SOURCE, TARGET = 64, 64  # tokens
SAMPLES = 512
RANK = 8
RATE = 1e-4
WARM_UP = 1  # steps
FOREVER = 10**6  # steps; the run ends when nobody asks for more
SYSTEMS = ("glm", "gpt2")


@dataclass(frozen=True, slots=True)
class Shape:
    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    batch: int


SHAPES = {
    "bundled": Shape(hidden_size=256, layers=6, heads=4, vocab_size=12288, batch=16),
    "125M": Shape(hidden_size=768, layers=12, heads=12, vocab_size=50304, batch=4),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What one process tunes."""

    system: str
    shape: str
    method: str
    dtype: str
    device: str
    threads: int


# A measuring process


def serve_measurements(setting: Setting, folder: Path) -> None:
    """A line in is a number of steps to time, a line out what was measured."""
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    batch = SHAPES[setting.shape].batch

    class Turns:
        """Stops at the end of a step until more are asked for."""

        def __init__(self) -> None:
            self.asked, self.left, self.started, self.started_cpu = 0, WARM_UP, 0.0, 0.0

        def end_step(self) -> None:
            self.left -= 1
            if self.left:
                return
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if self.asked:
                samples = self.asked * batch
                found = {
                    "samples_per_second": samples / (time.perf_counter() - self.started),
                    "samples_per_cpu_second": samples / (time.process_time() - self.started_cpu),
                    "peak": peak_bytes(),
                }
                print(json.dumps(found))
            else:
                print("ready")
            sys.stdout.flush()
            line = sys.stdin.readline()
            if not line:
                sys.exit()
            self.asked = self.left = int(line)
            self.started, self.started_cpu = time.perf_counter(), time.process_time()

    (tune_glm if setting.system == "glm" else tune_gpt2)(setting, folder, Turns().end_step)


def peak_bytes() -> int:
    """Of the GPU's tensors, or else of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def tune_glm(setting: Setting, folder: Path, end_step: Callable[[], None]) -> None:
    from gmask.training import finetune
    from gmask.training.loop import Loop

    honest = Loop.step

    def step(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.progress.step:
            end_step()  # the one before, with its line in the log
        return honest(self, *args, **kwargs)

    Loop.step = step  # type: ignore[method-assign]
    write_glm(SHAPES[setting.shape], folder / "model")
    write_samples(folder / "train.jsonl")
    (folder / "recipe.yaml").write_text(json.dumps(make_recipe(setting, folder)))  # JSON is YAML
    finetune.run_finetuning(str(folder / "recipe.yaml"))


def write_glm(shape: Shape, folder: Path) -> None:
    """A GLM with random weights, and the bundled tokenizer."""
    from gmask.checkpoints.folder import read_config
    from gmask.checkpoints.load import find_folder, load_tokenizer
    from gmask.models.glm import GLMForConditionalGeneration

    config = read_config(find_folder("bundled"))
    config.update(
        {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "hidden_act": "gelu_pytorch_tanh",
        }
    )
    GLMForConditionalGeneration(config).float().save_pretrained(folder)
    load_tokenizer(find_folder("bundled")).save_pretrained(folder)


def write_samples(path: Path) -> None:
    """Numbers in words without end: every sample is cut to the same number of tokens."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    lines = []
    for number in range(SAMPLES):
        texts = [" ".join(words[(number * step + place) % 10] for place in range(2 * SOURCE)) for step in (3, 7)]
        lines.append(json.dumps({"source": texts[0], "target": texts[1]}) + "\n")
    path.write_text("".join(lines))


def make_recipe(setting: Setting, folder: Path) -> dict[str, Any]:
    method = {"name": "lora", "rank": RANK, "targets": "all-linear"} if setting.method == "lora" else {"name": "full"}
    return {
        "run": {"out": str(folder / "run"), "device": setting.device, "threads": setting.threads},
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "task": "seq2seq/plain",
        "data": {"root": str(folder), "train": "train.jsonl", "max_source": SOURCE, "max_target": TARGET},
        "method": method,
        "optimization": {
            "steps": FOREVER,
            "batch_size": SHAPES[setting.shape].batch,
            "learning_rate": RATE,
            "schedule": "constant",
            "dtype": setting.dtype,
            "save_every": FOREVER,
        },
    }


def tune_gpt2(setting: Setting, folder: Path, end_step: Callable[[], None]) -> None:
    import peft
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class EndsSteps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            end_step()

    shape = SHAPES[setting.shape]
    model = make_gpt2(
        hidden_size=shape.hidden_size,
        layers=shape.layers,
        heads=shape.heads,
        vocab_size=shape.vocab_size,
        positions=512,
        use_cache=False,
    )
    if setting.method == "lora":
        layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        config = peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=layers, fan_in_fan_out=True
        )
        model = peft.get_peft_model(model, config)
    ids = torch.randint(16, SHAPES[setting.shape].vocab_size, (SAMPLES, SOURCE + TARGET))
    labels = ids.clone()
    labels[:, :SOURCE] = -100
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=setting.device == "cpu",
        bf16=setting.dtype == "bfloat16",
        max_steps=FOREVER,
        per_device_train_batch_size=SHAPES[setting.shape].batch,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    rows: Any = [{"input_ids": row, "labels": target} for row, target in zip(ids, labels, strict=True)]
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[EndsSteps()]).train()


# The near end


def measure_settings(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for each shape and method: speeds, ratios of all rounds, peaks."""
    for shape in options.shapes:
        for method in options.methods:
            settings = [
                Setting(system, shape, method, options.dtype, options.device, options.threads) for system in SYSTEMS
            ]
            commands = [["--measure", json.dumps(asdict(setting)), "--folder", "{folder}"] for setting in settings]
            ours, theirs = take_turns(commands, threads=options.threads, rounds=options.rounds, steps=options.steps)
            yield {
                "shape": shape,
                "method": method,
                "glm": [each["samples_per_second"] for each in ours],
                "gpt2": [each["samples_per_second"] for each in theirs],
                "ratios": compare(ours, theirs, "samples_per_second"),
                "cpu_ratios": compare(ours, theirs, "samples_per_cpu_second"),
                "peaks": [each[-1]["peak"] for each in (ours, theirs)],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the forward pass")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of one measurement")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a measuring process is started with
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return serve_measurements(Setting(**json.loads(options.measure)), options.folder)
    machine = describe_machine(options.threads)
    if options.json:
        records = list(measure_settings(options))
        print(json.dumps({"machine": machine, "dtype": options.dtype, "device": options.device, "results": records}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()), options.dtype, options.device)
    print("\n| shape | method | GLM samples/s | GPT-2 samples/s | ratio: median (min-max) | of CPU time | peak MB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for record in measure_settings(options):
        peaks = " and ".join(f"{peak / 1e6:,.0f}" for peak in record["peaks"])
        print(
            f"| {record['shape']} | {record['method']} | {statistics.median(record['glm']):.1f} "
            f"| {statistics.median(record['gpt2']):.1f} | {spread(record['ratios'])} | {spread(record['cpu_ratios'])} "
            f"| {peaks} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
