"""A prefix language model with its head: logits, loss, and transformers' `generate`.

The layout has a keyword of its own in `generate`. In ``position_ids`` transformers would repeat 3-D positions along the
wrong axis for beams, add one to both rows at each step, and shift them for prefix tuning.

Shape letters: B rows, T positions, S positions of a prompt, K key positions (cached ones first), V vocabulary.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateOutput
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput
from transformers.utils.generic import can_return_tuple

from gmask.models.base import PrefixLMPreTrainedModel
from gmask.models.cache import GrowingCache
from gmask.models.layout import continues, derive_layout, extend_layout, keep_positions


def _left_padded_columns(mask: Tensor) -> Tensor:
    """For each column, the column ``[B, S]`` that comes there when padding on the right of a mask goes to the left."""
    column = torch.arange(mask.shape[1], device=mask.device)
    end = ((mask != 0) * (column + 1)).amax(-1, keepdim=True)  # behind the last token
    return (column + end) % mask.shape[1]


def _take_columns(values: Tensor, columns: Tensor) -> Tensor:
    """The given columns ``[B, S]`` of ids or a mask ``[B, S]``, a layout ``[B, 2, S]`` or embeddings ``[B, S, H]``."""
    if values.ndim == 2:
        return values.gather(1, columns)
    if values.shape[1] == columns.shape[1] and values.is_floating_point():
        return values.gather(1, columns[..., None].expand(-1, -1, values.shape[-1]))
    return values.gather(2, columns[:, None].expand(-1, values.shape[1], -1))


def summed_loss(head: nn.Module, states: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """Returns the cross-entropy in nats, summed over the targets that are not -100; float32.

    A chunk's logits are not kept: the backward pass computes them again. So no more than ``[chunk, V]`` of them exist
    at a time, in any dtype, for one more product with the head.

    Args:
        head: from ``[n, H]`` to logits ``[n, V]``.
        states: ``[B, T, H]``.
        targets: ``[B, T]``.
        chunk: positions that have logits at a time; by default all.
    """
    scored = targets != -100
    states, targets = states[scored], targets[scored]

    def total(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, reduction="sum")

    if chunk is None or len(targets) <= chunk:
        return total(states, targets)
    sums = [
        checkpoint(total, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(torch.split(states, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.stack(sums).sum()


class PrefixLMForConditionalGeneration(PrefixLMPreTrainedModel, GenerationMixin):
    """A model with the head ``lm_head``, which predicts tokens; the base of both language models."""

    shifts_labels = False
    """Whether a label is the token at its own position (True), or the token behind it (False)."""

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
        skip_logits: bool = False,
        loss_chunk: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits ``[B, T, V]``, and the mean cross-entropy in nats if ``labels [B, T]`` are given.

        The labels are described at the model's class. The other arguments are those of `PrefixLMModel.forward`;
        ``logits_to_keep`` as of `keep_positions`. With ``skip_logits`` the head runs at the labelled positions
        only, and no logits are returned; ``loss_chunk`` of these have logits at a time, as of `summed_loss`.

        Raises:
            ValueError: labels that are one position off.

        Warns:
            UserWarning: labels in the context.
        """
        if labels is not None and input_ids is not None and not skip_logits and not torch.compiler.is_compiling():
            is_plain = layout is None and sequence_ids is None and past_key_values is None
            self._check_labels(input_ids, labels, is_plain=is_plain)
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            layout=layout,
            sequence_ids=sequence_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            keep=self._states_to_keep(logits_to_keep, labels, position_ids, sequence_ids, kwargs),
            **kwargs,
        )
        loss, logits = None, None
        if labels is not None and skip_logits:
            states, targets = self._pair_labels(outputs.last_hidden_state, labels)
            total = summed_loss(self.lm_head, states, targets, chunk=loss_chunk)
        else:
            logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))
            if labels is not None:
                predictions, targets = self._pair_labels(logits, labels)
                total = F.cross_entropy(predictions.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        if labels is not None:
            loss = total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _states_to_keep(
        self,
        logits_to_keep: int | Tensor,
        labels: Tensor | None,
        position_ids: Tensor | None,
        sequence_ids: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> int:
        """The number of last positions whose final states are needed; 0: all, as for packed rows and for states that
        are returned.
        """
        if not isinstance(logits_to_keep, int) or not (labels is position_ids is sequence_ids is None):
            return 0
        returned = ("output_hidden_states", "output_attentions")
        return 0 if any(kwargs.get(name, getattr(self.config, name)) for name in returned) else logits_to_keep

    def _check_labels(self, input_ids: Tensor, labels: Tensor, *, is_plain: bool) -> None:
        """Raises `ValueError` for labels ``[B, T]`` that are one position off; warns of those in a context.

        Other models shift labels that are copies of the ids, and the collators of their trainers make such copies. A
        GLM, whose labels are not shifted, would learn from them to repeat each token.

        Args:
            is_plain: each row is whole: one context, and its answers.
        """
        if labels.shape != input_ids.shape or labels.is_meta:
            return
        pad, sop = self.config.pad_token_id, self.config.sop_token_id
        scored = labels != -100 if pad is None else (labels != -100) & (labels != pad)
        are_copies = bool(((labels == input_ids) | ~scored).all())
        are_behind = bool(((labels[:, :-1] == input_ids[:, 1:]) | ~scored[:, :-1]).all())
        is_right, is_off = (are_copies, are_behind) if self.shifts_labels else (are_behind, are_copies)
        if is_off and not is_right and len(torch.unique(labels[scored])) > 1:  # one token alone may follow itself
            raise ValueError(
                "labels[t] of this model is input_ids[t], for it shifts them itself; these are shifted already"
                if self.shifts_labels
                else "labels[t] of this model is the token behind input_ids[t], and these are input_ids[t], made for "
                "models that shift them: move each row one to the left, or use gmask sft"
            )
        if is_right and is_plain and sop is not None:
            is_start = (input_ids == sop).long()
            answered = is_start.cumsum(-1) - (is_start if self.shifts_labels else 0) > 0
            if bool((scored & ~answered).any()):
                warnings.warn(
                    "labels stand in a context, which is read in both directions: each of those tokens is seen where "
                    "it is predicted; set the labels up to <sop> to -100, or use gmask sft",
                    stacklevel=4,
                )

    def _pair_labels(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits, or hidden states, that are scored, and the label of each; -100 is not scored."""
        raise NotImplementedError

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        position_ids: Tensor | None = None,
        generation_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | Tensor:
        """As transformers' `generate`. A prompt ends with ``<sop>``, and the new tokens answer its blank.

        It also takes the published arguments, from which it derives the layout and the padding: ``position_ids [B, 2,
        >= S]``, GLM's ``generation_attention_mask [B, 1, >= S, >= S]`` (1 = visible) and ChatGLM's boolean
        ``attention_mask [B, 1, S, S]`` (True = hidden).

        Prompts that are padded on the right, by their ``attention_mask [B, S]`` or without one by trailing padding ids,
        get the answers that they get alone; each stands in the result as it was given, with its answer behind the
        padding.

        Raises:
            ValueError: a prompt without a blank or ``<sop>``; ``inputs_embeds`` without ``input_ids`` or ``layout``, or
                of another length; chunked prefill, since the context is bidirectional.
        """
        input_ids = kwargs.get("input_ids", inputs)
        self._check_embeddings(input_ids, kwargs)
        if position_ids is not None and position_ids.ndim == 3 and input_ids is not None:
            kwargs["layout"] = position_ids[:, :, : input_ids.shape[1]]
        if generation_attention_mask is not None and input_ids is not None:
            length = input_ids.shape[1]
            kwargs["attention_mask"] = generation_attention_mask[:, 0, length - 1, :length].long()
        hidden = kwargs.get("attention_mask")
        if hidden is not None and hidden.ndim == 4:
            kwargs["attention_mask"] = (~hidden[:, 0, -1]).long()
        if self._grows_a_cache(kwargs):
            kwargs["past_key_values"] = GrowingCache(self.config)
        mask = self._right_padded_mask(input_ids, kwargs)
        if mask is None:
            output: GenerateOutput | Tensor = super().generate(inputs, *args, **kwargs)
            return output
        columns = _left_padded_columns(mask)
        kwargs["attention_mask"] = mask
        moved = {name: kwargs.pop(name, None) for name in ("input_ids", "attention_mask", "layout", "inputs_embeds")}
        moved["input_ids"] = input_ids
        kwargs |= {name: _take_columns(value, columns) for name, value in moved.items() if value is not None}
        output = super().generate(None, *args, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        if input_ids is not None:
            copies = len(sequences) // len(input_ids)  # num_return_sequences
            sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(copies, dim=0)
        return output

    def _check_embeddings(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Raises `ValueError` for ``inputs_embeds`` whose layout is not known."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or kwargs.get("layout") is not None:
            return
        if input_ids is None:
            raise ValueError("inputs_embeds carry no layout: pass input_ids, or layout [B, 2, S], beside them")
        if input_ids.shape != embeds.shape[:2]:
            raise ValueError(
                f"input_ids are {list(input_ids.shape)} and inputs_embeds {list(embeds.shape)}: both must be of one "
                "prompt"
            )

    def _right_padded_mask(self, input_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """The mask ``[B, S]`` of prompts (0 at padding), if one of them is padded on the right; else None.

        Raises:
            ValueError: such prompts continue a cache.
        """
        mask: Tensor | None = kwargs.get("attention_mask")
        if mask is None:
            default = (kwargs.get("generation_config") or self.generation_config).pad_token_id
            pad = kwargs.get("pad_token_id", self.config.pad_token_id if default is None else default)
            if input_ids is None or pad is None:
                return None
            is_token = (input_ids != pad).long()  # the same id may end a context: padding is before or behind all else
            mask = ((is_token.cumsum(-1) > 0) & (is_token.flip(-1).cumsum(-1).flip(-1) > 0)).long()
        if mask.ndim != 2 or bool(mask[:, -1].all()):
            return None
        if continues(kwargs.get("past_key_values")):
            raise ValueError("prompts that continue a cache must be padded on the left, not on the right")
        return mask

    def _grows_a_cache(self, kwargs: dict[str, Any]) -> bool:
        """Returns True if transformers would choose a `DynamicCache`: no cache is given or asked for by name."""
        config = kwargs.get("generation_config") or self.generation_config
        use_cache, kind = (
            kwargs.get(name, getattr(config, name, None)) for name in ("use_cache", "cache_implementation")
        )
        return use_cache is not False and kind is None and kwargs.get("past_key_values") is None

    def _prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> ModelOutput:
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size splits a context that is read in both directions: leave it unset")
        return super()._prefill(input_ids, generation_config, *args, **kwargs)

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Counts padding on the left only: in published vocabularies the padding id also ends the context."""
        mask: Tensor = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        return (mask.cumsum(-1) > 0).long()

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        layout = model_kwargs.get("layout")
        if layout is not None and layout.shape[-1] > inputs_tensor.shape[1]:  # an assistant's may be shorter
            raise ValueError(f"layout covers {layout.shape[-1]} tokens, the prompt has {inputs_tensor.shape[1]}")
        if layout is None:
            mask = model_kwargs.get("attention_mask")
            model_kwargs["layout"] = self.read_prompt_layout(
                input_ids, None if mask is None else mask[:, -input_ids.shape[1] :]
            )
        positions: Tensor = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return positions  # 1-D: `generate` needs them for itself, and forward ignores them

    def read_prompt_layout(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Derives the layout ``[B, 2, S]`` of prompts ``[B, S]``; the mask has 0 at padding.

        Raises:
            ValueError: a prompt without a blank or ``<sop>``.
        """
        sop = self.config.sop_token_id
        if sop is None:
            raise ValueError("the config has no sop_token_id: load with gmask.load, or pass layout [B, 2, T]")
        if not bool((input_ids == sop).any(-1).all()):
            raise ValueError("generate continues an answer: end each prompt with <sop> after a text with a blank")
        return derive_layout(
            input_ids,
            blank_token_ids=self.config.blank_token_ids,
            sop_token_id=sop,
            attention_mask=attention_mask,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        layout: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        inputs.pop("position_ids", None)
        fed = inputs.get("input_ids")
        fed_length = fed.shape[1] if fed is not None else inputs["inputs_embeds"].shape[1]
        if layout is not None:
            missing = input_ids.shape[1] - layout.shape[-1]  # assisted decoding proposes several tokens at once
            if missing > 0:
                layout = extend_layout(layout, missing)
            inputs["layout"] = layout[:, :, -fed_length:].clone(memory_format=torch.contiguous_format)
        return inputs

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        updated["layout"] = extend_layout(updated["layout"], num_new_tokens)
        return updated

    def _prepare_static_cache(self, *args: Any, max_cache_len: int, **kwargs: Any) -> Cache:
        """Makes a static cache with room for the prefix, too."""
        room = max_cache_len + (self.config.pre_seq_len or 0)
        cache: Cache = super()._prepare_static_cache(*args, max_cache_len=room, **kwargs)
        return cache

    def create_masks_for_generate(
        self, attention_mask: Tensor | None = None, past_key_values: Cache | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Returns the padding mask, as long as a static cache, so that compiled steps see one shape.

        `forward` builds the attention mask from it. Once the cache holds a prefix, the mask covers it, too.
        """
        if attention_mask is None or past_key_values is None:
            return attention_mask
        if self.config.pre_seq_len is not None and continues(past_key_values):
            attention_mask = F.pad(attention_mask, (self.config.pre_seq_len, 0), value=1)
        room = past_key_values.get_mask_sizes(1, 0)[0] - attention_mask.shape[1]
        return F.pad(attention_mask, (0, max(room, 0)), value=1)
