"""transformers' Auto classes learn of the GLM classes, without losing their own GLM-4.

Nothing is imported for it: the modules that matter are watched, and what they need is done when they have been loaded.
The published configs share their ``model_type``, ``glm``, with GLM-4, so a config class under that name sends each to
its own. ``chatglm`` is shared with ChatGLM2, ChatGLM3 and GLM-4-9B, whose code is remote: as transformers asks for it
only where no class is registered, they are refused with a word on `unregister`. Configs and models from outside
transformers come before a repository's remote code; tokenizers do if they are registered by name, not by config.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from gmask.errors import GmaskError

CONFIGS = "transformers.models.auto.configuration_auto"


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of one architecture that transformers learns of, each behind the name of its module."""

    config: str
    model_type: str  # that of the configs which we save
    models: Mapping[str, tuple[str, str]]  # by Auto class
    tokenizers: Sequence[tuple[str, str]]  # by the names that published folders call them

    @property
    def model_names(self) -> set[str]:
        return {name for _, name in self.models.values()}

    @property
    def modules(self) -> set[str]:
        """Those that its models are in."""
        return {module for module, _ in self.models.values()}


GLM, CHATGLM = "gmask.models.glm", "gmask.models.chatglm"
GLM_HEADS = "gmask.models.glm_heads"
CLASSES = {
    GLM: Classes(
        config="GLMConfig",
        model_type="glm_blank",
        models={
            "AutoModel": (GLM, "GLMModel"),
            "AutoModelForCausalLM": (GLM, "GLMForConditionalGeneration"),
            "AutoModelForSeq2SeqLM": (GLM, "GLMForConditionalGeneration"),
            "AutoModelForMultipleChoice": (GLM_HEADS, "GLMForMultipleChoice"),
            "AutoModelForSequenceClassification": (GLM_HEADS, "GLMForSequenceClassification"),
        },
        tokenizers=[
            ("gmask.tokenizers.glm", name)
            for name in (
                "GLMChineseTokenizer", "GLMGPT2Tokenizer", "GLMBertTokenizer", "GLMRobertaTokenizer", "GLMTokenizer",
            )
        ],
    ),
    CHATGLM: Classes(
        config="ChatGLMConfig",
        model_type="chatglm",
        models=dict.fromkeys(
            ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
            (CHATGLM, "ChatGLMForConditionalGeneration"),
        ),
        tokenizers=[("gmask.tokenizers.chatglm", name) for name in ("ChatGLMTokenizer", "ChatGLMTokenizerV0")],
    ),
}  # fmt: skip
"""By the module of their config. `AutoModel` gives ChatGLM with its head, as published."""


def register() -> None:
    """Makes `transformers.AutoConfig` and its like know the GLMs, now or once they are first imported.

    Called by ``import gmask``; more calls change nothing.
    """
    if any(map(_is_ours, sys.meta_path)):
        return
    watched: dict[str, Callable[[], None]] = {CONFIGS: _register_configs}
    watched |= {home: functools.partial(_register_classes, home) for home in CLASSES}
    for home, classes in CLASSES.items():
        for module in sorted(classes.modules - {home}):
            watched[module] = functools.partial(_register_models, home, module)
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
            for classes in CLASSES.values():
                if _is_ours(configs.get(classes.model_type)):
                    del configs[classes.model_type]
            configs.pop("glm")
            if dispatcher.displaced is not None:
                configs["glm"] = dispatcher.displaced
    for home in CLASSES.keys() & sys.modules.keys():
        _unregister_classes(home)


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


def _is_ours(thing: object) -> bool:
    """Whether a finder or a config class is one of gmask; by name, so that a reloaded module knows its earlier self."""
    kind = thing if isinstance(thing, type) else type(thing)
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


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
            return _config_class(GLM).from_dict(_complete(config_dict, kwargs.get("name_or_path")), **kwargs)

        @classmethod
        def _find_other(cls) -> Any:
            return cls.displaced or importlib.import_module("transformers").GlmConfig

    def stand_in(home: str) -> type[PreTrainedConfig]:
        """What stands for a config class of ours until it is loaded."""

        class OnUse(PreTrainedConfig):
            model_type = CLASSES[home].model_type

            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                return _config_class(home)(*args, **kwargs)

            @classmethod
            def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
                return _config_class(home).from_dict(config_dict, **kwargs)

        return OnUse

    CONFIG_MAPPING.register("glm", GLMDispatch, exist_ok=True)
    for home, classes in CLASSES.items():
        if classes.model_type not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(classes.model_type, stand_in(home))


def _is_published_glm(values: Mapping[str, Any]) -> bool:
    """Whether a config of ``model_type`` glm is one of the first generation, and not GLM-4."""
    named = set(values.get("architectures") or ())
    return "block_position_encoding" in values or bool(named & CLASSES[GLM].model_names)


def _register_classes(home: str) -> None:
    """The classes of an architecture, whose config is here; the Auto classes have been loaded with it."""
    import transformers
    from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

    classes, config_class = CLASSES[home], _config_class(home)
    config_class.complete_published = _complete if home == GLM else _complete_chat
    _strict_loading().check_source = staticmethod(_check_source)
    transformers.AutoConfig.register(classes.model_type, config_class, exist_ok=True)
    _register_models(home, home)
    for module in sorted(classes.modules - {home}):
        importlib.import_module(module)  # registers its own, unless it is what is being imported: then when it is done
    for module, name in classes.tokenizers:
        REGISTERED_TOKENIZER_CLASSES[name] = _find_class(module, name)


def _register_models(home: str, module: str) -> None:
    """The models of an architecture that are in one module, which has been loaded."""
    import transformers

    for auto_name, (place, name) in CLASSES[home].models.items():
        if place != module:
            continue
        model_class = _find_class(module, name)
        getattr(transformers, auto_name).register(_config_class(home), model_class, exist_ok=True)
        if not hasattr(transformers, name):  # where a config's `architectures` are looked up
            setattr(transformers, name, model_class)


def _unregister_classes(home: str) -> None:
    import transformers
    from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

    classes, config_class = CLASSES[home], _config_class(home)
    config_class.complete_published = None
    _strict_loading().check_source = None
    for auto_name, (module, name) in classes.models.items():
        getattr(transformers, auto_name)._model_mapping._extra_content.pop(config_class, None)
        if vars(transformers).get(name) is _find_class(module, name):
            delattr(transformers, name)
    for _, name in classes.tokenizers:
        REGISTERED_TOKENIZER_CLASSES.pop(name, None)


def _find_class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _config_class(home: str) -> Any:
    return getattr(importlib.import_module(home), CLASSES[home].config)


def _strict_loading() -> Any:
    return _find_class("gmask.models.base", "StrictLoadingMixin")


def _check_source(model_class: Any, source: Any, **settings: Any) -> None:
    """Has a folder checked before `from_pretrained` reads it; settings are the keywords of that."""
    from gmask.checkpoints.load import check_pretrained

    folder = None if source is None or settings.get("revision") else _folder_of(str(source))
    if folder is not None:
        check_pretrained(folder, model_class, **settings)


def _complete_chat(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `_complete` for the config of a ChatGLM."""
    from gmask.checkpoints.special_ids import special_ids
    from gmask.checkpoints.zoo import CHATGLM as ARCHITECTURE

    own = {key: value for key, value in values.items() if key != "auto_map"}
    return {**own, **special_ids(None, own, ARCHITECTURE)}


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
    from gmask.checkpoints.hub import find_cached

    return find_cached(source)
