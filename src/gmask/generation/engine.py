"""How are many requests answered at once, each joining and leaving the batch at any token?

A thread of its own alternates: it reads the contexts of waiting requests, whole (a context is bidirectional: it can
neither be cut into chunks nor be shared by its beginning), at most ``prefill_tokens`` of them together, and then
decodes one token for every running row. A request that waits thus holds the running ones up by one prefill at most.
Requests are taken by priority, then in their order; one that has no room yet is not overtaken. Rows of any length,
with any number of blanks left, share a step: slots.py.
"""

import heapq
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.memory import free_bytes
from gmask.errors import GmaskError, is_shortage
from gmask.generation.answers import TextAssembler
from gmask.generation.conversation import find_format
from gmask.generation.decoding import Hypothesis, Memory, Rules
from gmask.generation.requests import End, Progress, QueueFull, Request, Tell, Ticket
from gmask.generation.sampling import Chooser, Dice, top_tokens
from gmask.generation.slots import SlotCache, real_columns, total_places
from gmask.models.cache import capacity_for

__all__ = ["Counts", "Engine", "Progress", "QueueFull", "Request", "Ticket"]

PREFILL_TOKENS = 1024
"""Tokens of contexts, padding counted, that are read together."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Counts:
    """How busy an engine is, and what it has done."""

    waiting: int  # requests
    running: int  # rows
    places: int  # of keys and values that the running rows may come to take
    max_places: int
    prompt_tokens: int  # read so far
    answer_tokens: int  # written so far
    steps: int  # decoding steps so far
    ends: dict[End, int]  # samples, by how they ended


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


class Engine:
    """Answers requests in one batch that they join and leave at any token; greedy answers are those of single runs.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        max_rows: samples that run together.
        max_places: positions of keys and values of all running rows together; by default as many as ``max_rows`` rows
            of a quarter of the model's positions need, in at most half of the free memory.
        max_queue: requests that may wait.
        prefill_tokens: of contexts that are read together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 32,
        max_places: int | None = None,
        max_queue: int = 256,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        positions: int = model.config.max_position_embeddings
        self.model, self.tokenizer = model, tokenizer
        self.positions = positions
        self.prefix: int = getattr(model.config, "pre_seq_len", None) or 0
        self.max_rows, self.max_queue, self.prefill_tokens = max_rows, max_queue, prefill_tokens
        self.max_places = max_places or _default_places(model, max_rows)
        prompt_format = find_format(model, tokenizer)
        self.special = prompt_format.special
        self.ends = (self.special.eop, self.special.eos)
        forbidden = {*prompt_format.forbidden_ids, *range(len(tokenizer), model.config.vocab_size)}
        self._chooser = Chooser(self.ends, sorted(forbidden - set(self.ends)))
        self._slots = SlotCache(model.config.num_hidden_layers)
        self._rows: list[Row] = []
        self._queue: list[tuple[tuple[int, int], Ticket]] = []
        self._wake = threading.Condition()
        self._submitted = 0
        self._is_closed = self._is_draining = False
        self._prompt_tokens = self._answer_tokens = self._steps = 0
        self._ends: Counter[End] = Counter()
        self._thread = threading.Thread(
            target=self._run, args=(torch.get_num_threads(),), name="gmask-engine", daemon=True
        )
        self._thread.start()

    def submit(self, request: Request, tell: Tell = lambda progress: None) -> Ticket:
        """Has a request answered.

        Args:
            tell: is called, from the engine's thread, after each token of each sample and at its end; must not block.

        Raises:
            QueueFull: too many requests wait.
            GmaskError: a context that the model or the engine has no room for; an engine that was closed.
        """
        if request.n < 1:
            raise GmaskError(f"n must be at least 1, not {request.n}")
        request.context.check_length(self.positions)
        seed = request.sampling.seed
        seed = int(np.random.default_rng().integers(2**62)) if seed is None else seed
        with self._wake:
            deadline = None if request.timeout is None else time.monotonic() + request.timeout
            ticket = Ticket(request, tell, seed=seed, order=self._submitted, deadline=deadline, prefix=self.prefix)
            self._check_room(ticket)
            if self._is_closed or self._is_draining:
                raise GmaskError("the engine is closed")
            if len(self._queue) >= self.max_queue:
                raise QueueFull(len(self._queue), self._seconds_to_room())
            self._submitted += 1
            heapq.heappush(self._queue, (ticket.rank, ticket))
            self._wake.notify()
        return ticket

    def counts(self) -> Counts:
        """What the engine is doing now, and has done."""
        with self._wake:
            return Counts(
                waiting=len(self._queue),
                running=len(self._rows),
                places=total_places([row.ticket.places for row in self._rows]),
                max_places=self.max_places,
                prompt_tokens=self._prompt_tokens,
                answer_tokens=self._answer_tokens,
                steps=self._steps,
                ends=dict(self._ends),
            )

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests; ends those that it has, or with ``drain`` waits ``timeout`` seconds for their end."""
        with self._wake:
            self._is_draining = True
            self._is_closed = self._is_closed or not drain
            self._wake.notify()
        self._thread.join(timeout)
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _check_room(self, ticket: Ticket) -> None:
        request = ticket.request
        if request.sampling.max_tokens > self.positions:
            raise GmaskError(
                f"max_tokens is {request.sampling.max_tokens}, but the model has only {self.positions} positions"
            )
        needed = total_places([ticket.places] * request.n)
        if request.n > self.max_rows or needed > self.max_places:
            raise GmaskError(
                f"{request.n} samples of {ticket.places} tokens, prompt and answers together, need {needed} places; "
                f"the engine has {self.max_places} and {self.max_rows} rows: lower n or max_tokens, or shorten the text"
            )

    def _seconds_to_room(self) -> float:
        """A rough guess of when the queue will be shorter."""
        return float(min(60, max(1, len(self._queue) // max(1, self.max_rows))))

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a setting of each thread
        with torch.inference_mode():
            while self._wait():
                try:
                    self._drop_ended()
                    self._read_waiting()
                    if self._rows:
                        self._decode_step()
                except Exception as error:  # a fault of one step must not end the service
                    self._fail_all(error)
            for ticket in {ticket for _, ticket in self._queue} | {row.ticket for row in self._rows}:
                self._give_up(ticket, "cancelled")

    def _wait(self) -> bool:
        """Waits for something to do; False once the engine is to end."""
        with self._wake:
            while not (self._queue or self._rows or self._is_closed or self._is_draining):
                self._wake.wait()
            return not self._is_closed and bool(self._queue or self._rows)

    def _drop_ended(self) -> None:
        """Lets go of what was cancelled or is too late."""
        now = time.monotonic()

        def end_of(ticket: Ticket) -> End | None:
            if ticket.is_cancelled:
                return "cancelled"
            return "timeout" if ticket.deadline is not None and now > ticket.deadline else None

        with self._wake:
            over = [ticket for _, ticket in self._queue if end_of(ticket)]
            if over:
                self._queue = [(rank, ticket) for rank, ticket in self._queue if ticket not in over]
                heapq.heapify(self._queue)
        for ticket in {*over, *(row.ticket for row in self._rows if end_of(row.ticket))}:
            self._give_up(ticket, end_of(ticket) or "cancelled")

    def _give_up(self, ticket: Ticket, end: End, error: Exception | None = None) -> None:
        self._remove_rows(ticket)
        self._ends[end] += sum(latest.end is None for latest in ticket.latest)
        self._tell(lambda: ticket.give_up(end, error))

    def _remove_rows(self, ticket: Ticket) -> None:
        for index in reversed([index for index, row in enumerate(self._rows) if row.ticket is ticket]):
            self._remove(index)

    def _remove(self, index: int) -> None:
        self._slots.remove(index)
        self._rows[index] = self._rows[-1]
        self._rows.pop()

    @staticmethod
    def _tell(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("a listener failed")  # its fault is no other request's

    def _fail_all(self, error: Exception) -> None:
        log.error("a decoding step failed", exc_info=error)
        self._slots = SlotCache(self.model.config.num_hidden_layers)
        tickets = {row.ticket for row in self._rows}
        self._rows.clear()
        for ticket in tickets:
            self._give_up(ticket, "failed", error)

    def _read_waiting(self) -> None:
        """Reads the contexts that come next and have room, in one batch."""
        batch: list[Ticket] = []
        with self._wake:
            while self._queue:
                ticket = self._queue[0][1]
                if not self._has_room([*batch, ticket]):
                    break
                batch.append(heapq.heappop(self._queue)[1])
        if not batch:
            return
        try:
            self._read(batch)
        except Exception as error:
            if len(batch) > 1 and not is_shortage(error):
                self._read_alone(batch)
                return
            for ticket in batch:
                self._give_up(ticket, "failed", error)

    def _read_alone(self, batch: Sequence[Ticket]) -> None:
        """Finds the request that made a batch fail."""
        for ticket in batch:
            self._remove_rows(ticket)
        for ticket in batch:
            try:
                self._read([ticket])
            except Exception as error:
                self._give_up(ticket, "failed", error)

    def _has_room(self, batch: Sequence[Ticket]) -> bool:
        wanted = [ticket.places for ticket in batch for _ in range(ticket.request.n)]
        places = [row.ticket.places for row in self._rows] + wanted
        width = max(len(ticket.request.context.ids) + 1 for ticket in batch)
        return (
            len(places) <= self.max_rows
            and total_places(places) <= self.max_places
            and (len(batch) == 1 or width * len(batch) <= self.prefill_tokens)
        )

    def _read(self, batch: Sequence[Ticket]) -> None:
        memory = Memory(self.model, self.special)
        logits = memory.read_logits([ticket.request.context for ticket in batch])
        width = memory.cache.get_seq_length()
        rows: list[Row] = []
        for number, ticket in enumerate(batch):
            columns = real_columns(memory.is_real, number, width=width)
            self._slots.add(memory.cache, number, columns, copies=ticket.request.n, room=ticket.places)
            rows += [self._make_row(ticket, index) for index in range(ticket.request.n)]
            self._prompt_tokens += len(ticket.request.context.ids) + 1
        first = len(self._rows)
        self._rows += rows
        repeated = [number for number, ticket in enumerate(batch) for _ in range(ticket.request.n)]
        self._advance(range(first, len(self._rows)), logits[repeated])

    def _make_row(self, ticket: Ticket, index: int) -> Row:
        sampling = ticket.request.sampling
        rules = Rules(self.ends, max_tokens=sampling.max_tokens, min_tokens=sampling.min_tokens)
        dice = Dice.make(sampling, index, ticket.seed)
        row = Row(ticket, Hypothesis(0, index, ticket.request.context), dice, rules)
        if sampling.stop:
            row.rules = replace(rules, is_stopped=lambda ids: self._is_stopped(row, ids[-1]))
        return row

    def _decode_step(self) -> None:
        inputs = [row.hypothesis.next_input(self.special.sop) for row in self._rows]
        ids, *places = torch.tensor(inputs, device=self.model.device).unbind(-1)
        visible = self._slots.begin_step(self.model.device)
        outputs = self.model(
            input_ids=ids[:, None],
            layout=torch.stack(places, dim=1)[:, :, None],
            attention_mask=visible,
            past_key_values=self._slots,
            use_cache=True,
        )
        self._slots.end_step()
        self._steps += 1
        self._advance(range(len(self._rows)), outputs.logits[:, -1].float())

    def _advance(self, indices: Sequence[int], logits: Tensor) -> None:
        """Adds the next token to rows; lets those go that have ended."""
        rows = [self._rows[index] for index in indices]
        sick = logits.isnan().any(-1).tolist()
        tokens = self._chooser.choose(logits, [row.hypothesis for row in rows], [row.dice for row in rows])
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
        ended: list[int] = []
        for place, (index, row) in enumerate(zip(indices, rows, strict=True)):
            error = row.dice.fault
            if sick[place]:
                error = GmaskError("the model computes values that are not numbers for this request")
            if error is not None:
                self._tell_row(row, "failed", error)
                ended.append(index)
                continue
            count = row.ticket.request.sampling.top_logprobs
            top = top_tokens(logprobs[place], count) if count else ()
            if self._say(row, tokens[place], chosen[place], top):
                ended.append(index)
        for index in reversed(ended):
            self._remove(index)

    def _say(self, row: Row, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> bool:
        """Has a row say a token; True if that was its last."""
        before = len(row.hypothesis.done)
        if not row.hypothesis.open.ids:
            row.top_logprobs, row.text, row.assembler = [], "", TextAssembler(self.tokenizer)
        row.hypothesis = row.hypothesis.advance(token, logprob, row.rules)
        ends_answer = len(row.hypothesis.done) > before
        row.dice.accept(token, ends_answer=ends_answer)
        if top:
            row.top_logprobs.append(top)
        self._answer_tokens += 1
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
            self._ends[end] += 1
        self._tell(lambda: row.ticket.report(progress))


def _default_places(model: PreTrainedModel, rows: int) -> int:
    config = model.config
    positions: int = config.max_position_embeddings
    place_bytes: int = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    fitting = free_bytes(model.device) // 2 // place_bytes
    one = total_places([2 * positions])  # the longest context, and as long an answer
    return max(one, min(fitting, max(one, rows * capacity_for(positions // 4))))
