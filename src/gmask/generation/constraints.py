"""Constrained decoding: answers that are one of several texts, match a regex or fit a JSON schema.

llguidance computes which tokens may come next. Among the maintained libraries it takes any table of token bytes
(xgrammar does too, but needs Triton and TVM), builds nothing beforehand (outlines-core makes an automaton over the
vocabulary for each pattern), has no dependencies, and is used by vLLM, SGLang and llama.cpp. It comes with the extra
``serve``.

A constraint ignores one leading space of the answer: in GPT-2's vocabulary and in ours a word brings its own space, and
the decoders of SentencePiece and WordPiece drop it. Every sequence of tokens that spells a text which fits may be
chosen, not only the one that the tokenizer would give.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.files import check_text
from gmask.tokenizers.bytes import read_spelling

if TYPE_CHECKING:
    from llguidance import LLMatcher

JSON_WHITE_SPACE = r" |\n {0,16}"
"""Between the parts of a JSON text. It is bounded, since a model may otherwise write white space for ever."""

RESERVED_TAIL = 16
"""Last characters of an answer in which a reserved text may have begun; the longest one is ``<|blank_80|>``."""


class ConstraintError(GmaskError):
    """An answer that cannot go on as it was asked for."""


class TokenMask(Protocol):
    """The state of a constraint for one answer that is being written."""

    def allowed(self) -> Tensor:
        """Returns which tokens may come next: bool ``[V]`` on the CPU, all False if the answer can only end.

        End tokens are never among them: the caller allows them if `is_complete` returns True.

        Raises:
            ConstraintError: the answer can neither go on nor end.
        """

    def accept(self, token_id: int) -> None:
        """Moves on by a token that `allowed` permitted."""

    def is_complete(self) -> bool:
        """Returns True if the answer may end here."""


class Constraint(Protocol):
    """A condition on the text of answers; one object serves many answers."""

    def start(self) -> TokenMask:
        """Returns the state before the first token of an answer."""


def choices(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, vocabulary_size: int | None = None
) -> Constraint:
    """Returns the constraint that the answer is one of the texts.

    Args:
        tokenizer: of any model that gmask loads.
        texts: as they are to be written. An uncased vocabulary has no capital letters.
        vocabulary_size: V, the number of scores that the model gives, often more than the tokenizer has ids. The ids
            behind those of the tokenizer are never allowed. The default is the number of the tokenizer's ids.

    Raises:
        GmaskError: no texts, or one that the vocabulary cannot spell; llguidance is not installed.
    """
    table = _find_table(tokenizer)
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise GmaskError(f"choices must be a list of texts that are not empty, not {texts!r}"[:200])
    for text in texts:
        check_text(text, "a choice")
        if not table.spelling.can_spell(text):
            raise GmaskError(f"the vocabulary has no tokens that spell the choice {text!r}: {_advise(tokenizer, text)}")
    pattern = " | ".join(json.dumps(text).replace("\x7f", r"\u007f") for text in dict.fromkeys(texts))
    return _Grammar(table, f"start: TEXT\nTEXT: / ?/ ({pattern})\n", vocabulary_size, name="the list of choices")


def regex(tokenizer: PreTrainedTokenizerBase, pattern: str, *, vocabulary_size: int | None = None) -> Constraint:
    r"""Returns the constraint that the whole answer matches a pattern.

    The syntax is that of Rust's ``regex``: no look-around, no back-references; ``\d`` is 0 to 9. A pattern that begins
    with a space matches nothing if the decoder drops leading spaces. Other arguments as of `choices`.

    Raises:
        GmaskError: not a valid pattern, or one that no sequence of tokens matches; llguidance is not installed.
    """
    table = _find_table(tokenizer)
    from llguidance import regex_to_lark

    if not isinstance(pattern, str):
        raise GmaskError(f"a regex must be a text, not {pattern!r}"[:200])
    check_text(pattern, "the regex")
    spelling = table.spelling
    rules = {"PATTERN": regex_to_lark(pattern or "(?:)", use_ascii="d"), "SPELLABLE": regex_to_lark(spelling.spellable)}
    text = "PATTERN & SPELLABLE"
    if spelling.reserved:
        rules["RESERVED"] = regex_to_lark(f"(?s:.*)(?:{spelling.reserved})(?s:.*)")
        text += " & ~RESERVED"
    terminals = "".join(f"{name}: /{rule}/\n" for name, rule in rules.items())
    grammar = f"start: TEXT\nTEXT: / ?/ ({text})\n{terminals}"
    return _Grammar(table, grammar, vocabulary_size, name=f"the regex {pattern[:50]!r}")


def json_schema(
    tokenizer: PreTrainedTokenizerBase, schema: Mapping[str, Any], *, vocabulary_size: int | None = None
) -> Constraint:
    """Returns the constraint that the answer is JSON that is valid by a schema.

    There is at most one space or line end between the parts of the JSON. Keywords that cannot be enforced while the
    text is written, such as ``not``, are refused; ``{}`` admits any JSON. A vocabulary without byte tokens may lack the
    letters of a property's name; that becomes known only while the answer is written. Other arguments as of `choices`.

    Raises:
        GmaskError: not a schema, a schema that nothing fits, or a keyword that is not supported; llguidance is not
            installed.
    """
    table = _find_table(tokenizer)
    if not isinstance(schema, Mapping):
        raise GmaskError(f"a JSON schema must be an object, not {schema!r}"[:200])
    settings = {"x-guidance": {"whitespace_pattern": JSON_WHITE_SPACE, "lenient": False}}
    try:
        written = json.dumps({**schema, **settings}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GmaskError(f"the JSON schema is not JSON: {error}") from error
    grammar = f'start: SPACE? value\nSPACE: " "\nvalue: %json {written}\n'
    return _Grammar(table, grammar, vocabulary_size, name="the JSON schema")


class _Vocabulary:
    """A vocabulary in the form that llguidance takes. It would call it only for the tokens of forced text."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)  # an id that no model has: the sampler decides what ends an answer
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        return []  # never used: grammars here are `no_forcing`


class _Table:
    """The vocabulary of a tokenizer for llguidance; it is made once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self.size = len(tokenizer)
        self.spelling = read_spelling(tokenizer)
        self.tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(self.spelling.tokens)))
        tokens = enumerate(self.spelling.tokens)
        # Only these tokens can end a reserved text that other tokens have begun.
        self.closing = [(index, token.decode(errors="replace")) for index, token in tokens if b">" in token]


_tables: WeakKeyDictionary[PreTrainedTokenizerBase, _Table] = WeakKeyDictionary()


def _find_table(tokenizer: PreTrainedTokenizerBase) -> _Table:
    """Returns the table of a tokenizer. It is made at its first use, and again when tokens were added."""
    table = _tables.get(tokenizer)
    if table is None or table.size != len(tokenizer):
        try:
            table = _Table(tokenizer)
        except ModuleNotFoundError as error:
            raise GmaskError("constraints need llguidance: pip install 'gmask[serve]'") from error
        _tables[tokenizer] = table
    return table


def _advise(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    read = tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return f"it reads {read!r}" if read not in ("", text) else "choose another wording"


class _Grammar:
    """A grammar over the bytes of a vocabulary."""

    def __init__(self, table: _Table, grammar: str, vocabulary_size: int | None, *, name: str) -> None:
        from llguidance import LLMatcher

        self.table, self.name = table, name
        self.vocabulary_size = vocabulary_size or len(table.spelling.tokens)
        # Without this option the tokenizer would cut forced text into tokens without knowing where words start and end.
        self.matcher = LLMatcher(table.tokenizer, f'%llguidance {{"no_forcing": true}}\n{grammar}', log_level=0)
        if self.matcher.is_error():
            raise GmaskError(f"{name} is not valid: {_first_reason(self.matcher.get_error())}")
        if self._is_empty():
            raise GmaskError(f"{name} matches nothing that the tokens of this vocabulary can spell")

    def _is_empty(self) -> bool:
        """Whether no answer fits, such as where a schema refers to itself alone; but for the space before it."""
        mask = self.start()
        if mask.is_complete():
            return False
        first = mask._read().nonzero()[:, 0].tolist()
        if len(first) in (1, 2) and {self.table.spelling.tokens[token] for token in first} == {b" "}:
            mask.accept(first[0])
            return not mask.is_complete() and not bool(mask._read().any())
        return not first

    def start(self) -> "_GrammarMask":
        return _GrammarMask(self, self.matcher.deep_copy())


class _GrammarMask:
    """The state of a grammar for one answer."""

    def __init__(self, grammar: _Grammar, matcher: "LLMatcher") -> None:
        self.grammar, self.matcher = grammar, matcher
        self.tail = ""  # the last `RESERVED_TAIL` characters of the answer

    def allowed(self) -> Tensor:
        mask = self._read()
        if not bool(mask.any()) and not self.is_complete():
            raise ConstraintError(f"{self.grammar.name} asks for what the tokens of this vocabulary cannot spell")
        return mask

    def accept(self, token_id: int) -> None:
        accepted = self.matcher.consume_token(token_id)
        assert accepted, f"token {token_id} is not allowed: {self.matcher.get_error()}"
        token = self.grammar.table.spelling.tokens[token_id].decode(errors="replace")
        self.tail = (self.tail + token)[-RESERVED_TAIL:]

    def is_complete(self) -> bool:
        return self.matcher.is_accepting() and not self.matcher.is_error()

    def _read(self) -> Tensor:
        """Returns the mask ``[V]``, which may be empty."""
        spelling = self.grammar.table.spelling
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        error = self.matcher.get_error()
        if error and not error.startswith("NoExtension"):  # NoExtension: no token fits
            raise ConstraintError(f"{self.grammar.name} is too complex: {_first_reason(error)}")
        mask = torch.zeros(self.grammar.vocabulary_size, dtype=torch.bool)
        known = np.unpackbits(bits, count=len(spelling.tokens), bitorder="little").view(bool)
        mask[: len(known)] = torch.from_numpy(known)[: len(mask)]
        if spelling.reserved and "<" in self.tail:
            ends = re.compile(spelling.reserved)
            mask[[index for index, text in self.grammar.table.closing if ends.search(self.tail + text)]] = False
        return mask


def _first_reason(message: str) -> str:
    """Returns the line of a message of llguidance that says what is wrong."""
    if "not present in a registry" in message:
        return "a $ref leads out of it: put what it refers to under $defs"
    if reason := re.search(r"^error: (.*)$", message, re.MULTILINE):
        return reason[1]
    return re.sub(r"^(?:at \d+\(\d+\): |failed to [^:]*: )*", "", message.partition("\n")[0])
