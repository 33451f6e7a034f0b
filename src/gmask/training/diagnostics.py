"""What a run watches: spikes of its loss, the norms of each layer, how much of the device it uses."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gmask.estimation.pretraining import forward_flops
from gmask.models.glm import GLMConfig

LAYER = re.compile(r"\.layers\.(\d+)\.")
SKIPS_IN_A_ROW = 16
"""Steps skipped one after the other, behind which a run ends: the loss has not leapt, it stays where it is."""


@dataclass(frozen=True, slots=True)
class SpikeGuard:
    """Says whether a loss is a spike: more than ``factor`` times the median of the last ``window`` losses."""

    factor: float
    window: int
    stops: bool = False  # whether the run ends at a spike; else it skips the step

    def is_spike(self, loss: float, recent: Sequence[float]) -> bool:
        """Returns False as long as there are fewer losses than the window takes."""
        return len(recent) >= self.window and loss > self.factor * statistics.median(recent[-self.window :])


def layer_norms(model: nn.Module) -> dict[str, dict[str, float]]:
    """The norms of gradients and weights of each layer, and of all other parameters together.

    Divided parameters are measured as a whole; all processes must call this together.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer = LAYER.search(name)
        groups.setdefault(f"layer {int(layer[1]):03d}" if layer else "others", []).append(parameter)
    return {
        name: {
            "gradient_norm": _norm([p.grad for p in parameters if p.grad is not None]),
            "weight_norm": _norm(parameters),
        }
        for name, parameters in groups.items()
    }


def _norm(tensors: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(tensor.detach().float()) for tensor in tensors]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return float(torch.linalg.vector_norm(torch.stack(whole))) if whole else 0.0


def training_flops(config: GLMConfig, *, tokens: int, labelled: int, row_length: int) -> float:
    """The operations of a step: three times those of its forward pass, without what checkpointing computes again.

    The head runs at labels alone.

    Source: Chowdhery et al. 2022, "PaLM", appendix B.
    """
    block, head = forward_flops(config, row_length)
    return 3.0 * (tokens * config.num_hidden_layers * block + labelled * head)
