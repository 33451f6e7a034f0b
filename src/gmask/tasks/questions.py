"""Questions to a model, and what is known of their answers: records become samples, as a task says."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from gmask.conversation import read_conversation
from gmask.errors import GmaskError
from gmask.tasks.formats import flatten, samples_of
from gmask.tasks.records import Record, Sample, TaskKind, Values
from gmask.tasks.templates import (
    as_text,
    count_blanks,
    count_words,
    escape_blanks,
    parse_template,
    read_value,
    split_marks,
)

if TYPE_CHECKING:
    from gmask.tasks.task import Task

WHOLE_FLOAT = re.compile(r"(?<=\d)\.0+$")
"""The decimals of a whole number that became a float, as in a table with empty cells."""

UNKNOWN_LABELS = ("", "-1")
"""Labels of published test files that mean no label."""


def make_samples(
    task: "Task",
    records: Iterable[Record],
    *,
    require_answers: bool = True,
    on_bad: Callable[[GmaskError], None] | None = None,
) -> list[Sample]:
    """The samples of records, in their order.

    Args:
        require_answers: an absent or empty answer is an error; if false, such a sample has no answer, as in test
            files without labels.
        on_bad: called with the error of each record that cannot be used, which is left out; without it the first
            one raises.

    Raises:
        GmaskError: a column that is absent (with the nearest name), empty or of the wrong kind, a label outside the
            choices, a number of blanks that does not fit, each with file and line; or no record gives a sample.
    """
    samples = list(stream_samples(task, records, require_answers=require_answers, on_bad=on_bad))
    if not samples:
        raise GmaskError(f"task {task.name}: no record gives a sample")
    return samples


def stream_samples(
    task: "Task",
    records: Iterable[Record],
    *,
    require_answers: bool = True,
    on_bad: Callable[[GmaskError], None] | None = None,
) -> Iterator[Sample]:
    """As `make_samples`, one after the other; records that give none are no error."""
    for record in records:
        plain = list[Record]()
        with _located(record, on_bad):
            plain = list(flatten(task.reader, record))
        for one in plain:
            found = list[Sample]()
            with _located(record, on_bad):
                made = MAKERS[task.kind](task, one.values, require_answers)
                found = [replace(sample, path=one.path, line=one.line) for sample in made]
            yield from found


@contextmanager
def _located(record: Record, on_bad: Callable[[GmaskError], None] | None) -> Iterator[None]:
    """Adds file and line to an error, and raises it or calls ``on_bad`` with it."""
    try:
        yield
    except GmaskError as error:
        located = GmaskError(f"{record.location}: {error}")
        if on_bad is None:
            raise located from error
        on_bad(located)


def _choose(task: "Task", values: Values, require_answers: bool) -> list[Sample]:
    text = _fill_one_blank(task, values)
    answers, label = _read_choice(task, values, require_answers)
    references = _read_references(task, values)
    return [Sample(text=text, answers=answers, label=label, group=_read_group(task, values), references=references)]


def _read_choice(task: "Task", values: Values, require_answers: bool) -> tuple[tuple[str, ...], int | None]:
    """The candidates, and the index of the right one."""
    if task.candidates:
        answers = _read_texts(values, task.candidates)
        names = tuple(map(str, range(len(answers))))
    else:
        answers = tuple(parse_template(choice).fill(values) for choice in task.choices.values())
        names = tuple(task.choices)
    if (twice := find_repeated(answers)) is not None:
        raise GmaskError(f"two candidates are the same text, {twice!r}, and the model could not choose one of them")
    return answers, _read_label(task, values, names, answers, require_answers)


def _classify(task: "Task", values: Values, require_answers: bool) -> list[Sample]:
    text = escape_blanks(parse_template(task.plain_template or task.template).fill(values))
    label = _read_label(task, values, tuple(task.choices), tuple(task.choices.values()), require_answers)
    return [Sample(text=text, label=label, group=_read_group(task, values))]


def _transform(task: "Task", values: Values, require_answers: bool) -> list[Sample]:
    text = _fill_one_blank(task, values)
    group = _read_group(task, values)
    answers = _read_target(task, values, require_answers)
    references = _read_references(task, values) if answers else ()
    return [Sample(text=text, answers=answers, group=group, references=references)]


def _infill(task: "Task", values: Values, require_answers: bool) -> list[Sample]:
    text, answers = split_marks(parse_template(task.template).fill(values))
    if not answers and task.answers and values.get(task.answers):
        answers = _read_texts(values, task.answers)
    blanks = count_blanks(text)
    if not blanks or (len(answers) != blanks and (answers or require_answers)):
        raise GmaskError(f"the text has {blanks} blanks, and there are {len(answers)} answers")
    return [Sample(text=text, answers=answers)]


def _write(task: "Task", values: Values, require_answers: bool) -> list[Sample]:
    text = parse_template(task.template).fill(values)
    words = read_value(values, task.words) if task.words else count_words(text)
    return [Sample(answers=(text,), words=words)]


def _reply(task: "Task", values: Values, require_answers: bool) -> list[Sample]:
    if task.messages:
        return samples_of(read_value(values, task.messages), require_answers=require_answers)
    text = parse_template(task.template).fill(values).strip()
    try:
        asked = read_conversation((values.get(task.history) if task.history else None) or None, text)
    except GmaskError as error:
        raise GmaskError(f"column {task.history!r}, {error}") from error
    answers = _read_target(task, values, require_answers)
    return [Sample(text=asked.require_query(), answers=answers, history=asked.rounds)]


MAKERS: Mapping[TaskKind, Callable[["Task", Values, bool], list[Sample]]] = {
    "cloze": _choose,
    "multiple-choice": _choose,
    "classification": _classify,
    "seq2seq": _transform,
    "infill": _infill,
    "likelihood": _transform,
    "language-model": _write,
    "chat": _reply,
}


def _fill_one_blank(task: "Task", values: Values) -> str:
    text = parse_template(task.template).fill(values)
    if (blanks := count_blanks(text)) != 1:
        raise GmaskError(f"the text has {blanks} blanks, and the task {task.name} is about one")
    return text


def _read_target(task: "Task", values: Values, require_answers: bool) -> tuple[str, ...]:
    if task.choices or task.candidates:
        candidates, label = _read_choice(task, values, require_answers)
        return () if label is None else (candidates[label],)
    assert task.target is not None, "read_task checks it"
    target = parse_template(task.target)
    if not require_answers and not all(values.get(column) for column in target.columns):
        return ()
    return (target.fill(values),)


def _read_label(
    task: "Task", values: Values, names: Sequence[str], texts: Sequence[str], require_answers: bool
) -> int | None:
    """The index of the right choice. The label is the name of a choice or its text."""
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
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise GmaskError(f"the label {label!r} is none of the choices: {listed}")


def find_repeated(texts: Sequence[str]) -> str | None:
    """The first text that occurs more than once, or None."""
    return next((text for text, count in Counter(texts).items() if count > 1), None)


def _read_group(task: "Task", values: Values) -> str | None:
    return parse_template(task.group).fill(values) if task.group else None


def _read_references(task: "Task", values: Values) -> tuple[str, ...]:
    return _read_texts(values, task.references) if task.references and values.get(task.references) else ()


def _read_texts(values: Values, column: str) -> tuple[str, ...]:
    """The texts of a column that holds a list."""
    value = read_value(values, column)
    if not isinstance(value, list) or not value:
        raise GmaskError(f"column {column!r} is not a list of texts, or an empty one")
    texts = tuple(as_text(text, column) for text in value)
    if not all(map(str.strip, texts)):
        raise GmaskError(f"column {column!r} holds an empty text")
    return texts
