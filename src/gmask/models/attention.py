"""How is attention computed, and by which kernel?

Shape letters: B rows, T positions, K key positions (cached ones first), N heads, D head size.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gmask.native import attention as native


class AttentionModule(Protocol):
    """What the kernels read of an attention layer."""

    config: PreTrainedConfig
    scaling: float


def attend(
    module: AttentionModule,
    query: Tensor,  # B N T D
    key: Tensor,  # B N K D
    value: Tensor,  # B N K D
    attention_mask: Tensor | None,  # B 1 T K, boolean (True = visible) or additive
    *,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the config's ``attn_implementation`` says; a single query on a CPU has a kernel of its own.

    Returns:
        ``[B, T, N, D]``, and the weights ``[B, N, T, K]`` where the implementation gives them.
    """
    implementation = module.config._attn_implementation
    if implementation == "sdpa" and dropout == 0 and native.can_attend(query, key, value, attention_mask):
        return native.attend(query, key, value, attention_mask, scaling=module.scaling), None
    attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, eager_attention
    )
    return attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.scaling,
        dropout=dropout,
        is_causal=False,
        **kwargs,
    )


def eager_attention(
    module: nn.Module,
    query: Tensor,  # B N T D
    key: Tensor,  # B N K D
    value: Tensor,  # B N K D
    attention_mask: Tensor | None,  # B 1 T K, boolean (True = visible) or additive
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: the plain twin of the fused kernels, and the one that returns the weights."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        # In float16 the sum could fall to -inf, and a row that sees nothing to NaN.
        scores = (scores + attention_mask).clamp(min=torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
