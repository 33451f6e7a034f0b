"""The models of a PPO run: the policy with its values, its reference, and how tokens are scored.

Whatever samples and whatever scores use one distribution: the logits divided by the temperature, over the tokens that
may be written. A token that may not be written, such as ``<sop>``, has no probability in either.

Shape letters: B rows, T positions, n tokens that are scored (in the order of the rows), H hidden size, V vocabulary.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmask.checkpoints.adapters import has_layers, require_peft
from gmask.errors import GmaskError
from gmask.infilling.blanks import NOT_SCORED
from gmask.recipes.ppo import CriticSettings
from gmask.recipes.tuning import MethodSettings
from gmask.training.examples import Batch
from gmask.training.methods import apply_method


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a policy and its critic say of the n targets of a batch, float32 ``[n]``."""

    logprobs: Tensor
    entropy: Tensor  # of the distribution that each was drawn from
    values: Tensor  # of the state before each


@dataclass(frozen=True, slots=True)
class TokenDistribution:
    """The distribution that tokens are drawn from."""

    temperature: float
    forbidden: tuple[int, ...]  # ids that are never drawn

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies ``[n]`` in nats, of logits ``[n, V]`` and targets ``[n]``."""
        scores = logits.float() if logits.dtype != torch.float64 else logits
        forbidden = torch.tensor(self.forbidden, dtype=torch.long, device=scores.device)
        scores = (scores / self.temperature).index_fill(-1, forbidden, -1e30)
        logprobs = scores.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy


WHOLE_VOCABULARY = TokenDistribution(1.0, ())


def target_states(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The final states ``[n, H]`` at the positions of a batch that have a target."""
    inputs = {name: batch[name] for name in ("input_ids", "layout", "sequence_ids")}
    states: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return states[batch["targets"] != NOT_SCORED]


class ValueModel(Protocol):
    """A model with a linear head ``score`` of one output, such as a reward model."""

    base_model: nn.Module
    score: nn.Module


class ActorCritic(nn.Module):
    """The policy and what values its states, as one module, which accelerate wraps and the loop saves.

    Args:
        critic: a body of its own, or None: the head reads the policy's states.
        head: of one output; None: there are no values (they are 0).
        is_apart: no gradients flow from the values into the policy.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        distribution: TokenDistribution,
        *,
        critic: nn.Module | None = None,
        head: nn.Module | None = None,
        is_apart: bool = False,
    ) -> None:
        super().__init__()
        self.is_apart = is_apart
        self.policy, self.critic, self.head, self.distribution = policy, critic, head, distribution

    def forward(self, batch: Mapping[str, Tensor], *, plain: bool = False) -> TokenScores:
        """Scores the targets of a batch: ``input_ids``, ``sequence_ids``, ``targets [B, T]``, ``layout [B, 2, T]``.

        plain: over the whole vocabulary, at temperature 1.
        """
        distribution = WHOLE_VOCABULARY if plain else self.distribution
        states = target_states(self.policy, batch)
        targets = batch["targets"][batch["targets"] != NOT_SCORED]
        logprobs, entropy = distribution.score(self.policy.lm_head(states), targets)
        if self.head is None:
            return TokenScores(logprobs, entropy, torch.zeros_like(logprobs))
        if self.critic is not None:
            states = target_states(self.critic, batch)
        elif self.is_apart:
            states = states.detach()
        values = self.head(states)[:, 0]
        return TokenScores(logprobs, entropy, values.to(logprobs.dtype))

    def critic_parameters(self) -> list[nn.Parameter]:
        """The parameters that the policy does not share."""
        parts = [part for part in (self.critic, self.head) if part is not None]
        return list({id(p): p for part in parts for p in part.parameters() if p.requires_grad}.values())


def make_critic(
    start: PreTrainedModel, settings: CriticSettings, *, reward: ValueModel | None = None
) -> tuple[nn.Module | None, nn.Module | None]:
    """The critic and the head of an `ActorCritic`.

    Args:
        start: the model before the method of tuning is applied to it.
        reward: the reward model, for the published "joint" and "frozen".
    """
    if settings.kind == "frozen":
        return None, None
    if settings.kind in ("shared", "head"):
        return None, _new_head(start)
    source: Any = start if settings.kind == "own" else reward
    critic = copy.deepcopy(source)
    apply_method(critic, settings.method or MethodSettings(name="full"))
    head: nn.Module = _new_head(start) if settings.kind == "own" else critic.score
    head.float().requires_grad_(True)
    return critic.base_model, head  # the rest of it, which predicts tokens, is not needed


def _new_head(start: PreTrainedModel) -> nn.Linear:
    """A head that says 0 of every state, so that the first advantages are the returns."""
    head = nn.Linear(start.config.hidden_size, 1, device=start.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class Reference:
    """The distribution that the policy must stay near: a frozen copy, or the policy with its adapter switched off.

    Args:
        copy_of_start: None if the policy began as its model with a new adapter.
    """

    def __init__(self, policy: PreTrainedModel, copy_of_start: PreTrainedModel | None = None) -> None:
        self.policy, self.copy = policy, copy_of_start
        if copy_of_start is None and not can_switch_off(policy):
            raise GmaskError("the reference is the policy without its adapter, and the policy has none")

    def logprobs(self, distribution: TokenDistribution, batch: Batch) -> Tensor:
        """The log-probabilities ``[n]`` of the targets of a batch."""
        targets = batch["targets"][batch["targets"] != NOT_SCORED]
        if self.copy is not None:
            return distribution.score(self.copy.lm_head(target_states(self.copy, batch)), targets)[0]
        with adapter_off(self.policy):
            return distribution.score(self.policy.lm_head(target_states(self.policy, batch)), targets)[0]


def can_switch_off(model: PreTrainedModel) -> bool:
    """Whether the model has layers, such as LoRA's, that change nothing when they are new. A new prefix does."""
    return has_layers(model)


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model computes without the layers that tuning put into it."""
    require_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])  # PEFT sets it as it switches


def copy_frozen(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that does not train."""
    frozen: PreTrainedModel = copy.deepcopy(model).requires_grad_(False).eval()
    return frozen
