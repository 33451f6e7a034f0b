"""What does each running sample say next, and who is told?

Shape letters: R rows, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.answers import TextAssembler
from gmask.generation.conversation import PromptFormat
from gmask.generation.decoding import Hypothesis, Rules
from gmask.generation.requests import End, Progress, Ticket
from gmask.generation.sampling import Chooser, Dice, top_tokens


@dataclass(slots=True)
class Row:
    """A running sample."""

    ticket: Ticket
    hypothesis: Hypothesis
    dice: Dice
    rules: Rules
    assembler: TextAssembler | None = None  # of the answer that is being written, for stop texts
    text: str = ""
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)


class Speaker:
    """Has rows say their tokens, and tells those who asked.

    Attributes:
        tokens: said so far.
        ends: samples, by how they ended.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> None:
        special = prompt_format.special
        self.tokenizer = tokenizer
        self.end_ids = (special.eop, special.eos)
        forbidden = {*prompt_format.forbidden_ids, *range(len(tokenizer), model.config.vocab_size)}
        self._chooser = Chooser(self.end_ids, sorted(forbidden - set(self.end_ids)))
        self.tokens = 0
        self.ends: Counter[End] = Counter()

    def make_row(self, ticket: Ticket, index: int) -> Row:
        """A sample of a request that has said nothing."""
        sampling = ticket.request.sampling
        rules = Rules(self.end_ids, max_tokens=sampling.max_tokens, min_tokens=sampling.min_tokens)
        dice = Dice.make(sampling, index, ticket.seed)
        row = Row(ticket, Hypothesis(0, index, ticket.request.context), dice, rules)
        if sampling.stop:
            row.rules = replace(rules, is_stopped=lambda ids: self._is_stopped(row, ids[-1]))
        return row

    def advance(self, rows: Sequence[Row], logits: Tensor) -> list[bool]:
        """Has every row say its next token, from logits ``[R, V]``; tells which of them have ended."""
        sick = logits.isnan().any(-1).tolist()
        tokens = self._chooser.choose(logits, [row.hypothesis for row in rows], [row.dice for row in rows])
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
        ended = []
        for place, row in enumerate(rows):
            error = row.dice.fault
            if sick[place]:
                error = GmaskError("the model computes values that are not numbers for this request")
            if error is not None:
                self._tell_row(row, "failed", error)
                ended.append(True)
                continue
            count = row.ticket.request.sampling.top_logprobs
            top = top_tokens(logprobs[place], count) if count else ()
            ended.append(self._say(row, tokens[place], chosen[place], top))
        return ended

    def give_up(self, ticket: Ticket, end: End, error: Exception | None = None) -> None:
        """Ends those samples of a request that have not ended, and tells it."""
        self.ends[end] += sum(latest.end is None for latest in ticket.latest)
        ticket.give_up(end, error)

    def _say(self, row: Row, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> bool:
        """Has a row say a token; True if that was its last."""
        before = len(row.hypothesis.done)
        if not row.hypothesis.open.ids:
            row.top_logprobs, row.text, row.assembler = [], "", TextAssembler(self.tokenizer)
        row.hypothesis = row.hypothesis.advance(token, logprob, row.rules)
        row.dice.accept(token, ends_answer=len(row.hypothesis.done) > before)
        if top:
            row.top_logprobs.append(top)
        self.tokens += 1
        self._tell_row(row, "complete" if row.hypothesis.is_complete else None)
        return row.hypothesis.is_complete

    def _is_stopped(self, row: Row, token: int) -> bool:
        assert row.assembler is not None, "an answer has begun"
        row.text += row.assembler.push(token)
        return any(stop in row.text for stop in row.ticket.request.sampling.stop)

    def _tell_row(self, row: Row, end: End | None, error: Exception | None = None) -> None:
        hypothesis = row.hypothesis
        progress = Progress(
            hypothesis.alternative, hypothesis.done, hypothesis.open, tuple(row.top_logprobs), end, error
        )
        if end is not None:
            self.ends[end] += 1
        row.ticket.report(progress)
