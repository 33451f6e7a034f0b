"""How does P-tuning v2 put trained keys and values in front of every layer?

Source: Liu et al., "P-Tuning v2", ACL 2022; published code ``PrefixEncoder`` of modeling_chatglm.py.
"""

import torch
from torch import Tensor, nn

from gmask.models.chatglm.configuration import ChatGLMConfig


class PrefixEncoder(nn.Module):
    """``pre_seq_len`` keys and values for each layer, from a table or from a table and a small network."""

    def __init__(self, config: ChatGLMConfig) -> None:
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

    def forward(self) -> Tensor:
        """``[2 L, N, P, D]``: key and value of layer 0, of layer 1, ... Keys are not rotated."""
        prefix = self.embedding.weight
        if self.config.prefix_projection:
            prefix = self.trans(prefix)
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        return prefix.view(self.length, -1, heads, head_dim).permute(1, 2, 0, 3)


def prepend(prefix: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, N, K, D]`` behind those ``[2, N, P, D]`` of a layer's prefix."""
    own_key, own_value = prefix.to(key).unsqueeze(1).expand(-1, len(key), -1, -1, -1)
    return torch.cat((own_key, key), dim=-2), torch.cat((own_value, value), dim=-2)
