"""Options that several verbs share, and functions that read their values."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.startup import quick_start
from gmask.cores import share_cores
from gmask.errors import GmaskError
from gmask.files import check_text, decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gmask.checkpoints.zoo import Family
    from gmask.tokenizers.glm import GLMTokenizer


BUNDLED_NAMES = ("bundled", "bundled-chat")
"""The models that come with gmask. The names are here, since importing `gmask.checkpoints.load` takes long."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that other machines cannot reach."""

DTYPE_NAMES = "float32|bfloat16|float16"


def output_option(help: str, *aliases: str, show_default: bool | str = False) -> Any:
    """Makes the option ``--output``, with a help text of its own for each verb."""
    return typer.Option("--output", *aliases, "-o", help=help, show_default=show_default)


def recipe_argument(sections: str) -> Any:
    """Makes the argument RECIPE of a verb that trains; ``sections``: the first ones of its YAML file."""
    return typer.Argument(metavar="RECIPE", help=f"YAML file: {sections}.")


def overrides_argument(example: str) -> Any:
    """Makes the arguments KEY=VALUE behind a recipe."""
    return typer.Argument(metavar="KEY=VALUE", help=f"Values to change, such as {example}.", show_default=False)


ModelName = Annotated[
    str, typer.Option("--model", "-m", help="Folder or name of a model, or bundled, or bundled-chat.")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="int8|int4",
        help="Keep the weights as integers, which takes less memory; those of a quantized folder are read as they are.",
        show_default="as in the folder",
    ),
]

AdapterFolder = Annotated[
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

KVCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="int8",
        help="Form of keys and values while answers are written: int8 takes half the memory of bfloat16.",
        show_default="that of the activations",
    ),
]

WrittenDtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar=DTYPE_NAMES, help="What the weights become.", show_default="as they are stored"),
]

InputFile = Annotated[Path | None, typer.Option("--input", help='File of texts: .jsonl with a "text", or one a line.')]
SkipBadLines = Annotated[bool, typer.Option("--skip-bad-lines", help="Go on after a line that cannot be used.")]
OutputFile = Annotated[Path | None, output_option("Where the results of --input go, as .jsonl.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is at TARGET.")]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint of the run, if it has one.")]
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
    """Returns the files of ``--input`` and ``--output``; None if both are absent.

    Raises:
        GmaskError: one without the other, or texts beside them.
    """
    if source is None and target is None:
        return None
    if source is None or target is None:
        raise GmaskError("--input and --output go together: name the file of texts and the file of results")
    if texts:
        raise GmaskError("give texts or --input, not both")
    return source, target


def texts_or_stdin(texts: list[str] | None) -> list[str]:
    """Returns the texts of the command line, else the lines of standard input.

    Raises:
        GmaskError: there are none, or they are not UTF-8.
    """
    if texts:
        return [read_typed(text) for text in texts]
    if sys.stdin.isatty():
        raise GmaskError("there is no text: give one, or --input")
    data = getattr(sys.stdin, "buffer", sys.stdin).read()  # a program may replace stdin by one of texts
    text = decode_text(data, "standard input") if isinstance(data, bytes) else data
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise GmaskError("standard input is empty: give a text")
    return lines


def read_typed(text: str, name: str = "the text") -> str:
    """A text of the command line. Bytes that the locale could not read, such as C's, are read as UTF-8.

    Raises:
        GmaskError: they are not UTF-8.
    """
    with contextlib.suppress(UnicodeError):
        text = os.fsencode(text).decode()
    return check_text(text, name)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Returns the values of ``--set key=value``, as YAML reads them.

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
            values[key.strip()] = read_typed(value) if key.strip() == "stop" else parse_yaml(value)
        except GmaskError as error:
            raise GmaskError(f"--set {pair}: the value cannot be read ({error})") from error
    return values


def merge_settings(pairs: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """Returns the values of ``--set`` together with those of single options, such as ``--max-tokens``.

    Args:
        options: by name; None if an option is not given.

    Raises:
        GmaskError: a setting that is given in both ways.
    """
    values = parse_settings(pairs or [])
    for name, value in options.items():
        if value is None:
            continue
        if name in values:
            raise GmaskError(f"--{name.replace('_', '-')} and --set {name} say the same: give one of them")
        values[name] = value
    return values


def read_candidates(choice: str, *, option: str = "--choices") -> list[str]:
    """Returns the candidates of ``--choices 'a|b'``."""
    candidates = read_typed(choice, option).split("|")
    if not all(candidates):
        raise GmaskError(f"{option} {choice!r}: a candidate is empty; write them as 'sunny|rainy'")
    return candidates


def find_source(name: str) -> "tuple[str | None, Family | None]":
    """Looks up a model without fetching it.

    Args:
        name: of a folder, a bundled model, or a published one, which need not be on this machine.

    Returns:
        A name for `find_folder`, None for a published model that was never fetched; and the model's row in the table of
        published models, None if it has none.

    Raises:
        GmaskError: an unknown name.
    """
    from gmask.checkpoints.hub import find_cached
    from gmask.checkpoints.zoo import find_family

    if name in BUNDLED_NAMES or Path(name).expanduser().exists():
        return name, None
    family = find_family(name)
    cached = find_cached(family.hub_names[0] if family and family.hub_names else name)
    if family is None and cached is None:
        raise GmaskError(f"{name}: no such folder, and no published model of that name; gmask info --zoo lists them")
    return str(cached) if cached else None, family


def load_glm(
    model: str, adapter: Path | None, dtype: str | None, quantize: str | None, kv_cache: str | None = None
) -> "tuple[PreTrainedModel, GLMTokenizer]":
    """Loads the model of ``--model`` and the options that are named as the arguments. It has to be a GLM."""
    from gmask.checkpoints.hub import check_name

    check_name(model)  # before torch is imported, which takes seconds
    share_cores()
    with quick_start(adapter is None):  # PEFT needs more of transformers
        from gmask.checkpoints.load import load
        from gmask.models.glm import GLMForConditionalGeneration

        return load(
            model,
            dtype=dtype,
            quantize=quantize,
            adapter=adapter,
            kv_cache=kv_cache,
            model_class=GLMForConditionalGeneration,
        )


def base_of(adapter: Path, otherwise: str) -> str:
    """Returns the bundled model that an adapter was trained for; ``otherwise`` if it was another model."""
    from gmask.checkpoints.adapters import read_adapter

    named = read_adapter(adapter.expanduser()).values.get("base_model_name_or_path")
    return named if named in BUNDLED_NAMES else otherwise
