"""Registers our classes with transformers' Auto classes, which still load transformers' own GLM-4.

Nothing is imported for this: an import hook watches a few modules, and registers classes once they are loaded.

The published configs have the ``model_type`` of GLM-4, ``glm``: a dispatching config class under that name decides
between the two. ``chatglm`` is also the type of ChatGLM2, ChatGLM3 and GLM-4-9B, whose code is remote. transformers
uses remote code only for types without a registered class, so these models are refused, with advice to call
`unregister`. Registered configs and models take precedence over a repository's remote code; tokenizers do so if they
are registered by name, not by config.
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

from gmask.architectures import ARCHITECTURES, CHATGLM, GLM, Architecture, find_architecture, is_glm

CONFIGS = "transformers.models.auto.configuration_auto"
TOKENIZERS = "transformers.models.auto.tokenization_auto"


def register() -> None:
    """Registers our classes with `transformers.AutoConfig` and its like, now or when they are first imported.

    ``import gmask`` calls it; further calls change nothing.
    """
    if any(map(_is_ours, sys.meta_path)):
        return
    watched: dict[str, Callable[[], None]] = {CONFIGS: _register_configs, TOKENIZERS: _register_tokenizers}
    for architecture in ARCHITECTURES:
        watched[architecture.heads] = functools.partial(_register_models, architecture, architecture.heads)
        watched[architecture.home] = functools.partial(_register_classes, architecture)  # may be the same module
    sys.meta_path.insert(0, _AfterImport(watched))
    for name, act in watched.items():
        if name in sys.modules:
            importlib.import_module(name)  # waits, if another thread is loading it
            act()


def unregister() -> None:
    """Restores the Auto classes as they were before `register`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]
    if CONFIGS in sys.modules:
        configs = sys.modules[CONFIGS].CONFIG_MAPPING._extra_content
        dispatcher = configs.get("glm")
        if dispatcher is not None and hasattr(dispatcher, "displaced"):
            for architecture in ARCHITECTURES:
                if _is_ours(configs.get(architecture.model_type)):
                    del configs[architecture.model_type]
            configs.pop("glm")
            if dispatcher.displaced is not None:
                configs["glm"] = dispatcher.displaced
    if TOKENIZERS in sys.modules:
        named = sys.modules[TOKENIZERS].REGISTERED_TOKENIZER_CLASSES
        for name in [name for name, found in named.items() if _is_ours(found)]:
            del named[name]
    for architecture in ARCHITECTURES:
        if architecture.home in sys.modules:
            _unregister_classes(architecture)


class _AfterImport(MetaPathFinder):
    """Runs a function after a module was imported. The other finders do the import."""

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


def _is_ours(thing: object) -> bool:
    """Returns True if a finder or a config class is ours; by name, so that it works after a reload of this module."""
    kind = thing if isinstance(thing, type) else type(thing)
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def _register_configs() -> None:
    """Registers the config classes. Nothing else is imported, since transformers may be in the middle of its import."""
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class GLMDispatch(PreTrainedConfig):
        """The config class of ``glm`` in the mapping. It makes configs of our GLM or of transformers' GLM-4."""

        model_type = "glm"
        displaced = CONFIG_MAPPING._extra_content.get("glm")

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return cls._find_other()(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            if not is_glm(config_dict):
                return cls._find_other().from_dict(config_dict, **kwargs)
            return GLM.config_class.from_dict(_complete_glm(config_dict, kwargs.get("name_or_path")), **kwargs)

        @classmethod
        def _find_other(cls) -> Any:
            return cls.displaced or importlib.import_module("transformers").GlmConfig

    def stand_in(architecture: Architecture) -> type[PreTrainedConfig]:
        """Returns a class that replaces a config class of ours until that is loaded."""

        class OnUse(PreTrainedConfig):
            model_type = architecture.model_type

            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                return architecture.config_class(*args, **kwargs)

            @classmethod
            def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
                return architecture.config_class.from_dict(config_dict, **kwargs)

        return OnUse

    CONFIG_MAPPING.register("glm", GLMDispatch, exist_ok=True)
    for architecture in ARCHITECTURES:
        if architecture.model_type not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(architecture.model_type, stand_in(architecture))


def _register_tokenizers() -> None:
    """The names of the tokenizers, whose folder may have no config; the classes are loaded when one is read."""
    from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

    def stand_in(architecture: Architecture, name: str) -> type:
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            return _find_class(architecture.tokenizer_home, name).from_pretrained(*args, **kwargs)

        return type(name, (), {"from_pretrained": staticmethod(from_pretrained)})

    for architecture in ARCHITECTURES:
        for name in architecture.tokenizers:
            REGISTERED_TOKENIZER_CLASSES.setdefault(name, stand_in(architecture, name))


def _register_classes(architecture: Architecture) -> None:
    """Registers the classes of an architecture, once the module of its config is loaded."""
    import transformers
    from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

    config_class = architecture.config_class
    config_class.complete_published = _complete_glm if architecture is GLM else _complete_chatglm
    _strict_loading().check_source = staticmethod(_check_source)
    transformers.AutoConfig.register(architecture.model_type, config_class, exist_ok=True)
    _register_models(architecture, architecture.home)
    importlib.import_module(architecture.heads)  # its models are registered now or, during its import, when that ends
    for name in architecture.tokenizers:
        REGISTERED_TOKENIZER_CLASSES[name] = _find_class(architecture.tokenizer_home, name)


def _register_models(architecture: Architecture, module: str) -> None:
    """Registers the models of an architecture that are in one loaded module."""
    import transformers

    known = {*dir(transformers)}
    for auto_name, names in architecture.auto_classes.items():
        if architecture.module_of(names[0]) != module:
            continue
        classes = tuple(map(architecture.find_class, names))
        found = (
            classes if len(classes) > 1 else classes[0]
        )  # of several, transformers takes the one that a config names
        getattr(transformers, auto_name).register(architecture.config_class, found, exist_ok=True)
        for name, model_class in zip(names, classes, strict=True):
            if name not in known:  # transformers looks up the `architectures` of a config there
                setattr(transformers, name, model_class)


def _unregister_classes(architecture: Architecture) -> None:
    import transformers

    config_class = architecture.config_class
    config_class.complete_published = None
    _strict_loading().check_source = None
    for auto_name, names in architecture.auto_classes.items():
        getattr(transformers, auto_name)._model_mapping._extra_content.pop(config_class, None)
        for name in names:
            if vars(transformers).get(name) is architecture.find_class(name):
                delattr(transformers, name)


def _find_class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _strict_loading() -> Any:
    return _find_class("gmask.models.base", "StrictLoadingMixin")


def _check_source(model_class: Any, source: Any, **settings: Any) -> None:
    """Checks a folder before `from_pretrained` reads it; ``settings`` are the keywords of that."""
    from gmask.checkpoints.load import check_pretrained

    folder = None if source is None or settings.get("revision") else _folder_of(str(source))
    if folder is not None:
        check_pretrained(folder, model_class, **settings)


def _complete_glm(values: Mapping[str, Any], source: str | None) -> dict[str, Any]:
    """Returns a published config with the special ids that it lacks, and without the keys of remote code.

    ``source``: the folder or hub name that it came from.
    """
    from gmask.checkpoints.special_ids import special_ids

    find_architecture(values, str(source))
    own = {key: value for key, value in values.items() if key not in ("auto_map", "model_type")}
    return {**own, **special_ids(_folder_of(source), {**own, "name_or_path": source})}


def _complete_chatglm(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `_complete_glm`, for the config of a ChatGLM, whose ids are in no file of its folder."""
    from gmask.checkpoints.special_ids import special_ids

    own = {key: value for key, value in values.items() if key != "auto_map"}
    return {**own, **special_ids(None, own, CHATGLM)}


def _folder_of(source: str | None) -> Path | None:
    """Returns the folder ``source``, or the cached folder of this hub name at its default revision; else None."""
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.exists():
        return path if path.is_dir() else path.parent
    from gmask.checkpoints.hub import find_cached

    return find_cached(source)
