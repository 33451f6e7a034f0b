"""What do full tuning, LoRA and P-tuning v2 cost and give, side by side?

    python benchmarks/tuning_methods.py CORPUS [--out runs/tuning-methods] [--seeds 0 1 2] [--tasks poems translation]
        [--methods LoRA full] [--threads 1] [--rates]

The bundled model learns two tasks by recipes/tuning-methods-*.yaml: to end a Chinese quatrain whose first half is
given, and to translate from Chinese to English; 2,000 samples to learn from, up to 160 to measure by, which neither
pretraining nor tuning has seen. LoRA and the prefix without projection train the same number of parameters. Every run
is a process of its own and makes the same steps; one that is finished is not repeated. ``--rates`` tries learning
rates on samples of the training files that are set aside.

CPU seconds and peak memory are those of the training steps; the memory is what the process takes beyond its imports.
"""

import argparse
import io
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

RECIPES = Path(__file__).parents[1] / "recipes"
TASKS = ("poems", "translation")
TRAIN, HELD_OUT = 2000, 160
HAN = re.compile(r"[\u4e00-\u9fff]")
LINE = r"([\u4e00-\u9fff]{5}|[\u4e00-\u9fff]{7})"
COUPLET = re.compile(f"{LINE}，{LINE}。")
QUATRAIN = re.compile(rf"《([^》\n]{{1,24}})》\n([^\n，。]{{2,5}})\n({COUPLET.pattern})\n({COUPLET.pattern})(?:\n\n|$)")

PREFIX = ("method={name: p-tuning-v2, prefix_length: 128}",)
METHODS: dict[str, tuple[str, ...]] = {
    "full": ("method={name: full}",),
    "LoRA": (),
    "P-tuning v2": PREFIX,
    "P-tuning v2, projection": (*PREFIX, "method.projection=true"),
}
RATES = {"full": 5e-4, "LoRA": 2e-3, "P-tuning v2": 4e-2, "P-tuning v2, projection": 5e-3}
"""Learning rates, chosen with ``--rates``."""
FACTORS, RATE_STEPS = (0.5, 1, 2), 50
UNTUNED = "untuned"


# Samples


def prepare(corpus: Path, out: Path) -> None:
    """Writes train, choice (set aside of what is learnt from, to choose rates by) and validation of both tasks."""
    for task, (known, unseen) in {"poems": read_poems(corpus), "translation": read_pairs(corpus)}.items():
        folder = out / "data" / task
        folder.mkdir(parents=True, exist_ok=True)
        for records in (known, unseen):
            random.Random(0).shuffle(records)
        parts = {
            "train": known[:TRAIN],
            "choice": known[TRAIN : TRAIN + HELD_OUT],
            "validation": unseen[:HELD_OUT],
        }
        for name, records in parts.items():
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (folder / f"{name}.jsonl").write_text(lines, "utf-8")


def read_poems(corpus: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Quatrains of the files that pretraining read, and of those that it did not."""
    known, unseen = (
        [
            {"title": title, "author": author, "first": first, "second": second}
            for text in read_texts(corpus / f"pretrain/zh/poetry.{split}.jsonl.zst")
            for title, author, first, one, two, second, three, four in QUATRAIN.findall(text)
            if len({len(one), len(two), len(three), len(four)}) == 1
        ]
        for split in ("train", "val")
    )
    couplets = {record["second"] for record in known}
    return known, [record for record in unseen if record["second"] not in couplets]


def read_pairs(corpus: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs of sentences to learn from, and those of documents that pretraining did not read."""
    folder = corpus / "pretrain/bilingual"
    seen = {line for text in read_texts(folder / "tatoeba.train.jsonl.zst") for line in text.split("\n")}
    unseen = []
    for text in read_texts(folder / "tatoeba.val.jsonl.zst"):
        lines = text.split("\n")
        unseen += [order(pair) for pair in zip(lines[::2], lines[1::2], strict=True) if not {*pair} & seen]
    taken = {sentence for pair in unseen for sentence in pair.values()}
    rows = [json.loads(line) for line in (corpus / "sft/translation.train.jsonl").read_text("utf-8").splitlines()]
    pairs = [order((row["input"], row["output"])) for row in rows]
    return [pair for pair in pairs if not {*pair.values()} & taken], unseen


def order(pair: tuple[str, str]) -> dict[str, str]:
    """Which of two sentences is the Chinese one?"""
    zh, en = pair if HAN.search(pair[0]) else pair[::-1]
    return {"zh": zh, "en": en}


def read_texts(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8"):
            yield json.loads(line)["text"]


# One run, in a process of its own


def tune(recipe_path: str, overrides: list[str]) -> None:
    """Runs a recipe, writes its costs beside its results, and keeps the numbers alone."""
    import peft  # noqa: F401 - part of what is imported, whether a method needs it or not

    from gmask.tasks.metrics import score_predictions
    from gmask.tasks.records import Prediction, Sample
    from gmask.training import finetune
    from gmask.training.loop import Loop

    for text in ("一", "one"):  # loads the libraries and dictionaries of the metrics
        score_predictions(["rouge-1", "bleu-4", "sacrebleu"], [Prediction(texts=(text,))], [Sample(answers=(text,))])
    imported = peak_bytes()
    costs = {"cpu_seconds": 0.0, "peak_bytes": 0}

    honest = Loop.step

    def step(self: Loop, *args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = honest(self, *args, **kwargs)
        costs["cpu_seconds"] += time.process_time() - started
        costs["peak_bytes"] = peak_bytes() - imported
        return result

    Loop.step = step  # type: ignore[method-assign]
    export = finetune.run_finetuning(recipe_path, overrides)
    costs["saved_bytes"] = (next(export.glob("*model.safetensors"))).stat().st_size
    (export.parent / "costs.json").write_text(json.dumps(costs), "utf-8")
    for folder in (export, *export.parent.glob("checkpoint-*")):
        shutil.rmtree(folder)
    (export.parent / "best.safetensors").unlink()


def measure_untuned(recipe_path: str, overrides: list[str]) -> None:
    """Loss, metrics and predictions of the model as it is."""
    import torch

    from gmask.checkpoints.load import load
    from gmask.generation.settings import make_sampling
    from gmask.recipes.tuning import load_tuning_recipe
    from gmask.tasks.records import write_predictions
    from gmask.tasks.task import read_task
    from gmask.training.accelerator import make_accelerator, training_arguments
    from gmask.training.examples import read_splits
    from gmask.training.validation import Validator

    recipe = load_tuning_recipe(recipe_path, overrides)
    assert isinstance(recipe.task, dict)
    torch.set_num_threads(recipe.run.threads or 1)
    model, tokenizer = load(recipe.model.name, device="cpu", dtype="float32")
    validator = Validator(
        model,
        tokenizer,
        task := read_task(recipe.task),
        recipe.data,
        settings=make_sampling(recipe.decoding),
        batch_size=recipe.optimization.batch_size,
        accelerator=make_accelerator(training_arguments(recipe)),
        dtype=torch.float32,
    )
    samples = read_splits(task, recipe.data, seed=0).validation
    found = validator.validate(samples)
    out = Path(recipe.run.out)
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(out / "predictions.jsonl", found.predictions, samples)
    results = {"metrics": {"validation": found.scores}, "trainable_parameters": 0}
    (out / "results.json").write_text(json.dumps(results), "utf-8")
    (out / "costs.json").write_text("{}", "utf-8")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


# All runs


def run_once(options: argparse.Namespace, task: str, method: str, name: str, *overrides: str) -> dict[str, Any]:
    """Costs and results of one run; of an earlier one if that was finished."""
    out = options.out / name
    if not (out / "costs.json").is_file():
        shutil.rmtree(out, ignore_errors=True)  # a run that was stopped would have only a part of its costs
        settings = [
            *METHODS.get(method, ()),
            f"run.out={out}",
            f"run.threads={options.threads}",
            "run.device=cpu",
            f"data.root={options.out / 'data' / task}",
            *overrides,
        ]
        recipe = str(RECIPES / f"tuning-methods-{task}.yaml")
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        with (options.out / "log.txt").open("a") as log:
            subprocess.run(
                [sys.executable, __file__, "--one", json.dumps([method, recipe, settings])],
                env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
                check=True,
                stderr=log,
            )
    return json.loads((out / "costs.json").read_text()) | json.loads((out / "results.json").read_text("utf-8"))


def measure(options: argparse.Namespace, task: str, method: str) -> dict[str, Any]:
    """The numbers of a row of the table: of each metric one for each seed."""
    if method == UNTUNED:
        runs = [run_once(options, task, method, f"{task}/untuned")]
        names = [f"{task}/untuned"]
    else:
        rate = f"optimization.learning_rate={RATES[method]}"
        names = [f"{task}/{method}/seed-{seed}" for seed in options.seeds]
        runs = [
            run_once(options, task, method, name, rate, f"run.seed={seed}")
            for name, seed in zip(names, options.seeds, strict=True)
        ]
    row = {key: [run["metrics"]["validation"][key] for run in runs] for key in runs[0]["metrics"]["validation"]}
    if task == "poems":
        row["form"] = [score_form(options.out / name / "predictions.jsonl") for name in names]
    keys = ("trainable_parameters", "saved_bytes", "peak_bytes", "cpu_seconds")
    return {"method": method, "scores": row} | {key: [run[key] for run in runs if key in run] for key in keys}


def score_form(path: Path) -> float:
    """The percentage of predictions that are a couplet in the metre of the right one."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    right = sum(
        COUPLET.fullmatch(row["predicted_texts"][0].strip()) is not None
        and len(row["predicted_texts"][0].strip()) == len(row["answers"][0])
        for row in rows
    )
    return 100 * right / len(rows)


def try_rates(options: argparse.Namespace) -> None:
    """Prints the loss on the samples that are set aside, of short runs at a half, one and two times each rate."""
    print(f"| task | method | {' | '.join(f'x {factor:g}' for factor in FACTORS)} |\n|---|---|{'---:|' * len(FACTORS)}")
    short = (f"optimization.steps={RATE_STEPS}", "data.validation=choice.jsonl", "task.metrics=[]")
    for task in options.tasks:
        for method in options.methods:
            rate, cells = RATES[method], []
            for tried in (rate * factor for factor in FACTORS):
                name = f"rates/{task}/{method}/{tried:g}"
                found = run_once(options, task, method, name, f"optimization.learning_rate={tried}", *short)
                cells.append(f"{found['metrics']['validation']['loss']:.3f} ({tried:g})")
            print(f"| {task} | {method} | {' | '.join(cells)} |", flush=True)


def print_table(task: str, rows: list[dict[str, Any]]) -> None:
    metrics = list(rows[0]["scores"])
    print(f"\n{task}\n\n| | trains | saved MB | peak MB | CPU s | {' | '.join(metrics)} |")
    print("|---|" + "---:|" * (4 + len(metrics)))
    for row in rows:
        costs = ["-"] * 4
        if row["saved_bytes"]:
            costs = [f"{row['trainable_parameters'][0]:,}", f"{row['saved_bytes'][0] / 1e6:.1f}"]
            costs += [
                f"{statistics.median(row['peak_bytes']) / 1e6:.0f}",
                f"{statistics.median(row['cpu_seconds']):.0f}",
            ]
        scores = [spread(row["scores"][name], digits=3 if name == "loss" else 1) for name in metrics]
        print(f"| {row['method']} | {' | '.join(costs + scores)} |")


def spread(values: list[float], *, digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path, nargs="?", help="a folder with pretrain/ and sft/")
    parser.add_argument("--out", type=Path, default=Path("runs/tuning-methods"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rates", action="store_true", help="try learning rates, and nothing else")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what the process of a run is started with
    options = parser.parse_args()
    if options.one:
        method, recipe, overrides = json.loads(options.one)
        return (measure_untuned if method == UNTUNED else tune)(recipe, overrides)
    if options.corpus is None:
        parser.error("name the folder of the corpus")
    prepare(options.corpus, options.out)
    if options.rates:
        return try_rates(options)
    for task in options.tasks:
        print_table(task, [measure(options, task, method) for method in (UNTUNED, *options.methods)])


if __name__ == "__main__":
    main()
