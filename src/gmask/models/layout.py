"""2-D positions and attention masks: the layout, visibility, and packed sequences.

A prefix language model needs two things beside the token ids. The *layout* ``[B, 2, T]`` holds each token's position in
the context (row 0; an answer token has the position of the blank that it fills) and its position in the answer (row 1;
0 in the context, 1 for ``<sop>``, 2 for the token after it). The *visibility* ``[B, 1, T, K]`` is True if a query may
attend to a key: the context sees itself in both directions, an answer sees its context and the tokens before it.

What makes a layout instead of reading it off ids: ``derive_chat_layout`` in chatglm.py, ChatGLM's rule;
``infilling/blanks.py``, whose answers are shuffled; ``generation/padding.py``, for contexts side by side.

Shape letters: B batch rows, T query positions, K key positions (cached ones first).

Source: Du et al., "GLM: General Language Model Pretraining with Autoregressive Blank Infilling", ACL 2022, section 2.1.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache

from gmask.native.ops import is_captured

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def derive_layout(
    input_ids: Tensor,
    *,
    blank_token_ids: Sequence[int],
    sop_token_id: int,
    attention_mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """Derives the layout from the tokens.

    The context ends at the first ``<sop>``. The n-th ``<sop>`` opens the answer to the n-th blank, or to the last blank
    if there are fewer.

    Args:
        input_ids: ``[B, T]``.
        blank_token_ids: ids of ``[MASK]``, ``[sMASK]``, ``[gMASK]``.
        attention_mask: ``[B, T]``, 0 at padding, which does not count: a row has the same layout with and without it.
        sequence_ids: ``[B, T]``, the packed sequence of each token; -1 at padding. By default a row is one sequence.

    Returns:
        ``[B, 2, T]`` int64.

    Raises:
        ValueError: a sequence has a ``<sop>`` but no blank before it.
    """
    is_real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if sequence_ids is None:
        sequence_ids = torch.zeros_like(input_ids)
    is_real = is_real & (sequence_ids >= 0)
    is_sop = (input_ids == sop_token_id) & is_real
    sop_count = _count_within(sequence_ids, is_sop)
    in_answer = (sop_count > 0) & is_real
    blank_ids = torch.tensor(list(blank_token_ids), device=input_ids.device)
    is_blank = torch.isin(input_ids, blank_ids) & is_real & ~in_answer
    position = (_count_within(sequence_ids, is_real) - 1).clamp(min=0)
    of_blank = position.gather(1, _find_blanks(sequence_ids, is_blank, sop_count, in_answer))
    context_position = torch.where(in_answer, of_blank, position)
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_sop = torch.where(is_sop, column, torch.zeros_like(input_ids)).cummax(-1).values
    answer_position = torch.where(in_answer, column - last_sop + 1, torch.zeros_like(input_ids))
    context_position = torch.where(is_real, context_position, torch.zeros_like(input_ids))
    return torch.stack((context_position, answer_position), dim=1)


def _count_within(sequence_ids: Tensor, flags: Tensor) -> Tensor:
    """Returns the number of flags ``[B, T]`` up to and including each token, within its packed sequence."""
    total = flags.long().cumsum(-1)
    starts = torch.ones_like(flags)
    starts[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    before = torch.where(starts, total - flags.long(), torch.zeros_like(total))
    return total - before.cummax(-1).values


def _find_blanks(sequence_ids: Tensor, is_blank: Tensor, sop_count: Tensor, in_answer: Tensor) -> Tensor:
    """Returns the column of the blank that each token of an answer fills, ``[B, T]``; undefined at other tokens.

    Each blank has the key (sequence, rank), in ascending order. An answer takes the greatest key not above its own.

    Raises:
        ValueError: an answer without a blank before it.
    """
    key = sequence_ids * (sequence_ids.shape[1] + 1)  # a width that no count within a row reaches
    none = torch.full_like(key, torch.iinfo(key.dtype).max)
    blank_keys, order = torch.where(is_blank, key + _count_within(sequence_ids, is_blank), none).sort(-1)
    found = torch.searchsorted(blank_keys, key + sop_count, right=True) - 1
    blank = found.clamp(min=0)
    is_lost = in_answer & ((found < 0) | (blank_keys.gather(1, blank) < key))
    if not is_captured() and bool(is_lost.any()):
        raise ValueError(
            "a sequence has <sop> but no [MASK], [sMASK] or [gMASK] before it: put the blank into the context"
        )
    return order.gather(1, blank)


def extend_layout(layout: Tensor, new_tokens: int) -> Tensor:
    """Appends the positions of the next ``new_tokens`` tokens of the same answer."""
    steps = torch.arange(1, new_tokens + 1, device=layout.device, dtype=layout.dtype)
    last = layout[:, :, -1:]
    return torch.cat((layout, torch.cat((last[:, :1].expand(-1, -1, new_tokens), last[:, 1:] + steps), dim=1)), dim=-1)


def sequences_of_positions(position_ids: Tensor) -> Tensor:
    """Returns the packed sequences ``[B, T]`` of 1-D positions ``[B, T]``: each 0 starts a sequence."""
    return (position_ids == 0).long().cumsum(-1) - 1


def visible_keys(
    in_context: Tensor,
    *,
    key_length: int,
    past_length: int | Tensor = 0,
    key_padding: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """Returns the prefix-LM visibility ``[B, 1, T, K]`` (True = visible).

    Args:
        in_context: ``[B, T]`` bool, True for queries in the context.
        key_length: K; with a static cache it is more than the tokens so far.
        past_length: cached tokens before the first query; all of them are visible unless padded.
        key_padding: ``[B, <=K]``, 0 at padding.
        sequence_ids: ``[B, T]``; packed sequences do not see each other. Only without a cache.
    """
    batch, length = in_context.shape
    key_position = torch.arange(key_length, device=in_context.device)
    query_position = torch.arange(length, device=in_context.device) + past_length
    visible = (key_position[None, :] <= query_position[:, None])[None]  # [1, T, K]
    if length > 1:
        context_key = in_context.new_zeros(batch, key_length)
        if isinstance(past_length, int):
            context_key[:, past_length : past_length + length] = in_context
        else:  # a compiled graph must not depend on the length of the cache
            context_key.scatter_(1, query_position.expand(batch, -1), in_context)
        visible = visible | (in_context[:, :, None] & context_key[:, None, :])
    if sequence_ids is not None:
        visible = visible & (sequence_ids[:, :, None] == sequence_ids[:, None, :])
    if key_padding is not None:
        padded = in_context.new_ones(batch, key_length)
        padded[:, : key_padding.shape[1]] = key_padding.bool()
        visible = visible & padded[:, None, :]
    return visible.expand(batch, -1, -1)[:, None]


def block_mask(in_context: Tensor, sequence_ids: Tensor) -> "BlockMask":
    """Returns the prefix-LM visibility of packed rows for flex_attention, which leaves out blocks that see nothing.

    Args:
        in_context: ``[B, T]`` bool, True for tokens of a context.
        sequence_ids: ``[B, T]``; packed sequences do not see each other.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (key <= query) | (in_context[row, query] & in_context[row, key])
        return visible & (sequence_ids[row, query] == sequence_ids[row, key])

    batch, length = in_context.shape
    return create_block_mask(sees, batch, None, length, length, device=in_context.device)


def published_mask(attention_mask: Tensor, *, query_length: int, past_length: int, dtype: torch.dtype) -> Tensor:
    """Converts a mask in one of the published forms into an additive one, broadcastable to ``[B, 1, T, K]``.

    One element or 1-D ``[B]``: the prefix length of all rows or of each (bidirectional in the prefix, causal behind it,
    cached tokens visible). 4-D, 1 = visible: its last T rows and K columns. A row that sees nothing attends to all keys
    evenly, as published. These are the forms of ``GLMStack.forward`` in the published modeling_glm.py.
    """
    key_length = past_length + query_length
    if attention_mask.ndim <= 1:
        prefix_length = attention_mask.reshape(-1, 1, 1)
        key_position = torch.arange(key_length, device=attention_mask.device) - past_length
        query_position = torch.arange(query_length, device=attention_mask.device)
        visible = ((key_position <= query_position[:, None]) | (key_position < prefix_length))[:, None]
    elif attention_mask.ndim == 4:
        visible = attention_mask[:, :, -query_length:, -key_length:].bool()
    else:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions; give a prefix length, [B, S] or [B, 1, T, S]"
        )
    hidden = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)


def resolve_sequences(
    position_ids: Tensor | None, attention_mask: Tensor | None, sequence_ids: Tensor | None, cache: Cache | None
) -> Tensor | None:
    """Returns the packed sequences of each row: as given, or from 1-D positions that restart at 0, as trainers pack.

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
    dtype: torch.dtype,
) -> Tensor | None:
    """Returns the attention mask: boolean ``[B, 1, T, K]`` (True = visible), or None if every query sees every key.

    Args:
        layout: ``[B, 2, T]``.
        attention_mask: ``[B, <=K]`` with 0 at padding; or a form of `published_mask`, for which the result is additive.
        sequence_ids: ``[B, T]`` packed sequences, which do not see each other.
        dtype: of an additive mask.
    """
    length = layout.shape[-1]
    past_length = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and attention_mask.ndim != 2:
        return _drop_idle(
            published_mask(attention_mask, query_length=length, past_length=int(past_length), dtype=dtype)
        )
    key_length = length if cache is None else cache.get_mask_sizes(length, 0)[0]
    static = cache is not None and cache.is_compileable
    if length == 1 and attention_mask is None and not static:
        return None
    if attention_mask is not None and not static and attention_mask.shape[1] < key_length:
        seen = attention_mask.new_ones(len(attention_mask), key_length - attention_mask.shape[1])
        attention_mask = torch.cat((seen, attention_mask), dim=1)  # the caller's mask may leave out cached tokens
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
    """Returns the mask, or None if it hides nothing: attention is faster without a mask."""
    if not mask.is_cpu or is_captured():
        return mask  # reading values would make the program wait for the device
    hides = ~mask if mask.dtype == torch.bool else mask
    return mask if bool(hides.any()) else None


def continues(cache: Cache | None) -> bool:
    """Returns True if the cache holds tokens already."""
    return cache is not None and bool(cache.get_seq_length() > 0)


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Returns the hidden states ``[B, T, H]`` at the positions whose logits are needed.

    Args:
        logits_to_keep: as in transformers, the number of last positions (0 = all), or indices ``[K]`` for every row; or
            a boolean mask ``[B, T]``, for which ``[n, H]`` is returned in row order. Training uses the mask to compute
            no other logits.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    return hidden_states[logits_to_keep] if logits_to_keep.dtype == torch.bool else hidden_states[:, logits_to_keep]
