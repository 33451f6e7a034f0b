"""How are many requests answered at once, each joining and leaving the batch at any token?

A thread of its own alternates: it reads the contexts of waiting requests, whole (a context is bidirectional: it can
neither be cut into chunks nor be shared by its beginning), at most ``prefill_tokens`` of them together, and then
decodes one token for every running row. A request that waits thus holds the running ones up by one prefill at most.
Which requests are read is told in waiting.py, what a row says in rows.py. Rows of any length, with any number of blanks
left, share a step: slots.py.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.memory import free_bytes
from gmask.errors import GmaskError, is_shortage
from gmask.generation.adapters import AdapterSet
from gmask.generation.conversation import find_format
from gmask.generation.decoding import Memory
from gmask.generation.requests import End, EngineClosed, Progress, QueueFull, Request, Tell, Ticket
from gmask.generation.rows import Row, Speaker
from gmask.generation.slots import SlotCache, real_columns, total_places
from gmask.generation.waiting import Room, WaitingLine
from gmask.models.cache import capacity_for

__all__ = ["Counts", "Engine", "EngineClosed", "Progress", "QueueFull", "Request", "Ticket"]

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
