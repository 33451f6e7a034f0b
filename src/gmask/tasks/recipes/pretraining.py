"""What does a pre-training recipe say? YAML in, typed settings out."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmask.errors import GmaskError
from gmask.infilling.objectives import Mixture
from gmask.models.glm.configuration import GLMConfig
from gmask.tasks.corpus import Source
from gmask.tasks.recipes.settings_tree import (
    build,
    check_choice,
    check_keys,
    field_names,
    load_tree,
    plain_values,
    to_yaml,
)


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
        return plain_values(self)

    def to_yaml(self) -> str:
        return to_yaml(self)

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
    return read_recipe(load_tree(path, overrides, field_names(Recipe)))


def read_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Checks a recipe's tree of plain values and gives it types."""
    sections = dict(tree)
    check_keys(sections, field_names(Recipe), "the recipe")
    data = dict(sections.get("data") or {})
    data["sources"] = tuple(build(Source, entry, "data.sources") for entry in data.get("sources") or ())
    optimization = dict(sections.get("optimization") or {})
    if "betas" in optimization:
        optimization["betas"] = tuple(optimization["betas"])
    model, objective = dict(sections.get("model") or {}), dict(sections.get("objective") or {})
    check_keys(model, field_names(GLMConfig), "model")
    mixture = [name for name in field_names(Mixture) if name not in ("special", "sentence_ends")]
    check_keys(objective, mixture, "objective")
    recipe = Recipe(
        run=build(RunSettings, sections.get("run") or {}, "run"),
        data=build(DataSettings, data, "data"),
        optimization=build(OptimizationSettings, optimization, "optimization"),
        tokenizer=build(TokenizerSettings, sections.get("tokenizer") or {}, "tokenizer"),
        model=model,
        objective=objective,
    )
    if not recipe.data.sources:
        raise GmaskError("data.sources is empty: name at least one source with its training texts")
    check_choice(recipe.optimization.dtype, ("float32", "bfloat16"), "optimization.dtype")
    check_choice(recipe.optimization.initialization, ("normal", "neighbours"), "optimization.initialization")
    return recipe
