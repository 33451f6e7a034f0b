"""What does `gmask pretrain` cost beside its bare passes, beside transformers' Trainer, and in several processes?

    python benchmarks/pretraining_run.py [--threads 2] [--rounds 3] [--parts run rows processes] [--texts FILE]

run: whole steps of `gmask pretrain` (rows, passes, clipping, optimizer, log), the bare forward and backward passes of
the same batches, and steps of transformers' Trainer on a GPT-2 of the same shape, in turns. The GLM's tokens are those
that it reads, without padding. rows: the rows of training, drawn by one process and by two, each of which has streams
of its own. processes: weak scaling over gloo, each process with as many rows and one thread. tokens: the texts of a
file of JSON lines into shards by the bundled tokenizer, as `gmask prepare` makes them, by one process and by two.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import TrainerCallback, logging

import gmask
from gmask.corpus.preparation import load_encoder
from gmask.corpus.shards import writing_shard
from gmask.files import read_json_lines
from gmask.recipes.pretraining import load_recipe
from gmask.training.pretrain import Pretraining
from machine import describe_machine
from measuring import compare, make_gpt2, spread, take_turns

SYSTEMS = ("run", "passes", "trainer")
SIZE = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 512}
ROW_LENGTH, ROWS_PER_PASS, PASSES, VOCABULARY = 512, 8, 2, 12288
TEXT_BYTES = 20_000_000
BUNDLED = Path(gmask.__file__).parent / "pretrained"
LAYOUTS = {
    "DDP": [],
    "FSDP2": ["parallel.shard=true"],
    "tensor parallelism": ["parallel.tensor={processes}"],
}


def write_recipe(folder: Path) -> Path:
    """A recipe of the bundled model's shape on two thousand made documents."""
    rng = np.random.default_rng(0)
    words = [f"{chr(97 + number % 26)}{chr(97 + number // 26 % 26)}{number % 10}" for number in range(500)]
    lines = []
    for length in rng.integers(60, 900, 2000):
        text = " ".join(words[number] + ("." if number % 20 == 0 else "") for number in rng.integers(0, 500, length))
        lines.append(json.dumps({"text": text}))
    (folder / "made.jsonl").write_text("\n".join(lines))
    tree: dict[str, Any] = {
        "run": {"out": str(folder / "out"), "log_every": 10, "save_every": 10**6, "validate_every": 10**6},
        "tokenizer": {"path": str(BUNDLED)},
        "model": SIZE | {f"{where}_dropout": 0.0 for where in ("embedding", "attention", "hidden")},
        "optimization": {
            "steps": 10**6,
            "rows_per_step": ROWS_PER_PASS * PASSES,
            "rows_per_pass": ROWS_PER_PASS,
            "dtype": "float32",
        },
        "data": {
            "root": str(folder),
            "cache": str(folder / "cache"),
            "row_length": ROW_LENGTH,
            "sources": [{"name": "made", "train": "made.jsonl"}],
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def answer(steps: int, seconds: float, tokens: int) -> None:
    print(json.dumps({"seconds": seconds / steps, "tokens_per_second": tokens / seconds}), flush=True)


def serve_glm(system: str, folder: Path) -> None:
    """Steps of a run, or the passes of one batch after the other, as often as asked."""
    training = Pretraining(load_recipe(write_recipe(folder)))
    training.model.train()
    data = training.data(0)
    training.loop._advance(data)  # warm-up
    print("ready", flush=True)
    for line in sys.stdin:
        steps, before = int(line), training.loop.progress.tokens
        ready = [next(data) for _ in range(steps)] if system == "passes" else []
        started = time.perf_counter()
        if system == "run":
            for _ in range(steps):
                training.loop._advance(data)
            answer(steps, time.perf_counter() - started, training.loop.progress.tokens - before)
            continue
        for step in ready:
            for batch in step.batches:
                (training.loss(training.model, batch) / step.labelled).backward()
            for parameter in training.model.parameters():
                parameter.grad = None
        answer(steps, time.perf_counter() - started, sum(step.tokens for step in ready))


class Turns(TrainerCallback):
    """Lets the Trainer make as many steps as asked, and answers with their time."""

    def __init__(self) -> None:
        self.left, self.steps, self.started = 1, 0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left:
            return
        if self.steps:
            seconds = time.perf_counter() - self.started
            answer(self.steps, seconds, self.steps * PASSES * ROWS_PER_PASS * ROW_LENGTH)
        else:
            print("ready", flush=True)
        line = sys.stdin.readline()
        if not line:
            control.should_training_stop = True
            return
        self.left = self.steps = int(line)
        self.started = time.perf_counter()


def serve_trainer(folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    heads = {"hidden_size": SIZE["hidden_size"], "heads": SIZE["num_attention_heads"], "positions": ROW_LENGTH}
    model = make_gpt2(layers=SIZE["num_hidden_layers"], vocab_size=VOCABULARY, use_cache=False, **heads)
    ids = np.random.default_rng(0).integers(16, VOCABULARY, (4096, ROW_LENGTH))
    rows = [{"input_ids": row, "labels": row} for row in torch.from_numpy(ids)]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        max_steps=10**6,
        per_device_train_batch_size=ROWS_PER_PASS,
        gradient_accumulation_steps=PASSES,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        weight_decay=0.1,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Turns()]).train()


def measure_run(options: argparse.Namespace) -> None:
    commands = [["--threads", str(options.threads), "--serve", system, "--folder", "{folder}"] for system in SYSTEMS]
    run, passes, trainer = take_turns(commands, threads=options.threads, rounds=options.rounds, steps=options.steps)
    rates = [statistics.median(one["tokens_per_second"] for one in found) for found in (run, passes, trainer)]
    overhead = sorted(whole["seconds"] / bare["seconds"] - 1 for whole, bare in zip(run, passes, strict=True))
    print("\n| | tokens/s |\n|---|---:|")
    for name, rate in zip(("`gmask pretrain`", "its passes alone", "Trainer, GPT-2"), rates, strict=True):
        print(f"| {name} | {rate:,.0f} |")
    print(f"\nbeside Trainer: {spread(compare(run, trainer, 'tokens_per_second'))}")
    print(f"over the passes: {statistics.median(overhead):.1%} ({overhead[0]:.1%} to {overhead[-1]:.1%})")


def add_rates(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> float:
    """Runs the work in a process for each of the arguments, all at once, and adds up the rates that they put."""
    found: Any = multiprocessing.Queue()
    started = [multiprocessing.Process(target=work, args=(*own, found)) for own in arguments]
    for process in started:
        process.start()
    rates = [found.get() for _ in started]
    for process in started:
        process.join()
    return sum(rates)


def draw_rows(folder: Path, streams: int, replica: int, rows: int, found: Any) -> None:
    torch.set_num_threads(1)
    training = Pretraining(load_recipe(folder / "recipe.yaml", [f"data.streams={streams}"]))
    own = training.streams[len(training.streams) * replica // 2 :][: max(1, streams // 2)]
    started = time.perf_counter()
    tokens = sum(len(one.input_ids) for stream in own for _ in range(rows // len(own)) for one in stream.next_row())
    found.put(tokens / (time.perf_counter() - started))


def measure_rows(options: argparse.Namespace) -> None:
    print("\n| processes that draw rows | tokens/s, all together |\n|---|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(folder)
        for processes in (1, 2):
            streams = 1 if processes == 1 else 2
            rate = add_rates(draw_rows, [(folder, streams, number, 3000) for number in range(processes)])
            print(f"| {processes} | {rate:,.0f} |")


def tokenize(folder: Path, number: int, texts: Sequence[str], found: Any) -> None:
    encoder = load_encoder(str(BUNDLED))
    encoder.encode(texts[0])
    started = time.perf_counter()
    with writing_shard(folder, f"{number:06d}", encoder) as writer:
        for text in texts:
            writer.add(text)
    found.put(sum(len(text.encode()) for text in texts) / 1e6 / (time.perf_counter() - started))


def measure_tokens(options: argparse.Namespace) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the processes of `gmask prepare`
    texts, size = [], 0
    for _, record in read_json_lines(options.texts):
        texts.append(record["text"])
        size += len(texts[-1].encode())
        if size > TEXT_BYTES:
            break
    print("\n| processes that tokenize | MB/s, all together |\n|---|---:|")
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as name:
            rate = add_rates(tokenize, [(Path(name), number, texts) for number in range(processes)])
        print(f"| {processes} | {rate:.1f} |")


def serve_processes(folder: Path, overrides: Sequence[str], steps: int) -> None:
    """One of several processes, which prints the tokens a second of all of them, if it is the first."""
    torch.set_num_threads(1)
    training = Pretraining(load_recipe(folder / "recipe.yaml", overrides))
    training.loop._train_mode()
    data = training.data(0)
    training.loop._advance(data)
    before, started = training.loop.progress.tokens, time.perf_counter()
    for _ in range(steps):
        training.loop._advance(data)
    seconds = time.perf_counter() - started
    if training.is_main:
        print(f"RATE {(training.loop.progress.tokens - before) / seconds}", flush=True)


def measure_processes(options: argparse.Namespace) -> None:
    print("\n| | processes | tokens/s | of so many alone |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(folder)
        alone = 0.0
        for layout, keys in {"alone": [], **LAYOUTS}.items():
            processes = 1 if layout == "alone" else options.processes
            rows = 4 * processes
            overrides = [key.format(processes=processes) for key in keys]
            overrides += [f"optimization.rows_per_step={rows}", "optimization.rows_per_pass=4", "run.threads=1"]
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            serve = [__file__, "--serve", json.dumps(overrides), "--folder", name, "--steps", str(options.steps)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*launch, *serve], env=environment, capture_output=True, text=True, check=True)
            (rate,) = (float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("RATE"))
            alone = alone or rate
            print(f"| {layout} | {processes} | {rate:,.0f} | {rate / alone / processes:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of one measurement")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--parts", nargs="+", choices=("run", "rows", "processes", "tokens"), default=["run", "rows", "processes"]
    )
    parser.add_argument("--texts", type=Path, help="JSON lines, for the part tokens")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # what a measuring process is started with
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.serve:
        torch.set_num_threads(options.threads)
        if options.serve == "trainer":
            return serve_trainer(options.folder)
        if options.serve in SYSTEMS:
            return serve_glm(options.serve, options.folder)
        return serve_processes(options.folder, json.loads(options.serve), options.steps)
    print(", ".join(f"{key} {value}" for key, value in describe_machine(options.threads).items()))
    for part in options.parts:
        parts = {"run": measure_run, "rows": measure_rows, "processes": measure_processes, "tokens": measure_tokens}
        parts[part](options)


if __name__ == "__main__":
    main()
