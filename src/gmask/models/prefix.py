"""How does P-tuning v2 put trained keys and values in front of every layer?

A prefix is seen by every token, takes no place in the layout, and is held by the cache like the tokens behind it.
Shape letters: B rows, N heads, K key positions, D head size, L layers, P prefix length.
Source: Liu et al., "P-Tuning v2", ACL 2022; published code ``PrefixEncoder`` of modeling_chatglm.py.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel


class PrefixConfig(Protocol):
    """What a prefix needs to know of a model."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    pre_seq_len: int | None
    prefix_projection: bool

    @property
    def head_dim(self) -> int: ...


class PrefixEncoder(nn.Module):
    """``pre_seq_len`` keys and values for each layer, from a table or from a table and a small network."""

    def __init__(self, config: PrefixConfig) -> None:
        super().__init__()
        assert config.pre_seq_len is not None, "a prefix encoder needs a length"
        self.config = config
        self.length = config.pre_seq_len
        width = 2 * config.num_hidden_layers * config.hidden_size
        if config.prefix_projection:
            self.embedding = nn.Embedding(self.length, config.hidden_size)
            self.trans = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, width),
            )
        else:
            self.embedding = nn.Embedding(self.length, width)

    def table(self) -> Tensor:
        """``[P, 2 L N D]``: what the network makes of the embedding, or that itself."""
        table: Tensor = self.trans(self.embedding.weight) if self.config.prefix_projection else self.embedding.weight
        return table

    def forward(self) -> Tensor:
        """``[2 L, N, P, D]``: key and value of layer 0, of layer 1, ... Keys are not rotated."""
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        return self.table().view(self.length, -1, heads, head_dim).permute(1, 2, 0, 3)


def attach_prefix(model: PreTrainedModel, length: int, *, projection: bool) -> PrefixEncoder:
    """Gives a GLM or ChatGLM a new prefix in float32, in place of one that it may have.

    Its weights are drawn as those of the model were, from N(0, initializer_range).
    """
    for config in (model.config, model.base_model.config):  # two, where a head was put on the body of another model
        config.pre_seq_len, config.prefix_projection = length, projection
    encoder = PrefixEncoder(model.config).to(model.device)
    for module in encoder.modules():
        model._init_weights(module)
    model.base_model.prefix_encoder = encoder
    return encoder


def prepend(prefix: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, N, K, D]`` behind those ``[2, N, P, D]`` of a layer's prefix."""
    own_key, own_value = prefix.to(key).unsqueeze(1).expand(-1, len(key), -1, -1, -1)
    return torch.cat((own_key, key), dim=-2), torch.cat((own_value, value), dim=-2)


def show_prefix(mask: Tensor | None, length: int, cache: Cache | None) -> Tensor | None:
    """A mask ``[B, 1, T, K]`` of `build_mask` with the keys of a prefix, all visible, in front.

    Args:
        length: of the prefix.
        cache: a static one has room for the prefix already, at the end.
    """
    if mask is None:
        return None
    room = -length if cache is not None and cache.is_compileable else 0
    return F.pad(mask, (length, room), value=mask.dtype == torch.bool)  # an additive one hides nothing with 0
