"""How does ``gmask evaluate`` start?"""

import json
import sys
import warnings
from dataclasses import asdict
from typing import Annotated

import typer

from gmask.cli.arguments import read_pairs
from gmask.cli.options import Adapter, AsJson, output_option
from gmask.errors import GmaskError


def evaluate(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A model folder, or bundled.")] = "bundled",
    task: Annotated[
        str | None,
        typer.Option(help="Measure a task, such as superglue/rte, or that of a YAML file.", show_default=False),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--data",
            "--corpus",
            help="With --task the file of its records, or a glob; else the folder of the texts.",
            show_default="the recipe's data.root",
        ),
    ] = None,
    adapter: Adapter = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="How a task's texts are written, such as max_tokens=128 or num_beams=4; once for each.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe that it was trained by.")] = "recipes/bundled.yaml",
    out: Annotated[
        str | None,
        output_option(
            "Folder for the figures, and the predictions of a task.",
            "--out",
            show_default="the model's; of a task, none",
        ),
    ] = None,
    card: Annotated[str | None, typer.Option(help="Write the model card to this file too.", show_default=False)] = None,
    hardware: Annotated[
        str | None, typer.Option(help="What it was trained on, in words, for the card.", show_default=False)
    ] = None,
    sentences: Annotated[int, typer.Option(help="Held-out sentences of each language.")] = 300,
    as_json: AsJson = False,
) -> None:
    """Measure a model: on held-out text, or on a task.

    On held-out text: losses, and blanks filled as the author did, beside n-gram baselines. On a task: its metrics,
    beside always choosing the most frequent label.
    """
    if task is not None:
        _evaluate_task(model, task, corpus, None if adapter is None else str(adapter), pairs or [], out, as_json)
        return
    if adapter is not None or pairs:
        raise GmaskError("--adapter and --set are for a task: name one with --task, such as superglue/rte")
    from gmask.evaluation import run

    written = run(
        model,
        recipe=recipe,
        data_root=corpus,
        out=out,
        card=card,
        hardware=hardware,
        sentences=sentences,
        tables=not as_json,
    )
    print(written.read_text(encoding="utf-8") if as_json else written)


def _evaluate_task(
    model: str,
    task: str,
    data: str | None,
    adapter: str | None,
    pairs: list[str],
    out: str | None,
    as_json: bool,
) -> None:
    if data is None:
        raise GmaskError("--task needs the records to measure: name their file with --data")
    from gmask.evaluation.tasks import run_task

    settings = read_pairs(pairs)
    with warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", message="of .* samples", category=UserWarning)
        report = run_task(model, task=task, data=data, adapter=adapter, out=out, settings=settings, tables=not as_json)
    for warning in told:
        print("gmask:", warning.message, file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
