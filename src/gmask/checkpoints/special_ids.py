"""Finds the ids of special tokens that the config of a folder lacks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmask.architectures import CHATGLM, GLM, Architecture
from gmask.checkpoints.zoo import FAMILIES, Family, family_of_shape, find_family
from gmask.errors import GmaskError
from gmask.files import MOST_KEYS, read_object, read_text

TOKEN_SPELLINGS = {
    "pad_token_id": ("</s>", "<|endoftext|>", "[PAD]"),  # RoBERTa's vocabulary has <|endoftext|>, but never uses it
    "eos_token_id": ("</s>", "<|endoftext|>", "[PAD]"),
    "sop_token_id": ("<|startofpiece|>",),
    "eop_token_id": ("<|endofpiece|>",),
    "mask_token_id": ("[MASK]", "<mask>"),
    "smask_token_id": ("[sMASK]",),
    "gmask_token_id": ("[gMASK]",),
}
"""The keys of special ids in a config, and the spellings of their tokens in the published vocabularies."""


def special_ids(folder: Path | None, values: Mapping[str, Any], architecture: Architecture = GLM) -> dict[str, int]:
    """Returns the special ids that a config lacks.

    They come from the vocabulary beside the config, in any of the published forms. Ids that it does not have come from
    the table of published models: from the row that the config or the tokenizer names, or the one of the same shape,
    unless that row contradicts the ids that are known. For a ChatGLM they come from the row with its number of tokens.

    Args:
        folder: of the config; None without one.
        values: of ``config.json``.

    Returns:
        Ids by their keys in a config, without those that the config has and those that are not certain.

    Raises:
        GmaskError: a file of the vocabulary that is damaged, or belongs to another model: its ids are beyond
            ``vocab_size``.
    """
    if architecture is CHATGLM:
        return _chat_ids(values)
    stated = {role: values[role] for role in TOKEN_SPELLINGS if isinstance(values.get(role), int)}
    if len(stated) == len(TOKEN_SPELLINGS):
        return {}
    path = None if folder is None else folder / "tokenizer_config.json"
    settings = {} if path is None else read_object(path, required=False, most_keys=MOST_KEYS)
    found = _read_vocabulary(folder, settings) if folder else {}
    _check_range(found, values.get("vocab_size"), folder)
    known = {**found, **stated}
    family = _find_row(values, settings)
    if family and all(known.get(role, token_id) == token_id for role, token_id in family.special_ids.items()):
        known = {**family.special_ids, **known}
    return {role: known[role] for role in TOKEN_SPELLINGS if role in known and values.get(role) is None}


def _chat_ids(values: Mapping[str, Any]) -> dict[str, int]:
    for row in FAMILIES:
        if row.architecture == "chatglm" and row.vocab_size == values.get("vocab_size"):
            ids = {**row.special_ids, "bos_token_id": row.special_ids["sop_token_id"]}
            return {role: ids[role] for role in CHATGLM.special_ids if values.get(role) is None}
    return {}


def _check_range(found: Mapping[str, int], vocab_size: int | None, folder: Path | None) -> None:
    largest = max(found.values(), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise GmaskError(
            f"{folder}: its vocabulary has the id {largest}, but config.json a vocab_size of {vocab_size};"
            " the vocabulary files belong to another model"
        )


def _read_vocabulary(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    ids = _read_added_tokens(folder, settings)
    wanted = {role: _spell(role, settings) for role in TOKEN_SPELLINGS}
    if any(not any(token in ids for token in tokens) for tokens in wanted.values()):  # read large files only if needed
        ids = {**_read_pieces(folder), **ids}
    found = {role: [ids[token] for token in tokens if token in ids] for role, tokens in wanted.items()}
    return {role: token_ids[0] for role, token_ids in found.items() if token_ids}


def _spell(role: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the spellings of a role's token: the one in the tokenizer's settings, else the usual ones."""
    token = settings.get(role.removesuffix("_id"))
    if isinstance(token, Mapping):  # a serialized AddedToken
        token = token.get("content")
    return (token,) if isinstance(token, str) else TOKEN_SPELLINGS[role]


def _read_added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for token_id, token in _mapping(settings.get("added_tokens_decoder")).items():
        if token_id.isdecimal() and isinstance(token, Mapping):
            ids[str(token.get("content"))] = int(token_id)
    for token in read_object(folder / "tokenizer.json", required=False).get("added_tokens") or []:
        ids[token["content"]] = token["id"]
    return ids | _only_ids(read_object(folder / "added_tokens.json", required=False))


def _read_pieces(folder: Path) -> dict[str, int]:
    """Reads the vocabulary of BERT (``vocab.txt``, by line numbers from 0) or of GPT-2 and RoBERTa (``vocab.json``)."""
    vocabulary = folder / "vocab.txt"
    if vocabulary.is_file():
        lines = read_text(vocabulary, keep_ends=True).split("\n")
        return {line.rstrip("\r"): number for number, line in enumerate(lines)}
    return _only_ids(read_object(folder / "vocab.json", required=False))


def _find_row(values: Mapping[str, Any], settings: Mapping[str, Any]) -> Family | None:
    """Finds the published model that a config and the settings of its tokenizer belong to."""
    names = [values.get(key) for key in ("_name_or_path", "name_or_path", "model_name_or_path")]
    for name in (*names, settings.get("name_or_path")):
        family = find_family(name) if isinstance(name, str) else None
        if family and family.vocab_size == values.get("vocab_size"):
            return family
    kind = GLM.tokenizers.get(str(settings.get("tokenizer_class")))
    for family in FAMILIES if kind else ():
        if family.tokenizer == kind and family.vocab_size == values.get("vocab_size"):
            return family
    return _row_of_shape(values)


def _row_of_shape(values: Mapping[str, Any]) -> Family | None:
    shape = {
        "layers": values.get("num_layers", values.get("num_hidden_layers")),
        "hidden_size": values.get("hidden_size"),
        "vocab_size": values.get("vocab_size"),
        "positions": values.get("max_sequence_length", values.get("max_position_embeddings")),
    }
    return family_of_shape(**shape)  # a shape with None fits no row


def _mapping(values: Any) -> dict[str, Any]:
    return values if isinstance(values, dict) else {}


def _only_ids(values: Mapping[str, Any]) -> dict[str, int]:
    return {token: token_id for token, token_id in values.items() if isinstance(token_id, int)}
