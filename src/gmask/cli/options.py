"""Options that several verbs share, the meaning of what was typed, and how a filled text is printed."""

import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gmask.errors import GmaskError
from gmask.files import check_text, decode_text

if TYPE_CHECKING:
    from rich.text import Text

    from gmask.generation.answers import Infilling
    from gmask.generation.files import FileReport
    from gmask.generation.infill import Fragment


BUNDLED = ("bundled", "bundled-chat")
"""The models that come with gmask; their names without the import of what loads them."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""The addresses that no other machine reaches."""

DTYPE_NAMES = "float32|bfloat16|float16"


def output_option(help: str, *aliases: str, show_default: bool | str = False) -> Any:
    """The option for where results are written: under one name in all verbs, with a help that says what they are."""
    return typer.Option("--output", *aliases, "-o", help=help, show_default=show_default)


Model = Annotated[str, typer.Option("--model", "-m", help="Folder or name of a model, or bundled, or bundled-chat.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="int8|int4",
        help="Keep the weights as integers, which takes less memory; those of a quantized folder are read as they are.",
        show_default="as in the folder",
    ),
]

Adapter = Annotated[
    Path | None,
    typer.Option(help="Folder of what was trained for it: LoRA and its like, a prefix, prompts.", show_default=False),
]

Dtype = Annotated[
    str | None,
    typer.Option(
        metavar=DTYPE_NAMES,
        help="Precision of the weights, or of what is not quantized.",
        show_default="on a CPU float32, or bfloat16 beyond 3 billion parameters; else as stored",
    ),
]

WrittenDtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar=DTYPE_NAMES, help="What the weights become.", show_default="as they are stored"),
]

Source = Annotated[Path | None, typer.Option("--input", help='File of texts: .jsonl with a "text", or one a line.')]
SkipBadLines = Annotated[bool, typer.Option("--skip-bad-lines", help="Go on after a line that cannot be used.")]
Output = Annotated[Path | None, output_option("Where the results of --input go, as .jsonl.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; of texts, an object for each.")]
Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)]
Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="temperature, top_k, top_p, seed, num_beams, length_penalty, no_repeat_ngram, min_tokens or stop, such as "
        "temperature=0.8; once for each.",
        show_default=False,
    ),
]


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
        GmaskError: there are none, or they are not UTF-8.
    """
    if texts:
        return [check_text(text) for text in texts]
    if sys.stdin.isatty():
        raise GmaskError("there is no text: give one, or --input")
    data = getattr(sys.stdin, "buffer", sys.stdin).read()  # one that a program puts in its place may be of texts
    text = decode_text(data, "standard input") if isinstance(data, bytes) else data
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise GmaskError("standard input is empty: give a text")
    return lines


def read_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """The values of ``--set key=value``, as YAML reads them.

    Raises:
        GmaskError: no ``=``, or no YAML.
    """
    from gmask.config import parse_yaml

    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise GmaskError(f"--set {pair}: write it as key=value")
        try:
            values[key.strip()] = check_text(value) if key.strip() == "stop" else parse_yaml(value)
        except GmaskError as error:
            raise GmaskError(f"--set {pair}: the value cannot be read ({error})") from error
    return values


def merge_pairs(pairs: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """The values of ``--set``, and of the options that say the same under a name of their own; None: not given.

    Raises:
        GmaskError: a value that both give, for neither is the one that is meant.
    """
    values = read_pairs(pairs or [])
    for name, value in options.items():
        if value is None:
            continue
        if name in values:
            raise GmaskError(f"--{name.replace('_', '-')} and --set {name} say the same: give one of them")
        values[name] = value
    return values


def read_candidates(choice: str, *, option: str = "--choices") -> list[str]:
    """The candidates of ``--choices 'a|b'``."""
    candidates = check_text(choice, option).split("|")
    if not all(candidates):
        raise GmaskError(f"{option} {choice!r}: a candidate is empty; write them as 'sunny|rainy'")
    return candidates


def print_report(report: "FileReport", target: Path, *, deed: str) -> None:
    """Tells on standard error what became of a file."""
    resumed = f", {report.resumed} of them by an earlier run" if report.resumed else ""
    skipped = f'; {report.skipped} could not be {deed}, see their "error"' if report.skipped else ""
    print(f"{target}: {report.lines} lines{resumed}{skipped}", file=sys.stderr)


def refuse_unknown(model: str) -> NoReturn:
    """Raises `GmaskError`: a name that stands for no model."""
    raise GmaskError(f"{model}: no such folder, and no published model of that name; gmask info --zoo lists them")


def base_of(adapter: Path, otherwise: str) -> str:
    """The bundled model that an adapter was trained for; ``otherwise`` if that was another one."""
    from gmask.checkpoints.adapters import read_adapter

    named = read_adapter(adapter.expanduser()).values.get("base_model_name_or_path")
    return named if named in BUNDLED else otherwise


ANSWER_STYLE = "bold green"
CUT_STYLE = "bold yellow"
"""Of an answer that was cut at the limit on its tokens."""


def print_infilling(infilling: "Infilling") -> None:
    """Prints a filled text, or several alternatives, each behind its log-probability (of choices: its probability)."""
    ranked = [infilling, *infilling.alternatives]
    scores = [""] if len(ranked) == 1 else [f"{found.logprob:.3f}\t" for found in ranked]
    if infilling.choices and len(ranked) > 1:
        scores = [f"{found.probability:.4f}\t" for found in infilling.choices.combinations]
    for score, found in zip(scores, ranked, strict=False):
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.text import Text

            Console(highlight=False).print(Text(score, style="dim") + highlight(found), soft_wrap=True)
        else:
            print(score + found.text)


def highlight(infilling: "Infilling") -> "Text":
    """The filled text with its answers in colour."""
    from rich.text import Text

    text = Text(infilling.text)
    for blank in infilling.blanks:
        text.stylize(ANSWER_STYLE if blank.finished else CUT_STYLE, blank.start, blank.end)
    return text


def print_stream(pieces: Sequence[str], fragments: Generator["Fragment", None, "Infilling"]) -> None:
    """Prints a text on the terminal while its blanks are being filled.

    Args:
        pieces: what stands before, between and behind the blanks.
        fragments: as `stream_infill` gives them.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    told = 0
    for fragment in fragments:
        if fragment.blank >= told:  # the text up to this blank, over blanks whose answers left nothing to see
            console.out("".join(pieces[told : fragment.blank + 1]), end="", highlight=False)
            told = fragment.blank + 1
        console.print(Text(fragment.text, style=ANSWER_STYLE), end="", soft_wrap=True)
    console.out("".join(pieces[told:]), highlight=False)
