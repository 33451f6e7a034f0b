"""gmask: the first-generation GLM family, which fills in blanks, on today's PyTorch and transformers.

The public names are those that the stub beside this file imports: one list for type checkers and for Python. Each is
imported on first use, so that ``import gmask`` loads neither torch nor transformers. Importing it also registers our
classes with transformers' Auto classes.
"""

import importlib
import re
from pathlib import Path
from typing import Any

from gmask import registration

__version__ = "0.1.0"

_MODULES = {
    name: module
    for module, name in re.findall(
        r"^from (\S+) import (\w+) as \2$", Path(__file__).with_suffix(".pyi").read_text("utf-8"), re.MULTILINE
    )
}

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gmask' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


registration.register()
