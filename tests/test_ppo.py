"""Are PPO's returns, advantages and losses those of the formulas, on any batch of either model?"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import EOP, GMASK, MASK, PAD, SOP
from gmask.generation.encoding import Context
from gmask.models.base import stop_dropout
from gmask.models.glm import GLMConfig
from gmask.recipes.ppo import CriticSettings, KLSettings, UpdateSettings
from gmask.recipes.tuning import MethodSettings
from gmask.training.methods import apply_method
from gmask.training.policies import (
    ActorCritic,
    Reference,
    TokenDistribution,
    adapter_off,
    copy_frozen,
    make_critic,
)
from gmask.training.ppo import (
    Experience,
    KLWeight,
    divergence,
    estimate_advantages,
    policy_loss,
    step_losses,
    token_rewards,
    value_loss,
    whiten,
)
from gmask.training.rollouts import Rollout, collate_rollouts
from tuning import BUILDERS

FORBIDDEN = (MASK, GMASK, SOP, 40, 41)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def make_rollout(context: tuple[int, ...], actions: tuple[int, ...]) -> Rollout:
    return Rollout(Context(context, (len(context) - 1,)), actions, actions[-1] == EOP, "text", ())


ROLLOUTS = [
    make_rollout((20, 21, 22, 23, GMASK), (30, 31, 32, EOP)),
    make_rollout((24, GMASK), (33,)),  # cut: it has no end
    make_rollout((25, 26, GMASK), (EOP,)),  # nothing but its end
    make_rollout((27, 28, 29, 20, 21, 22, GMASK), (34, 35, EOP)),
]


def test_a_case_of_two_tokens_computed_by_hand() -> None:
    logprobs, reference, values = torch.tensor([[-1.0, -2.0], [-1.5, -1.0], [0.2, 0.4]])
    rewards = token_rewards(logprobs, reference, [1.0], [2], weight=0.1)
    assert rewards.tolist() == pytest.approx([-0.05, 1.1])
    advantages = estimate_advantages(rewards, values, [2], discount=0.9, trace=0.5)
    # surprises: -0.05 + 0.9 * 0.4 - 0.2 = 0.11 and 1.1 - 0.4 = 0.7; the first advantage is 0.11 + 0.9 * 0.5 * 0.7
    assert advantages.tolist() == pytest.approx([0.425, 0.7])
    returns = advantages + values
    assert returns.tolist() == pytest.approx([0.625, 1.1])
    losses, clipped = policy_loss(torch.tensor([-0.9, -2.5]), logprobs, advantages, clip=0.2)
    assert losses.tolist() == pytest.approx([-0.425 * math.exp(0.1), -0.7 * math.exp(-0.5)])
    assert clipped.tolist() == [0, 0], "a clip that would make the loss less is not taken"
    losses, clipped = policy_loss(torch.tensor([-0.5, -2.5]), logprobs, torch.tensor([1.0, -1.0]), clip=0.2)
    assert (losses.tolist(), clipped.tolist()) == (pytest.approx([-1.2, 0.8]), [1, 1])
    # 0.5 may move to 0.4 only, 0.1 to 0.2; the greater error counts: 0.225 ** 2 and 1.0 ** 2
    errors = value_loss(torch.tensor([0.5, 0.1]), values, returns, clip=0.1)
    assert errors.tolist() == pytest.approx([max(0.125, 0.325) ** 2 / 2, 0.5])
    assert value_loss(torch.tensor([0.5, 0.1]), values, returns, clip=None).tolist() == pytest.approx(
        [0.125**2 / 2, 0.5]
    )
    assert divergence(torch.tensor([-1.0]), torch.tensor([-2.0])).tolist() == pytest.approx([math.exp(-1) - 1 + 1])


def test_nothing_flows_from_one_answer_to_another() -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 4]
    rewards, values = torch.randn(2, 8, dtype=torch.float64)
    together = estimate_advantages(rewards, values, lengths, discount=0.97, trace=0.9)
    parts = zip(rewards.split(lengths), values.split(lengths), lengths, strict=True)
    alone = [estimate_advantages(r, v, [length], discount=0.97, trace=0.9) for r, v, length in parts]
    assert torch.equal(together, torch.cat(alone))
    for reward, value, advantage in zip(rewards.split(lengths), values.split(lengths), alone, strict=True):
        tail = torch.cat((value[1:], torch.zeros(1)))
        surprises = reward + 0.97 * tail - value
        plain = [sum((0.97 * 0.9) ** k * surprises[t + k] for k in range(len(value) - t)) for t in range(len(value))]
        assert advantage.tolist() == pytest.approx([float(one) for one in plain])


def test_with_a_trace_of_one_returns_are_the_discounted_rewards() -> None:
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.3, -0.7, 5.0])
    advantages = estimate_advantages(rewards, values, [3], discount=0.5, trace=1.0)
    assert (advantages + values).tolist() == pytest.approx([1 + 1 + 1, 2 + 2, 4])


def test_advantages_are_whitened_and_equal_ones_become_zero() -> None:
    found = whiten(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.std(unbiased=False)) == pytest.approx(1)
    assert whiten(torch.full((3,), 7.0)).tolist() == [0, 0, 0]


def test_the_weight_of_the_divergence_is_led_to_its_target() -> None:
    fixed, led = KLWeight(KLSettings(weight=0.1)), KLWeight(KLSettings(weight=0.1, kind="adaptive", horizon=1000))
    for weight in (fixed, led):
        weight.update(60.0, 100)
    assert (fixed.value, led.value) == (0.1, pytest.approx(0.1 * (1 + 0.2 * 0.1)))
    led.update(0.0, 100)
    assert led.value == pytest.approx(0.1 * 1.02 * 0.98)
    led.update(6.6, 100)
    assert led.value == pytest.approx(0.1 * 1.02 * 0.98 * 1.01)


# A batch against a restatement


def plain_mask(context: int, total: int) -> Tensor:
    """``[1, 1, T, T]``, 1 = visible: the context sees itself, an answer sees what is before it."""
    visible = torch.ones(total, total).tril()
    visible[:, :context] = 1
    return visible[None, None].to(torch.int8)


def plain_row(model: Any, one: Rollout) -> Tensor:
    """Final states ``[n, H]`` of a single row without padding, by an explicit layout and an explicit mask."""
    context, read = len(one.context.ids), (SOP, *one.actions[:-1])
    ids = torch.tensor([[*one.context.ids, *read]])
    blank = one.context.blanks[0]
    layout = [[*range(context), *[blank] * len(read)], [*[0] * context, *range(1, len(read) + 1)]]
    states = model.base_model(
        input_ids=ids, layout=torch.tensor([layout]), attention_mask=plain_mask(context, ids.shape[1]), use_cache=False
    ).last_hidden_state
    return states[0, context:]


def plain_losses(module: ActorCritic, experience: Experience, settings: UpdateSettings, temperature: float) -> Tensor:
    """The loss, row by row and token by token."""
    total, start = torch.zeros((), dtype=experience.logprobs.dtype), 0
    for one in experience.rollouts:
        states = plain_row(module.policy, one)
        logits = module.policy.lm_head(states) / temperature
        allowed = [token for token in range(logits.shape[-1]) if token not in FORBIDDEN]
        valued = states if module.critic is None else plain_row(module.critic, one)
        valued = valued.detach() if module.is_apart else valued
        for index, action in enumerate(one.actions):
            distribution = (logits[index, allowed] - logits[index, allowed].logsumexp(0)).exp()
            logprob, value = distribution[allowed.index(action)].log(), module.head(valued[index])[0]
            old, was, advantage, target = (
                getattr(experience, name)[start + index] for name in ("logprobs", "values", "advantages", "returns")
            )
            ratio = (logprob - old).exp()
            near = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            total = total - torch.minimum(ratio * advantage, near * advantage)
            held = torch.minimum(torch.maximum(value, was - settings.value_clip), was + settings.value_clip)
            total = total + settings.value_weight * torch.maximum((value - target) ** 2, (held - target) ** 2) / 2
            total = total + settings.entropy_weight * (distribution * distribution.log()).sum()
        start += len(one.actions)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("critic", ["shared", "head", "own"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", BUILDERS)
def test_the_loss_and_its_gradients_are_those_of_single_rows(
    family: str, method: Any, critic: Any, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    policy = BUILDERS[family]()
    body, head = make_critic(policy, CriticSettings(kind=critic))
    apply_method(policy, MethodSettings(name=method, rank=2) if method == "lora" else MethodSettings(name=method))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    module = ActorCritic(policy, TokenDistribution(0.7, FORBIDDEN), critic=body, head=head)
    module.is_apart = critic == "head"
    module = module.to(dtype).train()
    torch.nn.init.normal_(module.head.weight, std=0.3)
    stop_dropout(module)
    count = sum(len(one.actions) for one in ROLLOUTS)
    with torch.no_grad():
        old = module(collate_rollouts(ROLLOUTS, sop=SOP, pad=PAD))
    noise = [0.3 * torch.randn(count, dtype=dtype) for _ in range(4)]
    experience = Experience(ROLLOUTS, old.logprobs + noise[0], old.values + noise[1], 3 * noise[2], noise[3])
    settings = UpdateSettings(entropy_weight=0.3, value_weight=0.7)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    plain = plain_losses(module, experience, settings, 0.7)
    expected = torch.autograd.grad(plain, trained, allow_unused=True)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):  # another order, other padding
        batch = experience.batch(order, sop=SOP, pad=PAD)
        found = step_losses(module(batch), batch, settings)["loss"]
        assert found.item() == pytest.approx(plain.item(), abs=TOLERANCE[dtype] * count)
        for one, other in zip(torch.autograd.grad(found, trained, allow_unused=True), expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert torch.allclose(
                    one, other, atol=TOLERANCE[dtype] * 100, rtol=1e-4 if dtype == torch.float32 else 0
                )


@pytest.mark.parametrize("family", BUILDERS)
def test_the_reference_is_the_model_with_its_adapter_off_and_training_goes_on_behind_it(family: str) -> None:
    for method in (MethodSettings(rank=2), MethodSettings(name="ia3")):
        policy = BUILDERS[family]()
        start, distribution = copy_frozen(policy), TokenDistribution(1.0, FORBIDDEN)
        batch = collate_rollouts(ROLLOUTS, sop=SOP, pad=PAD)
        before = Reference(policy, start).logprobs(distribution, batch)
        apply_method(policy, method)
        trains = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3)
            module = ActorCritic(policy, distribution)
            assert not torch.allclose(module(batch).logprobs, before, atol=1e-3)
            assert torch.allclose(Reference(policy).logprobs(distribution, batch), before, atol=1e-6)
            moved = module(batch).logprobs
            with adapter_off(policy):
                assert not [p for p in policy.parameters() if p.requires_grad]
            assert torch.equal(module(batch).logprobs, moved)
        assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == trains


def test_what_is_forbidden_has_no_probability_and_a_model_without_dropout_is_the_same_twice() -> None:
    policy = BUILDERS["glm"](hidden_dropout=0.5, attention_dropout=0.5, embedding_dropout=0.5)
    assert isinstance(policy.config, GLMConfig)
    apply_method(policy, MethodSettings(rank=2, dropout=0.5))
    module = ActorCritic(policy, TokenDistribution(1.0, FORBIDDEN), head=torch.nn.Linear(32, 1)).train()
    batch = collate_rollouts(ROLLOUTS, sop=SOP, pad=PAD)
    assert not torch.equal(module(batch).logprobs, module(batch).logprobs)
    stop_dropout(module)
    assert torch.equal(module(batch).logprobs, module(batch).logprobs)
    logits = torch.randn(3, 48)
    logprobs = [module.distribution.score(logits, torch.full((3,), token))[0].exp() for token in range(48)]
    assert torch.allclose(torch.stack(logprobs).sum(0), torch.ones(3))
    assert all(float(logprobs[token].max()) == 0 for token in FORBIDDEN)
