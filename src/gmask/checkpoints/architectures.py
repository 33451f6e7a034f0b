"""Is a config that of a GLM of the first generation, of which architecture and of which class?"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from gmask.errors import GmaskError

LANGUAGE_MODEL = "GLMForConditionalGeneration"
CLASSES = (
    LANGUAGE_MODEL,
    "GLMForMultipleChoice",
    "GLMForSequenceClassification",
    "GLMForMultiTokenCloze",
    "GLMForSingleTokenCloze",
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What reading a folder has to know of a kind of model: a new kind is a new row of `ARCHITECTURES`."""

    home: str  # the module of its classes
    config_name: str
    classes: tuple[str, ...]  # first the language model, which a config means unless it names another
    body: str  # what published configs name, too
    special_ids: tuple[str, ...]  # those that a published config may leave out
    prompt_ids: tuple[str, ...]  # those that its prompts end with, and that its tokenizer must therefore agree on
    embedding: str  # the bare name of its word embedding

    @property
    def config_class(self) -> Any:
        return getattr(importlib.import_module(self.home), self.config_name)

    def find_class(self, name: str | None) -> Any:
        """The class of a name; the language model without one."""
        return getattr(importlib.import_module(self.home), name or self.classes[0])


GLM = Architecture(
    home="gmask.models.glm",
    config_name="GLMConfig",
    classes=CLASSES,
    body="GLMModel",
    special_ids=("pad_token_id", "eos_token_id", "sop_token_id", "eop_token_id", "mask_token_id", "smask_token_id",
                 "gmask_token_id"),
    prompt_ids=("sop_token_id", "eop_token_id"),
    embedding="word_embeddings.weight",
)  # fmt: skip
CHATGLM = Architecture(
    home="gmask.models.chatglm",
    config_name="ChatGLMConfig",
    classes=("ChatGLMForConditionalGeneration",),
    body="ChatGLMModel",
    special_ids=("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id"),
    prompt_ids=("bos_token_id", "gmask_token_id"),
    embedding="transformer.word_embeddings.weight",
)
ARCHITECTURES = (GLM, CHATGLM)


def find_architecture(values: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture that a config is of.

    Args:
        values: of the config.
        path: of its file, for messages.

    Raises:
        GmaskError: none of ours; which one, and what reads it.
    """
    kind, classes = values.get("model_type"), _named_classes(values)
    if kind == "chatglm":
        if _names_later_settings(values) or any("WithImage" in name for name in classes):
            raise GmaskError(f"{path}: {_name_other(values)}")
        return CHATGLM
    if kind == "glm_blank" or "block_position_encoding" in values or {*GLM.classes, GLM.body} & set(classes):
        return GLM
    raise GmaskError(f"{path}: {_name_other(values)}")


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture that a config of ours is of."""
    return next(row for row in ARCHITECTURES if isinstance(config, row.config_class))


def class_of(config: PreTrainedConfig) -> Any:
    """The class that a config of ours names; the language model if it names none."""
    return architecture_of(config).find_class((config.architectures or [None])[0])


def find_class_name(values: Mapping[str, Any], path: Path) -> str:
    """The name of the class that a config is for; the bare body, as most published configs say, is a language model.

    Arguments and errors as of `find_architecture`; also an unknown class.
    """
    architecture, classes = find_architecture(values, path), _named_classes(values)
    unknown = [name for name in classes if name not in (*architecture.classes, architecture.body)]
    if unknown:
        raise GmaskError(
            f"{path}: the architecture {unknown[0]} is not known; there are {', '.join(architecture.classes)}"
        )
    return next((name for name in classes if name in architecture.classes), architecture.classes[0])


def _named_classes(values: Mapping[str, Any]) -> list[str]:
    named = values.get("architectures")
    return [str(name) for name in named] if isinstance(named, list | tuple) else []


def _name_other(values: Mapping[str, Any]) -> str:
    kind = values.get("model_type")
    if kind == "chatglm" and _names_later_settings(values):
        return (
            "is ChatGLM2, ChatGLM3 or GLM-4-9B, not a first-generation GLM; load it with transformers and its own code "
            "(gmask.registration.unregister(), then AutoModel.from_pretrained with trust_remote_code=True)"
        )
    if kind == "chatglm":
        return "is VisualGLM, which reads images too and which gmask does not run; use github.com/THUDM/VisualGLM-6B"
    if isinstance(kind, str) and kind.startswith("glm"):
        return (
            f"model_type {kind!r} without block_position_encoding is GLM-4 or later, not a first-generation GLM; "
            "load it with transformers (AutoModelForCausalLM.from_pretrained)"
        )
    return f"model_type {kind!r} is not a first-generation GLM"


def _names_later_settings(values: Mapping[str, Any]) -> bool:
    from gmask.models.chatglm.configuration import LATER_GENERATIONS  # which reading a GLM's config need not load

    return not LATER_GENERATIONS.isdisjoint(values)
