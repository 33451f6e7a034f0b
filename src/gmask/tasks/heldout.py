"""Sentences of held-out texts, and the blanks that hide words or characters in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gmask.errors import GmaskError
from gmask.tasks.metrics import HAN_RANGES


@dataclass(frozen=True, slots=True)
class SpanSize:
    """How many neighbouring units a blank hides: a number drawn uniformly from ``shortest`` to ``longest``."""

    shortest: int
    longest: int


@dataclass(frozen=True, slots=True)
class LanguageRules:
    """How texts of a language are cut: into sentences, into symbols, and into units that a blank may hide."""

    name: str
    stop: re.Pattern[str]  # finds the end of a sentence
    accepted: re.Pattern[str]  # matches a sentence that can be used
    symbol: re.Pattern[str]  # finds what n-gram models count: units, punctuation, other characters
    unit: re.Pattern[str]  # finds a word or a character: what a blank may hide, and F1 compares
    gap: str  # what is between two units of one blank
    n_units: tuple[int, int]  # least and most of a sentence that is used
    spans: Mapping[str, SpanSize]


NOT_A_TITLE = r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)"
ENGLISH = LanguageRules(
    name="English",
    stop=re.compile(rf"""[.!?]{NOT_A_TITLE}['"”’]*(?=\s|$)"""),
    accepted=re.compile(r"[A-Z\"“'‘][A-Za-z0-9 ,;:.!?()'\"“”‘’—-]*"),
    symbol=re.compile(r"[A-Za-z]+(?:['’][a-z]+)?|[^\sA-Za-z]|\n"),
    unit=re.compile(r"[A-Za-z]+(?:['’][a-z]+)?"),
    gap=" ",
    n_units=(8, 40),
    spans={"1 word": SpanSize(1, 1), "2-3 words": SpanSize(2, 3)},
)
CHINESE = LanguageRules(
    name="Chinese",
    stop=re.compile(r"[。！？]+[”’」』]*"),
    accepted=re.compile(rf"(?:[{HAN_RANGES}]|[，。！？；：、“”‘’《》—…])+"),
    symbol=re.compile(r"\S|\n"),
    unit=re.compile(rf"[{HAN_RANGES}]"),
    gap="",
    n_units=(10, 60),
    spans={"1 character": SpanSize(1, 1), "2 characters": SpanSize(2, 2), "3-4 characters": SpanSize(3, 4)},
)
HELD_OUT_LANGUAGES = (ENGLISH, CHINESE)


@dataclass(frozen=True, slots=True)
class HeldOutBlank:
    """A sentence with one hidden span."""

    source: str
    left: str
    answer: str
    right: str
    n_units: int  # hidden words or characters

    @property
    def text(self) -> str:
        return f"{self.left}[MASK]{self.right}"


def cut_sentences(text: str, language: LanguageRules) -> list[str]:
    """The sentences of a text, line by line; what follows the last stop of a line is left out."""
    sentences = []
    for line in text.splitlines():
        start = 0
        for match in language.stop.finditer(line):
            sentences.append(line[start : match.end()].strip())
            start = match.end()
    return sentences


def draw_sentences(
    texts: Mapping[str, Sequence[str]],
    weights: Mapping[str, float],
    language: LanguageRules,
    count: int,
    *,
    rng: np.random.Generator,
) -> list[tuple[str, str]]:
    """Draws ``count`` different sentences, each with the name of its source; fewer where the texts hold fewer.

    For each a source is drawn by its weight, then one of its documents, then a sentence.

    Args:
        texts: the documents of each source.
        weights: of the sources.

    Raises:
        GmaskError: no sentence can be used.
    """
    pools = {name: _shuffle_sentences(documents, language, rng) for name, documents in texts.items()}
    chosen: dict[str, str] = {}
    while len(chosen) < count and (names := [name for name, documents in pools.items() if documents]):
        shares = np.array([weights[name] for name in names])
        name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
        documents = pools[name]
        index = int(rng.integers(len(documents)))
        chosen.setdefault(documents[index].pop(), name)
        if not documents[index]:
            del documents[index]
    if not chosen:
        raise GmaskError(f"the held-out texts have no {language.name} sentence that could be used")
    return [(name, sentence) for sentence, name in chosen.items()]


def _shuffle_sentences(documents: Sequence[str], language: LanguageRules, rng: np.random.Generator) -> list[list[str]]:
    """The usable sentences of each document, in random order; documents without any are left out."""
    usable = [[s for s in cut_sentences(text, language) if _is_usable(s, language)] for text in documents]
    return [rng.permutation(sentences).tolist() for sentences in usable if sentences]


def hide_span(
    sentence: str, language: LanguageRules, size: SpanSize, *, source: str, rng: np.random.Generator
) -> HeldOutBlank:
    """Hides neighbouring units with nothing but the language's gap between them; all such runs are equally likely."""
    length = int(rng.integers(size.shortest, size.longest + 1))
    runs = _find_runs(sentence, language, length)
    start, end = runs[int(rng.integers(len(runs)))]
    return HeldOutBlank(source, sentence[:start], sentence[start:end], sentence[end:], length)


def _is_usable(sentence: str, language: LanguageRules) -> bool:
    least, most = language.n_units
    if not language.accepted.fullmatch(sentence) or not least <= len(language.unit.findall(sentence)) <= most:
        return False
    longest = max(size.longest for size in language.spans.values())
    return bool(_find_runs(sentence, language, longest))


def _find_runs(sentence: str, language: LanguageRules, length: int) -> list[tuple[int, int]]:
    """The runs of ``length`` neighbouring units, as ``[start, end)`` in characters."""
    units = [match.span() for match in language.unit.finditer(sentence)]
    return [
        (units[first][0], units[first + length - 1][1])
        for first in range(len(units) - length + 1)
        if all(
            sentence[units[index][1] : units[index + 1][0]] == language.gap
            for index in range(first, first + length - 1)
        )
    ]
