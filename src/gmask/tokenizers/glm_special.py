"""The special tokens of each published vocabulary, and the white space that they take from the text beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Spacing = Literal["published", "training"]
"""``published``: as the Hugging Face code did; ``training``: as the code that the models were trained with did."""

Ids = Mapping[str, int | str]
"""By spelling: the distance of an id from the end of the vocabulary file, or the entry of that file it is another name
of."""


def _number(*tokens: str, start: int = 0) -> dict[str, int | str]:
    return {token: start + index for index, token in enumerate(tokens)}


_CHINESE = _number("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]") | _number(
    "<|startofpiece|>", "<|endofpiece|>", start=6
)

_GPT2 = {"<|endoftext|>": "<|endoftext|>"} | _number(
    "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]"
)

_BERT = {token: token for token in ("[PAD]", "[CLS]", "[MASK]", "[UNK]", "[SEP]")} | _number(
    "<|startofpiece|>", "<|endofpiece|>"
)

_ROBERTA = {
    "<|endoftext|>": "</s>", "[SEP]": "</s>", "[CLS]": "<s>", "[MASK]": "<mask>", "[UNK]": "<unk>",
} | _number("<|startofpiece|>", "<|endofpiece|>")  # fmt: skip

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
"""By kind of vocabulary, and how the model was trained.

Source: THUDM/GLM data_utils/tokenization.py; ``nofix`` is without ``--fix-command-token``, ``taskmask`` with
``--task-mask`` (the Chinese and GPT-2 rows always are), ``dblock`` with a ``--block-mask-prob``.
"""

PUBLISHED_TOKENS: Mapping[str, Ids] = {
    "chinese": TRAINING_TOKENS["chinese"] | {"[UNK]": "<unk>", "[UNUSED1]": 4, "[UNUSED2]": 5},
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": {token: token for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
    | _number("<|startofpiece|>", "<|endofpiece|>"),
}
"""By kind of vocabulary, for a folder in the Hugging Face form without an ``added_tokens.json``."""

ORDINARY = frozenset({"[UNUSED1]", "[UNUSED2]"})
COMMANDS = (
    frozenset(token for row in (*TRAINING_TOKENS.values(), *PUBLISHED_TOKENS.values()) for token in row) - ORDINARY
)
"""Tokens that are special whatever a folder says; others are, if its ``tokenizer_config.json`` names them."""

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
"""What transformers calls the tokens, where the folder's ``tokenizer_config.json`` does not say."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Where a special token takes the white space beside it."""

    left: bool
    right: bool


BOTH, LEFT, NEITHER = Sides(True, True), Sides(True, False), Sides(False, False)


@dataclass(frozen=True, slots=True)
class SpacingRule:
    """What special tokens do to the text beside them, and what stands between them and the text when it is decoded."""

    sides: Mapping[str, Sides]  # of the tokens that differ from the others
    others: Sides
    joint: str  # stands around a special token in decoded text
    is_apart: bool  # of every special token; else only of those behind the vocabulary file
    cleans_up: bool  # decoded text loses the spaces before punctuation
    drops_blank_texts: bool  # a text of white space alone has no tokens

    def sides_of(self, token: str) -> Sides:
        return self.sides.get(token, self.others)


_PUBLISHED = {"joint": " ", "is_apart": False, "cleans_up": True, "drops_blank_texts": False}
_TRAINING = {"joint": "", "is_apart": True, "cleans_up": False, "drops_blank_texts": True}
_MASKS = dict.fromkeys(("[MASK]", "[sMASK]", "[gMASK]"), LEFT)
_NAMED_IN_ROBERTA = dict.fromkeys(("<s>", "<pad>", "</s>", "<unk>"), NEITHER) | {"<mask>": LEFT}
SPACING_RULES: Mapping[tuple[str, Spacing], SpacingRule] = {
    ("chinese", "published"): SpacingRule({}, BOTH, **_PUBLISHED),  # type: ignore[arg-type]
    ("gpt2", "published"): SpacingRule({"<|endoftext|>": NEITHER}, BOTH, **_PUBLISHED),  # type: ignore[arg-type]
    ("bert", "published"): SpacingRule({}, BOTH, **_PUBLISHED),  # type: ignore[arg-type]
    ("roberta", "published"): SpacingRule(_NAMED_IN_ROBERTA, BOTH, **_PUBLISHED),  # type: ignore[arg-type]
    ("chinese", "training"): SpacingRule(_MASKS, NEITHER, **_TRAINING),  # type: ignore[arg-type]
    ("gpt2", "training"): SpacingRule(_MASKS, NEITHER, **_TRAINING),  # type: ignore[arg-type]
    ("bert", "training"): SpacingRule({}, NEITHER, **(_TRAINING | {"joint": " "})),  # type: ignore[arg-type]
    ("roberta", "training"): SpacingRule(_MASKS, NEITHER, **_TRAINING),  # type: ignore[arg-type]
}
"""By kind of vocabulary.

Source: transformers 4.27.1, ``PreTrainedTokenizer.tokenize`` and ``decode``; THUDM/GLM data_utils/tokenization.py.
"""
