"""How does a folder with a model become one with int8 or int4 weights?"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.architectures import architecture_of
from gmask.checkpoints.configs import read_config
from gmask.checkpoints.fit import check_head, check_vocabulary, match_keys
from gmask.checkpoints.model_folder import SHARD_BYTES, copy_companions, write_config, write_index, write_tokenizer
from gmask.checkpoints.model_weights import plan_weights, shape_model, stream_weights
from gmask.checkpoints.placing import check_places, check_space, placed_at_last
from gmask.checkpoints.reading import open_checkpoint
from gmask.checkpoints.writing import SafetensorsWriter, plan_shards
from gmask.errors import GmaskError
from gmask.quantization.quantizer import QuantizationConfig, check_model, lay_out


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
    check_model(_shape(source), form)


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
        layers = len(check_model(model, form))
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
            _write(folder, plan, pieces)
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


def _write(folder: Path, plan: Mapping[str, Tensor], pieces: Iterator[tuple[str, Tensor]]) -> None:
    shards = plan_shards(plan, SHARD_BYTES)
    places = {name: file for file, shard in shards.items() for name in shard}
    with ExitStack() as stack:
        writers = {file: stack.enter_context(SafetensorsWriter(folder / file, shard)) for file, shard in shards.items()}
        for name, tensor in pieces:
            writers[places[name]].write(name, tensor)
    write_index(shards, folder)
