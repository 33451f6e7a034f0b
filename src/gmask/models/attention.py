"""How is attention computed where no fused kernel does it?

Shape letters: B rows, T positions, K key positions (cached ones first), N heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
