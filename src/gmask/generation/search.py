"""Which token comes next: the most probable one, one drawn at random, or those of the best beams?

Shape letters: B rows, V vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.generation.answers import token_texts
from gmask.generation.context import Context
from gmask.generation.decoding import Hypothesis, Rules, decode
from gmask.generation.settings import Settings
from gmask.infilling.blanks import BlankTokens


def make_rules(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Sequence[int],
    forbidden: Collection[int],
    vocabulary_size: int,
) -> Rules:
    """When an answer ends. The rows of the vocabulary behind the tokenizer's last are never part of one."""

    def is_stopped(ids: tuple[int, ...]) -> bool:
        if not settings.stop:
            return False
        text = "".join(token_texts(ids, tokenizer))
        return any(stop in text for stop in settings.stop)

    padding = range(len(tokenizer), vocabulary_size)
    return Rules(
        tuple(ends),
        tuple(sorted({*forbidden, *padding} - set(ends))),
        settings.max_tokens,
        settings.min_tokens,
        settings.no_repeat_ngram,
        is_stopped,
    )


def make_seeds(settings: Settings, count: int) -> list[int]:
    """Seeds of the first ``count`` texts; from a throw of the dice if the settings have none."""
    first = int(np.random.default_rng().integers(2**62)) if settings.seed is None else settings.seed
    return list(range(first, first + count))


def allow(logprobs: Tensor, live: Sequence[Hypothesis], rules: Rules) -> Tensor:
    """``logprobs [B, V]`` with minus infinity at what may not follow; the others stay as they are."""
    allowed = logprobs.clone()
    allowed[:, list(rules.forbidden_ids)] = -torch.inf
    too_short = [row for row, hypothesis in enumerate(live) if len(hypothesis.open.ids) < rules.min_tokens]
    if too_short:
        allowed[torch.tensor(too_short)[:, None], torch.tensor(rules.end_ids)] = -torch.inf
    if rules.no_repeat_ngram:
        _forbid_repeats(allowed, logprobs, live, rules)
    return allowed


def _forbid_repeats(allowed: Tensor, logprobs: Tensor, live: Sequence[Hypothesis], rules: Rules) -> None:
    """Forbids each row the tokens that would repeat an n-gram of its answer; one that may say nothing else may end."""
    ends = torch.tensor(rules.end_ids, device=allowed.device)
    for row, hypothesis in enumerate(live):
        if repeats := find_repeats(hypothesis.open.ids, rules.no_repeat_ngram):
            allowed[row, repeats] = -torch.inf
            if not bool((allowed[row] > -torch.inf).any()):
                allowed[row, ends] = logprobs[row, ends]


def find_repeats(ids: Sequence[int], size: int) -> list[int]:
    """The tokens that would complete a ``size``-gram that the ids hold already."""
    start = len(ids) - size + 1
    if start < 0:
        return []
    last = tuple(ids[start:])
    return [ids[place + size - 1] for place in range(start) if tuple(ids[place : place + size - 1]) == last]


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
    """The answers to all blanks of a text that score best jointly: by log-probability / tokens ** length_penalty.

    All live beams have predicted equally many tokens, end tokens counted, whichever blank they are at, so that among
    them the log-probability decides. A text is done when none of its live beams can beat the complete ones: a
    log-probability only falls, and no text has more tokens than ``max_tokens`` for each blank.

    Source of the score: the beam search of transformers, which THUDM/GLM generates with.
    """

    def __init__(self, contexts: Sequence[Context], settings: Settings, rules: Rules) -> None:
        self.contexts = contexts
        self.width = settings.beams
        self.length_penalty = settings.length_penalty
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
        complete.sort(key=lambda hypothesis: -hypothesis.score(self.length_penalty))
        del complete[self.width :]
        if len(complete) == self.width:
            worst = complete[-1].score(self.length_penalty)
            if not kept or self._best_end(kept[0][1]) <= worst:
                return []
        return kept

    def _best_end(self, live: Hypothesis) -> float:
        """A score that a live beam and what may become of it cannot exceed."""
        longest = self.rules.max_tokens * len(live.context.places)
        length = longest if self.length_penalty > 0 else live.predicted
        bound: float = live.logprob / length**self.length_penalty
        return bound


def make_search(
    contexts: Sequence[Context], settings: Settings, rules: Rules, *, seeds: Sequence[int]
) -> Sampling | BeamSearch:
    """The search that the settings ask for; ``seeds`` has one for each context."""
    if settings.beams > 1:
        return BeamSearch(contexts, settings, rules)
    return Sampling(contexts, settings, rules, seeds=seeds)


def find_answers(
    model: PreTrainedModel,
    contexts: Sequence[Context],
    settings: Settings,
    rules: Rules,
    *,
    special: BlankTokens,
    seeds: Sequence[int],
) -> list[list[Hypothesis]]:
    """The answers to all blanks of each context, the best first; the contexts are read in one batch."""
    search = make_search(contexts, settings, rules, seeds=seeds)
    for _ in decode(model, contexts, search, special=special):
        pass
    return [sorted(found, key=lambda one: -one.score(settings.length_penalty)) for found in search.complete]
