"""Which samples does a fine-tuning run learn from, and by which is it measured?"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gmask.errors import GmaskError
from gmask.tasks.corpus import find_files
from gmask.tasks.metrics import check_metrics, is_answered
from gmask.tasks.recipes.tuning import TuningDataSettings
from gmask.tasks.records import read_records
from gmask.tasks.samples import Sample
from gmask.tasks.task import Task

Unit = tuple[object, ...]
"""Samples of one record, or of one line of a file: they are never divided between training and validation."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that samples were read from."""

    split: str  # train, validation or test
    name: str  # without its folder
    samples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Splits:
    """The samples of a run. Those of ``test`` may be without answers."""

    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]
    files: Sequence[DataFile]
    dropped: int = 0  # records that could not be used, where the recipe lets them be left out


def read_splits(task: Task, data: TuningDataSettings, *, seed: int) -> Splits:
    """Reads the files of a recipe, and sets samples aside for validation where it says so.

    Raises:
        GmaskError: as of `read_records` and `Task.samples`; no sample is left to train on; a metric that cannot be
            measured on the samples.
    """
    bad: list[GmaskError] = []
    train, files = _read(task, data, data.train, "train", bad)
    validation, test = list[Sample](), list[Sample]()
    if isinstance(data.validation, str):
        validation, more = _read(task, data, data.validation, "validation", bad)
        files += more
    elif data.validation is not None:
        train, validation = hold_out(train, data.validation, seed=seed)
    elif data.folds is not None:
        train, validation = take_fold(train, data.folds, data.fold or 1, seed=seed)
    if data.test is not None:
        test, more = _read(task, data, data.test, "test", bad)
        files += more
    if not train:
        raise GmaskError(f"{data.place(data.train)}: validation takes all samples, and none is left to train on")
    for samples in (validation, test):
        if samples and task.metrics and is_answered(samples[0], task.kind):
            check_metrics(task.metrics, samples[0], task.kind)
    return Splits(train, validation, test, files, len(bad))


def hold_out(samples: Sequence[Sample], share: float, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """A share of the samples, at least one record, set aside: what is left, and what is not."""
    units = _shuffled_units(samples, seed)
    held = set(units[: max(1, round(share * len(units)))])
    return _divide(samples, held)


def take_fold(samples: Sequence[Sample], folds: int, fold: int, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """One of several folds, counted from 1, set aside; every record is in exactly one of them.

    Raises:
        GmaskError: fewer records than folds.
    """
    units = _shuffled_units(samples, seed)
    if len(units) < folds:
        raise GmaskError(f"data.folds is {folds}, but there are only {len(units)} records")
    return _divide(samples, set(units[fold - 1 :: folds]))


def _read(
    task: Task, data: TuningDataSettings, pattern: str, split: str, bad: list[GmaskError]
) -> tuple[list[Sample], list[DataFile]]:
    place = data.place(pattern)
    on_bad = bad.append if data.skip_bad_lines else None
    records = read_records(place, limit=data.limit, on_bad=on_bad)
    samples = task.samples(records, require_answers=split != "test", on_bad=on_bad)
    counts = Counter(sample.path for sample in samples)
    files = [path for path in find_files(place) if path.suffix != ".target"]
    found = [DataFile(split, path.name, counts[path], hash_file(path)) for path in files]
    return samples, found


def hash_file(path: Path) -> str:
    """SHA-256 of a file; of a .source file and its .target together."""
    digest = hashlib.sha256()
    target = path.with_suffix(".target")
    for part in (path, target) if path.suffix == ".source" and target.is_file() else (path,):
        with part.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def _unit(sample: Sample, index: int) -> Unit:
    return (index,) if sample.path is None else (sample.path, sample.line)


def _shuffled_units(samples: Sequence[Sample], seed: int) -> list[Unit]:
    units = list(dict.fromkeys(_unit(sample, index) for index, sample in enumerate(samples)))
    return [units[place] for place in np.random.default_rng([seed, 1]).permutation(len(units))]


def _divide(samples: Sequence[Sample], held: set[Unit]) -> tuple[list[Sample], list[Sample]]:
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for index, sample in enumerate(samples):
        parts[_unit(sample, index) in held].append(sample)
    return parts
