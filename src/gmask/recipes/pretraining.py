"""The recipe of a pretraining run: YAML into typed settings, and the mixture of objectives that it describes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gmask.config import (
    Count,
    Fraction,
    NotNegative,
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
    field_names,
    hints_of,
    load_tree,
    plain_values,
    read_values,
    to_yaml,
)
from gmask.errors import GmaskError, one_line
from gmask.infilling.blanks import BlankTokens
from gmask.infilling.objectives import Mixture
from gmask.infilling.spans import BoolArray, mark_sentence_ends, mark_word_edges
from gmask.models.glm import GLMConfig
from gmask.tasks.records import Source
from gmask.tokenizers.special_tokens import find_token_id

Precision = Literal["auto", "float32", "bfloat16"]

VOCABULARY_MULTIPLE = 128
"""Rows of the embedding are a multiple of it, as published, for the tiles of matrix kernels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The tokenizer: a folder, or one that is learnt from the training texts, once, into the run's folder."""

    path: str | None = None
    vocab_size: Annotated[int, Range(above=0), Range(most=10**7)] = 12288
    alphabet_size: Count | None = None  # characters beside ASCII that are tokens; by default 5/16 of the vocabulary
    max_han_chars: Count = 4  # of one token; 1 tokenises the text around a blank as without the blank
    sample_bytes: Count = 45_000_000  # UTF-8 bytes of training text to learn from


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The texts, and how they are cut into rows: the files of ``sources``, or a folder of `gmask prepare`."""

    sources: tuple[Source, ...] = ()
    prepared: str | None = None
    weights: dict[str, Positive] = dataclasses.field(default_factory=dict)  # of prepared sources, if others than theirs
    check_hashes: bool = True  # of all tokens, when a run begins or goes on; sizes are always compared
    root: str = "."  # what the sources' paths are relative to
    cache: str = ".cache/pretrain"  # tokenised texts
    row_length: Size = 512  # tokens
    max_piece: Size | None = None  # tokens of one context; at most the model's positions
    skip_bad_lines: bool = False
    streams: Size = 1  # parts of the texts, of which each has rows of its own, so that a process draws its rows alone

    @property
    def resolved_sources(self) -> list[Source]:
        """The sources with their paths under ``root``. Raises `GmaskError` if there are tokens in place of texts."""
        if self.prepared is not None:
            raise GmaskError(f"data.prepared: {self.prepared} has tokens, and texts are needed here: name data.sources")
        return [source.under(self.root) for source in self.sources]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """The optimizer, and the schedule of its learning rate."""

    steps: Steps
    rows_per_step: Size = 16
    rows_per_pass: PassSize = 8  # of one forward and backward pass; the gradients of a step's passes are summed
    learning_rate: Rate = 1e-3  # at its peak
    final_learning_rate: Annotated[float, Range(0, 100)] = 1e-4
    warmup_steps: Whole = 100
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine falls to the final rate; constant lasts until `decay`
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices, with adamw for the rest
    weight_decay: NotNegative = 0.1  # of matrices only
    decay_embeddings: bool = True  # weight decay of the embedding tables too, as published
    ema: Part | None = None  # decay of a moving average of the weights, such as 0.999: it is validated and exported
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    clip_norm: Positive = 1.0
    spike_factor: Annotated[float, Range(above=1), Range(most=1000)] | None = None  # times the median of recent losses
    spike_window: Size = 64  # recent losses
    on_spike: Literal["skip", "stop"] = "skip"
    dtype: Precision = "auto"  # of a pass; auto: bfloat16 where the device has instructions for it; weights are float32
    gradient_checkpointing: bool | Literal["selective"] = False  # selective: keeps the results of matrix products
    compile: bool = False  # the blocks, by torch.compile
    float8: bool = False  # the products of the blocks, by torchao, on GPUs of Hopper and later
    attention: Literal["sdpa", "flex"] = "sdpa"  # flex: by flex_attention, which leaves out hidden blocks; on GPUs
    loss_chunk: Size | None = None  # labels that have logits at a time; by default all of a pass
    initialization: Literal["normal", "neighbours"] = "normal"  # neighbours: for small models and short runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecaySettings:
    """The last part of a run with a constant learning rate: the rate falls linearly to the final one."""

    share: Annotated[float, Range(0, 1)] = 0.2  # of the steps
    row_length: Size | None = None  # tokens; as before the decay if not given
    objective: dict[str, Any] = dataclasses.field(default_factory=dict)  # the keys that change


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The folder, the seed and the device of a run, and how often it logs, validates and saves."""

    out: str
    seed: RunSeed = 0
    device: str | None = None  # by default the best one
    threads: Threads | None = None  # by default as many as torch finds
    log_every: Count = 10  # steps
    validate_every: Count = 500
    validation_rows: Size = 2  # of each source and objective
    validation_sentences: Whole = 0  # of each language, in which one word or character is hidden
    save_every: Count = 100
    keep_last: Count = 2  # checkpoints
    layers_every: Count | None = None  # steps; logs the norms of gradients and weights of each layer
    peak_tflops: Positive | None = None  # 10^12 operations a second of one device, to log the share that is used (MFU)
    time_limit: Positive | None = None  # seconds after which the run saves and ends, to be resumed
    timeout: Annotated[int, Range(above=0), Range(most=10**6)] = 1800  # seconds that a process waits for the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """What the processes of a run divide beside the rows of a step. One process leaves everything whole."""

    shard: bool = False  # weights, gradients and moments (FSDP2)
    tensor: Size = 1  # processes that divide the matrices, and share their rows (tensor parallelism)
    offload: bool = False  # a GPU's shards lie in the host's memory between their uses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingRecipe:
    """A pretraining run. ``model`` and ``objective`` hold keywords of `GLMConfig` and `Mixture`.

    ``model`` may have a ``name``, too: of the model whose weights the run begins with.
    """

    run: RunSettings
    data: DataSettings
    optimization: OptimizationSettings
    tokenizer: TokenizerSettings
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: dict[str, Any] = dataclasses.field(default_factory=dict)
    decay: DecaySettings = DecaySettings()
    parallel: ParallelSettings = ParallelSettings()

    @property
    def start(self) -> str | None:
        """The model whose weights the run begins with, as `gmask.load` names it; None for new weights."""
        return self.model.get("name")

    @property
    def shape(self) -> dict[str, Any]:
        """The keywords of `GLMConfig`."""
        return {key: value for key, value in self.model.items() if key != "name"}

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

    def portable(self) -> "PretrainingRecipe":
        """The recipe without the settings of one machine: folders, device, threads."""
        tokenizer = dataclasses.replace(self.tokenizer, path=None)
        prepared = None if self.data.prepared is None else Path(self.data.prepared).name
        data = dataclasses.replace(self.data, root=DataSettings.root, cache=DataSettings.cache, prepared=prepared)
        run = dataclasses.replace(self.run, out=Path(self.run.out).name, device=None, threads=None)
        model = self.model if self.start is None else self.model | {"name": base_name(self.start)}
        return dataclasses.replace(self, run=run, data=data, tokenizer=tokenizer, model=model)


def base_name(model: str) -> str:
    """The name of a model for a model card: of a folder its last part only."""
    return Path(model).name if Path(model).is_dir() else model


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> PretrainingRecipe:
    """Reads a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, not YAML, an unknown key (the nearest one is named), a missing one.
    """
    return read_recipe(load_tree(path, overrides, field_names(PretrainingRecipe)))


def read_recipe(tree: Mapping[str, Any]) -> PretrainingRecipe:
    """The recipe of a tree of plain values, checked."""
    recipe = build_settings(PretrainingRecipe, tree, title="the recipe")
    _check_texts(recipe)
    objective = _read_objective(recipe.objective, "objective")
    decay = dataclasses.replace(
        recipe.decay, objective=_read_objective(recipe.decay.objective, "decay.objective", objective)
    )
    if recipe.start is not None and recipe.optimization.initialization != "normal":
        raise GmaskError("optimization.initialization: is of new weights, and model.name has some: leave one out")
    if recipe.optimization.schedule != "constant" and decay != DecaySettings():
        raise GmaskError("decay: has no effect on a cosine; set optimization.schedule to constant, or leave it out")
    return dataclasses.replace(
        recipe,
        model=_read_model(recipe.model),
        objective=objective,
        decay=decay,
    )


def _check_texts(recipe: PretrainingRecipe) -> None:
    """Raises `GmaskError` unless the texts come from one place, with what a prepared folder has."""
    data = recipe.data
    if data.prepared is None:
        if not data.sources:
            raise GmaskError("data.sources is empty: name some, or a folder of gmask prepare as data.prepared")
        if data.weights:
            raise GmaskError("data.weights: are of the sources of data.prepared; set the weights of data.sources there")
        return
    if data.sources:
        raise GmaskError("data: give sources or prepared, not both")
    if data.skip_bad_lines:
        raise GmaskError("data.skip_bad_lines: has no effect on data.prepared: leave it out")
    if recipe.run.validation_sentences:
        raise GmaskError("run.validation_sentences: needs texts, and data.prepared has tokens: set it to 0")


def _objective_hints() -> dict[str, Any]:
    """The types and ranges of a mixture's settings; its other fields are made from the tokenizer."""
    made = ("special", "sentence_ends", "word_edges")
    hints = {name: hint for name, hint in hints_of(Mixture).items() if name not in made}
    hints |= dict.fromkeys(OBJECTIVE_SHARES, NotNegative)
    hints |= {name: Annotated[float, Range(0, 1)] for name in hints if name.endswith(("_prob", "_ratio"))}
    return hints | {"mean_span_length": Annotated[float, Range(above=0), Range(most=1000)]}


OBJECTIVE_SHARES = ("token", "sentence", "document")
"""The objectives, by the names of their shares of a mixture."""


def _read_objective(values: Mapping[str, Any], where: str, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a mixture that has those of ``before``, too."""
    found = read_values(values, _objective_hints(), where)
    mixed = {name: Mixture.__dataclass_fields__[name].default for name in OBJECTIVE_SHARES} | dict(before or {}) | found
    if not any(mixed[name] for name in OBJECTIVE_SHARES):
        raise GmaskError(f"{where}: the shares of {', '.join(OBJECTIVE_SHARES)} are all 0")
    return found


def _read_model(values: Mapping[str, Any]) -> dict[str, Any]:
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    dropouts = ("embedding_dropout", "attention_dropout", "hidden_dropout")
    hints = hints_of(GLMConfig) | dict.fromkeys(sizes, Count) | dict.fromkeys(dropouts, Fraction)
    # Not those that the tokenizer says, nor those of every class of transformers
    own = [
        name for name in GLMConfig.__annotations__ if name in hints and not name.endswith(("_token_id", "vocab_size"))
    ]
    hints = {name: hints[name] for name in own} | {"name": str}
    model = read_values(values, hints, "model")
    try:
        GLMConfig(**{key: value for key, value in model.items() if key != "name"})
    except ValueError as error:
        raise GmaskError(f"model: {one_line(error)}") from error
    return model


BLANK_TOKEN_SPELLINGS = {
    "mask": "[MASK]", "smask": "[sMASK]", "gmask": "[gMASK]", "sop": "<|startofpiece|>", "eop": "<|endofpiece|>",
    "pad": "[PAD]", "cls": "[CLS]", "eos": "<|endoftext|>", "dblock": "[dBLOCK]",
}  # fmt: skip
"""The special tokens by role in the vocabularies that gmask trains; published tokenizers name theirs themselves."""


def find_blank_tokens(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> BlankTokens:
    """The ids of the special tokens.

    A vocabulary without ``[sMASK]`` or ``[gMASK]`` uses ``[MASK]`` for it, as in training without ``--task-mask``.

    Raises:
        GmaskError: the vocabulary lacks another token.
    """
    if isinstance(tokenizer, Tokenizer):
        ids = {role: tokenizer.token_to_id(spelling) for role, spelling in BLANK_TOKEN_SPELLINGS.items()}
    else:
        ids = {role: find_token_id(tokenizer, f"{role}_token_id") for role in BLANK_TOKEN_SPELLINGS}
    ids = {**ids, **{role: ids["mask"] for role in ("smask", "gmask") if ids[role] is None}}
    missing = [BLANK_TOKEN_SPELLINGS[role] for role, token_id in ids.items() if token_id is None and role != "dblock"]
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


def make_mixture(tokenizer: Tokenizer, objective: Mapping[str, Any], special: BlankTokens | None = None) -> Mixture:
    """The objective of a recipe, for this tokenizer; ``special``: its special tokens, if they are known."""
    special, ends = special or find_blank_tokens(tokenizer), find_sentence_ends(tokenizer)
    words = mark_word_edges(_spell(tokenizer)) if objective.get("whole_words") else None
    return Mixture(special=special, sentence_ends=ends, word_edges=words, **objective)
