"""How is ``gmask merge`` typed, and what does it print?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from gmask.cli.options import AsJson, WrittenDtype, output_option


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
    from gmask.checkpoints.memory import format_bytes
    from gmask.checkpoints.merging import merge_folder
    from gmask.loading import find_folder, load_tokenizer, read_dtype

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
