"""The recipe of learning from human feedback: a reward model, DPO or KTO; YAML into typed settings."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gmask.config import (
    Count,
    NotNegative,
    Part,
    Size,
    check_fields,
    field_names,
    load_tree,
)
from gmask.errors import GmaskError
from gmask.recipes.tuning import (
    ForgettingSettings,
    MethodSettings,
    ModelSettings,
    RunRecipe,
    TuningDataSettings,
    TuningOptimizationSettings,
    TuningRecipe,
    TuningRunSettings,
    build_recipe,
    check_run_length,
)
from gmask.tasks.preferences import Pairing

Stage = Literal["reward", "dpo", "kto"]
"""What is learnt from preferences. Source: reward: Ouyang et al., "Training language models to follow instructions with
human feedback", 2022; dpo: Rafailov et al., "Direct Preference Optimization", 2023; kto: Ethayarajh et al., 2024."""

RewardLoss = Literal["last-token", "per-token"]
"""Compared are the rewards of the last tokens; or those of every token from the first that differs, as published in
sunzeyeah/RLHF, which a critic that is not trained needs. There, the loss also ran over the padding of the shorter
answer; here, its last reward is held."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackDataSettings:
    """The preferences, and how long their prompts and answers may be."""

    train: str  # a file or a glob
    validation: str | Part | None = None  # files, or a share of the prompts of `train`
    root: str = "."  # what the paths are relative to
    limit: Count | None = None  # records of each of the two
    validation_limit: Count | None = None  # pairs of the validations during the run
    max_source: Size = 384  # tokens of a prompt
    max_target: Size = 128  # tokens of an answer, with its end
    long_answers: Literal["drop", "cut"] = "drop"  # beyond max_target; one that is cut has no end
    pairs: Pairing = "all"  # of ranking lists
    margins: bool = False  # whether a pair's rewards have to differ by its margin

    def resolve(self, pattern: str) -> str:
        """A path under ``root``."""
        return str(Path(self.root) / pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """The loss of a reward model."""

    loss: RewardLoss = "last-token"
    center: NotNegative = 0.0  # times the square of the sum of a pair's rewards, which keeps them near 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackRecipe(RunRecipe):
    """A run that learns from preferences, as data."""

    run: TuningRunSettings
    model: ModelSettings
    data: FeedbackDataSettings
    method: MethodSettings
    optimization: TuningOptimizationSettings
    reward: RewardSettings = dataclasses.field(default_factory=RewardSettings)
    trl: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of TRL's DPOConfig or KTOConfig

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def tuning(self) -> TuningRecipe:
        data = self.data
        return TuningRecipe(
            run=self.run,
            model=self.model,
            task="chat/trl",
            data=TuningDataSettings(train=data.train, max_source=data.max_source, max_target=data.max_target),
            method=self.method,
            optimization=self.optimization,
            forgetting=ForgettingSettings(skip=True),
        )


METHODS_OF_STAGES: Mapping[Stage | Literal["grpo"], tuple[str, ...]] = {
    "reward": ("full", "frozen-embeddings", "lora", "dora", "ia3", "qlora"),
    "dpo": ("full", "lora", "dora", "qlora"),
    "kto": ("full", "lora", "dora", "qlora"),
    "grpo": ("full", "lora", "dora", "qlora"),
}
"""Those of which the reference is known: the model as it was, or the one without its adapter."""

REFUSED_OPTIONS = {
    "packing": "rows are not packed here", "packing_strategy": "wrapped cuts samples, and sends no restarts",
    "padding_free": "TRL has none at present", "max_length": "set data.max_source and data.max_target instead",
    "truncation_mode": "set data.long_answers instead", "use_vllm": "vLLM runs a prefix LM as a causal one",
    "use_transformers_continuous_batching": "it reads a context in one direction",
    "use_liger_kernel": "it replaces the forward pass", "model_init_kwargs": "set the keys of model instead",
    "sync_ref_model": "the reference of a run is the model that it began with",
}  # fmt: skip
"""Options of TRL that would change what a prefix LM reads, with the reason."""


def load_feedback_recipe(path: Path | str, stage: Stage, overrides: Sequence[str] = ()) -> FeedbackRecipe:
    """Reads a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, not YAML, an unknown key (the nearest one is named), settings that exclude each other
            or do not belong to the stage.
    """
    return read_feedback_recipe(load_tree(path, overrides, field_names(FeedbackRecipe)), stage)


def read_feedback_recipe(tree: Mapping[str, Any], stage: Stage) -> FeedbackRecipe:
    """The recipe of a tree of plain values, checked."""
    recipe = build_recipe(FeedbackRecipe, tree)
    optimization, method = recipe.optimization, recipe.method.name
    if method not in METHODS_OF_STAGES[stage]:
        raise GmaskError(f"method.name is {method}: {stage} takes {', '.join(METHODS_OF_STAGES[stage])}")
    check_run_length(optimization, validates=recipe.data.validation is not None)
    if recipe.model.initialization == "random":
        raise GmaskError("model.initialization is random: there is nothing that preferences could improve")
    if stage == "reward" and recipe.trl:
        raise GmaskError("trl has options of DPO and KTO: a reward model is trained by gmask's own loop; take it out")
    if stage != "reward" and recipe.reward != RewardSettings():
        raise GmaskError(f"reward belongs to `gmask reward`, not to {stage}: take it out")
    if stage != "reward" and recipe.model.adapter is not None:
        raise GmaskError(
            "model.adapter: the reference would be the model without it; merge it first (gmask merge), and name the "
            "merged folder"
        )
    alone = {
        "data.margins": recipe.data.margins,
        "optimization.early_stop": optimization.early_stop,
        "optimization.length_grouped": optimization.length_grouped,
    }
    for key, value in alone.items():
        if stage != "reward" and value:
            raise GmaskError(f"{key} has an effect on `gmask reward` alone: leave it out")
    for section, options in (("trl", recipe.trl), ("optimization.trainer", optimization.trainer)):
        for key in options:
            if key in REFUSED_OPTIONS:
                raise GmaskError(f"{section}.{key}: {REFUSED_OPTIONS[key]}")
    return recipe
