"""How are the blanks of several texts answered, token by token?

A row of the batch is one hypothesis: a context and the answers so far. Every row is fed one token a step. That is its
last token or, where an answer has just ended, the ``<sop>`` of the next blank, at the place of that blank. The rows
therefore need not agree on which blank they are at, and padding is needed only left of the contexts.

Shape letters: B rows, T positions of a context, V vocabulary.
Source: THUDM/GLM generate_samples.py (blanks from left to right, over all kinds; earlier answers stay in memory; the
end token is not fed, nor is the last token of an answer that is cut).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gmask.errors import GmaskError
from gmask.generation.context import Context
from gmask.infilling.blanks import BlankTokens
from gmask.models.cache import GrowingCache
from gmask.models.glm import GLMForConditionalGeneration

Finish = Literal["end", "stop", "length"]
"""Why an answer is complete: its end token, a stop text, or the limit on its tokens."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens of one blank. Log-probabilities are the model's, in nats, over the whole vocabulary."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    end_logprob: float | None = None  # of the end token, if that ended it
    finish: Finish | None = None  # None while it grows

    @property
    def logprob(self) -> float:
        return sum(self.logprobs) + (self.end_logprob or 0.0)


@dataclass(frozen=True, slots=True)
class Rules:
    """When an answer ends, and what it may not hold."""

    end_ids: tuple[int, ...]
    forbidden_ids: tuple[int, ...] = ()
    max_tokens: int = 64
    min_tokens: int = 1
    no_repeat_ngram: int = 0  # no n tokens stand twice in an answer; 0 = they may
    is_stopped: Callable[[tuple[int, ...]], bool] = field(default=lambda ids: False)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """The answers of one text so far."""

    text: int  # which of the batch's contexts
    alternative: int  # which of the answers drawn for it
    context: Context
    done: tuple[Answer, ...] = ()
    open: Answer = Answer()
    logprob: float = 0.0

    @property
    def is_complete(self) -> bool:
        return len(self.done) == len(self.context.places)

    @property
    def predicted(self) -> int:
        """Tokens predicted so far, over all blanks, end tokens counted."""
        ended = sum(len(answer.ids) + (answer.end_logprob is not None) for answer in self.done)
        return ended + len(self.open.ids)

    def score(self, length_penalty: float) -> float:
        """The log-probability divided by the number of tokens predicted, raised to the penalty."""
        score: float = self.logprob / max(1, self.predicted) ** length_penalty
        return score

    def advance(self, token: int, logprob: float, rules: Rules) -> "Hypothesis":
        """The hypothesis with one more token, which may end the answer."""
        total = self.logprob + logprob
        if token in rules.end_ids:
            ended = replace(self.open, end_logprob=logprob, finish="end")
            return replace(self, done=(*self.done, ended), open=Answer(), logprob=total)
        ids = (*self.open.ids, token)
        grown = Answer(ids, (*self.open.logprobs, logprob))
        if rules.is_stopped(ids):
            grown = replace(grown, finish="stop")
        elif len(ids) == rules.max_tokens:
            grown = replace(grown, finish="length")
        else:
            return replace(self, open=grown, logprob=total)
        return replace(self, done=(*self.done, grown), open=Answer(), logprob=total)

    def next_input(self, sop: int) -> tuple[int, int, int]:
        """The token to feed, its place in the context and its place in the answer."""
        place = self.context.places[len(self.done)]
        if not self.open.ids:
            return sop, place, 1
        return self.open.ids[-1], place, len(self.open.ids) + 1


class Search(Protocol):
    """Chooses the next token of every row."""

    def start(self) -> list[tuple[int, Hypothesis]]:
        """The first hypotheses, each with the row of its context."""

    def step(self, live: Sequence[Hypothesis], logprobs: Tensor) -> list[tuple[int, Hypothesis]]:
        """What follows the live hypotheses (``logprobs`` ``[B, V]``), each with the row that it grew from."""


def stack_contexts(contexts: Sequence[Context], *, pad: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids ``[B, T]``, layout ``[B, 2, T]`` and a mask ``[B, T]``, False at the padding, which is on the left.

    The mask is None where nothing is padded.
    """
    width = max(len(context.ids) for context in contexts)
    input_ids = torch.full((len(contexts), width), pad)
    layout = torch.zeros(len(contexts), 2, width, dtype=torch.long)
    is_real = torch.zeros(len(contexts), width, dtype=torch.bool)
    for row, context in enumerate(contexts):
        start = width - len(context.ids)
        input_ids[row, start:] = torch.tensor(context.ids)
        layout[row, 0, start:] = torch.arange(len(context.ids))
        is_real[row, start:] = True
    return input_ids, layout, None if bool(is_real.all()) else is_real


class Memory:
    """The keys and values of what B rows have read so far."""

    def __init__(self, model: GLMForConditionalGeneration, special: BlankTokens) -> None:
        self.model = model
        self.special = special
        self.cache = GrowingCache(model.config)
        self.is_real: Tensor | None = None  # [B, read so far], False at padding; None where there is none

    def read(self, contexts: Sequence[Context]) -> Tensor:
        """Reads the contexts and the first ``<sop>``; returns log-probabilities ``[B, V]`` of what follows."""
        return log_softmax(self.read_logits(contexts))

    def read_logits(self, contexts: Sequence[Context]) -> Tensor:
        """As `read`, but returns float32 logits, which need not be numbers."""
        input_ids, layout, is_real = stack_contexts(contexts, pad=self.special.pad)
        first_places = torch.tensor([(context.places[0], 1) for context in contexts])
        if is_real is not None:
            self.is_real = F.pad(is_real, (0, 1), value=True).to(self.model.device)
        return self._forward(
            F.pad(input_ids, (0, 1), value=self.special.sop),
            torch.cat((layout, first_places[..., None]), dim=-1),
        )

    def feed(self, inputs: Sequence[tuple[int, int, int]]) -> Tensor:
        """Reads one token a row (its id, its place, its place in the answer); returns ``[B, V]`` as `read` does."""
        ids, *places = torch.tensor(inputs).unbind(-1)
        if self.is_real is not None:
            self.is_real = torch.cat((self.is_real, self.is_real.new_ones(len(inputs), 1)), dim=1)
        return log_softmax(self._forward(ids[:, None], torch.stack(places, dim=1)[:, :, None]))

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order; a row may be taken several times."""
        size = len(self.cache.layers[0].keys)
        if list(rows) == list(range(size)):
            return
        index = torch.tensor(rows, device=self.model.device)
        self.cache.batch_select_indices(index)
        if self.is_real is not None:
            self.is_real = self.is_real[index]

    def _forward(self, input_ids: Tensor, layout: Tensor) -> Tensor:
        outputs = self.model(
            input_ids=input_ids.to(self.model.device),
            layout=layout.to(self.model.device),
            attention_mask=self.is_real,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = outputs.logits[:, -1].float()
        return logits


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32.

    Raises:
        GmaskError: not a number among the logits.
    """
    logprobs = logits.float().log_softmax(-1)
    check_numbers(logprobs)
    return logprobs


def check_numbers(values: Tensor) -> None:
    """Raises `GmaskError` if some of what a model computed is not a number."""
    if bool(values.isnan().any()):
        raise GmaskError(
            "the model computes values that are not numbers: its weights are damaged, or overflow in this dtype"
        )


def decode(
    model: GLMForConditionalGeneration, contexts: Sequence[Context], search: Search, *, special: BlankTokens
) -> Iterator[list[Hypothesis]]:
    """Runs a search to its end; yields after each step the hypotheses that it kept, the complete ones among them."""
    with torch.inference_mode():
        memory = Memory(model, special)
        logprobs = memory.read(contexts)
        branches = search.start()
        memory.select([row for row, _ in branches])
        logprobs = logprobs[[row for row, _ in branches]]
        while branches:
            branches = search.step([hypothesis for _, hypothesis in branches], logprobs)
            yield [hypothesis for _, hypothesis in branches]
            branches = [(row, hypothesis) for row, hypothesis in branches if not hypothesis.is_complete]
            if branches:
                memory.select([row for row, _ in branches])
                logprobs = memory.feed([hypothesis.next_input(special.sop) for _, hypothesis in branches])
