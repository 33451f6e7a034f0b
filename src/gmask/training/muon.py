"""Muon with its products in float32, for CPUs without instructions for bfloat16.

PyTorch's Muon orthogonalizes the steps of matrices in bfloat16, which such CPUs multiply many times slower than
float32. This one makes the same steps but for the rounding, and keeps the same state, so that a run may go on with
either.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; for the size of the steps Liu et
al. 2025, "Muon is Scalable for LLM Training".
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gmask.hardware import multiplies_in_bfloat16


def make_muon(matrices: Sequence[nn.Parameter], *, learning_rate: float, weight_decay: float) -> torch.optim.Muon:
    """PyTorch's Muon, or `Float32Muon` where the device's instructions make that one faster.

    The steps are scaled to the size of AdamW's, so that both optimizers take one learning rate and one weight decay.
    """
    kind = torch.optim.Muon if multiplies_in_bfloat16(matrices[0].device) else Float32Muon
    return kind(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class Float32Muon(torch.optim.Muon):
    """Muon for float32 matrices, whole or divided by FSDP2, with Nesterov's momentum and AdamW's size of steps."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop has the gradients"
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                update = orthogonalize(
                    matrix.grad.lerp(mean, momentum),
                    coefficients=group["ns_coefficients"],
                    steps=group["ns_steps"],
                    eps=group["eps"],
                )
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * rate)


def orthogonalize(matrix: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Moves the singular values of a matrix ``[m, n]`` towards 1 by the quintic iteration of Newton and Schulz.

    Args:
        coefficients: of the first, the third and the fifth power.
        steps: of the iteration.
        eps: the least norm to divide by.
    """
    first, third, fifth = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]  # the products of rows are to be the smaller ones
    found = matrix.T if is_tall else matrix
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), found, beta=first)
    return found.T if is_tall else found
