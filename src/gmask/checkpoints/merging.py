"""How does a model with an adapter become a model of its own?"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.adapter_files import LAYERS, read_adapter
from gmask.checkpoints.adapters import merge_adapter
from gmask.checkpoints.architectures import architecture_of
from gmask.checkpoints.configs import read_config
from gmask.checkpoints.content import dtype_name
from gmask.checkpoints.fit import check_vocabulary
from gmask.checkpoints.model_folder import SHARD_BYTES, copy_companions, write_tokenizer
from gmask.checkpoints.model_weights import fill_model
from gmask.checkpoints.placing import check_places, check_space, placed_at_last
from gmask.checkpoints.reading import open_checkpoint
from gmask.errors import GmaskError
from gmask.quantization.quantizer import form_of


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
        _write(model, folder, source, tokenizer)
    seconds = round(time.monotonic() - started, 1)
    return MergeReport(str(source), str(adapter), str(target), layers, dtype_name(dtype), size, seconds)


def _write(model: PreTrainedModel, folder: Path, source: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    write_tokenizer(tokenizer, folder, published=False)
    copy_companions(source, folder)
