"""Suites: lists of tasks with the settings that they are measured by, in YAML; and tasks by name or pattern."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from gmask.config import Count, NotEmpty, Whole, build_settings, read_yaml, show
from gmask.errors import GmaskError, nearest
from gmask.generation.settings import ScoreNormalization, make_sampling
from gmask.tasks.records import Truncation
from gmask.tasks.task import Task, read_task, task_names

SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True, kw_only=True)
class SuiteEntry:
    """A task of a suite, and how it is measured. What is None is left to the model's recipe, or to the defaults."""

    task: str | Mapping[str, Any]  # a name, a file, or the keys of a task, such as {use: superglue/rte, ...}
    name: Annotated[str, NotEmpty()] | None = None  # in reports, and of its folder; by default the task's
    data: str | None = None  # a glob relative to the folder of data, in place of the task's
    train: str | None = None  # the same, of the records that examples are drawn from
    limit: Count | None = None  # records
    shots: Whole = 0  # examples in front of each text
    normalization: ScoreNormalization | None = None  # of the candidates' scores
    max_source: Count | None = None
    truncation: Truncation | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)  # keywords of `gmask.generation.settings.Sampling`


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task that is to be measured."""

    name: str  # no two of a run are the same
    task: Task
    entry: SuiteEntry


def suite_names() -> list[str]:
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name_or_path: str) -> list[SuiteEntry]:
    """Reads a suite: one of gmask's by its name, or a YAML file.

    Raises:
        GmaskError: no such suite (with the nearest name), or one that is no list of tasks.
    """
    known = suite_names()
    path = SUITES / f"{name_or_path}.yaml" if name_or_path in known else Path(name_or_path)
    if not path.is_file():
        raise GmaskError(
            f"there is no suite {name_or_path}: the nearest of gmask's is {nearest(name_or_path, known)}, all are "
            f"{', '.join(known)}; or name a YAML file"
        )
    entries = read_yaml(path)
    if not isinstance(entries, list) or not entries:
        raise GmaskError(f"{path}: a suite is a list of tasks, not {show(entries)}")
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        values = {"task": entry} if isinstance(entry, str) else entry
        made = build_settings(SuiteEntry, values, f"{where}: ", title=where)
        try:
            make_sampling(made.decoding)
        except GmaskError as error:
            raise GmaskError(f"{where}: {error}") from error
        found.append(made)
    return found


def match_tasks(patterns: Sequence[str]) -> list[str]:
    """The names of tasks that patterns such as ``superglue/*`` match; other names and files stay as they are.

    A name without its folder, such as ``lambada``, stands for the only task that is called so, unless it is a file.

    Raises:
        GmaskError: a pattern that matches none.
    """
    known = task_names()
    names = list[str]()
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            ends = [name for name in known if name.rpartition("/")[2] == pattern]
            names.append(ends[0] if len(ends) == 1 and not Path(pattern).exists() else pattern)
            continue
        matched = [name for name in known if fnmatchcase(name, pattern)]
        if not matched:
            raise GmaskError(f"no task matches {pattern}: the nearest of gmask's is {nearest(pattern, known)}")
        names += matched
    return list(dict.fromkeys(names))


def plan_tasks(
    tasks: Sequence[str], suite: str | None, *, limit: int | None = None, shots: int | None = None
) -> list[PlannedTask]:
    """The tasks of names, patterns and a suite, in this order.

    Args:
        limit, shots: in place of those of the suite.

    Raises:
        GmaskError: as of `match_tasks`, `load_suite` and `read_task`; a task without metrics.
    """
    entries = [SuiteEntry(task=name) for name in match_tasks(tasks)] + (load_suite(suite) if suite else [])
    planned = list[PlannedTask]()
    for entry in entries:
        task = read_task({"use": entry.task} if isinstance(entry.task, str) else entry.task)
        if not task.metrics:
            raise GmaskError(
                f"task {task.name} names no metrics, so there is nothing to measure: add some, such as exact-match"
            )
        if limit is not None or shots is not None:
            entry = replace(
                entry,
                limit=entry.limit if limit is None else limit,
                shots=entry.shots if shots is None else shots,
            )
        source = replace(
            task.data,
            files=task.data.files if entry.data is None else (entry.data,),
            train=task.data.train if entry.train is None else (entry.train,),
        )
        name = unused(_spell(entry, task), {one.name for one in planned})
        planned.append(PlannedTask(name, replace(task, data=source), entry))
    return planned


def unused(name: str, taken: set[str]) -> str:
    """The name, with a number behind it if it is taken."""
    return next(one for one in _numbered(name) if one not in taken)


def folder_of(name: str) -> Path:
    """The folder of a task in that of a run: no name leads out of it."""
    parts = [re.sub(r"[^\w.+-]+", "-", part).strip(".") for part in name.split("/")]
    return Path(*[part for part in parts if part] or ["task"])


def _spell(entry: SuiteEntry, task: Task) -> str:
    return entry.name or task.name + (f", {entry.shots}-shot" if entry.shots else "")


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name} ({number})"
        number += 1
