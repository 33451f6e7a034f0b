"""The recipe of a fine-tuning run: YAML into typed settings; and the methods of tuning with their usual values."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from gmask.config import (
    Count,
    Fraction,
    NotEmpty,
    NotNegative,
    OneOf,
    Part,
    PassSize,
    Positive,
    Range,
    Rate,
    RunSeed,
    Size,
    Steps,
    Threads,
    Whole,
    build_settings,
    check_fields,
    field_names,
    load_tree,
    plain_values,
    to_yaml,
)
from gmask.errors import GmaskError
from gmask.hardware import DTYPES
from gmask.quantization.quantizer import NAMES as INTEGERS
from gmask.recipes.pretraining import Precision, base_name
from gmask.tasks.records import Truncation

FREE_KEYS = (
    "run.out", "run.device", "run.threads", "run.log_every", "data.root", "optimization.save_every",
    "optimization.keep_last",
)  # fmt: skip
"""Keys that may change when a run is resumed: its numbers do not depend on them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningRunSettings:
    """The folder, the seed and the device of a run."""

    out: str
    seed: RunSeed = 0
    device: str | None = None  # by default the best one
    threads: Threads | None = None  # by default as many as torch finds
    log_every: Count = 1  # steps
    deterministic: bool = False  # slower kernels on a GPU, which give the same bits each time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model that is tuned."""

    name: str = "bundled"  # or a folder, or the name of a published model
    dtype: Annotated[str, OneOf(("auto", *DTYPES))] | None = None  # of weights that do not train, as of `gmask.load`
    quantize: Annotated[str, OneOf(tuple(INTEGERS))] | None = None  # int8 | int4, of weights that do not train
    adapter: str | None = None  # the folder of one that is trained on
    initialization: Literal["pretrained", "random"] = "pretrained"  # random: a new model of the same shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningDataSettings:
    """The samples, and how long they may be."""

    train: str  # a file or a glob
    validation: str | Part | None = None  # files, or a share of `train`
    test: str | None = None
    root: str = "."  # what the paths are relative to
    limit: Count | None = None  # samples of each of the three
    validation_limit: Count | None = None  # samples of the validations during the run; see evaluate_every
    max_source: Size = 384  # tokens of a question
    max_target: Size = 128  # tokens of an answer
    truncation: Truncation = "left"  # of a question that is too long: before its blank, or at its end
    skip_bad_lines: bool = False  # count and leave out records that cannot be used; by default they are errors
    packing: Size | None = None  # tokens of a row that several samples share; by default each has its own
    folds: Annotated[int, Range(2, 10**6)] | None = None  # k-fold cross-validation on `train`
    fold: Count | None = None  # one of them, from 1; by default all, one after the other

    def resolve(self, pattern: str) -> str:
        """A path under ``root``."""
        return str(Path(self.root) / pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningOptimizationSettings:
    """The optimizer and its schedule. A step has ``batch_size * accumulation`` samples, in any number of processes."""

    epochs: Annotated[float, Range(above=0), Range(most=10**6)] | None = None  # passes over the samples; or:
    steps: Steps | None = None
    batch_size: PassSize = 8  # samples of one forward and backward pass
    accumulation: Size = 1  # passes of a step, in all processes together
    learning_rate: Rate | None = None  # at its peak; by default the usual one of the method
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # of the learning rate, to 0
    warmup: NotNegative = 0.0  # steps, or below 1 a share of them
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 1.0  # 0 clips nothing
    dtype: Precision | None = None  # of a pass; auto: bfloat16 if the device has it; the default on a GPU
    gradient_checkpointing: bool = False
    length_grouped: bool = False  # samples of similar length in a step
    evaluate_every: Count | None = None  # steps; by default a tenth of the run; with few samples, seldom in a short run
    save_every: Count | None = None  # steps; by default a tenth of the run, and 100 at the most
    keep_last: Count = 2  # checkpoints
    early_stop: Count | None = None  # evaluations in a row without a new best
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of transformers.TrainingArguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingSettings:
    """The texts and prompts that show what a chat model forgot; by default a set that comes with gmask."""

    texts: str | None = None  # .jsonl with a "text", or with a "prompt" and a "response"
    answers: Whole = 12  # prompts answered side by side
    skip: bool = False


Method = Literal[
    "full", "frozen-embeddings", "lora", "dora", "adalora", "ia3", "qlora", "p-tuning-v2", "p-tuning"
]  # fmt: skip
"""Source: lora: Hu et al., ICLR 2022; dora: Liu et al., ICML 2024; adalora: Zhang et al., ICLR 2023; ia3: Liu et al.,
NeurIPS 2022; qlora: Dettmers et al., NeurIPS 2023 (LoRA beside integers); p-tuning-v2: Liu et al., ACL 2022 (a prefix
before every layer); p-tuning: Liu et al., "GPT Understands, Too", 2021 (trained vectors in the text);
frozen-embeddings: the published Hugging Face class, where the word embeddings are a buffer."""

PromptNetwork = Literal["lstm", "mlp", "none"]

LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The linear layers of a block, in GLM and ChatGLM."""

Target = Annotated[str, OneOf((*LINEARS, "all-linear"))]
Targets = Annotated[tuple[Target, ...], NotEmpty()]


Rank = Annotated[int, Range(above=0), Range(most=1 << 13)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The method of tuning: which weights train, or which are added.

    Raises:
        GmaskError: an unknown method, a value out of range, or a setting of another method.
    """

    name: Method = "lora"
    rank: Rank = 8  # of the change of a weight; for adalora, the mean rank at the end
    alpha: Positive | None = None  # the change is scaled by alpha / rank; by default twice the rank
    dropout: Fraction = 0.0  # of the input of the change
    targets: Target | Targets = "query_key_value"  # linear layers of a block, or all-linear
    prefix_length: Rank = 128  # keys and values before each layer, as published
    projection: bool = False  # whether a network computes the prefix
    prompt_tokens: Rank = 8  # trained vectors in the text
    prompt_encoder: PromptNetwork = "lstm"  # the network that computes them

    def __post_init__(self) -> None:
        check_fields(self, "method")
        for field in dataclasses.fields(self):
            owners = OWNERS.get(field.name)
            if owners and self.name not in owners and getattr(self, field.name) != field.default:
                raise GmaskError(
                    f"method.{field.name} belongs to {_join_names(owners)}, not to {self.name}: leave it out"
                )

    @property
    def scale(self) -> float:
        """Alpha of the low-rank methods."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def layers(self) -> tuple[str, ...]:
        """The linear layers that ``targets`` names, each once."""
        names = (self.targets,) if isinstance(self.targets, str) else self.targets
        return LINEARS if "all-linear" in names else tuple(dict.fromkeys(names))

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        """The linear layers of a block that the method wraps."""
        if self.name == "ia3":
            return ("query_key_value", "dense_4h_to_h")
        return self.layers if self.name in LOW_RANK else ()

    @property
    def first_rank(self) -> int:
        """The rank of a change when training begins. adalora drops ranks, and begins with half as many again."""
        return self.rank + (self.rank + 1) // 2 if self.name == "adalora" else self.rank

    @property
    def makes_adapter(self) -> bool:
        """Whether the trained weights are saved as an adapter, beside the model."""
        return self.name not in ("full", "frozen-embeddings")


AnyRecipe = TypeVar("AnyRecipe", bound="RunRecipe")


class RunRecipe:
    """What the recipes of all runs that tune a model have in common; a base of dataclasses."""

    run: TuningRunSettings
    model: ModelSettings
    data: Any  # with the key ``root``
    method: MethodSettings

    @property
    def tuning(self) -> "TuningRecipe":
        """The recipe of a fine-tuning run with the same model, method and optimizer."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain values, of which the same recipe can be read."""
        return plain_values(self)

    def to_yaml(self) -> str:
        return to_yaml(self)

    def portable(self) -> Self:
        """The recipe without the settings of one machine: folders, device, threads."""
        run = dataclasses.replace(self.run, out=Path(self.run.out).name, device=None, threads=None)
        data = dataclasses.replace(self.data, root=TuningDataSettings.root)
        model = dataclasses.replace(self.model, name=base_name(self.model.name))
        return dataclasses.replace(self, run=run, data=data, model=model)  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningRecipe(RunRecipe):
    """A fine-tuning run. ``decoding`` holds keywords of `gmask.generation.settings.Sampling`."""

    run: TuningRunSettings
    model: ModelSettings
    task: str | dict[str, Any]  # a name, a file, or the task itself
    data: TuningDataSettings
    method: MethodSettings
    optimization: TuningOptimizationSettings
    decoding: dict[str, Any] = dataclasses.field(default_factory=dict)
    forgetting: ForgettingSettings

    @property
    def decoding_settings(self) -> dict[str, Any]:
        """The keywords of ``decoding``. By default a text may be as long as those that are learnt."""
        return {"max_tokens": self.data.max_target, **self.decoding}

    @property
    def tuning(self) -> "TuningRecipe":
        return self

    def for_fold(self, fold: int) -> "TuningRecipe":
        """The recipe of the run of one fold, in a folder of its own."""
        run = dataclasses.replace(self.run, out=str(Path(self.run.out) / f"fold-{fold}"))
        return dataclasses.replace(self, run=run, data=dataclasses.replace(self.data, fold=fold))


def load_tuning_recipe(path: Path | str, overrides: Sequence[str] = ()) -> TuningRecipe:
    """Reads a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, not YAML, an unknown key (the nearest one is named), a missing one, settings that
            exclude each other.
    """
    return read_tuning_recipe(load_tree(path, overrides, field_names(TuningRecipe)))


def find_tuning_recipe(folder: Path) -> TuningRecipe | None:
    """The recipe in the folder of a tuned model or adapter; None if there is none, or one of pretraining."""
    path = folder / "recipe.yaml"
    if not path.is_file() or "task" not in (tree := load_tree(path, (), field_names(TuningRecipe))):
        return None
    return read_tuning_recipe(tree)


def read_tuning_recipe(tree: Mapping[str, Any]) -> TuningRecipe:
    """The recipe of a tree of plain values, checked."""
    recipe = build_recipe(TuningRecipe, tree)
    data, optimization = recipe.data, recipe.optimization
    if recipe.model.adapter is not None and not recipe.method.makes_adapter:
        raise GmaskError(
            f"model.adapter is to be trained on, and method {recipe.method.name} makes none: merge it first"
        )
    if data.folds is None and data.fold is not None:
        raise GmaskError("data.fold is set without data.folds, the number of folds")
    if data.folds is not None and data.validation is not None:
        raise GmaskError("data.folds validates on parts of data.train: leave data.validation out")
    if data.folds is not None and (data.fold or 1) > data.folds:
        raise GmaskError(f"data.folds is {data.folds} and data.fold {data.fold}: folds are counted from 1")
    check_run_length(optimization, validates=data.validation is not None or data.folds is not None)
    return recipe


def check_run_length(optimization: TuningOptimizationSettings, *, validates: bool) -> None:
    """Raises `GmaskError` unless a run ends: by steps or by epochs, or early by a validation."""
    if (optimization.epochs is None) == (optimization.steps is None):
        if optimization.steps is None:
            raise GmaskError("optimization: give epochs or steps")
        raise GmaskError(
            "optimization: give epochs or steps, not both: optimization.epochs=null counts by steps, "
            "optimization.steps=null by epochs"
        )
    if optimization.early_stop is not None and not validates:
        raise GmaskError("optimization.early_stop needs data.validation (a file, or a share of data.train)")


def build_recipe(kind: type[AnyRecipe], tree: Mapping[str, Any]) -> AnyRecipe:
    """The recipe of a tree of plain values. Raises `GmaskError` as `build_settings`, and for one without its task."""
    if "task" in field_names(kind) and tree.get("task") is None:
        raise GmaskError("task is missing: name one, such as chat/alpaca, or write it into the recipe")
    return build_settings(kind, tree, title="the recipe")


def with_usual_rate(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe, with the usual learning rate of its method if it names none."""
    settings: Any = recipe
    rate = settings.optimization.learning_rate or USUAL_RATES[recipe.method.name]
    optimization = dataclasses.replace(settings.optimization, learning_rate=rate)
    return dataclasses.replace(settings, optimization=optimization)  # type: ignore[no-any-return]


def differing_keys(one: RunRecipe, other: RunRecipe) -> list[str]:
    """The dotted keys in which two recipes differ, without `FREE_KEYS`."""
    left, right = dict(_flatten(one.to_dict())), dict(_flatten(other.to_dict()))
    keys = [key for key in (*left, *(key for key in right if key not in left)) if left.get(key) != right.get(key)]
    return [key for key in keys if key not in FREE_KEYS]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


LOW_RANK: tuple[Method, ...] = ("lora", "dora", "adalora", "qlora")
OWNERS: dict[str, tuple[Method, ...]] = {
    "rank": LOW_RANK,
    "alpha": LOW_RANK,
    "dropout": LOW_RANK,
    "targets": LOW_RANK,
    "prefix_length": ("p-tuning-v2",),
    "projection": ("p-tuning-v2",),
    "prompt_tokens": ("p-tuning",),
    "prompt_encoder": ("p-tuning",),
}
"""The methods that a setting belongs to; settings that are not listed belong to all."""

RATES: dict[Method, tuple[float, float]] = {
    "full": (1e-5, 2e-3),  # the upper end for small models
    "frozen-embeddings": (1e-5, 2e-3),
    "lora": (1e-4, 2e-3),
    "dora": (1e-4, 2e-3),
    "adalora": (1e-4, 5e-3),
    "qlora": (1e-4, 2e-3),
    "ia3": (1e-3, 3e-2),
    "p-tuning-v2": (3e-3, 3e-2),
    "p-tuning": (5e-4, 1e-2),
}
"""The lowest and the highest of the usual learning rates of each method."""

USUAL_RATES: dict[Method, float] = {
    "full": 2e-5, "frozen-embeddings": 2e-5, "lora": 2e-4, "dora": 2e-4, "adalora": 1e-3, "qlora": 2e-4, "ia3": 3e-3,
    "p-tuning-v2": 2e-2, "p-tuning": 1e-3,
}  # fmt: skip
"""The learning rate of each method if a recipe gives none; that of p-tuning-v2 is the published one."""


def check_model(method: MethodSettings, *, is_quantized: bool, is_glm: bool) -> None:
    """Raises `GmaskError` if a method cannot train such a model."""
    if method.name == "qlora" and not is_quantized:
        raise GmaskError(
            "qlora is lora beside integers: set model.quantize (or --quantize) to int8 or int4, or choose lora"
        )
    if is_quantized and method.name == "dora":
        raise GmaskError(
            "dora needs the norms of the float weights: leave model.quantize (or --quantize) out, or choose qlora"
        )
    if is_quantized and not method.makes_adapter:
        raise GmaskError(
            "integers cannot be trained: leave model.quantize (or --quantize) out, or choose qlora or p-tuning-v2"
        )
    if method.name == "p-tuning" and not is_glm:
        raise GmaskError("p-tuning trains vectors in the texts of a GLM; for a ChatGLM choose p-tuning-v2")


def hint_learning_rate(method: Method, rate: float) -> str | None:
    """Advice on a learning rate that is unusual for a method; None for a usual one."""
    low, high = RATES[method]
    if low <= rate <= high:
        return None
    others = [name for name, (least, most) in RATES.items() if least <= rate <= most and name != method]
    nearest = min(others, key=lambda name: abs(math.log(rate / USUAL_RATES[name])), default=None)
    likely = f", {rate:g} is one for {nearest}" if nearest else ""
    return f"a learning rate of {rate:g} is unusual for {method}: {low:g} to {high:g} is common{likely}"


def _join_names(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
