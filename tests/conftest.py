"""Which tiny models and token ids do several test files share?"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from pretraining_data import write_recipe

settings.register_profile("gmask", deadline=None)  # no test asserts a time: the machine may be busy
settings.load_profile("gmask")
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and on a busy machine threads wait for each other

if folder := os.environ.get("GMASK_RECORD_ERRORS"):
    from record import errors

    errors.start(folder)

PAD, MASK, SMASK, GMASK, SOP, EOP = 0, 5, 6, 7, 8, 9
SPECIAL = dict(
    pad_token_id=PAD,
    mask_token_id=MASK,
    smask_token_id=SMASK,
    gmask_token_id=GMASK,
    sop_token_id=SOP,
    eop_token_id=EOP,
)
SHAPE = dict(
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.3,
)
ORDINARY = range(16, 48)  # token ids without a meaning of their own


@pytest.fixture(scope="session")
def build_glm() -> Callable[..., GLMForConditionalGeneration]:
    """Makes a tiny GLM with random weights, equal for equal settings, in evaluation mode.

    The weights are large, so that logits are far apart and greedy ids do not hang on rounding.
    """

    def build(*, attn_implementation: str = "sdpa", seed: int = 0, **settings: Any):
        config = GLMConfig(**{**SHAPE, **SPECIAL, **settings})
        config._attn_implementation = attn_implementation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GLMForConditionalGeneration(config).eval()

    return build


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    """The recipe of a tiny pretraining run."""
    return write_recipe(tmp_path)
