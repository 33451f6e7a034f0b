"""What does ``gmask info`` tell about a model?"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model, or bundled.")] = "bundled",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Show the size, shape, special ids, memory and licence of a model, without loading its weights."""
    description = describe(model)
    if as_json:
        print(json.dumps(description, ensure_ascii=False, indent=2))
        return
    for name, value in description.items():
        print(f"{name.replace('_', ' '):12} {_as_text(value)}")


def describe(name: str) -> dict[str, Any]:
    """What the files of a model say about it."""
    import torch

    from gmask.loading import find_folder, read_config, weight_files
    from gmask.models.glm import GLMForConditionalGeneration

    folder = find_folder(name)
    config = read_config(folder)
    with torch.device("meta"):
        count = GLMForConditionalGeneration(config).num_parameters()
    special = {
        role: getattr(config, f"{role}_token_id") for role in ("pad", "eos", "sop", "eop", "mask", "smask", "gmask")
    }
    return {
        "model": name,
        "folder": str(folder),
        "parameters": count,
        "shape": {
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "attention_heads": config.num_attention_heads,
            "positions": config.max_position_embeddings,
            "vocabulary": config.vocab_size,
            "activation": config.hidden_act,
        },
        "special_ids": special,
        "files_bytes": sum(path.stat().st_size for path in weight_files(folder)),
        "memory_bytes": {"float32": 4 * count, "bfloat16": 2 * count},
        "licence": read_licence(folder),
    }


def read_licence(folder: Path) -> str | None:
    """The licence that the head of the model card names; None if there is no such card."""
    import yaml

    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8").split("---\n", 2)
    head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    return str(head["license"]) if isinstance(head, dict) and "license" in head else None


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_as_text(inner)}" for name, inner in value.items())
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return "not known" if value is None else str(value)
