"""What can be told of an answer that an engine is writing?"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from gmask.generation.answers import TextAssembler, token_texts
from gmask.generation.decoding import Answer, Finish
from gmask.generation.requests import Progress
from gmask.generation.streaming import AnswerStream

Settle = Callable[[str, bool], str]
"""What is certain of a blank's text, given whether that is the whole answer."""

Tops = tuple[tuple[tuple[int, float], ...], ...]
"""For each token the most probable ones at its place, with their log-probabilities."""


@dataclass(frozen=True, slots=True)
class ToldToken:
    """A token as clients see it."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What has become certain of one blank's answer since the last piece."""

    blank: int
    text: str
    tokens: tuple[ToldToken, ...]
    finish: Finish | None  # where it is complete


def blank_of(progress: Progress) -> int:
    """Which blank the log-probabilities of a progress belong to: the open one, or the one that was just completed."""
    return len(progress.done) if progress.open.ids else max(0, len(progress.done) - 1)


class SampleReader:
    """Follows one sample, and tells what is new in it; nothing is ever taken back."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settles: Sequence[Settle], stops: Sequence[str], *, logprobs: bool
    ) -> None:
        """``settles`` has one for each blank."""
        self.tokenizer = tokenizer
        self.settles = settles
        self.stops = stops
        self.logprobs = logprobs
        self.blank = 0  # the one that is being read
        self._open_stream()

    def _open_stream(self) -> None:
        self.told = 0  # tokens
        self.names = TextAssembler(self.tokenizer)
        if self.blank < len(self.settles):
            self.stream = AnswerStream(self.tokenizer, self.settles[self.blank], stops=self.stops)

    def read(self, progress: Progress, tops: dict[int, Tops]) -> Iterator[Piece]:
        """The new pieces; an answer that was cut off from outside counts as one that was cut for its length."""
        while self.blank < len(progress.done):
            yield self._take(progress.done[self.blank], tops)
            self.blank += 1
            self._open_stream()
        if self.blank < len(self.settles):
            if progress.end is not None:
                yield self._take(replace(progress.open, finish="length"), tops)
            elif progress.open.ids:
                yield self._take(progress.open, tops)

    def _take(self, answer: Answer, tops: dict[int, Tops]) -> Piece:
        tokens: tuple[ToldToken, ...] = ()
        if self.logprobs:
            tokens = self._tell_tokens(answer, tops.get(self.blank, ()))
        self.told = len(answer.ids)
        return Piece(self.blank, self.stream.take(answer), tokens, answer.finish)

    def _tell_tokens(self, answer: Answer, tops: Tops) -> tuple[ToldToken, ...]:
        texts = [self.names.push(token_id) for token_id in answer.ids[self.told :]]
        if answer.finish and texts:
            texts[-1] += self.names.finish()
        return tuple(
            ToldToken(text, answer.logprobs[place], name_tokens(tops[place] if tops else (), self.tokenizer))
            for place, text in enumerate(texts, start=self.told)
        )


def name_tokens(
    tokens: Iterable[tuple[int, float]], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str, float], ...]:
    """Tokens and their log-probabilities, by their texts."""
    return tuple(("".join(token_texts([token_id], tokenizer)), logprob) for token_id, logprob in tokens)
