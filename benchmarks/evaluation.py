"""How fast is a model measured, beside lm-eval's HFLM on a GPT-2 of the same shape? How much memory takes a long file?

    python benchmarks/evaluation.py [--shapes bundled] [--tasks choices last-word writing] [--examples 128]
        [--rows 32] [--rounds 5] [--threads 1] [--json]
    python benchmarks/evaluation.py --memory 10000 100000

Both models have the same layers, width, heads, vocabulary and tokenizer, and random weights in float32. The GLM is
measured by what `gmask evaluate` runs, bootstrap intervals included; GPT-2 by lm-eval's `evaluate`, without its
bootstrap, on the same samples, which `gmask evaluate --export-lm-eval` wrote. Records are read and models loaded before
the clock starts. ``choices``: four answers of one to four words behind 100 words; ``last-word``: LAMBADA's question of
80 words; ``writing``: 32 tokens behind 60 words. Each system is a process of its own; they take turns, and a ratio is
taken within a round; that of examples in a second of CPU time hangs less on what else the machine does.

``--memory``: the highest resident memory of `gmask evaluate` with a tiny model on files of so many records, each
file in a process of its own, which writes its predictions.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe_machine
from measuring import compare, make_gpt2, spread, take_turns
from tuning_speed import SHAPES

POSITIONS = 512
WRITTEN = 32  # tokens
SYSTEMS = ("gmask", "hflm")
VOCABULARY = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city community name president team minute idea
body information back parent face level
"""
WORDS = VOCABULARY.split()

TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "kind": "multiple-choice", "template": "{text} [MASK]", "candidates": "choices", "label": "label",
        "metrics": ["accuracy"],
    },
    "last-word": {
        "kind": "likelihood", "template": "{text} [MASK]", "target": "{word}", "metrics": ["accuracy", "nats"],
    },
    "writing": {
        "kind": "seq2seq", "template": "{text} [gMASK]", "target": "{word}", "metrics": ["exact-match"],
    },
}  # fmt: skip
LENGTHS = {"choices": 100, "last-word": 80, "writing": 60}  # words, a third more or fewer


def make_records(task: str, count: int, *, words: int | None = None) -> list[dict[str, Any]]:
    rng = random.Random(0)
    mean = LENGTHS[task] if words is None else words

    def say(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    records = []
    for number in range(count):
        text = f"{number} {say(mean * 2 // 3, mean * 4 // 3)}."
        choices = [f"{say(1, 4)} {index}" for index in range(4)]
        records.append({"text": text, "choices": choices, "label": rng.randrange(4), "word": say(1, 1)})
    return records


def write_task(folder: Path, task: str, count: int, *, words: int | None = None) -> dict[str, Any]:
    """The task of a suite in a folder, whose records are beside it."""
    from gmask.files import write_json, write_text

    lines = [json.dumps(record) for record in make_records(task, count, words=words)]
    write_text(folder / "data.jsonl", "\n".join(lines) + "\n")
    entry = {"task": {**TASKS[task], "name": task}, "decoding": {"max_tokens": WRITTEN, "min_tokens": WRITTEN}}
    write_json(folder / "suite.yaml", [entry])
    return {"suite": str(folder / "suite.yaml"), "data": str(folder / "data.jsonl")}


# A measuring process


def serve_measurements(system: str, shape: str, task: str, options: argparse.Namespace, folder: Path) -> None:
    """A line in is a number of passes over the samples, a line out what one of them took."""
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run = write_task(folder, task, options.examples)
    measure = (prepare_gmask if system == "gmask" else prepare_hflm)(shape, run, options.rows, folder)
    measure()  # what is done once
    print("ready", flush=True)
    for line in sys.stdin:
        passes, started, cpu = int(line), time.perf_counter(), cpu_seconds()
        for _ in range(passes):
            measure()
        seconds, used = time.perf_counter() - started, cpu_seconds() - cpu
        examples = options.examples * passes
        print(json.dumps({"rate": examples / seconds, "cpu_rate": examples / used}), flush=True)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def prepare_gmask(shape: str, run: dict[str, Any], rows: int, folder: Path) -> Callable[[], Any]:
    from rich.console import Console

    import gmask
    from gmask.evaluation.harness import ReadingSettings, Runner
    from gmask.evaluation.preparation import find_place, prepare_task
    from gmask.evaluation.processes import join_team
    from gmask.evaluation.suite import plan_tasks
    from gmask.generation.encoding import find_blank_tokens
    from gmask.models.glm import GLMConfig, GLMForConditionalGeneration

    _, tokenizer = gmask.load("bundled", device="cpu")
    special = find_blank_tokens(tokenizer)
    size = SHAPES[shape]
    model = GLMForConditionalGeneration(
        GLMConfig(
            vocab_size=size.vocab_size,
            hidden_size=size.hidden_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=POSITIONS,
            hidden_act="gelu_pytorch_tanh",
            pad_token_id=special.pad,
            eos_token_id=special.eos,
            mask_token_id=special.mask,
            smask_token_id=special.smask,
            gmask_token_id=special.gmask,
            sop_token_id=special.sop,
            eop_token_id=special.eop,
        )
    ).eval()
    planned = plan_tasks([], run["suite"])
    prepared = prepare_task(planned[0], find_place(planned, run["data"], None))
    reading = ReadingSettings(
        given={}, normalization=None, max_source=None, truncation=None, batch_size=rows, recipe=None
    )
    team = join_team().__enter__()
    runner = Runner(model, tokenizer, team, Console(stderr=True), reading, {}, None)
    return lambda: runner.measure(prepared, [0])


def prepare_hflm(shape: str, run: dict[str, Any], rows: int, folder: Path) -> Callable[[], Any]:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(folder / "datasets"))
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import gmask
    from gmask.evaluation.export import export_tasks

    _, tokenizer = gmask.load("bundled", device="cpu")
    size = SHAPES[shape]
    model = make_gpt2(
        hidden_size=size.hidden_size,
        layers=size.layers,
        heads=size.heads,
        vocab_size=size.vocab_size,
        positions=POSITIONS,
    ).eval()
    ((name, path),) = export_tasks(str(folder / "lm-eval"), **run).written.items()
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    loaded = manager.load([name])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows, device="cpu")
    config = next(iter(loaded["tasks"].values())).config
    if config.output_type == "generate_until":  # transformers' name of what keeps a text from ending early
        config.generation_kwargs["min_new_tokens"] = config.generation_kwargs.pop("min_tokens")
    return lambda: evaluate(lm, loaded, bootstrap_iters=0, log_samples=False)


# Memory


def measure_memory(count: int, folder: Path) -> None:
    """Prints the highest resident memory, in MB, and that before the records are read."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from gmask.evaluation.harness import run_tasks
    from tiny_folder import make_folder

    model = make_folder(folder / "model")
    run = write_task(folder, "choices", count, words=6)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    report = run_tasks(str(model), **run, out=str(folder / "out"), device="cpu", tables=False, batch_size=256)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"examples": report.tasks[0].samples, "before_mb": before, "peak_mb": after,
                      "file_mb": Path(run["data"]).stat().st_size / 2**20,
                      "seconds": time.perf_counter() - began}))  # fmt: skip


def compare_memory(counts: list[int], as_json: bool) -> None:
    records = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, sys.argv[0], "--memory", str(count), "--folder", folder]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise SystemExit(ran.stderr[-2000:])
            records.append(json.loads(ran.stdout.splitlines()[-1]))
    if as_json:
        print(json.dumps(records))
        return
    print("| records | file, MB | peak before, MB | peak, MB | seconds |\n|---:|---:|---:|---:|---:|")
    for one in records:
        cells = [f"{one['examples']:,}", *(f"{one[key]:.0f}" for key in ("file_mb", "before_mb", "peak_mb", "seconds"))]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["bundled"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--rows", type=int, default=32, help="that run together, in either system")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", nargs="+", type=int, help="records of files whose memory is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        serve_measurements(*options.measure, options, Path(options.folder))
        return
    if options.memory:
        if options.folder:
            measure_memory(options.memory[0], Path(options.folder))
        else:
            compare_memory(options.memory, options.json)
        return
    machine = describe_machine(options.threads)
    records = []
    for shape in options.shapes:
        for task in options.tasks:
            shared = ["--folder", "{folder}", "--examples", str(options.examples), "--rows", str(options.rows)]
            shared += ["--threads", str(options.threads)]
            commands = [["--measure", system, shape, task, *shared] for system in SYSTEMS]
            ours, theirs = take_turns(commands, threads=options.threads, rounds=options.rounds, steps=1)
            ratios = {"wall": compare(ours, theirs, "rate"), "cpu": compare(ours, theirs, "cpu_rate")}
            records.append({"shape": shape, "task": task, "gmask": ours, "hflm": theirs, **ratios})
    if options.json:
        print(json.dumps({"machine": machine, "results": records}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"\nExamples/s of {options.examples}, {options.rows} rows together; ratio: median (lowest-highest).\n")
    print("| shape | task | gmask | HFLM | ratio | ratio by CPU seconds |\n|---|---|---:|---:|---:|---:|")
    for one in records:
        rates = [statistics.median(found["rate"] for found in one[system]) for system in SYSTEMS]
        cells = [one["shape"], one["task"], *(f"{rate:.1f}" for rate in rates), spread(one["wall"]), spread(one["cpu"])]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
