"""What does ``gmask info`` tell about a model?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.arguments import refuse_unknown
from gmask.cli.options import BUNDLED, AsJson
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.checkpoints.reading import Checkpoint


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Folder of a model, or the name of a published one.", show_default="bundled"
        ),
    ] = None,
    zoo: Annotated[bool, typer.Option("--zoo", help="List the published models instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the size, shape, special ids, memory and licence of a model, without loading or fetching its weights."""
    from gmask.checkpoints.catalog import FAMILIES
    from gmask.cli.zoo import describe_family, print_zoo

    if zoo and model is not None:
        raise GmaskError(f"give {model} or --zoo, not both")
    if zoo and as_json:
        _print_json([describe_family(family) for family in FAMILIES])
    elif zoo:
        print_zoo(FAMILIES)
    elif as_json:
        _print_json(describe(model or "bundled"))
    else:
        for name, value in describe(model or "bundled").items():
            print(f"{name.replace('_', ' '):15} {_as_text(value)}")


def describe(name: str) -> dict[str, Any]:
    """What the files of a model say about it; of a published one that is not here, what the catalog says.

    Raises:
        GmaskError: neither a folder of a model nor a name in the catalog.
    """
    from gmask.checkpoints.catalog import find_family
    from gmask.checkpoints.hub import find_cached
    from gmask.cli.zoo import describe_family

    if name in BUNDLED or Path(name).expanduser().exists():
        return describe_folder(name)
    family = find_family(name)
    cached = find_cached(family.hub_names[0] if family and family.hub_names else name)
    if family is not None:
        return describe_family(family) | ({"folder": str(cached)} if cached else {})
    if cached is not None:
        return describe_folder(str(cached))
    refuse_unknown(name)


def describe_folder(name: str) -> dict[str, Any]:
    """What the files of a model say about it; the headers of the weights are read, not the weights."""
    from gmask.checkpoints.reading import open_checkpoint, weight_files
    from gmask.loading import find_folder

    folder = find_folder(name)
    with open_checkpoint(folder) as checkpoint:
        if checkpoint.layout == "megatron" and not (folder / "config.json").is_file():
            about = _describe_training_checkpoint(checkpoint)
        else:
            about = _describe_config(folder)
            about["weights_fit"] = _compare(checkpoint)
        keys = checkpoint.keys()
        stored = sorted({str(checkpoint.dtype(key)).removeprefix("torch.") for key in keys})
        form = {"form": checkpoint.layout, "parallel_size": checkpoint.parallel_size, "stored_as": stored}
    count = about["parameters"]
    return {
        "model": name,
        "folder": str(folder),
        **form,
        **about,
        "files_bytes": sum(path.stat().st_size for path in weight_files(folder)),
        "memory_bytes": {"float32": 4 * count, "bfloat16": 2 * count},
        "licence": read_licence(folder),
    }


def _describe_config(folder: Path) -> dict[str, Any]:
    import torch

    from gmask.checkpoints.architectures import class_of
    from gmask.loading import read_config

    config = read_config(folder)
    model_class = class_of(config)
    with torch.device("meta"):
        count = model_class(config).num_parameters()
    shape = {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "attention_heads": config.num_attention_heads,
        "positions": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "activation": getattr(config, "hidden_act", "gelu_pytorch_tanh"),
    }
    roles = ("pad", "eos", "sop", "eop", "mask", "smask", "gmask")
    return {
        "kind": model_class.__name__,
        "same_shape_as": _names_of_shape(shape),
        "parameters": count,
        "shape": shape,
        "special_ids": {role: getattr(config, f"{role}_token_id", None) for role in roles},
    }


def _compare(checkpoint: "Checkpoint") -> str:
    """Whether names and shapes of the weights are those that the config asks for, or what is wrong with them."""
    from gmask.checkpoints.configs import read_config
    from gmask.checkpoints.fit import match_keys
    from gmask.checkpoints.preflight import shape_stored

    model = shape_stored(checkpoint.folder, read_config(checkpoint.folder))
    try:
        match_keys(checkpoint, model)
    except GmaskError as error:
        return str(error).replace(f"{checkpoint.folder}: ", "no: ", 1)
    return "yes"


def _describe_training_checkpoint(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Of a checkpoint of the original training code, which tells neither heads nor vocabulary."""
    from gmask.checkpoints.megatron_config import read_shape

    values, keys = read_shape(checkpoint), checkpoint.keys()
    shape = {
        "layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "positions": values["max_position_embeddings"],
        "vocabulary": values["vocab_size"],
    }
    return {
        "same_shape_as": _names_of_shape(shape),
        "parameters": sum(checkpoint.shape(key).numel() for key in keys),
        "shape": shape,
        "special_ids": {},
    }


def _names_of_shape(shape: dict[str, Any]) -> list[str]:
    """The published models of a shape."""
    from gmask.checkpoints.catalog import families_of_shape

    families = families_of_shape(
        layers=shape["layers"],
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocabulary"],
        positions=shape["positions"],
    )
    return [family.name for family in families if shape.get("attention_heads") in (None, family.heads)]


def read_licence(folder: Path) -> str | None:
    """The licence that the head of the model card names; None if there is no such card."""
    import yaml

    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8").split("---\n", 2)
    head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    return str(head["license"]) if isinstance(head, dict) and "license" in head else None


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_as_text(inner)}" for name, inner in value.items()) or "not known"
    if isinstance(value, list):
        return ", ".join(map(_as_text, value)) or "none"
    if isinstance(value, int) and value >= 1_000_000:
        return f"{value:,}"
    return "not known" if value is None else str(value)
