"""Which small data do the tests of evaluating tasks share?"""

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = ["man", "dog", "river", "day", "book", "market", "rain", "sun", "door", "boat"]
CLOZE = {
    "kind": "cloze", "template": "{text} It was [MASK].", "label": "label",
    "choices": {"good": "great", "bad": "bad"}, "metrics": ["accuracy", "macro-f1"],
    "data": {"files": ["mood/val.jsonl"], "train": ["mood/train.jsonl"], "url": "https://example.org/mood",
             "licence": "CC0"},
}  # fmt: skip
SEQ2SEQ = {
    "kind": "seq2seq", "template": "{text} It was [gMASK]", "target": "{label}", "metrics": ["exact-match"],
}  # fmt: skip


def make_reviews(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"text": f"The {' '.join(rng.choices(WORDS, k=rng.randint(2, 6)))}.", "label": rng.choice(["good", "bad"])}
        for _ in range(count)
    ]


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return str(path)


def write_task(path: Path, task: dict[str, Any], **changes: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**task, **changes}, allow_unicode=True, sort_keys=False), "utf-8")
    return str(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
