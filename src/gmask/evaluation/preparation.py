"""A task before it is measured: its records are found and read through once, so that what is wrong is told at once."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gmask.errors import GmaskError
from gmask.evaluation.suite import PlannedTask
from gmask.tasks.metrics import check_metrics, is_answered
from gmask.tasks.records import CHOICES, LABELLED, Sample, TaskKind
from gmask.tasks.sources import RecordSet, find_pattern, find_records, open_files
from gmask.tasks.task import Task
from gmask.tasks.templates import write_answers

SEPARATOR = "\n\n"
"""What stands between the examples of a few-shot text."""

NO_EXAMPLES: Mapping[TaskKind, str] = {
    "classification": "a head that classifies reads one text alone",
    "language-model": "a whole text is scored",
}


@dataclass(frozen=True, slots=True)
class DataPlace:
    """Where the records of a run are looked for: in a folder, or in a file of one task."""

    root: Path | None = None
    file: str | None = None  # or a glob
    train: str | None = None  # a file of examples


def find_place(planned: Sequence[PlannedTask], data: str | None, train: str | None) -> DataPlace:
    """Where records are looked for: ``data`` is a folder, or the file of the one task."""
    root = None if data is None or not Path(data).is_dir() else Path(data)
    if data is None or root is not None:
        return DataPlace(root=root, train=train)
    if len(planned) > 1:
        raise GmaskError(f"{data}: is no folder; several tasks take the folder that their files are in")
    return DataPlace(file=data, train=train)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTask:
    """A task and its records, which were read through once."""

    planned: PlannedTask
    records: RecordSet
    hashes: Mapping[str, str]  # SHA-256 by the name of the file, or the commit of a set on the hub
    samples: int
    has_answers: bool
    majority: int | None  # the most frequent label, where always choosing it means something
    chance: float | None  # accuracy of a random choice, 0 to 1
    left_out: int  # records that could not be used, where that is allowed
    skip_bad_lines: bool = False
    labels: Sequence[int] | None = None  # in place of the samples' own
    examples: RecordSet | None = None  # what few-shot examples are drawn from

    @property
    def task(self) -> Task:
        return self.planned.task

    def stream(self) -> Iterator[Sample]:
        """The samples, read anew."""
        ignore = (lambda error: None) if self.skip_bad_lines else None
        records = self.records.stream(self.planned.entry.limit, ignore)
        samples = self.task.stream(records, require_answers=False, on_bad=ignore)
        if self.labels is None:
            return samples
        return (replace(sample, label=label, references=()) for sample, label in zip(samples, self.labels, strict=True))

    def draw_examples(self, seed: int) -> "Examples":
        """Draws the examples that stand in front of each text.

        Raises:
            GmaskError: a record that cannot be used.
        """
        shots = self.planned.entry.shots
        by_group = "macro-accuracy" in self.task.metrics  # subjects, each with examples of its own
        drawn, counts = defaultdict[str | None, list[Sample]](list), Counter[str | None]()
        if not shots or self.examples is None:
            return Examples(0, self.task.kind, by_group, {}, "")
        rng = np.random.default_rng(seed)
        for sample in self.task.stream(self.examples.stream(None, None)):
            group = sample.group if by_group else None
            counts[group] += 1  # each sample so far is among the drawn ones with the same probability
            if len(drawn[group]) <= shots:
                drawn[group].append(sample)
            elif (place := int(rng.integers(counts[group]))) <= shots:
                drawn[group][place] = sample
        mixed = {
            group: few if len(few) <= shots else [few[index] for index in rng.permutation(len(few))]
            for group, few in drawn.items()
        }
        return Examples(shots, self.task.kind, by_group, mixed, self.examples.name)


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of few-shot texts: ``shots`` for each, and one more, for a sample that is among them."""

    shots: int
    kind: TaskKind
    by_group: bool  # each sample gets those of its own group
    drawn: Mapping[str | None, Sequence[Sample]]
    name: str  # of the records

    def put_before(self, sample: Sample) -> Sample:
        """The sample with examples in front: texts with the right answers in their blanks, or rounds of a chat.

        Raises:
            GmaskError: there are too few.
        """
        if not self.shots:
            return sample
        group = sample.group if self.by_group else None
        found = self.drawn.get(group, ())
        others = [one for one in found if (one.text, one.history) != (sample.text, sample.history)][: self.shots]
        if len(others) < self.shots:
            of = f" of {group}" if group else ""
            raise GmaskError(f"{self.name}: has {len(others)} samples{of}, too few for {self.shots} examples")
        if self.kind == "chat":
            rounds = [(one.text, one.answers[0]) for one in others]
            return replace(sample, history=(*rounds, *sample.history))
        return replace(sample, text=SEPARATOR.join((*map(_answered, others), sample.text)))


def prepare_task(
    planned: PlannedTask, place: DataPlace, *, skip_bad_lines: bool = False, shuffle: int | None = None
) -> PreparedTask:
    """Finds the records of a task, and reads them through.

    Args:
        skip_bad_lines: leave out and count records that cannot be used; by default the first one is an error.
        shuffle: the seed by which the labels are exchanged among the samples, which brings every model to chance.

    Raises:
        MissingDataError: the records are not there.
        GmaskError: a record that cannot be used; samples of which only some have an answer; a metric that does not fit;
            examples for a task that reads none, or labels shuffled of a task that has none.
    """
    task, entry = planned.task, planned.entry
    if entry.shots and (reason := NO_EXAMPLES.get(task.kind)):
        raise GmaskError(f"{planned.name}: takes no examples: {reason}; leave shots out")
    if shuffle is not None and task.kind not in LABELLED:
        raise GmaskError(f"{planned.name}: labels are shuffled of tasks that choose, and this one is of {task.kind}")
    if place.file is not None:
        records = open_files(place.file)
    else:
        labels = tuple(task.choices)
        records = find_records(task.data, place.root, "validation", name=planned.name, labels=labels)
    survey = _Survey(task, skip_bad_lines)
    prepared = PreparedTask(
        planned=planned,
        records=records,
        hashes=records.hashes(),
        samples=0,
        has_answers=True,
        majority=None,
        chance=None,
        left_out=0,
        skip_bad_lines=skip_bad_lines,
        examples=_find_examples(planned, place) if entry.shots else None,
    )
    survey.read(records, entry.limit)
    return replace(
        prepared,
        samples=survey.count,
        has_answers=survey.has_answers(),
        majority=survey.majority(),
        chance=survey.chance(),
        left_out=survey.left_out,
        labels=None if shuffle is None else survey.shuffle(shuffle),
    )


def _find_examples(planned: PlannedTask, place: DataPlace) -> RecordSet:
    source = planned.task.data
    if place.train is not None:
        pattern = find_pattern(replace(source, train=(place.train,)), place.root, "train")
        return open_files(pattern or place.train)
    return find_records(source, place.root, "train", name=planned.name, labels=tuple(planned.task.choices))


class _Survey:
    """What is known of the samples of a task when they were read once. Of each sample two numbers are kept."""

    def __init__(self, task: Task, skip_bad_lines: bool) -> None:
        self.task, self.skip_bad_lines = task, skip_bad_lines
        self.labels = list[int]()  # -1 where there is none
        self.candidates = list[int]()
        self.count = self.unanswered = self.left_out = 0
        self.first: Sample | None = None
        self.first_unanswered: Sample | None = None

    def read(self, records: RecordSet, limit: int | None) -> None:
        on_bad = self._leave_out if self.skip_bad_lines else None
        for sample in self.task.stream(records.stream(limit, on_bad), require_answers=False, on_bad=on_bad):
            self.count += 1
            self.labels.append(-1 if sample.label is None else sample.label)
            self.candidates.append(len(sample.answers))
            self.first = self.first or sample
            if not is_answered(sample, self.task.kind):
                self.unanswered += 1
                self.first_unanswered = self.first_unanswered or sample
        if self.first is None:
            bad = f", and {self.left_out} records cannot be used" if self.left_out else ""
            raise GmaskError(f"{records.name}: there is no sample in it{bad}")

    def _leave_out(self, error: GmaskError) -> None:
        self.left_out += 1

    def has_answers(self) -> bool:
        """Raises `GmaskError` if only some of the samples have an answer, or if a metric does not fit."""
        if self.unanswered == self.count:
            return False
        if self.first_unanswered is not None:
            first = self.first_unanswered
            raise GmaskError(
                f"{first.path}, line {first.line}: the answer is not known, as it is not of {self.unanswered} samples "
                f"of {self.count}: evaluate those with an answer and those without apart"
            )
        assert self.first is not None, "read checks it"
        check_metrics(self.task.metrics, self.first, self.task.kind)
        return True

    def majority(self) -> int | None:
        """As of `predict_majority`."""
        if self.task.kind not in LABELLED or -1 in self.labels or len(set(self.candidates)) > 1:
            return None
        counts = Counter(self.labels)
        return min(counts, key=lambda label: (-counts[label], label))

    def chance(self) -> float | None:
        if self.task.kind == "classification":
            return 1 / len(self.task.choices)
        if self.task.kind not in CHOICES:
            return None
        return sum(1 / count for count in self.candidates) / len(self.candidates)

    def shuffle(self, seed: int) -> list[int]:
        """The labels, exchanged among samples with as many candidates."""
        if -1 in self.labels:
            raise GmaskError(f"{self.task.name}: there is a sample without a label, so none are shuffled")
        places = defaultdict[int, list[int]](list)
        for index, count in enumerate(self.candidates):
            places[count].append(index)
        labels, rng = list(self.labels), np.random.default_rng(seed)
        for indices in places.values():
            for index, other in zip(indices, rng.permutation(indices), strict=True):
                labels[index] = self.labels[other]
        return labels


def _answered(example: Sample) -> str:
    answers = example.answers if example.label is None else (example.answers[example.label],)
    return write_answers(example.text, answers)
