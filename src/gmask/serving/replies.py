"""The form of OpenAI's answers, whole and in chunks, and what can be said of one that is being written."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from gmask.generation.answers import Answer, AnswerStream, Finish, TextAssembler, token_texts
from gmask.generation.engine import Progress

FINISHES = {"end": "stop", "stop": "stop", "length": "length"}
"""OpenAI's word for why an answer is complete, by ours."""


@dataclass(frozen=True, slots=True)
class ToldToken:
    """A token as clients see it."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer."""

    index: int
    text: str
    tokens: tuple[ToldToken, ...]
    finish: str
    count: int  # tokens
    mean_logprob: float

    def numbered(self, index: int) -> "Choice":
        """The same in another place."""
        return replace(self, index=index)


@dataclass(frozen=True, slots=True)
class Piece:
    """What has become certain of one blank's answer since the last piece."""

    blank: int
    text: str
    tokens: tuple[ToldToken, ...]
    finish: Finish | None  # where it is complete


@dataclass
class Form:
    """How one request's answers are written down."""

    kind: Literal["chat", "text"]
    model: str
    logprobs: bool
    rounds_left_out: int = 0  # of the conversation, which had no room in the context
    prompts: Sequence[str] = ()  # of a completion: for the offsets of its tokens
    echoes: Sequence[tuple[ToldToken, ...]] | None = None  # the prompts' own tokens, if they are told as well
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    offsets: dict[int, int] = field(default_factory=dict)  # where a streamed choice's next token starts

    def head(self, suffix: str = "") -> dict[str, Any]:
        """What every answer and chunk begins with."""
        prefix, name = ("chatcmpl", "chat.completion") if self.kind == "chat" else ("cmpl", "text_completion")
        name += suffix if self.kind == "chat" else ""
        head = {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}
        return head | ({"rounds_left_out": self.rounds_left_out} if self.rounds_left_out else {})

    def whole(self, choices: Sequence[Choice], *, n: int, prompt_tokens: int) -> dict[str, Any]:
        """The answer at once; ``n`` choices for each prompt."""
        written = [self._write(choice, choice.index // n) for choice in choices]
        usage = count_tokens(prompt_tokens, sum(choice.count for choice in choices))
        return {**self.head(), "choices": written, "usage": usage}

    def _write(self, choice: Choice, prompt: int) -> dict[str, Any]:
        shared = {"index": choice.index, "finish_reason": choice.finish}
        if self.kind == "chat":
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return {**shared, "message": message, "logprobs": self._chat_logprobs(choice.tokens)}
        if self.echoes is None:
            text, tokens, offset = choice.text, choice.tokens, len(self.prompts[prompt])
        else:
            text, tokens, offset = self.prompts[prompt] + choice.text, self.echoes[prompt] + choice.tokens, 0
        return {**shared, "text": text, "logprobs": self._text_logprobs(tokens, offset)}

    def openings(self, choices: int) -> Iterator[dict[str, Any]]:
        """The chunks that say who speaks."""
        if self.kind == "chat":
            for index in range(choices):
                yield self._chat_chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, prompt: int, piece: Piece) -> dict[str, Any]:
        """The next words of a choice."""
        if self.kind == "chat":
            return self._chat_chunk(index, {"content": piece.text}, None, self._chat_logprobs(piece.tokens))
        offset = self.offsets.setdefault(index, len(self.prompts[prompt]))
        self.offsets[index] += sum(len(token.text) for token in piece.tokens)
        return self._text_chunk(index, piece.text, None, self._text_logprobs(piece.tokens, offset))

    def ending(self, index: int, finish: str) -> dict[str, Any]:
        """The last chunk of a choice."""
        if self.kind == "chat":
            return self._chat_chunk(index, {}, finish, None)
        return self._text_chunk(index, "", finish, None)

    def usage(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The chunk behind the last one, if it was asked for."""
        return {**self.head(".chunk"), "choices": [], "usage": count_tokens(prompt_tokens, completion_tokens)}

    def _chat_chunk(self, index: int, delta: dict[str, Any], finish: str | None, logprobs: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head(".chunk"), "choices": [choice]}

    def _text_chunk(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head(), "choices": [choice]}

    def _chat_logprobs(self, tokens: Sequence[ToldToken]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {**_spell(token.text, token.logprob), "top_logprobs": [_spell(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, tokens: Sequence[ToldToken], offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(reversed(token.top)) for token in tokens],  # of equal spellings the best stays
            "text_offset": offsets,
        }


def _spell(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def count_tokens(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Usage(BaseModel):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Message(BaseModel):
    """The reply."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One of the replies."""

    index: int
    message: Message
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class ChatCompletion(BaseModel):
    """The answer of ``/v1/chat/completions``; a stream has OpenAI's chunks."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One of the answers."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class Completion(BaseModel):
    """The answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(BaseModel):
    """The vector of a text, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """The answer of ``/v1/embeddings``."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


Settle = Callable[[str, bool], str]
"""What is certain of a blank's text, given whether that is the whole answer."""

Tops = tuple[tuple[tuple[int, float], ...], ...]
"""For each token the most probable ones at its place, with their log-probabilities."""


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
