"""The special tokens of GLM's published vocabularies: ids, roles, and what they do to white space beside them."""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken

from gmask.errors import GmaskError

Spacing = Literal["published", "training"]
"""How special tokens treat white space: as in the Hugging Face code, or as in the code of the training."""

AddedIds = Mapping[str, int | str]
"""The ids of special tokens. A number counts from the end of the vocabulary file; a text is the entry of the file that
has the same id."""


def _enumerate(*tokens: str, start: int = 0) -> dict[str, int | str]:
    return {token: start + index for index, token in enumerate(tokens)}


_CHINESE = _enumerate("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]") | _enumerate(
    "<|startofpiece|>", "<|endofpiece|>", start=6
)

_GPT2 = {"<|endoftext|>": "<|endoftext|>"} | _enumerate(
    "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]"
)

_BERT = {token: token for token in ("[PAD]", "[CLS]", "[MASK]", "[UNK]", "[SEP]")} | _enumerate(
    "<|startofpiece|>", "<|endofpiece|>"
)

_ROBERTA = {
    "<|endoftext|>": "</s>", "[SEP]": "</s>", "[CLS]": "<s>", "[MASK]": "<mask>", "[UNK]": "<unk>",
} | _enumerate("<|startofpiece|>", "<|endofpiece|>")  # fmt: skip

TRAINING_TOKENS: Mapping[str, dict[str, int | str]] = {
    "chinese": _CHINESE | {"[sMASK]": 8, "[gMASK]": 9},
    "chinese-nofix": _CHINESE | {"[gMASK]": 7, "[sMASK]": 8},  # GLM-10B-Chinese: [gMASK] has the id of <|endofpiece|>
    "chinese-nofix-dblock": _CHINESE | {"[gMASK]": 7, "[sMASK]": 8, "[dBLOCK]": 9},
    "gpt2": _GPT2,
    "gpt2-dblock": _GPT2 | {"[dBLOCK]": 8},
    "bert": _BERT,
    "bert-taskmask": _BERT | {"[gMASK]": 2, "[sMASK]": 3},
    "roberta": _ROBERTA,
    "roberta-taskmask": _ROBERTA | {"[gMASK]": 2, "[sMASK]": 3},
}
"""The tokens of the training code, by kind of vocabulary and options of the training.

Source: THUDM/GLM data_utils/tokenization.py; ``nofix`` is without ``--fix-command-token``, ``taskmask`` with
``--task-mask`` (always so for the Chinese and GPT-2 vocabularies), ``dblock`` with a ``--block-mask-prob``.
"""

PUBLISHED_TOKENS: Mapping[str, AddedIds] = {
    "chinese": TRAINING_TOKENS["chinese"] | {"[UNK]": "<unk>", "[UNUSED1]": 4, "[UNUSED2]": 5},
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": {token: token for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
    | _enumerate("<|startofpiece|>", "<|endofpiece|>"),
}
"""The tokens of a Hugging Face folder without an ``added_tokens.json``, by kind of vocabulary."""

ORDINARY = frozenset({"[UNUSED1]", "[UNUSED2]"})  # of the tables, but not special
COMMANDS = (
    frozenset(token for table in (*TRAINING_TOKENS.values(), *PUBLISHED_TOKENS.values()) for token in table) - ORDINARY
)
"""Tokens that are always special. Others are special if the ``tokenizer_config.json`` of the folder names them."""

_ROLES = {
    "pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "mask_token": "[MASK]", "unk_token": "[UNK]",
}  # fmt: skip

_BERT_ROLES = _ROLES | {"pad_token": "[PAD]", "eos_token": "[PAD]"}
ROLES: Mapping[tuple[str, Spacing], Mapping[str, str]] = {
    ("chinese", "published"): _ROLES,
    ("chinese", "training"): _ROLES,
    ("gpt2", "published"): _ROLES | {"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    ("gpt2", "training"): _ROLES,
    ("bert", "published"): _BERT_ROLES,
    ("bert", "training"): _BERT_ROLES,
    ("roberta", "published"): {
        "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
        "mask_token": "<mask>", "unk_token": "<unk>",
    },
    ("roberta", "training"): _ROLES,
}  # fmt: skip
"""The tokens of transformers' roles, where the folder's ``tokenizer_config.json`` does not name them."""


@dataclass(frozen=True, slots=True)
class Sides:
    """The sides on which a special token removes white space."""

    left: bool
    right: bool


BOTH, LEFT, NEITHER = Sides(True, True), Sides(True, False), Sides(False, False)


@dataclass(frozen=True, slots=True)
class SpacingRule:
    """How special tokens change the white space of a text, when it is encoded and when ids are decoded."""

    sides: Mapping[str, Sides]  # of single tokens
    others: Sides  # of all other special tokens
    separator: str  # between a special token and the text beside it, when ids are decoded
    separates_all: bool  # all special tokens; else only those that are not in the vocabulary file
    cleans_up: bool  # decoded text loses the spaces before punctuation
    drops_blank_texts: bool  # a text of white space alone has no tokens

    def sides_of(self, token: str) -> Sides:
        return self.sides.get(token, self.others)


class Cutter:
    """Cuts a text at added tokens, where several begin at the longest, and removes white space beside them.

    Args:
        tokens: by their spelling; ``lstrip`` and ``rstrip`` say on which sides, ``single_word`` that a token inside of
            a word is text.
    """

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self.tokens = dict(tokens)
        spellings = sorted(self.tokens, key=len, reverse=True)
        whole = (
            rf"(?<!\w){re.escape(one)}(?!\w)" if self.tokens[one].single_word else re.escape(one) for one in spellings
        )
        self._pattern = re.compile(f"({'|'.join(whole) or '(?!)'})")

    def cut(self, text: str) -> Iterator[tuple[str, bool]]:
        """The parts of a text that are not empty, and whether each is a token."""
        parts = self._pattern.split(text)
        for index in range(1, len(parts), 2):
            token = self.tokens[parts[index]]
            if token.lstrip:
                parts[index - 1] = parts[index - 1].rstrip()
            if token.rstrip:
                parts[index + 1] = parts[index + 1].lstrip()
        return ((part, index % 2 == 1) for index, part in enumerate(parts) if part)


_PUBLISHED = {"separator": " ", "separates_all": False, "cleans_up": True, "drops_blank_texts": False}
_TRAINING = {"separator": "", "separates_all": True, "cleans_up": False, "drops_blank_texts": True}
_MASKS = dict.fromkeys(("[MASK]", "[sMASK]", "[gMASK]"), LEFT)
_NAMED_IN_ROBERTA = dict.fromkeys(("<s>", "<pad>", "</s>", "<unk>"), NEITHER) | {"<mask>": LEFT}
SPACING_RULES: Mapping[tuple[str, Spacing], SpacingRule] = {
    ("chinese", "published"): SpacingRule({}, BOTH, **_PUBLISHED),  # type: ignore[arg-type]
    ("gpt2", "published"): SpacingRule({"<|endoftext|>": NEITHER}, BOTH, **_PUBLISHED),  # type: ignore[arg-type]
    ("bert", "published"): SpacingRule({}, BOTH, **_PUBLISHED),  # type: ignore[arg-type]
    ("roberta", "published"): SpacingRule(_NAMED_IN_ROBERTA, BOTH, **_PUBLISHED),  # type: ignore[arg-type]
    ("chinese", "training"): SpacingRule(_MASKS, NEITHER, **_TRAINING),  # type: ignore[arg-type]
    ("gpt2", "training"): SpacingRule(_MASKS, NEITHER, **_TRAINING),  # type: ignore[arg-type]
    ("bert", "training"): SpacingRule({}, NEITHER, **(_TRAINING | {"separator": " "})),  # type: ignore[arg-type]
    ("roberta", "training"): SpacingRule(_MASKS, NEITHER, **_TRAINING),  # type: ignore[arg-type]
}
"""The rule of each kind of vocabulary.

Source: transformers 4.27.1, ``PreTrainedTokenizer.tokenize`` and ``decode``; THUDM/GLM data_utils/tokenization.py.
"""

GLM_SPELLINGS = {
    "sop_token": "<|startofpiece|>", "eop_token": "<|endofpiece|>", "smask_token": "[sMASK]", "gmask_token": "[gMASK]",
}  # fmt: skip
"""The spellings of roles that transformers does not know."""


def find_token_id(tokenizer: Any, name: str) -> int | None:
    """The id that a tokenizer has by a name such as ``sop_token_id``; None if its vocabulary has no such token."""
    try:
        token_id: int | None = getattr(tokenizer, name, None)
    except NotImplementedError:  # what the published classes raise
        return None
    return token_id


def copy_vocabulary_file(source: Path, target: Path) -> None:
    """Copies a file of the vocabulary into the folder where a tokenizer is saved, unless it is there.

    Raises:
        GmaskError: it is gone.
    """
    if source.resolve() == target.resolve():
        return
    if not source.is_file():
        raise GmaskError(
            f"{source}: gone since the tokenizer was read from it; copy it back there to save the tokenizer"
        )
    shutil.copyfile(source, target)
