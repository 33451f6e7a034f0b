"""The stepper and the engine: continuous batching, in which requests join and leave the batch at any token.

A step reads the contexts of waiting requests and decodes one token for every running row. Contexts are read whole: they
are bidirectional, so there are no chunked prefills and no shared prefixes. Rows of any length, with any number of
blanks left, share a step (`SlotCache`). `Stepper.run` steps in the thread of its caller until all is answered. An
`Engine` is a stepper with a thread of its own, to which any thread submits requests; it reads at most
``prefill_tokens`` of contexts between two tokens, so that the running rows wait for one prefill at most.

Shape letters: R rows, V vocabulary.
"""

import heapq
import logging
import math
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.allocator import give_back_freed_memory
from gmask.cores import follow_free_cores
from gmask.errors import GmaskError, is_shortage
from gmask.generation.adapters import AdapterSet
from gmask.generation.answers import Answer, Hypothesis, StopMatcher
from gmask.generation.encoding import Context, find_format
from gmask.generation.padding import NOT_NUMBERS, stack_prompts
from gmask.generation.sampling import Sampler, SamplerState, top_tokens
from gmask.generation.settings import Sampling
from gmask.hardware import free_bytes
from gmask.infilling.blanks import BlankTokens
from gmask.models.cache import GrowingCache, SlotCache, capacity_for, position_bytes, total_positions

log = logging.getLogger(__name__)
End = Literal["complete", "cancelled", "timeout", "failed"]


GIVES_BACK_FROM = 1_000_000_000
"""Numbers in the blocks of a model from which on memory that the reading of a context has freed is given back.

Reading takes the longer the larger a model is. Getting the pages again at the next context is then a small part of it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A context whose blanks are to be filled ``sampling.n`` times. The context is read once."""

    context: Context
    sampling: Sampling
    adapter: str | None = None  # the name of an adapter of the engine; None: the model alone
    priority: int = 0  # lower is served first
    timeout: float | None = None  # seconds from submission


@dataclass(frozen=True, slots=True)
class SampleProgress:
    """The state of a sample after one of its tokens, or at its end."""

    index: int  # of the sample, from 0
    done: tuple[Answer, ...]  # the complete answers
    open: Answer  # the answer that is being written
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # beside each token of the latest answer, if asked for
    end: End | None = None  # None: the sample goes on
    error: Exception | None = None  # why it failed


OnProgress = Callable[[SampleProgress], None]


class QueueFull(GmaskError):
    """Too many requests are waiting."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s")
        self.retry_after = retry_after  # seconds


class EngineClosed(GmaskError):
    """The engine takes no more requests: it was closed, or has failed for good."""


class Submission:
    """A submitted request, and the progress of its samples."""

    def __init__(
        self,
        request: Request,
        on_progress: OnProgress | None = None,
        *,
        seed: int,
        order: int,
        deadline: float | None = None,
        prefix: int = 0,
    ) -> None:
        """
        Args:
            on_progress: is called after each token of each sample and at its end.
            seed: sample i draws by ``default_rng([seed, i])``.
            order: the number of requests that were submitted before.
            deadline: a time of `time.monotonic`.
            prefix: positions of a trained prefix in front of the context.
        """
        self.request, self.on_progress = request, on_progress
        self.seed, self.order, self.deadline, self.prefix = seed, order, deadline, prefix
        self.is_cancelled = False
        self.finished: list[Hypothesis] = []
        self.latest = [SampleProgress(index, (), Answer()) for index in range(request.sampling.n)]
        self._left = request.sampling.n  # samples that have not ended
        self._is_over = threading.Event()

    @property
    def rank(self) -> tuple[int, int]:
        """The key by which waiting requests are ordered."""
        return self.request.priority, self.order

    @property
    def positions(self) -> int:
        """The positions of keys and values that one sample needs at most: prefix, context, answers with ``<sop>``."""
        context, tokens = self.request.context, self.request.sampling.max_tokens
        return self.prefix + len(context.ids) + len(context.blanks) * (tokens + 1)

    def forced_end(self, now: float) -> End | None:
        """Returns "cancelled" or "timeout" if it has to end at a time of `time.monotonic`; else None."""
        if self.is_cancelled:
            return "cancelled"
        return "timeout" if self.deadline is not None and now > self.deadline else None

    def cancel(self) -> None:
        """Asks the engine to stop; it reports each sample once more, with the end "cancelled"."""
        self.is_cancelled = True

    def wait(self, timeout: float | None = None) -> list[SampleProgress]:
        """Waits for the end; returns the last progress of every sample.

        Raises:
            TimeoutError: the end did not come in ``timeout`` seconds.
        """
        if not self._is_over.wait(timeout):
            raise TimeoutError("the request is still running")
        return self.latest

    def report(self, progress: SampleProgress) -> None:
        """Reports the progress of a sample; called by the engine. A listener that fails harms no other request."""
        self.latest[progress.index] = progress
        if self.on_progress is not None:
            try:
                self.on_progress(progress)
            except Exception:
                log.exception("a listener failed")
        if progress.end is not None:
            self._left -= 1
            if self._left == 0:
                self._is_over.set()

    def give_up(self, end: End, error: Exception | None = None) -> None:
        """Ends all samples that have not ended."""
        for latest in self.latest:
            if latest.end is None:
                self.report(SampleProgress(latest.index, latest.done, latest.open, latest.top_logprobs, end, error))


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits on what runs together."""

    rows: int = sys.maxsize  # samples
    positions: int = sys.maxsize  # of keys and values, of all rows together
    prefill_tokens: int = sys.maxsize  # of contexts that are read together, padding counted

    def check(self, submission: Submission) -> None:
        """Raises `GmaskError` for a request that does not fit even alone."""
        n = submission.request.sampling.n
        needed = total_positions([submission.positions] * n)
        if n > self.rows or needed > self.positions:
            raise GmaskError(
                f"{n} samples of {submission.positions} tokens, prompt and answers together, need {needed} places; "
                f"the engine has {self.positions} and {self.rows} rows: lower n or max_tokens, or shorten the text"
            )

    def holds(self, running: Sequence[int], batch: Sequence[Submission]) -> bool:
        """Returns True if requests fit together beside the running rows.

        ``running``: the positions that each of these rows needs at most.
        """
        positions = [*running, *(one.positions for one in batch for _ in range(one.request.sampling.n))]
        width = max(len(one.request.context.ids) + 1 for one in batch)
        return (
            len(positions) <= self.rows
            and total_positions(positions) <= self.positions
            and (len(batch) == 1 or width * len(batch) <= self.prefill_tokens)
        )


class Scheduler:
    """The waiting requests, by priority and then by order. A request that does not fit yet is not overtaken."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._heap: list[tuple[tuple[int, int], Submission]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Submission]:
        return (submission for _, submission in self._heap)

    def push(self, submission: Submission) -> None:
        """Adds a request."""
        heapq.heappush(self._heap, (submission.rank, submission))

    def take(self, running: Sequence[int]) -> list[Submission]:
        """Removes and returns the next requests, as many as fit into the budget together."""
        batch: list[Submission] = []
        while self._heap and self.budget.holds(running, [*batch, self._heap[0][1]]):
            batch.append(heapq.heappop(self._heap)[1])
        return batch

    def remove(self, is_over: Callable[[Submission], object]) -> list[Submission]:
        """Removes and returns the requests that are over."""
        removed = [submission for _, submission in self._heap if is_over(submission)]
        if removed:
            self._heap = [(rank, submission) for rank, submission in self._heap if submission not in removed]
            heapq.heapify(self._heap)
        return removed

    def clear(self) -> None:
        """Removes all requests."""
        self._heap.clear()


@dataclass(slots=True)
class RunningSample:
    """A row of the batch."""

    submission: Submission
    hypothesis: Hypothesis
    state: SamplerState
    has_ended: bool = False
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)  # of the open answer


class Stepper:
    """Answers requests by continuous batching, in the thread of its caller. Greedy answers are those of single runs.

    The weights of the model may change between two calls of `run`: nothing computed with them is kept. No gradients are
    recorded.

    Args:
        model: a GLM or a ChatGLM.
        tokenizer: for stop texts.
        sampler: chooses the tokens, and knows which end an answer.
        special: the ids of the special tokens.
        budget: the limits on what runs together.
        adapters: those that requests may name. Rows of different adapters are decoded together; their contexts are read
            one adapter after the other.

    Attributes:
        reserves: True if a row gets the room for its longest answers at once; else its room grows with it.
        gives_back: True if memory that the reading of contexts has freed is given back to the system.
        prompt_tokens, answer_tokens: tokens read and written so far.
        steps: decoding steps so far.
        ends: numbers of samples by how they ended.
    """

    reserves: ClassVar[bool] = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler,
        special: BlankTokens,
        *,
        budget: Budget = Budget(),
        adapters: AdapterSet | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampler, self.special = model, tokenizer, sampler, special
        config = model.config
        numbers = 12 * config.num_hidden_layers * config.hidden_size**2  # of a block: 3 + 1 + 4 + 4 squares
        self.gives_back = model.device.type == "cpu" and numbers >= GIVES_BACK_FROM
        self.prefix: int = getattr(model.config, "pre_seq_len", None) or 0
        self.adapters = adapters or AdapterSet(model, {})
        self.scheduler = Scheduler(budget)
        self.slots = self._empty_slots()
        self.rows: list[RunningSample] = []
        self.prompt_tokens = self.answer_tokens = self.steps = self.submitted = 0
        self.ends: Counter[End] = Counter()
        self.reading: list[Submission] = []  # those whose contexts the latest step read

    def run(self, contexts: Sequence[Context], sampling: Sampling, *, seeds: Sequence[int]) -> list[list[Hypothesis]]:
        """Answers contexts; returns the ``sampling.n`` samples of each, the best first.

        ``seeds`` has one for each context; sample i of it draws by ``default_rng([seed, i])``.

        Raises:
            GmaskError: the model computes values that are not numbers, or a constraint cannot be met.
        """
        # In this order contexts of about one length are read together, with little padding, and long rows start first.
        by_length = sorted(zip(contexts, seeds, range(len(contexts)), strict=True), key=lambda one: -len(one[0].ids))
        prepared = {
            index: self.prepare(Request(context=context, sampling=sampling), seed=seed)
            for context, seed, index in by_length
        }
        submissions = [prepared[index] for index in range(len(contexts))]
        for submission in submissions:
            self.scheduler.budget.check(submission)  # one that never fits would wait for ever
        for submission in submissions:
            self.scheduler.push(submission)
        try:
            while self.has_work:
                self.step()
        finally:
            self.clear()
        penalty = sampling.length_penalty
        return [sorted(one.finished, key=lambda found: -found.score(penalty)) for one in submissions]

    def stream(self, request: Request, *, seed: int) -> Iterator[SampleProgress]:
        """Answers a request, and yields the progress of its samples token by token; errors as of `run`.

        The model computes only as far as the iterator is read.
        """
        unread: deque[SampleProgress] = deque()
        submission = self.prepare(request, unread.append, seed=seed)
        self.scheduler.budget.check(submission)
        self.scheduler.push(submission)
        try:
            while self.has_work:
                self.step()
                while unread:
                    yield unread.popleft()
        finally:
            self.clear()

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.scheduler)

    def _empty_slots(self) -> SlotCache:
        return SlotCache(self.model.config.num_hidden_layers, is_int8=self.model.kv_cache == "int8")

    def clear(self) -> None:
        """Drops all waiting and running requests, and frees their memory."""
        self.scheduler.clear()
        self.rows.clear()
        self.slots = self._empty_slots()
        self.submitted = 0

    def prepare(self, request: Request, on_progress: OnProgress | None = None, *, seed: int) -> Submission:
        """Returns a submission of a request, which is not in the scheduler yet. Arguments as of `Submission`."""
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        prefix = self.prefix + self.adapters.prefix_length(request.adapter)
        order, self.submitted = self.submitted, self.submitted + 1
        return Submission(request, on_progress, seed=seed, order=order, deadline=deadline, prefix=prefix)

    def step(self) -> None:
        """Reads the next contexts that fit, and writes the next token of every row that was running before."""
        follow_free_cores()
        self.reading, is_running = self._take(), bool(self.rows)
        with torch.inference_mode():
            for adapter in dict.fromkeys(submission.request.adapter for submission in self.reading):
                self._read([one for one in self.reading if one.request.adapter == adapter])
            if is_running and self.rows:  # else `stream` yields the first tokens before the next are computed
                self._decode()

    def _take(self) -> list[Submission]:
        """Returns the requests whose contexts are read now: none before three quarters of the rows are free.

        Reading a single context takes as long as a step of all rows, so several are collected.
        """
        if len(self.rows) > self.scheduler.budget.rows // 4:
            return []
        return self._next()

    def _next(self) -> list[Submission]:
        return self.scheduler.take([row.submission.positions for row in self.rows])

    def _read(self, batch: Sequence[Submission]) -> None:
        """Reads contexts of one adapter, and writes the first token of each of their samples."""
        contexts = [submission.request.context for submission in batch]
        copies = [submission.request.sampling.n for submission in batch]
        input_ids, layout, is_real = stack_prompts(contexts, self.special, self.model.device)
        is_taken = not self.rows and is_real is None and self.model.kv_cache is None  # as the slots of these rows
        cache = GrowingCache(self.model.config, spare=is_taken)
        with self.adapters.only(batch[0].request.adapter):
            outputs = self.model(
                input_ids=input_ids,
                layout=layout,
                attention_mask=is_real,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        first, room = len(self.rows), max(submission.positions for submission in batch) if self.reserves else 0
        rows = [self._begin(submission, index) for submission in batch for index in range(len(submission.latest))]
        self.slots.add(cache, is_real, copies=copies, room=room)
        self.rows += rows
        self.prompt_tokens += sum(len(context.ids) + 1 for context in contexts)
        if self.gives_back:
            give_back_freed_memory()
        logits = outputs.logits[:, -1].float()
        if max(copies) > 1:
            logits = logits[[row for row, count in enumerate(copies) for _ in range(count)]]
        self._advance(first, logits)

    def _begin(self, submission: Submission, index: int) -> RunningSample:
        """Returns a sample that has written nothing yet."""
        sampling = submission.request.sampling
        stops = StopMatcher(self.tokenizer, sampling.stop) if sampling.stop else None
        hypothesis = Hypothesis(submission.order, index, submission.request.context, stops=stops)
        return RunningSample(submission, hypothesis, SamplerState.make(sampling, seed=submission.seed, index=index))

    def _decode(self) -> None:
        """Feeds each row its last token, and writes the next one."""
        device = self.model.device
        inputs = torch.tensor([row.hypothesis.next_input(self.special.sop) for row in self.rows], device=device)
        visible = self.slots.begin_step(device)
        with self.adapters.rows([row.submission.request.adapter for row in self.rows]):
            outputs = self.model(
                input_ids=inputs[:, :1],
                layout=inputs[:, 1:, None],
                attention_mask=visible,
                past_key_values=self.slots,
                use_cache=True,
            )
        self.slots.end_step()
        self.steps += 1
        self._advance(0, outputs.logits[:, -1].float())

    def _advance(self, first: int, logits: Tensor) -> None:
        """Writes the next token of each row from index ``first`` on, by logits ``[R, V]``; removes rows that end."""
        rows = self.rows[first:]
        tokens, chosen, logprobs = self.sampler.choose(
            logits, [row.state for row in rows], [row.hypothesis.open.ids for row in rows]
        )
        for index, (row, token, logprob) in enumerate(zip(rows, tokens, chosen, strict=True)):
            error = GmaskError(NOT_NUMBERS) if math.isnan(logprob) else row.state.error
            if error is not None:
                self._fail(row, error)
            else:
                self._write(row, token, logprob, logprobs[index])
        for index in reversed(range(first, len(self.rows))):
            if self.rows[index].has_ended:
                self._remove(index)

    def _write(self, row: RunningSample, token: int, logprob: float, logprobs: Tensor) -> None:
        """Adds a token to a row, and reports it."""
        before = row.hypothesis
        if not before.open.ids:
            row.top_logprobs.clear()
        row.hypothesis = before.advance(token, logprob, row.state.sampling, self.sampler.end_ids)
        row.state.accept(token, ends_answer=len(row.hypothesis.done) > len(before.done))
        if row.state.sampling.top_logprobs:
            row.top_logprobs.append(top_tokens(logprobs, row.state.sampling.top_logprobs))
        self.answer_tokens += 1
        if row.hypothesis.is_complete:
            row.submission.finished.append(row.hypothesis)
        self._report(row, "complete" if row.hypothesis.is_complete else None)

    def _fail(self, row: RunningSample, error: GmaskError) -> None:
        """Handles a row that cannot go on: here the error is the caller's."""
        raise error

    def _report(self, row: RunningSample, end: End | None, error: Exception | None = None) -> None:
        if end is not None:
            row.has_ended = True
            self.ends[end] += 1
        hypothesis = row.hypothesis
        row.submission.report(
            SampleProgress(
                hypothesis.alternative, hypothesis.done, hypothesis.open, tuple(row.top_logprobs), end, error
            )
        )

    def _remove(self, index: int) -> None:
        """Removes a row; the last row takes its slot."""
        self.slots.remove(index)
        self.rows[index] = self.rows[-1]
        self.rows.pop()


@dataclass(frozen=True, slots=True)
class Counts:
    """The load of an engine, and its totals."""

    waiting: int  # requests
    running: int  # rows
    positions: int  # of keys and values that the running rows need at most
    max_positions: int
    prompt_tokens: int  # read so far
    answer_tokens: int  # written so far
    steps: int  # decoding steps so far
    ends: dict[End, int]  # numbers of samples by how they ended


PREFILL_TOKENS = 1024
"""Tokens of contexts, padding counted, that an engine reads between two tokens."""


class Engine(Stepper):
    """A stepper with a thread of its own, to which any thread submits requests.

    An error in one request, or in one step, is reported to the requests that it concerns, and the engine goes on.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        max_rows: samples that run together.
        max_positions: of keys and values of all running rows together; by default as many as ``max_rows`` rows of a
            quarter of the model's positions need, in at most half of the free memory.
        max_queue: the number of requests that may wait.
        prefill_tokens: of the contexts that are read together.
        adapters: as of `Stepper`.
    """

    reserves = True  # so that a row that has begun never runs out of room

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 32,
        max_positions: int | None = None,
        max_queue: int = 256,
        prefill_tokens: int = PREFILL_TOKENS,
        adapters: AdapterSet | None = None,
    ) -> None:
        chat = find_format(model, tokenizer)
        sampler = Sampler.for_model(chat.special, chat.forbidden_ids, tokenizer, model.config.vocab_size)
        budget = Budget(max_rows, max_positions or _default_positions(model, max_rows), prefill_tokens)
        super().__init__(model, tokenizer, sampler, chat.special, budget=budget, adapters=adapters)
        self.max_queue = max_queue
        self.model_positions: int = model.config.max_position_embeddings
        self._wake = threading.Condition()
        self._is_closed = self._is_draining = False
        self._thread = threading.Thread(
            target=self._serve, args=(torch.get_num_threads(),), name="gmask-engine", daemon=True
        )
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while its thread runs. Once it has ended, nothing is answered any more."""
        return self._thread.is_alive()

    def submit(self, request: Request, on_progress: OnProgress | None = None) -> Submission:
        """Adds a request to the queue.

        Args:
            on_progress: is called from the engine's thread after each token of each sample and at its end. It must not
                block.

        Raises:
            QueueFull: too many requests are waiting.
            EngineClosed: the engine takes no more requests.
            GmaskError: a context that does not fit into the model or the engine.
        """
        if request.adapter is not None and request.adapter not in self.adapters.names:
            raise GmaskError(f"there is no adapter {request.adapter!r}")
        request.context.check_length(self.model_positions)
        if request.sampling.max_tokens > self.model_positions:
            raise GmaskError(
                f"max_tokens is {request.sampling.max_tokens}, but the model has only {self.model_positions} positions"
            )
        (seed,) = request.sampling.seeds(1)
        with self._wake:
            submission = self.prepare(request, on_progress, seed=seed)
            self.scheduler.budget.check(submission)
            if self._is_closed or self._is_draining:
                raise EngineClosed("the engine is closed")
            if len(self.scheduler) >= self.max_queue:
                raise QueueFull(len(self.scheduler), self._seconds_to_room())
            self.scheduler.push(submission)
            self._wake.notify()
        return submission

    def counts(self) -> Counts:
        """Returns the present load, and the totals so far."""
        with self._wake:
            return Counts(
                waiting=len(self.scheduler),
                running=len(self.rows),
                positions=total_positions([row.submission.positions for row in self.rows]),
                max_positions=self.scheduler.budget.positions,
                prompt_tokens=self.prompt_tokens,
                answer_tokens=self.answer_tokens,
                steps=self.steps,
                ends=dict(self.ends),
            )

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Closes the engine: running requests are ended or, with ``drain``, may go on for ``timeout`` seconds."""
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
        """Returns a rough estimate of when the queue will be shorter."""
        return float(min(60, max(1, len(self.scheduler) // max(1, self.scheduler.budget.rows))))

    def _serve(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a setting of each thread
        end: End = "cancelled"
        fault: EngineClosed | None = None
        try:
            with torch.inference_mode():  # rows are removed between the steps, too
                while self._wait():
                    try:
                        self._drop_ended()
                        self.step()
                    except Exception as error:  # an error in one step must not end the service
                        self._fail_all(error)
        except BaseException as error:  # those who wait must still be told
            log.critical("the engine has ended", exc_info=error)
            end, fault = "failed", EngineClosed("the engine has failed for good: the server must be started again")
        finally:
            with self._wake:
                self._is_closed = True
                left = {*self.scheduler, *self._held()}
                self.scheduler.clear()
                self.rows.clear()
            for submission in left:
                self._give_up(submission, end, fault)

    def _wait(self) -> bool:
        """Waits for work; returns False once the engine is to end."""
        with self._wake:
            while not (self.has_work or self._is_closed or self._is_draining):
                self._wake.wait()
            return not self._is_closed and self.has_work

    def _take(self) -> list[Submission]:
        with self._wake:  # here contexts are read as soon as they fit
            return self._next()

    def _drop_ended(self) -> None:
        """Ends the requests that were cancelled or have timed out."""
        now = time.monotonic()
        with self._wake:
            over = self.scheduler.remove(lambda submission: submission.forced_end(now))
        for submission in {*over, *(row.submission for row in self.rows)}:
            if end := submission.forced_end(now):
                self._give_up(submission, end)

    def _read(self, batch: Sequence[Submission]) -> None:
        """As of `Stepper`. If a batch fails, its contexts are read one by one, to find the one that failed."""
        try:
            super()._read(batch)
        except Exception as error:
            for submission in batch:
                self._remove_rows(submission)
            if len(batch) == 1 or is_shortage(error):
                log.error("reading a context failed", exc_info=error)
                for submission in batch:
                    self._give_up(submission, "failed", error)
            else:
                for submission in batch:
                    self._read([submission])

    def _fail(self, row: RunningSample, error: GmaskError) -> None:
        self._report(row, "failed", error)

    def _fail_all(self, error: Exception) -> None:
        log.error("a decoding step failed", exc_info=error)
        submissions = self._held()
        self.rows.clear()
        self.slots = self._empty_slots()
        for submission in submissions:
            self._give_up(submission, "failed", error)

    def _held(self) -> set[Submission]:
        """The requests that have left the scheduler. Some may have ended: giving up these changes nothing."""
        return {*self.reading, *(row.submission for row in self.rows)}

    def _give_up(self, submission: Submission, end: End, error: Exception | None = None) -> None:
        """Removes the rows of a request, and ends its samples that have not ended."""
        self._remove_rows(submission)
        self.ends[end] += sum(latest.end is None for latest in submission.latest)
        submission.give_up(end, error)

    def _remove_rows(self, submission: Submission) -> None:
        for index in reversed([index for index, row in enumerate(self.rows) if row.submission is submission]):
            self._remove(index)


def _default_positions(model: PreTrainedModel, rows: int) -> int:
    positions: int = model.config.max_position_embeddings
    fitting = free_bytes(model.device) // 2 // position_bytes(model.config, model.dtype, model.kv_cache)
    one = total_positions([2 * positions])  # the longest context, and as long an answer
    return max(one, min(fitting, max(one, rows * capacity_for(positions // 4))))
