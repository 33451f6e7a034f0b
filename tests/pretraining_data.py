"""A tiny pretraining run: its texts and its recipe."""

import json
from pathlib import Path

import yaml

SENTENCES = [
    "The small brown dog ran over the green hill.",
    "A cold wind blew from the north all day.",
    "She put the old book on the wooden table.",
    "今天天气很好，我们去公园散步。",
    "他把旧书放在木桌上，然后出门了。",
    "Every morning the baker opens his shop at six.",
]

NO_DROPOUT = [f"model.{where}_dropout=0.0" for where in ("embedding", "attention", "hidden")]


def write_recipe(folder: Path) -> Path:
    """Twenty short documents, a tiny model, float32 on one thread: deterministic."""
    documents = [" ".join(SENTENCES[(i + k) % len(SENTENCES)] for k in range(4)) for i in range(20)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
    (folder / "train.jsonl").write_text("\n".join(lines[:18]), "utf-8")
    (folder / "val.jsonl").write_text("\n".join(lines[18:]), "utf-8")
    tree = {
        "run": {"out": "out", "threads": 1, "log_every": 1, "save_every": 4, "validate_every": 8, "validation_rows": 1},
        "tokenizer": {"vocab_size": 420},
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128},
        "objective": {},
        "optimization": {"steps": 16, "rows_per_step": 4, "rows_per_pass": 2, "warmup_steps": 4, "dtype": "float32"},
        "data": {
            "root": str(folder),
            "cache": str(folder / "cache"),
            "row_length": 64,
            "sources": [{"name": "toy", "train": "train.jsonl", "validation": "val.jsonl"}],
        },
    }
    tree["run"]["out"] = str(folder / "out")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
