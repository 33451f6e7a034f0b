"""How does ChatGLM-6B turn tokens and their layout into logits?

Shape letters: B rows, T positions, K key positions (cached ones first), H hidden size, N heads, D head size,
L layers, P prefix length, V vocabulary.
Module names are those of the published checkpoints, so that their keys need no renaming. Every tensor is batch-first;
the published code is sequence-first inside.
Source: published modeling_chatglm.py, revision of the 130528-entry vocabulary. Its division of the queries by
layer + 1, undone after the product, only keeps half precision from overflowing and is left to the kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from gmask.models.attention import eager_attention
from gmask.models.chatglm.chatting import ChatMixin
from gmask.models.chatglm.configuration import ChatGLMConfig
from gmask.models.chatglm.inputs import read_chat_layout, visible_from_published
from gmask.models.chatglm.placement import running_device
from gmask.models.chatglm.positions import inverse_frequencies, rotary_tables, rotate
from gmask.models.chatglm.prefix import PrefixEncoder
from gmask.models.inputs import build_mask, resolve_sequences
from gmask.models.layout_generation import LayoutGenerationMixin
from gmask.models.quantizing import QuantizingMixin
from gmask.models.strict_loading import StrictLoadingMixin


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
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch, length, -1, 3 * self.head_dim)
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)  # B N T D
        query, key = rotate(query, rotary), rotate(key, rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        mixed, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, is_causal=False, **kwargs
        )
        output: Tensor = self.dense(mixed.reshape(batch, length, -1))
        return output, weights


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))
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

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        mixed, _ = self.attention(normed, **kwargs)
        normed = self.post_attention_layernorm(normed * self.alpha + mixed)
        output: Tensor = normed * self.alpha + self.mlp(normed)
        return output


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
        if past_key_values is None and (use_cache or self.config.pre_seq_len is not None):
            past_key_values = DynamicCache(config=self.config)
        sequence_ids = resolve_sequences(position_ids, attention_mask, sequence_ids, past_key_values)
        if position_ids is not None and position_ids.ndim == 3:
            layout = position_ids
        if layout is None:
            layout = read_chat_layout(self.config, input_ids, attention_mask, sequence_ids, past_key_values)
        past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if self.config.pre_seq_len is not None and past_key_values is not None and past_length == 0:
            self.prefix_encoder.fill(
                past_key_values,
                batch=len(inputs_embeds),
                dtype=inputs_embeds.dtype,
                devices=[running_device(layer) for layer in self.layers],
            )
            past_length = self.config.pre_seq_len
        mask = build_mask(
            layout,
            visible_from_published(attention_mask, key_length=past_length + layout.shape[-1]),
            sequence_ids,
            past_key_values,
            published_positions=False,
            dtype=inputs_embeds.dtype,
        )
        hidden_states = self._run_layers(
            inputs_embeds, self.rotary_tables(layout, inputs_embeds.dtype), mask, past_key_values, **kwargs
        )
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None
        )

    def rotary_tables(self, layout: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The angles of a layout: two groups of channels, or with 1-D positions one that follows the context alone."""
        places = layout if self.config.position_encoding_2d else layout[:, :1]
        if self.config.rotary_stretch != 1:
            places = places / self.config.rotary_stretch
        frequencies = inverse_frequencies(self.config.head_dim // places.shape[1], device=layout.device)
        return rotary_tables(
            places, frequencies, dtype=dtype if self.config.rotary_dtype == "module" else torch.float32
        )

    def _run_layers(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary=rotary, attention_mask=mask, past_key_values=cache, **kwargs)
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
        arguments are those of `ChatGLMModel.forward`; ``logits_to_keep`` as in transformers.
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
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
