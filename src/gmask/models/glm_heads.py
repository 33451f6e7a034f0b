"""GLM with heads for tasks: choosing among given answers, and classification.

Scores are computed in float32. The language-modelling head runs only at the scored positions.

Shape letters: B batch rows, C choices of a row, T positions, H hidden size, L labels.

Source: published code sunzeyeah/RLHF glm-10B-chinese/modeling_glm.py and THUDM/GLM model/downstream.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast, MultipleChoiceModelOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from gmask.models.glm import GLMConfig, GLMLanguageModel, GLMModel, GLMPreTrainedModel
from gmask.models.reward import RewardHead

THUDM_CLASSIFIER_NAMES = {"pool_layer": "dense", "multichoice_head": "out_proj"}
"""Layers of the classification head: ``{name in checkpoints of THUDM/GLM: name here}``."""

Ragged = Sequence[Sequence[Tensor | Sequence[int]]]


class GLMChoiceModel(GLMLanguageModel):
    """GLM that scores given tokens: the base of the next three classes."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, not over tokens

    def read(self, input_ids: Tensor | None, **kwargs: Any) -> BaseModelOutputWithPast:
        """Returns final hidden states; the arguments are those of `GLMModel.forward`."""
        outputs: BaseModelOutputWithPast = self.glm(input_ids, **{"use_cache": False, **kwargs})
        return outputs

    def token_log_probs(self, states: Tensor, targets: Tensor) -> Tensor:
        """Returns log-probabilities ``[n]`` float32, in nats, of tokens ``[n]`` by the final states ``[n, H]``."""
        return -F.cross_entropy(self.lm_head(states).float(), targets, reduction="none")

    @staticmethod
    def choose(logits: Tensor, labels: Tensor | None, outputs: BaseModelOutputWithPast) -> MultipleChoiceModelOutput:
        """Returns the output of a head: logits ``[B, C]``, and their mean cross-entropy in nats with ``labels [B]``."""
        return MultipleChoiceModelOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GLMForMultipleChoice(GLMChoiceModel):
    """Chooses among answers that are side by side in one row; each sees only the context."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        choice_ids: Ragged | None = None,
        choice_indices: Ragged | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Returns logits ``[B, C]``: the sum of the log-probabilities of each choice's tokens, in nats.

        Takes what ``tokenizer.build_inputs_for_multiple_choice`` returns.

        Args:
            input_ids: ``[B, T]``; with it ``attention_mask [B, 1, T, T]`` (1 = visible), ``position_ids [B, 2, T]``.
            choice_ids: for each row, the token ids of each of its choices.
            choice_indices: the positions that predict them. A row with fewer choices has -inf for the missing ones.
            labels: ``[B]``, the index of the right choice.
        """
        if choice_ids is None or choice_indices is None:
            raise ValueError("give choice_ids and choice_indices, as build_inputs_for_multiple_choice makes them")
        outputs = self.read(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        states = outputs.last_hidden_state
        width = max(map(len, choice_ids))
        targets, target_cells = flatten_ragged(choice_ids, width, states.device)
        positions, position_cells = flatten_ragged(choice_indices, width, states.device)
        if not torch.equal(target_cells, position_cells):
            raise ValueError("choice_ids and choice_indices differ in the lengths of their choices")
        scores = self.token_log_probs(states[target_cells // width, positions], targets)
        logits = scores.new_zeros(len(states) * width).index_add(0, target_cells, scores).view(-1, width)
        counts = torch.tensor([len(choices) for choices in choice_ids], device=logits.device)
        lacking = torch.arange(width, device=logits.device) >= counts[:, None]
        return self.choose(logits.masked_fill(lacking, -torch.inf), labels, outputs)


class GLMForMultiTokenCloze(GLMChoiceModel):
    """Scores answers of several tokens, each in a row of its own behind its context."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
        logit_mask: Tensor | None = None,
        length_penalty: float = 0.0,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Returns logits ``[B, C]``, or ``[B]`` without choices: summed log-probabilities of scored tokens, in nats.

        Args:
            input_ids: ``[B, C, T]``, or ``[B, T]``. The mask and the positions are those of `GLMModel.forward`, with
                the choices as a second dimension if there are choices.
            target_ids: of the shape of ``input_ids``: the token that each position must predict.
            logit_mask: of the shape of ``input_ids``, 1 if the target is scored; by default if it is not -100.
            length_penalty: divides a score by (number of scored tokens) ** length_penalty.
            labels: ``[B]``, the index of the right choice.
        """
        if target_ids is None:
            raise ValueError("give target_ids: what each position must predict, -100 where nothing is scored")
        scored = (target_ids != -100) if logit_mask is None else logit_mask.bool()
        rows, attention_mask, position_ids = flatten_choices(input_ids, attention_mask, position_ids)
        outputs = self.read(rows, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        states = outputs.last_hidden_state.view(*input_ids.shape, -1)
        scores = self.token_log_probs(states[scored], target_ids[scored])
        logits = scores.new_zeros(input_ids.shape).masked_scatter(scored, scores).sum(-1)
        if length_penalty:
            logits = logits / scored.sum(-1).clamp(min=1) ** length_penalty
        return self.choose(logits, labels, outputs)


class GLMForSingleTokenCloze(GLMChoiceModel):
    """Chooses among single tokens, by the logits of their ids at the start of the answer."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Returns logits ``[B, C]`` of the ids ``target_ids [B, C]`` at ``<sop>``; not log-probabilities, as published.

        If ``attention_mask`` is a prefix length, ``<sop>`` is there, as published; else it is searched for in the ids.
        ``labels [B]`` are the indices of the right choices.
        """
        if target_ids is None:
            raise ValueError("give target_ids [B, C]: the token of each choice")
        outputs = self.read(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        states = outputs.last_hidden_state
        start = find_answer_starts(states, input_ids, attention_mask, sop_token_id=self.config.sop_token_id)
        logits = self.lm_head(take_states(states, start)).float().gather(1, target_ids)
        return self.choose(logits, labels, outputs)


class GLMForSequenceClassification(GLMPreTrainedModel):
    """Classifies by the final state at ``config.pool_token``: dropout, dense, tanh, dropout, out_proj.

    ``cls`` is the first token, ``start`` the ``<sop>`` behind the context, ``pad`` the last token of the context.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.glm = GLMModel(config)
        rate = config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(rate)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.register_load_state_dict_pre_hook(_rename_classifier)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Returns logits ``[B, L]``; for rows with choices ``[B, C, T]`` and one label, ``[B, C]``.

        Args:
            input_ids: ``[B, T]`` or ``[B, C, T]``, as a tokenizer makes them. The mask and the positions are those of
                `GLMModel.forward`, with the choices as a second dimension if there are choices.
            labels: ``[B]``, the class, or the index of the right choice. Without choices,
                ``config.problem_type`` may ask for regression or several labels instead, as in transformers.
        """
        choices = input_ids.shape[1] if input_ids is not None and input_ids.ndim == 3 else None
        if choices is not None:
            if self.num_labels != 1:
                raise ValueError(f"input_ids [B, C, T] need a model with one label; this one has {self.num_labels}")
            input_ids, attention_mask, position_ids = flatten_choices(input_ids, attention_mask, position_ids)
        elif self.num_labels == 1:
            self._check_no_answer(input_ids, attention_mask)
        outputs = self.glm(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{"use_cache": False, **kwargs},
        )
        states = outputs.last_hidden_state
        pooled = take_states(states, self._find_pooled(states, input_ids, attention_mask, position_ids))
        pooled = pooled.to(self.dense.weight.dtype)  # a head that was trained on a bfloat16 model is float32
        logits = self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(pooled))))).float()
        loss = None
        if choices is not None:
            logits = logits.view(-1, choices)
            loss = None if labels is None else F.cross_entropy(logits, labels)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _check_no_answer(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
        """Raises `ValueError` for answers to be rewarded: the pooled state, before or at ``<sop>``, cannot see them."""
        sop = self.config.sop_token_id
        if input_ids is None or sop is None:
            return
        in_answer = (input_ids == sop).cumsum(-1) - (input_ids == sop).long() > 0
        padded = attention_mask == 0 if attention_mask is not None and attention_mask.ndim == 2 else False
        if bool((in_answer & ~(padded | (input_ids == self.config.pad_token_id))).any()):
            raise ValueError(
                "a row has an answer behind <sop>, which this head cannot see, so that it would learn nothing: take "
                "GLMForReward, as `gmask reward` does"
            )

    def _find_pooled(
        self, states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Returns the index ``[B]`` of each row's pooled state."""
        if self.config.pool_token == "cls":
            published = position_ids is not None and position_ids.ndim == 3
            if attention_mask is not None and attention_mask.ndim == 2 and not published:
                return attention_mask.long().argmax(-1)  # a tokenizer may pad on the left
            return torch.zeros(len(states), dtype=torch.long, device=states.device)
        start = find_answer_starts(states, input_ids, attention_mask, sop_token_id=self.config.sop_token_id)
        return start - 1 if self.config.pool_token == "pad" else start


class GLMForReward(RewardHead, GLMPreTrainedModel):
    """Rewards an answer; `RewardHead` has the forward pass."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        self._make_head(config)
        self.post_init()


def flatten_choices(input_ids: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Reshapes ``[B, C, ...]`` to ``[B * C, ...]`` if the ids ``[B, C, T]`` have choices.

    A prefix length that holds for all rows stays as it is.
    """
    if input_ids is None or input_ids.ndim != 3:
        return (input_ids, *others)
    return tuple(t.flatten(0, 1) if t is not None and t.ndim > 1 else t for t in (input_ids, *others))


def flatten_ragged(values: Ragged, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns all numbers ``[n]`` of all choices, and for each the index ``row * width + choice`` of its choice."""
    numbers, cells = [torch.zeros(0, dtype=torch.long)], []
    for row, choices in enumerate(values):
        for column, choice in enumerate(choices):
            numbers.append(torch.as_tensor(choice, dtype=torch.long).cpu())
            cells += [row * width + column] * len(choice)
    return torch.cat(numbers).to(device), torch.tensor(cells, dtype=torch.long, device=device)


def find_answer_starts(
    states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, *, sop_token_id: int | None
) -> Tensor:
    """Returns the position ``[B]`` where the answer of each row starts.

    This is the prefix length if the mask is one, else the first ``<sop>``, else the end of the row without padding.
    """
    batch, length, _ = states.shape
    if attention_mask is not None and attention_mask.ndim <= 1:
        return attention_mask.long().expand(batch)
    end = torch.full((batch,), length, device=states.device)
    if attention_mask is not None and attention_mask.ndim == 2:
        end = (attention_mask[:, -length:] * torch.arange(1, length + 1, device=states.device)).amax(-1)
    if input_ids is None or sop_token_id is None:
        return end
    is_sop = input_ids == sop_token_id
    return torch.where(is_sop.any(-1), is_sop.long().argmax(-1), end)


def take_states(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """Returns the states ``[B, H]`` at one index a row.

    Raises:
        ValueError: an index behind the end of a row, which then has no ``<sop>``.
    """
    if hidden_states.is_cpu and bool((indices >= hidden_states.shape[1]).any()):
        raise ValueError("a row has no <sop>, whose state is read: end each text with <sop>")
    return hidden_states[torch.arange(len(indices), device=indices.device), indices]


def _rename_classifier(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Renames the classification head of a THUDM checkpoint to the names here."""
    for published, ours in THUDM_CLASSIFIER_NAMES.items():
        for part in ("weight", "bias"):
            if f"{prefix}{published}.{part}" in state_dict:
                state_dict[f"{prefix}{ours}.{part}"] = state_dict.pop(f"{prefix}{published}.{part}")
