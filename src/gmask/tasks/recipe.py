"""What does a pre-training recipe say? YAML in, typed settings out."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gmask.errors import GmaskError
from gmask.infilling.objectives import Mixture
from gmask.models.glm.configuration import GLMConfig
from gmask.tasks.corpus import Source

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Where the tokenizer comes from: a folder, or the training texts (learnt once, into the run's folder)."""

    path: str | None = None
    vocab_size: int = 12288
    sample_bytes: int = 45_000_000  # UTF-8 bytes of training text that it is learnt from


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which texts, and how they are cut into rows."""

    sources: tuple[Source, ...]
    root: str = "."  # what the sources' paths are relative to
    cache: str = ".cache/pretrain"  # tokenised texts
    row_length: int = 512  # tokens
    max_piece: int | None = None  # tokens of one context; at most the model's positions
    skip_bad_lines: bool = False

    @property
    def placed_sources(self) -> list[Source]:
        """The sources with their paths under ``root``."""

        def place(pattern: str | None) -> str | None:
            return None if pattern is None else str(Path(self.root) / pattern)

        return [
            dataclasses.replace(source, train=str(place(source.train)), validation=place(source.validation))
            for source in self.sources
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """AdamW with linear warm-up and cosine decay."""

    steps: int
    rows_per_step: int = 16
    rows_per_pass: int = 8  # of one forward and backward; the gradients of a step's passes add up
    learning_rate: float = 1e-3  # at its peak
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1  # of matrices only
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    dtype: str = "bfloat16"  # of the forward pass; weights and optimizer state are float32
    gradient_checkpointing: bool = False
    initialization: str = "normal"  # or "neighbours": small models, short runs (gmask.training.initialization)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where the run goes, and how often it looks up from its work."""

    out: str
    seed: int = 0
    device: str | None = None  # the best there is
    threads: int | None = None  # as many as torch finds
    log_every: int = 10  # steps
    validate_every: int = 500
    validation_rows: int = 2  # of each source and objective
    save_every: int = 100
    keep_last: int = 2  # checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pre-training run. ``model`` and ``objective`` hold keywords of `GLMConfig` and `Mixture`."""

    run: RunSettings
    data: DataSettings
    optimization: OptimizationSettings
    tokenizer: TokenizerSettings
    model: dict[str, Any]
    objective: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `read_recipe` turns into the same recipe."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))  # lists in place of tuples
        return values

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), allow_unicode=True, sort_keys=False)

    def without_places(self) -> "Recipe":
        """The recipe without what holds on one machine only: folders, device, threads."""
        tokenizer = dataclasses.replace(self.tokenizer, path=None)
        data = dataclasses.replace(self.data, root=DataSettings.root, cache=DataSettings.cache)
        run = dataclasses.replace(self.run, out=Path(self.run.out).name, device=None, threads=None)
        return dataclasses.replace(self, run=run, data=data, tokenizer=tokenizer)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, no YAML, a key that does not exist (the nearest one is named) or lacks.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise GmaskError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise GmaskError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise GmaskError(f"{path}: a recipe is a YAML mapping with the sections {_names(Recipe)}")
    for override in overrides:
        _apply(tree, override)
    return read_recipe(tree)


def read_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Checks a recipe's tree of plain values and gives it types."""
    sections = dict(tree)
    _check_keys(sections, [field.name for field in dataclasses.fields(Recipe)], "the recipe")
    data = dict(sections.get("data") or {})
    data["sources"] = tuple(_build(Source, entry, "data.sources") for entry in data.get("sources") or ())
    optimization = dict(sections.get("optimization") or {})
    if "betas" in optimization:
        optimization["betas"] = tuple(optimization["betas"])
    model, objective = dict(sections.get("model") or {}), dict(sections.get("objective") or {})
    _check_keys(model, [field.name for field in dataclasses.fields(GLMConfig)], "model")
    mixture = [field.name for field in dataclasses.fields(Mixture) if field.name not in ("special", "sentence_ends")]
    _check_keys(objective, mixture, "objective")
    recipe = Recipe(
        run=_build(RunSettings, sections.get("run") or {}, "run"),
        data=_build(DataSettings, data, "data"),
        optimization=_build(OptimizationSettings, optimization, "optimization"),
        tokenizer=_build(TokenizerSettings, sections.get("tokenizer") or {}, "tokenizer"),
        model=model,
        objective=objective,
    )
    if not recipe.data.sources:
        raise GmaskError("data.sources is empty: name at least one source with its training texts")
    if recipe.optimization.dtype not in ("float32", "bfloat16"):
        raise GmaskError(f"optimization.dtype is {recipe.optimization.dtype}: choose float32 or bfloat16")
    if recipe.optimization.initialization not in ("normal", "neighbours"):
        raise GmaskError(
            f"optimization.initialization is {recipe.optimization.initialization}: choose normal or neighbours"
        )
    return recipe


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise GmaskError(f"{override}: write an override as section.key=value")
    *sections, name = key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise GmaskError(f"{key}: {section} has no keys of its own")
        tree = inner
    try:
        tree[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise GmaskError(f"{override}: the value is not YAML") from error


def _build(kind: type[T], values: Any, where: str) -> T:
    """An instance of a settings class, its values checked against the annotated types."""
    if not isinstance(values, Mapping):
        raise GmaskError(f"{where}: expected key: value pairs, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _check_keys(values, list(fields), where)
    needed = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in values]:
        raise GmaskError(f"{where}: {', '.join(missing)} is missing")
    return kind(**{name: _convert(value, fields[name].type, f"{where}.{name}") for name, value in values.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Numbers as YAML spells them (``1e-3`` is a string to it) into what the field wants."""
    wanted = str(kind.__name__ if isinstance(kind, type) else kind)
    try:
        if wanted.startswith("float") and not isinstance(value, bool):
            return None if value is None else float(value)
        if wanted.startswith("int"):
            if value is None and "None" in wanted:
                return None
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError
            return int(value)
        if wanted == "bool" and not isinstance(value, bool):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise GmaskError(f"{where} is {value!r}: expected {wanted.replace(' | None', '')}") from error
    return value


def _check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise GmaskError(f"{where} has no key {key!r}; the nearest is {near[0]!r}")


def _names(kind: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind))
