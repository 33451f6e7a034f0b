"""How is a model used as a whole whose weights several processes share?"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Every process holds all weights meanwhile, and may call the model as often as it likes without the others.

    All processes must come here together. A model that is not sharded stays as it is.
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
