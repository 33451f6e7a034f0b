"""How is the activation of the feed-forward layers computed?"""

from torch import Tensor
from torch.nn import functional as F

from gmask.native import elementwise as native


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    return native.gelu(x) if native.can_gelu(x) else F.gelu(x, approximate="tanh")
