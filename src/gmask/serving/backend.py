"""Runs requests on the engine or on the worker, and sends results as server-sent events.

The engine writes answers in its own thread. One worker thread does what the engine does not (beams, scores,
embeddings), one function after the other. A function that is late, or for which nobody waits any more, is ended before
its next forward pass.
"""

import asyncio
import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.load import LanguageModel
from gmask.conversation import Conversation
from gmask.errors import GmaskError
from gmask.generation.constraints import ConstraintError
from gmask.generation.encoding import BLANKS, Context, Prompt, PromptFormat, TextReader, find_format, fit_prompt
from gmask.generation.engine import Engine, EngineClosed, Request, SampleProgress, Submission
from gmask.generation.settings import Sampling
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.models.reward import RewardHead
from gmask.serving.middleware import ApiError, Metrics, as_api_error
from gmask.serving.replies import TopLogprobs, blank_of
from gmask.serving.settings import ServerSettings

Result = TypeVar("Result")
Event = Mapping[str, Any] | BaseModel
"""An event of a stream, which is sent as JSON."""


class Backend:
    """A model, its tokenizer, the engine that writes answers, and the worker for what the engine does not do."""

    def __init__(
        self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, engine: Engine, settings: ServerSettings
    ) -> None:
        self.model, self.tokenizer, self.engine, self.settings = model, tokenizer, engine, settings
        self.metrics = Metrics([engine.counts])
        self.began = int(time.time())
        self.is_draining = False
        self.open_jobs: set[Job] = set()
        self.worker = Worker(model)

    @cached_property
    def format(self) -> PromptFormat:
        """The prompt format of the model."""
        return find_format(self.model, self.tokenizer)

    @property
    def fills_blanks(self) -> bool:
        """True for a GLM that writes, False for a ChatGLM."""
        return isinstance(self.model, GLMForConditionalGeneration)

    @property
    def is_glm(self) -> bool:
        """True for a GLM with any head."""
        return isinstance(self.model.config, GLMConfig)

    @property
    def gives_rewards(self) -> bool:
        """True for a reward model, which writes nothing."""
        return isinstance(self.model, RewardHead)

    @cached_property
    def reader(self) -> TextReader:
        """The reader of texts with blanks; call `require_blanks` first."""
        return TextReader(self.tokenizer, self.model.config.prompt_ids)

    @property
    def blanks(self) -> list[str]:
        """The blank tokens that the model was trained with; none for a ChatGLM."""
        return [blank for blank in BLANKS if self.fills_blanks and blank in self.reader.blank_ids]

    @property
    def positions(self) -> int:
        """The number of positions of the model."""
        return int(self.model.config.max_position_embeddings)

    @property
    def longest_answer(self) -> int:
        """The most tokens of an answer."""
        limit = self.settings.max_tokens
        return self.positions if limit is None else min(limit, self.positions)

    def require_blanks(self, purpose: str) -> GLMForConditionalGeneration:
        """Returns the model, if it fills blanks; ``purpose`` begins the message of the error.

        Raises:
            ApiError: it is a ChatGLM.
        """
        if not isinstance(self.model, GLMForConditionalGeneration):
            raise ApiError(400, f"{purpose} needs a GLM, which fills blanks: a ChatGLM was tuned for dialogue alone")
        return self.model

    @property
    def model_names(self) -> list[str]:
        """The names that clients may ask for: of the model, and of the model with each adapter."""
        own = self.settings.model_name
        return [own, *(f"{own}:{adapter}" for adapter in self.engine.adapters.names)]

    def find_adapter(self, name: str | None) -> str | None:
        """Returns the adapter of one of `model_names`; None for the model alone, also without a name."""
        own = self.settings.model_name
        return None if not name or name == own else name.removeprefix(f"{own}:")

    def check_open(self) -> None:
        """Raises `ApiError` once the server is ending, or its engine has ended."""
        if self.is_draining:
            raise ApiError(503, "the server is ending: ask another one, or later", retry_after=5)
        self.check_engine()

    def check_engine(self) -> None:
        """Raises `ApiError` if the engine has failed for good."""
        if not self.engine.is_alive and not self.is_draining:
            raise ApiError(503, "the engine has failed for good: the server must be started again", retry_after=30)

    def check_samples(self, samples: int) -> None:
        """Raises `ApiError` for more answers than one request may ask for; ask before its texts are read."""
        limit = self.settings.max_samples
        if samples > limit:
            raise ApiError(400, f"{samples} answers in one request; this server writes at most {limit}")

    async def fit(self, conversation: Conversation, *, longest: int, max_tokens: int | None) -> Prompt:
        """Runs `fit_prompt` for a conversation, in a thread, since tokenizing may take a while."""
        query, rounds = conversation.require_query(), conversation.rounds
        return await asyncio.to_thread(fit_prompt, query, rounds, self.format, longest=longest, max_tokens=max_tokens)

    def deadline(self, wanted: float | None) -> float:
        """Returns the seconds that a request may take."""
        return min(wanted or math.inf, self.settings.request_seconds)

    def submit(
        self,
        http_request: HttpRequest | None,
        contexts: Sequence[Context],
        sampling: Sampling,
        *,
        n: int = 1,
        adapter: str | None = None,
        timeout: float | None = None,
        is_streamed: bool = False,
    ) -> "Job":
        """Submits contexts to the engine, all or none. They are cancelled if the client disconnects.

        Raises:
            ApiError: too many samples; the server takes no requests.
            GmaskError: the engine's queue is full; a context is too long.
        """
        self.check_open()
        samples = n * len(contexts)
        self.check_samples(samples)
        job = Job(self, http_request, samples, wakes_every_token=is_streamed)
        try:
            sampling = replace(sampling, n=n)
            for index, context in enumerate(contexts):
                request = Request(context=context, sampling=sampling, adapter=adapter, timeout=self.deadline(timeout))
                job.submissions.append(self.engine.submit(request, job.listener(index)))
                job.prompt_tokens += len(context.ids) + 1  # <sop>
        except BaseException:
            job.close()
            raise
        return job

    async def offline(
        self,
        http_request: HttpRequest | None,
        function: Callable[[], Result],
        *,
        adapter: str | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Runs a function on the worker, in its turn; ends it if it is late or the client disconnects.

        Raises:
            ApiError: too many functions are waiting; it took too long; the server takes no requests.
        """
        self.check_open()
        if self.worker.waiting >= self.settings.max_queue:
            raise ApiError(429, "too many requests wait for their turn", retry_after=5)

        def through_adapter() -> Result:
            with self.engine.adapters.only(adapter):
                return function()

        seconds = self.deadline(timeout)
        work = self.worker.submit(through_adapter, seconds=seconds)
        answer = asyncio.wrap_future(work.future)
        ends: list[asyncio.Future[Any]] = [answer]
        if http_request is not None:
            ends.append(asyncio.create_task(_await_disconnect(http_request)))
        try:
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Cancelled
            return answer.result()
        except Cancelled:
            self.check_open()
            raise ApiError(504, "there was not enough time for this request: ask for less, or later") from None
        finally:
            work.cancel()
            for end in ends:
                end.cancel()

    def drain(self) -> None:
        """Takes no more requests; those that run are cut after `ServerSettings.drain_seconds`."""
        if not self.is_draining:
            self.is_draining = True
            asyncio.get_running_loop().call_later(self.settings.drain_seconds, self._cancel_all)

    def _cancel_all(self) -> None:
        for job in list(self.open_jobs):
            job.cancel()
        self.worker.cancel_all()

    def close(self) -> None:
        """Ends the engine and the worker."""
        self.worker.close()
        self.engine.close(drain=False, timeout=self.settings.drain_seconds)


def make_backend(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, *, name: str, settings: ServerSettings | None = None
) -> Backend:
    """Makes a backend with an engine of its own; the caller closes it. ``settings`` has the limits.

    Raises:
        GmaskError: a reward model, which writes nothing.
    """
    if isinstance(model, RewardHead):
        raise GmaskError(
            f"{name}: is a reward model, which writes nothing: gmask serve and gmask score --reward read it"
        )
    limits = replace(settings or ServerSettings(), model_name=name)
    engine = Engine(model, tokenizer, max_rows=limits.max_rows, max_queue=limits.max_queue)
    return Backend(model, tokenizer, engine, limits)


Wanted = Literal["texts", "rewards", "anything"]


def find_backend(
    backends: Sequence[Backend], name: str | None, *, for_chat: bool = False, wants: Wanted = "texts"
) -> Backend:
    """Returns the backend of a model's name; without a name the first, and for a conversation the last.

    Raises:
        ApiError: the name of another model, or a model that does not give what is wanted.
    """
    found = _named_backend(backends, name, for_chat=for_chat)
    own = found.settings.model_name
    if wants == "rewards" and not found.gives_rewards:
        raise ApiError(400, f"{own!r} gives no rewards: serve a folder that gmask reward wrote", param="model")
    if wants == "texts" and found.gives_rewards:
        raise ApiError(400, f"{own!r} is a reward model, which writes nothing: ask /classify", param="model")
    return found


def _named_backend(backends: Sequence[Backend], name: str | None, *, for_chat: bool) -> Backend:
    if not name:
        return backends[-1 if for_chat else 0]
    for backend in backends:
        if name in backend.model_names:
            return backend
    names = ", ".join(repr(known) for backend in backends for known in backend.model_names)
    raise ApiError(404, f"there is no model {name[:100]!r} here, but {names}", param="model", code="model_not_found")


async def _await_disconnect(http_request: HttpRequest) -> None:
    """Returns once the client has disconnected."""
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


Key = tuple[int, int]
"""The index of a context of a request, and that of a sample."""


class Job:
    """The samples of one request on the engine. They are cancelled if it is closed or the client disconnects.

    The engine's thread reports every token. Only for a stream does it wake the event loop each time. Progress that the
    loop has not read yet is replaced by newer one, so that a slow reader needs no more memory.

    Attributes:
        unread: the latest progress of the samples that has not been read.
        top_logprobs: the most probable tokens beside those of a sample, by blank.
    """

    def __init__(
        self, backend: "Backend", http_request: HttpRequest | None, samples: int, *, wakes_every_token: bool
    ) -> None:
        self.backend = backend
        self.submissions: list[Submission] = []
        self.prompt_tokens = 0
        self.unread: dict[Key, SampleProgress] = {}
        self.top_logprobs: defaultdict[Key, dict[int, TopLogprobs]] = defaultdict(dict)
        self._wakes_every_token = wakes_every_token
        self._loop = asyncio.get_running_loop()
        self._has_unread = asyncio.Event()
        self._lock = threading.Lock()
        self._running = samples
        self._submitted = time.perf_counter()
        self._last_token: dict[Key, float] = {}
        backend.open_jobs.add(self)
        self._watcher = None if http_request is None else asyncio.create_task(self._watch(http_request))

    def close(self) -> None:
        """Cancels what is not done, and stops watching the client."""
        self.backend.open_jobs.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()
        self.cancel()

    def cancel(self) -> None:
        """Asks the engine to stop; it still reports the last progress of each sample."""
        for submission in self.submissions:
            submission.cancel()

    async def _watch(self, http_request: HttpRequest) -> None:
        await _await_disconnect(http_request)
        self.close()

    def listener(self, context: int) -> Callable[[SampleProgress], None]:
        """Returns the callback for the progress of a context; the engine's thread calls it."""
        return lambda progress: self._receive((context, progress.index), progress)

    def _receive(self, key: Key, progress: SampleProgress) -> None:
        if progress.end is None:
            self._measure_latency(key)
        with self._lock:
            self.unread[key] = progress
            if progress.top_logprobs:
                self.top_logprobs[key][blank_of(progress)] = progress.top_logprobs
            self._running -= progress.end is not None
            wakes = self._wakes_every_token or not self._running
        if wakes:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._has_unread.set)

    def _measure_latency(self, key: Key) -> None:
        now, last, metrics = time.perf_counter(), self._last_token.get(key), self.backend.metrics
        if last is None:
            metrics.first_token.observe(now - self._submitted)
        else:
            metrics.next_token.observe(now - last)
        self._last_token[key] = now

    async def updates(self) -> AsyncIterator[tuple[Key, SampleProgress]]:
        """Yields the progress of all samples as it comes, until all have ended.

        Raises:
            ApiError: a sample failed, or had no time to begin.
            Exception: the error with which the model failed.
        """
        is_all = False
        while not is_all:
            await self._has_unread.wait()
            self._has_unread.clear()
            with self._lock:
                unread, self.unread = self.unread, {}
                is_all = not self._running
            for key, progress in unread.items():
                self._check(progress)
                yield key, progress

    async def results(self) -> dict[Key, SampleProgress]:
        """Returns the last progress of every sample, in order; errors as of `updates`."""
        last = {key: progress async for key, progress in self.updates()}
        return dict(sorted(last.items()))

    def _check(self, progress: SampleProgress) -> None:
        if progress.end == "failed":
            if isinstance(progress.error, ConstraintError):
                raise ApiError(400, str(progress.error))
            if isinstance(progress.error, GmaskError) and not isinstance(progress.error, EngineClosed):
                raise ApiError(500, str(progress.error))
            if progress.error is None:
                raise RuntimeError("the engine failed at this request")
            # All requests of a step share the error, and each raise would add to its traceback.
            raise progress.error.with_traceback(None)
        if progress.end in ("timeout", "cancelled") and not (progress.done or progress.open.ids):
            if progress.end == "timeout":
                raise ApiError(504, "there was no time for this request: the server is busy; ask later", retry_after=5)
            self.backend.check_open()
            raise ApiError(503, "the request was given up before it began", retry_after=5)


class Cancelled(Exception):
    """The function is late, or nobody waits for it any more."""


class WorkItem(Generic[Result]):
    """A function that waits for the worker or runs there."""

    def __init__(self, function: Callable[[], Result], *, deadline: float) -> None:
        """``deadline``: a time of `time.monotonic`."""
        self.function, self.deadline = function, deadline
        self.is_cancelled = False
        self.future: Future[Result]

    def cancel(self) -> None:
        """Makes it end before its next forward pass."""
        self.is_cancelled = True

    def check(self) -> None:
        """Raises `Cancelled` if it is to end."""
        if self.is_cancelled or time.monotonic() > self.deadline:
            raise Cancelled


class Worker:
    """A thread that calls functions, one after the other.

    Attributes:
        waiting: the number of functions that are not done, including the running one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gmask-offline")
        self._thread = threading.local()  # the engine's passes go through the same model, in a thread of its own
        self._hook = model.base_model.register_forward_pre_hook(self._check)
        self._lock = threading.Lock()
        self._open: set[WorkItem[Any]] = set()

    @property
    def waiting(self) -> int:
        return len(self._open)

    def submit(self, function: Callable[[], Result], *, seconds: float) -> WorkItem[Result]:
        """Queues a function, which has to be done in ``seconds`` from now."""
        work = WorkItem(function, deadline=time.monotonic() + seconds)
        with self._lock:
            self._open.add(work)
        work.future = self._pool.submit(self._run, work)
        work.future.add_done_callback(lambda _: self._forget(work))
        return work

    def cancel_all(self) -> None:
        """Cancels all functions."""
        with self._lock:
            left = list(self._open)
        for work in left:
            work.cancel()

    def close(self) -> None:
        """Cancels all functions, and ends the thread."""
        self.cancel_all()
        self._pool.shutdown(wait=False)
        self._hook.remove()

    def _run(self, work: WorkItem[Result]) -> Result:
        work.check()
        self._thread.work = work
        try:
            return work.function()
        finally:
            self._thread.work = None

    def _forget(self, work: WorkItem[Any]) -> None:
        with self._lock:
            self._open.discard(work)

    def _check(self, *_: Any) -> None:
        work: WorkItem[Any] | None = getattr(self._thread, "work", None)
        if work is not None:
            work.check()


STREAMED: dict[str, Any] = {
    "text/event-stream": {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}
}
"""The entry of the OpenAPI document for a response that may be streamed."""


def stream(job: Job, events: AsyncIterator[Event]) -> StreamingResponse:
    """Returns a response of server-sent events. A later error is an event, too, since the status has been sent."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_lines(job, events), media_type="text/event-stream", headers=headers)


async def _lines(job: Job, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    try:
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                yield _line(event)
    except Exception as error:
        yield _line(as_api_error(error).body())
    else:
        yield "data: [DONE]\n\n"
    finally:
        job.close()


def _line(event: Event) -> str:
    if isinstance(event, BaseModel):
        return f"data: {event.model_dump_json(exclude_unset=True)}\n\n"
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
