"""The table of published models: shapes, tokenizers, special ids, licences.

Its rows are in ``zoo.yaml`` beside this file: a new model is a new row there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A published model: a row of the table."""

    name: str
    hub_names: tuple[str, ...]  # on Hugging Face and ModelScope; the first one is downloaded; () if on neither
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
    """Rows of the word embedding that are copies of others in the Hugging Face form: ``{to: from}``."""
    aliases: tuple[str, ...] = ()  # other names in use, under which no download was found
    archive: str | None = None  # of the original checkpoint, as the README of THUDM/GLM names it
    stored_dtype: str | None = None  # of the weights in the Hugging Face form; None where that is not known

    def memory(self, dtype: str) -> int:
        """Returns the bytes of the weights in ``"float32"``, ``"bfloat16"`` or ``"float16"``, ``"int8"`` or ``"int4"``.

        The four matrices of a layer are quantized, with a scale of two bytes for each of their rows, and the embedding
        if `quantized_embeddings`; the rest is float16.
        """
        if dtype in ITEM_BYTES:
            return ITEM_BYTES[dtype] * self.parameters
        matrices, rows = 12 * self.layers * self.hidden_size**2, 9 * self.layers * self.hidden_size
        if self.quantized_embeddings:
            matrices, rows = matrices + self.vocab_size * self.hidden_size, rows + self.vocab_size
        return 2 * (self.parameters - matrices) + matrices * QUANTIZED_BITS[dtype] // 8 + 2 * rows

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes in which the weights can be loaded; quantized ones only as they are published."""
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
    """Finds a model by its name, hub name or alias, such as ``THUDM/glm-10b``, in any case; None if it is unknown."""
    wanted = name.casefold()
    for family in FAMILIES:
        if wanted in (known.casefold() for known in (family.name, *family.hub_names, *family.aliases)):
            return family
    return None


def families_of_shape(*, layers: int, hidden_size: int, vocab_size: int, positions: int) -> tuple[Family, ...]:
    """Returns the models of this shape, which their weights do not distinguish."""
    shape = (layers, hidden_size, vocab_size, positions)
    return tuple(row for row in FAMILIES if (row.layers, row.hidden_size, row.vocab_size, row.positions) == shape)


def family_of_shape(*, layers: int, hidden_size: int, vocab_size: int, positions: int) -> Family | None:
    """Returns the first model of this shape; None if there is none, or if several differ in heads or tokenizer."""
    found = families_of_shape(layers=layers, hidden_size=hidden_size, vocab_size=vocab_size, positions=positions)
    return found[0] if len({(family.heads, family.tokenizer) for family in found}) == 1 else None
