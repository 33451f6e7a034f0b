"""The reward head: a number for each answer, read from the state of its last token.

Shape letters: B batch rows, T positions, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple


class RewardHead:
    """Adds ``score``, a linear layer without bias from a state to a number, to a body with ``base_model``.

    The first tokens of a row, ``[gMASK]`` and ``<sop>`` included, cannot see the answer, so that a head that reads them
    learns nothing; the last token sees all of it.
    """

    accepts_loss_kwargs = False

    # of `PreTrainedModel`
    config: PreTrainedConfig
    base_model: nn.Module

    def _make_head(self, config: PreTrainedConfig) -> None:
        if config.num_labels != 1:
            config.num_labels = 1
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layout: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        every_token: bool = False,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Returns rewards ``[B, 1]``, float32 at least; with ``every_token`` those of all positions, ``[B, T]``.

        Args:
            input_ids: ``[B, T]``, a prompt with its blank and ``<sop>``, and an answer, padded on either side.
            attention_mask: ``[B, T]``, 0 at padding; by default the padding ids at the end are padding. This, the
                layout and the positions are those of the body.
        """
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            layout=layout,
            inputs_embeds=inputs_embeds,
            **{"use_cache": False, **kwargs},
        )
        states = outputs.last_hidden_state
        if not every_token:
            last = find_last_tokens(states, input_ids, attention_mask, pad_token_id=self.config.pad_token_id)
            states = states[torch.arange(len(last), device=last.device), last]
        rewards = self.score(states.to(self.score.weight.dtype))
        rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
        return SequenceClassifierOutput(
            logits=rewards[..., 0] if every_token else rewards,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def find_last_tokens(
    states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, *, pad_token_id: int | None
) -> Tensor:
    """Returns the index ``[B]`` of the last token of each row that is not padding."""
    batch, length, _ = states.shape
    if attention_mask is not None and attention_mask.ndim == 2:
        is_token = attention_mask[:, -length:].bool()
    elif input_ids is not None and pad_token_id is not None:
        is_token = input_ids != pad_token_id
    else:
        is_token = torch.ones(batch, length, dtype=torch.bool, device=states.device)
    return (is_token * torch.arange(length, device=states.device)).amax(-1)
