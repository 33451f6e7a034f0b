"""Which layout do the arguments of a GLM's forward pass carry?"""

import torch
from torch import Tensor
from transformers import Cache

from gmask.models.glm.configuration import GLMConfig
from gmask.models.inputs import continues
from gmask.models.layout import derive_layout


def read_layout(
    config: GLMConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    sequence_ids: Tensor | None,
    cache: Cache | None,
) -> Tensor:
    """The layout ``[B, 2, T]`` that the token ids carry; beside a published mask, plain positions, as published.

    Raises:
        ValueError: the ids carry none, or the config does not say which ids are blanks.
    """
    if input_ids is None:
        raise ValueError("inputs_embeds carry no layout: pass layout [B, 2, T]")
    batch, length = input_ids.shape
    if attention_mask is not None and attention_mask.ndim != 2:
        place = torch.arange(length, device=input_ids.device).expand(batch, -1)
        return torch.stack((place, torch.zeros_like(place)), dim=1)
    sop, blanks = config.sop_token_id, config.blank_token_ids
    if sop is None or not blanks:
        raise ValueError("the config has no sop_token_id or blank ids: load with gmask.load, or pass layout [B, 2, T]")
    if continues(cache) and not bool((input_ids == sop).any(-1).all()):
        raise ValueError("tokens that continue a cached answer carry no layout: pass layout [B, 2, T]")
    return derive_layout(
        input_ids,
        blank_token_ids=blanks,
        sop_token_id=sop,
        attention_mask=None if attention_mask is None else attention_mask[:, -length:],
        sequence_ids=sequence_ids,
    )


def check_layout(layout: Tensor, inputs_embeds: Tensor, *, config: GLMConfig) -> None:
    """Raises `ValueError` for a layout of another shape, or places that the tables do not have."""
    batch, length, _ = inputs_embeds.shape
    if layout.shape != (batch, 2, length):
        raise ValueError(f"layout is {list(layout.shape)}: for these inputs it must be {[batch, 2, length]}")
    if not layout.is_cpu or torch.compiler.is_compiling():
        return  # reading values would make the program wait for the device
    used = layout if config.block_position_encoding else layout[:, :1]
    lowest, highest = int(used.min()), int(used.max())
    if lowest < 0 or highest >= config.position_rows:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"position {wrong} is beyond the {config.position_rows} positions of this model: "
            "shorten the text or the answer"
        )
