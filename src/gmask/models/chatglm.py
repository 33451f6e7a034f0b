"""ChatGLM-6B: configuration, positions, layout of its inputs, model, spreading over devices.

Module names are those of the published checkpoints, so that their keys need no renaming. Every tensor is batch-first;
the published code is sequence-first inside.

Shape letters: B rows, T positions, K key positions (cached ones first), H hidden size, N heads, D head size, L layers,
P prefix length, V vocabulary.

Source: the published modeling_chatglm.py, revision of the 130528-entry vocabulary, ``get_masks``,
``get_position_ids`` and ``RotaryEmbedding``.
Source: published modeling_chatglm.py, revision of the 130528-entry vocabulary. Its division of the queries by
layer + 1, undone after the product, only keeps half precision from overflowing and is left to the kernel.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from gmask.architectures import refuse_other_chatglm
from gmask.errors import GmaskError
from gmask.models.base import PrefixEncoder, QuantizingMixin, StrictLoadingMixin, attend, prepend, show_prefix
from gmask.models.cache import GrowingCache
from gmask.models.chatglm_chat import ChatMixin
from gmask.models.generate import LayoutGenerationMixin
from gmask.models.layout import build_mask, continues, keep_positions, resolve_sequences
from gmask.native import ops as native
from gmask.quantization.quantizer import QuantizationConfig

PUBLISHED_LAYERS = 28
"""The published block never learns ``num_layers`` and scales its residual for 28 layers, whatever the depth."""


class ChatGLMConfig(PreTrainedConfig):
    """Configuration of a ChatGLM-6B; published configs are accepted under their own names.

    ``bos_token_id`` is ``<sop>``, which opens the answer, and ``eos_token_id`` is ``<eop>``.

    Options that no published config has:

    - ``residual_alpha``, the factor of the normalised residual; sqrt(56) unless stated, as published.
    - ``rotary_dtype``: ``"float32"``, or ``"module"`` for tables in the precision of the weights, as published; in half
      precision those are off by up to half a radian near position 2000.
    - ``position_rule``: ``"v1.1"``, or ``"v0"`` for the places that the first published code (vocabulary of 150528)
      gave, which differ between a pass over a whole text and step-by-step decoding.
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

    base_model_tp_plan: ClassVar[dict[str, str]] = {  # rows of whole heads: query, key and value of each lie together
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
    auto_map: dict[str, Any] = field(default_factory=dict)  # no remote code; trainers read it unasked

    complete_published: ClassVar[Callable[[Mapping[str, Any]], dict[str, Any]] | None] = None
    """Fills in what an early published config leaves out; whoever knows the vocabularies sets it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls.complete_published is not None:
            config_dict = cls.complete_published(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_other_chatglm({"architectures": self.architectures, **kwargs})
        quarters = 4 * self.num_attention_heads  # two rotary groups of channels, each of which turns in pairs
        if self.hidden_size % quarters:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {quarters}, 4 * num_attention_heads")
        for name, known in (("rotary_dtype", ("float32", "module")), ("position_rule", ("v1.1", "v0"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if kwargs.pop("rotary_stretch", 1) != 1:  # which earlier versions of gmask knew; no weights were tuned with it
            raise ValueError("rotary_stretch is not supported any more: take it out of the config")
        bits, with_embeddings = kwargs.pop("quantization_bit", 0), kwargs.pop("quantization_embeddings", False)
        if bits:  # a published checkpoint of integers
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


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    return native.gelu(x) if native.can_gelu(x) else F.gelu(x, approximate="tanh")


class ChatGLMAttention(nn.Module):
    """Multi-head self-attention with rotary places; ``query_key_value`` interleaves query, key and value per head."""

    is_causal = False  # the mask says all; without one every key is visible

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

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
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)  # B N T D
        query, key = rotate(query, rotary), rotate(key, rotary)
        if prefix is not None:
            key, value = prepend(prefix, key, value)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed, weights = attend(self, query, key, value, attention_mask, **kwargs)
        output: Tensor = self.dense(mixed.reshape(batch, length, -1))
        return output, weights


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.dense_4h_to_h(gelu(self.dense_h_to_4h(hidden_states)))
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

    def forward(self, hidden_states: Tensor, prefix: Tensor | None = None, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        mixed, _ = self.attention(normed, prefix, **kwargs)
        normed = self.post_attention_layernorm(torch.add(mixed, normed, alpha=self.alpha))
        return torch.add(self.mlp(normed), normed, alpha=self.alpha)


class ChatGLMPreTrainedModel(StrictLoadingMixin, QuantizingMixin, PreTrainedModel):
    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    tuned_parts = ("transformer.prefix_encoder.",)
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012 - transformers reads these as plain class attributes
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012 - published, and never read there
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}  # noqa: RUF012
    _can_set_attn_implementation_cached_value = True  # transformers would look for it in this file's text


class ChatGLMModel(ChatGLMPreTrainedModel):
    """ChatGLM without its head: ids and layout in, final hidden states ``[B, T, H]`` out."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, index) for index in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layout: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the transformer.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, past + T]`` padding mask (1 = a token), or the published boolean ``[B, 1, T, K]``
                (True = hidden).
            position_ids: ``[B, 2, T]``, the published name of ``layout``. Of 2-D ones ``[B, T]`` only is read where a
                packed sequence starts: at each 0, when there is neither a mask nor a cache.
            layout: ``[B, 2, T]`` places in the context and in the answer; read off ``input_ids`` if absent.
            sequence_ids: ``[B, T]`` packed sequences, which do not see each other; -1 at padding.

        Raises:
            ValueError: a layout that cannot be read off the ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if "cache" in kwargs:
            raise ValueError("continuous batching reads prompts in chunks and causally, which is wrong for a prefix LM")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if past_key_values is None and use_cache:
            past_key_values = GrowingCache(self.config)
        sequence_ids = resolve_sequences(position_ids, attention_mask, sequence_ids, past_key_values)
        if position_ids is not None and position_ids.ndim == 3:
            layout = position_ids
        if layout is None:
            layout = read_chat_layout(self.config, input_ids, attention_mask, sequence_ids, past_key_values)
        mask = build_mask(
            layout,
            visible_from_published(attention_mask, layout.shape[-1], past_key_values),
            sequence_ids,
            past_key_values,
            published_positions=False,
            dtype=inputs_embeds.dtype,
        )
        prefix = None
        if self.config.pre_seq_len is not None and not continues(past_key_values):
            prefix = self.prefix_encoder().unflatten(0, (-1, 2))  # L 2 N P D
            mask = show_prefix(mask, self.config.pre_seq_len, past_key_values)
        hidden_states = self._run_layers(
            inputs_embeds, prefix, self.rotary_tables(layout, inputs_embeds.dtype), mask, past_key_values, **kwargs
        )
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None
        )

    def rotary_tables(self, layout: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The angles of a layout: two groups of channels, or with 1-D positions one that follows the context alone."""
        places = layout if self.config.position_encoding_2d else layout[:, :1]
        frequencies = inverse_frequencies(self.config.head_dim // places.shape[1], device=layout.device)
        return rotary_tables(
            places, frequencies, dtype=dtype if self.config.rotary_dtype == "module" else torch.float32
        )

    def _run_layers(
        self,
        hidden_states: Tensor,
        prefix: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        for index, layer in enumerate(self.layers):
            own = None if prefix is None else prefix[index]  # a reentrant checkpoint loses gradients of keywords
            hidden_states = layer(
                hidden_states, own, rotary=rotary, attention_mask=mask, past_key_values=cache, **kwargs
            )
        output: Tensor = self.final_layernorm(hidden_states)
        return output


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, ChatMixin, LayoutGenerationMixin, GenerationMixin):
    """ChatGLM with its language-modelling head, by default tied to the word embeddings, as published."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs: Any) -> None:
        """Unless both were stored, and one left out for its wrong shape: `from_pretrained` will refuse it."""
        ends = {"lm_head.weight": self.lm_head, "transformer.word_embeddings.weight": self.transformer.word_embeddings}
        are_stored = missing_keys is not None and missing_keys.isdisjoint(ends)
        if not are_stored or not any(parameter.is_meta for end in ends.values() for parameter in end.parameters()):
            super().tie_weights(missing_keys, **kwargs)

    def read_prompt_layout(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The layout ``[B, 2, S]`` of prompts ``[B, S]``; the mask has 0 at padding."""
        return read_chat_layout(self.config, input_ids, attention_mask, None, None)

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if self.config.position_rule == "v0":  # which gave decoded tokens, and them alone, the place of the blank
            updated["layout"][:, 0, -1] = (updated["layout"][:, 1] == 0).sum(-1) - 1
        return updated

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layout: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, V]``, and the mean cross-entropy in nats when ``labels`` are given.

        ``labels[t]`` is the token at position t, which position t - 1 must predict; -100 is not scored. The other
        arguments are those of `ChatGLMModel.forward`; ``logits_to_keep`` as of `keep_positions`.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            layout=layout,
            sequence_ids=sequence_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
            loss = total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


ENDS = ("transformer.word_embeddings", "transformer.final_layernorm", "lm_head")
"""Before and behind the layers; together on the first device, where the prompt goes and the logits are read."""


def spread_layers(config: ChatGLMConfig, devices: int) -> dict[str, int]:
    """A map of a model's parts to the devices 0, 1, ..., as even as can be; `ENDS` count as two layers.

    Source: ``auto_configure_device_map`` in utils.py of THUDM/ChatGLM-6B, whose shares may differ by two layers.

    Raises:
        GmaskError: more devices than layers.
    """
    layers = config.num_hidden_layers
    if not 1 <= devices <= layers:
        raise GmaskError(f"{layers} layers cannot be spread over {devices} devices: choose 1 to {layers}")
    places = dict.fromkeys(ENDS, 0)
    if config.pre_seq_len is not None:
        places["transformer.prefix_encoder"] = 0
    share = (layers + 2) / devices
    return places | {f"transformer.layers.{layer}": int((layer + 2) / share) for layer in range(layers)}
