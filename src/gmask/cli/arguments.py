"""What do the texts, files and settings that were typed mean, in whichever verb?"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gmask.cli.options import BUNDLED
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.generation.lines import FileReport


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
            raise GmaskError(f"--set {pair}: write it as key=value")
        try:
            values[key.strip()] = value if key.strip() == "stop" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise GmaskError(f"--set {pair}: the value cannot be read") from error
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
    candidates = choice.split("|")
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
    from gmask.checkpoints.adapter_files import read_adapter

    named = read_adapter(adapter.expanduser()).values.get("base_model_name_or_path")
    return named if named in BUNDLED else otherwise
