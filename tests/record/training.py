"""What do short runs of `gmask pretrain` and `gmask finetune` log, and what do they leave in their folders?

Times, rates and what depends on the machine's memory are left out. Nothing is dropped out at random, except in one run:
where torch was built without MKL it draws other masks.
"""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from record.files import describe_tensors
from record.session import ENVIRONMENT, PACKAGE, TEXTS, Session

GOOD = ["A fine day.", "She smiled at him.", "The soup was warm.", "They won the game."]
BAD = ["A dark night.", "He lost the key.", "The bread was old.", "They lost the game."]
MOODS = [{"text": text, "label": label} for pair in zip(GOOD, BAD, strict=True) for text, label in zip(
    pair, ("good", "bad"), strict=True)]  # fmt: skip
QUESTIONS = [
    ("What is 1 + 1?", "2"), ("What is 2 + 2?", "4"), ("Say hello.", "Hello!"), ("你好", "你好！"),
    ("What colour is snow?", "White."), ("What is 3 + 3?", "6"), ("天是什么颜色？", "蓝色。"),
    ("Say goodbye.", "Goodbye!"),
]  # fmt: skip
CHAT = [{"instruction": question, "input": "", "output": reply} for question, reply in QUESTIONS]
ROUNDS = [
    {"messages": [{"role": role, "content": text} for question in pair for role, text in zip(
        ("user", "assistant"), question, strict=True)]}
    for pair in zip(QUESTIONS[::2], QUESTIONS[1::2], strict=True)
]  # fmt: skip
CLOZE = {
    "name": "mood", "kind": "cloze", "template": "{text} It was [MASK].", "label": "label",
    "choices": {"good": "good", "bad": "bad"}, "metrics": ["accuracy"],
}  # fmt: skip
LONG_CHOICES = {**CLOZE, "kind": "multiple-choice", "choices": {"good": "very good", "bad": "quite bad indeed"}}
CLASSES = {**CLOZE, "kind": "classification", "template": "{text}"}
PAIRS = [{"source": one["text"], "target": one["label"]} for one in MOODS]
BLANKS = [{"text": f"It is a [MASK={one['label']}] day: [sMASK={one['text']}]"} for one in MOODS]

PRETRAINING: dict[str, Any] = {
    "run": {"out": "out", "threads": 1, "log_every": 1, "save_every": 4, "validate_every": 8, "validation_rows": 1,
            "device": "cpu"},
    "tokenizer": {"vocab_size": 420},
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
              "embedding_dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "objective": {},
    "optimization": {"steps": 16, "rows_per_step": 4, "rows_per_pass": 2, "warmup_steps": 4, "dtype": "float32"},
    "data": {"root": "texts", "cache": "cache", "row_length": 64,
             "sources": [{"name": "toy", "train": "train.jsonl", "validation": "validation.jsonl", "weight": 2},
                         {"name": "more", "train": "more.txt"}]},
}  # fmt: skip
TUNING: dict[str, Any] = {
    "run": {"out": "out", "device": "cpu", "threads": 1},
    "model": {"name": "tiny"},
    "data": {"root": "data", "train": "train.jsonl", "validation": "validation.jsonl", "max_source": 48,
             "max_target": 16},
    "optimization": {"steps": 10, "batch_size": 4, "learning_rate": 1e-3, "evaluate_every": 5, "save_every": 4},
    "decoding": {"max_tokens": 8},
    "forgetting": {"skip": True},
}  # fmt: skip

Run = tuple[Any, list[dict[str, Any]], dict[str, Any]]
"""A task, its records, and what else the recipe says."""

RUNS: dict[str, Run] = {
    "cloze full": (CLOZE, MOODS, {"method": {"name": "full"}}),
    "chat lora": ("chat/alpaca", CHAT, {
        "method": {"name": "lora", "rank": 4, "targets": "all-linear"},
        "optimization": {"accumulation": 2, "batch_size": 2, "schedule": "cosine", "warmup": 0.2, "weight_decay": 0.1,
                         "length_grouped": True},
    }),
    "chat rounds full": ("chat/messages", ROUNDS, {
        "method": {"name": "full"}, "data": {"packing": 64},
        "optimization": {"batch_size": 2, "epochs": 3, "steps": None},
    }),
    "cloze clipped, sgd": (CLOZE, MOODS, {  # Adam hides what scales all gradients
        "method": {"name": "full"},
        "optimization": {"trainer": {"optim": "sgd"}, "clip_norm": 0.5, "learning_rate": 0.1, "accumulation": 2},
    }),
    "cloze p-tuning": (CLOZE, MOODS, {"method": {"name": "p-tuning", "prompt_tokens": 3}}),
    "multiple choice p-tuning-v2": (LONG_CHOICES, MOODS, {
        "method": {"name": "p-tuning-v2", "prefix_length": 4}, "optimization": {"learning_rate": 2e-2},
    }),
    "classification frozen embeddings": (CLASSES, MOODS, {"method": {"name": "frozen-embeddings"}}),
    "seq2seq dora": ("seq2seq/plain", PAIRS, {"method": {"name": "dora", "rank": 2}}),
    "infill adalora": ("infill/text", BLANKS, {"method": {"name": "adalora", "rank": 2}}),
    "language model ia3": ("language-model/text", MOODS, {
        "method": {"name": "ia3"}, "optimization": {"schedule": "constant", "learning_rate": 3e-2},
    }),
    "seq2seq qlora": ("seq2seq/plain", PAIRS, {
        "method": {"name": "qlora", "rank": 4}, "model": {"quantize": "int8"},
    }),
    "cloze folds": (CLOZE, MOODS, {
        "method": {"name": "full"}, "data": {"validation": None, "folds": 2}, "optimization": {"steps": 4},
    }),
    "chat lora with dropout": ("chat/alpaca", CHAT, {"method": {"name": "lora", "rank": 4, "dropout": 0.3}}),
}  # fmt: skip
NEED_MKL = {"chat lora with dropout"}


def write_run(session: Session, name: str, run: Run, **changes: Any) -> str:
    """A recipe with its data in a folder of its own; its path."""
    task, records, sections = run
    folder = name.replace(",", "").replace(" ", "-")
    session.write(f"{folder}/data/train.jsonl", records)
    session.write(f"{folder}/data/validation.jsonl", records[::-1][:4])
    tree = copy.deepcopy(TUNING) | {"task": task}
    tree["run"]["out"], tree["data"]["root"] = f"{folder}/out", f"{folder}/data"
    for section, values in (sections | changes).items():
        tree[section] = {**tree.get(section, {}), **values}
    session.write(f"{folder}/recipe.yaml", yaml.safe_dump(tree, allow_unicode=True, sort_keys=False))
    return f"{folder}/recipe.yaml"


def record_tuning(session: Session) -> dict[str, Any]:
    found = {}
    for name in RUNS:
        if name not in NEED_MKL or torch.backends.mkl.is_available():
            recipe = write_run(session, name, RUNS[name])
            printed = json.loads(session.must(f"finetune {recipe} --json").out)
            found[name] = {"printed": printed, **describe_run(session.folder / Path(recipe).parent / "out")}
    return found


def write_pretraining(session: Session) -> str:
    documents = [" ".join(TEXTS[(i + k) % len(TEXTS)] for k in range(3)) for i in range(20)]
    session.write("texts/train.jsonl", [{"text": text} for text in documents[:18]])
    session.write("texts/validation.jsonl", [{"text": text} for text in documents[18:]])
    session.write("texts/more.txt", "\n".join(TEXTS * 4))
    session.write("pretrain.yaml", yaml.safe_dump(PRETRAINING, sort_keys=False))
    return "pretrain.yaml"


def record_pretraining(session: Session) -> dict[str, Any]:
    recipe = write_pretraining(session)
    found = {}
    for name, overrides in {
        "float32": "",
        "checkpointed, neighbours": "optimization.gradient_checkpointing=true optimization.initialization=neighbours"
        " optimization.steps=6 objective.token=0.2 objective.document=0.8",
        "long rows, cut": "data.row_length=128 model.max_position_embeddings=40 optimization.steps=4",
    }.items():
        out = name.replace(" ", "-")
        printed = session.must(f"pretrain {recipe} run.out={out} {overrides}").out.splitlines()
        found[name] = {"printed": printed, **describe_run(session.folder / out)}
    return found


def describe_run(out: Path) -> dict[str, Any]:
    """The log, the names of all files, and the tensors of those that hold weights."""
    files: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if path.name.startswith("events.out"):
            name = f"{Path(name).parent.as_posix()}/events.out..."  # machine and time follow
        files[name] = describe_tensors(path) if path.suffix == ".safetensors" else ""
    return {"log": read_log(out) if (out / "metrics.jsonl").is_file() else None, "files": files}


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def own_process() -> dict[str, str]:
    """The environment of a process that runs this same package."""
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_killed(session: Session, command: str, log: Path, *, lines: int) -> int:
    """Starts a command in a process of its own and kills it once its log is so long; how long it is then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gmask", *command.split()],
        cwd=session.folder, env=own_process(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300  # a busy machine takes long to start it
    while process.poll() is None and time.monotonic() < deadline and count_lines(log) < lines:
        time.sleep(0.001)
    process.kill()
    process.wait()
    return count_lines(log)


def count_lines(path: Path) -> int:
    return path.read_text("utf-8").count("\n") if path.is_file() else 0


def run_in_two(session: Session, recipe: str) -> subprocess.CompletedProcess[str]:
    """Two processes share a run."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gmask"]
    return subprocess.run(
        [*start, "finetune", recipe], cwd=session.folder, env=own_process(), capture_output=True, text=True, timeout=300
    )
