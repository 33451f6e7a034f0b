"""How do the arguments of a chat model's forward pass become its layout and its mask?"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from gmask.models.chatglm.configuration import ChatGLMConfig
from gmask.models.chatglm.positions import derive_chat_layout
from gmask.models.inputs import continues


def read_chat_layout(
    config: ChatGLMConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    sequence_ids: Tensor | None,
    cache: Cache | None,
) -> Tensor:
    """The layout ``[B, 2, T]`` that the token ids carry.

    Raises:
        ValueError: the ids carry none, or the config does not say which ids are blanks.
    """
    if input_ids is None:
        raise ValueError("inputs_embeds carry no layout: pass layout [B, 2, T]")
    if config.bos_token_id is None or config.gmask_token_id is None:
        raise ValueError("the config has no bos_token_id or gmask_token_id: pass layout [B, 2, T]")
    if continues(cache) and not bool((input_ids == config.bos_token_id).any(-1).all()):
        raise ValueError("tokens that continue a cached answer carry no layout: pass layout [B, 2, T]")
    padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    return derive_chat_layout(
        input_ids,
        gmask_token_id=config.gmask_token_id,
        mask_token_id=config.mask_token_id,
        sop_token_id=config.bos_token_id,
        attention_mask=None if padding is None else padding[:, -input_ids.shape[1] :],
        sequence_ids=sequence_ids,
        rule=config.position_rule,
    )


def visible_from_published(attention_mask: Tensor | None, length: int, cache: Cache | None) -> Tensor | None:
    """A published boolean mask ``[B, 1, T, <=K]`` (True = hidden) as ``[B, 1, T, K]`` with 1 = visible.

    Any other mask stays as it is. The cached keys that it does not count are those of a prefix: in front of all others,
    and visible.

    Args:
        length: T.
    """
    if attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.ndim != 4:
        return attention_mask
    key_length = length if cache is None else int(cache.get_seq_length()) + length
    uncounted = max(key_length - attention_mask.shape[-1], 0)
    return F.pad((~attention_mask).long(), (uncounted, 0), value=1)
