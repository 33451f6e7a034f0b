"""The recipe of a PPO run: YAML into typed settings. Sections that fine-tuning has too are those of its recipe."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from gmask.config import (
    Count,
    NotNegative,
    Part,
    PassSize,
    Positive,
    Range,
    Rate,
    Steps,
    Weight,
    field_names,
    load_tree,
)
from gmask.errors import GmaskError
from gmask.recipes.pretraining import Precision, base_name
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
)

MOST_ANSWERS = 10**5
"""The limit of the answers of a rollout."""

UpToOne = Annotated[float, Range(0, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPORewardSettings:
    """What an answer is worth: a function of texts, a reward model, or the weighted sum of both."""

    function: str | None = None  # module:function, beside the recipe or where Python finds it
    function_weight: Weight = 1.0
    model: str | None = None  # the folder or name of a reward model, or of what its adapter was trained on
    adapter: str | None = None  # that gmask reward wrote, to make a reward model of `model`
    model_weight: Weight = 1.0
    clip: Positive | None = 5.0  # scores are cut to this range on both sides, as published
    cut: Weight | None = None  # the score of an answer that was cut at data.max_target; by default its own

    def portable(self) -> Self:
        """The settings without the folders of one machine."""
        model, adapter = (None if name is None else base_name(name) for name in (self.model, self.adapter))
        return dataclasses.replace(self, model=model, adapter=adapter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """The answers that are sampled before each update. They are drawn from the whole distribution that is scored."""

    prompts: Annotated[int, Range(1, 10**4)] = 64
    answers: Annotated[int, Range(1, 1000)] = 4  # to each prompt
    temperature: Positive = 1.0
    rows: Annotated[int, Range(1, 10**4)] = 256  # answers that are written side by side


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLSettings:
    """How the policy is kept near its reference, and when it has gone too far; in nats."""

    weight: NotNegative = 0.05  # of the divergence in the reward of each token; 0: no reference is kept
    kind: Literal["fixed", "adaptive"] = "fixed"
    target: Positive = 6.0  # of an answer; adaptive
    horizon: Count = 10_000  # answers in which an adaptive weight may double or so
    limit: Positive | None = 50.0  # of an answer, on average: beyond it the run stops
    early_stop: Positive | None = None  # of a token, from the policy that sampled: beyond it a rollout is left


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """The updates after each rollout."""

    epochs: Annotated[int, Range(1, 1000)] = 2  # passes over the answers
    minibatches: Count = 4  # steps of the optimizer in each of them
    discount: UpToOne = 1.0  # gamma
    trace: UpToOne = 0.95  # lambda of the generalized advantage estimate
    whiten: bool = True  # advantages of a rollout to mean 0 and deviation 1
    clip: Positive = 0.2  # of the ratio of probabilities
    value_clip: Positive | None = 0.2  # of the change of a value
    value_weight: NotNegative = 0.2
    entropy_weight: NotNegative = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """What estimates the values.

    shared: a head on the policy's own states, into which its gradients flow. head: one whose gradients do not. own: a
    copy of the model, with a head. joint: a copy of the reward model with its head, trained beside the policy, as
    published. frozen: the reward model's value of each token, untrained, as published.
    """

    kind: Literal["shared", "head", "own", "joint", "frozen"] = "shared"
    method: MethodSettings | None = None  # which weights of own and joint train; by default all
    rate: Positive = 1.0  # factor of the learning rate of what the policy does not share


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixSettings:
    """Samples with answers, whose loss is added to that of each step, so that less is forgotten (ptx)."""

    train: str  # files, under data.root
    task: str | dict[str, Any] | None = None  # by default that of the prompts
    weight: Positive = 1.0
    batch_size: PassSize = 8  # samples of a step


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOOptimizationSettings:
    """The optimizer and the length of the run, in rollouts."""

    rollouts: Steps
    batch_size: PassSize = 16  # answers of one forward and backward pass
    learning_rate: Rate = 1e-5
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    warmup: NotNegative = 0.0  # rollouts, or below 1 a share of them
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 1.0
    dtype: Precision | None = None
    gradient_checkpointing: bool = False
    average: Part | None = None  # the decay of a moving average of the weights, such as 0.992; written beside them
    evaluate_every: Count | None = None  # rollouts; by default a tenth of the run
    save_every: Count = 10  # rollouts
    keep_last: Count = 2  # checkpoints
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)


class RolloutRecipe(RunRecipe):
    """What the recipes of runs that learn from rewarded answers have in common; a base of dataclasses."""

    task: str | dict[str, Any]
    data: TuningDataSettings
    reward: PPORewardSettings
    rollout: RolloutSettings
    optimization: PPOOptimizationSettings

    @property
    def answers(self) -> int:
        """The answers of a rollout."""
        return self.rollout.prompts * self.rollout.answers

    @property
    def minibatches(self) -> int:
        """The steps of the optimizer that share the answers of a rollout."""
        raise NotImplementedError

    @property
    def tuning(self) -> TuningRecipe:
        """The recipe of a fine-tuning run with the same model, method and optimizer; its steps are the rollouts."""
        shared = {field.name for field in dataclasses.fields(TuningOptimizationSettings)}
        values = {name: value for name, value in vars(self.optimization).items() if name in shared}
        values["accumulation"] = -(-(self.answers // self.minibatches) // self.optimization.batch_size)
        return TuningRecipe(
            run=self.run,
            model=self.model,
            task=self.task,
            data=self.data,
            method=self.method,
            optimization=TuningOptimizationSettings(steps=self.optimization.rollouts, **values),
            forgetting=ForgettingSettings(skip=True),
        )

    def portable(self) -> Self:
        return dataclasses.replace(super().portable(), reward=self.reward.portable())  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPORecipe(RolloutRecipe):
    """A PPO run. ``data.max_target`` is the most tokens of a sampled answer."""

    run: TuningRunSettings
    model: ModelSettings
    task: str | dict[str, Any]  # of the kind chat, seq2seq or infill with one blank; its answers may be absent
    data: TuningDataSettings
    reward: PPORewardSettings
    rollout: RolloutSettings
    kl: KLSettings
    ppo: UpdateSettings
    critic: CriticSettings
    method: MethodSettings
    optimization: PPOOptimizationSettings
    mix: MixSettings | None = None

    @property
    def minibatches(self) -> int:
        return self.ppo.minibatches


def load_ppo_recipe(path: Path | str, overrides: Sequence[str] = ()) -> PPORecipe:
    """Reads a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, not YAML, an unknown key (the nearest one is named), a missing one, settings that
            exclude each other.
    """
    return read_ppo_recipe(load_tree(path, overrides, field_names(PPORecipe)))


def read_ppo_recipe(tree: Mapping[str, Any]) -> PPORecipe:
    """The recipe of a tree of plain values, checked."""
    recipe = build_recipe(PPORecipe, tree)
    reward, data, method = recipe.reward, recipe.data, recipe.method
    check_prompts(reward, data)
    if reward.model is None and recipe.critic.kind in ("joint", "frozen"):
        raise GmaskError(f"critic.kind {recipe.critic.kind} is made of reward.model, which is not set: take shared")
    if recipe.critic.method is not None and recipe.critic.kind not in ("own", "joint"):
        raise GmaskError(f"critic.method is of a critic of its own: with {recipe.critic.kind} leave it out")
    if recipe.answers > MOST_ANSWERS:
        raise GmaskError(
            f"a rollout has {recipe.answers} answers (rollout.prompts x rollout.answers): at most {MOST_ANSWERS} are "
            "held in memory"
        )
    if recipe.rollout.rows < recipe.rollout.answers:
        raise GmaskError(
            f"rollout.rows is {recipe.rollout.rows}: the {recipe.rollout.answers} answers to a prompt are written side "
            "by side, so give at least as many"
        )
    if recipe.answers % recipe.ppo.minibatches:
        raise GmaskError(
            f"a rollout has {recipe.answers} answers (rollout.prompts x rollout.answers), which "
            f"{recipe.ppo.minibatches} minibatches cannot share evenly: change one of them"
        )
    if method.name in ("adalora", "p-tuning") or (recipe.critic.method and recipe.critic.method.name != "lora"):
        wrong = "adalora and p-tuning" if recipe.critic.method is None else "methods other than lora in critic.method"
        raise GmaskError(f"{wrong} are not for ppo: take lora, or full")
    return recipe


def check_prompts(reward: PPORewardSettings, data: TuningDataSettings) -> None:
    """Raises `GmaskError` if nothing is rewarded, or for settings of samples with answers."""
    if reward.function is None and reward.model is None:
        raise GmaskError("reward: name a function (module:function), or a reward model")
    if reward.model is None and reward.adapter is not None:
        raise GmaskError("reward.adapter goes with reward.model, the model that it was trained on: name both")
    for key in ("packing", "folds", "fold", "test"):
        if getattr(data, key) is not None:
            raise GmaskError(f"data.{key} is for fine-tuning: leave it out")
