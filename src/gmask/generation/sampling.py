"""Sampling: the choice of the next token in each row of a batch whose rows have settings of their own.

Scores are changed in the usual order: penalties, bias, what is forbidden, then temperature, top-k and top-p. The
log-probabilities that are told are the model's own, without any of this.

Shape letters: R rows, V vocabulary.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gmask.errors import GmaskError
from gmask.generation.answers import Hypothesis
from gmask.generation.constraints import Constraint, TokenMask
from gmask.generation.settings import Settings

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How one request is answered; the defaults are those of `gmask.infill`.

    Raises:
        GmaskError: a value that does not fit.
    """

    max_tokens: int = 64  # of an answer
    min_tokens: int = 1  # of an answer
    temperature: float = 0.0  # 0: the most probable token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    repetition_penalty: float = 1.0  # divides the score of what was said, or multiplies one below 0 (Keskar 2019)
    presence_penalty: float = 0.0  # taken off what was said
    frequency_penalty: float = 0.0  # taken off for each time that it was said
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    top_logprobs: int = 0  # so many of the most probable tokens are told beside each one
    constraint: Constraint | None = None  # what every answer has to match

    def __post_init__(self) -> None:
        infinity = float("inf")
        for name, fits, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"from 0 to max_tokens ({self.max_tokens})"),
            ("temperature", 0 <= self.temperature < infinity, "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or above"),
            ("repetition_penalty", 0 < self.repetition_penalty < infinity, "above 0"),
            ("presence_penalty", -infinity < self.presence_penalty < infinity, "a finite number"),
            ("frequency_penalty", -infinity < self.frequency_penalty < infinity, "a finite number"),
            ("seed", self.seed is None or self.seed >= 0, "0 or above"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("top_logprobs", 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS, f"from 0 to {MOST_TOP_LOGPROBS}"),
        ):
            if not fits:
                raise GmaskError(f"{name} must be {rule}, not {getattr(self, name)}")

    @property
    def changes_scores(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias) or self.constraint is not None


@dataclass(slots=True)
class Dice:
    """What one row draws by, and remembers of what it has said."""

    parameters: SamplingParameters
    generator: np.random.Generator
    said: Counter[int] = field(default_factory=Counter)
    mask: TokenMask | None = None  # of the answer that is being written
    fault: GmaskError | None = None  # why the constraint cannot be met

    @classmethod
    def make(cls, parameters: SamplingParameters, index: int, seed: int) -> "Dice":
        """Those of sample ``index``, as `gmask.infill` throws them for an alternative."""
        return cls(parameters, np.random.default_rng([seed, index]))

    def accept(self, token: int, *, ends_answer: bool) -> None:
        """Notes what the row has said."""
        if ends_answer:
            self.mask = None
        else:
            self.said[token] += 1
            if self.mask is not None:
                self.mask.accept(token)


class Chooser:
    """Chooses the next token of every row."""

    def __init__(self, ends: Sequence[int], forbidden: Sequence[int]) -> None:
        self.ends = torch.tensor(ends)
        self.forbidden = torch.tensor(forbidden, dtype=torch.long)

    def choose(self, logits: Tensor, live: Sequence[Hypothesis], dice: Sequence[Dice]) -> list[int]:
        """The tokens of R rows from their logits, float32 ``[R, V]``.

        A row that may say nothing ends its answer.
        """
        scores = logits.clone()
        scores[:, self.forbidden.to(scores.device)] = -torch.inf
        for row, (hypothesis, die) in enumerate(zip(live, dice, strict=True)):
            if die.parameters.changes_scores:
                self._change(scores[row], die)
            if len(hypothesis.open.ids) < die.parameters.min_tokens:
                self._forbid_ends(scores[row])
        return self._draw(scores, dice)

    def _change(self, scores: Tensor, die: Dice) -> None:
        parameters = die.parameters
        if die.said:
            said = torch.tensor(list(die.said), device=scores.device)
            times = torch.tensor(list(die.said.values()), device=scores.device, dtype=scores.dtype)
            old = scores[said]
            penalty = parameters.repetition_penalty
            new = torch.where(old > 0, old / penalty, old * penalty)
            scores[said] = new - parameters.presence_penalty - parameters.frequency_penalty * times
        for token, bias in parameters.logit_bias.items():
            scores[token] += bias
        if parameters.constraint is not None:
            try:
                self._constrain(scores, die, parameters.constraint)
            except GmaskError as error:  # the row's own fault, and no other's
                die.fault = error

    def _constrain(self, scores: Tensor, die: Dice, constraint: Constraint) -> None:
        if die.mask is None:
            die.mask = constraint.start()
        allowed = die.mask.allowed().to(scores.device)
        ends = scores[self.ends.to(scores.device)].clone()
        scores.masked_fill_(~allowed, -torch.inf)
        scores[self.ends.to(scores.device)] = ends if die.mask.is_complete() else -torch.inf

    def _forbid_ends(self, scores: Tensor) -> None:
        kept = scores.clone()
        scores[self.ends.to(scores.device)] = -torch.inf
        if not bool((scores > -torch.inf).any()):  # a constraint may leave nothing but the end
            scores.copy_(kept)

    def _draw(self, scores: Tensor, dice: Sequence[Dice]) -> list[int]:
        tokens = scores.argmax(-1)
        drawing: dict[tuple[float, int, float], list[int]] = {}
        for row, die in enumerate(dice):
            kind = (die.parameters.temperature, die.parameters.top_k, die.parameters.top_p)
            if kind[0] > 0:
                drawing.setdefault(kind, []).append(row)
        for rows in drawing.values():
            index = torch.tensor(rows, device=scores.device)
            quantiles = torch.tensor([dice[row].generator.random() for row in rows], device=scores.device)
            tokens[index] = draw_tokens(scores[index], quantiles, dice[rows[0]].parameters)
        nothing = scores.amax(-1) == -torch.inf
        tokens[nothing] = self.ends[0].to(tokens.device)
        chosen: list[int] = tokens.tolist()
        return chosen


def top_tokens(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The most probable tokens of a row ``[V]`` and their log-probabilities, best first."""
    best = logprobs.topk(count)
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


class Cut(Protocol):
    """How a distribution is tempered and cut."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...


def draw_tokens(logprobs: Tensor, draws: Tensor, settings: Cut) -> Tensor:
    """Tokens ``[B]`` at the quantiles ``draws [B]`` (in [0, 1)) of the tempered and cut distributions ``[B, V]``."""
    scores, order = _in_order(logprobs / settings.temperature, settings.top_k)
    probabilities = scores.double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # The first token stays in any case; each further one while those before it hold less than top_p.
    kept = (cumulative - probabilities < settings.top_p) & (probabilities > 0)
    kept[:, 0] = True
    mass = torch.where(kept, probabilities, 0.0).cumsum(-1)
    rank = torch.searchsorted(mass, (draws.double() * mass[:, -1])[:, None], right=True)
    rank = torch.minimum(rank, kept.sum(-1, keepdim=True) - 1)
    return order.gather(-1, rank)[:, 0]


def _in_order(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` greatest scores of each row (0: all), in order, and where they were; of equals the first."""
    if not 0 < top_k < scores.shape[-1]:
        return scores.sort(dim=-1, descending=True, stable=True)
    order = scores.topk(top_k, dim=-1, sorted=False).indices.sort(dim=-1).values  # a tenth of the time of a sort
    best, rank = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return best, order.gather(-1, rank)


def make_seeds(settings: Settings, count: int) -> list[int]:
    """Seeds of the first ``count`` texts; from a throw of the dice if the settings have none."""
    first = int(np.random.default_rng().integers(2**62)) if settings.seed is None else settings.seed
    return list(range(first, first + count))
