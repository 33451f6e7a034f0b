"""How do transformers' Auto classes learn of the GLM classes, without losing their own GLM-4?

Nothing is imported for it: the modules that matter are watched, and what they need is done when they have been loaded.
The published configs share their ``model_type``, ``glm``, with GLM-4, so a config class under that name sends each to
its own. Configs and models from outside transformers come before a repository's remote code; tokenizers do if they are
registered by name, not by config.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from gmask.errors import GmaskError

CONFIGS = "transformers.models.auto.configuration_auto"
CLASSES = "gmask.models.glm"
MODELS = {
    "AutoModel": ("modeling", "GLMModel"),
    "AutoModelForCausalLM": ("modeling", "GLMForConditionalGeneration"),
    "AutoModelForSeq2SeqLM": ("modeling", "GLMForConditionalGeneration"),
    "AutoModelForMultipleChoice": ("heads", "GLMForMultipleChoice"),
    "AutoModelForSequenceClassification": ("heads", "GLMForSequenceClassification"),
}
"""The class for each Auto class, and its module in `CLASSES`."""

TOKENIZERS = ("GLMChineseTokenizer", "GLMGPT2Tokenizer", "GLMBertTokenizer", "GLMRobertaTokenizer", "GLMTokenizer")
"""By the names that published folders call them, in ``tokenization`` of `CLASSES`."""


def register() -> None:
    """Makes `transformers.AutoConfig` and its like know the GLMs, now or once they are first imported.

    Called by ``import gmask``; more calls change nothing.
    """
    if any(map(_is_ours, sys.meta_path)):
        return
    watched = {CONFIGS: _register_configs, CLASSES: _register_classes}
    sys.meta_path.insert(0, _AfterImport(watched))
    for name, act in watched.items():
        if name in sys.modules:
            importlib.import_module(name)  # waits, if another thread is loading it
            act()


def unregister() -> None:
    """Gives the Auto classes back as they were before `register`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]
    if CONFIGS in sys.modules:
        configs = sys.modules[CONFIGS].CONFIG_MAPPING._extra_content
        dispatcher = configs.get("glm")
        if dispatcher is not None and hasattr(dispatcher, "displaced"):
            configs.pop("glm_blank", None)
            configs.pop("glm")
            if dispatcher.displaced is not None:
                configs["glm"] = dispatcher.displaced
    if CLASSES in sys.modules:
        _unregister_classes()


class _AfterImport(MetaPathFinder):
    """Runs a function when a module has been imported. The import itself is that of the other finders."""

    def __init__(self, actions: Mapping[str, Callable[[], None]]) -> None:
        self.actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if not _is_ours(finder))
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            @functools.wraps(execute)
            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.actions[fullname]()

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 - a loader serves one module
        return spec


def _is_ours(finder: object) -> bool:
    return type(finder).__module__ == __name__  # by name, so that a reloaded module knows its earlier self


def _register_configs() -> None:
    """Both names of the config. No other module is imported here, as half of transformers may be loading."""
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class GLMDispatch(PreTrainedConfig):
        """Stands for ``glm`` in the mapping alone; what it makes is a config of either kind."""

        model_type = "glm"
        displaced = CONFIG_MAPPING._extra_content.get("glm")

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return cls._find_other()(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            if not _is_published_glm(config_dict):
                return cls._find_other().from_dict(config_dict, **kwargs)
            return _config_class().from_dict(_complete(config_dict, kwargs.get("name_or_path")), **kwargs)

        @classmethod
        def _find_other(cls) -> Any:
            return cls.displaced or importlib.import_module("transformers").GlmConfig

    class GLMOnUse(PreTrainedConfig):
        """Stands for ``glm_blank`` until the real class is loaded."""

        model_type = "glm_blank"

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _config_class()(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return _config_class().from_dict(config_dict, **kwargs)

    CONFIG_MAPPING.register("glm", GLMDispatch, exist_ok=True)
    if "glm_blank" not in CONFIG_MAPPING:
        CONFIG_MAPPING.register("glm_blank", GLMOnUse)


def _is_published_glm(values: Mapping[str, Any]) -> bool:
    """Whether a config of ``model_type`` glm is one of the first generation, and not GLM-4."""
    ours = {name for _, name in MODELS.values()}
    return "block_position_encoding" in values or not ours.isdisjoint(values.get("architectures") or ())


def _register_classes() -> None:
    """The classes themselves; the Auto classes have been loaded with them."""
    import transformers
    from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

    _config_class().complete_published = _complete
    transformers.AutoConfig.register("glm_blank", _config_class(), exist_ok=True)
    for auto_name, (home, name) in MODELS.items():
        model_class = getattr(importlib.import_module(f"{CLASSES}.{home}"), name)
        getattr(transformers, auto_name).register(_config_class(), model_class, exist_ok=True)
        if not hasattr(transformers, name):  # where a config's `architectures` are looked up
            setattr(transformers, name, model_class)
    tokenization = importlib.import_module(f"{CLASSES}.tokenization")
    for name in TOKENIZERS:
        REGISTERED_TOKENIZER_CLASSES[name] = getattr(tokenization, name)


def _unregister_classes() -> None:
    import transformers
    from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

    _config_class().complete_published = None
    for auto_name, (home, name) in MODELS.items():
        getattr(transformers, auto_name)._model_mapping._extra_content.pop(_config_class(), None)
        model_class = getattr(importlib.import_module(f"{CLASSES}.{home}"), name)
        if vars(transformers).get(name) is model_class:
            delattr(transformers, name)
    for name in TOKENIZERS:
        REGISTERED_TOKENIZER_CLASSES.pop(name, None)


def _config_class() -> Any:
    return importlib.import_module(CLASSES).GLMConfig


def _complete(values: Mapping[str, Any], source: str | None) -> dict[str, Any]:
    """A published config with the special ids that it lacks, and no word of remote code.

    source: the folder or hub name that it came from.
    """
    from gmask.checkpoints.special_ids import special_ids

    if not _is_published_glm(values):
        raise GmaskError(
            f"{source}: a GLM-4, not a first-generation GLM: load it with transformers.AutoModelForCausalLM"
        )
    own = {key: value for key, value in values.items() if key not in ("auto_map", "model_type")}
    named = {**own, "name_or_path": source}
    return {**own, **special_ids(_folder_of(source), named)}


def _folder_of(source: str | None) -> Path | None:
    """The folder of `source`, or of its default revision in the local cache."""
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.exists():
        return path if path.is_dir() else path.parent
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(source), "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None
