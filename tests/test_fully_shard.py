"""A step of a model whose weights two processes share is the step of the whole model."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gmask.infilling.blanks import NOT_SCORED
from gmask.models.glm import GLMForConditionalGeneration
from gmask.training.losses import token_loss

TESTS = Path(__file__).parent
SOP = 8


def train_one_step(model: nn.Module, batch: dict[str, Tensor], *, labelled: int, processes: int = 1) -> Tensor:
    """One step by the mean over the labelled tokens of all processes; returns this process's part of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total, _ = token_loss(model, batch)
    loss = total / labelled * processes  # the processes' gradients are averaged
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def make_batch() -> dict[str, Tensor]:
    """Four rows with two to five labelled tokens each, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    rows, width = [], 14
    for answers in (2, 3, 4, 5):
        ids = torch.randint(16, 48, (6 + answers + 1,), generator=generator)
        ids[5], ids[6] = 7, SOP
        labels = torch.full((width,), NOT_SCORED)
        labels[-answers - 1 : -1] = ids[-answers:]
        labels[-1] = 9
        layout = torch.zeros(2, width, dtype=torch.long)
        layout[0, -len(ids) :] = torch.arange(len(ids)).clamp(max=5)
        layout[1, -answers - 1 :] = torch.arange(1, answers + 2)
        sequence = torch.full((width,), -1)
        sequence[-len(ids) :] = 0
        padded = torch.cat((torch.zeros(width - len(ids), dtype=torch.long), ids))
        rows.append({"input_ids": padded, "labels": labels, "layout": layout, "sequence_ids": sequence})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
def test_a_sharded_step_is_the_step_of_the_whole_model(
    tmp_path: Path, build_glm: Callable[..., GLMForConditionalGeneration]
) -> None:
    no_dropout = {f"{where}_dropout": 0.0 for where in ("embedding", "attention", "hidden")}
    build_glm(initializer_range=0.1, **no_dropout).save_pretrained(tmp_path / "model")
    batch = make_batch()
    torch.save(batch, tmp_path / "batch.pt")
    model = GLMForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    loss = train_one_step(model.train(), batch, labelled=int((batch["labels"] != NOT_SCORED).sum()))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, str(TESTS / "fully_shard_worker.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    whole = dict(model.named_parameters())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert abs(float(found["loss"]) - float(loss)) < 1e-5
        assert found["weights"].keys() == whole.keys()
        assert found["again"] < found["loss"]
        assert all(torch.equal(found["whole"][name], value) for name, value in found["weights"].items())
        for name, value in found["weights"].items():
            assert torch.allclose(value, whole[name], atol=1e-5), name
            assert found["shares"][name] <= (whole[name].numel() + whole[name].shape[-1]) // 2 + 1
    moved = [name for name in whole if not torch.allclose(before[name], whole[name], atol=1e-5)]
    assert len(moved) > len(whole) / 2
