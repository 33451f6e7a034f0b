"""The bytes that each token of a vocabulary stands for, and the texts that its tokens can spell.

The bytes are those of a token inside a text. The decoders of SentencePiece and WordPiece drop the space of the first
token, so the tokens of a text may spell one space before it. In other vocabularies such a space is part of the text.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.tokenizers.chatglm import WHITE_PIECES, ChatGLMTokenizer, restore_white_space
from gmask.tokenizers.glm import GLMChineseTokenizer

SPACE_MARK = "\u2581"  # SentencePiece's space
ANY = "(?s:.)"
UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 256)}
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the tokens of a vocabulary spell a text, before which there may be one space.

    Both patterns mean the same in Python and in Rust.
    """

    tokens: tuple[bytes, ...]  # by id; empty for special and unknown tokens
    spellable: str  # pattern of the texts that are sequences of tokens
    reserved: str | None = None  # pattern of texts that the decoder replaces, such as <n>

    def can_spell(self, text: str) -> bool:
        """True if a sequence of tokens spells the text."""
        is_reserved = self.reserved is not None and re.search(self.reserved, text)
        return not is_reserved and re.fullmatch(self.spellable, text) is not None


def read_spelling(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """The spelling of a tokenizer; special and added tokens spell nothing.

    Raises:
        GmaskError: an unknown decoder.
    """
    if isinstance(tokenizer, ChatGLMTokenizer):
        texts = _sentencepiece_bytes(tokenizer.pieces, first_id=tokenizer.first_id, restore=restore_white_space)
        tokens = _in_order(texts, tokenizer)
        return Spelling(tokens, _pattern(tokens, drops_space=True), reserved=WHITE_PIECES.pattern)
    if isinstance(tokenizer, GLMChineseTokenizer):
        tokens = _in_order(_sentencepiece_bytes(tokenizer.model), tokenizer)
        return Spelling(tokens, _pattern(tokens, drops_space=True))
    pieces = tokenizer.get_vocab()
    match _decoder(tokenizer):
        case {"type": "ByteLevel"}:
            tokens = _in_order(_byte_level_bytes(pieces), tokenizer)
        case {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}:
            tokens = _in_order({index: _fallback_bytes(piece) for piece, index in pieces.items()}, tokenizer)
        case {"type": "WordPiece", "prefix": str(prefix), "cleanup": False}:
            words = {index: _word_piece_bytes(piece, prefix) for piece, index in pieces.items()}
            tokens = _in_order(words, tokenizer)
            return Spelling(tokens, _word_pattern(tokens))
        case decoder:
            kind = f"decoder {decoder['type']}" if decoder else f"class {type(tokenizer).__name__}"
            raise GmaskError(f"answers cannot be constrained: gmask does not know the bytes of tokens of the {kind}")
    return Spelling(tokens, _pattern(tokens, drops_space=False))


def _in_order(texts: Mapping[int, bytes], tokenizer: PreTrainedTokenizerBase) -> tuple[bytes, ...]:
    silent = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    size = 1 + max(tokenizer.get_vocab().values())  # more than len(tokenizer) where ids are left out
    return tuple(b"" if index in silent else texts.get(index, b"") for index in range(size))


def _decoder(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The settings of the decoder of the `tokenizers` library; empty if the tokenizer has none."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    settings: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {}
    return settings


def _sentencepiece_bytes(
    model: SentencePieceProcessor, *, first_id: int = 0, restore: Callable[[str], str] = str
) -> dict[int, bytes]:
    texts = {}
    for index in range(model.vocab_size()):
        if model.is_control(index) or model.is_unknown(index) or model.is_unused(index):
            continue
        piece = model.id_to_piece(index)
        if model.is_byte(index):
            text = _fallback_bytes(piece)
            texts[first_id + index] = b"" if text == b" " else text  # the decoder does not drop it at the beginning
        else:
            texts[first_id + index] = restore(piece).replace(SPACE_MARK, " ").encode()
    return texts


def _fallback_bytes(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.encode()


def _word_piece_bytes(piece: str, prefix: str) -> bytes:
    return piece.removeprefix(prefix).encode() if piece.startswith(prefix) else f" {piece}".encode()


def _byte_level_bytes(pieces: Mapping[str, int]) -> dict[int, bytes]:
    """The bytes of pieces in GPT-2's alphabet, which has a visible character for each byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}
    return {
        index: bytes(alphabet[letter] for letter in piece)
        for piece, index in pieces.items()
        if alphabet.keys() >= set(piece)
    }


def _pattern(tokens: Iterable[bytes], *, drops_space: bool) -> str:
    """A pattern of texts that tokens spell: any text if every byte is a token, else texts of characters that are."""
    known = set(tokens)
    letters = _single_letters(known)
    if all(bytes([byte]) in known for byte in UTF8_BYTES):
        return f"(?:[^ ]{ANY}*)?" if drops_space else f"{ANY}*"
    every = _one_of(letters)
    return f"(?:{_one_of(letters - {' '})}{every}*)?" if drops_space else f"{every}*"


def _word_pattern(tokens: Iterable[bytes]) -> str:
    """A pattern of texts of the characters that both begin and continue a word, with single spaces between them."""
    known = set(tokens)
    letter = _one_of({letter for letter in _single_letters(known) if f" {letter}".encode() in known})
    return f"(?:{letter}(?: ?{letter})*)?"


def _single_letters(tokens: Iterable[bytes]) -> set[str]:
    texts = (token.decode(errors="ignore") for token in tokens if len(token) <= 4)
    return {text for text in texts if len(text) == 1}


def _one_of(letters: Iterable[str]) -> str:
    """A character class of letters, with neighbours as a range."""
    runs: list[list[int]] = []
    for code in sorted(map(ord, letters)):
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    ranges = (_escape(start) if start == end else f"{_escape(start)}-{_escape(end)}" for start, end in runs)
    return f"[{''.join(ranges)}]"


def _escape(code: int) -> str:
    return f"\\{chr(code)}" if chr(code) in r"\[]^-&~|" else chr(code)
