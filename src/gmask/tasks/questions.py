"""Which samples does a plain record become, for each kind of task?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gmask.errors import GmaskError
from gmask.tasks.dialogues import read_history, read_messages
from gmask.tasks.records import Record
from gmask.tasks.samples import Sample, TaskKind
from gmask.tasks.templates import as_text, count_blanks, escape_blanks, parse_template, read_value, split_marks

if TYPE_CHECKING:
    from gmask.tasks.task import Task

Values = Mapping[str, Any]

WHOLE_FLOAT = re.compile(r"(?<=\d)\.0+$")
"""What a whole number ends with that became a float, as in a table with empty cells."""

UNKNOWN_LABELS = ("", "-1")
"""What stands in the place of the label in published test files."""


def make_samples(task: Task, record: Record, *, require_answers: bool) -> list[Sample]:
    """The samples of one plain record: several for a conversation, else one.

    Args:
        require_answers: raise an error for an answer that is absent or empty; without it such samples are questions.

    Raises:
        GmaskError: a column that is absent, empty or of the wrong kind; a label outside the choices; a number of blanks
            that does not fit.
    """
    samples = MAKERS[task.kind](task, record.values, require_answers)
    return [replace(sample, path=record.path, line=record.line) for sample in samples]


def _choose(task: Task, values: Values, require_answers: bool) -> list[Sample]:
    text = _fill_one_blank(task, values)
    if task.candidates:
        answers = _read_texts(values, task.candidates)
        names = tuple(map(str, range(len(answers))))
    else:
        answers = tuple(parse_template(choice).fill(values) for choice in task.choices.values())
        names = tuple(task.choices)
    if (twice := find_repeated(answers)) is not None:
        raise GmaskError(f"two candidates are the same text, {twice!r}, and the model could not choose one of them")
    label = _read_label(task, values, names, answers, require_answers)
    references = _read_references(task, values)
    return [Sample(text=text, answers=answers, label=label, group=_read_group(task, values), references=references)]


def _classify(task: Task, values: Values, require_answers: bool) -> list[Sample]:
    text = escape_blanks(parse_template(task.plain_template or task.template).fill(values))
    label = _read_label(task, values, tuple(task.choices), tuple(task.choices.values()), require_answers)
    return [Sample(text=text, label=label, group=_read_group(task, values))]


def _transform(task: Task, values: Values, require_answers: bool) -> list[Sample]:
    text = _fill_one_blank(task, values)
    answers = _read_target(task, values, require_answers)
    return [Sample(text=text, answers=answers, references=_read_references(task, values) if answers else ())]


def _infill(task: Task, values: Values, require_answers: bool) -> list[Sample]:
    text, answers = split_marks(parse_template(task.template).fill(values))
    if not answers and task.answers and values.get(task.answers):
        answers = _read_texts(values, task.answers)
    blanks = count_blanks(text)
    if not blanks or (len(answers) != blanks and (answers or require_answers)):
        raise GmaskError(f"the text has {blanks} blanks, and there are {len(answers)} answers")
    return [Sample(text=text, answers=answers)]


def _write(task: Task, values: Values, require_answers: bool) -> list[Sample]:
    return [Sample(answers=(parse_template(task.template).fill(values),))]


def _reply(task: Task, values: Values, require_answers: bool) -> list[Sample]:
    if task.messages:
        return read_messages(read_value(values, task.messages), require_answers=require_answers)
    text = parse_template(task.template).fill(values).strip()
    history = read_history(values, task.history) if task.history else ()
    return [Sample(text=text, answers=_read_target(task, values, require_answers), history=history)]


MAKERS: Mapping[TaskKind, Callable[[Task, Values, bool], list[Sample]]] = {
    "cloze": _choose,
    "multiple-choice": _choose,
    "classification": _classify,
    "seq2seq": _transform,
    "infill": _infill,
    "language-model": _write,
    "chat": _reply,
}


def _fill_one_blank(task: Task, values: Values) -> str:
    text = parse_template(task.template).fill(values)
    if (blanks := count_blanks(text)) != 1:
        raise GmaskError(f"the text has {blanks} blanks, and the task {task.name} is about one")
    return text


def _read_target(task: Task, values: Values, require_answers: bool) -> tuple[str, ...]:
    assert task.target is not None, "read_task checks it"
    target = parse_template(task.target)
    if not require_answers and not all(values.get(column) for column in target.columns):
        return ()
    return (target.fill(values),)


def _read_label(
    task: Task, values: Values, names: Sequence[str], texts: Sequence[str], require_answers: bool
) -> int | None:
    """The index of the right choice; a label is the name of a choice or its text."""
    assert task.label is not None, "read_task checks it"
    if not require_answers and task.label not in values:
        return None
    label = as_text(read_value(values, task.label), task.label).strip()
    whole = WHOLE_FLOAT.sub("", label)
    for spelling in (label, whole):
        for known in (names, [text.strip() for text in texts]):
            if spelling in known:
                return known.index(spelling)
    if not require_answers and whole in UNKNOWN_LABELS:
        return None
    if not label:
        raise GmaskError(f"column {task.label!r} is empty")
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise GmaskError(f"the label {label!r} is none of the choices: {shown}")


def find_repeated(texts: Sequence[str]) -> str | None:
    """The first text that comes more than once."""
    return next((text for text, count in Counter(texts).items() if count > 1), None)


def _read_group(task: Task, values: Values) -> str | None:
    return parse_template(task.group).fill(values) if task.group else None


def _read_references(task: Task, values: Values) -> tuple[str, ...]:
    return _read_texts(values, task.references) if task.references and values.get(task.references) else ()


def _read_texts(values: Values, column: str) -> tuple[str, ...]:
    """A column that holds a list of texts."""
    value = read_value(values, column)
    if not isinstance(value, list) or not value:
        raise GmaskError(f"column {column!r} is not a list of texts, or an empty one")
    texts = tuple(as_text(text, column) for text in value)
    if not all(map(str.strip, texts)):
        raise GmaskError(f"column {column!r} holds an empty text")
    return texts
