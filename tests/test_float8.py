"""Products in float8: what is converted, and what a machine that cannot do it says. torchao is tried where it is."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gmask.errors import GmaskError
from gmask.recipes.pretraining import load_recipe
from gmask.training import float8, pretrain
from pretraining_data import NO_DROPOUT

FLOAT8 = "optimization.float8=true"


def test_the_linear_layers_of_the_blocks_are_taken(build_glm: Any) -> None:
    model = build_glm(hidden_size=32, num_attention_heads=2)
    taken = {name for name, module in model.named_modules() if float8.takes_float8(module, name)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear - taken == {"lm_head"} and len(taken) == 4 * model.config.num_hidden_layers
    assert not float8.takes_float8(nn.Linear(24, 32), "glm.transformer.layers.0.attention.dense")


@pytest.mark.parametrize(
    ("device", "capability", "message"),
    [
        ("cpu", None, "a GPU of NVIDIA's Hopper or later, and this run is on cpu: leave it out"),
        ("cuda", (8, 0), "and this run is on A100"),
        ("cuda", (9, 0), "needs torchao: pip install torchao"),
    ],
)
def test_a_run_that_cannot_use_it_says_so(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, capability: Any, message: str
) -> None:
    monkeypatch.setattr(pretrain, "find_device", lambda name: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(GmaskError, match=message) as told:
        pretrain.Pretraining(load_recipe(recipe_path, [FLOAT8, f"run.device={device}"]))
    assert "\n" not in str(told.value)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_converted_model_trains(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "check_float8", lambda device: None)
    overrides = [*NO_DROPOUT, "optimization.steps=3", "run.device=cpu"]
    losses = []
    for more in ([], [FLOAT8]):
        training = pretrain.Pretraining(load_recipe(recipe_path, [*overrides, *more]))
        names = [name for name, _ in training.model.named_parameters()]
        data = training.data(0)
        losses.append([training.loop.step(next(data), started=0.0).loss for _ in range(3)])
        kinds = {type(module).__name__ for module in training.model.modules()}
        assert ("Float8Linear" in kinds) == bool(more)
    assert names == [name for name, _ in training.model.named_parameters()]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
