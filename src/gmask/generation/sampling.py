"""The sampler: it chooses the next token of every row of a batch.

Each row may have settings of its own. Scores are changed in the usual order: penalties, bias, forbidden tokens,
temperature, top-k, top-p. The log-probabilities that are reported are the model's own, before any of these changes.

Shape letters: R rows, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.constraints import Constraint, TokenMask
from gmask.generation.settings import Sampling
from gmask.infilling.blanks import BlankTokens


@dataclass(slots=True)
class SamplerState:
    """The sampler's state of one row: settings, random numbers, counts of written tokens, constraint."""

    sampling: Sampling
    generator: np.random.Generator
    counts: Counter[int] = field(default_factory=Counter)  # of the tokens written, over all blanks
    mask: TokenMask | None = None  # the constraint's state for the answer that is being written
    error: GmaskError | None = None  # set if the constraint cannot be met

    @classmethod
    def make(cls, sampling: Sampling, *, seed: int, index: int) -> "SamplerState":
        """Returns the state of sample ``index`` of a text, which draws the same alone, in a batch and on the server."""
        return cls(sampling, np.random.default_rng([seed, index]))

    def accept(self, token: int, *, ends_answer: bool) -> None:
        """Records a token that the row has written."""
        if ends_answer:
            self.mask = None
            return
        if self.sampling.changes_scores:
            self.counts[token] += 1
        if self.mask is not None:
            self.mask.accept(token)


class Sampler:
    """Chooses the next token of every row.

    Args:
        end_ids: tokens that end an answer.
        forbidden_ids: tokens that are never part of one; end tokens among them are not forbidden.
    """

    def __init__(self, end_ids: Sequence[int], forbidden_ids: Collection[int] = ()) -> None:
        self.end_ids = tuple(end_ids)
        self.forbidden_ids = tuple(sorted({*forbidden_ids} - {*end_ids}))
        self._ends = torch.tensor(self.end_ids)
        self._forbidden = torch.tensor(self.forbidden_ids, dtype=torch.long)

    @classmethod
    def for_model(
        cls, special: BlankTokens, forbidden_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int
    ) -> "Sampler":
        """Returns the sampler of a model. Of its ``vocabulary`` embeddings, those without a token are forbidden."""
        padding = range(len(tokenizer), vocabulary)
        return cls((special.eop, special.eos), {*forbidden_ids, *padding})

    def choose(
        self, logits: Tensor, states: Sequence[SamplerState], answers: Sequence[tuple[int, ...]]
    ) -> tuple[list[int], list[float], Tensor]:
        """Chooses the next tokens of R rows.

        A row for which all tokens are forbidden ends its answer. If a constraint cannot be met, the row's
        `SamplerState.error` is set.

        Args:
            logits: float32 ``[R, V]``.
            states: of the rows.
            answers: the ids of the answers that they are writing.

        Returns:
            The tokens; their log-probabilities, NaN in a row that has a NaN among its logits; and all log-probabilities
            ``[R, V]``.
        """
        scores = logits.clone()
        for row, state in enumerate(states):
            if state.sampling.changes_scores:
                self._change(scores[row], state)
        self.forbid(scores, answers, [state.sampling for state in states])
        tokens = self._draw(scores, states)
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        return tokens.tolist(), chosen.tolist(), logprobs

    def forbid(self, scores: Tensor, answers: Sequence[tuple[int, ...]], samplings: Sequence[Sampling]) -> None:
        """Sets ``scores [R, V]`` to minus infinity at tokens that must not follow.

        These are the forbidden ones, those that would repeat an n-gram, and the end tokens of an answer that is too
        short and can go on.
        """
        scores[:, self._forbidden.to(scores.device)] = -torch.inf
        for row, (ids, sampling) in enumerate(zip(answers, samplings, strict=True)):
            if sampling.no_repeat_ngram and (repeats := find_repeats(ids, sampling.no_repeat_ngram)):
                scores[row, repeats] = -torch.inf
        short = [row for row, ids in enumerate(answers) if len(ids) < samplings[row].min_tokens]
        if not short:
            return
        rows, ends = torch.tensor(short, device=scores.device)[:, None], self._ends.to(scores.device)
        before = scores[rows, ends]
        scores[rows, ends] = -torch.inf
        if any(samplings[row].no_repeat_ngram or samplings[row].constraint for row in short):
            is_stuck = scores[rows[:, 0]].amax(-1) == -torch.inf  # nothing but the end is left
            scores[rows, ends] = torch.where(is_stuck[:, None], before, -torch.inf)

    def _change(self, scores: Tensor, state: SamplerState) -> None:
        """Applies penalties, bias and constraint to the scores of one row ``[V]``, in place."""
        sampling = state.sampling
        if state.counts:
            written = torch.tensor(list(state.counts), device=scores.device)
            times = torch.tensor(list(state.counts.values()), device=scores.device, dtype=scores.dtype)
            old = scores[written]
            penalty = sampling.repetition_penalty
            new = torch.where(old > 0, old / penalty, old * penalty)
            scores[written] = new - sampling.presence_penalty - sampling.frequency_penalty * times
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        if sampling.constraint is not None:
            try:
                self._constrain(scores, state, sampling.constraint)
            except GmaskError as error:  # it concerns this row alone
                state.error = error

    def _constrain(self, scores: Tensor, state: SamplerState, constraint: Constraint) -> None:
        if state.mask is None:
            state.mask = constraint.start()
        allowed, ends = state.mask.allowed().to(scores.device), self._ends.to(scores.device)
        end_scores = scores[ends]
        scores.masked_fill_(~allowed, -torch.inf)
        scores[ends] = end_scores if state.mask.is_complete() else -torch.inf

    def _draw(self, scores: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """Returns tokens ``[R]``; rows with the same settings are drawn together."""
        tokens = first_greatest(scores)
        drawing: dict[tuple[float, int, float], list[int]] = {}
        for row, state in enumerate(states):
            if state.sampling.temperature > 0:
                kind = (state.sampling.temperature, state.sampling.top_k, state.sampling.top_p)
                drawing.setdefault(kind, []).append(row)
        for (temperature, top_k, top_p), rows in drawing.items():
            index = torch.tensor(rows, device=scores.device)
            quantiles = torch.tensor([states[row].generator.random() for row in rows], device=scores.device)
            tokens[index] = draw_tokens(scores[index], quantiles, temperature=temperature, top_k=top_k, top_p=top_p)
        chosen = scores.gather(-1, tokens[:, None])[:, 0]
        if -math.inf in chosen.tolist():
            tokens = torch.where(chosen == -torch.inf, self.end_ids[0], tokens)
        return tokens


PART = 32
"""Columns in which `first_greatest` looks at once; vocabularies are padded to multiples of it."""


def first_greatest(scores: Tensor) -> Tensor:
    """Returns the index ``[R]`` of the first of the greatest scores of each row ``[R, V]``; a NaN is the greatest.

    On a CPU the greatest values are found far faster than their indices: only the part that has one is searched.
    """
    rows, width = scores.shape
    if not scores.is_cpu or width % PART:
        return scores.argmax(-1)
    parts = scores.view(rows, -1, PART)
    part = parts.amax(-1).argmax(-1)
    return part * PART + parts[torch.arange(rows), part].argmax(-1)


def find_repeats(ids: Sequence[int], size: int) -> list[int]:
    """Returns the tokens that would complete a ``size``-gram that the ids contain already."""
    start = len(ids) - size + 1
    if start < 0:
        return []
    last = tuple(ids[start:])
    return [ids[index + size - 1] for index in range(start) if tuple(ids[index : index + size - 1]) == last]


def top_tokens(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Returns the most probable tokens of a row ``[V]`` and their log-probabilities, best first."""
    best = logprobs.topk(count)
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


FIRST = 64
"""The number of most probable tokens among which a token is looked for before the whole vocabulary is sorted."""


def draw_tokens(scores: Tensor, quantiles: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draws tokens ``[R]`` from scores ``[R, V]``, by temperature, top-k and top-p.

    ``quantiles``: random numbers ``[R]`` in [0, 1); each token is the one at this quantile of its row's distribution,
    the most probable tokens first.
    """
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1] or scores.shape[-1] <= FIRST:
        return _draw_in_order(scores, quantiles, top_k, top_p)
    tokens, is_found = _draw_among_first(scores, quantiles, top_p)
    rest = (~is_found).nonzero()[:, 0]
    if len(rest):
        tokens[rest] = _draw_in_order(scores[rest], quantiles[rest], top_k, top_p)
    return tokens


def _draw_in_order(scores: Tensor, quantiles: Tensor, top_k: int, top_p: float) -> Tensor:
    """As `draw_tokens`, of scores that are divided by the temperature: all of them are put in order."""
    ranked, order = _in_order(scores, top_k)
    mass, kept = _kept_mass(ranked.double().softmax(-1), top_p)
    rank = torch.searchsorted(mass, (quantiles.double() * mass[:, -1])[:, None], right=True)
    return order.gather(-1, torch.minimum(rank, kept[:, None] - 1))[:, 0]


def _draw_among_first(scores: Tensor, quantiles: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The tokens ``[R]`` of `_draw_in_order` where they are among the `FIRST` most probable ones, and whether they are.

    Sorting a vocabulary of 12,000 takes most of the time of a decoding step.
    """
    ranked, order = _in_order(scores, FIRST)
    mass, kept = _kept_mass((ranked.double() - _log_total(scores, ranked)).exp(), top_p)
    is_whole = kept < FIRST  # what top-p keeps is known; else only the whole distribution is
    target = quantiles.double() * torch.where(is_whole, mass[:, -1], 1.0)
    rank = torch.searchsorted(mass, target[:, None], right=True)
    rank = torch.minimum(rank, kept[:, None] - 1)
    # Of equal scores at the end of the first ones, some may have been left out.
    is_inside = ranked.gather(-1, rank)[:, 0] > ranked[:, -1]
    is_found = is_inside & (mass[:, -1] > target) & (is_whole | (top_p == 1.0))
    return order.gather(-1, rank)[:, 0], is_found


def _log_total(scores: Tensor, ranked: Tensor) -> Tensor:
    """The logarithms of the sums of exp(score), float64 ``[R, 1]``; ``ranked``: the greatest scores of each row.

    Those are summed in float64. The exponentials of the others, which are a small part where it matters, are float32:
    all of them in float64 would take six times as long.
    """
    best = ranked[:, :1]
    whole, part = ((some - best).exp_().sum(-1, keepdim=True, dtype=torch.float64) for some in (scores, ranked))
    greatest = (ranked.double() - best.double()).exp().sum(-1, keepdim=True)
    return (greatest + (whole - part).clamp(min=0)).log() + best


def _kept_mass(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The cumulative probabilities ``[R, K]`` of the tokens that top-p keeps, and their number ``[R]``.

    ``probabilities``: ``[R, K]`` in descending order.
    """
    cumulative = probabilities.cumsum(-1)
    # The first token stays in any case; each further one while those before it hold less than top_p.
    kept = (cumulative - probabilities < top_p) & (probabilities > 0)
    kept[:, 0] = True
    return torch.where(kept, probabilities, 0.0).cumsum(-1), kept.sum(-1)


def _in_order(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Returns the ``top_k`` greatest scores of each row (0: all) in descending order, and their indices.

    Equal scores keep their order.
    """
    if not 0 < top_k < scores.shape[-1]:
        return scores.sort(dim=-1, descending=True, stable=True)
    order = scores.topk(top_k, dim=-1, sorted=False).indices.sort(dim=-1).values  # a tenth of the time of a sort
    best, rank = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return best, order.gather(-1, rank)
