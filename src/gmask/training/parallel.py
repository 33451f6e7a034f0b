"""Processes that divide a model (FSDP2), gather its weights, and meet, so that one that is missing is named.

Every block of the model is divided on its own, the rest as a whole, by torch's `fully_shard`. The weights that train
are float32. In a pass in bfloat16 those of a block are gathered as bfloat16, in which its products take them anyhow;
all others, the residual stream and the sums of gradients over the processes stay float32.

Source: PyTorch, the documentation of `torch.distributed.fsdp.fully_shard`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from gmask.errors import GmaskError


def shard_model(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype, offload: bool = False) -> None:
    """Divides weights, and with them gradients and moments, among all processes, in place.

    Args:
        device: of this process.
        dtype: of a pass.
        offload: whether the shards lie in the host's memory between their uses.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),), mesh_dim_names=("data",))
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    gathered = torch.bfloat16 if dtype == torch.bfloat16 else None
    in_blocks = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    # Divided again after each forward pass, the last part too: a validation has no backward pass that would do it.
    shared: dict[str, Any] = {"mesh": mesh, "offload_policy": policy, "reshard_after_forward": True}
    for block in blocks:
        fully_shard(block, mp_policy=in_blocks, **shared)
    around = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mp_policy=around, **shared)


def is_divided(model: nn.Module) -> bool:
    """Whether the processes hold parts of the model's weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every process has, divided as a parameter is; as it is for a parameter that is whole."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters on the CPU, by name. All processes must call this: divided ones are put together, one by one."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in model.named_parameters()
    }


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within the block every process holds all weights, and may call the model without the other processes.

    All processes must enter it together. A model that is not sharded is left as it is.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


PARTED = re.compile(r"timed? ?out|closed by peer|connection reset|aborted", re.IGNORECASE)
"""In the errors of a collective operation whose other processes do not answer, or have ended."""


class Meeting:
    """Where the processes meet before each step, so that one that does not come is named."""

    def __init__(self, *, timeout: float) -> None:
        """
        Args:
            timeout: seconds to wait for a process.
        """
        self.timeout = timedelta(seconds=timeout)
        self.group: ProcessGroup | None = None
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            self.group = distributed.new_group(backend="gloo", timeout=self.timeout)

    def wait(self, step: int, *, seconds: float | None = None) -> None:
        """Waits for all processes before a step.

        Args:
            seconds: to wait, if not the time-out of the run.

        Raises:
            GmaskError: some did not come.
        """
        if self.group is None:
            return
        timeout = self.timeout if seconds is None else timedelta(seconds=seconds)
        try:
            distributed.monitored_barrier(self.group, timeout=timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise GmaskError(self._describe(step, str(error))) from error

    def explain(self, step: int, error: RuntimeError) -> Any:
        """Raises the error of a step as a `GmaskError` that names the missing process, if that is what it means."""
        if self.group is None or not PARTED.search(str(error)):
            raise error
        self.wait(step, seconds=min(10.0, self.timeout.total_seconds()))
        raise GmaskError(self._describe(step, "")) from error

    def _describe(self, step: int, message: str) -> str:
        ranks = re.search(r"[Rr]anks? ([\d, ]+\d|\d)", message) if distributed.get_rank() == 0 else None
        who = (
            f"process {ranks[1].strip()}"
            if ranks
            else "another process"
            if distributed.get_rank() == 0
            else "process 0"
        )
        return (
            f"step {step}: {who} of {distributed.get_world_size()} has ended, or has not answered for "
            f"{self.timeout.total_seconds():.0f} s (run.timeout): see its own messages; the same command goes on from "
            "the last checkpoint"
        )
