"""The recipe of a fine-tuning run: YAML in, typed settings out, and the methods of tuning."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from gmask.config import (
    Choices,
    Count,
    Fraction,
    NotEmpty,
    NotNegative,
    Part,
    Positive,
    Range,
    RunSeed,
    Whole,
    build,
    check_fields,
    field_names,
    load_tree,
    plain_values,
    to_yaml,
)
from gmask.errors import GmaskError
from gmask.hardware import DTYPES
from gmask.quantization.quantizer import NAMES as INTEGERS
from gmask.recipes.pretraining import Precision
from gmask.tasks.records import Truncation

FREE_KEYS = (
    "run.out", "run.device", "run.threads", "run.log_every", "data.root", "optimization.save_every",
    "optimization.keep_last",
)  # fmt: skip
"""What may change when a run is resumed: no number of it depends on these."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningRunSettings:
    """Where the run goes, and how it is repeated."""

    out: str
    seed: RunSeed = 0
    device: str | None = None  # the best there is
    threads: Count | None = None  # as many as torch finds
    log_every: Count = 1  # steps
    deterministic: bool = False  # on a GPU too: slower kernels that give the same bits each time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is tuned."""

    name: str = "bundled"  # or a folder, or the name of a published model
    dtype: Annotated[str, Choices(("auto", *DTYPES))] | None = None  # of weights that do not train, as of `gmask.load`
    quantize: Annotated[str, Choices(tuple(INTEGERS))] | None = None  # int8 | int4, of weights that do not train
    adapter: str | None = None  # a folder to go on from
    initialization: Literal["pretrained", "random"] = "pretrained"  # random: the shape without what it has learnt


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningDataSettings:
    """Which samples, and how long they may be."""

    train: str  # a file or a glob
    validation: str | Part | None = None  # files, or a share of `train`
    test: str | None = None
    root: str = "."  # what the paths are relative to
    limit: Count | None = None  # samples of each of the three
    validation_limit: Count | None = None  # samples that are predicted while the run goes on
    max_source: Count = 384  # tokens of a question
    max_target: Count = 128  # tokens of an answer
    truncation: Truncation = "left"  # where a question that is too long loses tokens: before its blank, or at its end
    skip_bad_lines: bool = False  # leave out, and count, what cannot be used; by default it is an error
    packing: Count | None = None  # tokens of a row that several samples share; by default each has its own
    folds: Annotated[int, Range(2)] | None = None  # k-fold cross-validation on `train`
    fold: Count | None = None  # one of them, from 1; by default all, one after the other

    def place(self, pattern: str) -> str:
        """A path under ``root``."""
        return str(Path(self.root) / pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningOptimizationSettings:
    """How the weights are fitted. A step has ``batch_size * accumulation`` samples, whatever number of processes."""

    epochs: Positive | None = None  # passes over the samples; or:
    steps: Count | None = None
    batch_size: Count = 8  # samples of one forward and backward
    accumulation: Count = 1  # of which so many make a step
    learning_rate: Positive | None = None  # at its peak; by default what the method is usually given
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # of the learning rate, to 0
    warmup: NotNegative = 0.0  # steps, or below 1 a share of them
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 1.0  # 0 clips nothing
    dtype: Precision | None = None  # of a pass; auto: bfloat16 if the device has it; by default so on a GPU
    gradient_checkpointing: bool = False
    length_grouped: bool = False  # samples of like length in a step
    evaluate_every: Count | None = None  # steps; by default a tenth of the run
    save_every: Count | None = None  # steps; by default a tenth of the run, and 100 at the most
    keep_last: Count = 2  # checkpoints
    early_stop: Count | None = None  # evaluations in a row without a new best
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of transformers.TrainingArguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingSettings:
    """What a chat model is asked before and after, to see what it forgot; by default a set that comes with gmask."""

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

Target = Annotated[str, Choices((*LINEARS, "all-linear"))]
Targets = Annotated[tuple[Target, ...], NotEmpty()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What is trained.

    Raises:
        GmaskError: an unknown method, a value out of range, or a setting of another method.
    """

    name: Method = "lora"
    rank: Count = 8  # of the change of a weight; for adalora, that which remains on average
    alpha: Positive | None = None  # the change is scaled by alpha / rank; twice the rank by default
    dropout: Fraction = 0.0  # of what the change is computed from
    targets: Target | Targets = "query_key_value"  # linear layers of a block, or all-linear
    prefix_length: Count = 128  # keys and values before each layer, as published
    projection: bool = False  # whether a network computes the prefix
    prompt_tokens: Count = 8  # trained vectors in the text
    prompt_encoder: PromptNetwork = "lstm"  # the network that they come out of

    def __post_init__(self) -> None:
        check_fields(self, "method")
        for field in dataclasses.fields(self):
            owners = OWNERS.get(field.name)
            if owners and self.name not in owners and getattr(self, field.name) != field.default:
                raise GmaskError(f"method.{field.name} belongs to {_join(owners)}, not to {self.name}: leave it out")

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
        """The linear layers of a block that something is put around."""
        if self.name == "ia3":
            return ("query_key_value", "dense_4h_to_h")
        return self.layers if self.name in LOW_RANK else ()

    @property
    def first_rank(self) -> int:
        """The rank of a change when training begins; adalora drops ranks, and starts with half as many again."""
        return self.rank + (self.rank + 1) // 2 if self.name == "adalora" else self.rank

    @property
    def makes_adapter(self) -> bool:
        """Whether the trained numbers are kept beside the model, in a folder of their own."""
        return self.name not in ("full", "frozen-embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningRecipe:
    """A fine-tuning run. ``decoding`` holds keywords of `gmask.generation.settings.Settings`."""

    run: TuningRunSettings
    model: ModelSettings
    task: str | dict[str, Any]  # a name, a file, or the task itself
    data: TuningDataSettings
    method: MethodSettings
    optimization: TuningOptimizationSettings
    decoding: dict[str, Any] = dataclasses.field(default_factory=dict)
    forgetting: ForgettingSettings

    @property
    def written(self) -> dict[str, Any]:
        """How texts are written: ``decoding``, and as long as those that are learnt."""
        return {"max_tokens": self.data.max_target, **self.decoding}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `read_tuning_recipe` turns into the same recipe."""
        return plain_values(self)

    def to_yaml(self) -> str:
        return to_yaml(self)

    def without_places(self) -> "TuningRecipe":
        """The recipe without what holds on one machine only: folders, device, threads."""
        run = dataclasses.replace(self.run, out=Path(self.run.out).name, device=None, threads=None)
        data = dataclasses.replace(self.data, root=TuningDataSettings.root)
        model = dataclasses.replace(self.model, name=base_name(self.model.name))
        return dataclasses.replace(self, run=run, data=data, model=model)

    def of_fold(self, fold: int) -> "TuningRecipe":
        """The run of one fold, in a folder of its own."""
        run = dataclasses.replace(self.run, out=str(Path(self.run.out) / f"fold-{fold}"))
        return dataclasses.replace(self, run=run, data=dataclasses.replace(self.data, fold=fold))


def base_name(model: str) -> str:
    """A model's name for others to read: of a folder its last part alone."""
    return Path(model).name if Path(model).is_dir() else model


def load_tuning_recipe(path: Path | str, overrides: Sequence[str] = ()) -> TuningRecipe:
    """Reads a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, no YAML, a key that does not exist (the nearest one is named) or lacks, settings that
            exclude each other.
    """
    return read_tuning_recipe(load_tree(path, overrides, field_names(TuningRecipe)))


def find_tuning_recipe(folder: Path) -> TuningRecipe | None:
    """The recipe that a folder of ``gmask finetune`` was tuned by; None where it holds none, or one of pre-training."""
    path = folder / "recipe.yaml"
    if not path.is_file() or "task" not in (tree := load_tree(path, (), field_names(TuningRecipe))):
        return None
    return read_tuning_recipe(tree)


def read_tuning_recipe(tree: Mapping[str, Any]) -> TuningRecipe:
    """Checks a recipe's tree of plain values and gives it types."""
    if tree.get("task") is None:
        raise GmaskError("task is missing: name one, such as chat/alpaca, or write it into the recipe")
    recipe = build(TuningRecipe, tree, title="the recipe")
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
    if (optimization.epochs is None) == (optimization.steps is None):
        raise GmaskError("optimization: give one of epochs and steps")
    if optimization.early_stop is not None and data.validation is None and data.folds is None:
        raise GmaskError("optimization.early_stop needs data.validation (a file, or a share of data.train)")
    return recipe


def differing_keys(one: TuningRecipe, other: TuningRecipe) -> list[str]:
    """The dotted keys by which two recipes would give different numbers."""
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
"""The methods that a setting means something to."""

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
"""Learning rates that the methods are usually given, lowest and highest."""

USUAL_RATES: dict[Method, float] = {
    "full": 2e-5, "frozen-embeddings": 2e-5, "lora": 2e-4, "dora": 2e-4, "adalora": 1e-3, "qlora": 2e-4, "ia3": 3e-3,
    "p-tuning-v2": 2e-2, "p-tuning": 1e-3,
}  # fmt: skip
"""One of them for each; that of p-tuning-v2 is the published one."""


def check_model(method: MethodSettings, *, is_quantized: bool, is_glm: bool) -> None:
    """Raises `GmaskError` for a method that cannot train such a model."""
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
    """Advice on a learning rate that is far from what a method is usually given; None for one that is not."""
    low, high = RATES[method]
    if low <= rate <= high:
        return None
    others = [name for name, (least, most) in RATES.items() if least <= rate <= most and name != method]
    nearest = min(others, key=lambda name: abs(math.log(rate / USUAL_RATES[name])), default=None)
    likely = f", {rate:g} is one for {nearest}" if nearest else ""
    return f"a learning rate of {rate:g} is unusual for {method}: {low:g} to {high:g} is common{likely}"


def _join(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
