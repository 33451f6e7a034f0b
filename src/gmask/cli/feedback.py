"""``gmask sft``, ``reward``, ``dpo``, ``kto``, ``grpo``, ``ppo`` and ``pipeline``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from gmask.cli.options import AsJson, Resume, overrides_argument, recipe_argument
from gmask.cli.training import run_and_print

FeedbackRecipeFile = Annotated[str, recipe_argument("model, data, method, optimization")]
RewardedRecipeFile = Annotated[str, recipe_argument("model, task, data, reward")]
Overrides = Annotated[list[str] | None, overrides_argument("optimization.steps=200")]


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
    recipe: RewardedRecipeFile,
    overrides: Annotated[list[str] | None, overrides_argument("grpo.algorithm=rloo")] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train a model by rewards of groups of its answers (GRPO, RLOO). A stopped run goes on with the same command."""
    from gmask.training.grpo import run_grpo

    _run(lambda: run_grpo(recipe, overrides or [], resume=resume), as_json)


def ppo(
    recipe: RewardedRecipeFile,
    overrides: Annotated[list[str] | None, overrides_argument("optimization.rollouts=20")] = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Train a model by rewards of its own answers (PPO). A run that was stopped goes on with the same command."""
    from gmask.training.ppo import run_ppo

    _run(lambda: run_ppo(recipe, overrides or [], resume=resume), as_json)


def pipeline(
    recipe: Annotated[str, recipe_argument("run, stages, report")],
    overrides: Annotated[list[str] | None, overrides_argument("stages.dpo.optimization.steps=50")] = None,
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

    run_and_print(train, read_results, as_json=as_json)
