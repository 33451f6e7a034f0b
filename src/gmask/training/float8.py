"""The products of the blocks in float8, by torchao, on GPUs of Hopper and later.

Weights stay in the dtype in which they train; torchao scales each of the two factors of a product by its largest
value, and rounds it to float8 (e4m3; gradients e5m2). Head, tables and attention are as before.

Source: torchao, the documentation of `torchao.float8`.
"""

from importlib.util import find_spec

import torch
from torch import nn

from gmask.errors import GmaskError

MULTIPLE = 16
"""Both sides of a weight must be multiples of it, for the kernels."""


def check_float8(device: torch.device) -> None:
    """Raises `GmaskError` unless the device multiplies in float8, and torchao is installed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise GmaskError(
            f"optimization.float8: needs a GPU of NVIDIA's Hopper or later, and this run is on {name}: leave it out"
        )
    if find_spec("torchao") is None:
        raise GmaskError("optimization.float8: needs torchao: pip install torchao, or leave it out")


def multiply_in_float8(model: nn.Module) -> None:
    """Replaces the linear layers of the blocks by torchao's, in place. Names and weights stay as they are."""
    from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found]

    convert_to_float8_training(model, module_filter_fn=takes_float8)


def takes_float8(module: nn.Module, name: str) -> bool:
    """Whether a module of this name is a linear layer of a block whose sides fit."""
    if not isinstance(module, nn.Linear) or ".layers." not in name:
        return False
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
