"""With what do the tests of conversions make checkpoints, and compare them?"""

from pathlib import Path
from typing import Any

import torch

from gmask.checkpoints.formats import open_checkpoint, same_bits

GOLDEN = Path(__file__).parent / "golden" / "thudm-glm-tiny"
RANKS = "mp_rank_{:02d}_model_states.pt"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return {key: checkpoint.read(key).clone() for key in checkpoint}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert same_bits(tensor, other[key]), key


def write_checkpoint(folder: Path, weights: dict[str, torch.Tensor], **entries: Any) -> Path:
    (folder / "500").mkdir(parents=True)
    torch.save({"module": weights, "iteration": 500, **entries}, folder / "500" / RANKS.format(0))
    (folder / "latest").write_text("500")
    return folder
