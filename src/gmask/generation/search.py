"""Which token comes next: the most probable one, one drawn at random, or those of the best beams?"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gmask.generation.context import Context
from gmask.generation.decoding import Hypothesis, Rules
from gmask.generation.settings import Settings


def allow(logprobs: Tensor, live: Sequence[Hypothesis], rules: Rules) -> Tensor:
    """``logprobs [B, V]`` with minus infinity at what may not follow; the others stay as they are."""
    allowed = logprobs.clone()
    allowed[:, list(rules.forbidden_ids)] = -torch.inf
    too_short = [row for row, hypothesis in enumerate(live) if len(hypothesis.open.ids) < rules.min_tokens]
    if too_short:
        allowed[torch.tensor(too_short)[:, None], torch.tensor(rules.end_ids)] = -torch.inf
    return allowed


class Sampling:
    """One path, or several independent ones, for each text: greedy at temperature 0, else drawn.

    Alternative ``a`` of a text draws from ``default_rng([its seed, a])``, so a batch draws what single runs draw.
    """

    def __init__(self, contexts: Sequence[Context], settings: Settings, rules: Rules, *, seeds: Sequence[int]) -> None:
        self.contexts = contexts
        self.settings = settings
        self.rules = rules
        self.paths = settings.n if settings.temperature > 0 else 1
        self.generators = {
            (text, path): np.random.default_rng([seed, path])
            for text, seed in enumerate(seeds)
            for path in range(self.paths)
        }
        self.complete: list[list[Hypothesis]] = [[] for _ in contexts]

    def start(self) -> list[tuple[int, Hypothesis]]:
        return [
            (text, Hypothesis(text, path, context))
            for text, context in enumerate(self.contexts)
            for path in range(self.paths)
        ]

    def step(self, live: Sequence[Hypothesis], logprobs: Tensor) -> list[tuple[int, Hypothesis]]:
        allowed = allow(logprobs, live, self.rules)
        if self.settings.temperature > 0:
            draws = [self.generators[hypothesis.text, hypothesis.alternative].random() for hypothesis in live]
            tokens = draw_tokens(allowed, torch.tensor(draws, device=allowed.device), self.settings)
        else:
            tokens = allowed.argmax(-1)
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        grown = [
            hypothesis.advance(token, logprob, self.rules)
            for hypothesis, token, logprob in zip(live, tokens.tolist(), chosen.tolist(), strict=True)
        ]
        for hypothesis in grown:
            if hypothesis.is_complete:
                self.complete[hypothesis.text].append(hypothesis)
        return list(enumerate(grown))


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


class BeamSearch:
    """The most probable answers to all blanks of a text jointly.

    All live beams have predicted equally many tokens, end tokens counted, whichever blank they are at. A text is done
    when none of its live beams can beat the complete ones: a log-probability only falls.
    """

    def __init__(self, contexts: Sequence[Context], settings: Settings, rules: Rules) -> None:
        self.contexts = contexts
        self.width = settings.beams
        self.rules = rules
        self.complete: list[list[Hypothesis]] = [[] for _ in contexts]

    def start(self) -> list[tuple[int, Hypothesis]]:
        return [(text, Hypothesis(text, 0, context)) for text, context in enumerate(self.contexts)]

    def step(self, live: Sequence[Hypothesis], logprobs: Tensor) -> list[tuple[int, Hypothesis]]:
        allowed = self._one_end(allow(logprobs, live, self.rules))
        best, tokens = allowed.topk(min(2 * self.width, allowed.shape[-1]), dim=-1)
        candidates: list[list[tuple[float, int, int, float]]] = [[] for _ in self.contexts]
        for row, (values, ids) in enumerate(zip(best.tolist(), tokens.tolist(), strict=True)):
            hypothesis = live[row]
            candidates[hypothesis.text] += [
                (hypothesis.logprob + value, row, token, value)
                for value, token in zip(values, ids, strict=True)
                if value > -torch.inf
            ]
        grown: list[tuple[int, Hypothesis]] = []
        for text, found in enumerate(candidates):
            found.sort(key=lambda candidate: (-candidate[0], candidate[1], candidate[2]))
            grown += self._keep(text, [(row, live[row], token, value) for _, row, token, value in found])
        return grown

    def _one_end(self, allowed: Tensor) -> Tensor:
        """Leaves each row its more probable end token: ending is one event, whichever token says it."""
        ends = torch.tensor(self.rules.end_ids, device=allowed.device)
        chosen = ends[allowed[:, ends].argmax(-1)][:, None]
        value = allowed.gather(-1, chosen)
        allowed[:, ends] = -torch.inf
        return allowed.scatter(-1, chosen, value)

    def _keep(
        self, text: int, candidates: Sequence[tuple[int, Hypothesis, int, float]]
    ) -> list[tuple[int, Hypothesis]]:
        """The next beams of one text, from candidates in descending order; complete ones are put aside as well."""
        kept: list[tuple[int, Hypothesis]] = []
        complete = self.complete[text]
        for row, hypothesis, token, logprob in candidates:
            grown = hypothesis.advance(token, logprob, self.rules)
            if grown.is_complete:
                complete.append(grown)
            else:
                kept.append((row, grown))
            if len(kept) == self.width:
                break
        complete.sort(key=lambda hypothesis: -hypothesis.logprob)
        del complete[self.width :]
        if len(complete) == self.width and (not kept or kept[0][1].logprob <= complete[-1].logprob):
            return []
        return kept
