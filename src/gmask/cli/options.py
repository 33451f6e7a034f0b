"""Which options do several verbs have in common?"""

from pathlib import Path
from typing import Annotated

import typer

BUNDLED = ("bundled", "bundled-chat")
"""The models that come with gmask; their names without the import of what loads them."""

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
        metavar="float32|bfloat16|float16",
        help="Precision of the weights, or of what is not quantized.",
        show_default="on a CPU float32, or bfloat16 beyond 3 billion parameters; else as stored",
    ),
]
Source = Annotated[Path | None, typer.Option("--input", help='File of texts: .jsonl with a "text", or one a line.')]
SkipBadLines = Annotated[bool, typer.Option("--skip-bad-lines", help="Go on after a line that cannot be used.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object for each text.")]
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
