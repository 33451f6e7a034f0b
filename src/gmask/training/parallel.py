"""Processes that divide a model (FSDP2, tensor parallelism), put its weights together, and meet before each step.

Tensor parallelism divides the matrices by the plan of the model, as in inference (models/tensor_parallel.py), and
computes with the parts. FSDP2 divides every block of the model on its own, the rest as a whole, by torch's
`fully_shard`, and gathers them to compute. With both, the parts of the matrices are divided once more, among the
processes that read other rows. The weights that train are float32. In a pass in bfloat16 on a GPU those of a block are
gathered as bfloat16, in which its products take them anyhow; all others, the residual stream and the sums of gradients
over the processes stay float32.

Source: PyTorch, the documentation of `torch.distributed.fsdp.fully_shard`.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from gmask.errors import GmaskError


@dataclass(frozen=True, slots=True)
class Grid:
    """The processes of a run: ``replicas`` groups of ``tensor`` processes each.

    Each group reads rows of its own, which its processes share, and divides the matrices of the model among them. Their
    ranks follow one another.
    """

    processes: int = 1
    rank: int = 0
    tensor: int = 1

    @property
    def replicas(self) -> int:
        return self.processes // self.tensor

    @property
    def replica(self) -> int:
        """The number of this process's group."""
        return self.rank // self.tensor

    def mesh(self, device: torch.device, *, timeout: float) -> DeviceMesh:
        """The mesh ``[data, tensor]`` of the processes, which wait ``timeout`` seconds for each other.

        All of them must call this together.
        """
        mesh = init_device_mesh(device.type, (self.replicas, self.tensor), mesh_dim_names=("data", "tensor"))
        flat = mesh._flatten("processes")  # so that sums over both are taken at once
        for group in (*mesh.get_all_groups(), flat.get_group()):  # which have the time-out of PyTorch, not of the run
            _set_pg_timeout(timedelta(seconds=timeout), group)
        return mesh


def divide_model(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    shard: bool,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool = False,
) -> None:
    """Divides weights, and with them gradients and moments, among the processes, in place.

    Args:
        mesh: of `Grid.mesh`; more than one process along ``tensor`` divide the matrices.
        shard: whether the processes along ``data`` divide what each of them holds, too.
        device: of this process.
        dtype: of a pass.
        offload: whether the shards lie in the host's memory between their uses.
    """
    if mesh["tensor"].size() > 1:
        divide_matrices(model, mesh["tensor"])
    if not shard or mesh["data"].size() == 1:
        return
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    # On a CPU, autocast leaves a norm's weights as they are, and the norm takes none but float32.
    gathered = torch.bfloat16 if dtype == torch.bfloat16 and device.type != "cpu" else None
    in_blocks = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    # Divided again after each forward pass, the last part too: a validation has no backward pass that would do it.
    shared: dict[str, Any] = {"mesh": mesh["data"], "offload_policy": policy, "reshard_after_forward": True}
    for block in blocks:
        fully_shard(block, mp_policy=in_blocks, **shared)
    around = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mp_policy=around, **shared)


def divide_matrices(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Divides the matrices of a model by its plan among the processes of a mesh ``[tensor]``, in place.

    All other parameters become replicated ones of the same mesh, since optimizers and norms take no mixture.
    """
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    plan = model._expand_parallel_plan(model.tp_plan)
    apply_tensor_parallelism(
        model, mesh, {name: plan[name] for name in plan.keys() & names}
    )  # a tied head has no weight
    model.tie_weights()
    whole = ALL_PARALLEL_STYLES["local_params"]
    for module in list(model.modules()):
        own = {name: value for name, value in module._parameters.items() if value is not None}
        kept = {name: value for name, value in own.items() if not isinstance(value, DTensor)}
        for name, value in kept.items():
            replicated = DTensor.from_local(value.detach(), mesh, [Replicate()], run_check=False)
            module._parameters[name] = nn.Parameter(replicated, requires_grad=value.requires_grad)
        if kept:
            whole.install_forward(module, mesh)


@torch.no_grad()
def hand_out(whole: nn.Module | None, models: Sequence[PreTrainedModel], *, device: torch.device) -> None:
    """Fills divided models without memory with the weights of a whole one, which the first process has.

    One tensor at a time is sent to all processes, each of which keeps its part. All processes must call this together.

    Args:
        whole: in the first process; None in the others.
        models: on the meta device, of the same shape, and divided alike.
        device: of the parts.
    """
    for model in models:
        model.to_empty(device=device)
        model.tie_weights()
    weights = {} if whole is None else dict(whole.named_parameters())
    filled = [dict(model.named_parameters()) for model in models]
    for name, first in filled[0].items():
        kind = first.device_mesh.device_type if isinstance(first, DTensor) else first.device.type
        tensor = weights[name].to(kind) if weights else torch.empty(first.shape, dtype=first.dtype, device=kind)
        distributed.broadcast(tensor, src=0)
        for parameters in filled:
            parameters[name].copy_(placed_like(tensor, parameters[name]))


def is_divided(model: nn.Module) -> bool:
    """Whether the processes hold parts of the model's weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def pieces(tensor: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """The pieces of a tensor that this process holds, and where each begins in the whole one; they are views.

    There are several where a projection is divided within its thirds.
    """
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.ndim, tensor)]
    local = tensor.to_local()
    if not local.numel():
        return []
    indices = _indices(tensor)
    rows = indices[0]
    cuts = [0, *((rows[1:] - rows[:-1] != 1).nonzero().flatten() + 1).tolist(), len(rows)]
    rest = [int(index[0]) for index in indices[1:]]
    return [((int(rows[start]), *rest), local[start:end]) for start, end in pairwise(cuts)]


def _indices(tensor: DTensor) -> list[Tensor]:
    """For each dimension the indices in the whole tensor of what this process holds.

    The matrices are divided first, and FSDP2 divides the parts: so the last dimension of the mesh is applied first. The
    placements that FSDP2 notes do not say this of a tensor that is divided within its thirds.
    """
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    assert place is not None, "every process is in the mesh"
    indices = [torch.arange(size) for size in tensor.shape]
    for number in reversed(range(mesh.ndim)):
        placement: Any = tensor.placements[number]  # the dimension of a shard is no attribute of its base class
        if isinstance(placement, Replicate):
            continue
        is_tensor_parallel = number == mesh.ndim - 1
        thirds = placement.split_factor if isinstance(placement, _StridedShard) and is_tensor_parallel else 1
        index, own = indices[placement.dim], slice(place[number], place[number] + 1)
        found = [one for part in index.chunk(thirds) for one in part.chunk(mesh.size(number))[own]]
        indices[placement.dim] = torch.cat([index[:0], *found])
    return indices


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every process has, divided as a parameter is; as it is for a parameter that is whole."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = parameter.device_mesh
    for dimension, index in enumerate(_indices(parameter)):
        tensor = tensor.index_select(dimension, index.to(tensor.device))
    return DTensor.from_local(
        tensor.to(mesh.device_type),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def put_together(tensor: Tensor) -> Tensor:
    """A divided tensor as a whole, in every process. All of them must call this together."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    found = torch.zeros(tensor.shape, dtype=tensor.dtype, device=mesh.device_type)
    place = mesh.get_coordinate()
    assert place is not None, "every process is in the mesh"
    copies = [place[number] for number, one in enumerate(tensor.placements) if isinstance(one, Replicate)]
    if not any(copies):  # of several copies one counts
        for start, piece in pieces(tensor):
            found[tuple(slice(at, at + size) for at, size in zip(start, piece.shape, strict=True))] = piece
    distributed.all_reduce(found)
    return found


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters on the CPU, by name. All processes must call this: divided ones are put together, one by one."""
    return {name: put_together(value.detach()).cpu() for name, value in model.named_parameters()}


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
        ranks = re.search(r"(\d[\d, ]*) failed to pass", message) if distributed.get_rank() == 0 else None
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
