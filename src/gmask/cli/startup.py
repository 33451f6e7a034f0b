"""A quick start: what a first answer does not need is not imported.

A verb that asks a model needs little of transformers and torch. What is for training, compiling and several devices
takes longer to import than all the rest, so `quick_start` leaves it out, in two ways that both are Python's own:

- A `DeferredModule` stands for a module whose import costs much, and knows where to find the few names that are asked
  for. Any other name imports the module, which then takes its place.
- A package that is None in `sys.modules` counts as not installed. transformers does without those in `HIDDEN`, and
  without torch.distributed, if they are not there while it is imported. It stays without them in this process, so only
  verbs that end with their answer start this way.
"""

import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VERSIONS = "5.23."
"""Of transformers, for which the lists below were checked. Other ones are imported as usual."""

HIDDEN = ("accelerate", "scipy", "sklearn")
"""Optional packages that transformers imports if it finds them."""

TRANSFORMERS = {
    **dict.fromkeys(("AutoConfig",), "transformers.models.auto.configuration_auto"),
    **dict.fromkeys(
        (
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoModelForMultipleChoice",
            "AutoModelForSeq2SeqLM",
            "AutoModelForSequenceClassification",
        ),
        "transformers.models.auto.modeling_auto",
    ),
    **dict.fromkeys(("BatchEncoding", "PreTrainedTokenizerBase"), "transformers.tokenization_utils_base"),
    **dict.fromkeys(("Cache", "DynamicCache"), "transformers.cache_utils"),
    "GenerationConfig": "transformers.generation.configuration_utils",
    "GenerationMixin": "transformers.generation.utils",
    **dict.fromkeys(("LogitsProcessor", "LogitsProcessorList"), "transformers.generation.logits_process"),
    "PreTrainedConfig": "transformers.configuration_utils",
    "PreTrainedModel": "transformers.modeling_utils",
    "PreTrainedTokenizer": "transformers.tokenization_python",
    **dict.fromkeys(("StoppingCriteria", "StoppingCriteriaList"), "transformers.generation.stopping_criteria"),
}
"""The modules of names of transformers, whose own `__init__` reads the files of all of its models to know them."""


class DeferredModule(ModuleType):
    """Stands for a module in `sys.modules` until a name is asked for that it does not know.

    Args:
        spec: of the module, which is not loaded.
        homes: the modules of known names.
        values: of known names.
    """

    def __init__(self, spec: ModuleSpec, homes: Mapping[str, str], values: Mapping[str, Any]) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__file__ = spec, spec.origin
        if spec.submodule_search_locations is not None:  # submodules are imported as usual
            self.__path__ = list(spec.submodule_search_locations)
        vars(self).update(values, _homes=homes, _given={*values})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in self._homes:
            return getattr(importlib.import_module(self._homes[name]), name)
        submodule = f"{self.__name__}.{name}"
        if sys.modules.get(self.__name__) is self and hasattr(self, "__path__") and importlib.util.find_spec(submodule):
            return importlib.import_module(submodule)
        return getattr(self._load(), name)

    def _load(self) -> ModuleType:
        """Imports the module, and hands over what others have set here meanwhile."""
        if sys.modules.get(self.__name__) is not self:
            return importlib.import_module(self.__name__)
        del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        parent, _, own = self.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
        known = {*dir(module)}
        for name, value in vars(self).items():
            if not name.startswith("_") and name not in self._given and name not in known:
                setattr(module, name, value)
        return module


def _same(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without, that changes nothing: what it marks is for torch's compiler."""
    return function if function is not None else _same


@contextmanager
def quick_start(wanted: bool = True) -> Iterator[None]:
    """Imports within leave out what a first answer does not need; the model should be loaded within, too.

    Args:
        wanted: False for imports as usual. They are as usual, too, where transformers is there already or has another
            version than those in `VERSIONS`, and in one of several processes.
    """
    if not wanted or "transformers" in sys.modules or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    gc.disable()  # what is imported stays, so looking for garbage among it is for nothing
    try:
        if metadata.version("transformers").startswith(VERSIONS):
            with _left_out():
                yield
        else:
            yield
    finally:
        gc.enable()
        gc.freeze()


@contextmanager
def _left_out() -> Iterator[None]:
    import torch.distributed

    hidden = [name for name in HIDDEN if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    found = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    _defer("transformers", TRANSFORMERS, {"__version__": metadata.version("transformers")})
    _defer("transformers.models")
    _defer("transformers.processing_utils", {"Unpack": "typing"})
    decorators = ("allow_in_graph", "assume_constant_result", "disable")
    compiler = _defer("torch._dynamo", values=dict.fromkeys(decorators, _same))
    if compiler is not None:
        vars(torch)["_dynamo"] = compiler
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        torch.distributed.is_available = found
        if compiler is not None and sys.modules.get("torch._dynamo") is compiler:
            del sys.modules["torch._dynamo"], vars(torch)["_dynamo"]


def _defer(
    name: str, homes: Mapping[str, str] | None = None, values: Mapping[str, Any] | None = None
) -> DeferredModule | None:
    """Puts a `DeferredModule` in the place of a module and returns it; None if that is loaded."""
    if name in sys.modules:
        return None
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    sys.modules[name] = module = DeferredModule(spec, homes or {}, values or {})
    return module
