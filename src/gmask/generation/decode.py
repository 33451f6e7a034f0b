"""The blanks of several texts are answered token by token: greedily, by sampling or by beams.

A row of the batch is one hypothesis: a context and the answers so far. Every row is fed one token a step. That is its
last token or, where an answer has just ended, the ``<sop>`` of the next blank, at the place of that blank. The rows
therefore need not agree on which blank they are at, and padding is needed only left of the contexts.

Shape letters: B rows, T positions of a context, V vocabulary.

Source: THUDM/GLM generate_samples.py (blanks from left to right, over all kinds; earlier answers stay in memory; the
end token is not fed, nor is the last token of an answer that is cut).
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.answers import Hypothesis, Rules, token_texts
from gmask.generation.sampling import draw_tokens
from gmask.generation.settings import Settings
from gmask.generation.text import Context
from gmask.infilling.blanks import BlankTokens
from gmask.models.cache import GrowingCache
from gmask.models.glm import GLMForConditionalGeneration


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
