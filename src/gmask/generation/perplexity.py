"""Perplexity: texts of any length scored by windows that overlap, each token once.

A window is a context and the text behind it, which is written into one blank: what a model read in both directions says
of what follows. The numbers are the model's own, teacher forced; nothing is chosen.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.answers import Answer
from gmask.generation.encoding import Context, TextReader, encode_plain, format_of
from gmask.generation.score import Continuation, score_continuations
from gmask.models.chatglm import ChatGLMConfig
from gmask.tasks.records import BlankToken, Direction, LikelihoodSettings
from gmask.tasks.templates import count_words

DEFAULT_STRIDE = 256
"""``--overlapping-eval`` of the published evaluation."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What a model says of texts. The first token of each text is read and not scored, as published."""

    nats: float  # minus the log-probability of all tokens
    tokens: int  # that were scored
    words: int  # between the spaces of the texts as given, without the first of each text

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Of a word: comparable between tokenizers. It means nothing in a language without spaces."""
        return math.exp(self.nats / self.words) if self.words else math.inf


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    direction: Direction = "both",
    blank: BlankToken = "[MASK]",
    batch_size: int = 8,
) -> Perplexity:
    """The perplexity of a model on a text, or on several texts, of any length.

    Window i begins at token ``i * stride``. Its last ``stride`` tokens are scored; those before them are its context.
    Of the first window all tokens but the first are scored. So each token is scored once, the first one of a text
    never.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        window: tokens of the text in a window; by default as many as the model has room for.
        stride: the tokens that are scored in a window, less than ``window``; by default 256, or half a small window.
        direction: ``"both"``: the context is read in both directions. ``"left"``: each token sees only those to its
            left: the context is the first token of the window, and the rest is written.
        blank: the blank into which a GLM writes. The published evaluation has ``[MASK]``, whatever the length; a model
            that was trained with ``[gMASK]`` for long texts may do better with that. A ChatGLM has ``[gMASK]``.
        batch_size: windows that run together.

    Raises:
        GmaskError: no text with two tokens; a window or a stride that does not fit; a blank that the model lacks.

    Source: ``tasks/language_model/dataset.py`` of THUDM/GLM; ``stride`` is its ``--overlapping-eval``.
    """
    settings = LikelihoodSettings(direction=direction, window=window, stride=stride, blank=blank)
    scorer = DocumentScorer(model, tokenizer, settings, batch_size)
    texts = [text] if isinstance(text, str) else list(text)
    found = scorer.score([encode_plain(tokenizer, one) for one in texts])
    tokens = sum(len(answer.ids) for answer in found)
    if not tokens:
        raise GmaskError("no text has two tokens, and the first of a text is not scored")
    return Perplexity(-sum(answer.logprob for answer in found), tokens, sum(count_words(one) - 1 for one in texts))


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a text, as indices of its tokens: the context, what is written behind it, and what of that counts."""

    start: int
    written: int  # the first token that is written
    scored: int  # the first token that is scored
    end: int


def cut_windows(length: int, window: int, stride: int, direction: Direction) -> Iterator[Window]:
    """The windows of a text of ``length`` tokens, in order. Each token but the first is scored in one of them."""
    if length < 2:
        return
    yield Window(0, 1, 1, min(window, length))
    for start in range(stride, length - window + stride, stride):
        scored = start + window - stride
        yield Window(start, scored if direction == "both" else start + 1, scored, min(start + window, length))


@dataclass(frozen=True)
class DocumentScorer:
    """Scores the tokens of whole texts, by the windows that the settings describe.

    Raises:
        GmaskError: a window or a stride that does not fit; a blank that the model lacks.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: LikelihoodSettings
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise GmaskError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.settings.direction not in get_args(Direction):
            raise GmaskError(f"direction must be both or left, not {self.settings.direction!r}")
        if not 2 <= self.window <= self.room:
            raise GmaskError(f"a window of this model has 2 to {self.room} tokens, not {self.window}")
        if not 1 <= self.stride < self.window:
            raise GmaskError(f"stride is {self.stride}: give less than the window of {self.window}, at least 1")
        read = self.window - self.stride + len(self.head) + 1
        if self.settings.direction == "both" and read > self.model.config.max_position_embeddings:
            raise GmaskError(f"the context of a window has {read} tokens, more than the model has positions")
        assert self.blank_id >= 0

    @cached_property
    def is_chatglm(self) -> bool:
        return isinstance(self.model.config, ChatGLMConfig)

    @cached_property
    def head(self) -> tuple[int, ...]:
        """The ids in front of each window: ``[CLS]`` and trained vectors of a GLM."""
        return () if self.is_chatglm else (format_of(self.model.config, self.tokenizer).special.cls, *self._prompt_ids)

    @property
    def _prompt_ids(self) -> Sequence[int]:
        prompt_ids: Sequence[int] = self.model.config.prompt_ids
        return prompt_ids

    @cached_property
    def blank_id(self) -> int:
        if self.is_chatglm:
            return format_of(self.model.config, self.tokenizer).special.gmask
        return TextReader(self.tokenizer, self._prompt_ids).find_blank(self.settings.blank)

    @cached_property
    def room(self) -> int:
        """The most tokens of a window. Context and answer of a ChatGLM share its positions, with two special tokens."""
        positions: int = self.model.config.max_position_embeddings
        return positions - (2 if self.is_chatglm else 1)

    @cached_property
    def window(self) -> int:
        return self.room if self.settings.window is None else self.settings.window

    @cached_property
    def stride(self) -> int:
        return min(DEFAULT_STRIDE, self.window // 2) if self.settings.stride is None else self.settings.stride

    def score(self, documents: Sequence[Sequence[int]]) -> list[Answer]:
        """Of each text, given as ids, the log-probabilities of its tokens but the first, in order."""
        special = format_of(self.model.config, self.tokenizer).special
        owners, asked = list[int](), list[Continuation]()
        for number, ids in enumerate(documents):
            for window in cut_windows(len(ids), self.window, self.stride, self.settings.direction):
                owners.append(number)
                asked.append(self._lay_out(ids, window))
        with evaluating(self.model), torch.inference_mode():
            found = score_continuations(self.model, asked, special, batch_size=self.batch_size)
        pieces: list[list[Answer]] = [[] for _ in documents]
        for number, answer in zip(owners, found, strict=True):
            pieces[number].append(answer)
        return list(map(_join, pieces))

    def _lay_out(self, ids: Sequence[int], window: Window) -> Continuation:
        read = (*self.head, *ids[window.start : window.written])
        # As published, without the <|endoftext|> that ends other contexts: the text goes on.
        context = Context((*read, self.blank_id), (len(read),))
        return Continuation(context, tuple(ids[window.written : window.end]), window.scored - window.written)


def _join(pieces: Sequence[Answer]) -> Answer:
    return Answer(
        ids=tuple(token for piece in pieces for token in piece.ids),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        is_greedy=tuple(is_greedy for piece in pieces for is_greedy in piece.is_greedy),
    )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model into evaluation mode; afterwards it is in the mode that it was in before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
