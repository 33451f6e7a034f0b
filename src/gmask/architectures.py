"""The architectures: their classes, tokenizers and special ids, and the models that share their name and are others.

Plain data, which registration reads before torch is loaded, and models, tokenizers and checkpoints read above it.
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
    classes: tuple[str, ...]  # first the language model, which a config means unless it names another
    body: str  # what published configs name, too
    auto_classes: Mapping[str, str]  # which class each Auto class of transformers gives
    tokenizer_home: str
    tokenizers: Mapping[str, str | None]  # by the names that published folders call them: the kind of vocabulary
    special_ids: tuple[str, ...]  # those that a published config may leave out
    prompt_ids: tuple[str, ...]  # those that its prompts end with, and that its tokenizer must therefore agree on
    embedding: str  # the bare name of its word embedding

    @property
    def config_class(self) -> Any:
        return getattr(importlib.import_module(self.home), self.config_name)

    def module_of(self, name: str) -> str:
        """The module of one of its models."""
        return self.home if name in (self.classes[0], self.body) else self.heads

    def find_class(self, name: str | None) -> Any:
        """The class of a name; the language model without one."""
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
    ),
    body="GLMModel",
    auto_classes={
        "AutoModel": "GLMModel",
        "AutoModelForCausalLM": "GLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "GLMForConditionalGeneration",
        "AutoModelForMultipleChoice": "GLMForMultipleChoice",
        "AutoModelForSequenceClassification": "GLMForSequenceClassification",
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
    classes=("ChatGLMForConditionalGeneration",),
    body="ChatGLMModel",
    auto_classes=dict.fromkeys(
        ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),  # with its head, as published
        "ChatGLMForConditionalGeneration",
    ),
    tokenizer_home="gmask.tokenizers.chatglm",
    tokenizers={"ChatGLMTokenizer": "chatglm", "ChatGLMTokenizerV0": "chatglm"},
    special_ids=("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id"),
    prompt_ids=("bos_token_id", "gmask_token_id"),
    embedding="transformer.word_embeddings.weight",
)

ARCHITECTURES = (GLM, CHATGLM)


@dataclass(frozen=True, slots=True)
class OtherModel:
    """A model that shares its ``model_type`` with one of ours."""

    name: str
    remedy: str
    keys: frozenset[str] = frozenset()  # of its configs, and of no config of ours

    def refusal(self, evidence: str) -> GmaskError:
        """The error for something that is of this model."""
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
    """Raises `GmaskError` for a config of ``model_type`` chatglm that is of another model.

    Args:
        values: of the config.
        source: what comes before the message, such as ``"FOLDER/config.json: "``.
    """
    if later := LATER_CHATGLM.keys & values.keys():
        raise LATER_CHATGLM.refusal(f"{source}{min(later)}")
    images = {key for key in VISUALGLM.keys & values.keys() if values[key] not in (None, 0)}
    images |= {name for name in _named_classes(values) if "WithImage" in name}
    if images:
        raise VISUALGLM.refusal(f"{source}{min(images)}")


def is_glm(values: Mapping[str, Any]) -> bool:
    """Whether a config is of a GLM of the first generation: its ``model_type``, glm, says GLM-4, too."""
    has_name = not {*GLM.classes, GLM.body}.isdisjoint(_named_classes(values))
    return values.get("model_type") == GLM.model_type or "block_position_encoding" in values or has_name


def find_architecture(values: Mapping[str, Any], source: Path | str) -> Architecture:
    """The architecture that a config is of.

    Args:
        values: of the config.
        source: its file or folder, for messages.

    Raises:
        GmaskError: none of ours; which one, and what reads it.
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
    """The architecture that a config of ours is of."""
    return next(row for row in ARCHITECTURES if isinstance(config, row.config_class))


def class_of(config: "PreTrainedConfig") -> Any:
    """The class that a config of ours names; the language model if it names none."""
    return architecture_of(config).find_class((config.architectures or [None])[0])


def find_class_name(values: Mapping[str, Any], source: Path | str) -> str:
    """The name of the class that a config is for; the bare body, as most published configs say, is a language model.

    Arguments and errors as of `find_architecture`; also an unknown class.
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
