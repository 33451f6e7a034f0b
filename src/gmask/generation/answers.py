"""Answers: as token ids, as text, in a filled text, and while they are written."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from gmask.generation.encoding import BlankedText, Context
from gmask.generation.settings import Sampling

Finish = Literal["end", "stop", "length"]
"""Why an answer ended: by its end token, a stop text, or the limit on its tokens."""


ROUNDING = 1e-5
"""Scores in nats that differ by less are equal but for rounding, which is another in another batch."""


def rank_scores(scores: Sequence[float]) -> list[int]:
    """Returns the indices of scores, highest first; of those that are equal but for rounding, the first one first."""
    ranking: list[int] = []
    equal: list[int] = []
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        if equal and not scores[equal[0]] - scores[index] <= ROUNDING:
            ranking += sorted(equal)
            equal = []
        equal.append(index)
    return ranking + sorted(equal)


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens of one blank. Log-probabilities are the model's, in nats, over the whole vocabulary."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    end_logprob: float | None = None  # of the end token, if that ended it
    finish: Finish | None = None  # None while it grows
    is_greedy: tuple[bool, ...] = ()  # of a given answer: whether each token is the most probable one

    @property
    def logprob(self) -> float:
        return sum(self.logprobs) + (self.end_logprob or 0.0)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """The answers to the blanks of one text so far."""

    text: int  # index of its context in the batch
    alternative: int  # index among the samples of this text
    context: Context
    done: tuple[Answer, ...] = ()
    open: Answer = Answer()
    logprob: float = 0.0
    stops: "StopMatcher | None" = None  # of the open answer, where there are stop texts

    @property
    def is_complete(self) -> bool:
        return len(self.done) == len(self.context.blanks)

    @property
    def predicted(self) -> int:
        """Tokens predicted so far, over all blanks, end tokens counted."""
        ended = sum(len(answer.ids) + (answer.end_logprob is not None) for answer in self.done)
        return ended + len(self.open.ids)

    def score(self, length_penalty: float) -> float:
        """The log-probability divided by the number of tokens predicted, raised to the penalty."""
        score: float = self.logprob / max(1, self.predicted) ** length_penalty
        return score

    def advance(self, token: int, logprob: float, sampling: Sampling, end_ids: Sequence[int]) -> "Hypothesis":
        """Returns the hypothesis with one more token, which may end the answer."""
        total = self.logprob + logprob
        if token in end_ids:
            return self._end(replace(self.open, end_logprob=logprob, finish="end"), total)
        ids = (*self.open.ids, token)
        logprobs = (*self.open.logprobs, logprob)
        stops = None if self.stops is None else self.stops.push(token)
        if stops is not None and stops.is_found:
            return self._end(Answer(ids, logprobs, finish="stop"), total)
        if len(ids) == sampling.max_tokens:
            return self._end(Answer(ids, logprobs, finish="length"), total)
        return Hypothesis(self.text, self.alternative, self.context, self.done, Answer(ids, logprobs), total, stops)

    def _end(self, answer: Answer, total: float) -> "Hypothesis":
        """Returns the hypothesis with the open answer done, at its next blank if there is one."""
        stops = None if self.stops is None else self.stops.begin()
        return replace(self, done=(*self.done, answer), open=Answer(), logprob=total, stops=stops)

    def next_input(self, sop: int) -> tuple[int, int, int]:
        """The token to feed, its position in the context and its position in the answer."""
        position = self.context.blanks[len(self.done)]
        if not self.open.ids:
            return sop, position, 1
        return self.open.ids[-1], position, len(self.open.ids) + 1


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer. Where several tokens spell one character, the last of them has it as its text."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Blank:
    """The answer to one blank.

    Log-probabilities are in nats and the model's own: over its whole vocabulary, before temperature, top-k, top-p,
    ``min_tokens`` and the ban on special tokens are applied.
    """

    text: str  # as it stands in the filled text
    logprob: float  # sum over the tokens and the end token
    tokens: tuple[Token, ...]  # without the end token
    end_logprob: float | None  # of the end token; None if something else ended the answer
    finish: Finish  # "end", "stop" (a stop text) or "length" (cut at max_tokens)
    start: int  # the answer is text[start:end] of the filled text
    end: int

    @property
    def finished(self) -> bool:
        """False for an answer that was cut at ``max_tokens``."""
        return self.finish != "length"


@dataclass(frozen=True, slots=True)
class Combination:
    """One choice for every blank."""

    texts: tuple[str, ...]  # as given
    logprob: float  # of all answers jointly, in nats
    probability: float  # among the combinations scored


@dataclass(frozen=True, slots=True)
class Choices:
    """The scored combinations of choices."""

    exact: bool  # True: all combinations were scored; False: those that a beam search kept
    combinations: tuple[Combination, ...]  # best first


@dataclass(frozen=True, slots=True)
class Infilling:
    """A text with its blanks filled."""

    text: str
    blanks: tuple[Blank, ...]
    logprob: float  # sum over the blanks
    alternatives: tuple["Infilling", ...] = ()  # the next best, if n > 1, best first
    choices: Choices | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``gmask infill --json`` prints.

        ``{"text", "logprob", "blanks": [{"text", "logprob", "tokens": [{"id", "text", "logprob"}]}]}``. A blank that
        was cut has ``"finished": false`` as well; ``alternatives`` and ``choices`` are there when they were asked for.
        """
        values: dict[str, Any] = {
            "text": self.text,
            "logprob": self.logprob,
            "blanks": [_blank_to_dict(blank) for blank in self.blanks],
        }
        if self.alternatives:
            values["alternatives"] = [infilling.to_dict() for infilling in self.alternatives]
        if self.choices:
            combinations = [
                {"texts": list(found.texts), "logprob": found.logprob, "probability": found.probability}
                for found in self.choices.combinations
            ]
            values["choices"] = {"exact": self.choices.exact, "combinations": combinations}
        return values


def _blank_to_dict(blank: Blank) -> dict[str, Any]:
    tokens = [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in blank.tokens]
    values: dict[str, Any] = {"text": blank.text, "logprob": blank.logprob, "tokens": tokens}
    return values if blank.finished else {**values, "finished": False}


class TextAssembler:
    """Decodes the tokens of one answer as they come, and holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.continuation: str = getattr(tokenizer, "continuation", "")  # written before a piece inside a word
        self.count = 0  # tokens so far
        self.window: list[int] = []  # the latest tokens; a token's text may depend on those before it
        self.known = 0  # tokens of the window whose text has been returned
        self.has_begun = False  # some text has been returned
        self.new_text = ""  # of the tokens of the window behind these

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that it completes, which is empty inside a character."""
        self.window.append(token_id)
        self.count += 1
        text = self.new_text = self._read_new()
        if text.endswith("\ufffd"):
            return ""
        if text.strip():  # a token of white space or without text does not decide how the next one is decoded
            del self.window[: self.known]
        self.known = len(self.window)
        self.has_begun = True
        return text

    def finish(self) -> str:
        """Returns the text that was held back; bytes that make no character become the replacement character."""
        text = self._read_new()
        self.window, self.known, self.has_begun = [], 0, self.count > 0
        return text

    def copy(self) -> "TextAssembler":
        """Returns an independent copy."""
        other = copy.copy(self)
        other.window = self.window.copy()
        return other

    def _read_new(self) -> str:
        known = self._decode(self.window[: self.known])
        text = self._decode(self.window)[len(known) :]
        return text if self.has_begun else text.removeprefix(self.continuation)  # an answer may continue a word

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopMatcher:
    """Looks for stop texts in an answer, token by token. It is immutable, so that beams may share it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.stops = stops
        self.is_found = False
        self._assembler = TextAssembler(tokenizer)
        self._kept = max(map(len, stops)) - 1  # characters of the tail: a stop text may have begun in them
        self._tail = ""  # the last characters of the answer

    def push(self, token_id: int) -> "StopMatcher":
        """Returns the matcher after one more token."""
        after = copy.copy(self)
        after._assembler = self._assembler.copy()
        complete = after._assembler.push(token_id)
        text = self._tail + after._assembler.new_text  # an unfinished character counts as its replacement character
        after.is_found = any(stop in text for stop in self.stops)
        after._tail = (self._tail + complete)[-self._kept :] if self._kept else ""
        return after

    def begin(self) -> "StopMatcher":
        """Returns a matcher for the next answer."""
        return StopMatcher(self._assembler.tokenizer, self.stops)


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns a text for each token; joined, they are the text of the answer."""
    assembler = TextAssembler(tokenizer)
    texts = [assembler.push(token_id) for token_id in ids]
    if texts:
        texts[-1] += assembler.finish()
    return texts


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts in it."""
    found = [start for start in (text.find(stop) for stop in stops) if start >= 0]
    return text[: min(found)] if found else text


def answer_text(answer: Answer, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> str:
    """The text of an answer, without the stop text that ended it."""
    text = "".join(token_texts(answer.ids, tokenizer))
    return cut_at_stop(text, stops) if answer.finish == "stop" else text


def assemble_infilling(
    blanked: BlankedText, answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase, *, stops: Sequence[str] = ()
) -> Infilling:
    """Returns the text with its answers in place of the blanks."""
    texts = [token_texts(answer.ids, tokenizer) for answer in answers]
    raw = ["".join(parts) for parts in texts]
    filled = blanked.splice(
        [
            cut_at_stop(text, stops) if answer.finish == "stop" else text
            for text, answer in zip(raw, answers, strict=True)
        ]
    )
    blanks = []
    for answer, parts, text, span in zip(answers, texts, filled.answers, filled.spans, strict=True):
        assert answer.finish is not None, "an answer is spliced once it is complete"
        tokens = tuple(map(Token, answer.ids, parts, answer.logprobs))
        blanks.append(Blank(text, answer.logprob, tokens, answer.end_logprob, answer.finish, *span))
    return Infilling(filled.text, tuple(blanks), sum(blank.logprob for blank in blanks))


def stable_answer(blanked: BlankedText, blank: int) -> Callable[[str, bool], str]:
    """Returns the `AnswerStream.stable_text` of a blank: an answer as it stands in its text.

    Until the answer is whole, spaces at its end are held back: if they stay its last, the text may drop them.
    """
    return lambda text, is_whole: blanked.fit_answer(text if is_whole else text.rstrip(" "), blank)


class AnswerStream:
    """The text of one answer while it is written: as far as no further token can change it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stable_text: Callable[[str, bool], str], *, stops: Sequence[str]
    ) -> None:
        """``stable_text``: takes a text and True if it is the whole answer; returns the start that cannot change."""
        self.assembler = TextAssembler(tokenizer)
        self.stable_text = stable_text
        self.stops = stops
        self.text = ""  # of all tokens so far
        self.given = ""  # has been returned

    def take(self, answer: Answer) -> str:
        """Returns the text that has become certain since the last call."""
        for token_id in answer.ids[self.assembler.count :]:
            self.text += self.assembler.push(token_id)
        if answer.finish:
            self.text += self.assembler.finish()
            text = cut_at_stop(self.text, self.stops) if answer.finish == "stop" else self.text
        else:
            text = self._without_open_stop()
        certain = self.stable_text(text, answer.finish is not None)
        new = certain[len(self.given) :]
        self.given = certain
        return new

    def _without_open_stop(self) -> str:
        """The text without an ending that may be the start of a stop text."""
        keep = min((self._start_of(stop) for stop in self.stops), default=len(self.text))
        return self.text[:keep]

    def _start_of(self, stop: str) -> int:
        """The position of the longest ending of the text that is the start of a stop text; its length if none is."""
        longest = range(min(len(stop) - 1, len(self.text)), 0, -1)
        return len(self.text) - next((size for size in longest if self.text.endswith(stop[:size])), 0)
