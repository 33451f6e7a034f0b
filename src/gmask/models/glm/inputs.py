"""How do the arguments of a forward pass become one layout and one mask?"""

import torch
from torch import Tensor
from transformers import Cache

from gmask.models.glm.configuration import GLMConfig
from gmask.models.layout import derive_layout, published_mask, sequences_of_positions, visible_keys


def resolve_sequences(
    position_ids: Tensor | None, attention_mask: Tensor | None, sequence_ids: Tensor | None, cache: Cache | None
) -> Tensor | None:
    """The packed sequences of each row: as given, or from 1-D positions that start anew (the way trainers pack).

    Raises:
        ValueError: packed rows that continue a cache.
    """
    if sequence_ids is None:
        if position_ids is None or position_ids.ndim != 2 or attention_mask is not None or _continues(cache):
            return None
        return sequences_of_positions(position_ids)
    if _continues(cache):
        raise ValueError("packed rows cannot continue a cache: drop sequence_ids or past_key_values")
    return sequence_ids


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
    if _continues(cache) and not bool((input_ids == sop).any(-1).all()):
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


def build_mask(
    layout: Tensor,
    attention_mask: Tensor | None,
    sequence_ids: Tensor | None,
    cache: Cache | None,
    *,
    published_positions: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """What each query sees: boolean (True = visible), additive for the published forms, or None where it is everything.

    published_positions: 3-D ``position_ids`` came along, so a 2-D mask hides padded keys and nothing else.
    """
    length = layout.shape[-1]
    past_length = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and (
        attention_mask.ndim != 2 or (published_positions and attention_mask.shape[1] > 1)
    ):
        return published_mask(attention_mask, query_length=length, past_length=int(past_length), dtype=dtype)
    key_length = length if cache is None else cache.get_mask_sizes(length, 0)[0]
    static = cache is not None and cache.is_compileable
    if length == 1 and attention_mask is None and not static:
        return None
    if attention_mask is not None and not static and attention_mask.shape[1] < key_length:
        seen = attention_mask.new_ones(len(attention_mask), key_length - attention_mask.shape[1])
        attention_mask = torch.cat((seen, attention_mask), dim=1)  # a cache that the caller's mask does not count
    return visible_keys(
        layout[:, 1] == 0,
        key_length=key_length,
        past_length=past_length,
        key_padding=attention_mask,
        sequence_ids=sequence_ids,
    )


def _continues(cache: Cache | None) -> bool:
    return cache is not None and bool(cache.get_seq_length() > 0)
