"""``gmask pretrain``, ``finetune``, ``ppo``, ``train-tokenizer`` and ``evaluate``."""

import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmask.cli.options import AdapterFolder, AsJson, Resume, output_option, parse_settings
from gmask.cli.printing import print_json
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.recipes.pretraining import TokenizerSettings
    from gmask.tasks.records import Source


def pretrain(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file: texts, model, objective, optimization.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values to change, such as optimization.steps=8000.", show_default=False
        ),
    ] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train a GLM from scratch. A run that was stopped goes on when the same command is given again."""
    from gmask.training.pretrain import describe_run, run_pretraining

    folder = run_pretraining(recipe, overrides or [], resume=resume)
    if as_json:
        print_json({"folder": str(folder), **describe_run(folder)})
    else:
        print(folder)


def finetune(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="YAML file: model, task, data, method, optimization.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values to change, such as optimization.epochs=5.", show_default=False
        ),
    ] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Tune a model to a task: LoRA, P-tuning or all weights. A run that was stopped goes on with the same command."""
    import os

    from gmask.training.finetune import read_results, run_finetuning

    folder = run_finetuning(recipe, overrides or [], resume=resume)
    if os.environ.get("RANK", "0") != "0":  # of several processes only the first one prints
        return
    if as_json:
        print_json({"folder": str(folder), **read_results(folder)})
    else:
        print(folder)


def ppo(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file: model, task, data, reward.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values to change, such as optimization.rollouts=20.", show_default=False
        ),
    ] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train a model by rewards of its own answers (PPO). A run that was stopped goes on with the same command."""
    import os

    from gmask.training.finetune import read_results
    from gmask.training.ppo import run_ppo

    folder = run_ppo(recipe, overrides or [], resume=resume)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json({"folder": str(folder), **read_results(folder)})
    else:
        print(folder)


def train_tokenizer(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Texts (.txt, .jsonl, .jsonl.zst; globs), or one recipe (.yaml)."),
    ],
    output: Annotated[Path, output_option("Folder for the tokenizer.", "--out")],
    vocab_size: Annotated[int | None, typer.Option(help="Tokens.", show_default="the recipe's, or 12288")] = None,
    sample_bytes: Annotated[int, typer.Option(help="Bytes of text to learn from.", min=1)] = 45_000_000,
    seed: Annotated[int, typer.Option(help="Of the sample.", min=0)] = 0,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Go on after lines that cannot be read.")
    ] = False,
) -> None:
    """Learn a bilingual BPE tokenizer with GLM's special tokens from texts, or from the texts of a recipe."""
    from gmask.config import check_fields
    from gmask.training.tokenizer import train_from_sources

    sources, settings = read_text_sources(files)
    if vocab_size is not None:
        settings = replace(settings, vocab_size=vocab_size)
        check_fields(settings)
    tokenizer = train_from_sources(
        sources,
        vocab_size=settings.vocab_size,
        alphabet_size=settings.alphabet_size,
        max_han_chars=settings.max_han_chars,
        out=output,
        sample_bytes=sample_bytes,
        seed=seed,
        skip_bad_lines=skip_bad_lines,
        progress=sys.stderr.isatty(),
    )
    print(f"{output}: {tokenizer.get_vocab_size()} tokens")


def read_text_sources(files: list[str]) -> tuple[list["Source"], "TokenizerSettings"]:
    """The texts to learn from, and the settings of the tokenizer: those of a recipe, or the defaults.

    Raises:
        GmaskError: a recipe among other files.
    """
    from gmask.recipes.pretraining import TokenizerSettings, load_recipe
    from gmask.tasks.records import Source

    recipes = [name for name in files if name.endswith((".yaml", ".yml"))]
    if not recipes:
        return [Source(name=name, train=name) for name in files], TokenizerSettings()
    if len(files) > 1:
        raise GmaskError(f"give text files or one recipe, not {recipes[0]} and others")
    recipe = load_recipe(recipes[0])
    return recipe.data.resolved_sources, recipe.tokenizer


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
    adapter: AdapterFolder = None,
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
    sentences: Annotated[int, typer.Option(help="Held-out sentences of each language.", min=1)] = 300,
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
    from gmask.checkpoints.hub import check_name

    check_name(model)  # before torch is imported, which takes seconds
    from gmask.evaluation.infilling import evaluate_held_out

    written = evaluate_held_out(
        model, recipe=recipe, data_root=corpus, out=out, sentences=sentences, tables=not as_json
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
    settings = parse_settings(pairs)
    from gmask.checkpoints.hub import check_name

    check_name(model)  # before torch is imported
    from gmask.evaluation.harness import run_task

    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="of .* samples", category=UserWarning)
        report = run_task(model, task=task, data=data, adapter=adapter, out=out, settings=settings, tables=not as_json)
    for warning in caught:
        print("gmask:", warning.message, file=sys.stderr)
    if as_json:
        print_json(asdict(report))
