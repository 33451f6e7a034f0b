"""``gmask sft``, ``reward``, ``dpo``, ``kto``, ``grpo`` and ``pipeline``."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gmask.cli.options import AsJson, Resume
from gmask.cli.printing import print_json

FeedbackRecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file: model, data, method, optimization.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values to change, such as optimization.steps=200.", show_default=False),
]


def sft(
    recipe: FeedbackRecipeFile, overrides: Overrides = None, resume: Resume = True, as_json: AsJson = False
) -> None:
    """Tune a model on answers: finetune with the columns of TRL (prompt and completion, or messages)."""
    from gmask.training.finetune import run_finetuning

    _run(lambda: run_finetuning(recipe, ["task=chat/trl", *(overrides or [])], resume=resume), as_json)


def reward(
    recipe: FeedbackRecipeFile, overrides: Overrides = None, resume: Resume = True, as_json: AsJson = False
) -> None:
    """Train a reward model on preferences. A run that was stopped goes on with the same command."""
    from gmask.training.reward import run_reward

    _run(lambda: run_reward(recipe, overrides or [], resume=resume), as_json)


def dpo(
    recipe: FeedbackRecipeFile, overrides: Overrides = None, resume: Resume = True, as_json: AsJson = False
) -> None:
    """Tune a model on preferences directly (DPO). A run that was stopped goes on with the same command."""
    from gmask.training.preference_tuning import run_preference_tuning

    _run(lambda: run_preference_tuning(recipe, "dpo", overrides or [], resume=resume), as_json)


def kto(
    recipe: FeedbackRecipeFile, overrides: Overrides = None, resume: Resume = True, as_json: AsJson = False
) -> None:
    """Tune a model on answers that are good or bad (KTO). A run that was stopped goes on with the same command."""
    from gmask.training.preference_tuning import run_preference_tuning

    _run(lambda: run_preference_tuning(recipe, "kto", overrides or [], resume=resume), as_json)


def grpo(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file: model, task, data, reward.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values to change, such as grpo.algorithm=rloo.", show_default=False),
    ] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train a model by rewards of groups of its answers (GRPO, RLOO). A stopped run goes on with the same command."""
    from gmask.training.grpo import run_grpo

    _run(lambda: run_grpo(recipe, overrides or [], resume=resume), as_json)


def pipeline(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file: run, stages, report.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values to change, such as stages.dpo.optimization.steps=50.", show_default=False
        ),
    ] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Run stages one after the other (sft, reward, dpo, kto, grpo, ppo), and compare the models that they make.

    A pipeline that was stopped goes on with the same command.
    """
    from gmask.training.pipeline import run_pipeline

    _run(lambda: run_pipeline(recipe, overrides or [], resume=resume), as_json)


def _run(train: Callable[[], Path], as_json: bool) -> None:
    from gmask.training.finetune import read_results

    with contextlib.redirect_stdout(sys.stderr):  # transformers' Trainer prints its log on standard output
        folder = train()
    if os.environ.get("RANK", "0") != "0":  # of several processes only the first one prints
        return
    if as_json:
        print_json({"folder": str(folder), **read_results(folder)})
    else:
        print(folder)
