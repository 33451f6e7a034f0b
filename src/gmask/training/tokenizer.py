"""The training of a tokenizer for gmask's own models: a byte-fallback BPE with GLM's special tokens."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm import tqdm

from gmask.errors import GmaskError
from gmask.files import write_text, written_folder
from gmask.tasks.records import Source, find_files, read_texts

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    "[PAD]", "<|endoftext|>", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "[sMASK]", "[gMASK]",
    "<|startofpiece|>", "<|endofpiece|>", "[dBLOCK]",
    "[UNUSED1]", "[UNUSED2]", "[UNUSED3]", "[UNUSED4]", "[UNUSED5]",
)  # fmt: skip
"""In the order of their ids, from 0."""

TOKEN_ROLES = {
    "pad_token": "[PAD]", "eos_token": "<|endoftext|>", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "unk_token": "[UNK]", "mask_token": "[MASK]",
}  # fmt: skip
GLM_TOKEN_ROLES = {
    "smask_token": "[sMASK]", "gmask_token": "[gMASK]", "sop_token": "<|startofpiece|>",
    "eop_token": "<|endofpiece|>", "dblock_token": "[dBLOCK]",
}  # fmt: skip
"""Roles that transformers does not know; a tokenizer has them as `tokenizer.sop_token_id` and so on."""

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Characters outside the alphabet are spelt in these ordinary tokens. Text such as ``<0x41>`` never becomes one."""

WORD_PATTERN = "|".join(
    (
        r"'(?:[sdmt]|ll|ve|re)(?!\p{L})",  # English endings
        r" ?[[\p{L}\p{M}]&&[^\p{Han}]]+",  # a word takes the space before it
        r"\p{Han}+",  # but Han does not: spaces there are rare, and would double every token
        r" ?\p{N}",  # digits one by one
        r" ?[!-/:-@\[-`{-~]+",  # ASCII punctuation in runs
        r"…+|—+",
        r"[^\s\p{L}\p{M}\p{N}]",  # Chinese and other punctuation, signs and emoji one by one
        r"[\r\n]+",
        r"[^\S\r\n]+(?!\S)",  # a run of spaces, but not the one before a word
        r"\s",
    )
)
MAX_WORD_CHARS = 16
MAX_HAN_CHARS = 4
"""The longest tokens, in all characters and in Han characters. Without the second limit, whole Chinese sayings and book
titles would become single tokens. With 1, the text around a hidden character is tokenised as it would be without the
blank (docs: explanation/small-models)."""


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    alphabet_size: int | None = None,
    max_han_chars: int = MAX_HAN_CHARS,
    progress: bool = False,
) -> Tokenizer:
    """Learns a byte-fallback BPE: decode(encode(x)) == x for every NFC text x without special tokens.

    The vocabulary is the special tokens, the 256 byte tokens, an alphabet and merges. The alphabet is ASCII and the
    `alphabet_size` most frequent other characters (by default at most 5/16 of the vocabulary). A character outside it
    takes as many tokens as UTF-8 takes bytes. No token has more than `max_han_chars` Han characters. The same texts
    give the same tokenizer.

    Raises:
        GmaskError: `vocab_size` has no room for merges, or the texts do not fill it.
    """
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    alphabet, rest = _choose_alphabet(texts, vocab_size * 5 // 16 if alphabet_size is None else alphabet_size)
    room = vocab_size - len(SPECIAL_TOKENS) - len(BYTE_TOKENS) - len(alphabet)
    if room <= 0:
        raise GmaskError(f"a vocabulary of {vocab_size} has no room beside {len(alphabet)} characters")
    spare = 9 / 8 if max_han_chars > 1 else 3  # most merges of Chinese text are of two characters
    tokenizer = _new_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + int(spare * room),  # more than needed: long Han tokens are dropped below
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=MAX_WORD_CHARS,
        show_progress=progress,
    )
    # A rare character becomes a line end: left in, the trainer would drop it and join its neighbours.
    table = dict.fromkeys(map(ord, rest), "\n")
    tokenizer.train_from_iterator((text.translate(table) for text in texts), trainer, length=len(texts))
    merges = _choose_merges(json.loads(tokenizer.to_str())["model"]["merges"], room, max_han_chars)
    tokens = dict.fromkeys((*alphabet, *(left + right for left, right in merges)))
    if len(tokens) < len(alphabet) + room:
        found = vocab_size - room + len(tokens) - len(alphabet)
        raise GmaskError(f"the texts give only {found} tokens: ask for fewer (vocab_size) or give more text")
    return _assemble(list(tokens), merges)


def train_from_sources(
    sources: Sequence[Source],
    *,
    vocab_size: int,
    out: Path | str,
    alphabet_size: int | None = None,
    max_han_chars: int = MAX_HAN_CHARS,
    sample_bytes: int = 45_000_000,
    seed: int = 0,
    max_length: int | None = None,
    skip_bad_lines: bool = False,
    progress: bool = True,
) -> Tokenizer:
    """Learns a tokenizer from a sample of the sources' training texts, and saves it in the folder `out`.

    Args:
        alphabet_size, max_han_chars: as in `train_tokenizer`.
        sample_bytes: UTF-8 bytes to learn from, divided by the sources' weights. They are bytes, not characters,
            because a token holds about 4 bytes in English and in Chinese alike. A source smaller than its share is used
            whole, and the others make up for it.
        skip_bad_lines: leave out lines that cannot be read, and log their number; else the first raises `GmaskError`.

    Raises:
        GmaskError: a file or a line that cannot be read, texts that do not fill the vocabulary, a full disk.
    """
    texts = _sample_sources(sources, sample_bytes, seed=seed, skip_bad_lines=skip_bad_lines, progress=progress)
    tokenizer = train_tokenizer(
        texts, vocab_size=vocab_size, alphabet_size=alphabet_size, max_han_chars=max_han_chars, progress=progress
    )
    save_tokenizer(tokenizer, out, max_length=max_length)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str, *, max_length: int | None = None) -> None:
    """Writes tokenizer.json and tokenizer_config.json, for `transformers.AutoTokenizer`.

    In a folder that is there, each of them is written whole or not at all; a new folder is.

    max_length: the longest input of the model, in tokens; None if it is not known yet.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30) if max_length is None else max_length,  # transformers' own "no limit"
        "model_input_names": ["input_ids", "attention_mask"],
        **TOKEN_ROLES,
        "extra_special_tokens": GLM_TOKEN_ROLES,
    }
    folder = Path(folder)
    texts = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    if folder.is_dir():
        for name, text in texts.items():
            write_text(folder / name, text)
        return
    with written_folder(folder) as draft:
        for name, text in texts.items():
            (draft / name).write_text(text, encoding="utf-8", newline="\n")


def _new_tokenizer(model: models.Model) -> Tokenizer:
    """A tokenizer that splits text before `model` sees it: no token crosses these splits."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    return tokenizer


def _choose_alphabet(texts: Iterable[str], limit: int) -> tuple[list[str], list[str]]:
    """ASCII and the `limit` most frequent other characters, sorted; and the rest. Ties go by code point."""
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    always = {"\t", "\n", *map(chr, range(32, 127))}
    ranked = sorted(counts.keys() - always, key=lambda char: (-counts[char], char))
    return sorted(always | set(ranked[:limit])), ranked[limit:]


def _choose_merges(merges: Sequence[Sequence[str]], room: int, max_han_chars: int) -> list[tuple[str, str]]:
    """The first merges that make `room` tokens, without Han tokens that are too long.

    A token built from one that is left out is longer still, so that no chosen merge needs a token that is missing.
    """
    chosen: list[tuple[str, str]] = []
    made: set[str] = set()
    for left, right in merges:
        token = left + right
        if len(token) > max_han_chars and _is_han(token[-1]):
            continue
        if token not in made and len(made) == room:
            break
        made.add(token)
        chosen.append((left, right))
    return chosen


def _is_han(char: str) -> bool:
    return unicodedata.name(char, "").startswith("CJK ")


def _assemble(learnt: Sequence[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """The finished tokenizer: special tokens, byte tokens, then the `learnt` ones, numbered in this order."""
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *BYTE_TOKENS, *learnt))}
    assert len(vocab) == len(SPECIAL_TOKENS) + len(BYTE_TOKENS) + len(learnt), "text gave a reserved token"
    tokenizer = _new_tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    # The blanks take the spaces at their left, as published: the answer brings its own.
    blanks = ("[MASK]", "[sMASK]", "[gMASK]")
    tokenizer.add_special_tokens(
        [AddedToken(token, lstrip=token in blanks, normalized=False) for token in SPECIAL_TOKENS]
    )
    cls, eos = TOKEN_ROLES["cls_token"], TOKEN_ROLES["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {eos}",
        pair=f"{cls} $A {eos} $B:1 {eos}:1",
        special_tokens=[(token, vocab[token]) for token in (cls, eos)],
    )
    return tokenizer


def _sample_sources(
    sources: Sequence[Source], sample_bytes: int, *, seed: int, skip_bad_lines: bool, progress: bool
) -> list[str]:
    """A random choice of each source's texts, about its share of `sample_bytes`, in the order of the files."""
    bad_lines: list[GmaskError] = []
    files = [find_files(source.train) for source in sources]
    sizes = [
        sum(len(text.encode()) for text in read_texts(paths, on_bad_line=bad_lines.append if skip_bad_lines else None))
        for paths in tqdm(files, "measuring", disable=not progress)
    ]
    if bad_lines:
        logger.warning("%d bad lines skipped, the first: %s", len(bad_lines), bad_lines[0])
    weights = [source.share_of(size) for source, size in zip(sources, sizes, strict=True)]
    quotas = _fill_quotas(sizes, weights, sample_bytes)
    chosen: list[str] = []
    for index, paths in enumerate(tqdm(files, "sampling", disable=not progress)):
        rng = np.random.default_rng([seed, index])
        texts = read_texts(paths, on_bad_line=bad_lines.append if skip_bad_lines else None)
        chosen += [text for text in texts if rng.random() * sizes[index] < quotas[index]]
    return chosen


def _fill_quotas(sizes: Sequence[int], weights: Sequence[float], budget: int) -> list[float]:
    """Divides `budget` by weight. What exceeds the size of a source is divided among the others."""
    quotas = [0.0] * len(sizes)
    open_ = [index for index, size in enumerate(sizes) if size > 0]
    left = float(budget)
    while open_:
        unit = left / sum(weights[index] for index in open_)
        full = [index for index in open_ if weights[index] * unit >= sizes[index]]
        for index in full or open_:
            quotas[index] = min(float(sizes[index]), weights[index] * unit)
        if not full:
            break
        left -= sum(sizes[index] for index in full)
        open_ = [index for index in open_ if index not in full]
    return quotas
