"""Where does a token of a chat stand, and how is a place turned into an angle?

Source: the published modeling_chatglm.py, revision of the 130528-entry vocabulary, ``get_masks``,
``get_position_ids`` and ``RotaryEmbedding``.
"""

import torch
from torch import Tensor

from gmask.native import elementwise as native

ROTARY_BASE = 10000.0


def derive_chat_layout(
    input_ids: Tensor,
    *,
    gmask_token_id: int,
    mask_token_id: int | None,
    sop_token_id: int,
    attention_mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    rule: str = "v1.1",
) -> Tensor:
    """Reads the layout ``[B, 2, T]`` off the tokens ``[B, T]``.

    The context ends at the first ``<sop>``; what follows answers the first ``[gMASK]``, or the first ``[MASK]`` where
    there is none, and carries its place. A ``<sop>`` inside the answer is a token like any other.

    Args:
        attention_mask: ``[B, T]``, 0 at padding, which takes no place: a padded row gets the layout of the row alone.
        sequence_ids: ``[B, T]``, which packed sequence a token belongs to; -1 at padding.
        rule: ``"v0"`` gives what the first published code did in a pass over a whole text: ``[MASK]`` goes before
            ``[gMASK]``, and the answer to a ``[gMASK]`` counts its places on behind the context.

    Raises:
        ValueError: a sequence without ``<sop>``, or without a ``[gMASK]`` or ``[MASK]``.
    """
    length = input_ids.shape[1]
    column = torch.arange(length, device=input_ids.device)
    is_real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if sequence_ids is not None:
        is_real = is_real & (sequence_ids >= 0)
    sequence = torch.zeros_like(input_ids) if sequence_ids is None else sequence_ids.clamp(min=0)

    def first(flags: Tensor) -> Tensor:  # [B, T]: the column of the first flag in each token's sequence, T if none
        columns = torch.where(flags & is_real, column, length)
        firsts = torch.full_like(input_ids, length).scatter_reduce(1, sequence, columns, "amin")
        return firsts.gather(1, sequence)

    sop, gmask = first(input_ids == sop_token_id), first(input_ids == gmask_token_id)
    mask = torch.full_like(gmask, length) if mask_token_id is None else first(input_ids == mask_token_id)
    preferred, other = (mask, gmask) if rule == "v0" else (gmask, mask)
    blank = torch.where(preferred < length, preferred, other)
    if bool(((sop == length) & is_real).any()):
        raise ValueError("a sequence has no <sop>: end the prompt with [gMASK] <sop>, as the tokenizer does")
    if bool(((blank == length) & is_real).any()):
        raise ValueError("a sequence has no [gMASK] and no [MASK]: end the prompt with [gMASK] <sop>")
    before = torch.nn.functional.pad(is_real.long().cumsum(-1), (1, 0))  # real tokens before each column
    start = before.gather(1, first(is_real).clamp(max=length - 1))
    of_blank = before.gather(1, blank.clamp(max=length - 1))
    moved = (column >= sop) & ((mask < length) if rule == "v0" else True)
    place = torch.where(moved, of_blank, before[:, :-1]) - start
    answer_place = (column - sop + 1).clamp(min=0)
    return torch.stack((place, answer_place), dim=1) * is_real[:, None]


def inverse_frequencies(rotated: int, device: torch.device | None = None) -> Tensor:
    """``[rotated / 2]`` float32; rounded to half precision, as published in every precision."""
    powers = torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated
    return (1.0 / ROTARY_BASE**powers).half().float()


def rotary_tables(places: Tensor, frequencies: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B, 1, T, G, R]`` of the places ``[B, G, T]``.

    G groups of R channels of a head turn by a place of their own: the place in the context and the one in the answer.

    Args:
        frequencies: ``[R / 2]``.
        dtype: in which places, angles and tables are computed.
    """
    angles = places.transpose(1, 2)[:, None, :, :, None].to(dtype) * frequencies.to(dtype)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the channels of queries or keys ``[B, N, T, D]`` by the angles of `rotary_tables`."""
    if native.can_rotate(states, tables[0]):
        return native.rotate(states, *tables)
    cos, sin = (table.to(states.dtype) for table in tables)
    groups = states.view(*states.shape[:-1], *cos.shape[-2:])
    left, right = groups.chunk(2, dim=-1)
    turned: Tensor = groups * cos + torch.cat((-right, left), dim=-1) * sin
    return turned.flatten(-2)
