"""Which small data and recipes do the tests of fine-tuning share?"""

import json
from pathlib import Path
from typing import Any

import yaml

GOOD = ["A fine day.", "She smiled at him.", "The soup was warm.", "They won the game."]
BAD = ["A dark night.", "He lost the key.", "The bread was old.", "They lost the game."]

SENTIMENT = [
    {"text": text, "label": label}
    for number in range(2)
    for texts, label in ((GOOD, "good"), (BAD, "bad"))
    for text in texts[number * 2 : number * 2 + 2]
]
CHAT = [
    {"instruction": question, "input": "", "output": answer}
    for question, answer in (
        ("What is 1 + 1?", "2"), ("What is 2 + 2?", "4"), ("Say hello.", "Hello!"), ("你好", "你好！"),
        ("What colour is snow?", "White."), ("What is 3 + 3?", "6"), ("天是什么颜色？", "蓝色。"),
        ("Say goodbye.", "Goodbye!"),
    )
]  # fmt: skip
CLOZE_TASK = {
    "name": "mood", "kind": "cloze", "template": "{text} It was [MASK].", "label": "label",
    "choices": {"good": "good", "bad": "bad"}, "metrics": ["accuracy"],
}  # fmt: skip


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def write_recipe(
    folder: Path, *, task: Any = CLOZE_TASK, records: list[dict[str, Any]] = SENTIMENT, **sections: Any
) -> str:
    """A recipe for the bundled model on a CPU in float32, four steps of four samples; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.jsonl", records)
    write_lines(folder / "validation.jsonl", records[::-1][:4])
    tree: dict[str, Any] = {
        "run": {"out": str(folder / "out"), "device": "cpu"},
        "task": task,
        "data": {
            "root": str(folder), "train": "train.jsonl", "validation": "validation.jsonl", "max_source": 48,
            "max_target": 16,
        },
        "method": {"name": "full"},
        "optimization": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "evaluate_every": 2, "save_every": 2},
        "decoding": {"max_tokens": 8},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), "utf-8")
    return str(path)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def read_losses(out: Path) -> list[tuple[int, float, float, Any]]:
    """What a repeated run must give again, bit for bit."""
    return [(r["step"], r["loss"], r["gradient_norm"], r.get("validation")) for r in read_log(out)]
