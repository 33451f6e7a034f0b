"""Muon in float32 makes the steps of PyTorch's, which multiplies in bfloat16."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gmask import hardware
from gmask.training import pretrain
from gmask.training.muon import Float32Muon, make_muon
from gmask.training.run_folder import read_metrics
from pretraining_data import NO_DROPOUT

SHAPES = [(48, 16), (16, 48), (24, 24)]
RATE, DECAY, STEPS = 0.02, 0.1, 3


def gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def make_steps(kind: Any) -> list[torch.Tensor]:
    """The matrices after some steps of an optimizer, with gradients that are drawn."""
    matrices = [torch.nn.Parameter(one) for one in gradients(0)]
    optimizer = kind(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    for step in range(STEPS):
        for matrix, gradient in zip(matrices, gradients(1 + step), strict=True):
            matrix.grad = gradient
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def orthogonalized(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The published iteration, on the singular values alone: it changes nothing else."""
    left, values, right = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


def test_the_steps_are_those_of_the_definition() -> None:
    found = make_steps(Float32Muon)
    for index, matrix in enumerate(found):
        expected = gradients(0)[index].double().numpy()
        mean = np.zeros_like(expected)
        for step in range(STEPS):
            gradient = gradients(1 + step)[index].double().numpy()
            mean = 0.95 * mean + 0.05 * gradient
            update = orthogonalized(0.05 * gradient + 0.95 * mean)
            expected = expected * (1 - RATE * DECAY) - RATE * 0.2 * np.sqrt(max(matrix.shape)) * update
        np.testing.assert_allclose(matrix.numpy(), expected, atol=2e-5)


def test_the_steps_are_those_of_torch_but_for_rounding() -> None:
    for ours, theirs, before in zip(make_steps(Float32Muon), make_steps(torch.optim.Muon), gradients(0), strict=True):
        step, other = ours - before, theirs - before
        assert float((step - other).norm()) < 0.02 * float(other.norm())


def test_it_is_chosen_where_the_cpu_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [torch.nn.Parameter(one) for one in gradients(0)]
    for has, kind in ((True, torch.optim.Muon), (False, Float32Muon)):
        monkeypatch.setattr(hardware, "has_bfloat16", lambda device, has=has: has)
        assert type(make_muon(matrices, learning_rate=RATE, weight_decay=DECAY)) is kind


@pytest.mark.parametrize("begins", [True, False], ids=["bfloat16 first", "float32 first"])
def test_a_run_goes_on_with_either(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begins: bool
) -> None:
    muon = [*NO_DROPOUT, "optimization.optimizer=muon", "optimization.dtype=float32", "optimization.schedule=constant"]
    out = recipe_path.parent
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: begins)
    pretrain.run_pretraining(str(recipe_path), [*muon, f"run.out={out / 'whole'}"])
    first = [*muon, f"run.out={out / 'both'}"]
    pretrain.run_pretraining(str(recipe_path), [*first, "optimization.steps=12", "decay.share=0"])
    capsys.readouterr()
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: not begins)
    pretrain.run_pretraining(str(recipe_path), first)
    told = capsys.readouterr().err
    assert re.search(
        r"was made with float32 on \w+(, Muon in float32)?, and this is float32 on .*not bit for bit", told
    )
    assert told.count("Muon in float32") == 1
    whole, both = (
        [record["loss"] for record in read_metrics(out / name / "metrics.jsonl")] for name in ("whole", "both")
    )
    assert both[:12] == whole[:12]
    assert both[12:] == pytest.approx(whole[12:], rel=5e-3)
