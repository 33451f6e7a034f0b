"""How does ``gmask infill`` read its texts, and where do the answers go?"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.options import Adapter, Json, Model, Pairs, Quantize, SkipBadLines, Source
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.generation.infill import Infiller
    from gmask.generation.lines import FileReport
    from gmask.generation.settings import Settings


Texts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT",
        help="Texts with [MASK], [sMASK] or [gMASK]; \\[MASK] is meant as text. Without any, the lines of standard"
        " input; on a terminal, a prompt.",
        show_default=False,
    ),
]
Alternatives = Annotated[int, typer.Option("-n", "--n", help="Alternatives of a text, best first.")]
Choices = Annotated[
    list[str] | None,
    typer.Option(help="Candidates of a blank, as 'sunny|rainy'; once for each blank.", show_default=False),
]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Target = Annotated[Path | None, typer.Option("--output", help="Where the filled texts of --input go, as .jsonl.")]


def infill(
    texts: Texts = None,
    model: Model = "bundled",
    n: Alternatives = 1,
    choices: Choices = None,
    max_tokens: MaxTokens = 64,
    source: Source = None,
    target: Target = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: Json = False,
    adapter: Adapter = None,
    quantize: Quantize = None,
    pairs: Pairs = None,
) -> None:
    """Fill the blanks of texts, from left to right, each answer with the earlier ones in sight."""
    from gmask.generation.settings import make_settings

    settings = make_settings({"n": n, "max_tokens": max_tokens, **read_pairs(pairs or [])})
    candidates = [read_candidates(choice) for choice in choices or []] or None
    if files := read_files(texts, source, target):
        _fill_file(_load(model, adapter, quantize, settings), *files, candidates, skip_bad_lines)
    elif texts or not sys.stdin.isatty():
        texts = read_texts(texts)
        _fill_texts(_load(model, adapter, quantize, settings), texts, candidates, as_json=as_json)
    else:
        from gmask.cli.interactive import converse

        converse(_load(model, adapter, quantize, settings), candidates, as_json=as_json)


def read_files(texts: Sequence[str] | None, source: Path | None, target: Path | None) -> tuple[Path, Path] | None:
    """The files of ``--input`` and ``--output``, or None if there are none.

    Raises:
        GmaskError: one without the other, or beside texts.
    """
    if source is None and target is None:
        return None
    if source is None or target is None:
        raise GmaskError("--input and --output go together: name the file of texts and the file of results")
    if texts:
        raise GmaskError("give texts or --input, not both")
    return source, target


def read_texts(texts: list[str] | None) -> list[str]:
    """The texts of the command line, else the lines of standard input.

    Raises:
        GmaskError: there are none.
    """
    if texts:
        return texts
    if sys.stdin.isatty():
        raise GmaskError("there is no text: give one, or --input")
    lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not lines:
        raise GmaskError("standard input is empty: give a text")
    return lines


def read_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """The values of ``--set key=value``, as YAML reads them.

    Raises:
        GmaskError: no ``=``, or no YAML.
    """
    import yaml

    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise GmaskError(f"--set {pair}: write it as key=value, such as temperature=0.8")
        try:
            values[key.strip()] = value if key.strip() == "stop" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise GmaskError(f"--set {pair}: the value cannot be read") from error
    return values


def read_candidates(choice: str, *, option: str = "--choices") -> list[str]:
    """The candidates of ``--choices 'a|b'``."""
    candidates = choice.split("|")
    if not all(candidates):
        raise GmaskError(f"{option} {choice!r}: a candidate is empty; write them as 'sunny|rainy'")
    return candidates


def _load(model: str, adapter: Path | None, quantize: str | None, settings: "Settings") -> "Infiller":
    from gmask.generation.infill import Infiller
    from gmask.loading import load
    from gmask.models.glm import GLMForConditionalGeneration

    loaded = load(model, quantize=quantize, adapter=adapter, model_class=GLMForConditionalGeneration)
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


def print_report(report: "FileReport", target: Path, *, deed: str) -> None:
    """Tells on standard error what became of a file."""
    resumed = f", {report.resumed} of them by an earlier run" if report.resumed else ""
    skipped = f'; {report.skipped} could not be {deed}, see their "error"' if report.skipped else ""
    print(f"{target}: {report.lines} lines{resumed}{skipped}", file=sys.stderr)
