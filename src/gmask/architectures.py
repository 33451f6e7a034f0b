"""The architectures GLM and ChatGLM: classes, tokenizers, special ids; and other models with the same ``model_type``.

This is plain data: registration needs it before torch is loaded.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmask.errors import GmaskError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model; a new kind is a new row of `ARCHITECTURES`."""

    home: str  # the module of its config, its body and its language model
    heads: str  # the module of its other classes
    config_name: str
    model_type: str  # of the configs that we save
    classes: tuple[str, ...]  # first the language model, which is the default of a config
    body: str  # the class without a head; published configs may name it
    auto_classes: Mapping[str, tuple[str, ...]]  # for each Auto class of transformers: the default, and others by name
    tokenizer_home: str
    tokenizers: Mapping[str, str | None]  # the kind of vocabulary by the tokenizer class of a published folder
    special_ids: tuple[str, ...]  # those that a published config may leave out
    prompt_ids: tuple[str, ...]  # those that its prompts end with, and that its tokenizer must therefore agree on
    embedding: str  # the bare name of its word embedding

    @property
    def config_class(self) -> Any:
        return getattr(importlib.import_module(self.home), self.config_name)

    def module_of(self, name: str) -> str:
        """Returns the module of one of its classes."""
        return self.home if name in (self.classes[0], self.body) else self.heads

    def find_class(self, name: str | None) -> Any:
        """Returns the class of a name; without a name the language model."""
        name = name or self.classes[0]
        return getattr(importlib.import_module(self.module_of(name)), name)


GLM = Architecture(
    home="gmask.models.glm",
    heads="gmask.models.glm_heads",
    config_name="GLMConfig",
    model_type="glm_blank",
    classes=(
        "GLMForConditionalGeneration",
        "GLMForMultipleChoice",
        "GLMForSequenceClassification",
        "GLMForMultiTokenCloze",
        "GLMForSingleTokenCloze",
        "GLMForReward",
    ),
    body="GLMModel",
    auto_classes={
        "AutoModel": ("GLMModel",),
        "AutoModelForCausalLM": ("GLMForConditionalGeneration",),
        "AutoModelForSeq2SeqLM": ("GLMForConditionalGeneration",),
        "AutoModelForMultipleChoice": ("GLMForMultipleChoice",),
        "AutoModelForSequenceClassification": ("GLMForSequenceClassification", "GLMForReward"),
    },
    tokenizer_home="gmask.tokenizers.glm",
    tokenizers={
        "GLMChineseTokenizer": "chinese",
        "GLMGPT2Tokenizer": "gpt2",
        "GLMBertTokenizer": "bert",
        "GLMRobertaTokenizer": "roberta",
        "GLMTokenizer": None,
    },
    special_ids=("pad_token_id", "eos_token_id", "sop_token_id", "eop_token_id", "mask_token_id", "smask_token_id",
                 "gmask_token_id"),
    prompt_ids=("sop_token_id", "eop_token_id"),
    embedding="word_embeddings.weight",
)  # fmt: skip

CHATGLM = Architecture(
    home="gmask.models.chatglm",
    heads="gmask.models.chatglm",
    config_name="ChatGLMConfig",
    model_type="chatglm",
    classes=("ChatGLMForConditionalGeneration", "ChatGLMForReward"),
    body="ChatGLMModel",
    auto_classes={
        **dict.fromkeys(
            ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),  # with its head, as published
            ("ChatGLMForConditionalGeneration",),
        ),
        "AutoModelForSequenceClassification": ("ChatGLMForReward",),
    },
    tokenizer_home="gmask.tokenizers.chatglm",
    tokenizers={"ChatGLMTokenizer": "chatglm", "ChatGLMTokenizerV0": "chatglm"},
    special_ids=("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id"),
    prompt_ids=("bos_token_id", "gmask_token_id"),
    embedding="transformer.word_embeddings.weight",
)

ARCHITECTURES = (GLM, CHATGLM)


@dataclass(frozen=True, slots=True)
class OtherModel:
    """Another model whose ``model_type`` is that of one of ours."""

    name: str
    remedy: str
    keys: frozenset[str] = frozenset()  # that its configs have, and ours do not

    def refusal(self, evidence: str) -> GmaskError:
        """Returns the error for ``evidence`` of this model, such as a key of its config."""
        return GmaskError(f"{evidence} belongs to {self.name}, not to a first-generation GLM; {self.remedy}")


LATER_CHATGLM = OtherModel(
    "ChatGLM2, ChatGLM3 or GLM-4-9B",
    "load it with transformers and its own code: gmask.registration.unregister(), then AutoModel.from_pretrained with "
    "trust_remote_code=True",
    frozenset({"multi_query_attention", "padded_vocab_size", "rmsnorm"}),
)
VISUALGLM = OtherModel(
    "VisualGLM, which reads images too",
    "use github.com/THUDM/VisualGLM-6B",
    frozenset({"eva_config", "qformer_config", "image_length"}),
)
GLM4 = OtherModel("GLM-4 or later", "load it with transformers (AutoModelForCausalLM.from_pretrained)")


def refuse_other_chatglm(values: Mapping[str, Any], source: str = "") -> None:
    """Raises `GmaskError` for a config of ``model_type`` chatglm that belongs to another model.

    Args:
        values: of the config.
        source: the start of the message, such as ``"FOLDER/config.json: "``.
    """
    if later := LATER_CHATGLM.keys & values.keys():
        raise LATER_CHATGLM.refusal(f"{source}{min(later)}")
    images = {key for key in VISUALGLM.keys & values.keys() if values[key] not in (None, 0)}
    images |= {name for name in _named_classes(values) if "WithImage" in name}
    if images:
        raise VISUALGLM.refusal(f"{source}{min(images)}")


def is_glm(values: Mapping[str, Any]) -> bool:
    """Returns True if a config belongs to a first-generation GLM, which shares its ``model_type`` with GLM-4."""
    has_name = not {*GLM.classes, GLM.body}.isdisjoint(_named_classes(values))
    return values.get("model_type") == GLM.model_type or "block_position_encoding" in values or has_name


def find_architecture(values: Mapping[str, Any], source: Path | str) -> Architecture:
    """Returns the architecture of the values of a config.

    Args:
        values: of the config.
        source: its file or folder, for messages.

    Raises:
        GmaskError: it is another model; the message names it and the software that loads it.
    """
    kind = values.get("model_type")
    if kind == CHATGLM.model_type:
        refuse_other_chatglm(values, f"{source}: ")
        return CHATGLM
    if is_glm(values):
        return GLM
    if isinstance(kind, str) and kind.startswith("glm"):
        raise GLM4.refusal(f"{source}: model_type {kind!r} without block_position_encoding")
    raise GmaskError(f"{source}: model_type {kind!r} is not a first-generation GLM")


def architecture_of(config: "PreTrainedConfig") -> Architecture:
    """Returns the architecture of a config of ours."""
    return next(row for row in ARCHITECTURES if isinstance(config, row.config_class))


def class_of(config: "PreTrainedConfig") -> Any:
    """Returns the class that a config of ours names; the language model if it names none."""
    return architecture_of(config).find_class((config.architectures or [None])[0])


def find_class_name(values: Mapping[str, Any], source: Path | str) -> str:
    """Returns the name of the class of a config. The bare body, which most published configs name, means the language
    model.

    Arguments and errors as of `find_architecture`; also for an unknown class.
    """
    architecture, classes = find_architecture(values, source), _named_classes(values)
    unknown = [name for name in classes if name not in (*architecture.classes, architecture.body)]
    if unknown:
        raise GmaskError(
            f"{source}: the architecture {unknown[0]} is not known; there are {', '.join(architecture.classes)}"
        )
    return next((name for name in classes if name in architecture.classes), architecture.classes[0])


def _named_classes(values: Mapping[str, Any]) -> list[str]:
    named = values.get("architectures")
    return [str(name) for name in named] if isinstance(named, list | tuple) else []
