"""How are the arguments of a forward pass read, for either architecture: packed sequences, one mask, what is kept?"""

import torch
from torch import Tensor
from transformers import Cache

from gmask.models.layout import published_mask, sequences_of_positions, visible_keys


def resolve_sequences(
    position_ids: Tensor | None, attention_mask: Tensor | None, sequence_ids: Tensor | None, cache: Cache | None
) -> Tensor | None:
    """The packed sequences of each row: as given, or from 1-D positions that start anew (the way trainers pack).

    Raises:
        ValueError: packed rows that continue a cache.
    """
    if sequence_ids is None:
        if position_ids is None or position_ids.ndim != 2 or attention_mask is not None or continues(cache):
            return None
        return sequences_of_positions(position_ids)
    if continues(cache):
        raise ValueError("packed rows cannot continue a cache: drop sequence_ids or past_key_values")
    return sequence_ids


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
        return _drop_idle(
            published_mask(attention_mask, query_length=length, past_length=int(past_length), dtype=dtype)
        )
    key_length = length if cache is None else cache.get_mask_sizes(length, 0)[0]
    static = cache is not None and cache.is_compileable
    if length == 1 and attention_mask is None and not static:
        return None
    if attention_mask is not None and not static and attention_mask.shape[1] < key_length:
        seen = attention_mask.new_ones(len(attention_mask), key_length - attention_mask.shape[1])
        attention_mask = torch.cat((seen, attention_mask), dim=1)  # a cache that the caller's mask does not count
    return _drop_idle(
        visible_keys(
            layout[:, 1] == 0,
            key_length=key_length,
            past_length=past_length,
            key_padding=attention_mask,
            sequence_ids=sequence_ids,
        )
    )


def _drop_idle(mask: Tensor) -> Tensor | None:
    """None for a mask that hides nothing: attention is faster without one."""
    if not mask.is_cpu or torch.compiler.is_compiling():
        return mask  # reading values would make the program wait for the device
    hides = ~mask if mask.dtype == torch.bool else mask
    return mask if bool(hides.any()) else None


def continues(cache: Cache | None) -> bool:
    """Whether tokens have been read before those of this pass."""
    return cache is not None and bool(cache.get_seq_length() > 0)


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Of ``hidden_states [B, T, H]`` those that logits are wanted of.

    Args:
        logits_to_keep: as in transformers, how many last positions (0 = all) or which ones ``[K]`` of every row; or a
            boolean mask ``[B, T]``, which gives ``[n, H]`` in row order: training pays for no other position.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    return hidden_states[logits_to_keep] if logits_to_keep.dtype == torch.bool else hidden_states[:, logits_to_keep]
