"""Converts, quantizes and merges folders of models, and divides checkpoints among ranks.

Each transform makes a `Plan` from an opened folder; `rewrite` carries the plan out, tensor by tensor.

Source: THUDM/GLM change_mp.py and utils.py.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.architectures import architecture_of
from gmask.checkpoints.adapters import LAYERS, merge_adapter, read_adapter
from gmask.checkpoints.folder import HEAD, ROWS_APART, Folder, copies_of
from gmask.checkpoints.formats import TRACKERS, Checkpoint, divide, find_rank_files, rank_file_name, same_bits
from gmask.checkpoints.load import check_vocabulary, fill_model, plan_weights, stream_weights
from gmask.checkpoints.rewrite import Advance, Plan, Report, rewrite
from gmask.checkpoints.save import (
    EMBEDDING,
    Content,
    dtype_name,
    main_dtype,
    read_rows,
    write_rows,
    write_weights,
)
from gmask.checkpoints.tensor_files import PickledWriter
from gmask.checkpoints.zoo import ITEM_BYTES, family_of_shape
from gmask.errors import GmaskError
from gmask.hardware import check_room
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.glm import GLMConfig
from gmask.models.glm_heads import THUDM_CLASSIFIER_NAMES
from gmask.quantization.quantizer import QuantizationConfig, find_layers, lay_out
from gmask.tokenizers.special_tokens import find_token_id

FORMS = ("gmask", "mapped", "huggingface", "megatron")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport(Report):
    """The report of `convert`."""

    source_form: str  # as `Checkpoint.layout`
    source_parts: int
    form: str  # one of FORMS
    parts: int
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    files: dict[str, int]  # bytes by name
    notes: tuple[str, ...]  # to the user, about the result


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
    """Writes a checkpoint in another form, tensor by tensor, reads it back, and compares every bit.

    Args:
        source: a folder in any form that `open_checkpoint` reads.
        target: and ``force``: as of `rewrite`.
        to: ``gmask`` (safetensors, config and tokenizer of ours), ``mapped`` (the same, with int8 or int4 weights as
            the CPU kernels read them, so that loading copies nothing, and processes share the memory), ``huggingface``
            (safetensors, config and names of the published folders) or, for a GLM, ``megatron`` (a file for each rank,
            for the original training code).
        parts: ranks of model parallelism; for ``megatron`` alone.
        dtype: float32, bfloat16 or float16; as stored if absent. Integers and their scales stay what they are.
        like: the published model that a checkpoint of the training code is an instance of, if its shape is not unique.
        heads: the number of attention heads of such a checkpoint, if it is no published model.
        tokenizer: the folder with the vocabulary, if it is not beside the weights.

    Raises:
        GmaskError: unsuitable settings; as of `rewrite`; weights, config and vocabulary that do not fit together; an
            unknown number of heads; a model that the form cannot hold.
    """
    folder = Folder(source, like=like, heads=heads, tokenizer=tokenizer)
    _check_settings(folder, to, parts, dtype, has_tokenizer=tokenizer is not None)
    wanted = getattr(torch, dtype) if dtype else None
    if to == "megatron":
        transform = partial(_plan_ranks, parts=parts, dtype=wanted)
    else:
        transform = partial(_plan_folder, to=to, dtype=wanted)
    return rewrite(folder, target, transform, force=force, also_read=[tokenizer] if tokenizer else [])


def _check_settings(folder: Folder, to: str, parts: int, dtype: str | None, *, has_tokenizer: bool) -> None:
    if to not in FORMS:
        raise GmaskError(f"--to {to}: no such form; there are {', '.join(FORMS)}")
    if dtype is not None and dtype not in ITEM_BYTES:
        raise GmaskError(f"--dtype {dtype}: no such dtype; there are {', '.join(ITEM_BYTES)}")
    if parts < 1 or (parts > 1 and to != "megatron"):
        raise GmaskError(f"--parts {parts}: only --to megatron divides weights, among 1 rank or more")
    if has_tokenizer and to == "megatron":
        raise GmaskError("--tokenizer: the training code keeps no vocabulary beside the weights; leave it out")
    if folder.like is not None and folder.heads is not None:
        raise GmaskError("give --like or --heads, not both: the published model has its number of heads")
    if folder.heads is not None and folder.heads < 1:
        raise GmaskError(f"--heads {folder.heads}: give the number of attention heads")
    if not folder.path.is_dir():
        raise GmaskError(f"{folder}: no such folder; name the one that holds the weights")
    if (folder.like is not None or folder.heads is not None) and not folder.lacks_config:
        raise GmaskError(f"{folder}: has a config.json, which tells its heads; leave out --like and --heads")


def _report_conversion(
    content: Content, form: str, parameters: int, notes: list[str], parts: int = 1
) -> Callable[..., ConversionReport]:
    return partial(
        ConversionReport,
        source_form=content.checkpoint.layout,
        source_parts=content.checkpoint.parallel_size,
        form=form,
        parts=parts,
        tensors=len(content.names),
        parameters=parameters,
        dtypes=tuple(sorted({dtype_name(content.dtype(key)) for key in content})),
        notes=tuple(notes),
    )


def _plan_folder(folder: Folder, *, to: str, dtype: torch.dtype | None) -> Plan[ConversionReport]:
    """Plans a Hugging Face folder, in the published form or in one of ours."""
    weights, config, published = _open_weights(folder), folder.config, to == "huggingface"
    if to == "mapped" and folder.quantization is None:
        raise GmaskError(f"{folder}: --to mapped is for int8 or int4 weights: convert what gmask quantize wrote")
    if isinstance(config, GLMConfig) and (published or weights.layout != "mapped") and to != "mapped":
        _refuse_quantized(folder)
    elif published and folder.quantization is not None and folder.quantization.group_size is not None:
        raise GmaskError(
            f"{folder}: has {folder.quantization}, and the published form has a scale a row; convert it to gmask"
        )
    tokenizer = folder.read_tokenizer(required=isinstance(config, GLMConfig))
    check_vocabulary(tokenizer, config)
    notes = _complete_config(folder, tokenizer) if folder.lacks_config else []
    model = folder.shape_model()
    names = folder.compare(model)
    folder.check_head(model)
    rows: dict[int, Tensor] = {}
    if isinstance(config, GLMConfig):
        content, rows, more = _glm_content(folder, config, names, dtype, published=published)
        notes += more
    else:
        content = _chatglm_content(weights, model, names, dtype, published=published)
        notes += _residual_notes(config) if published else []
    config.dtype = main_dtype(content, architecture_of(config).embedding)

    def write(new: Path, advance: Advance) -> None:
        form = folder.quantization if to == "mapped" else None
        content.write(new, advance, block_bits=None if form is None else form.bits)
        if rows:
            write_rows(rows, new)

    parameters = folder.shape_model(quantized=False).num_parameters()
    report = _report_conversion(content, to, parameters, notes)
    return Plan(content.nbytes, write, report, config, tokenizer, published, expected=content)


def _open_weights(folder: Folder) -> Checkpoint:
    """Returns the weights. Raises `GmaskError` if their files cannot be mapped, and do not fit into memory."""
    if folder.weights.unmapped_bytes:
        check_room(folder.path, folder.weights.unmapped_bytes, torch.device("cpu"))
    return folder.weights


def _refuse_quantized(folder: Folder) -> None:
    if folder.quantization is not None:
        raise GmaskError(
            f"{folder}: is quantized ({folder.quantization}), for which GLM has this form alone: nothing to convert; "
            "name the folder of the unquantized model"
        )


def _complete_config(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Adds the special ids of the vocabulary to the config of a checkpoint of the training code; returns notes."""
    config, family, heads = folder.config, folder.family, folder.heads
    for role in architecture_of(config).special_ids:
        token_id = find_token_id(tokenizer, role)
        if token_id is not None:
            setattr(config, role, token_id)
    if family and heads is None:
        return [f"made like {family.name}: {family.heads} attention heads, {TANH}"]
    notes = [f"{heads} attention heads as told, {TANH}"]
    if family and family.heads != heads:
        notes.append(f"its shape is that of {family.name}, which has {family.heads} attention heads")
    return notes


TANH, ERF = "gelu_pytorch_tanh", "gelu"


def _glm_content(
    folder: Folder, config: GLMConfig, names: Mapping[str, str], dtype: torch.dtype | None, *, published: bool
) -> tuple[Content, dict[int, Tensor], list[str]]:
    """Returns the tensors of a GLM, the rows of the word embedding that they replace, and notes.

    The replaced rows are written beside the model, so that it can become a training checkpoint again.
    """
    if published and not config.tie_word_embeddings:
        raise GmaskError(
            f"{folder}: its output head is not the word embedding, which the published form has no place for; convert "
            "it to gmask"
        )
    if published and not any(key for key in names if not key.startswith(("word_embeddings.", "transformer."))):
        names = {key: key for key in names}
    content, notes = Content(folder.weights, names, dtype), []
    replaced = read_rows(folder.path, content)
    if copied := folder.copied_rows():
        old, new = content.read_rows(list(copied)), content.read_rows(list(copied.values()))
        content = content.with_rows({row: new[source] for row, source in copied.items()})
        replaced = {row: old[row] for row, source in copied.items() if not same_bits(old[row], new[source])}
        notes = [
            f"row {row} of the word embedding, [gMASK], is a copy of row {source}, which was [gMASK] in training"
            for row, source in copied.items()
        ]
    if published and config.hidden_act != ERF:
        notes.append(
            f"config.json says hidden_act {config.hidden_act}, which gmask heeds; the published code computes the erf "
            "form of GELU whatever stands there"
        )
    return content, replaced, notes


def _chatglm_content(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    taken: Mapping[str, str],
    dtype: torch.dtype | None,
    *,
    published: bool,
) -> Content:
    """Returns the tensors of a ChatGLM; integers and scales stay as they are.

    Our form holds the tensors that the model takes. The published form holds all tensors of the source, and the head
    even if it is tied to the embedding: without it the published code would start with a random one.
    """
    positions = {name: position for position, name in enumerate(model.state_dict())}  # scales behind their integers
    names = {key: taken[key] for key in sorted(taken, key=lambda key: positions[taken[key]])}
    if not published:
        return Content(checkpoint, names, dtype)
    names |= {key: checkpoint.stored_name(key) for key in sorted(checkpoint) if key not in names}
    embedding = architecture_of(model.config).embedding
    tied = {HEAD: embedding, f"{HEAD}_scale": f"{embedding}_scale"} if model.config.tie_word_embeddings else {}
    twins = {head: key for head, key in tied.items() if key in checkpoint and head not in checkpoint}
    return Content(checkpoint, names | {key: key for key in twins}, dtype, twins=twins)


def _residual_notes(config: ChatGLMConfig) -> list[str]:
    """Returns a note if the config has a ``residual_alpha`` that the published code does not know."""
    alpha = config.residual_alpha
    if alpha == ChatGLMConfig().residual_alpha:
        return []
    return [f"config.json says residual_alpha {alpha:g}, which gmask heeds, and which the published code does not know"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport(Report):
    """The report of `quantize_folder`."""

    form: str
    layers: int  # quantized
    calibrated: bool
    bytes_before: int  # of all weights
    bytes_after: int


def quantize_folder(
    source: Path,
    target: Path,
    form: QuantizationConfig,
    *,
    tokenizer: Path | None = None,
    calibrate: Callable[[], PreTrainedModel] | None = None,
    force: bool = False,
) -> QuantizationReport:
    """Writes a quantized model, with its config and tokenizer.

    Without calibration, tensors are copied one by one from file to file, so that only the largest has to fit into
    memory.

    Args:
        source: a folder in any form.
        target: and ``force``: as of `rewrite`.
        tokenizer: the folder with the vocabulary, if it is not beside the weights.
        calibrate: returns the model of the source, quantized in the form; it is called once all is checked. By default
            the weights are rounded as published.

    Raises:
        GmaskError: as of `rewrite`; a source that is quantized already; a vocabulary or a form that does not fit it.
    """
    transform = partial(_plan_quantized, form=form, calibrate=calibrate)
    return rewrite(Folder(source, tokenizer=tokenizer), target, transform, force=force)


def _plan_quantized(
    folder: Folder, form: QuantizationConfig, calibrate: Callable[[], PreTrainedModel] | None
) -> Plan[QuantizationReport]:
    config = folder.config
    if folder.quantization is not None:
        raise GmaskError(f"{folder}: is quantized already; name the folder of the unquantized model")
    weights, model = _open_weights(folder), folder.shape_model()
    layers = len(find_layers(model, form))
    tokenizer = folder.read_tokenizer()
    check_vocabulary(tokenizer, config)
    names = folder.compare(model)
    folder.check_head(model)
    lay_out(model, form)
    plan = plan_weights(model, {names[key]: weights.dtype(key) for key in names})
    before = sum(weights.shape(key).numel() * weights.dtype(key).itemsize for key in names)
    after = sum(tensor.nbytes for tensor in plan.values())
    config.quantization_config, config.dtype = form, weights.dtype(architecture_of(config).embedding)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        if calibrate is None:
            yield from stream_weights(folder, model, names)
        else:
            state = calibrate().state_dict()
            yield from ((name, state[name].cpu().to(meta.dtype)) for name, meta in plan.items())

    def write(new: Path, advance: Advance) -> None:
        write_weights(new, plan, tensors(), advance)

    def report(files: Mapping[str, int], **common: Any) -> QuantizationReport:
        return QuantizationReport(
            **common,
            form=str(form),
            layers=layers,
            calibrated=calibrate is not None,
            bytes_before=before,
            bytes_after=after,
        )

    return Plan(after, write, report, config, tokenizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport(Report):
    """The report of `merge_folder`."""

    adapter: str
    layers: int  # whose weights were changed
    dtype: str
    bytes: int  # of all weights


def merge_folder(
    source: Path, adapter: Path, target: Path, *, dtype: torch.dtype | None = None, force: bool = False
) -> MergeReport:
    """Writes a model with an adapter merged into its weights, with its config and tokenizer.

    Every layer is computed in float32, and rounded once to the dtype that is written.

    Args:
        adapter: the folder of LoRA, DoRA, AdaLoRA or IA3.
        target: and ``force``: as of `rewrite`.
        dtype: of the weights in the target; by default that of the source.

    Raises:
        GmaskError: as of `rewrite`; a quantized source; an adapter that cannot be merged, or is not for this model; a
            vocabulary that does not fit.
    """
    transform = partial(_plan_merge, adapter=adapter, dtype=dtype)
    return rewrite(Folder(source), target, transform, force=force, also_read=[adapter])


def _plan_merge(folder: Folder, adapter: Path, dtype: torch.dtype | None) -> Plan[MergeReport]:
    config = folder.config
    if folder.quantization is not None:
        raise GmaskError(
            f"{folder}: holds integers, into which nothing can be folded: merge into the unquantized model, then "
            "gmask quantize the result"
        )
    if read_adapter(adapter).kind not in LAYERS:
        raise GmaskError(
            f"{adapter}: a prefix and trained vectors cannot be folded into weights: name the folder as adapter= or "
            "--adapter beside the model"
        )
    tokenizer = folder.read_tokenizer()
    check_vocabulary(tokenizer, config)
    stored = folder.weights.dtype(architecture_of(config).embedding)
    written = dtype or stored
    finest = torch.promote_types(stored, written)  # so that the result is rounded once
    model = fill_model(folder, device=torch.device("cpu"), dtype=finest, adapter=adapter)
    layers = merge_adapter(model)
    model.to(written)
    config.architectures, config.dtype = [type(model).__name__], written
    tied = model.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in sorted(model.state_dict().items()) if name not in tied}
    size = sum(tensor.nbytes for tensor in tensors.values())

    def write(new: Path, advance: Advance) -> None:
        if model.can_generate():
            model.generation_config.save_pretrained(new)
        write_weights(new, tensors, tensors.items(), advance)

    def report(files: Mapping[str, int], **common: Any) -> MergeReport:
        return MergeReport(**common, adapter=str(adapter), layers=layers, dtype=dtype_name(written), bytes=size)

    return Plan(size, write, report, config, tokenizer)


def _plan_ranks(folder: Folder, *, parts: int, dtype: torch.dtype | None) -> Plan[ConversionReport]:
    """Plans a checkpoint of the training code."""
    weights = _open_weights(folder)
    bookkeeping = new_bookkeeping(weights, parts)
    rows: dict[int, Tensor] = {}
    notes: list[str] = []
    if folder.lacks_config:
        heads = folder.heads or (folder.family.heads if folder.family else None)
        content = Content(weights, training_names(weights, weights.keys()), dtype)
    else:
        config = folder.glm_config
        _refuse_quantized(folder)
        heads, model = config.num_attention_heads, folder.shape_model()
        keys = list(folder.compare(model))
        folder.check_head(model)
        if not config.tie_word_embeddings:
            raise GmaskError(
                f"{folder}: its output head is not the word embedding, which the training code has no place for; "
                "convert it to gmask"
            )
        content = Content(weights, training_names(weights, keys), dtype)
        rows, is_apart, notes = _rows_for_training(content, config)
        bookkeeping |= {ROWS_APART: True} if is_apart else {}
        notes += _training_notes(config)
    check_divisible(content, parts, heads)
    content, iteration = content.with_rows(rows), find_iteration(weights)

    def write(new: Path, advance: Advance) -> None:
        write_ranks(content, new, parts=parts, iteration=iteration, bookkeeping=bookkeeping, advance=advance)

    report = _report_conversion(content, "megatron", content.numbers, notes, parts)
    return Plan(content.nbytes, write, report, expected=content)


def _rows_for_training(content: Content, config: GLMConfig) -> tuple[dict[int, Tensor], bool, list[str]]:
    """Handles rows of the word embedding that were copied when a training checkpoint became this one.

    Returns:
        The rows to put back; True if a copy has changed since, so that it needs a row of its own; notes.
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


def _training_notes(config: GLMConfig) -> list[str]:
    notes = [
        f"the training code stores neither the vocabulary nor the number of heads, {config.num_attention_heads}: keep "
        "the source, or note them"
    ]
    if config.hidden_act != TANH:
        notes.append(f"the source computes {config.hidden_act}, the training code {TANH}: answers differ slightly")
    return notes


KEPT = frozenset({
    "lr_scheduler", "skipped_steps", "global_steps", "global_samples", "dp_world_size", "iteration",
    "client_lr_scheduler", "np_rng_state", "random_rng_state", "torch_rng_state", "cuda_rng_state",
    "rng_tracker_states", ROWS_APART,
})  # fmt: skip
"""Entries that do not depend on how the weights are divided."""

FIRST_ITERATION = 1  # of weights without a history: the training code takes no 0


def training_names(checkpoint: Checkpoint, keys: list[str]) -> dict[str, str]:
    """Returns the names of tensors in the training code: those of the checkpoint, if that code wrote it.

    In a classifier the training code has the model under ``model.``, and other names for the layers of the head.
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
    """Returns the name of a checkpoint's iteration: a number, or ``release``."""
    if checkpoint.layout != "megatron":
        return str(FIRST_ITERATION)
    name = find_rank_files(checkpoint.folder)[0].resolve().parent.name
    if re.fullmatch(r"\d+|release", name):
        return name
    iteration = checkpoint.bookkeeping.get("iteration")
    return str(iteration) if isinstance(iteration, int) and iteration > 0 else str(FIRST_ITERATION)


def new_bookkeeping(checkpoint: Checkpoint, parts: int) -> dict[str, Any]:
    """Returns the entries beside the weights. Of those of a checkpoint, None replaces all that depend on the ranks."""
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
    """Writes the files of all ranks in one pass over the tensors, then the files that name the iteration.

    Args:
        advance: is called with the number of bytes of each tensor that was read.
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
