"""A folder becomes another of its kind: an adapter merged in, or weights quantized."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.adapters import LAYERS, merge_adapter, read_adapter
from gmask.checkpoints.config import read_config
from gmask.checkpoints.folder import (
    SHARD_BYTES,
    check_places,
    check_space,
    copy_companions,
    dtype_name,
    placed_at_last,
    write_config,
    write_index,
    write_tokenizer,
)
from gmask.checkpoints.load import (
    check_head,
    check_vocabulary,
    fill_model,
    match_keys,
    plan_weights,
    shape_model,
    stream_weights,
)
from gmask.checkpoints.tensor_files import SafetensorsWriter, plan_shards
from gmask.checkpoints.weights import open_checkpoint
from gmask.checkpoints.zoo import architecture_of
from gmask.errors import GmaskError
from gmask.quantization.quantizer import QuantizationConfig, find_layers, form_of, lay_out


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written."""

    source: str
    adapter: str
    target: str
    layers: int  # whose weights were changed
    dtype: str
    bytes: int  # of all weights
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge_folder(
    source: Path,
    adapter: Path,
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> MergeReport:
    """Writes a model whose weights an adapter was folded into, with its config and tokenizer; the source stays.

    Every layer is computed in float32, and rounded once to the precision that is written. The target appears at once
    when all is done, or not at all.

    Args:
        adapter: the folder of LoRA, DoRA, AdaLoRA or IA3.
        dtype: of the weights in the target; by default that of the source.
        force: replaces a checkpoint that is at the target, after the new one is complete.

    Raises:
        GmaskError: a quantized source; an adapter that no weights can stand for, or that is not for this model; a
            vocabulary that does not fit; a target that is in use; no room on the disk.
    """
    started = time.monotonic()
    check_places(source, target, force=force, also_read=[adapter])
    config = read_config(source)
    check_vocabulary(tokenizer, config)
    if form_of(config) is not None:
        raise GmaskError(
            f"{source}: holds integers, into which nothing can be folded: merge into the unquantized model, then "
            "gmask quantize the result"
        )
    if read_adapter(adapter).kind not in LAYERS:
        raise GmaskError(
            f"{adapter}: a prefix and trained vectors cannot be folded into weights: name the folder as adapter= or "
            "--adapter beside the model"
        )
    with open_checkpoint(source) as checkpoint:
        stored = checkpoint.dtype(architecture_of(config).embedding)
    dtype = dtype or stored
    finest = torch.promote_types(stored, dtype)  # so that the result is rounded once
    model = fill_model(source, config, device=torch.device("cpu"), dtype=finest, adapter=adapter)
    layers = merge_adapter(model)
    model.to(dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    check_space(target, size)
    with placed_at_last(target) as folder:
        _write_merged(model, folder, source, tokenizer)
    seconds = round(time.monotonic() - started, 1)
    return MergeReport(str(source), str(adapter), str(target), layers, dtype_name(dtype), size, seconds)


def _write_merged(model: PreTrainedModel, folder: Path, source: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    write_tokenizer(tokenizer, folder, published=False)
    copy_companions(source, folder)


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What was written."""

    source: str
    target: str
    form: str
    layers: int  # quantized
    calibrated: bool
    bytes_before: int  # of all weights
    bytes_after: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_source(source: Path, target: Path, form: QuantizationConfig, *, force: bool) -> None:
    """Raises `GmaskError` for what would keep `quantize_folder` from its work, before that begins."""
    check_places(source, target, force=force)
    find_layers(_shape(source), form)


def quantize_folder(
    source: Path,
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    form: QuantizationConfig,
    *,
    calibrated: PreTrainedModel | None = None,
    force: bool = False,
) -> QuantizationReport:
    """Writes a model anew in a quantized form, with its config and tokenizer; the source stays as it is.

    Without calibration tensors go one by one from file to file, so no more memory is taken than the largest needs. The
    target appears at once when all is done, or not at all.

    Args:
        calibrated: the model of the source, quantized in the form; by default its weights are rounded as published.
        force: replaces a checkpoint that is at the target, after the new one is complete.

    Raises:
        GmaskError: a source that cannot be read or is quantized already, a vocabulary or a form that does not fit it,
            a target that is in use, no room on the disk.
    """
    started = time.monotonic()
    check_source(source, target, form, force=force)
    with open_checkpoint(source) as checkpoint:
        model = _shape(source)
        check_vocabulary(tokenizer, model.config)
        names = match_keys(checkpoint, model)
        check_head(checkpoint, model)
        layers = len(find_layers(model, form))
        lay_out(model, form)
        stored = {names[key]: checkpoint.dtype(key) for key in names}
        dtype = checkpoint.dtype(architecture_of(model.config).embedding)
        plan = plan_weights(model, stored)
        before = sum(checkpoint.shape(key).numel() * checkpoint.dtype(key).itemsize for key in names)
        after = sum(tensor.nbytes for tensor in plan.values())
        check_space(target, after)
        with placed_at_last(target) as folder:
            if calibrated is None:
                pieces = stream_weights(checkpoint, model, names, verb="quantizing")
            else:
                state = calibrated.state_dict()
                pieces = ((name, state[name].cpu().to(meta.dtype)) for name, meta in plan.items())
            _write_quantized(folder, plan, pieces)
            copy_companions(source, folder)
            model.config.quantization_config, model.config.dtype = form, dtype
            write_config(model.config, folder, published=False)
            write_tokenizer(tokenizer, folder, published=False)
    seconds = round(time.monotonic() - started, 1)
    return QuantizationReport(
        str(source), str(target), str(form), layers, calibrated is not None, before, after, seconds
    )


def _shape(folder: Path) -> PreTrainedModel:
    """The model of a folder, without numbers.

    Raises:
        GmaskError: the folder holds no model, or one that is quantized already.
    """
    config = read_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise GmaskError(f"{folder}: is quantized already; name the folder of the unquantized model")
    return shape_model(folder, config)


def _write_quantized(folder: Path, plan: Mapping[str, Tensor], pieces: Iterator[tuple[str, Tensor]]) -> None:
    shards = plan_shards(plan, SHARD_BYTES)
    places = {name: file for file, shard in shards.items() for name in shard}
    with ExitStack() as stack:
        writers = {file: stack.enter_context(SafetensorsWriter(folder / file, shard)) for file, shard in shards.items()}
        for name, tensor in pieces:
            writers[places[name]].write(name, tensor)
    write_index(shards, folder)
