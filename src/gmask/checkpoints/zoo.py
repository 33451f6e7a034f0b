"""The published models and their architectures: shapes, tokenizers, licences, classes.

The rows are in ``zoo.yaml`` beside this file: a new model is a new row there.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import yaml

from gmask.errors import GmaskError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A published model: a row of the catalog."""

    name: str
    hub_names: tuple[str, ...]  # of Hugging Face and ModelScope, the one to download first; () if on neither
    architecture: Literal["glm", "chatglm"]
    parameters: int  # the output head is the word embedding, and counted once
    language: str
    corpus: str | None
    objectives: tuple[str, ...]  # "token", "sentence", "document"
    layers: int
    hidden_size: int
    heads: int
    positions: int
    vocab_size: int  # rows of the word embedding
    tokenizer: Literal["chinese", "gpt2", "bert", "roberta", "chatglm"]
    masks: tuple[str, ...]  # the blanks that it was trained with
    special_ids: Mapping[str, int]  # by their names in a config
    code_licence: str
    weights_licence: str
    bits: int | None = None  # of quantized weights
    quantized_embeddings: bool = False
    copied_rows: Mapping[int, int] = field(default_factory=dict)
    """Rows of the word embedding that the Hugging Face form took from others of the training checkpoint: {to: from}."""
    aliases: tuple[str, ...] = ()  # other names in use, under which no download was found
    archive: str | None = None  # of the original checkpoint, as the README of THUDM/GLM names it
    stored_dtype: str | None = None  # of the weights in the Hugging Face form; None where that is not known

    def memory(self, dtype: str) -> int:
        """Bytes of the weights in ``"float32"``, ``"bfloat16"`` or ``"float16"``, or as ``"int8"`` or ``"int4"``.

        Quantized are the four matrices of a layer, each row with a scale of two bytes, and the embedding where the row
        says so; the rest is float16.
        """
        if dtype in ITEM_BYTES:
            return ITEM_BYTES[dtype] * self.parameters
        matrices, rows = 12 * self.layers * self.hidden_size**2, 9 * self.layers * self.hidden_size
        if self.quantized_embeddings:
            matrices, rows = matrices + self.vocab_size * self.hidden_size, rows + self.vocab_size
        return 2 * (self.parameters - matrices) + matrices * QUANTIZED_BITS[dtype] // 8 + 2 * rows

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that the weights can be had in: of quantized ones, only the one that they are published in."""
        return (f"int{self.bits}",) if self.bits else tuple(ITEM_BYTES)


def _read_families() -> tuple[Family, ...]:
    rows = yaml.safe_load(Path(__file__).with_name("zoo.yaml").read_text(encoding="utf-8"))["families"]
    return tuple(Family(**{name: _freeze(value) for name, value in row.items()}) for row in rows)


def _freeze(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return MappingProxyType(value) if isinstance(value, dict) else value


FAMILIES = _read_families()


def find_family(name: str) -> Family | None:
    """The row of a name, hub name or alias, such as ``GLM-10B`` or ``THUDM/glm-10b``, in any case; None without one."""
    wanted = name.casefold()
    for family in FAMILIES:
        if wanted in (known.casefold() for known in (family.name, *family.hub_names, *family.aliases)):
            return family
    return None


def families_of_shape(*, layers: int, hidden_size: int, vocab_size: int, positions: int) -> tuple[Family, ...]:
    """The rows of this shape: weights cannot tell them apart."""
    shape = (layers, hidden_size, vocab_size, positions)
    return tuple(row for row in FAMILIES if (row.layers, row.hidden_size, row.vocab_size, row.positions) == shape)


def family_of_shape(*, layers: int, hidden_size: int, vocab_size: int, positions: int) -> Family | None:
    """The first row of this shape; None if there is none, or if such rows differ in heads or tokenizer."""
    found = families_of_shape(layers=layers, hidden_size=hidden_size, vocab_size=vocab_size, positions=positions)
    return found[0] if len({(family.heads, family.tokenizer) for family in found}) == 1 else None


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

    home: str  # the module of its config and language model
    heads: str  # the module of its other classes
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
        name = name or self.classes[0]
        home = self.home if name in (self.classes[0], self.body) else self.heads
        return getattr(importlib.import_module(home), name)


GLM = Architecture(
    home="gmask.models.glm",
    heads="gmask.models.glm_heads",
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
    heads="gmask.models.chatglm",
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


def architecture_of(config: "PreTrainedConfig") -> Architecture:
    """The architecture that a config of ours is of."""
    return next(row for row in ARCHITECTURES if isinstance(config, row.config_class))


def class_of(config: "PreTrainedConfig") -> Any:
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
    from gmask.models.chatglm import LATER_GENERATIONS  # which reading a GLM's config need not load

    return not LATER_GENERATIONS.isdisjoint(values)
