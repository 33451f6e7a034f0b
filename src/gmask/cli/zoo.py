"""How do the published models look: as a table on a terminal, as tab-separated lines in a pipe, one by one?"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmask.checkpoints.catalog import Family

COLUMNS = (
    "name", "download", "parameters", "language", "objectives", "blanks", "tokenizer", "GB float32", "GB 16 bit",
    "GB quantized", "licence of the code", "licence of the weights",
)  # fmt: skip
NOTHING = "-"
README = "https://github.com/THUDM/GLM#pretrained-models"
"""Where the archives of the original checkpoints are linked."""


def print_zoo(families: "Sequence[Family]") -> None:
    """Prints the table on a terminal, and tab-separated lines elsewhere."""
    if not sys.stdout.isatty():
        for row in (COLUMNS, *map(table_row, families)):
            print("\t".join(row))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("name\ndownload", overflow="fold")
    for heading in ("parameters\nmemory", "language\ntokenizer", "objectives", "blanks"):
        table.add_column(heading, no_wrap=heading != "language\ntokenizer")
    table.add_column("licence of code\nand weights")
    for family in families:
        table.add_row(*terminal_row(family), end_section=True)
    Console(markup=False, highlight=False).print(table)


def table_row(family: "Family") -> tuple[str, ...]:
    """The cells of a row, in the order of `COLUMNS`."""
    gigabytes = {dtype: f"{family.memory(dtype) / 1e9:.1f}" for dtype in family.dtypes}
    quantized = [size for dtype, size in gigabytes.items() if dtype.startswith("int")]
    return (
        family.name,
        family.hub_names[0] if family.hub_names else str(family.archive),
        round_count(family.parameters),
        family.language,
        ", ".join(family.objectives),
        " ".join(family.masks),
        family.tokenizer,
        gigabytes.get("float32", NOTHING),
        gigabytes.get("bfloat16", NOTHING),
        *(quantized or [NOTHING]),
        family.code_licence,
        family.weights_licence,
    )


def terminal_row(family: "Family") -> tuple[str, ...]:
    """The same, narrow enough for a terminal: several lines a cell."""
    row = dict(zip(COLUMNS, table_row(family), strict=True))
    memory = [
        f"{row[column]} GB {column.removeprefix('GB ')}"
        for column in COLUMNS
        if column.startswith("GB ") and row[column] != NOTHING
    ]
    return (
        f"{row['name']}\n{row['download']}",
        "\n".join([row["parameters"], *memory]),
        f"{row['language']}\n{row['tokenizer']}",
        "\n".join(family.objectives),
        "\n".join(family.masks),
        f"{family.code_licence}\n{family.weights_licence}",
    )


def describe_family(family: "Family") -> dict[str, Any]:
    """All that the catalog says about a model, and how to get it."""
    return {
        "name": family.name,
        "hub_names": list(family.hub_names),
        "parameters": family.parameters,
        "language": family.language,
        "corpus": family.corpus,
        "objectives": list(family.objectives),
        "blanks": list(family.masks),
        "tokenizer": family.tokenizer,
        "shape": {
            "layers": family.layers,
            "hidden_size": family.hidden_size,
            "attention_heads": family.heads,
            "positions": family.positions,
            "vocabulary": family.vocab_size,
        },
        "special_ids": {role.removesuffix("_token_id"): token_id for role, token_id in family.special_ids.items()},
        "memory_bytes": {dtype: family.memory(dtype) for dtype in family.dtypes},
        "licence": {"code": family.code_licence, "weights": family.weights_licence},
        "to_get_it": tell_how_to_get(family),
    }


def tell_how_to_get(family: "Family") -> str:
    """One sentence: the command that downloads a model, or where its archive is linked."""
    if family.hub_names:
        dtype = family.dtypes[0] if family.bits else family.stored_dtype
        size = f" ({family.memory(dtype) / 1e9:.1f} GB)" if dtype else ""
        is_chat = family.architecture == "chatglm"
        verb, text = ("chat", "") if is_chat else ("infill", " '... [MASK] ...'")
        return f"gmask fetches it{size} when you name it: gmask {verb} --model {family.hub_names[0]}{text}"
    if family.architecture == "chatglm":
        return f"{family.archive}: git clone it, check one of March 2023 out, and name the folder"
    return (
        f"not on a hub; {family.archive} is linked from {README}: unpack it, then"
        f" gmask convert FOLDER NEW-FOLDER --like {family.name} --tokenizer VOCABULARY-FOLDER"
    )


def round_count(count: int) -> str:
    """109338624 as 109 M, 9880682496 as 9.88 B."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
