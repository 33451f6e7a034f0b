"""The recipe of GRPO and RLOO: YAML into typed settings. Sections that PPO has too are those of its recipe."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gmask.config import Count, Positive, check_fields, field_names, load_tree
from gmask.errors import GmaskError
from gmask.recipes.feedback import METHODS_OF_STAGES, REFUSED_OPTIONS
from gmask.recipes.ppo import PPOOptimizationSettings, PPORewardSettings, RolloutRecipe, RolloutSettings, check_prompts
from gmask.recipes.tuning import (
    MethodSettings,
    ModelSettings,
    TuningDataSettings,
    TuningRunSettings,
    build_recipe,
)

Algorithm = Literal["grpo", "rloo"]
"""An answer's advantage comes from the other answers to its prompt, without a critic. Source: grpo: Shao et al.,
"DeepSeekMath", 2024; rloo: Ahmadian et al., "Back to Basics: Revisiting REINFORCE-Style Optimization", 2024."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """How a rollout is learnt from."""

    algorithm: Algorithm = "grpo"
    minibatches: Count = 1  # steps of the optimizer that share a rollout; trl.num_iterations repeats them
    limit: Positive | None = 50.0  # nats an answer from the reference, on average: beyond it the run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPORecipe(RolloutRecipe):
    """A run of GRPO or RLOO. ``data.max_target`` is the most tokens of a sampled answer."""

    run: TuningRunSettings
    model: ModelSettings
    task: str | dict[str, Any]  # of the kind chat, seq2seq or infill with one blank; its answers may be absent
    data: TuningDataSettings
    reward: PPORewardSettings
    rollout: RolloutSettings
    grpo: GroupSettings
    method: MethodSettings
    optimization: PPOOptimizationSettings
    trl: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of TRL's GRPOConfig or RLOOConfig

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def minibatches(self) -> int:
        return self.grpo.minibatches


GROUPED = "answers are drawn from the whole distribution that is scored: set rollout.temperature alone"
REFUSED: Mapping[str, str] = {
    **REFUSED_OPTIONS,
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"), GROUPED),
    "temperature": "set rollout.temperature instead", "num_generations": "set rollout.answers instead",
    "num_generations_eval": "validations are greedy: leave it out",
    "max_completion_length": "set data.max_target instead",
    "generation_batch_size": "set rollout.prompts and rollout.answers instead",
    "steps_per_generation": "set grpo.minibatches instead",
    "shuffle_dataset": "the prompts come in the order of the seed",
    "cache_implementation": "gmask's own stepper writes the answers", "chat_template_kwargs": "gmask makes the ids",
    "pad_to_multiple_of": "gmask makes the ids", "remove_unused_columns": "the columns are gmask's own",
    "reward_weights": "set reward.function_weight and reward.model_weight instead",
    "reward_clip_range": "set reward.clip instead", "trust_remote_code": "no code of a model is ever run",
    "use_transformers_paged": "it reads a context in one direction",
    "transformers_continuous_batching_config": "it reads a context in one direction",
    "cast_lm_head_to_fp32": "set optimization.dtype instead",
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), REFUSED_OPTIONS["sync_ref_model"]),
}  # fmt: skip
"""Options of TRL that would change what a prefix LM reads or draws, or that have a key of their own."""


def load_grpo_recipe(path: Path | str, overrides: Sequence[str] = ()) -> GRPORecipe:
    """Reads a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, not YAML, an unknown key (the nearest one is named), a missing one, settings that
            exclude each other.
    """
    return read_grpo_recipe(load_tree(path, overrides, field_names(GRPORecipe)))


def read_grpo_recipe(tree: Mapping[str, Any]) -> GRPORecipe:
    """The recipe of a tree of plain values, checked."""
    recipe = build_recipe(GRPORecipe, tree)
    check_prompts(recipe.reward, recipe.data)
    methods = METHODS_OF_STAGES["grpo"]
    if recipe.method.name not in methods:
        raise GmaskError(f"method.name is {recipe.method.name}: grpo takes {', '.join(methods)}")
    if recipe.model.adapter is not None:
        raise GmaskError(
            "model.adapter: the reference would be the model without it; merge it first (gmask merge), and name the "
            "merged folder"
        )
    if recipe.model.initialization == "random":
        raise GmaskError("model.initialization is random: there is nothing that rewards could improve")
    if recipe.rollout.answers < 2:
        raise GmaskError("rollout.answers is 1: an answer is compared with the others to its prompt, so give 2 or more")
    if recipe.optimization.average is not None:
        raise GmaskError("optimization.average has an effect on `gmask ppo` alone: leave it out")
    for key in recipe.trl:
        if key in REFUSED or key.startswith("vllm_"):
            raise GmaskError(f"trl.{key}: {REFUSED.get(key, REFUSED['use_vllm'])}")
    return recipe
