"""How are the weights of a GLM divided among processes that run it together?

The plans stand beside the config and the classes (`base_model_tp_plan`, `_tp_plan`): blocks are divided by heads and by
columns of the MLP, the vocabulary by rows (the embeddings and the tied head alike; logits are gathered); norms and
position tables are whole in every process. Integers are divided as the weights are that they stand for, scales as the
rows or columns that share them (`WeightQuantizer.update_parallel_plan`); quantized embeddings are whole.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import PackedColwiseParallel


class ThirdsColwiseParallel(PackedColwiseParallel):
    """Divides a fused projection ``q|k|v`` by rows within each third, its bias too: every process has whole heads."""

    def __init__(self) -> None:
        super().__init__(split_factor=3)

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters.get(param)
        if whole is None:
            return
        placement = _StridedShard(dim=0, split_factor=self.split_factor)  # transformers' own divides the bias plainly
        module._parameters[param] = nn.Parameter(
            distribute_tensor(whole, mesh, [placement], src_data_rank=None), requires_grad=whole.requires_grad
        )


ALL_PARALLEL_STYLES.register("colwise_thirds", ThirdsColwiseParallel())
