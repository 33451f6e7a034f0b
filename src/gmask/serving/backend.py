"""How does an HTTP request reach the engine and the model, and how does it get away from them?"""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.context import Context, TextReader
from gmask.generation.conversation import PromptFormat, find_format
from gmask.generation.engine import Engine, Progress, Request, Ticket
from gmask.generation.sampling import SamplingParameters
from gmask.loading import LanguageModel
from gmask.models.glm import GLMForConditionalGeneration
from gmask.serving.errors import ApiError
from gmask.serving.metrics import Metrics
from gmask.serving.samples import Tops, blank_of
from gmask.serving.settings import ServerSettings

Result = TypeVar("Result")

Key = tuple[int, int]
"""Which context of a request, and which of its samples."""


class Backend:
    """A model, its tokenizer, the engine that writes answers, and one thread for what the engine does not do."""

    def __init__(
        self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, engine: Engine, settings: ServerSettings
    ) -> None:
        self.model, self.tokenizer, self.engine, self.settings = model, tokenizer, engine, settings
        self.metrics = Metrics(engine.counts)
        self.began = int(time.time())
        self.is_draining = False
        self.open_jobs: set[Job] = set()
        self.offline_waiting = 0
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="gmask-offline")

    @cached_property
    def format(self) -> PromptFormat:
        """How the model is talked to."""
        return find_format(self.model, self.tokenizer)

    @property
    def fills_blanks(self) -> bool:
        """Whether the model is a GLM, and no ChatGLM."""
        return isinstance(self.model, GLMForConditionalGeneration)

    @cached_property
    def reader(self) -> TextReader:
        """Of texts with blanks; ask `require_blanks` first."""
        return TextReader(self.tokenizer)

    @property
    def positions(self) -> int:
        """Of the model."""
        return int(self.model.config.max_position_embeddings)

    @property
    def longest_answer(self) -> int:
        """In tokens."""
        limit = self.settings.max_tokens
        return self.positions if limit is None else min(limit, self.positions)

    def require_blanks(self, deed: str) -> GLMForConditionalGeneration:
        """The model, if it fills blanks.

        Raises:
            ApiError: it is a ChatGLM.
        """
        if not isinstance(self.model, GLMForConditionalGeneration):
            raise ApiError(400, f"{deed} needs a GLM, which fills blanks: a ChatGLM was tuned for dialogue alone")
        return self.model

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` for the name of another model."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here, but {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def check_open(self) -> None:
        """Raises `ApiError` once the server is ending."""
        if self.is_draining:
            raise ApiError(503, "the server is ending: ask another one, or later", retry_after=5)

    def deadline(self, wanted: float | None) -> float:
        """Seconds that a request may take."""
        return min(wanted or math.inf, self.settings.request_seconds)

    def submit(
        self,
        http_request: HttpRequest,
        contexts: Sequence[Context],
        sampling: SamplingParameters,
        *,
        n: int = 1,
        timeout: float | None = None,
        is_streamed: bool = False,
    ) -> "Job":
        """Hands contexts to the engine, all or none.

        Raises:
            ApiError: too many samples; the server is ending.
            GmaskError: the engine is full, or a context too long.
        """
        self.check_open()
        samples, limit = n * len(contexts), self.settings.max_samples
        if samples > limit:
            raise ApiError(400, f"{samples} answers in one request; this server writes at most {limit}")
        job = Job(self, http_request, len(contexts), n, wakes_every_token=is_streamed)
        try:
            for index, context in enumerate(contexts):
                request = Request(context=context, sampling=sampling, n=n, timeout=self.deadline(timeout))
                job.tickets.append(self.engine.submit(request, job.mailbox.slot(index)))
                job.prompt_tokens += len(context.ids) + 1  # <sop>
        except BaseException:
            job.close()
            raise
        return job

    async def offline(self, function: Callable[[], Result], *, timeout: float | None = None) -> Result:
        """Runs what the engine does not do (scores, embeddings, beams) in the one thread that does it, in turn.

        Raises:
            ApiError: too many wait; it took too long; the server is ending.
        """
        self.check_open()
        if self.offline_waiting >= self.settings.max_queue:
            raise ApiError(429, "too many requests wait for their turn", retry_after=5)
        self.offline_waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self.worker, function)
        future.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(future, self.deadline(timeout))
        except TimeoutError:
            raise ApiError(504, "there was not enough time for this request: ask for less, or later") from None

    def _leave(self, _: "asyncio.Future[Any]") -> None:
        self.offline_waiting -= 1

    def drain(self) -> None:
        """Takes no more requests; those that run return what they have after `ServerSettings.drain_seconds`."""
        if not self.is_draining:
            self.is_draining = True
            asyncio.get_running_loop().call_later(self.settings.drain_seconds, self._cut)

    def _cut(self) -> None:
        for job in list(self.open_jobs):
            job.cancel()

    def close(self) -> None:
        """Ends the engine and the thread."""
        self.engine.close(drain=False, timeout=self.settings.drain_seconds)
        self.worker.shutdown(wait=False, cancel_futures=True)


class Mailbox:
    """The latest that the engine told of each sample, for the event loop to read.

    The engine's thread tells every token. The event loop is woken for it only if it streams, and once for all that came
    while it was busy; a slow reader therefore holds one progress for each sample, however far the engine has gone.
    """

    def __init__(self, samples: int, metrics: Metrics, *, wakes_every_token: bool) -> None:
        self.metrics = metrics
        self.wakes_every_token = wakes_every_token
        self.loop = asyncio.get_running_loop()
        self.news = asyncio.Event()
        self.lock = threading.Lock()
        self.unread: dict[Key, Progress] = {}
        self.tops: dict[Key, dict[int, Tops]] = {}
        self.running = samples
        self.began = time.perf_counter()
        self.last_told: dict[Key, float] = {}

    def slot(self, context: int) -> Callable[[Progress], None]:
        """Where the engine tells the progress of a context."""
        return lambda progress: self._put((context, progress.index), progress)

    def _put(self, key: Key, progress: Progress) -> None:
        now = time.perf_counter()
        if progress.end is None:
            last = self.last_told.get(key)
            histogram = self.metrics.first_token if last is None else self.metrics.next_token
            histogram.observe(now - (self.began if last is None else last))
            self.last_told[key] = now
        with self.lock:
            self.unread[key] = progress
            if progress.top_logprobs:
                self.tops.setdefault(key, {})[blank_of(progress)] = progress.top_logprobs
            self.running -= progress.end is not None
            is_news = self.wakes_every_token or not self.running
        if is_news:
            with suppress(RuntimeError):  # the loop has ended: nobody listens
                self.loop.call_soon_threadsafe(self.news.set)

    async def take(self) -> tuple[dict[Key, Progress], bool]:
        """What is new, and whether that was all; waits for it."""
        await self.news.wait()
        self.news.clear()
        with self.lock:
            unread, self.unread = self.unread, {}
            return unread, not self.running


class Job:
    """What the engine does for one HTTP request, until it is closed or the client goes."""

    def __init__(
        self, backend: Backend, http_request: HttpRequest, contexts: int, n: int, *, wakes_every_token: bool
    ) -> None:
        self.backend = backend
        self.tickets: list[Ticket] = []
        self.prompt_tokens = 0
        self.mailbox = Mailbox(contexts * n, backend.metrics, wakes_every_token=wakes_every_token)
        backend.open_jobs.add(self)
        self.watcher = asyncio.create_task(self._watch(http_request))

    def close(self) -> None:
        """Has the engine drop what is not done."""
        self.backend.open_jobs.discard(self)
        self.watcher.cancel()
        self.cancel()

    def cancel(self) -> None:
        """Has the engine stop; its last word of each sample still comes."""
        for ticket in self.tickets:
            ticket.cancel()

    async def _watch(self, http_request: HttpRequest) -> None:
        """Waits for the client to go."""
        while (await http_request.receive())["type"] != "http.disconnect":
            pass
        self.close()

    async def news(self) -> AsyncIterator[tuple[Key, Progress]]:
        """The progress of all samples as it comes, to the end of each.

        Raises:
            ApiError, or what made the model fail: a sample failed, or had no time to begin.
        """
        is_all = False
        while not is_all:
            unread, is_all = await self.mailbox.take()
            for key, progress in unread.items():
                self._check(progress)
                yield key, progress

    async def results(self) -> dict[Key, Progress]:
        """The last progress of every sample, in order; errors as of `news`."""
        last = {key: progress async for key, progress in self.news()}
        return dict(sorted(last.items()))

    def tops(self, key: Key) -> dict[int, Tops]:
        """The most probable tokens beside those of a sample, by its blanks."""
        return self.mailbox.tops.get(key, {})

    def _check(self, progress: Progress) -> None:
        if progress.end == "failed":
            if isinstance(progress.error, GmaskError):
                raise ApiError(500, str(progress.error))
            raise progress.error or RuntimeError("the engine failed at this request")
        if progress.end in ("timeout", "cancelled") and not (progress.done or progress.open.ids):
            if progress.end == "timeout":
                raise ApiError(504, "there was no time for this request: the server is busy; ask later", retry_after=5)
            self.backend.check_open()
            raise ApiError(503, "the request was given up before it began", retry_after=5)
