"""Tasks: read from YAML, they make samples of records."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from gmask.config import OneOf, build_settings, field_names, load_tree, plain_values
from gmask.errors import GmaskError, nearest
from gmask.tasks.formats import READERS
from gmask.tasks.metrics import MetricLanguage, check_kind, check_metric
from gmask.tasks.questions import find_repeated, make_samples, stream_samples
from gmask.tasks.records import BlankToken, Direction, LikelihoodSettings, Record, Sample, TaskKind
from gmask.tasks.sources import DataSource
from gmask.tasks.templates import parse_template

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task as data: how a record becomes a sample, and which metrics measure the answers.

    Templates are those of `gmask.tasks.templates.parse_template`. The fields that each kind of task needs:

    - cloze, multiple-choice: ``template`` with one blank, ``label``, and ``choices`` or ``candidates``;
    - classification: ``template`` without a blank (or ``plain_template``), ``label``, ``choices``;
    - seq2seq: ``template`` with one blank, ``target``; or what a cloze has, whose right choice is then the target;
    - infill: ``template`` for a text with blanks; the answers are marked in the text, or are in the column ``answers``;
    - likelihood: ``template`` with one blank, ``target``, which is scored and not written;
    - language-model: ``template``;
    - chat: ``template`` of the prompt and ``target``, or ``messages``.
    """

    name: str
    kind: TaskKind
    template: str = ""
    plain_template: str | None = None  # of the text without a blank, for the kind classification
    label: str | None = None  # column
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)  # value of the label: template of the answer
    candidates: str | None = None  # column with a list of answers, instead of choices; the label is the index
    target: str | None = None  # template of the answer
    answers: str | None = None  # column with a list, one text a blank
    history: str | None = None  # column with the rounds before: a list of [prompt, reply], or of messages
    messages: str | None = None  # column with a whole conversation
    references: str | None = None  # column with a list of all texts that count as right
    group: str | None = None  # template of the name that the samples of one question share
    words: str | None = None  # column with the number of words of a document; without it the spaces of the text tell
    direction: Direction = "both"  # of scored texts: whether what stands before them is context, or written too
    window: int | None = None  # tokens, of the kind language-model; as of gmask.perplexity
    stride: int | None = None
    blank: BlankToken = "[MASK]"  # of the kind language-model: into which the text is written
    reader: Annotated[str, OneOf(READERS)] = "plain"  # of the format of the records
    metrics: tuple[str, ...] = ()
    best: str = "loss"  # "loss" or the metric by which the best checkpoint is chosen
    language: MetricLanguage | None = None  # of the answers, for the metrics
    source: str = ""  # paper or repository, and the licence of the data
    data: DataSource = dataclasses.field(default_factory=DataSource)  # where the records of an evaluation are found

    def fingerprint(self) -> str:
        """SHA-256 of all that the samples and the metrics depend on: of everything but where the records are found."""
        values = plain_values(self)
        del values["data"]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    @property
    def likelihood(self) -> LikelihoodSettings:
        """How given texts are scored."""
        return LikelihoodSettings(direction=self.direction, window=self.window, stride=self.stride, blank=self.blank)

    def samples(
        self,
        records: Iterable[Record],
        *,
        require_answers: bool = True,
        on_bad: Callable[[GmaskError], None] | None = None,
    ) -> list[Sample]:
        """The samples of records, in their order; arguments and errors as of `gmask.tasks.questions.make_samples`."""
        return make_samples(self, records, require_answers=require_answers, on_bad=on_bad)

    def stream(
        self,
        records: Iterable[Record],
        *,
        require_answers: bool = True,
        on_bad: Callable[[GmaskError], None] | None = None,
    ) -> Iterator[Sample]:
        """As `samples`, one after the other; records that give none are no error."""
        return stream_samples(self, records, require_answers=require_answers, on_bad=on_bad)


def task_names() -> list[str]:
    """The names of the tasks that come with gmask, such as "superglue/boolq"."""
    return sorted(path.relative_to(HERE).with_suffix("").as_posix() for path in HERE.glob("*/*.yaml"))


def load_task(name_or_path: str | Path) -> Task:
    """Reads a task: one of gmask's by its name, or a YAML file.

    Raises:
        GmaskError: no such task (with the nearest name), or what `read_task` raises.
    """
    return read_task({"use": str(name_or_path)})


def read_task(tree: Mapping[str, Any]) -> Task:
    """Makes a task of plain values, those of a YAML file or a recipe, and checks them.

    ``use: superglue/rte`` starts from another task, by its name or file; the other keys replace its values.

    Raises:
        GmaskError: an unknown or missing key, kind, metric or reader; a template that does not fit the kind.
    """
    values = _expand(tree, ())
    where = f"task {values.setdefault('name', 'custom')}"
    metrics = values.get("metrics") or ()
    if not isinstance(metrics, str | list | tuple):
        raise GmaskError(f"{where}: metrics is {metrics!r}: expected a list of names")
    values["metrics"] = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    values["choices"] = _read_choices(values.get("choices") or {}, where)
    values.setdefault("best", values["metrics"][0] if values["metrics"] else "loss")
    task = build_settings(Task, values, f"{where}: ", title=where)
    for metric in task.metrics:
        check_metric(metric)
    if task.best not in ("loss", *task.metrics):
        raise GmaskError(f"{where}: best is {task.best}: choose loss or one of the metrics")
    try:
        _check_fields(task)
    except GmaskError as error:
        raise GmaskError(f"{where}: {error}") from error
    return task


def _expand(tree: Mapping[str, Any], users: tuple[str, ...]) -> dict[str, Any]:
    """The values of a task, completed by those of the task that it uses.

    Args:
        users: the tasks that use this one.
    """
    values = dict(tree)
    if (name := values.pop("use", None)) is None:
        return values
    if name in users:
        raise GmaskError(f"the task {name} uses itself")
    known = task_names()
    path = HERE / f"{name}.yaml" if name in known else Path(str(name))
    if not path.is_file():
        raise GmaskError(f"there is no task {name}: the nearest of gmask's is {nearest(name, known)}, or name a file")
    used = load_tree(path, (), field_names(Task))
    base = {**_expand(used, (*users, name)), "name": used.get("name", name if name in known else path.stem)}
    if "metrics" in values:
        base.pop("best", None)
    return {**base, **values}


def _read_choices(choices: Any, where: str) -> dict[str, str]:
    """The text of each label, from a mapping or from a list of texts, whose labels are 0, 1, ..."""
    if isinstance(choices, list):
        choices = dict(enumerate(choices))
    if not isinstance(choices, Mapping):
        raise GmaskError(f"{where}: choices is {choices!r}: write label: text pairs, or a list of texts")
    for label, text in choices.items():
        if not isinstance(text, str) or not text:
            hint = "; YAML reads Yes and No as truth values, so put them in quotes" if isinstance(text, bool) else ""
            raise GmaskError(f"{where}: the choice {label} is {text!r}, not a text{hint}")
    if (twice := find_repeated(list(choices.values()))) is not None:
        raise GmaskError(f"{where}: two choices have the same answer, {twice!r}")
    labels = [str(label).lower() if isinstance(label, bool) else str(label).strip() for label in choices]
    if (twice := find_repeated(labels)) is not None:
        raise GmaskError(f"{where}: two choices have the same label, {twice!r}")
    return dict(zip(labels, choices.values(), strict=True))


def _check_fields(task: Task) -> None:
    """Raises `GmaskError` for a field that the kind needs and lacks, and for a template that does not fit it."""
    needed = {
        "cloze": ["template", "label"],
        "multiple-choice": ["template", "label"],
        "classification": ["template", "label", "choices"],
        "seq2seq": ["template", "label" if task.choices or task.candidates else "target"],
        "infill": ["template"],
        "likelihood": ["template", "target"],
        "language-model": ["template"],
        "chat": [] if task.messages else ["template", "target"],
    }[task.kind]
    if missing := [name for name in needed if not getattr(task, name)]:
        raise GmaskError(f"the kind {task.kind} needs {' and '.join(missing)}")
    if task.kind in ("cloze", "multiple-choice") and bool(task.choices) == bool(task.candidates):
        raise GmaskError(f"the kind {task.kind} needs either choices or candidates")
    for template in (task.target, task.group, *task.choices.values()):
        parse_template(template or "")
    text = task.plain_template or task.template if task.kind == "classification" else task.template
    blanks = len(parse_template(text).blanks)
    if task.kind in ("classification", "language-model", "chat") and blanks:
        hint = ": give plain_template" if task.kind == "classification" else ""
        raise GmaskError(f"the kind {task.kind} has no blank, and the template has {blanks}{hint}")
    if blanks > 1 and task.kind != "infill":
        raise GmaskError(f"the kind {task.kind} is about one blank, and the template has {blanks}")
    for metric in task.metrics:
        check_kind(metric, task.kind)
