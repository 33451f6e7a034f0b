"""Will a run fit into the memory of this machine?"""

import psutil  # type: ignore[import-untyped]
import torch
from transformers import PreTrainedModel

from gmask.checkpoints.memory import format_bytes, free_bytes
from gmask.estimation.training import OPTIMIZER_BYTES, estimate_training
from gmask.loading import find_folder
from gmask.quantization.quantizer import read_form
from gmask.tasks.recipes.tuning import TuningRecipe


def describe_memory(
    recipe: TuningRecipe,
    model: PreTrainedModel,
    *,
    length: int,
    labelled: int,
    processes: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """The estimated peak of a run against what is there, in a line; None for an optimizer whose state is not known.

    Args:
        length: of the longest row, in tokens.
        labelled: the most tokens of a row that something is to be learnt from.
        processes: that share the weights, where the recipe has them shared.
        dtype: what the forward pass computes in.
    """
    optimization = recipe.optimization
    rows = -(-length // model.config.max_position_embeddings)  # as which a packed row that is longer counts
    shares = optimization.trainer.get("fsdp") or optimization.trainer.get("deepspeed")
    optimizer = str(optimization.trainer.get("optim", "adamw"))
    if optimizer not in OPTIMIZER_BYTES:
        return None
    kind = device.type
    assert kind in ("cpu", "cuda", "mps")
    frozen = [parameter.dtype for parameter in model.parameters() if not parameter.requires_grad]
    floats = [found for found in frozen if found.is_floating_point]
    needed = estimate_training(
        find_folder(recipe.model.name),
        method=recipe.method,
        dtype=floats[0] if floats else torch.float32,
        autocast=dtype == torch.bfloat16,
        form=read_form(recipe.model.quantize, None),
        batch_size=optimization.batch_size * rows,
        length=-(-length // rows),
        answer_length=max(1, -(-labelled // rows)),
        shards=processes if shares else 1,
        optimizer=optimizer,
        gradient_checkpointing=optimization.gradient_checkpointing,
        accumulation=optimization.accumulation,
        device_kind=kind,  # type: ignore[arg-type]  # asserted above
    ).peak
    room = free_bytes(device) + _held_bytes(device)
    told = f"memory: about {format_bytes(needed)} at the most, {format_bytes(room)} are there"
    if needed <= room:
        return told
    return (
        f"{told}: lower optimization.batch_size (and raise accumulation), set optimization.gradient_checkpointing, or "
        "choose lora or qlora"
    )


def _held_bytes(device: torch.device) -> int:
    """What this run has taken already."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)
