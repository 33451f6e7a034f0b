"""How probable are given answers to the blanks of texts?

Shape letters: B contexts, R rows of answers, T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gmask.errors import GmaskError
from gmask.generation.context import BlankedText, Context, TextReader
from gmask.generation.decoding import Answer, log_softmax, stack_contexts
from gmask.infilling.blanks import BlankTokens
from gmask.models.glm import GLMForConditionalGeneration


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """Answers to the first blanks of a context, in order, each in the sight of those before it."""

    context: int  # which of the contexts
    answers: tuple[tuple[int, ...], ...]  # ids, without an end token


def encode_answer(
    answer: str, text: BlankedText, blank: int, reader: TextReader, model: GLMForConditionalGeneration
) -> tuple[int, ...]:
    """The ids of an answer, with the white space that the blank took from the text before it.

    Raises:
        GmaskError: an answer longer than the model has positions.
    """
    ids = reader.encode_answer(answer, text, blank)
    positions = model.config.max_position_embeddings
    if len(ids) >= positions:
        raise GmaskError(
            f"the answer {answer[:20]!r} has {len(ids)} tokens; the model's {positions} positions hold fewer"
        )
    return ids


def score_answers(
    model: PreTrainedModel,
    questions: Sequence[tuple[Context, Sequence[tuple[int, ...]]]],
    special: BlankTokens,
    *,
    batch_size: int,
) -> list[list[Answer]]:
    """The answers, given as ids, to the first blank of each context, with their log-probabilities.

    ``batch_size`` contexts of like length are read together, and as many answers are scored together.
    """
    order = sorted(range(len(questions)), key=lambda index: len(questions[index][0].ids))  # little padding
    found: list[list[Answer]] = [[] for _ in questions]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        scorer = AnswerScorer(model, [questions[index][0] for index in batch], special, batch_size=batch_size)
        rows = [AnswerRow(place, (ids,)) for place, index in enumerate(batch) for ids in questions[index][1]]
        for row, (answer,) in zip(rows, scorer.score(rows), strict=True):
            found[batch[row.context]].append(answer)
    return found


def score_shared(
    model: PreTrainedModel,
    questions: Sequence[tuple[Context, Sequence[tuple[int, ...]]]],
    special: BlankTokens,
    *,
    batch_size: int,
) -> list[list[float]]:
    """The summed log-probabilities of answers to contexts that several questions share.

    Each context is read once, and each answer to it is scored once.
    """
    wanted: dict[Context, dict[tuple[int, ...], float]] = {}
    for context, answers in questions:
        wanted.setdefault(context, {}).update(dict.fromkeys(answers, 0.0))
    asked = [(context, list(answers)) for context, answers in wanted.items()]
    for (context, _), found in zip(asked, score_answers(model, asked, special, batch_size=batch_size), strict=True):
        wanted[context].update((answer.ids, sum(answer.logprobs)) for answer in found)
    return [[wanted[context][ids] for ids in answers] for context, answers in questions]


class AnswerScorer:
    """Log-probabilities of given answers to the blanks of B contexts, each of which is read once.

    An answer ends with ``<eop>`` or ``<|endoftext|>``, whichever is more probable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        contexts: Sequence[Context],
        special: BlankTokens,
        *,
        batch_size: int,
    ) -> None:
        self.model = model
        self.contexts = contexts
        self.special = special
        self.batch_size = batch_size
        self.cache = DynamicCache(config=model.config)
        input_ids, layout, is_real = stack_contexts(contexts, pad=special.pad)
        self.is_real = is_real
        with torch.inference_mode():
            self._read(input_ids, layout, is_real, self.cache)

    def score(self, rows: Sequence[AnswerRow]) -> list[tuple[Answer, ...]]:
        """The answers of R rows with their log-probabilities; ``batch_size`` rows of like length run together."""
        order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index].answers)))
        scored: dict[int, tuple[Answer, ...]] = {}
        with torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                chunk = order[start : start + self.batch_size]
                scored.update(zip(chunk, self._score_chunk([rows[index] for index in chunk]), strict=True))
        return [scored[index] for index in range(len(rows))]

    def _score_chunk(self, rows: Sequence[AnswerRow]) -> Iterator[tuple[Answer, ...]]:
        input_ids, targets, layout = self._stack_answers(rows)
        is_answer = layout[:, 1] > 0  # the rest is padding
        layout[:, 1][~is_answer] = 1
        index = torch.tensor([row.context for row in rows])
        mask = None if self.is_real is None else torch.cat((self.is_real[index], is_answer), dim=1)
        hidden_states = self._read(input_ids, layout, mask, self._select(index))
        is_answer, targets = is_answer.to(self.model.device), targets.to(self.model.device)
        logprobs = log_softmax(self.model.lm_head(hidden_states[is_answer]))  # all tokens of all rows, V
        of_target = logprobs.gather(-1, targets[is_answer][:, None])[:, 0].tolist()
        of_end = logprobs[:, [self.special.eop, self.special.eos]].amax(-1).tolist()
        start = 0
        for row in rows:
            answers = []
            for ids in row.answers:
                end = start + len(ids)
                answers.append(Answer(ids, tuple(of_target[start:end]), of_end[end], "end"))
                start = end + 1
            yield tuple(answers)

    def _stack_answers(self, rows: Sequence[AnswerRow]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids ``[R, T]``, the tokens that follow them ``[R, T]`` and the layout ``[R, 2, T]``, 0 at padding.

        The padding is on the right, where no answer sees it.
        """
        width = max(sum(len(ids) + 1 for ids in row.answers) for row in rows)
        input_ids = torch.full((len(rows), width), self.special.pad)
        targets = torch.zeros(len(rows), width, dtype=torch.long)
        layout = torch.zeros(len(rows), 2, width, dtype=torch.long)
        for index, row in enumerate(rows):
            start = 0
            for place, ids in zip(self.contexts[row.context].places, row.answers, strict=False):
                piece = slice(start, start + len(ids) + 1)
                input_ids[index, piece] = torch.tensor((self.special.sop, *ids))
                targets[index, piece] = torch.tensor((*ids, self.special.eop))
                layout[index, 0, piece] = place
                layout[index, 1, piece] = torch.arange(1, len(ids) + 2)
                start = piece.stop
        return input_ids, targets, layout

    def _select(self, index: Tensor) -> DynamicCache:
        """A cache of its own for each row, of the row's context.

        Each grows once, by the answer: the room to spare of a `GrowingCache` would only take memory.
        """
        index = index.to(self.model.device)
        layers = [(layer.keys[index], layer.values[index]) for layer in self.cache.layers]
        return DynamicCache(layers, config=self.model.config)

    def _read(self, input_ids: Tensor, layout: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
        device = self.model.device
        outputs = self.model.base_model(
            input_ids=input_ids.to(device),
            layout=layout.to(device),
            attention_mask=None if mask is None else mask.to(device),
            past_key_values=cache,
            use_cache=True,
        )
        hidden_states: Tensor = outputs.last_hidden_state
        return hidden_states
