"""What has a conversion to write, and what should be known about the result?"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmask.checkpoints.catalog import family_of_shape
from gmask.checkpoints.configs import SPECIAL_IDS, lacks_config, read_glm_config
from gmask.checkpoints.content import EMBEDDING, Content
from gmask.checkpoints.fit import check_head, check_vocabulary, match_keys
from gmask.checkpoints.megatron_config import ROWS_APART, copies_of, find_row, row_of_shape, rows_to_copy
from gmask.checkpoints.model_folder import (
    read_rows,
    verify_folder,
    write_config,
    write_rows,
    write_shards,
    write_tokenizer,
)
from gmask.checkpoints.model_weights import shape_model
from gmask.checkpoints.rank_folder import check_divisible, find_iteration, new_bookkeeping, training_names, write_ranks
from gmask.checkpoints.reading import Checkpoint
from gmask.checkpoints.tokenizer_files import read_tokenizer, require_vocabulary
from gmask.checkpoints.weight_maps import same_bits
from gmask.errors import GmaskError
from gmask.models.glm import GLMConfig
from gmask.models.glm.prompts import find_token_id
from gmask.quantization.quantizer import form_of

TANH, ERF = "gelu_pytorch_tanh", "gelu"

Advance = Callable[[int], object]
"""Is told the bytes that were dealt with."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What the user tells about a source that its files do not."""

    like: str | None = None  # of a checkpoint of the training code: a row of the catalog
    heads: int | None = None  # ... or the number of its attention heads
    tokenizer: Path | None = None  # the folder with the vocabulary


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion that only has to be done."""

    content: Content
    parameters: int  # of the model, whichever way they are kept
    write: Callable[[Path, Advance], None]  # fills a folder
    verify: Callable[[Path], None]  # what stands beside the weights
    notes: list[str] = field(default_factory=list)


def plan_ranks(checkpoint: Checkpoint, origin: Origin, dtype: torch.dtype | None, parts: int) -> Plan:
    """Plans a checkpoint of the training code.

    Raises:
        GmaskError: the weights cannot be divided so, or hold what that code has no place for.
    """
    notes: list[str] = []
    keys, heads = checkpoint.keys(), origin.heads
    bookkeeping = new_bookkeeping(checkpoint, parts)
    rows: dict[int, Tensor] = {}
    if lacks_config(checkpoint.folder):
        family = row_of_shape(checkpoint) if origin.like is None else find_row(checkpoint, origin.like)
        heads = heads or (family.heads if family else None)
        content = Content(checkpoint, training_names(checkpoint, keys), dtype)
    else:
        config = _read_plain_config(checkpoint.folder)
        heads, model = config.num_attention_heads, shape_model(checkpoint.folder, config)
        keys = list(match_keys(checkpoint, model))
        check_head(checkpoint, model)
        if not config.tie_word_embeddings:
            raise GmaskError(
                f"{checkpoint.folder}: its output head is not the word embedding, which the training code has no place "
                "for; convert it to gmask"
            )
        content = Content(checkpoint, training_names(checkpoint, keys), dtype)
        rows, is_apart, notes = _rows_for_training(content, config)
        bookkeeping |= {ROWS_APART: True} if is_apart else {}
        notes += _training_notes(config)
    check_divisible(content, parts, heads)
    content, iteration = content.with_rows(rows), find_iteration(checkpoint)

    def write(folder: Path, advance: Advance) -> None:
        write_ranks(content, folder, parts=parts, iteration=iteration, bookkeeping=bookkeeping, advance=advance)

    return Plan(content, content.numbers, write, lambda folder: None, notes)


def plan_folder(checkpoint: Checkpoint, origin: Origin, dtype: torch.dtype | None, *, published: bool) -> Plan:
    """Plans a folder that transformers reads, in the published form or in ours.

    Raises:
        GmaskError: nothing tells the number of heads or the vocabulary; weights, config and vocabulary do not fit.
    """
    if lacks_config(checkpoint.folder):
        config, tokenizer, notes = _read_training_config(checkpoint, origin)
        copied = rows_to_copy(checkpoint, config, origin.like)
    else:
        config, notes, copied = _read_plain_config(checkpoint.folder), [], {}
        tokenizer = _read_vocabulary(checkpoint.folder, origin.tokenizer, None)
        check_vocabulary(tokenizer, config)
    model = shape_model(checkpoint.folder, config)
    names = match_keys(checkpoint, model)
    check_head(checkpoint, model)
    if published and not config.tie_word_embeddings:
        raise GmaskError(
            f"{checkpoint.folder}: its output head is not the word embedding, which the published form has no place "
            "for; convert it to gmask"
        )
    if published and not any(key for key in names if not key.startswith(("word_embeddings.", "transformer."))):
        names = {key: key for key in names}
    content = Content(checkpoint, names, dtype)
    config.dtype = content.dtype(EMBEDDING)
    replaced = read_rows(checkpoint.folder, content)
    if copied:
        old, new = content.read_rows(list(copied)), content.read_rows(list(copied.values()))
        content = content.with_rows({row: new[source] for row, source in copied.items()})
        replaced = {row: old[row] for row, source in copied.items() if not same_bits(old[row], new[source])}
        notes += [_tell_copied(row, source) for row, source in copied.items()]
    if published and config.hidden_act != ERF:
        notes.append(
            f"config.json says hidden_act {config.hidden_act}, which gmask heeds; the published code computes the erf "
            "form of GELU whatever stands there"
        )

    def write(folder: Path, advance: Advance) -> None:
        write_shards(content, folder, advance)
        if replaced:
            write_rows(replaced, folder)
        write_tokenizer(tokenizer, folder, published=published)
        write_config(config, folder, published=published)

    return Plan(content, content.numbers, write, lambda folder: verify_folder(folder, config, tokenizer), notes)


def _read_plain_config(folder: Path) -> GLMConfig:
    """The config of a GLM that is not quantized."""
    config = read_glm_config(folder)
    if form := form_of(config):
        raise GmaskError(
            f"{folder}: is quantized ({form}), for which GLM has this form alone: nothing to convert; name the folder "
            "of the unquantized model"
        )
    return config


def _read_training_config(
    checkpoint: Checkpoint, origin: Origin
) -> tuple[GLMConfig, PreTrainedTokenizerBase, list[str]]:
    """The config of a checkpoint of the training code with the ids of its vocabulary, which is returned too."""
    folder, heads = checkpoint.folder, origin.heads
    family = row_of_shape(checkpoint) if origin.like is None else find_row(checkpoint, origin.like)
    if family is None and heads is None:
        raise GmaskError(
            f"{folder}: no published model has its shape: give --like NAME (gmask info --zoo lists them), or --heads "
            "with the number of attention heads"
        )
    tokenizer = _read_vocabulary(folder, origin.tokenizer, family.tokenizer if family and heads is None else None)
    config = read_glm_config(folder, origin.like, heads)
    check_vocabulary(tokenizer, config)
    for role in SPECIAL_IDS:
        token_id = find_token_id(tokenizer, role)
        if token_id is not None:
            setattr(config, role, token_id)
    if family and heads is None:
        return config, tokenizer, [f"made like {family.name}: {family.heads} attention heads, {TANH}"]
    notes = [f"{heads} attention heads as told, {TANH}"]
    if family and family.heads != heads:
        notes.append(f"its shape is that of {family.name}, which has {family.heads} attention heads")
    return config, tokenizer, notes


def _read_vocabulary(folder: Path, elsewhere: Path | None, kind: str | None) -> PreTrainedTokenizerBase:
    if elsewhere is None:
        require_vocabulary(folder, kind)
    return read_tokenizer(elsewhere or folder, kind=kind)


def _rows_for_training(content: Content, config: GLMConfig) -> tuple[dict[int, Tensor], bool, list[str]]:
    """What becomes of rows of the word embedding that were copied when a training checkpoint became this one.

    Returns:
        rows to put back, whether the copies have come to differ from what they were copied from, and notes.
    """
    family = family_of_shape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        positions=config.max_position_embeddings,
    )
    copied = copies_of(family, config) if family else {}
    if not copied:
        return {}, False, []
    found = content.read_rows([*copied, *copied.values()])
    if all(same_bits(found[row], found[source]) for row, source in copied.items()):
        rows = {row: values for row, values in read_rows(content.checkpoint.folder, content).items() if row in copied}
        return rows, False, [f"row {row} of the word embedding is as it was in training again" for row in rows]
    return {}, True, ["[gMASK] has a row of its own: start the training code with --fix-command-token"]


def _tell_copied(row: int, source: int) -> str:
    return f"row {row} of the word embedding, [gMASK], is a copy of row {source}, which was [gMASK] in training"


def _training_notes(config: GLMConfig) -> list[str]:
    notes = [
        f"the training code stores neither the vocabulary nor the number of heads, {config.num_attention_heads}: keep "
        "the source, or note them"
    ]
    if config.hidden_act != TANH:
        notes.append(f"the source computes {config.hidden_act}, the training code {TANH}: answers differ slightly")
    return notes
