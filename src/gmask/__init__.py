"""gmask: the first-generation GLM family, which fills in blanks, on today's PyTorch and transformers.

The public names are imported on first use, so that ``import gmask`` loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmask.errors import GmaskError as GmaskError
    from gmask.generation.answers import Blank as Blank
    from gmask.generation.answers import Infilling as Infilling
    from gmask.generation.answers import Token as Token
    from gmask.generation.infill import infill as infill
    from gmask.generation.streaming import Fragment as Fragment
    from gmask.generation.streaming import stream_infill as stream_infill
    from gmask.loading import load as load
    from gmask.models.glm import GLMConfig as GLMConfig
    from gmask.models.glm import GLMForConditionalGeneration as GLMForConditionalGeneration
    from gmask.models.glm import GLMModel as GLMModel

__version__ = "0.1.0"

_HOMES = {
    "GmaskError": "gmask.errors",
    "Blank": "gmask.generation.answers",
    "Infilling": "gmask.generation.answers",
    "Token": "gmask.generation.answers",
    "infill": "gmask.generation.infill",
    "Fragment": "gmask.generation.streaming",
    "stream_infill": "gmask.generation.streaming",
    "load": "gmask.loading",
    "GLMConfig": "gmask.models.glm",
    "GLMForConditionalGeneration": "gmask.models.glm",
    "GLMModel": "gmask.models.glm",
}

__all__ = [
    "Blank",
    "Fragment",
    "GLMConfig",
    "GLMForConditionalGeneration",
    "GLMModel",
    "GmaskError",
    "Infilling",
    "Token",
    "__version__",
    "infill",
    "load",
    "stream_infill",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gmask' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
