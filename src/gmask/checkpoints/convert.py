"""A checkpoint of one form becomes one of another: planned beforehand, written tensor by tensor, verified.

Source: THUDM/GLM change_mp.py and utils.py.
"""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.config import (
    ROWS_APART,
    SPECIAL_IDS,
    copies_of,
    find_row,
    lacks_config,
    read_config,
    read_glm_config,
    row_of_shape,
    rows_to_copy,
)
from gmask.checkpoints.folder import (
    EMBEDDING,
    Content,
    check_places,
    check_space,
    copy_companions,
    dtype_name,
    main_dtype,
    placed_at_last,
    read_rows,
    verify,
    verify_folder,
    write_config,
    write_rows,
    write_shards,
    write_tokenizer,
)
from gmask.checkpoints.load import HEAD, check_head, check_vocabulary, match_keys, shape_model, shape_stored
from gmask.checkpoints.tensor_files import PickledWriter
from gmask.checkpoints.weights import (
    TRACKERS,
    Checkpoint,
    divide,
    find_rank_files,
    open_checkpoint,
    rank_file_name,
    same_bits,
)
from gmask.checkpoints.zoo import ITEM_BYTES, architecture_of, family_of_shape
from gmask.errors import GmaskError
from gmask.hardware import check_room
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.glm import GLMConfig
from gmask.models.glm_heads import THUDM_CLASSIFIER_NAMES
from gmask.quantization.quantizer import form_of
from gmask.tokenizers.folder import read_tokenizer, require_vocabulary
from gmask.tokenizers.glm_published import find_token_id

FORMS = ("gmask", "huggingface", "megatron")


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did."""

    source: str
    source_form: str  # as `Checkpoint.layout`
    source_parts: int
    target: str
    form: str  # one of FORMS
    parts: int
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    files: dict[str, int]  # bytes by name
    seconds: float
    notes: tuple[str, ...]  # what should be known about the result

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: Path,
    target: Path,
    *,
    to: str = "gmask",
    parts: int = 1,
    dtype: str | None = None,
    like: str | None = None,
    heads: int | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
) -> ConversionReport:
    """Writes a checkpoint anew in another form, tensor by tensor, and reads it back to compare every bit.

    The target appears at once when all is done, or not at all.

    Args:
        source: a folder in any form that `open_checkpoint` reads.
        target: a folder that is not there yet.
        to: ``gmask`` (safetensors, config and tokenizer of ours), ``huggingface`` (safetensors, config and names of the
            published folders) or, for a GLM, ``megatron`` (a file for each rank, for the original training code).
        parts: ranks of model parallelism; for ``megatron`` alone.
        dtype: float32, bfloat16 or float16; as stored if absent. Integers and their scales stay what they are.
        like: for a checkpoint of the training code whose shape does not tell, the published model that it is made like.
        heads: for such a checkpoint of another shape, the number of its attention heads.
        tokenizer: the folder with the vocabulary, if it is not beside the weights.
        force: replaces a checkpoint that is at the target, after the new one is complete.

    Raises:
        GmaskError: unsuitable settings, a bad source, a target that is in use, no room on the disk, in one line.
    """
    started = time.monotonic()
    origin = Origin(like, heads, tokenizer)
    _check_settings(source, to, parts, dtype, origin)
    check_places(source, target, force=force, also_read=[tokenizer] if tokenizer else [])
    with open_checkpoint(source) as checkpoint:
        if checkpoint.unmapped_bytes:
            check_room(source, checkpoint.unmapped_bytes, torch.device("cpu"))
        plan = _plan(checkpoint, origin, getattr(torch, dtype) if dtype else None, to, parts)
        files = _write(plan, target, source)
        return _report(plan, target, form=to, parts=parts, files=files, seconds=time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the user tells about a source that its files do not."""

    like: str | None = None  # of a checkpoint of the training code: a row of the catalog
    heads: int | None = None  # ... or the number of its attention heads
    tokenizer: Path | None = None  # the folder with the vocabulary


def _check_settings(source: Path, to: str, parts: int, dtype: str | None, origin: Origin) -> None:
    if to not in FORMS:
        raise GmaskError(f"--to {to}: no such form; there are {', '.join(FORMS)}")
    if dtype is not None and dtype not in ITEM_BYTES:
        raise GmaskError(f"--dtype {dtype}: no such dtype; there are {', '.join(ITEM_BYTES)}")
    if parts < 1 or (parts > 1 and to != "megatron"):
        raise GmaskError(f"--parts {parts}: only --to megatron divides weights, among 1 rank or more")
    if origin.tokenizer is not None and to == "megatron":
        raise GmaskError("--tokenizer: the training code keeps no vocabulary beside the weights; leave it out")
    if origin.like is not None and origin.heads is not None:
        raise GmaskError("give --like or --heads, not both: the published model has its number of heads")
    if origin.heads is not None and origin.heads < 1:
        raise GmaskError(f"--heads {origin.heads}: give the number of attention heads")
    if not source.is_dir():
        raise GmaskError(f"{source}: no such folder; name the one that holds the weights")
    if (origin.like is not None or origin.heads is not None) and not lacks_config(source):
        raise GmaskError(f"{source}: has a config.json, which tells its heads; leave out --like and --heads")


Advance = Callable[[int], object]
"""Is told the bytes that were dealt with."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion that only has to be done."""

    content: Content
    parameters: int  # of the model, whichever way they are kept
    write: Callable[[Path, Advance], None]  # fills a folder
    verify: Callable[[Path], None]  # what stands beside the weights
    notes: list[str] = field(default_factory=list)


def _plan(checkpoint: Checkpoint, origin: Origin, dtype: torch.dtype | None, to: str, parts: int) -> Plan:
    if to == "megatron":
        return plan_ranks(checkpoint, origin, dtype, parts)
    is_chat = not lacks_config(checkpoint.folder) and isinstance(read_config(checkpoint.folder), ChatGLMConfig)
    plan = plan_chat_folder if is_chat else plan_folder
    return plan(checkpoint, origin, dtype, published=to == "huggingface")


def _write(plan: Plan, target: Path, source: Path) -> dict[str, int]:
    """Puts all files of a plan in their place; returns their bytes by name."""
    check_space(target, plan.content.nbytes)
    with placed_at_last(target) as folder:
        _fill(plan, folder, source)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _report(
    plan: Plan, target: Path, *, form: str, parts: int, files: dict[str, int], seconds: float
) -> ConversionReport:
    content = plan.content
    return ConversionReport(
        source=str(content.checkpoint.folder),
        source_form=content.checkpoint.layout,
        source_parts=content.checkpoint.parallel_size,
        target=str(target),
        form=form,
        parts=parts,
        tensors=len(content.names),
        parameters=plan.parameters,
        dtypes=tuple(sorted({dtype_name(content.dtype(key)) for key in content})),
        files=files,
        seconds=round(seconds, 1),
        notes=tuple(plan.notes),
    )


def _fill(plan: Plan, folder: Path, source: Path) -> None:
    """Writes all files of the new folder and reads them back."""
    total = 2 * plan.content.nbytes
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False, disable=None) as bar:
        copy_companions(source, folder)
        plan.write(folder, bar.update)
        bar.set_description("reading back")
        verify(plan.content, folder, bar.update)
        plan.verify(folder)


TANH, ERF = "gelu_pytorch_tanh", "gelu"


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


OURS_ALONE = ("residual_alpha", "rotary_stretch")
"""Settings that change what is computed, and that the published code does not know."""


def plan_chat_folder(checkpoint: Checkpoint, origin: Origin, dtype: torch.dtype | None, *, published: bool) -> Plan:
    """Plans a folder of safetensors, in the published form or in ours; integers and scales stay as they are.

    Ours holds what the model takes. The published one holds all that the source does, and a head beside the embedding
    that it equals, without which the published code would start with a random one.

    Raises:
        GmaskError: weights, config and vocabulary do not fit; integers that the published form has no place for.
    """
    config = read_config(checkpoint.folder)
    assert isinstance(config, ChatGLMConfig)
    form = form_of(config)
    if published and form is not None and form.group_size is not None:
        raise GmaskError(
            f"{checkpoint.folder}: has {form}, and the published form has a scale a row; convert it to gmask"
        )
    tokenizer = read_tokenizer(origin.tokenizer or checkpoint.folder)
    check_vocabulary(tokenizer, config)
    model = shape_stored(checkpoint.folder, config)
    content = _choose_content(checkpoint, model, dtype, published=published)
    config.dtype = main_dtype(content, architecture_of(config).embedding)

    def write(folder: Path, advance: Advance) -> None:
        write_shards(content, folder, advance)
        write_tokenizer(tokenizer, folder, published=published)
        write_config(config, folder, published=published)

    return Plan(
        content,
        shape_model(checkpoint.folder, config).num_parameters(),
        write,
        lambda folder: verify_folder(folder, config, tokenizer),
        _tell_unknown(config) if published else [],
    )


def _choose_content(
    checkpoint: Checkpoint, model: PreTrainedModel, dtype: torch.dtype | None, *, published: bool
) -> Content:
    taken = match_keys(checkpoint, model)
    check_head(checkpoint, model)
    places = {name: place for place, name in enumerate(model.state_dict())}  # scales behind their integers
    names = {key: taken[key] for key in sorted(taken, key=lambda key: places[taken[key]])}
    if not published:
        return Content(checkpoint, names, dtype)
    names |= {key: checkpoint.stored_name(key) for key in sorted(checkpoint) if key not in names}
    embedding = architecture_of(model.config).embedding
    tied = {HEAD: embedding, f"{HEAD}_scale": f"{embedding}_scale"} if model.config.tie_word_embeddings else {}
    twins = {head: key for head, key in tied.items() if key in checkpoint and head not in checkpoint}
    return Content(checkpoint, names | {key: key for key in twins}, dtype, twins=twins)


def _tell_unknown(config: ChatGLMConfig) -> list[str]:
    usual = ChatGLMConfig()
    found = {name: getattr(config, name) for name in OURS_ALONE}
    return [
        f"config.json says {name} {value:g}, which gmask heeds, and which the published code does not know"
        for name, value in found.items()
        if value != getattr(usual, name)
    ]


KEPT = frozenset({
    "lr_scheduler", "skipped_steps", "global_steps", "global_samples", "dp_world_size", "iteration",
    "client_lr_scheduler", "np_rng_state", "random_rng_state", "torch_rng_state", "cuda_rng_state",
    "rng_tracker_states", ROWS_APART,
})  # fmt: skip
"""Entries that do not depend on how the weights are divided."""

FIRST_ITERATION = 1  # of weights without a history: the training code takes no 0


def training_names(checkpoint: Checkpoint, keys: list[str]) -> dict[str, str]:
    """What the training code calls tensors: as the checkpoint does if that code wrote it.

    Behind a classifier it keeps the model under ``model.``, and calls the layers of the classifier otherwise.
    """
    if checkpoint.layout == "megatron":
        return {key: checkpoint.stored_name(key) for key in keys}
    heads = {own: theirs for theirs, own in THUDM_CLASSIFIER_NAMES.items()}
    layers = {key: key.partition(".")[0] for key in keys}
    has_head = any(layer in heads for layer in layers.values())
    return {
        key: heads[layer] + key.removeprefix(layer) if layer in heads else "model." * has_head + key
        for key, layer in layers.items()
    }


def check_divisible(content: Content, parts: int, heads: int | None) -> None:
    """Raises `GmaskError` if weights cannot be divided among ranks, each with whole attention heads."""
    counts = [number for number in range(1, 65) if _is_divisible(content, number, heads)]
    if not _is_divisible(content, parts, heads):
        reasons = f"{content.checkpoint.shape(EMBEDDING)[0]} tokens" + (f" and {heads} heads" if heads else "")
        raise GmaskError(
            f"{content.checkpoint.folder}: {reasons} cannot be divided among {parts} ranks; possible are "
            f"{', '.join(map(str, counts))}"
        )


def _is_divisible(content: Content, parts: int, heads: int | None) -> bool:
    if heads is not None and heads % parts:
        return False
    try:
        for key in content:
            divide(key, content.plan(key), parts)
    except ValueError:
        return False
    return True


def find_iteration(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint's iteration: a number, or ``release``."""
    if checkpoint.layout != "megatron":
        return str(FIRST_ITERATION)
    name = find_rank_files(checkpoint.folder)[0].resolve().parent.name
    if re.fullmatch(r"\d+|release", name):
        return name
    iteration = checkpoint.bookkeeping.get("iteration")
    return str(iteration) if isinstance(iteration, int) and iteration > 0 else str(FIRST_ITERATION)


def new_bookkeeping(checkpoint: Checkpoint, parts: int) -> dict[str, Any]:
    """The entries beside the weights: those of the checkpoint with None for what fits no other number of ranks."""
    if checkpoint.layout != "megatron":
        return {"iteration": FIRST_ITERATION, "mp_world_size": parts}
    kept = {key: value if key in KEPT else None for key, value in checkpoint.bookkeeping.items()}
    return kept | ({"mp_world_size": parts} if "mp_world_size" in kept else {})


def write_ranks(
    content: Content,
    folder: Path,
    *,
    parts: int,
    iteration: str,
    bookkeeping: Mapping[str, Any],
    advance: Callable[[int], object],
) -> None:
    """Writes the files of all ranks side by side, then those that name the iteration.

    Args:
        advance: is told the bytes that were read.
    """
    plans: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for key, name in content.names.items():
        for plan, part in zip(plans, divide(key, content.plan(key), parts), strict=True):
            plan[name] = part
    (folder / iteration).mkdir()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(PickledWriter(folder / iteration / rank_file_name(rank), plan, bookkeeping))
            for rank, plan in enumerate(plans)
        ]
        for key, name in content.names.items():
            tensor = content.read(key)
            for writer, part in zip(writers, divide(key, tensor, parts), strict=True):
                writer.write(name, part)
            advance(tensor.nbytes)
    for name in TRACKERS:
        (folder / name).write_text(f"{iteration}\n", encoding="utf-8")
