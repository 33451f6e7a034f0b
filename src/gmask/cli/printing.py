"""Prints results: JSON, named fields, tables, filled texts."""

import json
import sys
from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from gmask.generation.answers import Infilling
    from gmask.generation.files import FileReport
    from gmask.generation.infill import Fragment

ANSWER_STYLE = "bold green"
CUT_STYLE = "bold yellow"  # of an answer that was cut at the limit on its tokens


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Prints JSON: in one line, or indented. Characters are escaped where the console cannot show them all."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    print(text)


def print_fields(fields: Mapping[str, str], *, width: int = 12) -> None:
    """Prints a line for each field: its name, padded to ``width`` columns, and its value."""
    for name, value in fields.items():
        print(f"{name + ' ':{width}}{value}")


def print_result(result: dict[str, Any], fields: Mapping[str, str], *, as_json: bool) -> None:
    """Prints the result of a verb: all of it as JSON, or its fields for people."""
    if as_json:
        print_json(result, indent=2)
    else:
        print_fields(fields)


def print_tabbed(rows: Iterable[Sequence[str]]) -> None:
    """Prints a line for each row, with tabs between the cells; white space within cells is collapsed."""
    for row in rows:
        print("\t".join(" ".join(cell.split()) for cell in row))


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    figures: Container[str] = (),
    wrapped: Container[str] = (),
    **options: Any,
) -> None:
    """Prints a table for people.

    Args:
        figures: headings of columns that are aligned on the right.
        wrapped: headings of columns whose cells may take several lines.
        options: of `rich.table.Table`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(**{"box": SIMPLE_HEAD, "pad_edge": False, "header_style": "", **options})
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in figures else "left",
            no_wrap=heading not in wrapped,
            overflow="fold" if heading in wrapped else "ellipsis",
        )
    for row in rows:
        table.add_row(*row)
    _plain_console().print(table)


def _plain_console() -> "Console":
    """Returns a console without markup and automatic colours."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def print_file_report(report: "FileReport", target: Path, *, participle: str) -> None:
    """Prints on standard error how many lines were processed; ``participle``: such as "filled"."""
    resumed = f", {report.resumed} of them by an earlier run" if report.resumed else ""
    skipped = f'; {report.skipped} could not be {participle}, see their "error"' if report.skipped else ""
    print(f"{target}: {report.lines} lines{resumed}{skipped}", file=sys.stderr)


def print_infilling(infilling: "Infilling") -> None:
    """Prints a filled text, or several alternatives with their log-probabilities (for choices, probabilities)."""
    ranked = [infilling, *infilling.alternatives]
    scores = [""] if len(ranked) == 1 else [f"{found.logprob:.3f}\t" for found in ranked]
    if infilling.choices and len(ranked) > 1:
        scores = [f"{found.probability:.4f}\t" for found in infilling.choices.combinations]
    for score, found in zip(scores, ranked, strict=False):
        if sys.stdout.isatty():
            from rich.text import Text

            _plain_console().print(Text(score, style="dim") + highlight_answers(found), soft_wrap=True)
        else:
            print(score + found.text)


def highlight_answers(infilling: "Infilling") -> "Text":
    """Returns the filled text with its answers in colour."""
    from rich.text import Text

    text = Text(infilling.text)
    for blank in infilling.blanks:
        text.stylize(ANSWER_STYLE if blank.finished else CUT_STYLE, blank.start, blank.end)
    return text


def print_stream(pieces: Sequence[str], fragments: Generator["Fragment", None, "Infilling"]) -> None:
    """Prints a text on the terminal while its blanks are filled.

    Args:
        pieces: the text before, between and behind the blanks.
        fragments: as `stream_infill` yields them.
    """
    from rich.text import Text

    console = _plain_console()
    printed = 0  # pieces so far
    for fragment in fragments:
        if fragment.blank >= printed:  # print the text up to this blank; earlier blanks may have empty answers
            console.out("".join(pieces[printed : fragment.blank + 1]), end="", highlight=False)
            printed = fragment.blank + 1
        console.print(Text(fragment.text, style=ANSWER_STYLE), end="", soft_wrap=True)
    console.out("".join(pieces[printed:]), highlight=False)
