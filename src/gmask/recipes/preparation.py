"""The recipe of `gmask prepare`, which makes tokenized shards of raw texts: YAML into typed values."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from gmask.config import (
    Count,
    NotEmpty,
    NotNegative,
    Part,
    Range,
    Threads,
    Whole,
    build_settings,
    check_fields,
    field_names,
    load_tree,
    plain_values,
    to_yaml,
)
from gmask.errors import GmaskError
from gmask.tasks.records import Source

UnitShare = Annotated[float, Range(0, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparationRunSettings:
    """The folder of the result, and what works on it. None of these values but ``out`` changes a byte of the result."""

    out: str
    processes: Threads = 1
    machines: Threads = 1  # that share the folder; each gives the same command with a `machine` of its own
    machine: Whole = 0  # from 0; machine 0 finds the files and writes the manifest and the report
    keep_work: bool = False  # the texts and signatures between the stages, which are removed at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparationTokenizerSettings:
    """The tokenizer."""

    path: str  # a folder with a tokenizer.json, as `gmask train-tokenizer` writes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparationDataSettings:
    """The texts, and how they are divided into blocks, which are the units of work."""

    sources: Annotated[tuple[Source, ...], NotEmpty()]
    root: str = "."  # what the sources' paths are relative to; a folder or a URL
    field: Annotated[str, NotEmpty()] = "text"  # of a JSON line, or the column of a table
    validation: Part | None = None  # share of the documents of a source that names no validation files
    block_bytes: Annotated[int, Range(1024), Range(most=1 << 40)] = 64 << 20  # about; what a killed process does again
    skip_bad_lines: bool = False
    skip_bad_files: bool = False  # the rest of a file that cannot be read on is left out

    @property
    def resolved_sources(self) -> list[Source]:
        """The sources with their paths under ``root``."""
        return [source.under(self.root) for source in self.sources]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Which documents are kept; null turns a rule off. A unit is a word, or a character of Chinese or Japanese.

    Sources: Rae et al. 2021 ("Gopher"), appendix A.1.1, of the bounds and of repetition; Raffel et al. 2020 (C4) of the
    phrases.
    """

    languages: tuple[str, ...] | None = None  # such as [en, zh]: ISO 639-1 codes of py3langid
    min_units: Whole | None = 50
    max_units: Count | None = 100_000
    mean_word_length: tuple[NotNegative, NotNegative] | None = (3.0, 10.0)  # of words that are no Han, if those prevail
    max_symbols: NotNegative | None = 0.1  # "#" and ellipses for each unit
    max_bullet_lines: UnitShare | None = 0.9
    max_ellipsis_lines: UnitShare | None = 0.3
    min_alphabetic: UnitShare | None = 0.8  # of the units, those with a letter
    min_letters: UnitShare | None = 0.6  # of the characters that are no space
    max_repeated_lines: UnitShare | None = 0.3  # of the lines
    max_repeated_chars: UnitShare | None = 0.2  # of the characters, those in repeated lines
    max_top_ngrams: UnitShare | None = 0.2  # of the units, those in the most frequent sequence of two
    phrases: tuple[str, ...] = ("lorem ipsum",)  # a document with one of them, in any case, is dropped


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicateSettings:
    """Which documents count as the same. Of several the first is kept: validation before training, then in the order of
    the sources, their files' names and their lines.

    The default of near duplicates, 14 bands of 8 hashes of sequences of 5 words, is that of FineWeb (Penedo et al.
    2024). Two documents that share a band are compared by all hashes.
    """

    exact: bool = True  # after case folding, with white space made one
    near: bool = True
    ngram: Annotated[int, Range(1, 100)] = 5  # units
    bands: Annotated[int, Range(1, 128)] = 14
    rows: Annotated[int, Range(1, 64)] = 8
    similarity: Part = 0.7  # Jaccard, estimated by the share of equal hashes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecontaminationSettings:
    """The evaluation sets: a document that shares a sequence of units with one of them is dropped.

    Source: Brown et al. 2020, appendix C: sequences of 13 words.
    """

    files: tuple[str, ...] = ()  # globs of files of a task's records; all texts in them count
    root: str = "."
    ngram: Annotated[int, Range(2, 100)] = 13


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparationRecipe:
    """A preparation, as data."""

    run: PreparationRunSettings
    tokenizer: PreparationTokenizerSettings
    data: PreparationDataSettings
    filters: FilterSettings = FilterSettings()
    duplicates: DuplicateSettings = DuplicateSettings()
    decontamination: DecontaminationSettings = DecontaminationSettings()

    def __post_init__(self) -> None:
        check_fields(self)
        names = [source.name for source in self.data.sources]
        if len(set(names)) < len(names):
            raise GmaskError("data.sources: two sources have the same name")
        for name in names:
            if not name or name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
                raise GmaskError(f"data.sources: {name!r} is no name of a folder, which the tokens of a source become")
        if self.run.machine >= self.run.machines:
            raise GmaskError(
                f"run.machine is {self.run.machine}: of {self.run.machines} machines the last has the "
                f"number {self.run.machines - 1}"
            )
        bounds = self.filters.mean_word_length
        if bounds is not None and bounds[0] > bounds[1]:
            raise GmaskError(f"filters.mean_word_length: {bounds[0]:g} is above {bounds[1]:g}")

    def decisive_values(self) -> dict[str, Any]:
        """The plain values that the result depends on."""
        values = plain_values(self)
        del values["run"]
        return values

    def to_yaml(self) -> str:
        return to_yaml(self)

    @property
    def out(self) -> Path:
        return Path(self.run.out)


def load_preparation(path: Path | str, overrides: Sequence[str] = ()) -> PreparationRecipe:
    """Reads a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, not YAML, an unknown key (the nearest one is named), a missing one.
    """
    tree = load_tree(path, overrides, field_names(PreparationRecipe))
    return build_settings(PreparationRecipe, tree, title="the recipe")
