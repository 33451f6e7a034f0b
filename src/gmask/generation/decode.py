"""Decoding in the caller's thread: beam search, and the choice between it and the stepper.

A beam is one hypothesis: a context and the answers so far. In each step every beam is fed one token: its last one or,
if an answer has just ended, the ``<sop>`` of the next blank, at the position of that blank. So the beams may be at
different blanks, and only the contexts are padded, on the left.

Shape letters: B rows, V vocabulary.

Source: THUDM/GLM generate_samples.py. As there, blanks of all kinds are filled from left to right, earlier answers stay
in the cache, and neither the end token nor the last token of an answer that is cut is fed.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.answers import Hypothesis, StopMatcher
from gmask.generation.encoding import Context
from gmask.generation.engine import Budget, Stepper
from gmask.generation.padding import log_softmax, stack_prompts
from gmask.generation.sampling import Sampler
from gmask.generation.settings import Sampling
from gmask.infilling.blanks import BlankTokens
from gmask.models.cache import GrowingCache


class Decoder(Protocol):
    """Answers contexts: a `Stepper`, or a `BeamSearch`."""

    def run(self, contexts: Sequence[Context], sampling: Sampling, *, seeds: Sequence[int]) -> list[list[Hypothesis]]:
        """Returns the answers to all blanks of each context, the best first; ``seeds`` has one for each context."""


def make_decoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    special: BlankTokens,
    sampling: Sampling,
    *,
    batch_size: int,
) -> Decoder:
    """Returns the decoder for settings: a `BeamSearch` if they ask for beams, else a `Stepper`.

    Args:
        model, tokenizer, sampler, special: as of `Stepper`.
        batch_size: rows that are decoded together; the samples of one text are never split.

    Raises:
        GmaskError: beams for a model that holds keys and values in int8.
    """
    if sampling.beams > 1:
        if model.kv_cache is not None:
            raise GmaskError(
                f"beams hold keys and values as they are: leave out kv_cache={model.kv_cache}, or num_beams"
            )
        return BeamSearch(model, tokenizer, sampler, special, batch_size=batch_size)
    return Stepper(model, tokenizer, sampler, special, budget=Budget(rows=max(batch_size, sampling.n)))


class DecodeState:
    """The keys and values that B beams have read so far."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = GrowingCache(model.config)
        self.is_real: Tensor | None = None  # [B, read so far], False at padding; None if nothing is padded

    def read(self, input_ids: Tensor, layout: Tensor, is_real: Tensor | None = None) -> Tensor:
        """Reads tokens ``[B, T]`` of a layout ``[B, 2, T]``; returns log-probabilities ``[B, V]`` of the next token.

        ``is_real``: ``[B, T]`` of the first tokens that are read, False at padding.
        """
        if self.is_real is not None:
            is_real = torch.cat((self.is_real, self.is_real.new_ones(input_ids.shape)), dim=1)
        self.is_real = is_real
        outputs = self.model(
            input_ids=input_ids,
            layout=layout,
            attention_mask=is_real,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return log_softmax(outputs.logits[:, -1])

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order; a row may be taken several times."""
        if list(rows) == list(range(len(self.cache.layers[0].keys))):
            return
        index = torch.tensor(rows, device=self.model.device)
        self.cache.batch_select_indices(index)
        if self.is_real is not None:
            self.is_real = self.is_real[index]


class BeamSearch:
    """Beam search over the answers to all blanks of a text; the score is log-probability / tokens ** length_penalty.

    All live beams have predicted the same number of tokens, end tokens counted, so they are ranked by their
    log-probability. A text is done when no live beam can beat the complete ones: a log-probability only falls, and no
    text has more tokens than ``max_tokens`` for each blank.

    Source of the score: the beam search of transformers, which THUDM/GLM uses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler,
        special: BlankTokens,
        *,
        batch_size: int,
    ) -> None:
        self.model, self.tokenizer, self.sampler, self.special = model, tokenizer, sampler, special
        self.batch_size = batch_size

    def run(
        self, contexts: Sequence[Context], sampling: Sampling, *, seeds: Sequence[int] = ()
    ) -> list[list[Hypothesis]]:
        """As of `Decoder`; the seeds are not used, since nothing is drawn."""
        size = max(1, self.batch_size // sampling.beams)
        found: list[list[Hypothesis]] = []
        with torch.inference_mode():
            for start in range(0, len(contexts), size):
                found += self._search(contexts[start : start + size], sampling)
        return found

    def _search(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Hypothesis]]:
        """Returns the best answers to contexts that are read together."""
        stops = StopMatcher(self.tokenizer, sampling.stop) if sampling.stop else None
        live = [Hypothesis(text, 0, context, stops=stops) for text, context in enumerate(contexts)]
        complete: list[list[Hypothesis]] = [[] for _ in contexts]
        state = DecodeState(self.model)
        logprobs = state.read(*stack_prompts(contexts, self.special, self.model.device))
        while True:
            grown = self._grow(live, logprobs, complete, sampling)
            if not grown:
                return complete
            live = [hypothesis for _, hypothesis in grown]
            state.select([row for row, _ in grown])
            inputs = [hypothesis.next_input(self.special.sop) for hypothesis in live]
            fed = torch.tensor(inputs, device=self.model.device)
            logprobs = state.read(fed[:, :1], fed[:, 1:, None])

    def _grow(
        self, live: Sequence[Hypothesis], logprobs: Tensor, complete: list[list[Hypothesis]], sampling: Sampling
    ) -> list[tuple[int, Hypothesis]]:
        """Returns the next beams, each with the row that it grew from; adds those that end to ``complete``."""
        allowed = logprobs.clone()
        self.sampler.forbid(allowed, [hypothesis.open.ids for hypothesis in live], [sampling] * len(live))
        allowed = self._one_end(allowed)
        best, tokens = allowed.topk(min(2 * sampling.beams, allowed.shape[-1]), dim=-1)
        candidates: list[list[tuple[float, int, int, float]]] = [[] for _ in complete]
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
            ranked = [(row, live[row], token, value) for _, row, token, value in found]
            grown += self._keep(ranked, complete[text], sampling)
        return grown

    def _one_end(self, allowed: Tensor) -> Tensor:
        """Leaves each row only its more probable end token, so that no two beams end with the same answer."""
        ends = torch.tensor(self.sampler.end_ids, device=allowed.device)
        chosen = ends[allowed[:, ends].argmax(-1)][:, None]
        value = allowed.gather(-1, chosen)
        allowed[:, ends] = -torch.inf
        return allowed.scatter(-1, chosen, value)

    def _keep(
        self, candidates: Sequence[tuple[int, Hypothesis, int, float]], complete: list[Hypothesis], sampling: Sampling
    ) -> list[tuple[int, Hypothesis]]:
        """Returns the next beams of one text from ranked candidates; adds those that end to ``complete``."""
        width, penalty = sampling.beams, sampling.length_penalty
        kept: list[tuple[int, Hypothesis]] = []
        for row, hypothesis, token, logprob in candidates:
            grown = hypothesis.advance(token, logprob, sampling, self.sampler.end_ids)
            if grown.is_complete:
                complete.append(grown)
            else:
                kept.append((row, grown))
            if len(kept) == width:
                break
        complete.sort(key=lambda hypothesis: -hypothesis.score(penalty))
        del complete[width:]
        if len(complete) == width and (not kept or _best_end(kept[0][1], sampling) <= complete[-1].score(penalty)):
            return []
        return kept


def _best_end(live: Hypothesis, sampling: Sampling) -> float:
    """Returns an upper bound of the scores of all answers that a live beam can still become."""
    longest = sampling.max_tokens * len(live.context.blanks)
    length = longest if sampling.length_penalty > 0 else live.predicted
    bound: float = live.logprob / length**sampling.length_penalty
    return bound
