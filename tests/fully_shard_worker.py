"""What does one of two processes compute that share the weights of a model? Started by test_fully_shard.py.

    torchrun ... fully_shard_worker.py FOLDER

FOLDER holds `model` and `batch.pt`; what this process computed goes to FOLDER/<rank>.pt.
"""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gmask.models.glm import GLMForConditionalGeneration
from gmask.training.losses import token_loss
from gmask.training.parallel import unsharded
from test_fully_shard import train_one_step


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    model = GLMForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).train()
    mesh = init_device_mesh("cpu", (processes,))
    for layer in model.glm.transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = {name: rows[rank::processes] for name, rows in torch.load(folder / "batch.pt").items()}
    labelled = int((torch.load(folder / "batch.pt")["labels"] != -100).sum())
    loss = train_one_step(model, batch, labelled=labelled, processes=processes)
    total = loss.clone()
    distributed.all_reduce(total)
    weights = {name: value.full_tensor() for name, value in model.named_parameters() if isinstance(value, DTensor)}
    with unsharded(model):
        whole = {name: value.detach().clone() for name, value in model.named_parameters()}
        for _ in range(1 + rank):  # no process waits for the others here
            token_loss(model, batch)
    again = train_one_step(model, batch, labelled=labelled, processes=processes)  # sharded as before
    distributed.all_reduce(again)
    shares = {name: value.to_local().numel() for name, value in model.named_parameters() if isinstance(value, DTensor)}
    torch.save(
        {"loss": total / processes, "weights": weights, "whole": whole, "again": again / processes, "shares": shares},
        folder / f"{rank}.pt",
    )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
