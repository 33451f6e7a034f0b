"""How does a checkpoint of one form become one of another?"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gmask.checkpoints.catalog import ITEM_BYTES
from gmask.checkpoints.chat_plans import plan_chat_folder
from gmask.checkpoints.configs import lacks_config, read_config
from gmask.checkpoints.content import dtype_name, verify
from gmask.checkpoints.memory import check_room
from gmask.checkpoints.model_folder import copy_companions
from gmask.checkpoints.placing import check_places, check_space, placed_at_last
from gmask.checkpoints.plans import Origin, Plan, plan_folder, plan_ranks
from gmask.checkpoints.reading import Checkpoint, open_checkpoint
from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig

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
