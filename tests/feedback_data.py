"""Which tiny model folder, preferences and recipe do the tests of learning from feedback share?"""

from pathlib import Path
from typing import Any

import yaml

from tiny_folder import make_folder
from tiny_vocabularies import make_tokenizer
from tuning import build_chatglm
from tuning_data import write_lines

PAIRS = [
    {"prompt": question, "chosen": better, "rejected": worse, "kind": kind}
    for question, better, worse, kind in (
        ("the old man", "took his dog", "the river", "other"),
        ("the sunny day", "and the rainy season", "season", "cut"),
        ("我今天早上", "去市场买了一些苹果。", "小猫喜欢睡觉。", "other"),
        ("小猫喜欢", "睡觉", "跑步，跑步，跑步", "other"),
        ("down to", "the river.", "the day.", "other"),
        ("it was", "a sunny day", "a dog", "cut"),
        ("小狗喜欢", "跑步。", "苹果。", "other"),
        ("his dog", "went down", "was over over", "cut"),
    )
]


def write_feedback_recipe(
    folder: Path, *, records: list[dict[str, Any]] = PAIRS, model: Path | None = None, **sections: Any
) -> str:
    """A recipe for a tiny GLM in float32, six steps of four; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    base = model or folder / "base"
    if not base.is_dir():
        make_folder(base)
    write_lines(folder / "train.jsonl", records)
    write_lines(folder / "validation.jsonl", records[::-1][:4])
    tree: dict[str, Any] = {
        "run": {"out": str(folder / "out"), "device": "cpu"},
        "model": {"name": str(base)},
        "data": {
            "root": str(folder), "train": "train.jsonl", "validation": "validation.jsonl", "max_source": 48,
            "max_target": 32,
        },
        "method": {"name": "full"},
        "optimization": {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "evaluate_every": 3, "save_every": 2},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), "utf-8")
    return str(path)


def make_chatglm_folder(folder: Path) -> Path:
    """A tiny ChatGLM with random weights and a vocabulary of its own."""
    tokenizer = make_tokenizer("chatglm")
    ids = {name: tokenizer.convert_tokens_to_ids(f"[{name}]") for name in ("MASK", "gMASK")}
    model = build_chatglm(
        vocab_size=len(tokenizer),
        max_position_embeddings=96,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=ids["MASK"],
        gmask_token_id=ids["gMASK"],
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
