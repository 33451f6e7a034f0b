"""How does ``gmask evaluate`` start?"""

from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A model folder, or bundled.")] = "bundled",
    recipe: Annotated[str, typer.Option(help="The recipe that it was trained by.")] = "recipes/bundled.yaml",
    corpus: Annotated[
        str | None, typer.Option(help="Folder of the texts.", show_default="the recipe's data.root")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--output", "--out", "-o", help="Folder for the figures.", show_default="the model's"),
    ] = None,
    card: Annotated[str | None, typer.Option(help="Write the model card to this file too.", show_default=False)] = None,
    hardware: Annotated[
        str | None, typer.Option(help="What it was trained on, in words, for the card.", show_default=False)
    ] = None,
    sentences: Annotated[int, typer.Option(help="Held-out sentences of each language.")] = 300,
    json_output: Annotated[bool, typer.Option("--json", help="Print evaluation.json instead of tables.")] = False,
) -> None:
    """Measure a model on held-out text: losses, and blanks filled as the author did, beside n-gram baselines."""
    from gmask.evaluation import run

    written = run(
        model,
        recipe=recipe,
        data_root=corpus,
        out=out,
        card=card,
        hardware=hardware,
        sentences=sentences,
        tables=not json_output,
    )
    print(written.read_text(encoding="utf-8") if json_output else written)
