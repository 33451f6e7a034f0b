"""Which blanks is a model judged by? Sentences of held-out texts with whole words or characters hidden."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gmask.errors import GmaskError


@dataclass(frozen=True, slots=True)
class SpanSize:
    """How many neighbouring units one blank hides; the number is drawn evenly between the bounds."""

    shortest: int
    longest: int


@dataclass(frozen=True, slots=True)
class Language:
    """How a language is cut: into sentences, into symbols for counting, into units that a blank may hide."""

    name: str
    stop: re.Pattern[str]  # finds the ends of sentences
    accepted: re.Pattern[str]  # what a whole sentence must look like to be used
    symbol: re.Pattern[str]  # finds what the n-gram models count: units, punctuation, other characters
    unit: re.Pattern[str]  # a word or a character; what may be hidden and what F1 compares
    gap: str  # between neighbouring units of one blank
    n_units: tuple[int, int]  # of a sentence that is used
    spans: Mapping[str, SpanSize]


HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
TITLES = r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)"
ENGLISH = Language(
    name="English",
    stop=re.compile(rf"""[.!?]{TITLES}['"”’]*(?=\s|$)"""),
    accepted=re.compile(r"[A-Z\"“'‘][A-Za-z0-9 ,;:.!?()'\"“”‘’—-]*"),
    symbol=re.compile(r"[A-Za-z]+(?:['’][a-z]+)?|[^\sA-Za-z]|\n"),
    unit=re.compile(r"[A-Za-z]+(?:['’][a-z]+)?"),
    gap=" ",
    n_units=(8, 40),
    spans={"1 word": SpanSize(1, 1), "2-3 words": SpanSize(2, 3)},
)
CHINESE = Language(
    name="Chinese",
    stop=re.compile(r"[。！？]+[”’」』]*"),
    accepted=re.compile(rf"(?:[{HAN}]|[，。！？；：、“”‘’《》—…])+"),
    symbol=re.compile(r"\S|\n"),
    unit=re.compile(rf"[{HAN}]"),
    gap="",
    n_units=(10, 60),
    spans={"1 character": SpanSize(1, 1), "2 characters": SpanSize(2, 2), "3-4 characters": SpanSize(3, 4)},
)
LANGUAGES = (ENGLISH, CHINESE)


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


def cut_sentences(text: str, language: Language) -> list[str]:
    """The sentences of a text, line by line; words after the last stop of a line are left out."""
    sentences = []
    for line in text.splitlines():
        start = 0
        for match in language.stop.finditer(line):
            sentences.append(line[start : match.end()].strip())
            start = match.end()
    return sentences


def choose_sentences(
    texts: Mapping[str, Sequence[str]],
    weights: Mapping[str, float],
    language: Language,
    count: int,
    *,
    rng: np.random.Generator,
) -> list[tuple[str, str]]:
    """`count` different (source name, sentence) pairs; fewer where the texts hold fewer.

    Each time a source is drawn by its weight, then one of its documents, then a sentence, all at random.
    """
    pools = {name: _shuffle_sentences(documents, language, rng) for name, documents in texts.items()}
    chosen: dict[str, str] = {}
    while len(chosen) < count and (names := [name for name, documents in pools.items() if documents]):
        shares = np.array([weights[name] for name in names])
        name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
        documents = pools[name]
        place = int(rng.integers(len(documents)))
        chosen.setdefault(documents[place].pop(), name)
        if not documents[place]:
            del documents[place]
    if not chosen:
        raise GmaskError(f"the held-out texts have no {language.name} sentence that could be used")
    return [(name, sentence) for sentence, name in chosen.items()]


def _shuffle_sentences(documents: Sequence[str], language: Language, rng: np.random.Generator) -> list[list[str]]:
    """The usable sentences of each document, in random order; documents without any are left out."""
    usable = [[s for s in cut_sentences(text, language) if _is_usable(s, language)] for text in documents]
    return [rng.permutation(sentences).tolist() for sentences in usable if sentences]


def hide_span(
    sentence: str, language: Language, size: SpanSize, *, source: str, rng: np.random.Generator
) -> HeldOutBlank:
    """Hide neighbouring units, with nothing but the language's gap between them; every place is equally likely."""
    length = int(rng.integers(size.shortest, size.longest + 1))
    places = _span_places(sentence, language, length)
    start, end = places[int(rng.integers(len(places)))]
    return HeldOutBlank(source, sentence[:start], sentence[start:end], sentence[end:], length)


def _is_usable(sentence: str, language: Language) -> bool:
    least, most = language.n_units
    if not language.accepted.fullmatch(sentence) or not least <= len(language.unit.findall(sentence)) <= most:
        return False
    longest = max(size.longest for size in language.spans.values())
    return bool(_span_places(sentence, language, longest))


def _span_places(sentence: str, language: Language, length: int) -> list[tuple[int, int]]:
    """`[start, end)` in characters of every run of `length` units."""
    units = [match.span() for match in language.unit.finditer(sentence)]
    return [
        (units[first][0], units[first + length - 1][1])
        for first in range(len(units) - length + 1)
        if all(
            sentence[units[index][1] : units[index + 1][0]] == language.gap
            for index in range(first, first + length - 1)
        )
    ]
