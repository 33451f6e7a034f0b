"""The engine: many requests in one batch, each joining and leaving at any token.

A thread of its own alternates: it reads the contexts of waiting requests, whole (a context is bidirectional: it can
neither be cut into chunks nor be shared by its beginning), at most ``prefill_tokens`` of them together, and then
decodes one token for every running row. A request that waits thus holds the running ones up by one prefill at most.
Rows of any length, with any number of blanks left, share a step (`SlotCache`).

Shape letters: R rows, V vocabulary.
"""

import heapq
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError, is_shortage
from gmask.generation.adapters import AdapterSet
from gmask.generation.answers import Answer, Hypothesis, Rules, TextAssembler
from gmask.generation.decode import Memory
from gmask.generation.sampling import Chooser, Dice, SamplingParameters, top_tokens
from gmask.generation.text import Context, PromptFormat, find_format
from gmask.hardware import free_bytes
from gmask.models.cache import SlotCache, capacity_for, real_columns, total_places

log = logging.getLogger(__name__)
__all__ = ["Counts", "Engine", "EngineClosed", "Progress", "QueueFull", "Request", "Ticket"]
End = Literal["complete", "cancelled", "timeout", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A context whose blanks are to be filled."""

    context: Context
    sampling: SamplingParameters
    n: int = 1  # independent samples of the context, which is read once
    adapter: str | None = None  # the name of one of the engine's; None: the model alone
    priority: int = 0  # lower is served first
    timeout: float | None = None  # seconds from submission


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a sample stands, after each of its tokens and at its end."""

    index: int  # which sample, from 0
    done: tuple[Answer, ...]  # of the blanks that are complete
    open: Answer  # the one that is being written
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # beside each token of the latest answer, if asked for
    end: End | None = None  # None: it goes on
    error: Exception | None = None  # why it failed


Tell = Callable[[Progress], None]


class QueueFull(GmaskError):
    """Too many requests are waiting."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s")
        self.retry_after = retry_after  # seconds


class EngineClosed(GmaskError):
    """The engine answers no more: it was closed, or has failed for good."""


class Ticket:
    """A submitted request."""

    def __init__(
        self, request: Request, tell: Tell, *, seed: int, order: int, deadline: float | None, prefix: int = 0
    ) -> None:
        """``prefix``: positions that the model itself puts in front."""
        self.request, self.tell = request, tell
        self.seed, self.order, self.deadline, self.prefix = seed, order, deadline, prefix
        self.is_cancelled = False
        self.latest = [Progress(index, (), Answer()) for index in range(request.n)]
        self._is_over = threading.Event()

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in the queue."""
        return self.request.priority, self.order

    @property
    def places(self) -> int:
        """Of keys and values that one sample needs in the end: the context, and each answer with its ``<sop>``."""
        context, tokens = self.request.context, self.request.sampling.max_tokens
        return self.prefix + len(context.ids) + len(context.places) * (tokens + 1)

    def outer_end(self, now: float) -> End | None:
        """What ends it from outside at a time of `time.monotonic`; None while it may go on."""
        if self.is_cancelled:
            return "cancelled"
        return "timeout" if self.deadline is not None and now > self.deadline else None

    def cancel(self) -> None:
        """Has the engine stop; what was said so far is told once more, with the end "cancelled"."""
        self.is_cancelled = True

    def wait(self, timeout: float | None = None) -> list[Progress]:
        """Waits for the end; returns the last progress of every sample.

        Raises:
            TimeoutError: the end did not come in ``timeout`` seconds.
        """
        if not self._is_over.wait(timeout):
            raise TimeoutError("the request is still running")
        return self.latest

    def report(self, progress: Progress) -> None:
        """Tells of a sample; for the engine. A listener that fails is no other request's affair."""
        self.latest[progress.index] = progress
        try:
            self.tell(progress)
        except Exception:
            log.exception("a listener failed")
        if all(latest.end for latest in self.latest):
            self._is_over.set()

    def give_up(self, end: End, error: Exception | None = None) -> None:
        """Ends all samples that have not ended."""
        for latest in self.latest:
            if latest.end is None:
                self.report(Progress(latest.index, latest.done, latest.open, latest.top_logprobs, end, error))


PREFILL_TOKENS = 1024
"""Tokens of contexts, padding counted, that are read together."""


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


class Engine:
    """Answers requests in one batch that they join and leave at any token; greedy answers are those of single runs.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        max_rows: samples that run together.
        max_places: positions of keys and values of all running rows together; by default as many as ``max_rows`` rows
            of a quarter of the model's positions need, in at most half of the free memory.
        max_queue: requests that may wait.
        prefill_tokens: of contexts that are read together.
        adapters: that requests may name. Rows of different ones are decoded together; their contexts are read one
            adapter after the other.
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
        adapters: AdapterSet | None = None,
    ) -> None:
        self.model, self.tokenizer, self.max_queue = model, tokenizer, max_queue
        self.positions: int = model.config.max_position_embeddings
        self.prefix: int = getattr(model.config, "pre_seq_len", None) or 0
        self.adapters = adapters or AdapterSet(model, {})
        self.room = Room(max_rows, max_places or _default_places(model, max_rows), prefill_tokens)
        prompt_format = find_format(model, tokenizer)
        self.special = prompt_format.special
        self._speaker = Speaker(model, tokenizer, prompt_format)
        self._slots = SlotCache(model.config.num_hidden_layers)
        self._rows: list[Row] = []
        self._reading: list[Ticket] = []  # the latest ones
        self._line = WaitingLine()
        self._wake = threading.Condition()
        self._submitted = self._prompt_tokens = self._steps = 0
        self._is_closed = self._is_draining = False
        self._thread = threading.Thread(
            target=self._run, args=(torch.get_num_threads(),), name="gmask-engine", daemon=True
        )
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs; once it does not, nothing is answered any more."""
        return self._thread.is_alive()

    def submit(self, request: Request, tell: Tell = lambda progress: None) -> Ticket:
        """Has a request answered.

        Args:
            tell: is called, from the engine's thread, after each token of each sample and at its end; must not block.

        Raises:
            QueueFull: too many requests wait.
            EngineClosed: it answers no more.
            GmaskError: a context that the model or the engine has no room for.
        """
        if request.n < 1:
            raise GmaskError(f"n must be at least 1, not {request.n}")
        if request.adapter is not None and request.adapter not in self.adapters.names:
            raise GmaskError(f"there is no adapter {request.adapter!r}")
        request.context.check_length(self.positions)
        if request.sampling.max_tokens > self.positions:
            raise GmaskError(
                f"max_tokens is {request.sampling.max_tokens}, but the model has only {self.positions} positions"
            )
        seed = request.sampling.seed
        seed = int(np.random.default_rng().integers(2**62)) if seed is None else seed
        with self._wake:
            deadline = None if request.timeout is None else time.monotonic() + request.timeout
            prefix = self.prefix + self.adapters.prefix_length(request.adapter)
            ticket = Ticket(request, tell, seed=seed, order=self._submitted, deadline=deadline, prefix=prefix)
            self.room.check(ticket)
            if self._is_closed or self._is_draining:
                raise EngineClosed("the engine is closed")
            if len(self._line) >= self.max_queue:
                raise QueueFull(len(self._line), self._seconds_to_room())
            self._submitted += 1
            self._line.push(ticket)
            self._wake.notify()
        return ticket

    def counts(self) -> Counts:
        """What the engine is doing now, and has done."""
        with self._wake:
            return Counts(
                waiting=len(self._line),
                running=len(self._rows),
                places=total_places([row.ticket.places for row in self._rows]),
                max_places=self.room.places,
                prompt_tokens=self._prompt_tokens,
                answer_tokens=self._speaker.tokens,
                steps=self._steps,
                ends=dict(self._speaker.ends),
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

    def _seconds_to_room(self) -> float:
        """A rough guess of when the queue will be shorter."""
        return float(min(60, max(1, len(self._line) // max(1, self.room.rows))))

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a setting of each thread
        end: End = "cancelled"
        fault: EngineClosed | None = None
        try:
            with torch.inference_mode():
                while self._wait():
                    self._turn()
        except BaseException as error:  # what could not be mended must still reach those who wait
            log.critical("the engine has ended", exc_info=error)
            end, fault = "failed", EngineClosed("the engine has failed for good: the server must be started again")
        finally:
            with self._wake:
                self._is_closed = True
                left = {*self._line, *self._held()}
                self._line, self._rows = WaitingLine(), []
            for ticket in left:
                self._speaker.give_up(ticket, end, fault)

    def _turn(self) -> None:
        try:
            self._drop_ended()
            self._read_waiting()
            if self._rows:
                self._decode_step()
        except Exception as error:  # a fault of one step must not end the service
            self._fail_all(error)

    def _wait(self) -> bool:
        """Waits for something to do; False once the engine is to end."""
        with self._wake:
            while not (self._line or self._rows or self._is_closed or self._is_draining):
                self._wake.wait()
            return not self._is_closed and bool(self._line or self._rows)

    def _drop_ended(self) -> None:
        """Lets go of what was cancelled or is too late."""
        now = time.monotonic()
        with self._wake:
            over = self._line.remove(lambda ticket: ticket.outer_end(now))
        for ticket in {*over, *(row.ticket for row in self._rows)}:
            if end := ticket.outer_end(now):
                self._give_up(ticket, end)

    def _give_up(self, ticket: Ticket, end: End, error: Exception | None = None) -> None:
        self._remove_rows(ticket)
        self._speaker.give_up(ticket, end, error)

    def _remove_rows(self, ticket: Ticket) -> None:
        for index in reversed([index for index, row in enumerate(self._rows) if row.ticket is ticket]):
            self._remove(index)

    def _remove(self, index: int) -> None:
        self._slots.remove(index)
        self._rows[index] = self._rows[-1]
        self._rows.pop()

    def _fail_all(self, error: Exception) -> None:
        log.error("a decoding step failed", exc_info=error)
        self._slots = SlotCache(self.model.config.num_hidden_layers)
        tickets = self._held()
        self._rows.clear()
        for ticket in tickets:
            self._speaker.give_up(ticket, "failed", error)

    def _held(self) -> set[Ticket]:
        """The requests that wait no more; to give up one that has ended changes nothing."""
        return {*self._reading, *(row.ticket for row in self._rows)}

    def _read_waiting(self) -> None:
        """Reads the contexts that come next and have room, in one batch for each of their adapters."""
        with self._wake:
            batch = self._line.take(self.room, [row.ticket.places for row in self._rows])
        self._reading = batch
        for adapter in dict.fromkeys(ticket.request.adapter for ticket in batch):
            self._read_batch([ticket for ticket in batch if ticket.request.adapter == adapter])

    def _read_batch(self, batch: Sequence[Ticket]) -> None:
        """Reads contexts of one adapter."""
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

    def _read(self, batch: Sequence[Ticket]) -> None:
        memory = Memory(self.model, self.special)
        with self.adapters.only(batch[0].request.adapter):
            logits = memory.read_logits([ticket.request.context for ticket in batch])
        rows = [self._speaker.make_row(ticket, index) for ticket in batch for index in range(ticket.request.n)]
        first = len(self._rows)
        try:
            self._fill_slots(memory, batch)
        except BaseException:
            self._slots.keep(first)  # no slot without a row
            raise
        self._rows += rows
        self._prompt_tokens += sum(len(ticket.request.context.ids) + 1 for ticket in batch)
        repeated = [number for number, ticket in enumerate(batch) for _ in range(ticket.request.n)]
        self._advance(first, logits[repeated])

    def _fill_slots(self, memory: Memory, batch: Sequence[Ticket]) -> None:
        width = memory.cache.get_seq_length()
        for number, ticket in enumerate(batch):
            columns = real_columns(memory.is_real, number, width=width)
            self._slots.add(memory.cache, number, columns, copies=ticket.request.n, room=ticket.places)

    def _decode_step(self) -> None:
        inputs = [row.hypothesis.next_input(self.special.sop) for row in self._rows]
        ids, *places = torch.tensor(inputs, device=self.model.device).unbind(-1)
        visible = self._slots.begin_step(self.model.device)
        with self.adapters.rows([row.ticket.request.adapter for row in self._rows]):
            outputs = self.model(
                input_ids=ids[:, None],
                layout=torch.stack(places, dim=1)[:, :, None],
                attention_mask=visible,
                past_key_values=self._slots,
                use_cache=True,
            )
        self._slots.end_step()
        self._steps += 1
        self._advance(0, outputs.logits[:, -1].float())

    def _advance(self, first: int, logits: torch.Tensor) -> None:
        """Has the rows from a first one on say their next tokens; lets those go that have ended."""
        ended = self._speaker.advance(self._rows[first:], logits)
        for index in reversed(range(first, len(self._rows))):
            if ended[index - first]:
                self._remove(index)


def _default_places(model: PreTrainedModel, rows: int) -> int:
    config = model.config
    positions: int = config.max_position_embeddings
    place_bytes: int = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    fitting = free_bytes(model.device) // 2 // place_bytes
    one = total_places([2 * positions])  # the longest context, and as long an answer
    return max(one, min(fitting, max(one, rows * capacity_for(positions // 4))))


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine holds at a time."""

    rows: int  # samples
    places: int  # of keys and values, of all rows together
    prefill_tokens: int  # of contexts that are read together, padding counted

    def check(self, ticket: Ticket) -> None:
        """Raises `GmaskError` for a request that would have no room in an empty engine."""
        n = ticket.request.n
        needed = total_places([ticket.places] * n)
        if n > self.rows or needed > self.places:
            raise GmaskError(
                f"{n} samples of {ticket.places} tokens, prompt and answers together, need {needed} places; "
                f"the engine has {self.places} and {self.rows} rows: lower n or max_tokens, or shorten the text"
            )

    def holds(self, running: Sequence[int], batch: Sequence[Ticket]) -> bool:
        """Whether requests can be read together, beside running rows that may come to take so many places each."""
        places = [*running, *(ticket.places for ticket in batch for _ in range(ticket.request.n))]
        width = max(len(ticket.request.context.ids) + 1 for ticket in batch)
        return (
            len(places) <= self.rows
            and total_places(places) <= self.places
            and (len(batch) == 1 or width * len(batch) <= self.prefill_tokens)
        )


class WaitingLine:
    """Requests by priority, then in their order; one that has no room yet is not overtaken."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Ticket]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Ticket]:
        return (ticket for _, ticket in self._heap)

    def push(self, ticket: Ticket) -> None:
        """Lets a request wait."""
        heapq.heappush(self._heap, (ticket.rank, ticket))

    def take(self, room: Room, running: Sequence[int]) -> list[Ticket]:
        """The next requests, as many as `Room.holds` together."""
        batch: list[Ticket] = []
        while self._heap and room.holds(running, [*batch, self._heap[0][1]]):
            batch.append(heapq.heappop(self._heap)[1])
        return batch

    def remove(self, is_over: Callable[[Ticket], object]) -> list[Ticket]:
        """The requests that are over, which wait no more."""
        removed = [ticket for _, ticket in self._heap if is_over(ticket)]
        if removed:
            self._heap = [(rank, ticket) for rank, ticket in self._heap if ticket not in removed]
            heapq.heapify(self._heap)
        return removed


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
