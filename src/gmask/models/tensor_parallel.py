"""Tensor parallelism: the weights of a model divided among processes.

Each config has the plan of the body (`base_model_tp_plan`), each model that of its head (`_tp_plan`). Blocks are
divided by heads and by columns of the MLP, the vocabulary by rows (the embeddings and the tied head alike; logits are
gathered); norms and position tables are whole in every process. Quantized weights are divided like the weights that
they replace, scales like the rows or columns that share them (`WeightQuantizer.update_parallel_plan`); quantized
embeddings are whole.

What divides tensors is imported only where torch has it, as in transformers.
"""

from typing import Any

from torch import nn
from transformers.utils import is_torch_distributed_available

from gmask.errors import GmaskError
from gmask.quantization.quantizer import parallel_rule, quantized_layers


def check_processes(heads: int, processes: int) -> None:
    """Raises `GmaskError` if the attention heads cannot be divided evenly among the processes."""
    if heads % processes:
        fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise GmaskError(
            f"{heads} attention heads cannot be divided among {processes} processes: start one of {fitting} processes"
        )


def check_division(model: Any, processes: int) -> None:
    """Raises `GmaskError` if the quantized weights cannot be divided among the processes."""
    for name, layer in quantized_layers(model):
        if not model.hf_quantizer.pre_quantized:
            raise GmaskError(
                "weights are not quantized while they are divided among processes: write them with gmask quantize, and "
                "name that folder"
            )
        together = layer.group_size or 8 // layer.bits  # columns that share a scale or, without groups, a byte
        if model.tp_plan.get(parallel_rule(name)) == "rowwise" and layer.in_features % (together * processes):
            raise GmaskError(
                f"the {layer.in_features} columns of {name} lie in groups of {together}, which cannot be divided among "
                f"{processes} processes: run fewer, or quantize in smaller groups"
            )


if is_torch_distributed_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import PackedColwiseParallel

    class ThirdsColwiseParallel(PackedColwiseParallel):
        """Divides a projection ``q|k|v`` by rows within each third, its bias too: every process has whole heads."""

        def __init__(self) -> None:
            super().__init__(split_factor=3)

        def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
            whole = module._parameters.get(param)
            if whole is None:
                return
            placement = _StridedShard(dim=0, split_factor=self.split_factor)  # transformers leaves the bias out
            module._parameters[param] = nn.Parameter(
                distribute_tensor(whole, mesh, [placement], src_data_rank=None), requires_grad=whole.requires_grad
            )

    ALL_PARALLEL_STYLES.register("colwise_thirds", ThirdsColwiseParallel())
