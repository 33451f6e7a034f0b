"""Which options do several verbs have in common?"""

from pathlib import Path
from typing import Annotated, Any

import typer

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
