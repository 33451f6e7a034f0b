"""Which documents are fit to train on: language, quality by published rules, and no overlap with evaluation sets.

A unit is a word, or one character of Chinese, Japanese or Korean: what the bounds of the rules and all n-grams count.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gmask.errors import GmaskError
from gmask.recipes.preparation import DecontaminationSettings, FilterSettings
from gmask.tasks.records import find_files, stream_records

HashArray = npt.NDArray[np.uint64]
HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"  # with kana and hangul
UNIT = re.compile(f"[{HAN}]|[^\\W{HAN}]+")
SINGLE = re.compile(f"[{HAN}]")
BULLETS = ("-", "*", "•", "·", "‣", "●")
ELLIPSES = ("...", "…")
SYMBOLS = re.compile(r"#|\.\.\.|…")
LANGUAGE_CHARS = 2_000
"""The language of a document is that of so many characters in its middle."""

MOST_WORDS = 1 << 18
"""Words whose hashes a process keeps; then it begins anew, so that memory stays flat."""


def cut_units(text: str) -> list[str]:
    """The units of a text in lower case; punctuation and white space are left out."""
    return UNIT.findall(text.lower())


class _WordHashes(dict[str, int]):
    """64 bits of BLAKE2 of each word, computed once. Python's own hash differs from process to process."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        self[word] = found = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return found


_word_hashes = _WordHashes()


def mix_bits(values: HashArray) -> HashArray:
    """A bijection of 64 bits in which each bit of the result depends on all; the finalizer of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_ngrams(units: Sequence[str], n: int) -> HashArray:
    """A hash [len(units) - n + 1] of each sequence of ``n`` units; of a shorter text, one of all of it."""
    n = min(n, len(units))
    if not n:
        return np.empty(0, np.uint64)
    words = np.array([_word_hashes[unit] for unit in units], np.uint64)
    hashes = np.zeros(len(units) - n + 1, np.uint64)
    for offset in range(n):
        hashes = mix_bits(hashes + words[offset : len(words) - n + 1 + offset])
    return hashes


def find_fault(text: str, units: Sequence[str], rules: FilterSettings) -> str | None:
    """The name of the first rule that a document breaks, as the recipe spells it; None if it keeps them all."""
    if (fault := _fault_of_units(text, units, rules)) is not None:
        return fault
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if _exceeds(sum(line.startswith(BULLETS) for line in lines), len(lines), rules.max_bullet_lines):
        return "max_bullet_lines"
    if _exceeds(sum(line.endswith(ELLIPSES) for line in lines), len(lines), rules.max_ellipsis_lines):
        return "max_ellipsis_lines"
    repeated = [line for line, count in Counter(lines).items() for _ in range(count - 1)]
    if _exceeds(len(repeated), len(lines), rules.max_repeated_lines):
        return "max_repeated_lines"
    if _exceeds(sum(map(len, repeated)), sum(map(len, lines)), rules.max_repeated_chars):
        return "max_repeated_chars"
    if rules.max_top_ngrams is not None and len(units) > 1:
        pairs = Counter(pairwise(units))
        count = max(pairs.values())
        if count > 1 and _exceeds(2 * count, len(units), rules.max_top_ngrams):
            return "max_top_ngrams"
    lowered = text.lower()
    if any(phrase.lower() in lowered for phrase in rules.phrases):
        return "phrases"
    if rules.languages is not None and identify_language(text) not in rules.languages:
        return "languages"
    return None


def _fault_of_units(text: str, units: Sequence[str], rules: FilterSettings) -> str | None:
    if rules.min_units is not None and len(units) < rules.min_units:
        return "min_units"
    if rules.max_units is not None and len(units) > rules.max_units:
        return "max_units"
    words = [unit for unit in units if not SINGLE.match(unit)]
    if rules.mean_word_length is not None and 2 * len(words) > len(units):
        least, most = rules.mean_word_length
        if not least <= sum(map(len, words)) / len(words) <= most:
            return "mean_word_length"
    if _exceeds(len(SYMBOLS.findall(text)), len(units), rules.max_symbols):
        return "max_symbols"
    with_letter = sum(any(map(str.isalpha, unit)) for unit in units)
    if rules.min_alphabetic is not None and with_letter < rules.min_alphabetic * len(units):
        return "min_alphabetic"
    if rules.min_letters is not None:
        shown = len(text) - sum(map(str.isspace, text))
        if sum(map(str.isalpha, text)) < rules.min_letters * shown:
            return "min_letters"
    return None


def _exceeds(count: int, total: int, share: float | None) -> bool:
    return share is not None and count > share * max(total, 1)


def identify_language(text: str) -> str:
    """The ISO 639-1 code that py3langid gives to the middle of a text."""
    import py3langid

    start = max(0, (len(text) - LANGUAGE_CHARS) // 2)
    return str(py3langid.classify(text[start : start + LANGUAGE_CHARS])[0])


def check_languages(languages: Sequence[str]) -> None:
    """Raises `GmaskError` for a code that py3langid does not know."""
    import py3langid

    known = {label for label, _ in py3langid.rank("")}
    if unknown := [code for code in languages if code not in known]:
        raise GmaskError(f"filters.languages: {unknown[0]!r} is none of {', '.join(sorted(known))}")


# Evaluation sets


def collect_ngrams(settings: DecontaminationSettings) -> HashArray:
    """The hashes, sorted, of all sequences of ``ngram`` units in the evaluation sets. Shorter texts have none.

    Raises:
        GmaskError: a set cannot be read, or none of its texts is long enough to be found.
    """
    found = [np.empty(0, np.uint64)]
    for pattern in settings.files:
        path = str(Path(settings.root) / pattern)
        find_files(path)
        count = 0
        for record in stream_records(path):
            for text in _texts_of(record.values):
                if len(units := cut_units(text)) >= settings.ngram:
                    found.append(hash_ngrams(units, settings.ngram))
                    count += 1
        if not count:
            raise GmaskError(
                f"decontamination.files: {path} has no text of {settings.ngram} words or characters: lower "
                "decontamination.ngram, or leave it out"
            )
    return np.unique(np.concatenate(found))


def _texts_of(value: Any) -> Iterator[str]:
    """The texts in a value, however nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for one in value.values() for text in _texts_of(one))
    elif isinstance(value, Iterable):
        yield from (text for one in value for text in _texts_of(one))


def find_contamination(units: Sequence[str], n: int, known: HashArray) -> str | None:
    """The first sequence of ``n`` units that is among the known hashes, sorted; None if there is none."""
    if len(units) < n or not len(known):
        return None
    hashes = hash_ngrams(units, n)
    indices = known.searchsorted(hashes).clip(max=len(known) - 1)
    hits = np.flatnonzero(known[indices] == hashes)
    return " ".join(units[hits[0] : hits[0] + n]) if len(hits) else None
