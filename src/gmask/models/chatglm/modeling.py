"""How does ChatGLM-6B turn tokens and their layout into logits?

Shape letters: B rows, T positions, K key positions (cached ones first), H hidden size, N heads, D head size,
L layers, P prefix length, V vocabulary.
Module names are those of the published checkpoints, so that their keys need no renaming. Every tensor is batch-first;
the published code is sequence-first inside.
Source: published modeling_chatglm.py, revision of the 130528-entry vocabulary. Its division of the queries by
layer + 1, undone after the product, only keeps half precision from overflowing and is left to the kernel.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from gmask.models.attention import attend
from gmask.models.cache import GrowingCache
from gmask.models.chatglm.activation import gelu
from gmask.models.chatglm.chatting import ChatMixin
from gmask.models.chatglm.configuration import ChatGLMConfig
from gmask.models.chatglm.inputs import read_chat_layout, visible_from_published
from gmask.models.chatglm.positions import inverse_frequencies, rotary_tables, rotate
from gmask.models.inputs import build_mask, continues, keep_positions, resolve_sequences
from gmask.models.layout_generation import LayoutGenerationMixin
from gmask.models.prefix import PrefixEncoder, prepend, show_prefix
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
        if self.config.rotary_stretch != 1:
            places = places / self.config.rotary_stretch
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
