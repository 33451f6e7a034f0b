"""How is ``gmask quantize`` typed, and what does it print?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.options import AsJson

if TYPE_CHECKING:
    from gmask.quantization.quantizer import QuantizationConfig


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
    from gmask.checkpoints import quantized_folder
    from gmask.checkpoints.memory import format_bytes
    from gmask.loading import find_folder, load_tokenizer
    from gmask.quantization.quantizer import QuantizationConfig

    form = QuantizationConfig(bits, group_size, embeddings)
    folder, target = find_folder(source), target.expanduser()
    quantized_folder.check_source(folder, target, form, force=force)
    model = None if calibrate is None else _calibrate(folder, form, calibrate.expanduser())
    report = quantized_folder.quantize_folder(
        folder, target, load_tokenizer(folder), form, calibrated=model, force=force
    )
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
    from gmask.loading import load
    from gmask.quantization.calibration import calibrate_model
    from gmask.quantization.calibration_texts import cut_texts
    from gmask.tasks.corpus import read_texts

    model, tokenizer = load(folder)
    batches = cut_texts(tokenizer, model.config, read_texts([text]))
    return calibrate_model(model, batches, bits=form.bits, group_size=form.group_size, embeddings=form.embeddings)
