"""What stands in a new checkpoint of the training code, and how is it divided among its ranks?

Source: THUDM/GLM change_mp.py and utils.py.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from gmask.checkpoints.content import EMBEDDING, Content
from gmask.checkpoints.megatron import TRACKERS, find_rank_files, rank_file_name
from gmask.checkpoints.megatron_config import ROWS_APART
from gmask.checkpoints.reading import Checkpoint
from gmask.checkpoints.weight_maps import divide
from gmask.checkpoints.writing import PickledWriter
from gmask.errors import GmaskError
from gmask.models.glm.heads import THUDM_CLASSIFIER_NAMES

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
