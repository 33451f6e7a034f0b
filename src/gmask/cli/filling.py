"""How does ``gmask infill`` read its texts, and where do the answers go?"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmask.cli.arguments import merge_pairs, print_report, read_candidates, read_files, read_texts
from gmask.cli.options import Adapter, AsJson, Dtype, Model, Output, Pairs, Quantize, SkipBadLines, Source
from gmask.generation.settings import Settings

if TYPE_CHECKING:
    from gmask.generation.infill import Infiller

Texts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT",
        help="Texts with [MASK], [sMASK] or [gMASK]; \\[MASK] is meant as text. Without any, the lines of standard"
        " input; on a terminal, a prompt.",
        show_default=False,
    ),
]
Alternatives = Annotated[
    int | None,
    typer.Option("-n", "--n", help="Alternatives of a text, best first.", show_default=str(Settings().n)),
]
Choices = Annotated[
    list[str] | None,
    typer.Option(help="Candidates of a blank, as 'sunny|rainy'; once for each blank.", show_default=False),
]
MaxTokens = Annotated[
    int | None, typer.Option(help="Longest answer, in tokens.", show_default=str(Settings().max_tokens))
]


def infill(
    texts: Texts = None,
    model: Model = "bundled",
    n: Alternatives = None,
    choices: Choices = None,
    max_tokens: MaxTokens = None,
    source: Source = None,
    target: Output = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = False,
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    pairs: Pairs = None,
) -> None:
    """Fill the blanks of texts, from left to right, each answer with the earlier ones in sight."""
    from gmask.generation.settings import make_settings

    settings = make_settings(merge_pairs(pairs, n=n, max_tokens=max_tokens))
    candidates = [read_candidates(choice) for choice in choices or []] or None
    if files := read_files(texts, source, target):
        _fill_file(_load(model, adapter, dtype, quantize, settings), *files, candidates, skip_bad_lines)
    elif texts or not sys.stdin.isatty():
        texts = read_texts(texts)
        _fill_texts(_load(model, adapter, dtype, quantize, settings), texts, candidates, as_json=as_json)
    else:
        from gmask.cli.interactive import converse

        converse(_load(model, adapter, dtype, quantize, settings), candidates, as_json=as_json)


def _load(model: str, adapter: Path | None, dtype: str | None, quantize: str | None, settings: Settings) -> "Infiller":
    from gmask.generation.infill import Infiller
    from gmask.loading import load
    from gmask.models.glm import GLMForConditionalGeneration

    loaded = load(model, dtype=dtype, quantize=quantize, adapter=adapter, model_class=GLMForConditionalGeneration)
    return Infiller(*loaded, settings)


def _fill_texts(
    infiller: "Infiller", texts: Sequence[str], candidates: list[list[str]] | None, *, as_json: bool
) -> None:
    from gmask.cli.rendering import print_infilling

    filled = infiller.fill(texts, candidates)
    for infilling in filled:
        if as_json:
            print(json.dumps(infilling.to_dict(), ensure_ascii=False))
        else:
            print_infilling(infilling)
    cut = sum(not blank.finished for infilling in filled for blank in infilling.blanks)
    if cut:
        limit = infiller.settings.max_tokens
        print(f"note: {cut} answer(s) cut at {limit} tokens; --max-tokens sets the limit", file=sys.stderr)
    if any(infilling.choices and not infilling.choices.exact for infilling in filled):
        print("note: too many combinations of choices to score all; searched by beams", file=sys.stderr)


def _fill_file(
    infiller: "Infiller", source: Path, target: Path, candidates: list[list[str]] | None, skip_bad_lines: bool
) -> None:
    from gmask.generation.files import fill_file

    report = fill_file(
        infiller,
        source,
        target,
        choices=candidates,
        skip_bad_lines=skip_bad_lines,
        progress=sys.stderr.isatty(),
    )
    print_report(report, target, deed="filled")
