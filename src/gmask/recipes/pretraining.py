"""The recipe of a pretraining run: YAML in, typed settings out, and the objective's mixture for a tokenizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gmask.config import (
    build,
    check_choice,
    check_keys,
    check_mapping,
    check_numbers,
    check_run,
    convert,
    field_names,
    load_tree,
    plain_values,
    to_yaml,
)
from gmask.errors import GmaskError, one_line
from gmask.infilling.blanks import BlankTokens
from gmask.infilling.objectives import Mixture
from gmask.infilling.spans import BoolArray, mark_sentence_ends, mark_word_edges
from gmask.models.glm import GLMConfig
from gmask.tasks.records import Source
from gmask.tokenizers.glm_published import find_token_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Where the tokenizer comes from: a folder, or the training texts (learnt once, into the run's folder)."""

    path: str | None = None
    vocab_size: int = 12288
    alphabet_size: int | None = None  # characters beside ASCII that are tokens; by default 5/16 of the vocabulary
    max_han_chars: int = 4  # of one token; 1 cuts the text around a blank as it would be cut without the blank
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
    """The optimizer, and how the learning rate rises and falls."""

    steps: int
    rows_per_step: int = 16
    rows_per_pass: int = 8  # of one forward and backward; the gradients of a step's passes add up
    learning_rate: float = 1e-3  # at its peak
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "cosine"  # down to the final rate; or "constant" until the section `decay` begins
    optimizer: str = "adamw"  # or "muon" for the layers' matrices, with adamw for the rest
    weight_decay: float = 0.1  # of matrices only
    decay_embeddings: bool = True  # weight decay of the embedding tables too, as published
    ema: float | None = None  # decay of a moving average of the weights, such as 0.999: it is validated and exported
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    dtype: str = "auto"  # of a pass: bfloat16 where the device has instructions for it; weights are float32
    gradient_checkpointing: bool = False
    initialization: str = "normal"  # or "neighbours": small models, short runs (gmask.training.pretrain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecaySettings:
    """The last part of a run with a constant learning rate, in which the rate falls in a line to the final one."""

    share: float = 0.2  # of the steps
    row_length: int | None = None  # tokens; as before the decay if not given
    objective: dict[str, Any] = dataclasses.field(default_factory=dict)  # what changes in it


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
    validation_sentences: int = 0  # of each language, in which one word or character is hidden
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
    decay: DecaySettings = DecaySettings()

    @property
    def decay_start(self) -> int:
        """The step at which the learning rate begins to fall; with a cosine the end of the run."""
        steps = self.optimization.steps
        return steps - round(self.decay.share * steps) if self.optimization.schedule == "constant" else steps

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
    decay = build(DecaySettings, sections.get("decay") or {}, "decay")
    recipe = Recipe(
        run=build(RunSettings, sections.get("run") or {}, "run"),
        data=build(DataSettings, _read_data(sections.get("data") or {}), "data"),
        optimization=build(OptimizationSettings, sections.get("optimization") or {}, "optimization"),
        tokenizer=build(TokenizerSettings, sections.get("tokenizer") or {}, "tokenizer"),
        model=convert(GLMConfig, sections.get("model") or {}, "model"),
        objective=_read_objective(sections.get("objective") or {}, "objective"),
        decay=dataclasses.replace(decay, objective=_read_objective(decay.objective, "decay.objective")),
    )
    check_run(vars(recipe.run))
    check_numbers(vars(recipe.run), "run", positive=("validate_every", "validation_rows", "save_every", "keep_last"))
    check_numbers(vars(recipe.data), "data", positive=("row_length", "max_piece"))
    check_numbers(vars(recipe.run), "run", not_negative=("validation_sentences",))
    sizes = ("vocab_size", "alphabet_size", "max_han_chars", "sample_bytes")
    check_numbers(vars(recipe.tokenizer), "tokenizer", positive=sizes)
    _check_decay(recipe)
    _check_model(recipe.model)
    return dataclasses.replace(recipe, optimization=_check_optimization(recipe.optimization))


def _read_objective(objective: Any, where: str) -> dict[str, Any]:
    check_mapping(objective, where)
    made_from_tokenizer = ("special", "sentence_ends", "word_edges")
    check_keys(objective, [name for name in field_names(Mixture) if name not in made_from_tokenizer], where)
    return convert(Mixture, objective, where)


def _check_decay(recipe: Recipe) -> None:
    check_numbers(vars(recipe.decay), "decay", positive=("row_length",))
    if not 0 <= recipe.decay.share <= 1:
        raise GmaskError(f"decay.share is {recipe.decay.share}: it must be from 0 to 1")
    if recipe.optimization.schedule != "constant" and recipe.decay != DecaySettings():
        raise GmaskError("decay: has no effect on a cosine; set optimization.schedule to constant, or leave it out")


def _read_data(data: Any) -> dict[str, Any]:
    check_mapping(data, "data")
    if not isinstance(sources := data.get("sources"), list) or not sources:
        raise GmaskError("data.sources is empty or no list: name at least one source with its training texts")
    return {**data, "sources": tuple(build(Source, entry, "data.sources") for entry in sources)}


def _check_model(model: dict[str, Any]) -> None:
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    check_numbers(model, "model", positive=sizes)
    for name in ("embedding_dropout", "attention_dropout", "hidden_dropout"):
        if not 0 <= model.get(name, 0) < 1:
            raise GmaskError(f"model.{name} is {model[name]}: it must be from 0 to below 1")
    try:
        GLMConfig(**model)
    except ValueError as error:
        raise GmaskError(f"model: {one_line(error)}") from error


def _check_optimization(optimization: OptimizationSettings) -> OptimizationSettings:
    """The settings with ``betas`` as numbers, which YAML has as a list."""
    positive = ("steps", "rows_per_step", "rows_per_pass", "learning_rate", "clip_norm")
    not_negative = ("final_learning_rate", "warmup_steps", "weight_decay")
    check_numbers(vars(optimization), "optimization", positive=positive, not_negative=not_negative)
    check_choice(optimization.dtype, ("auto", "float32", "bfloat16"), "optimization.dtype")
    check_choice(optimization.schedule, ("cosine", "constant"), "optimization.schedule")
    check_choice(optimization.optimizer, ("adamw", "muon"), "optimization.optimizer")
    if optimization.ema is not None and not 0 < optimization.ema < 1:
        raise GmaskError(f"optimization.ema is {optimization.ema}: it must lie between 0 and 1")
    check_choice(optimization.initialization, ("normal", "neighbours"), "optimization.initialization")
    betas = optimization.betas
    try:
        first, second = map(float, betas)
    except (TypeError, ValueError) as error:
        raise GmaskError(f"optimization.betas is {betas!r}: expected two numbers") from error
    if not (0 <= first < 1 and 0 <= second < 1):
        raise GmaskError(f"optimization.betas is {betas!r}: both must be from 0 to below 1")
    return dataclasses.replace(optimization, betas=(first, second))


SPELLINGS = {
    "mask": "[MASK]", "smask": "[sMASK]", "gmask": "[gMASK]", "sop": "<|startofpiece|>", "eop": "<|endofpiece|>",
    "pad": "[PAD]", "cls": "[CLS]", "eos": "<|endoftext|>", "dblock": "[dBLOCK]",
}  # fmt: skip
"""In the vocabularies that gmask trains; the published ones name their tokens themselves."""


def find_blank_tokens(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> BlankTokens:
    """The ids of the special tokens.

    Where there is no ``[sMASK]`` or ``[gMASK]``, the id is that of ``[MASK]``, as in training without ``--task-mask``.

    Raises:
        GmaskError: a token that the vocabulary lacks.
    """
    if isinstance(tokenizer, Tokenizer):
        ids = {role: tokenizer.token_to_id(spelling) for role, spelling in SPELLINGS.items()}
    else:
        ids = {role: find_token_id(tokenizer, f"{role}_token_id") for role in SPELLINGS}
    ids = {**ids, **{role: ids["mask"] for role in ("smask", "gmask") if ids[role] is None}}
    missing = [SPELLINGS[role] for role, token_id in ids.items() if token_id is None and role != "dblock"]
    if missing:
        raise GmaskError(f"the tokenizer is not a GLM's: it has no {', '.join(missing)}")
    return BlankTokens(**ids)  # type: ignore[arg-type]  # none of them is None but dblock's


def find_sentence_ends(tokenizer: Tokenizer) -> BoolArray:
    """A table [V] of the ids that end a sentence."""
    return mark_sentence_ends(_spell(tokenizer))


def _spell(tokenizer: Tokenizer) -> list[str]:
    """The spelling of every id; "" for the special tokens."""
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = range(tokenizer.get_vocab_size())
    return ["" if token_id in special else tokenizer.id_to_token(token_id) or "" for token_id in ids]


def make_mixture(tokenizer: Tokenizer, objective: Mapping[str, Any]) -> Mixture:
    """The objective of a recipe, for this tokenizer."""
    special, ends = find_blank_tokens(tokenizer), find_sentence_ends(tokenizer)
    words = mark_word_edges(_spell(tokenizer)) if objective.get("whole_words") else None
    return Mixture(special=special, sentence_ends=ends, word_edges=words, **objective)
