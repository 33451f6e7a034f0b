"""Templates, which make a text of a record."""

import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gmask.errors import GmaskError, nearest

BLANK = re.compile(r"(?<!\\)(\\*)(\[[sg]?MASK\])")
"""A blank with the backslashes before it. An odd number of them makes it plain text, as in `gmask.infill`.

A search begins at the first backslash of a row: one from each of them would take the square of their number.
"""
LIKE_A_BLANK = re.compile(r"(?<!\\)(\\*)(\[(?i:[a-z]*mask)\])")
"""A blank, or what `gmask.infill` refuses because it looks like one."""
MARKED_BLANK = re.compile(r"\[([sg]?MASK)=((?:[^\]\\]|\\.)+)\]")
"""A blank with its answer, as in ``[MASK=Paris]``; a backslash makes the next character part of the answer."""
FIELD = re.compile(r"([^|?]+)(?:\|([^?]+))?(\?)?")
FINAL_PUNCTUATION = string.punctuation + "。！？；：，、…"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


FILTERS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "unpunctuated": lambda text: text.rstrip().rstrip(FINAL_PUNCTUATION),
    "lower-first": _lower_first,
}
"""The filters of a column: ``{question|unpunctuated}``, ``{choice1|unpunctuated|lower-first}``."""


@dataclass(frozen=True, slots=True)
class Field:
    """A part of a template that the value of a column fills."""

    column: str
    filters: tuple[str, ...]
    optional: bool  # may be absent or empty


@dataclass(frozen=True, slots=True)
class Template:
    """A text with fields, cut at its blanks."""

    segments: tuple[tuple[str | Field, ...], ...]  # before, between and behind the blanks
    blanks: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """The columns that a record must have."""
        fields = [piece for segment in self.segments for piece in segment if isinstance(piece, Field)]
        return [field.column for field in fields if not field.optional]

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text for the values of a record, in NFC.

        If the template has blanks, those in the values are escaped with a backslash. If it has none, those in the
        values are blanks.

        Raises:
            GmaskError: no such column, an empty value, or one that is no text.
        """
        filled = ["".join(_fill_piece(piece, values) for piece in segment) for segment in self.segments]
        if not self.blanks:
            return filled[0]
        escaped = list(map(escape_blanks, filled))
        text = escaped[0]
        for blank, behind in zip(self.blanks, escaped[1:], strict=True):
            backslashes = len(text) - len(text.rstrip("\\"))
            text += "\\" * backslashes + blank + behind
        return text


@lru_cache(maxsize=1024)
def parse_template(source: str) -> Template:
    """Reads a template.

    ``{column}`` is the value of a column, ``{column?}`` one that may be empty or absent, ``{column|filter}`` one that
    goes through a filter of `FILTERS`; ``{{`` and ``}}`` are braces. Blanks are written as they are; ``\\[MASK]`` is
    plain text.

    Raises:
        GmaskError: a single brace, or an unknown filter.
    """
    segments: list[list[str | Field]] = [[]]
    blanks: list[str] = []
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+", source):
        piece = match.group()
        if piece in ("{", "}"):
            raise GmaskError(f"the template {source!r} has a single {piece}: write {piece * 2} for a brace in the text")
        if match.group(1) is not None:
            segments[-1].append(_parse_field(match.group(1), source))
        elif piece in ("{{", "}}"):
            segments[-1].append(piece[0])
        else:
            _add_text(piece, segments, blanks)
    return Template(tuple(map(tuple, segments)), tuple(blanks))


def count_blanks(text: str) -> int:
    """The number of blanks in a text; those that a backslash makes plain text do not count."""
    return sum(len(match.group(1)) % 2 == 0 for match in BLANK.finditer(text))


def count_words(text: str) -> int:
    """The words of a text: what single spaces separate, so that the line breaks of WikiText count, as published."""
    return len(text.strip().split(" "))


def escape_blanks(text: str) -> str:
    """Makes the blanks of a text, and what looks like one, plain text by a backslash."""
    return LIKE_A_BLANK.sub(r"\1\1\\\2", text)


def split_final_blank(text: str) -> tuple[str, str] | None:
    r"""Returns the text before its one blank, without escapes, and the blank; None unless the blank ends the text."""
    pieces, blanks, end = [""], list[str](), 0
    for match in LIKE_A_BLANK.finditer(text):
        slashes, token = match.groups()
        pieces[-1] += text[end : match.start()] + "\\" * (len(slashes) // 2)
        end = match.end()
        if len(slashes) % 2 or not BLANK.fullmatch(token):
            pieces[-1] += token
        else:
            blanks.append(token)
            pieces.append("")
    return (pieces[0], blanks[0]) if len(blanks) == 1 and not (pieces[1] + text[end:]).strip() else None


def write_answers(text: str, answers: Sequence[str]) -> str:
    """Writes answers into the blanks of a text; what looks like a blank in them becomes plain text."""
    parts, end, left = list[str](), 0, list(answers)
    for match in BLANK.finditer(text):
        if len(match.group(1)) % 2:
            continue
        parts += [text[end : match.start()], escape_blanks("\\" * (len(match.group(1)) // 2) + left.pop(0))]
        end = match.end()
    return "".join((*parts, text[end:]))


def split_marks(text: str) -> tuple[str, tuple[str, ...]]:
    """Splits a text with answers, such as ``It is [MASK=sunny] today.``, into a text with blanks and the answers."""
    answers = tuple(re.sub(r"\\(.)", r"\1", match.group(2)) for match in MARKED_BLANK.finditer(text))
    return MARKED_BLANK.sub(r"[\1]", text), answers


def read_value(values: Mapping[str, Any], column: str) -> Any:
    """The value of a column. Raises `GmaskError` with the known columns if there is none."""
    if column not in values:
        known = ", ".join(values)
        near = f"; the nearest is {nearest(column, values)!r}" if values else ""
        raise GmaskError(f"no column {column!r}, the columns are {known or 'none'}{near}")
    return values[column]


def as_text(value: Any, column: str) -> str:
    """The text of a value, in NFC; "" for one that is missing. Raises `GmaskError` for a list or an object."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value != value:  # NaN, which a table of numbers has for an empty cell
        return ""
    if not isinstance(value, str | int | float):
        raise GmaskError(f"column {column!r} holds a {type(value).__name__}, not a text")
    return unicodedata.normalize("NFC", str(value))


def _parse_field(source: str, template: str) -> Field:
    match = FIELD.fullmatch(source)
    if match is None:
        raise GmaskError(f"the template {template!r}: {{{source}}} is not of the form {{column|filter?}}")
    column, filters, optional = match.groups()
    names = tuple(filters.split("|")) if filters else ()
    for name in names:
        if name not in FILTERS:
            raise GmaskError(
                f"the template {template!r}: no filter {name!r}; the nearest is {nearest(name, FILTERS)!r}"
            )
    return Field(column, names, optional is not None)


def _add_text(text: str, segments: list[list[str | Field]], blanks: list[str]) -> None:
    """Adds text without fields, cut at its blanks; its escapes are removed, and `Template.fill` adds them again."""
    end = 0
    for match in BLANK.finditer(text):
        backslashes, blank = match.groups()
        before = text[end : match.start()] + "\\" * (len(backslashes) // 2)
        end = match.end()
        if len(backslashes) % 2:
            segments[-1].append(before + blank)
        else:
            segments[-1].append(before)
            segments.append([])
            blanks.append(blank)
    segments[-1].append(text[end:])


def _fill_piece(piece: str | Field, values: Mapping[str, Any]) -> str:
    if isinstance(piece, str):
        return piece
    value = values.get(piece.column) if piece.optional else read_value(values, piece.column)
    text = as_text(value, piece.column)
    for name in piece.filters:
        text = FILTERS[name](text)
    if not (text.strip() or piece.optional):
        raise GmaskError(f"column {piece.column!r} is empty")
    return text
