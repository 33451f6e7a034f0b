"""How does P-tuning put trained vectors into a text, where other tokens have words?

The vectors have ids of their own, behind the vocabulary: they are read like any token, take places in the layout, and
are never written. Shape letters: B rows, T positions, H hidden size, P vectors.
Source: Liu et al., "GPT Understands, Too", 2021; THUDM/GLM model/prompt.py, class ``PromptSpell``.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmask.models.glm.configuration import GLMConfig, Network


class PromptEncoder(nn.Module):
    """P vectors out of a table, and a network that lets each depend on the others (``"lstm"``) or not (``"mlp"``)."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.first_id = config.vocab_size
        self.network = config.prompt_encoder
        self.embedding = nn.Embedding(config.prompt_tokens, size)
        if self.network == "lstm":
            self.lstm_head = nn.LSTM(size, size, num_layers=2, bidirectional=True, batch_first=True)
        if self.network != "none":
            width = 2 * size if self.network == "lstm" else size
            self.mlp_head = nn.Sequential(nn.Linear(width, size), nn.ReLU(), nn.Linear(size, size))

    def forward(self) -> Tensor:
        """``[P, H]``."""
        vectors = self.embedding.weight
        if self.network == "lstm":
            vectors = self.lstm_head(vectors[None])[0][0]
        if self.network != "none":
            vectors = self.mlp_head(vectors)
        return vectors

    def embed(self, input_ids: Tensor, words: nn.Module) -> Tensor:
        """Ids ``[B, T]`` to ``[B, T, H]``: a vector where an id is one of its own, else the word's embedding."""
        is_prompt = input_ids >= self.first_id
        embedded: Tensor = words(input_ids.masked_fill(is_prompt, 0))
        vectors = self().to(embedded.dtype)[(input_ids - self.first_id).clamp(min=0)]
        return torch.where(is_prompt[..., None], vectors, embedded)


def has_prompts(model: PreTrainedModel) -> bool:
    """Whether a model has such vectors; a ChatGLM has none."""
    return isinstance(model.config, GLMConfig) and model.config.prompt_tokens > 0


def attach_prompts(model: PreTrainedModel, count: int, network: Network) -> PromptEncoder:
    """Gives a GLM new vectors in float32, in place of those that it may have; the table starts with words.

    The words are drawn from the whole vocabulary, as in the training code, which draws from its first 5000.
    """
    for config in (model.config, model.base_model.config):  # two, where a head was put on the body of another model
        config.prompt_tokens, config.prompt_encoder = count, network
    encoder = PromptEncoder(model.config).to(model.device)
    words = model.get_input_embeddings()
    drawn = torch.randint(words.num_embeddings, (count,)).to(model.device)
    with torch.no_grad():
        encoder.embedding.weight.copy_(words(drawn))
    model.base_model.prompt_encoder = encoder
    return encoder
