"""What does one question of a task look like, and what does a model answer to it?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TaskKind = Literal["cloze", "multiple-choice", "classification", "seq2seq", "infill", "language-model", "chat"]

CHOICES: tuple[TaskKind, ...] = ("cloze", "multiple-choice")
"""The kinds whose answers are candidates."""

LABELLED: tuple[TaskKind, ...] = (*CHOICES, "classification")
"""The kinds whose predictions have a label; those of the others have texts."""

Truncation = Literal["left", "right"]
"""Where a text that is too long loses tokens: before its first blank and then at its end, or at its end alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question and what is known of its answer.

    By kind:

    - cloze, multiple-choice: ``text`` has one blank, ``answers`` are the candidates, ``label`` the index of the
      right one;
    - classification: ``text`` has no blank, ``label`` is the class;
    - seq2seq: ``text`` has one blank, ``answers`` is ``(target,)``;
    - infill: ``text`` has n blanks, ``answers`` their n texts;
    - language-model: ``answers`` is ``(document,)``;
    - chat: ``history`` holds the rounds before, ``text`` the prompt, ``answers`` is ``(reply,)``.

    A backslash before a blank in ``text`` makes it plain text, as in `gmask.infill`; a chat has no such escapes.
    What is not known is ``()`` or None. ``group`` names the samples that a metric takes together (a MultiRC question, a
    ReCoRD query). ``references`` are all the texts that a metric counts as right, where these are not
    ``answers[label]``. ``path`` and ``line`` say where the sample was read.
    """

    text: str = ""
    answers: tuple[str, ...] = ()
    label: int | None = None
    history: tuple[tuple[str, str], ...] = ()
    group: str | None = None
    references: tuple[str, ...] = ()
    path: Path | None = None
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model answers: the most probable candidate or class, the log-probability of each in nats, and the texts
    that it wrote, one a blank."""

    label: int | None = None
    scores: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()
