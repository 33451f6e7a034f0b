"""How does ``gmask convert`` tell what it did?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmask.cli.options import AsJson, WrittenDtype

if TYPE_CHECKING:
    from gmask.checkpoints.convert import ConversionReport


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
    from gmask.loading import find_folder

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
    from gmask.checkpoints.memory import format_bytes

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
