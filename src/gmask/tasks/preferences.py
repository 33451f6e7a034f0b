"""Preferences: which of several answers to a prompt is better, read from the forms that they are published in.

The forms are told apart by their columns:

- TRL's: ``prompt``, ``chosen``, ``rejected``, as texts, as messages, or as ids (``prompt_ids``, ``chosen_ids``,
  ``rejected_ids``); messages may leave the prompt out. For KTO: ``prompt``, ``completion``, ``label``.
- Ranking lists, as published in sunzeyeah/RLHF: ``prompt``, ``prefix``, ``system``, ``answers`` of ``answer`` and
  ``score``.
- ShareGPT's: ``conversations`` (or ``messages``) and the replies ``chosen`` and ``rejected``; for KTO with the reply as
  last message, and ``label``.
- hh-rlhf's: ``chosen`` and ``rejected`` are whole conversations, marked by ``Human:`` and ``Assistant:``.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gmask.conversation import Round, read_content, read_conversation
from gmask.errors import GmaskError
from gmask.files import check_text
from gmask.tasks.records import Record, Values, read_records

Pairing = Literal["all", "neighbours"]
"""The pairs of a ranking list: every answer with every worse one, or with those of the next worse score."""

GivenAnswer: TypeAlias = str | tuple[int, ...]
"""The text of an answer, or its ids with its end token."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt: the last message of the user and the rounds before it; or the ids of all that precedes an answer."""

    text: str = ""
    rounds: tuple[Round, ...] = ()
    ids: tuple[int, ...] | None = None  # up to and with <sop>


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPair:
    """Two answers to a question, of which one is better."""

    question: Question
    chosen: GivenAnswer
    rejected: GivenAnswer
    margin: float | None = None  # by how much it is better, if the data says so
    kind: str = "all"  # of pair, for the report
    location: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """An answer that is desirable, or is not."""

    question: Question
    answer: GivenAnswer
    is_good: bool
    kind: str = "all"
    location: str = ""


@dataclass(slots=True)
class Intake:
    """What was read, and what was dropped or cut on the way, each with its reason and the first place of it."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, location: str, count: int = 1) -> None:
        self.dropped[reason] += count
        self.first.setdefault(reason, location)

    def shorten(self, reason: str, location: str) -> None:
        self.cut[reason] += 1
        self.first.setdefault(reason, location)

    @property
    def kept(self) -> int:
        return self.read - self.dropped.total()

    def to_dict(self) -> dict[str, Any]:
        return {"read": self.read, "used": self.kept, "dropped": dict(self.dropped), "cut": dict(self.cut)}

    def lines(self, noun: str) -> list[str]:
        """The table of a start: how many, what, and where first."""
        rows = [(self.read, f"{noun} read", "")]
        rows += [(count, f"dropped: {why}", self.first[why]) for why, count in self.dropped.most_common()]
        rows += [(count, f"cut: {why}", self.first[why]) for why, count in self.cut.most_common()]
        rows.append((self.kept, f"{noun} used", ""))
        width = max(len(f"{count:,}") for count, _, _ in rows)
        return [f"{count:>{width},}  {what}" + (f" (first in {where})" if where else "") for count, what, where in rows]


class _DroppedError(GmaskError):
    """A record, or a pair of it, that teaches nothing; the message is the reason."""


def read_preferences(
    pattern: str | Path, intake: Intake, *, pairing: Pairing = "all", limit: int | None = None
) -> list[AnswerPair]:
    """Reads the pairs of files; those that teach nothing are counted in ``intake``.

    Args:
        pattern: a path or a glob, as of `read_records`.
        pairing: the pairs of ranking lists.
        limit: read no more than so many records.

    Raises:
        GmaskError: a record of none of the forms, with file and line; no pair is left.
    """
    found = list[AnswerPair]()
    for record in read_records(pattern, limit=limit):
        for pair in _located(_pairs_of(record, intake, pairing), record):
            intake.read += 1
            try:
                _check_pair(pair)
            except _DroppedError as error:
                intake.drop(str(error), record.location)
            else:
                found.append(pair)
    if not found:
        reasons = ", ".join(f"{count} {why}" for why, count in intake.dropped.most_common())
        raise GmaskError(f"{pattern}: no pair is left" + (f" ({reasons})" if reasons else ""))
    return found


def read_judgements(pattern: str | Path, intake: Intake, *, limit: int | None = None) -> list[Judgement]:
    """Reads answers with labels, for KTO; a pair is a good and a bad one.

    Arguments and errors as of `read_preferences`.
    """
    found = list[Judgement]()
    for record in read_records(pattern, limit=limit):
        for one in _located(_judgements_of(record, intake), record):
            intake.read += 1
            if _is_empty(one.answer):
                intake.drop("the answer is empty", record.location)
            else:
                found.append(one)
    if not found:
        raise GmaskError(f"{pattern}: no answer with a label is left")
    return found


def _located(found: Iterator[Any], record: Record) -> Iterator[Any]:
    """Yields what is read of a record; errors name its file and line."""
    try:
        yield from found
    except GmaskError as error:
        raise GmaskError(f"{record.location}: {error}") from error


def _pairs_of(record: Record, intake: Intake, pairing: Pairing) -> Iterator[AnswerPair]:
    values = record.values
    if "answers" in values:
        yield from _rank(record, intake, pairing)
        return
    question: Question
    chosen: GivenAnswer
    rejected: GivenAnswer
    if "chosen_ids" in values:
        question, chosen, rejected = _read_id_pair(values)
    elif "chosen" not in values or "rejected" not in values:
        columns = ", ".join(values)
        raise GmaskError(
            f"no preference: it needs chosen and rejected, or answers with scores; the columns are {columns}"
        )
    elif any(name in values for name in ("conversations", "messages")):
        question = _question_of(values.get("conversations", values.get("messages")))
        chosen, rejected = _reply_of(values["chosen"]), _reply_of(values["rejected"])
    elif "prompt" not in values and isinstance(values["chosen"], str):
        question, chosen, rejected = _split_transcripts(values["chosen"], values["rejected"])
    elif "prompt" not in values:
        question, chosen, rejected = _split_messages(values["chosen"], values["rejected"])
    else:
        question = _question_of(values["prompt"])
        chosen, rejected = _reply_of(values["chosen"]), _reply_of(values["rejected"])
    yield AnswerPair(
        question=question,
        chosen=chosen,
        rejected=rejected,
        margin=_number(values["margin"], "margin") if values.get("margin") is not None else None,
        kind=str(values.get("kind") or "all"),
        location=record.location,
    )


def _rank(record: Record, intake: Intake, pairing: Pairing) -> Iterator[AnswerPair]:
    """The pairs of a ranking list in any order; the margin is the difference of the scores.

    The published code kept the better answer of an earlier pair, so that an unsorted list gave inverted pairs.
    """
    values = record.values
    answers = values["answers"]
    if not isinstance(answers, list) or not all(isinstance(one, Mapping) for one in answers):
        raise GmaskError("answers is not a list of objects with answer and score")
    scored = [(_number(_need(one, "score"), "score"), _text(_need(one, "answer"))) for one in answers]
    if len(scored) < 2:
        intake.read += 1
        intake.drop("a list of one answer has no pair", record.location)
        return
    parts = [values.get(name) for name in ("system", "prompt", "prefix")]
    question = Question("\n".join(_text(part) for part in parts if part))
    ranked = sorted(scored, key=lambda one: -one[0])
    levels = sorted({score for score, _ in ranked}, reverse=True)
    next_worse = dict(itertools.pairwise(levels))
    for index, (score, answer) in enumerate(ranked):
        for other_score, other in ranked[index + 1 :]:
            if score == other_score:
                if pairing == "all" or len(levels) == 1:
                    intake.read += 1
                    intake.drop("a tie: the scores are equal", record.location)
                continue
            if pairing == "neighbours" and other_score != next_worse[score]:
                continue
            yield AnswerPair(
                question=question,
                chosen=answer,
                rejected=other,
                margin=score - other_score,
                kind=str(values.get("kind") or "all"),
                location=record.location,
            )


def _judgements_of(record: Record, intake: Intake) -> Iterator[Judgement]:
    values = record.values
    if "label" not in values:
        for pair in _pairs_of(record, intake, "all"):
            for said, is_good in ((pair.chosen, True), (pair.rejected, False)):
                yield Judgement(
                    question=pair.question, answer=said, is_good=is_good, kind=pair.kind, location=pair.location
                )
        return
    label = values["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise GmaskError(f"the label is {label!r:.40}: write true for a good answer, false for a bad one")
    question: Question
    answer: GivenAnswer
    if "completion_ids" in values:
        question, answer = Question(ids=_ids(values, "prompt_ids")), _ids(values, "completion_ids")
    elif "completion" in values:
        question, answer = _question_of(_need(values, "prompt")), _reply_of(values["completion"])
    else:
        name = "conversations" if "conversations" in values else "messages"
        conversation = read_conversation(_need(values, name))
        if conversation.query is not None or not conversation.rounds:
            raise GmaskError(f"{name} with a label ends with the answer that it is about")
        *rounds, (text, answer) = conversation.rounds
        question = Question(text, tuple(rounds))
    yield Judgement(
        question=question,
        answer=answer,
        is_good=bool(label),
        kind=str(values.get("kind") or "all"),
        location=record.location,
    )


def _check_pair(pair: AnswerPair) -> None:
    if _is_empty(pair.chosen) or _is_empty(pair.rejected):
        raise _DroppedError("an answer is empty")
    if pair.chosen == pair.rejected:
        raise _DroppedError("the answers are equal")
    if pair.margin is not None and pair.margin < 0:
        raise _DroppedError("the margin is negative")


def _is_empty(answer: GivenAnswer) -> bool:
    return not (answer.strip() if isinstance(answer, str) else answer)


def _question_of(prompt: Any) -> Question:
    """A prompt that is a text, or a conversation that ends with a message of the user."""
    if isinstance(prompt, str):
        return Question(check_text(prompt))
    if isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        raise GmaskError("a prompt of ids goes into the column prompt_ids, beside chosen_ids and rejected_ids")
    conversation = read_conversation(prompt)
    return Question(conversation.require_query(), conversation.rounds)


def _reply_of(reply: Any) -> str:
    """The text of a reply: a text, a message, or a list of one message."""
    if isinstance(reply, str):
        return check_text(reply).strip()
    messages = [reply] if isinstance(reply, Mapping) else reply
    conversation = read_conversation(messages)
    if not conversation.is_greeted or len(conversation.rounds) != 1 or conversation.query is not None:
        raise GmaskError("an answer is one message of the assistant")
    return conversation.rounds[0][1].strip()


def _split_messages(chosen: Any, rejected: Any) -> tuple[Question, str, str]:
    """The prompt that two conversations share, and the last reply of each."""
    both = [read_conversation(messages) for messages in (chosen, rejected)]
    if any(one.query is not None or not one.rounds for one in both):
        raise GmaskError("chosen and rejected without a prompt are conversations that end with an answer")
    (*rounds, (text, better)), (*others, (other_text, worse)) = (one.rounds for one in both)
    if (rounds, text) != (others, other_text):
        raise GmaskError("chosen and rejected differ before their last answers")
    return Question(text, tuple(rounds)), better.strip(), worse.strip()


SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")


def _split_transcripts(chosen: Any, rejected: Any) -> tuple[Question, str, str]:
    """As `_split_messages`, of hh-rlhf's transcripts."""
    return _split_messages(_messages_of(_text(chosen)), _messages_of(_text(rejected)))


def _messages_of(transcript: str) -> list[dict[str, str]]:
    """Source: Bai et al., "Training a Helpful and Harmless Assistant", 2022, the data of anthropics/hh-rlhf."""
    before, *parts = SPEAKER.split(f"\n\n{transcript}")
    if before.strip() or not parts:
        raise GmaskError("chosen and rejected are texts without a prompt, and no transcripts of Human: and Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": text.strip()} for name, text in zip(parts[::2], parts[1::2], strict=True)]


def _read_id_pair(values: Values) -> tuple[Question, tuple[int, ...], tuple[int, ...]]:
    return Question(ids=_ids(values, "prompt_ids")), _ids(values, "chosen_ids"), _ids(values, "rejected_ids")


def _ids(values: Values, name: str) -> tuple[int, ...]:
    ids = _need(values, name)
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(type(one) is int and one >= 0 for one in ids):
        raise GmaskError(f"{name} is not a list of token ids")
    return tuple(ids)


def _need(values: Values, name: str) -> Any:
    if values.get(name) is None:
        raise GmaskError(f"there is no {name}; the columns are {', '.join(values)}")
    return values[name]


def _text(value: Any) -> str:
    return read_content(value).strip()


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GmaskError(f"the {name} is {value!r:.40}, where a number is expected")
    return float(value)
