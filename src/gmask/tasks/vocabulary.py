"""Which ids of a tokenizer does the objective need?"""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.infilling.blanks import BlankTokens
from gmask.infilling.objectives import Mixture
from gmask.infilling.spans import BoolArray, mark_sentence_ends, mark_word_edges
from gmask.models.glm.prompts import find_token_id

SPELLINGS = {
    "mask": "[MASK]", "smask": "[sMASK]", "gmask": "[gMASK]", "sop": "<|startofpiece|>", "eop": "<|endofpiece|>",
    "pad": "[PAD]", "cls": "[CLS]", "eos": "<|endoftext|>", "dblock": "[dBLOCK]",
}  # fmt: skip
"""In the vocabularies that gmask trains; the published ones name their tokens themselves."""


def find_blank_tokens(tokenizer: Tokenizer | PreTrainedTokenizerBase) -> BlankTokens:
    """The ids of the special tokens.

    Where there is no ``[sMASK]`` or ``[gMASK]``, the id is that of ``[MASK]``, as in training without ``--task-mask``.

    Raises:
        GmaskError: a token that the vocabulary lacks.
    """
    if isinstance(tokenizer, Tokenizer):
        ids = {role: tokenizer.token_to_id(spelling) for role, spelling in SPELLINGS.items()}
    else:
        ids = {role: find_token_id(tokenizer, f"{role}_token_id") for role in SPELLINGS}
    ids = {**ids, **{role: ids["mask"] for role in ("smask", "gmask") if ids[role] is None}}
    missing = [SPELLINGS[role] for role, token_id in ids.items() if token_id is None and role != "dblock"]
    if missing:
        raise GmaskError(f"the tokenizer is not a GLM's: it has no {', '.join(missing)}")
    return BlankTokens(**ids)  # type: ignore[arg-type]  # none of them is None but dblock's


def find_sentence_ends(tokenizer: Tokenizer) -> BoolArray:
    """A table [V] of the ids that end a sentence."""
    return mark_sentence_ends(_spell(tokenizer))


def _spell(tokenizer: Tokenizer) -> list[str]:
    """The spelling of every id; "" for the special tokens."""
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = range(tokenizer.get_vocab_size())
    return ["" if token_id in special else tokenizer.id_to_token(token_id) or "" for token_id in ids]


def make_mixture(tokenizer: Tokenizer, objective: Mapping[str, Any]) -> Mixture:
    """The objective of a recipe, for this tokenizer."""
    special, ends = find_blank_tokens(tokenizer), find_sentence_ends(tokenizer)
    words = mark_word_edges(_spell(tokenizer)) if objective.get("whole_words") else None
    return Mixture(special=special, sentence_ends=ends, word_edges=words, **objective)
