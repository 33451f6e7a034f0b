"""Which tiny tuned models do several test files share?"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import EOP, GMASK, MASK, PAD, SHAPE, SOP, SPECIAL
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.recipes.tuning import MethodSettings
from gmask.training.methods import RankSchedule, apply_method

IDS = torch.tensor([[20, 21, MASK, 22, SOP, 30, 31], [40, MASK, 23, SOP, 41, PAD, PAD]])
LABELS = torch.tensor([[-100] * 4 + [30, 31, EOP], [-100] * 3 + [41, EOP, -100, -100]])
CHAT_IDS = torch.tensor([[20, 21, 22, GMASK, SOP, 30, 31, EOP], [40, 23, GMASK, SOP, 41, EOP, PAD, PAD]])
CHAT_LABELS = CHAT_IDS.where(((CHAT_IDS == SOP).cumsum(-1) > 0) & (CHAT_IDS >= 30) | (CHAT_IDS == EOP), -100)

METHODS = {
    "lora": MethodSettings(rank=4, targets="all-linear"),
    "dora": MethodSettings(name="dora", rank=2),
    "adalora": MethodSettings(name="adalora", rank=2, alpha=32),
    "ia3": MethodSettings(name="ia3"),
    "p-tuning-v2": MethodSettings(name="p-tuning-v2", prefix_length=3),
    "projection": MethodSettings(name="p-tuning-v2", prefix_length=3, projection=True),
}
"""Those of which the folder holds an adapter, for GLM and ChatGLM alike."""

RATES = {"ia3": 0.1, "adalora": 0.05, "p-tuning-v2": 0.2}
STEPS = 12


def build_chatglm(seed: int = 0, **settings: Any) -> ChatGLMForConditionalGeneration:
    """A tiny ChatGLM with random weights, equal for equal settings."""
    ids = dict(pad_token_id=PAD, mask_token_id=MASK, gmask_token_id=GMASK, bos_token_id=SOP, eos_token_id=EOP)
    config = ChatGLMConfig(**{**SHAPE, "intermediate_size": 64, "residual_alpha": 2.0, **ids, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ChatGLMForConditionalGeneration(config).eval()


def build_glm_of(seed: int = 0, **settings: Any) -> GLMForConditionalGeneration:
    """A tiny GLM with random weights, equal for equal settings, and no dropout."""
    still = dict(embedding_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GLMForConditionalGeneration(GLMConfig(**{**SHAPE, **SPECIAL, **still, **settings})).eval()


BUILDERS: dict[str, Callable[..., Any]] = {"glm": build_glm_of, "chatglm": build_chatglm}


def batch_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two rows that both kinds of model can learn."""
    ids, labels = (CHAT_IDS, CHAT_LABELS) if model.config.model_type == "chatglm" else (IDS, LABELS)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def train(model: PreTrainedModel, *, rate: float = 0.02, steps: int = STEPS) -> list[float]:
    """Fits what trains to the two rows; returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    schedule = RankSchedule.of(model, steps=steps)
    losses = []
    model.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model(**batch_of(model)).loss
        losses.append(float(loss.detach()))
        if schedule is not None:
            loss = loss + schedule.penalty()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.update(step)
    model.eval()
    return losses


def tune(model: PreTrainedModel, name: str) -> list[float]:
    """Applies one of `METHODS` to a model and trains it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        apply_method(model, METHODS[name], steps=STEPS)
        return train(model, rate=RATES.get(name, 0.02))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """Logits of the two rows, 0 at padding."""
    inputs = batch_of(model)
    del inputs["labels"]
    logits: Tensor = model(**inputs).logits
    return logits * inputs["attention_mask"][..., None]
