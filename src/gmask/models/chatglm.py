"""ChatGLM-6B: configuration, positions, layout of its inputs, model, distribution over devices.

The forward pass is `PrefixLMModel.forward` (base.py), which calls the methods of `ChatGLMModel`; head and loss are in
generate.py. Module names are those of the published checkpoints, so that their keys need no renaming. Every tensor is
batch-first; the published code is sequence-first inside.

Shape letters: B batch rows, T positions, K key positions (cached ones first), H hidden size, N heads, D head size, L
layers, P prefix length, V vocabulary.

Source: published modeling_chatglm.py, revision of the 130528-entry vocabulary; positions as in its ``get_masks``,
``get_position_ids`` and ``RotaryEmbedding``. It divides the queries by layer + 1 and multiplies the product by that
again, which only avoids an overflow in half precision; here the kernel takes care of that.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from gmask.architectures import refuse_other_chatglm
from gmask.errors import GmaskError
from gmask.models.base import (
    Linear,
    PrefixEncoder,
    PrefixLMModel,
    PrefixLMPreTrainedModel,
    SelfAttention,
    check_config_values,
    run_blocks,
)
from gmask.models.chatglm_chat import ChatMixin
from gmask.models.generate import PrefixLMForConditionalGeneration
from gmask.models.layout import continues, keep_positions
from gmask.models.reward import RewardHead
from gmask.native import ops as native
from gmask.quantization.linear import feed_forward_at_once
from gmask.quantization.quantizer import QuantizationConfig

PUBLISHED_LAYERS = 28
"""The published block scales its residual for 28 layers, whatever ``num_layers`` is."""


class ChatGLMConfig(PreTrainedConfig):
    """Configuration of a ChatGLM-6B; published configs are accepted under their own names.

    ``bos_token_id`` is ``<sop>``, which opens the answer, and ``eos_token_id`` is ``<eop>``.

    Options that no published config has:

    - ``residual_alpha``: the factor of the normalised residual; sqrt(56) by default, as published.
    - ``rotary_dtype``: ``"float32"``, or ``"module"`` for tables in the precision of the weights, as published. In half
      precision their angles are wrong by up to half a radian near position 2000.
    - ``position_rule``: ``"v1.1"``, or ``"v0"`` for the positions of the first published code (vocabulary of 150528),
      which differ between a pass over a whole text and step-by-step decoding.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_layers": "num_hidden_layers",
        "inner_hidden_size": "intermediate_size",
        "layernorm_epsilon": "layer_norm_eps",
        "max_sequence_length": "max_position_embeddings",
        "sop_token_id": "bos_token_id",
        "eop_token_id": "eos_token_id",
    }

    base_model_tp_plan: ClassVar[dict[str, str]] = {  # rows of whole heads: each has query, key and value side by side
        "word_embeddings": "embedding_rowwise",
        "layers.*.attention.query_key_value": "colwise",
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    intermediate_size: int = 16384
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    position_encoding_2d: bool = True
    rotary_dtype: str = "float32"
    position_rule: str = "v1.1"
    residual_alpha: float = math.sqrt(2 * PUBLISHED_LAYERS)
    initializer_range: float = 0.02
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 3
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    mask_token_id: int | None = 130000
    gmask_token_id: int | None = 130001
    auto_map: dict[str, Any] = field(default_factory=dict)  # no remote code; trainers expect the attribute

    complete_published: ClassVar[Callable[[Mapping[str, Any]], dict[str, Any]] | None] = None
    """Adds the values that an early published config lacks. It is set by `gmask.registration`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls.complete_published is not None:
            config_dict = cls.complete_published(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_other_chatglm({"architectures": self.architectures, **kwargs})
        check_config_values(type(self), {**vars(self), **kwargs})
        quarters = 4 * self.num_attention_heads  # a head has two rotary groups of channels, which rotate in pairs
        if self.hidden_size % quarters:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {quarters}, 4 * num_attention_heads")
        for name, known in (("rotary_dtype", ("float32", "module")), ("position_rule", ("v1.1", "v0"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if kwargs.pop("rotary_stretch", 1) != 1:  # of earlier versions of gmask; no weights were tuned with it
            raise ValueError("rotary_stretch is not supported any more: take it out of the config")
        bits, with_embeddings = kwargs.pop("quantization_bit", 0), kwargs.pop("quantization_embeddings", False)
        if bits:  # a published quantized checkpoint
            kwargs["quantization_config"] = QuantizationConfig(bits, embeddings=with_embeddings).to_dict()
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


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
    """Derives the layout ``[B, 2, T]`` from the tokens ``[B, T]``.

    The context ends at the first ``<sop>``. The tokens behind it answer the first ``[gMASK]``, or if there is none the
    first ``[MASK]``, and have its position. A ``<sop>`` inside the answer is a token like any other.

    Args:
        attention_mask: ``[B, T]``, 0 at padding, which does not count: a row has the same layout with and without it.
        sequence_ids: ``[B, T]``, the packed sequence of each token; -1 at padding.
        rule: ``"v0"`` for the layout of the first published code in a pass over a whole text: ``[MASK]`` is preferred
            to ``[gMASK]``, and the positions of the answer to a ``[gMASK]`` continue those of the context.

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
    if not native.is_captured() and bool(((sop == length) & is_real).any()):
        raise ValueError("a sequence has no <sop>: end the prompt with [gMASK] <sop>, as the tokenizer does")
    if not native.is_captured() and bool(((blank == length) & is_real).any()):
        raise ValueError("a sequence has no [gMASK] and no [MASK]: end the prompt with [gMASK] <sop>")
    before = torch.nn.functional.pad(is_real.long().cumsum(-1), (1, 0))  # real tokens before each column
    start = before.gather(1, first(is_real).clamp(max=length - 1))
    of_blank = before.gather(1, blank.clamp(max=length - 1))
    moved = column >= sop
    if rule == "v0":
        moved = moved & (mask < length)
    context_position = torch.where(moved, of_blank, before[:, :-1]) - start
    answer_position = (column - sop + 1).clamp(min=0)
    return torch.stack((context_position, answer_position), dim=1) * is_real[:, None]


def inverse_frequencies(rotated: int, device: torch.device | None = None) -> Tensor:
    """Returns ``[rotated / 2]`` float32, rounded to half precision, as in the published code for every precision."""
    powers = torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated
    return (1.0 / ROTARY_BASE**powers).half().float()


def rotary_tables(positions: Tensor, frequencies: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines ``[B, 1, T, G, R]`` for positions ``[B, G, T]``.

    A head has G groups of R channels. Each group is rotated by one row of positions: those in the context, or those in
    the answer.

    Args:
        frequencies: ``[R / 2]``.
        dtype: of positions, angles and tables.
    """
    angles = positions.transpose(1, 2)[:, None, :, :, None].to(dtype) * frequencies.to(dtype)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates channels ``[B, N, T, G * R]`` by the angles of `rotary_tables`."""
    if native.can_rotate(states, tables[0]):
        return native.rotate(states, *tables)
    cos, sin = (table.to(states.dtype) for table in tables)
    groups = states.view(*states.shape[:-1], *cos.shape[-2:])
    left, right = groups.chunk(2, dim=-1)
    rotated: Tensor = groups * cos + torch.cat((-right, left), dim=-1) * sin
    return rotated.flatten(-2)


def read_chat_layout(
    config: ChatGLMConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    sequence_ids: Tensor | None,
    cache: Cache | None,
) -> Tensor:
    """Derives the layout ``[B, 2, T]`` from the token ids.

    Raises:
        ValueError: the ids imply none, or the config does not say which ids are blanks.
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
    """Converts a published boolean mask ``[B, 1, T, <=K]`` (True = hidden) into ``[B, 1, T, K]`` with 1 = visible.

    Any other mask is returned as it is. Cached keys that the mask does not cover are those of a prefix, in front of all
    others, and visible.

    Args:
        length: T.
    """
    if attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.ndim != 4:
        return attention_mask
    key_length = length if cache is None else int(cache.get_seq_length()) + length
    uncounted = max(key_length - attention_mask.shape[-1], 0)
    return F.pad((~attention_mask).long(), (uncounted, 0), value=1)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return native.gelu(x) if native.can_gelu(x) else F.gelu(x, approximate="tanh")


class ChatGLMAttention(SelfAttention):
    """Multi-head self-attention with rotary positions; ``query_key_value`` holds query, key and value of each head."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        prefix: Tensor | None,  # 2 N P D
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch, length, -1, 3 * self.head_dim)
        unturned, value = fused.transpose(1, 2).split((2 * self.head_dim, self.head_dim), dim=-1)
        query, key = apply_rotary(unturned, rotary).chunk(2, dim=-1)  # B N T D
        return self.attend(query, key, value, prefix, attention_mask, past_key_values, **kwargs)


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.dense_4h_to_h(gelu_tanh(self.dense_h_to_4h(hidden_states)))
        return output


class ChatGLMBlock(GradientCheckpointingLayer):
    """Transformer block whose residual is the normalised state, scaled by ``residual_alpha``."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.alpha = config.residual_alpha
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states: Tensor, prefix: Tensor | None = None, *, keep: int = 0, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        mixed, _ = self.attention(normed, prefix, keep=keep, **kwargs)
        normed = keep_positions(normed, keep)
        norm, mlp = self.post_attention_layernorm, self.mlp
        done = feed_forward_at_once(mixed, normed, norm, mlp, mlp.dense_h_to_4h, mlp.dense_4h_to_h, alpha=self.alpha)
        if done is not None:
            return done
        normed = norm(torch.add(mixed, normed, alpha=self.alpha))
        return torch.add(mlp(normed), normed, alpha=self.alpha)


class ChatGLMPreTrainedModel(PrefixLMPreTrainedModel):
    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    tuned_parts = ("transformer.prefix_encoder.",)
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012 - transformers reads these as plain attributes
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012 - published, but never used
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}  # noqa: RUF012


class ChatGLMModel(ChatGLMPreTrainedModel, PrefixLMModel):
    """ChatGLM without its head: from ids and layout to final hidden states ``[B, T, H]``.

    Published form of ``attention_mask``: boolean ``[B, 1, T, K]``, True = hidden.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, index) for index in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _read_layout(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, sequence_ids: Tensor | None, cache: Cache | None
    ) -> Tensor:
        return read_chat_layout(self.config, input_ids, attention_mask, sequence_ids, cache)

    def _read_mask(
        self, attention_mask: Tensor | None, length: int, cache: Cache | None, *, published_positions: bool
    ) -> Tensor | None:
        return visible_from_published(attention_mask, length, cache)

    def rotary_tables(self, layout: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the tables of a layout, for queries and keys side by side, which are rotated in one call.

        Each has two groups of channels, or one if the config has 1-D positions.
        """
        positions = layout if self.config.position_encoding_2d else layout[:, :1]
        frequencies = inverse_frequencies(self.config.head_dim // positions.shape[1], device=layout.device)
        return rotary_tables(
            positions.repeat(1, 2, 1),
            frequencies,
            dtype=dtype if self.config.rotary_dtype == "module" else torch.float32,
        )

    def _run_layers(
        self,
        inputs_embeds: Tensor,
        layout: Tensor,
        prefix: Tensor | None,
        mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        rotary = self.rotary_tables(layout, inputs_embeds.dtype)
        hidden_states = run_blocks(
            self.layers, inputs_embeds, prefix, rotary=rotary, attention_mask=mask, past_key_values=cache, **kwargs
        )
        output: Tensor = self.final_layernorm(hidden_states)
        return output


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, ChatMixin, PrefixLMForConditionalGeneration):
    """ChatGLM with its language-modelling head, by default tied to the word embeddings, as published.

    ``labels[t]`` is the token at position t, which position t - 1 must predict; -100 is not scored.
    """

    shifts_labels = True
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs: Any) -> None:
        """Ties head and embedding, unless one was stored with a wrong shape, which `from_pretrained` reports."""
        ends = {"lm_head.weight": self.lm_head, "transformer.word_embeddings.weight": self.transformer.word_embeddings}
        are_stored = missing_keys is not None and missing_keys.isdisjoint(ends)
        if not are_stored or not any(parameter.is_meta for end in ends.values() for parameter in end.parameters()):
            super().tie_weights(missing_keys, **kwargs)

    def read_prompt_layout(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Derives the layout ``[B, 2, S]`` of prompts ``[B, S]``; the mask has 0 at padding."""
        return read_chat_layout(self.config, input_ids, attention_mask, None, None)

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if self.config.position_rule == "v0":  # there, only decoded tokens have the position of the blank
            updated["layout"][:, 0, -1] = (updated["layout"][:, 1] == 0).sum(-1) - 1
        return updated

    def _pair_labels(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, :-1], labels[:, 1:]


class ChatGLMForReward(RewardHead, ChatGLMPreTrainedModel):
    """Rewards an answer; `RewardHead` has the forward pass."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self._make_head(config)
        self.post_init()


ENDS = ("transformer.word_embeddings", "transformer.final_layernorm", "lm_head")
"""The modules before and behind the layers. They are on the first device, which gets the prompt and returns logits."""


def spread_layers(config: ChatGLMConfig, devices: int) -> dict[str, int]:
    """Returns the device 0, 1, ... of each module, with layers spread evenly; `ENDS` count as two layers.

    Source: ``auto_configure_device_map`` in utils.py of THUDM/ChatGLM-6B. There, shares may differ by two layers.

    Raises:
        GmaskError: more devices than layers.
    """
    layers = config.num_hidden_layers
    if not 1 <= devices <= layers:
        raise GmaskError(f"{layers} layers cannot be spread over {devices} devices: choose 1 to {layers}")
    devices_of = dict.fromkeys(ENDS, 0)
    if config.pre_seq_len is not None:
        devices_of["transformer.prefix_encoder"] = 0
    share = (layers + 2) / devices
    return devices_of | {f"transformer.layers.{layer}": int((layer + 2) / share) for layer in range(layers)}
