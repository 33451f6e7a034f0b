"""OpenAI's replies, whole and in chunks, and the text of answers that are being written.

The pydantic classes define the bodies of the replies, and the documentation at /docs. Unset fields are not sent.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi.responses import Response
from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerBase

from gmask.generation.answers import Answer, AnswerStream, Finish, TextAssembler, token_texts
from gmask.generation.engine import SampleProgress

FinishReason = Literal["stop", "length"]
FINISH_REASONS: dict[Finish, FinishReason] = {"end": "stop", "stop": "stop", "length": "length"}
"""OpenAI's ``finish_reason`` by our `Finish`."""


class Usage(BaseModel):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


def count_usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Returns the usage of a request and its answers."""
    total = prompt_tokens + completion_tokens
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)


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


class RatedAnswer(BaseModel):
    """The reward of an answer, by the names of vLLM: ``probs`` has it alone."""

    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class Classification(BaseModel):
    """The answer of ``/classify``."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[RatedAnswer]
    usage: Usage


class TopLogprob(BaseModel):
    """A token that was probable, with its bytes in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of a reply, beside the most probable ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a reply."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """The tokens of a completion, and where each begins in prompt and answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Message(BaseModel):
    """The reply."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the replies."""

    index: int
    message: Message
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class ChatCompletion(BaseModel):
    """The answer of ``/v1/chat/completions``; a stream has OpenAI's chunks."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    rounds_left_out: int = Field(default=0, description="Of the conversation, the oldest ones, which had no room.")
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What a chunk adds to a reply."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(BaseModel):
    """What a chunk says of one of the replies."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """A part of a streamed reply."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    rounds_left_out: int = 0
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(BaseModel):
    """One of the answers."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: TextLogprobs | None


class Completion(BaseModel):
    """The answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(BaseModel):
    """What a chunk says of one of the answers."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None


class CompletionChunk(BaseModel):
    """A part of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: Usage | None = None


def json_response(reply: BaseModel) -> Response:
    """Returns the HTTP response of a reply, without the fields that are not set."""
    return Response(reply.model_dump_json(exclude_unset=True), media_type="application/json")


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """The text of a token, its log-probability, and the most probable tokens beside it."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class CompletedSample:
    """One answer to a request."""

    text: str
    tokens: tuple[ScoredToken, ...]
    finish: Finish
    count: int  # tokens
    mean_logprob: float


@dataclass(frozen=True, slots=True)
class Delta:
    """The new part of one blank's answer."""

    blank: int
    text: str
    tokens: tuple[ScoredToken, ...]
    finish: Finish | None  # None while the answer is not complete


class ReplyBuilder(ABC):
    """Builds the reply to one request: whole, or chunk by chunk.

    Args:
        model: the name that the client gave.
        logprobs: True to send the tokens with their log-probabilities.
    """

    id_prefix: str

    def __init__(self, model: str, *, logprobs: bool) -> None:
        self.logprobs = logprobs
        self.head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def whole(self, samples: Sequence[CompletedSample], *, n: int, prompt_tokens: int) -> BaseModel:
        """Returns the whole reply; it has ``n`` samples for each prompt, prompt by prompt."""

    def openings(self, samples: int) -> Iterator[BaseModel]:
        """Yields the chunks before the first text."""
        return iter(())

    @abstractmethod
    def chunk(self, index: int, prompt: int, delta: Delta) -> BaseModel:
        """Returns the chunk of the next part of a sample."""

    @abstractmethod
    def ending(self, index: int, finish: Finish) -> BaseModel:
        """Returns the last chunk of a sample."""

    @abstractmethod
    def usage(self, prompt_tokens: int, completion_tokens: int) -> BaseModel:
        """Returns the chunk with the usage, which a client may ask for."""


class ChatBuilder(ReplyBuilder):
    """Builds replies of ``/v1/chat/completions``.

    Args:
        rounds_left_out: of the conversation, the oldest ones, which did not fit into the context.
    """

    id_prefix = "chatcmpl"

    def __init__(self, model: str, *, logprobs: bool, rounds_left_out: int) -> None:
        super().__init__(model, logprobs=logprobs)
        if rounds_left_out:
            self.head["rounds_left_out"] = rounds_left_out

    def whole(self, samples: Sequence[CompletedSample], *, n: int, prompt_tokens: int) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=Message(role="assistant", content=sample.text, refusal=None),
                finish_reason=FINISH_REASONS[sample.finish],
                logprobs=self._logprobs(sample.tokens),
            )
            for index, sample in enumerate(samples)
        ]
        usage = count_usage(prompt_tokens, sum(sample.count for sample in samples))
        return ChatCompletion(**self.head, object="chat.completion", choices=choices, usage=usage)

    def openings(self, samples: int) -> Iterator[ChatChunk]:
        for index in range(samples):
            yield self._chunk(index, ChatDelta(role="assistant", content=""))

    def chunk(self, index: int, prompt: int, delta: Delta) -> ChatChunk:
        return self._chunk(index, ChatDelta(content=delta.text), logprobs=self._logprobs(delta.tokens))

    def ending(self, index: int, finish: Finish) -> ChatChunk:
        return self._chunk(index, ChatDelta(), finish=FINISH_REASONS[finish])

    def usage(self, prompt_tokens: int, completion_tokens: int) -> ChatChunk:
        usage = count_usage(prompt_tokens, completion_tokens)
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=[], usage=usage)

    def _chunk(
        self, index: int, delta: ChatDelta, *, finish: FinishReason | None = None, logprobs: ChatLogprobs | None = None
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=[choice])

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs | None:
        if not self.logprobs:
            return None
        content = [
            {**_spell(token.text, token.logprob), "top_logprobs": [_spell(*top) for top in token.top]}
            for token in tokens
        ]
        return ChatLogprobs.model_validate({"content": content, "refusal": None})  # one call: half the time of many


def _spell(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


class CompletionBuilder(ReplyBuilder):
    """Builds replies of ``/v1/completions``.

    Args:
        prompts: their lengths are the offsets of the first tokens.
        echoes: the tokens of the prompts, if answers begin with their prompts.
    """

    id_prefix = "cmpl"

    def __init__(
        self,
        model: str,
        *,
        logprobs: bool,
        prompts: Sequence[str],
        echoes: Sequence[tuple[ScoredToken, ...]] | None = None,
    ) -> None:
        super().__init__(model, logprobs=logprobs)
        self.prompts, self.echoes = prompts, echoes
        self.offsets: dict[int, int] = {}  # of the next token of each streamed sample

    def whole(self, samples: Sequence[CompletedSample], *, n: int, prompt_tokens: int) -> Completion:
        choices = [self._choice(index, index // n, sample) for index, sample in enumerate(samples)]
        usage = count_usage(prompt_tokens, sum(sample.count for sample in samples))
        return Completion(**self.head, object="text_completion", choices=choices, usage=usage)

    def _choice(self, index: int, prompt: int, sample: CompletedSample) -> TextChoice:
        text, tokens, offset = sample.text, sample.tokens, len(self.prompts[prompt])
        if self.echoes is not None:
            text, tokens, offset = self.prompts[prompt] + text, self.echoes[prompt] + tokens, 0
        return TextChoice(
            index=index,
            text=text,
            finish_reason=FINISH_REASONS[sample.finish],
            logprobs=self._logprobs(tokens, offset),
        )

    def chunk(self, index: int, prompt: int, delta: Delta) -> CompletionChunk:
        offset = self.offsets.setdefault(index, len(self.prompts[prompt]))
        self.offsets[index] += sum(len(token.text) for token in delta.tokens)
        return self._chunk(index, delta.text, None, self._logprobs(delta.tokens, offset))

    def ending(self, index: int, finish: Finish) -> CompletionChunk:
        return self._chunk(index, "", FINISH_REASONS[finish], None)

    def usage(self, prompt_tokens: int, completion_tokens: int) -> CompletionChunk:
        usage = count_usage(prompt_tokens, completion_tokens)
        return CompletionChunk(**self.head, object="text_completion", choices=[], usage=usage)

    def _chunk(
        self, index: int, text: str, finish: FinishReason | None, logprobs: TextLogprobs | None
    ) -> CompletionChunk:
        choice = TextChunkChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)
        return CompletionChunk(**self.head, object="text_completion", choices=[choice])

    def _logprobs(self, tokens: Sequence[ScoredToken], offset: int) -> TextLogprobs | None:
        if not self.logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return TextLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[dict(reversed(token.top)) for token in tokens],  # of equal texts the best one is kept
            text_offset=offsets,
        )


StableText = Callable[[str, bool], str]
"""Takes a text, and True if it is the whole answer; returns its start that no further token can change."""

TopLogprobs = tuple[tuple[tuple[int, float], ...], ...]
"""For each token of an answer, the most probable tokens at its position: ids and log-probabilities."""


def blank_of(progress: SampleProgress) -> int:
    """Returns the blank of the log-probabilities of a progress: the open one, or the one that was just completed."""
    return len(progress.done) if progress.open.ids else max(0, len(progress.done) - 1)


class IncrementalDetokenizer:
    """Decodes one sample while it is written; text that was yielded never changes.

    Args:
        stable_texts: one for each blank.
        stops: texts before which an answer ends.
        logprobs: True to yield the tokens, too.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stable_texts: Sequence[StableText],
        stops: Sequence[str],
        *,
        logprobs: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.stable_texts = stable_texts
        self.stops = stops
        self.logprobs = logprobs
        self.blank = 0  # the one that is being read
        self._open_blank()

    def _open_blank(self) -> None:
        self.seen = 0  # tokens
        self.token_texts = TextAssembler(self.tokenizer)
        if self.blank < len(self.stable_texts):
            self.stream = AnswerStream(self.tokenizer, self.stable_texts[self.blank], stops=self.stops)

    def read(self, progress: SampleProgress, top_logprobs: dict[int, TopLogprobs]) -> Iterator[Delta]:
        """Yields the new parts; an answer that was cut by a timeout has the finish "length".

        Args:
            top_logprobs: by blank.
        """
        while self.blank < len(progress.done):
            yield self._advance(progress.done[self.blank], top_logprobs)
            self.blank += 1
            self._open_blank()
        if self.blank < len(self.stable_texts):
            if progress.end is not None:
                yield self._advance(replace(progress.open, finish="length"), top_logprobs)
            elif progress.open.ids:
                yield self._advance(progress.open, top_logprobs)

    def _advance(self, answer: Answer, top_logprobs: dict[int, TopLogprobs]) -> Delta:
        tokens: tuple[ScoredToken, ...] = ()
        if self.logprobs:
            tokens = self._new_tokens(answer, top_logprobs.get(self.blank, ()))
        self.seen = len(answer.ids)
        return Delta(self.blank, self.stream.take(answer), tokens, answer.finish)

    def _new_tokens(self, answer: Answer, top_logprobs: TopLogprobs) -> tuple[ScoredToken, ...]:
        texts = [self.token_texts.push(token_id) for token_id in answer.ids[self.seen :]]
        if answer.finish and texts:
            texts[-1] += self.token_texts.finish()
        return tuple(
            ScoredToken(
                text, answer.logprobs[index], spell_tokens(top_logprobs[index] if top_logprobs else (), self.tokenizer)
            )
            for index, text in enumerate(texts, start=self.seen)
        )


def spell_tokens(
    tokens: Iterable[tuple[int, float]], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str, float], ...]:
    """Returns the texts of tokens with their log-probabilities."""
    return tuple(("".join(token_texts([token_id], tokenizer)), logprob) for token_id, logprob in tokens)
