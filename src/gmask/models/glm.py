"""GLM (110M to 10B): configuration, layout of its inputs, trained prompt vectors, model.

Prompt vectors (P-tuning) have ids of their own, behind the vocabulary. They are read like any token, have positions in
the layout, and are never generated.

The forward pass is `PrefixLMModel.forward` (base.py), which calls the methods of `GLMModel`; head and loss are in
generate.py. Module names are those of the published checkpoints, so that their keys need no renaming.

Shape letters: B rows, T positions, H hidden size, P vectors or prefix length, K key positions (cached ones first), N
heads, D head size, L layers, V vocabulary.

Source: Du et al., ACL 2022, section 2; published code THUDM/GLM model/modeling_glm.py and mpu/transformer.py. Prompt
vectors: Liu et al., "GPT Understands, Too", 2021; THUDM/GLM model/prompt.py, class ``PromptSpell``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from gmask.models.base import (
    Linear,
    PrefixEncoder,
    PrefixLMModel,
    PrefixLMPreTrainedModel,
    SelfAttention,
    check_config_values,
    lacks_bfloat16,
    run_blocks,
)
from gmask.models.generate import PrefixLMForConditionalGeneration
from gmask.models.layout import continues, derive_layout, keep_positions
from gmask.native.ops import is_captured

Network = Literal["lstm", "mlp", "none"]
"""The network that computes the prompt vectors of P-tuning from a table; `"none"`: they are the table."""


class GLMConfig(PreTrainedConfig):
    """Configuration of a GLM.

    Published configs (``num_layers``, ``max_sequence_length``, ``output_dropout_prob`` ...) are accepted under their
    own names. ``hidden_act`` is ``"gelu"`` (erf) for the published Hugging Face code and ``"gelu_pytorch_tanh"`` for
    the original training code and for models made here.

    With the ids of ``<sop>`` and of the blanks the model derives the layout from the token ids; without them a
    ``layout`` has to be given.

    Options that tuning adds, and that no published config has:

    - ``pre_seq_len``: the number of trained keys and values in front of every layer (P-tuning v2); with
      ``prefix_projection`` a small network computes them.
    - ``prompt_tokens``: the number of trained vectors that take the place of words (P-tuning); ``prompt_ids`` are their
      ids, and ``prompt_encoder`` is the network that computes them: ``"lstm"``, ``"mlp"``, or ``"none"``.
    """

    model_type = "glm_blank"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_layers": "num_hidden_layers",
        "max_sequence_length": "max_position_embeddings",
        "embedding_dropout_prob": "embedding_dropout",
        "attention_dropout_prob": "attention_dropout",
        "output_dropout_prob": "hidden_dropout",
    }
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "word_embeddings": "embedding_rowwise",
        "transformer.layers.*.attention.query_key_value": "colwise_thirds",
        "transformer.layers.*.attention.dense": "rowwise",
        "transformer.layers.*.mlp.dense_h_to_4h": "colwise",
        "transformer.layers.*.mlp.dense_4h_to_h": "rowwise",
    }

    vocab_size: int = 30592
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 512
    block_position_encoding: bool = True
    hidden_act: str = "gelu"
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    classifier_dropout: float | None = None  # as hidden_dropout if absent
    pool_token: Literal["cls", "start", "pad"] = "cls"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    prompt_tokens: int = 0
    prompt_encoder: Network = "none"
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    sop_token_id: int | None = None
    eop_token_id: int | None = None
    mask_token_id: int | None = None
    smask_token_id: int | None = None
    gmask_token_id: int | None = None
    auto_map: dict[str, Any] = field(default_factory=dict)  # no remote code; trainers expect the attribute

    complete_published: ClassVar[Callable[[Mapping[str, Any], str], dict[str, Any]] | None] = None
    """Adds the values that the published config of a folder or hub name lacks. It is set by `gmask.registration`."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if cls.complete_published is not None and values.get("model_type") == "glm":
            values = cls.complete_published(values, str(pretrained_model_name_or_path))
        return values, rest

    def __post_init__(self, **kwargs: Any) -> None:
        check_config_values(type(self), {**vars(self), **kwargs})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r:.40} is not known; there are {', '.join(sorted(ACT2FN))}")
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size

    @property
    def position_rows(self) -> int:
        """Rows of a position table: with two tables one more than positions, as published, since answers start at 1."""
        return self.max_position_embeddings + int(self.block_position_encoding)

    @property
    def prompt_ids(self) -> range:
        """The ids of the trained vectors, behind the vocabulary."""
        return range(self.vocab_size, self.vocab_size + self.prompt_tokens)

    @property
    def blank_token_ids(self) -> list[int]:
        """Ids of ``[MASK]``, ``[sMASK]`` and ``[gMASK]``, those that the vocabulary has."""
        ids = (self.mask_token_id, self.smask_token_id, self.gmask_token_id)
        return [token_id for token_id in ids if token_id is not None]


def read_layout(
    config: GLMConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    sequence_ids: Tensor | None,
    cache: Cache | None,
) -> Tensor:
    """Derives the layout ``[B, 2, T]`` from the token ids; with a published mask, it is 1-D positions, as published.

    Raises:
        ValueError: the ids imply none, or the config does not say which ids are blanks.
    """
    if input_ids is None:
        raise ValueError("inputs_embeds carry no layout: pass layout [B, 2, T]")
    batch, length = input_ids.shape
    if attention_mask is not None and attention_mask.ndim != 2:
        positions = torch.arange(length, device=input_ids.device).expand(batch, -1)
        return torch.stack((positions, torch.zeros_like(positions)), dim=1)
    sop, blanks = config.sop_token_id, config.blank_token_ids
    if sop is None or not blanks:
        raise ValueError("the config has no sop_token_id or blank ids: load with gmask.load, or pass layout [B, 2, T]")
    if continues(cache) and not bool((input_ids == sop).any(-1).all()):
        raise ValueError("tokens that continue a cached answer carry no layout: pass layout [B, 2, T]")
    return derive_layout(
        input_ids,
        blank_token_ids=blanks,
        sop_token_id=sop,
        attention_mask=None if attention_mask is None else attention_mask[:, -length:],
        sequence_ids=sequence_ids,
    )


def check_layout(layout: Tensor, inputs_embeds: Tensor, *, config: GLMConfig) -> None:
    """Raises `ValueError` for a layout of another shape, or positions beyond the tables."""
    batch, length, _ = inputs_embeds.shape
    if layout.shape != (batch, 2, length):
        raise ValueError(f"layout is {list(layout.shape)}: for these inputs it must be {[batch, 2, length]}")
    if not layout.is_cpu or is_captured():
        return  # reading values would make the program wait for the device
    used = layout if config.block_position_encoding else layout[:, :1]
    lowest, highest = int(used.min()), int(used.max())
    if lowest < 0 or highest >= config.position_rows:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"position {wrong} is beyond the {config.position_rows} positions of this model: "
            "shorten the text or the answer"
        )


class PromptEncoder(nn.Module):
    """Computes the prompt vectors: a table, or a network of a table, which relates them (LSTM) or not (MLP)."""

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
        """Returns the prompt vectors ``[P, H]``."""
        vectors = self.embedding.weight
        if self.network == "lstm":
            # oneDNN has no LSTM for autocast on a CPU without instructions for bfloat16.
            has_autocast = torch.is_autocast_enabled("cpu") and not lacks_bfloat16()
            with torch.autocast("cpu", torch.get_autocast_dtype("cpu"), enabled=has_autocast):
                vectors = self.lstm_head(vectors[None])[0][0]
        if self.network != "none":
            vectors = self.mlp_head(vectors)
        return vectors

    def embed(self, input_ids: Tensor, words: nn.Module) -> Tensor:
        """Embeds ids ``[B, T]`` as ``[B, T, H]``: ``prompt_ids`` by prompt vectors, all others by word embeddings."""
        is_prompt = input_ids >= self.first_id
        embedded: Tensor = words(input_ids.masked_fill(is_prompt, 0))
        vectors = self().to(embedded.dtype)[(input_ids - self.first_id).clamp(min=0)]
        return torch.where(is_prompt[..., None], vectors, embedded)


def has_prompts(model: PreTrainedModel) -> bool:
    """Returns True if a model has prompt vectors; a ChatGLM has none."""
    return isinstance(model.config, GLMConfig) and model.config.prompt_tokens > 0


def attach_prompts(model: PreTrainedModel, count: int, network: Network) -> PromptEncoder:
    """Adds new prompt vectors in float32 to a GLM; they replace earlier ones. The table starts as word embeddings.

    The words are drawn from the whole vocabulary; the original training code draws them from its first 5000.
    """
    for config in (model.config, model.base_model.config):  # they differ if the body came from another model
        config.prompt_tokens, config.prompt_encoder = count, network
    encoder = PromptEncoder(model.config).to(model.device)
    words = model.get_input_embeddings()
    drawn = torch.randint(words.num_embeddings, (count,)).to(model.device)
    with torch.no_grad():
        encoder.embedding.weight.copy_(words(drawn))
    model.base_model.prompt_encoder = encoder
    return encoder


class ResidualLinear(Linear):
    """A projection into the residual stream. Its initial weights are smaller in deeper models, as published."""


class GLMAttention(SelfAttention):
    """Multi-head self-attention; ``query_key_value`` holds three contiguous thirds."""

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, dropout=config.attention_dropout)
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = ResidualLinear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        prefix: Tensor | None,  # 2 N P D
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        query, key, value = (
            part.view(batch, length, -1, self.head_dim).transpose(1, 2)  # B N T D
            for part in self.query_key_value(hidden_states).chunk(3, dim=-1)
        )
        return self.attend(query, key, value, prefix, attention_mask, past_key_values, **kwargs)


class GLMMLP(nn.Module):
    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = ResidualLinear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.dense_4h_to_h(self.activation(self.dense_h_to_4h(hidden_states)))
        return output


class GLMBlock(GradientCheckpointingLayer):
    """Pre-LN transformer block."""

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GLMMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, prefix: Tensor | None = None, *, keep: int = 0, **kwargs: Any) -> Tensor:
        mixed, _ = self.attention(self.input_layernorm(hidden_states), prefix, keep=keep, **kwargs)
        hidden_states = keep_positions(hidden_states, keep) + self.dropout(mixed)
        expanded = self.mlp(self.post_attention_layernorm(hidden_states))
        output: Tensor = hidden_states + self.dropout(expanded)
        return output


class GLMTransformer(nn.Module):
    """The 2-D position embeddings, the blocks and the final norm."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.position_embeddings = nn.Embedding(config.position_rows, config.hidden_size)
        if config.block_position_encoding:
            self.block_position_embeddings = nn.Embedding(config.position_rows, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([GLMBlock(config, index) for index in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.config = config

    def embed_layout(self, layout: Tensor) -> Tensor:
        """Embeds a layout ``[B, 2, T]`` as ``[B, T, H]``."""
        embedded: Tensor = self.position_embeddings(layout[:, 0])
        if self.config.block_position_encoding:
            embedded = embedded + self.block_position_embeddings(layout[:, 1])
        return embedded

    def forward(self, inputs_embeds: Tensor, layout: Tensor, prefix: Tensor | None, **kwargs: Any) -> Tensor:
        hidden_states = self.dropout(inputs_embeds + self.embed_layout(layout))
        output: Tensor = self.final_layernorm(run_blocks(self.layers, hidden_states, prefix, **kwargs))
        return output


class GLMPreTrainedModel(PrefixLMPreTrainedModel):
    config: GLMConfig
    config_class = GLMConfig
    base_model_prefix = "glm"
    tuned_parts = ("glm.prefix_encoder.", "glm.prompt_encoder.")
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012 - transformers reads these as plain attributes
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": GLMAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualLinear):
            init.normal_(
                module.weight,
                std=self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers),
            )


class GLMModel(GLMPreTrainedModel, PrefixLMModel):
    """GLM without its head: from ids and layout to final hidden states ``[B, T, H]``.

    Published forms of ``attention_mask``: a prefix length (0-d, ``[1]`` or ``[B]``), a 4-D mask (1 = visible), and with
    3-D ``position_ids`` a 2-D mask that hides only padded keys.
    """

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = GLMTransformer(config)
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
        if config.prompt_tokens:
            self.prompt_encoder = PromptEncoder(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _embed(self, input_ids: Tensor | None) -> Tensor:
        if self.config.prompt_tokens and input_ids is not None:
            return self.prompt_encoder.embed(input_ids, self.word_embeddings)
        return super()._embed(input_ids)

    def _read_layout(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, sequence_ids: Tensor | None, cache: Cache | None
    ) -> Tensor:
        return read_layout(self.config, input_ids, attention_mask, sequence_ids, cache)

    def _check_layout(self, layout: Tensor, inputs_embeds: Tensor) -> None:
        check_layout(layout, inputs_embeds, config=self.config)

    def _read_mask(
        self, attention_mask: Tensor | None, length: int, cache: Cache | None, *, published_positions: bool
    ) -> Tensor | None:
        if published_positions and attention_mask is not None and attention_mask.ndim == 2:
            return attention_mask if attention_mask.shape[1] == 1 else attention_mask[:, None, None]
        return attention_mask

    def _run_layers(
        self,
        inputs_embeds: Tensor,
        layout: Tensor,
        prefix: Tensor | None,
        mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        output: Tensor = self.transformer(
            inputs_embeds, layout, prefix, attention_mask=mask, past_key_values=cache, **kwargs
        )
        return output


class GLMLanguageModel(GLMPreTrainedModel):
    """GLM with its language-modelling head, which is tied to the word embeddings."""

    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class GLMForConditionalGeneration(GLMLanguageModel, PrefixLMForConditionalGeneration):
    """GLM for generation: logits at every position, and `generate`.

    ``labels[t]`` is the token that position t must predict (not shifted, as published). Neither -100 nor the padding id
    is scored.
    """

    def _pair_labels(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits, self._scored(labels)

    def token_losses(self, input_ids: Tensor, labels: Tensor, *, layout: Tensor, sequence_ids: Tensor) -> Tensor:
        """Returns the cross-entropy in nats at each label, ``[n]`` float32 in row order.

        The head runs only at the labelled positions.
        """
        hidden_states = self.glm(input_ids, layout=layout, sequence_ids=sequence_ids, use_cache=False).last_hidden_state
        labels = self._scored(labels)
        labelled = labels != -100
        logits = self.lm_head(hidden_states[labelled])
        return F.cross_entropy(logits.float(), labels[labelled], reduction="none")

    def _scored(self, labels: Tensor) -> Tensor:
        """Returns the labels with -100 for the padding id, which is not scored, as published."""
        pad = self.config.pad_token_id
        return labels if pad is None else labels.masked_fill(labels == pad, -100)
