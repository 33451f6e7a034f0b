"""``gmask convert``, ``quantize``, ``merge`` and ``info``: folders of models, and the table of published ones."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.options import BUNDLED, AsJson, WrittenDtype, output_option, refuse_unknown
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.checkpoints.convert import ConversionReport
    from gmask.checkpoints.weights import Checkpoint
    from gmask.checkpoints.zoo import Family
    from gmask.quantization.quantizer import QuantizationConfig


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder of a model or checkpoint, or the name of a published model.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="gmask|huggingface|megatron",
            help="Our form, the published one, or that of the original training code.",
        ),
    ] = "gmask",
    parts: Annotated[int, typer.Option(help="Ranks of model parallelism; for megatron alone.")] = 1,
    dtype: WrittenDtype = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="The published model that a checkpoint of the training code is made like.",
            show_default="told by its shape",
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(help="Its number of attention heads, if it is like none of them.", show_default=False),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with the vocabulary.", show_default="SOURCE")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is at TARGET.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another form, and compare every bit of the result with the source."""
    from gmask.checkpoints import convert as conversion
    from gmask.checkpoints.load import find_folder

    report = conversion.convert(
        find_folder(source),
        target.expanduser(),
        to=to,
        parts=parts,
        dtype=dtype,
        like=like,
        heads=heads,
        tokenizer=tokenizer and tokenizer.expanduser(),
        force=force,
    )
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False, indent=2))
    else:
        print_conversion(report)


def print_conversion(report: "ConversionReport") -> None:
    """Prints a line for each thing that was done, and for each that should be known."""
    from gmask.hardware import format_bytes

    rows = {
        "read": f"{report.source} ({_name_form(report.source_form, report.source_parts)})",
        "written": f"{report.target} ({_name_form(report.form, report.parts)})",
        "parameters": f"{report.parameters:,} in {report.tensors} tensors, {', '.join(report.dtypes)}",
        "files": ", ".join(
            f"{name} ({format_bytes(size)})" if size >= 10**5 else name for name, size in report.files.items()
        ),
        "compared": "every tensor, bit by bit",
        "seconds": f"{report.seconds:.1f}",
    }
    for name, value in rows.items():
        print(f"{name:12}{value}")
    for note in report.notes:
        print(f"{'note':12}{note}")


def _name_form(form: str, parts: int) -> str:
    return f"{form}, {parts} rank{'s' * (parts > 1)}" if form == "megatron" else form


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder of a GLM or ChatGLM, or the name of a published one.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder.")],
    bits: Annotated[int, typer.Option(metavar="4|8", help="Bits of a weight.")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="32|64|128",
            help="Columns that share a scale; more accurate, and a little larger, than a scale a row.",
            show_default="a scale a row, as published",
        ),
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Quantize the embeddings and the head too.")] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Text (.txt, .jsonl, .jsonl.zst) to round by: slower, more accurate.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is at TARGET.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model with int8 or int4 weights, which loads and runs as any other."""
    from gmask.checkpoints import rewrite
    from gmask.checkpoints.load import find_folder, load_tokenizer
    from gmask.hardware import format_bytes
    from gmask.quantization.quantizer import QuantizationConfig

    form = QuantizationConfig(bits, group_size, embeddings)
    folder, target = find_folder(source), target.expanduser()
    rewrite.check_source(folder, target, form, force=force)
    model = None if calibrate is None else _calibrate(folder, form, calibrate.expanduser())
    report = rewrite.quantize_folder(folder, target, load_tokenizer(folder), form, calibrated=model, force=force)
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False, indent=2))
        return
    before, after = format_bytes(report.bytes_before), format_bytes(report.bytes_after)
    rows = {
        "read": report.source,
        "written": report.target,
        "form": f"{report.form}{', calibrated' if report.calibrated else ''}",
        "layers": str(report.layers),
        "weights": f"{before} before, {after} after",
        "seconds": f"{report.seconds:.1f}",
    }
    for name, value in rows.items():
        print(f"{name:12}{value}")


def _calibrate(folder: Path, form: "QuantizationConfig", text: Path) -> Any:
    """The model of a folder, rounded by what it computes on a text."""
    from gmask.checkpoints.load import load
    from gmask.quantization.calibration import calibrate_model, cut_texts
    from gmask.tasks.records import read_texts

    model, tokenizer = load(folder)
    batches = cut_texts(tokenizer, model.config, read_texts([text]))
    return calibrate_model(model, batches, bits=form.bits, group_size=form.group_size, embeddings=form.embeddings)


def merge(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or name of the model that the adapter was trained for.")
    ],
    adapter: Annotated[
        Path, typer.Option(help="Folder of LoRA, DoRA, AdaLoRA or IA3, of gmask or PEFT.", show_default=False)
    ],
    target: Annotated[Path, output_option("A new folder.")],
    dtype: WrittenDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is at the target.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into the weights of its model, and write that as a model of its own."""
    from gmask.checkpoints.load import find_folder, load_tokenizer
    from gmask.checkpoints.rewrite import merge_folder
    from gmask.hardware import format_bytes, read_dtype

    folder = find_folder(source)
    report = merge_folder(
        folder,
        adapter.expanduser(),
        target.expanduser(),
        load_tokenizer(folder),
        dtype=read_dtype(dtype),
        force=force,
    )
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False, indent=2))
        return
    rows = {
        "model": report.source,
        "adapter": report.adapter,
        "written": report.target,
        "folded": f"{report.layers} layers, in float32",
        "weights": f"{format_bytes(report.bytes)}, {report.dtype}",
        "seconds": f"{report.seconds:.1f}",
    }
    for name, value in rows.items():
        print(f"{name:12}{value}")


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
    from gmask.checkpoints.zoo import FAMILIES

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
    from gmask.checkpoints.hub import find_cached
    from gmask.checkpoints.zoo import find_family

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
    from gmask.checkpoints.load import find_folder
    from gmask.checkpoints.weights import open_checkpoint, weight_files

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

    from gmask.checkpoints.config import read_config
    from gmask.checkpoints.zoo import class_of

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
    from gmask.checkpoints.config import read_config
    from gmask.checkpoints.load import match_keys, shape_stored

    model = shape_stored(checkpoint.folder, read_config(checkpoint.folder))
    try:
        match_keys(checkpoint, model)
    except GmaskError as error:
        return str(error).replace(f"{checkpoint.folder}: ", "no: ", 1)
    return "yes"


def _describe_training_checkpoint(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Of a checkpoint of the original training code, which tells neither heads nor vocabulary."""
    from gmask.checkpoints.config import read_shape

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
    from gmask.checkpoints.zoo import families_of_shape

    families = families_of_shape(
        layers=shape["layers"],
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocabulary"],
        positions=shape["positions"],
    )
    return [family.name for family in families if shape.get("attention_heads") in (None, family.heads)]


def read_licence(folder: Path) -> str | None:
    """The licence that the head of the model card names; None if there is no such card."""
    from gmask.config import parse_yaml
    from gmask.files import read_text

    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = read_text(card).split("---\n", 2)
    head = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0] else None
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


COLUMNS = (
    "name", "download", "parameters", "language", "objectives", "blanks", "tokenizer", "GB float32", "GB 16 bit",
    "GB quantized", "licence of the code", "licence of the weights",
)  # fmt: skip

NOTHING = "-"
README = "https://github.com/THUDM/GLM#pretrained-models"
"""Where the archives of the original checkpoints are linked."""


def print_zoo(families: "Sequence[Family]") -> None:
    """Prints the table on a terminal, and tab-separated lines elsewhere."""
    if not sys.stdout.isatty():
        for row in (COLUMNS, *map(table_row, families)):
            print("\t".join(row))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("name\ndownload", overflow="fold")
    for heading in ("parameters\nmemory", "language\ntokenizer", "objectives", "blanks"):
        table.add_column(heading, no_wrap=heading != "language\ntokenizer")
    table.add_column("licence of code\nand weights")
    for family in families:
        table.add_row(*terminal_row(family), end_section=True)
    Console(markup=False, highlight=False).print(table)


def table_row(family: "Family") -> tuple[str, ...]:
    """The cells of a row, in the order of `COLUMNS`."""
    gigabytes = {dtype: f"{family.memory(dtype) / 1e9:.1f}" for dtype in family.dtypes}
    quantized = [size for dtype, size in gigabytes.items() if dtype.startswith("int")]
    return (
        family.name,
        family.hub_names[0] if family.hub_names else str(family.archive),
        round_count(family.parameters),
        family.language,
        ", ".join(family.objectives),
        " ".join(family.masks),
        family.tokenizer,
        gigabytes.get("float32", NOTHING),
        gigabytes.get("bfloat16", NOTHING),
        *(quantized or [NOTHING]),
        family.code_licence,
        family.weights_licence,
    )


def terminal_row(family: "Family") -> tuple[str, ...]:
    """The same, narrow enough for a terminal: several lines a cell."""
    row = dict(zip(COLUMNS, table_row(family), strict=True))
    memory = [
        f"{row[column]} GB {column.removeprefix('GB ')}"
        for column in COLUMNS
        if column.startswith("GB ") and row[column] != NOTHING
    ]
    return (
        f"{row['name']}\n{row['download']}",
        "\n".join([row["parameters"], *memory]),
        f"{row['language']}\n{row['tokenizer']}",
        "\n".join(family.objectives),
        "\n".join(family.masks),
        f"{family.code_licence}\n{family.weights_licence}",
    )


def describe_family(family: "Family") -> dict[str, Any]:
    """All that the catalog says about a model, and how to get it."""
    return {
        "name": family.name,
        "hub_names": list(family.hub_names),
        "parameters": family.parameters,
        "language": family.language,
        "corpus": family.corpus,
        "objectives": list(family.objectives),
        "blanks": list(family.masks),
        "tokenizer": family.tokenizer,
        "shape": {
            "layers": family.layers,
            "hidden_size": family.hidden_size,
            "attention_heads": family.heads,
            "positions": family.positions,
            "vocabulary": family.vocab_size,
        },
        "special_ids": {role.removesuffix("_token_id"): token_id for role, token_id in family.special_ids.items()},
        "memory_bytes": {dtype: family.memory(dtype) for dtype in family.dtypes},
        "licence": {"code": family.code_licence, "weights": family.weights_licence},
        "to_get_it": tell_how_to_get(family),
    }


def tell_how_to_get(family: "Family") -> str:
    """One sentence: the command that downloads a model, or where its archive is linked."""
    if family.hub_names:
        dtype = family.dtypes[0] if family.bits else family.stored_dtype
        size = f" ({family.memory(dtype) / 1e9:.1f} GB)" if dtype else ""
        is_chat = family.architecture == "chatglm"
        verb, text = ("chat", "") if is_chat else ("infill", " '... [MASK] ...'")
        return f"gmask fetches it{size} when you name it: gmask {verb} --model {family.hub_names[0]}{text}"
    if family.architecture == "chatglm":
        return f"{family.archive}: git clone it, check one of March 2023 out, and name the folder"
    return (
        f"not on a hub; {family.archive} is linked from {README}: unpack it, then"
        f" gmask convert FOLDER NEW-FOLDER --like {family.name} --tokenizer VOCABULARY-FOLDER"
    )


def round_count(count: int) -> str:
    """109338624 as 109 M, 9880682496 as 9.88 B."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
