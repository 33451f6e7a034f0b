"""``gmask prepare``, ``pretrain``, ``finetune``, ``train-tokenizer``, and how every training verb runs and prints."""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.options import AsJson, Resume, output_option, overrides_argument, recipe_argument
from gmask.cli.printing import print_json
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.recipes.pretraining import TokenizerSettings
    from gmask.tasks.records import Source


def prepare(
    recipe: Annotated[str, recipe_argument("texts, tokenizer, filters, duplicates, decontamination")],
    overrides: Annotated[list[str] | None, overrides_argument("run.processes=8")] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Filter, deduplicate and tokenize texts at scale. A run that was stopped goes on with the same command."""
    from gmask.corpus.preparation import describe_prepared, run_preparation

    run_and_print(lambda: run_preparation(recipe, overrides or [], resume=resume), describe_prepared, as_json=as_json)


def pretrain(
    recipe: Annotated[str, recipe_argument("texts, model, objective, optimization")],
    overrides: Annotated[list[str] | None, overrides_argument("optimization.steps=8000")] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train a GLM from scratch. A run that was stopped goes on when the same command is given again."""
    from gmask.training.pretrain import describe_run, run_pretraining

    run_and_print(lambda: run_pretraining(recipe, overrides or [], resume=resume), describe_run, as_json=as_json)


def finetune(
    recipe: Annotated[str, recipe_argument("model, task, data, method, optimization")],
    overrides: Annotated[list[str] | None, overrides_argument("optimization.epochs=5")] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Tune a model to a task: LoRA, P-tuning or all weights. A run that was stopped goes on with the same command."""
    from gmask.training.finetune import read_results, run_finetuning

    run_and_print(lambda: run_finetuning(recipe, overrides or [], resume=resume), read_results, as_json=as_json)


def run_and_print(train: Callable[[], Path], read: Callable[[Path], dict[str, Any]], *, as_json: bool) -> None:
    """Trains, and prints the folder that ``train`` returns; as JSON with the figures that ``read`` finds in it."""
    with contextlib.redirect_stdout(sys.stderr):  # transformers' Trainer prints its log on standard output
        folder = train()
    if os.environ.get("RANK", "0") != "0":  # of several processes only the first one prints
        return
    if as_json:
        print_json({"folder": str(folder), **read(folder)})
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
