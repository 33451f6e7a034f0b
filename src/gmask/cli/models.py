"""``gmask convert``, ``quantize``, ``merge`` and ``info``."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.options import AsJson, Force, WrittenDtype, find_source, output_option
from gmask.cli.printing import print_fields, print_json, print_result, print_tabbed, print_table
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.checkpoints.convert import ConversionReport
    from gmask.checkpoints.folder import Folder
    from gmask.checkpoints.formats import Checkpoint
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
            metavar="gmask|mapped|huggingface|megatron",
            help="Our form; int8 or int4 weights to be mapped, for a fast start on CPUs; the published form, or that of"
            " the original training code.",
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
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another form, and compare every bit of the result with the source."""
    from gmask.checkpoints.hub import check_name

    check_name(source)  # before torch is imported, which takes seconds
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
    print_result(report.to_dict(), _conversion_fields(report), as_json=as_json)
    for note in () if as_json else report.notes:
        print_fields({"note": note})


def _conversion_fields(report: "ConversionReport") -> dict[str, str]:
    from gmask.hardware import format_bytes

    return {
        "read": f"{report.source} ({_name_form(report.source_form, report.source_parts)})",
        "written": f"{report.target} ({_name_form(report.form, report.parts)})",
        "parameters": f"{report.parameters:,} in {report.tensors} tensors, {', '.join(report.dtypes)}",
        "files": ", ".join(
            f"{name} ({format_bytes(size)})" if size >= 10**5 else name for name, size in report.files.items()
        ),
        "compared": "every tensor, bit by bit",
        "seconds": f"{report.seconds:.1f}",
    }


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
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a model with int8 or int4 weights, which loads and runs as any other."""
    from gmask.checkpoints.hub import check_name

    check_name(source)  # before torch is imported
    from gmask.checkpoints.convert import quantize_folder
    from gmask.checkpoints.load import find_folder
    from gmask.hardware import format_bytes
    from gmask.quantization.quantizer import QuantizationConfig

    form, folder = QuantizationConfig(bits, group_size, embeddings), find_folder(source)
    rounded = None if calibrate is None else functools.partial(_calibrate, folder, form, calibrate.expanduser())
    report = quantize_folder(folder, target.expanduser(), form, calibrate=rounded, force=force)
    before, after = format_bytes(report.bytes_before), format_bytes(report.bytes_after)
    fields = {
        "read": report.source,
        "written": report.target,
        "form": f"{report.form}{', calibrated' if report.calibrated else ''}",
        "layers": str(report.layers),
        "weights": f"{before} before, {after} after",
        "seconds": f"{report.seconds:.1f}",
    }
    print_result(report.to_dict(), fields, as_json=as_json)


def _calibrate(folder: Path, form: "QuantizationConfig", text: Path) -> Any:
    """Returns the model of a folder, quantized with calibration on a text."""
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
    from gmask.checkpoints.hub import check_name

    check_name(source)  # before torch is imported
    from gmask.checkpoints.convert import merge_folder
    from gmask.checkpoints.load import find_folder
    from gmask.hardware import format_bytes, read_dtype

    report = merge_folder(
        find_folder(source), adapter.expanduser(), target.expanduser(), dtype=read_dtype(dtype), force=force
    )
    fields = {
        "model": report.source,
        "adapter": report.adapter,
        "written": report.target,
        "folded": f"{report.layers} layers, in float32",
        "weights": f"{format_bytes(report.bytes)}, {report.dtype}",
        "seconds": f"{report.seconds:.1f}",
    }
    print_result(report.to_dict(), fields, as_json=as_json)


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Folder of a model, or the name of a published one.", show_default="bundled"
        ),
    ] = None,
    zoo: Annotated[bool, typer.Option("--zoo", help="List the published models instead.")] = False,
    machine: Annotated[bool, typer.Option("--machine", help="Show what this CPU can do, and what is chosen.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the size, shape, special ids, memory and licence of a model, without loading or fetching its weights."""
    from gmask.checkpoints.zoo import FAMILIES

    asked = [name for name, given in ((model, model is not None), ("--zoo", zoo), ("--machine", machine)) if given]
    if len(asked) > 1:
        raise GmaskError(f"give {asked[0]} or {asked[1]}, not both")
    if zoo and as_json:
        print_json([describe_family(family) for family in FAMILIES], indent=2)
    elif zoo:
        print_zoo(FAMILIES)
    else:
        about = describe_cpu() if machine else describe_model(model or "bundled")
        if as_json:
            print_json(about, indent=2)
        else:
            print_fields({name.replace("_", " "): _as_text(value) for name, value in about.items()}, width=16)


def describe_cpu() -> dict[str, Any]:
    """Describes this machine's CPU, and what multiplies on it.

    Raises:
        GmaskError: the environment forces a kernel that this machine lacks.
    """
    import torch

    from gmask.hardware import cpu_instructions, describe_device, training_dtype
    from gmask.models.base import describe_bfloat16
    from gmask.native.ops import instruction_sets
    from gmask.quantization.kernels import describe_path

    device = torch.device("cpu")
    return {
        "cpu": describe_device(device),
        "instructions": cpu_instructions(),
        "threads": torch.get_num_threads(),
        "C++_kernels": list(instruction_sets()),
        "int8_and_int4": describe_path(),
        "bfloat16": describe_bfloat16(),
        "training": str(training_dtype("auto", device)).removeprefix("torch."),
    }


def describe_model(name: str) -> dict[str, Any]:
    """Describes a model by its files, or a published one that was not fetched by the table of published models.

    Raises:
        GmaskError: neither a folder of a model nor a published model.
    """
    source, family = find_source(name)
    if family is None:
        assert source is not None
        return describe_folder(source)
    return describe_family(family) | ({"folder": source} if source else {})


def describe_folder(name: str) -> dict[str, Any]:
    """Describes a model by its files; only the headers of the weights are read."""
    from gmask.checkpoints.load import open_folder

    with open_folder(name) as folder:
        checkpoint = folder.weights
        if folder.lacks_config:
            about = _describe_training_checkpoint(checkpoint)
        else:
            about = _describe_config(folder)
            about["weights_fit"] = _compare(folder)
        keys, files = checkpoint.keys(), checkpoint.files
        stored = sorted({str(checkpoint.dtype(key)).removeprefix("torch.") for key in keys})
        form = {"form": checkpoint.layout, "parallel_size": checkpoint.parallel_size, "stored_as": stored}
    count = about["parameters"]
    return {
        "model": name,
        "folder": str(folder),
        **form,
        **about,
        "files_bytes": sum(path.stat().st_size for path in files),
        "memory_bytes": {"float32": 4 * count, "bfloat16": 2 * count},
        "licence": read_licence(folder.path),
    }


def _describe_config(folder: "Folder") -> dict[str, Any]:
    config, model = folder.config, folder.shape_model(quantized=False)
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
        "kind": type(model).__name__,
        "same_shape_as": _names_of_shape(shape),
        "parameters": model.num_parameters(),
        "shape": shape,
        "special_ids": {role: getattr(config, f"{role}_token_id", None) for role in roles},
    }


def _compare(folder: "Folder") -> str:
    """Returns "yes" if names and shapes of the weights fit the config, else "no: " and the first difference."""
    model = folder.shape_model()
    try:
        folder.compare(model)
    except GmaskError as error:
        return str(error).replace(f"{folder}: ", "no: ", 1)
    return "yes"


def _describe_training_checkpoint(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Describes a checkpoint of the original training code by its shapes, which imply neither heads nor vocabulary."""
    from gmask.checkpoints.folder import read_shape

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
    """Returns the names of the published models of a shape."""
    from gmask.checkpoints.zoo import families_of_shape

    families = families_of_shape(
        layers=shape["layers"],
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocabulary"],
        positions=shape["positions"],
    )
    return [family.name for family in families if shape.get("attention_heads") in (None, family.heads)]


def read_licence(folder: Path) -> str | None:
    """Returns the licence in the metadata of the model card; None if there is none."""
    from gmask.config import parse_yaml
    from gmask.files import read_text

    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = read_text(card).split("---\n", 2)
    head = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0] else None
    return str(head["license"]) if isinstance(head, dict) and "license" in head else None


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
"""The page with links to the archives of the original checkpoints."""


def print_zoo(families: "Sequence[Family]") -> None:
    """Prints the table on a terminal, and tab-separated lines elsewhere."""
    if not sys.stdout.isatty():
        print_tabbed([COLUMNS, *map(table_row, families)])
        return
    headings = (
        "name\ndownload", "parameters\nmemory", "language\ntokenizer", "objectives", "blanks",
        "licence of code\nand weights",
    )  # fmt: skip
    wrapped = (headings[0], headings[2], headings[5])
    print_table(headings, map(terminal_row, families), wrapped=wrapped, show_lines=True)


def table_row(family: "Family") -> tuple[str, ...]:
    """Returns the cells of a row, in the order of `COLUMNS`."""
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
    """Returns the cells of a row with several lines each, narrow enough for a terminal."""
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
    """Describes a published model by its row in the table, and how to get it."""
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
        "to_get_it": how_to_get(family),
    }


def how_to_get(family: "Family") -> str:
    """Returns one sentence with the command that downloads a model, or the link to its archive."""
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
    """Formats 109338624 as 109 M, 9880682496 as 9.88 B."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
