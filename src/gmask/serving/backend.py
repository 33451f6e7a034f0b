"""How does an HTTP request reach the engine and the model, and how does it get away from them?"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.context import Context, TextReader
from gmask.generation.conversation import PromptFormat, find_format
from gmask.generation.engine import Engine, EngineClosed, Progress, Request, Ticket
from gmask.generation.sampling import SamplingParameters
from gmask.loading import LanguageModel
from gmask.models.glm import GLMForConditionalGeneration
from gmask.serving.errors import ApiError
from gmask.serving.mailbox import Key, Mailbox
from gmask.serving.metrics import Metrics
from gmask.serving.offline import Dropped, Worker
from gmask.serving.samples import Tops
from gmask.serving.settings import ServerSettings

Result = TypeVar("Result")


class Backend:
    """A model, its tokenizer, the engine that writes answers, and the worker for what the engine does not do."""

    def __init__(
        self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, engine: Engine, settings: ServerSettings
    ) -> None:
        self.model, self.tokenizer, self.engine, self.settings = model, tokenizer, engine, settings
        self.metrics = Metrics(engine.counts)
        self.began = int(time.time())
        self.is_draining = False
        self.open_jobs: set[Job] = set()
        self.worker = Worker(model)

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
        return TextReader(self.tokenizer, self.model.config.prompt_ids)

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

    @property
    def model_names(self) -> list[str]:
        """What clients may call for: the model, and it with each of its adapters."""
        own = self.settings.model_name
        return [own, *(f"{own}:{adapter}" for adapter in self.engine.adapters.names)]

    def find_adapter(self, name: str | None) -> str | None:
        """The adapter that a client's name of a model means; None for the model alone, which needs no name.

        Raises:
            ApiError: the name of another model.
        """
        names = self.model_names
        if name is not None and name not in names:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here, but {', '.join(map(repr, names))}",
                param="model",
                code="model_not_found",
            )
        return None if name in (None, names[0]) else str(name).removeprefix(f"{names[0]}:")

    def check_open(self) -> None:
        """Raises `ApiError` once the server is ending, or its engine has ended."""
        if self.is_draining:
            raise ApiError(503, "the server is ending: ask another one, or later", retry_after=5)
        self.check_engine()

    def check_engine(self) -> None:
        """Raises `ApiError` where only a new process helps."""
        if not self.engine.is_alive and not self.is_draining:
            raise ApiError(503, "the engine has failed for good: the server must be started again", retry_after=30)

    def deadline(self, wanted: float | None) -> float:
        """Seconds that a request may take."""
        return min(wanted or math.inf, self.settings.request_seconds)

    def submit(
        self,
        http_request: HttpRequest | None,
        contexts: Sequence[Context],
        sampling: SamplingParameters,
        *,
        n: int = 1,
        adapter: str | None = None,
        timeout: float | None = None,
        is_streamed: bool = False,
    ) -> "Job":
        """Hands contexts to the engine, all or none, until they are answered or the client has gone.

        Raises:
            ApiError: too many samples; the server takes no requests.
            GmaskError: the engine is full, or a context too long.
        """
        self.check_open()
        samples, limit = n * len(contexts), self.settings.max_samples
        if samples > limit:
            raise ApiError(400, f"{samples} answers in one request; this server writes at most {limit}")
        job = Job(self, http_request, len(contexts), n, wakes_every_token=is_streamed)
        try:
            for index, context in enumerate(contexts):
                request = Request(
                    context=context, sampling=sampling, n=n, adapter=adapter, timeout=self.deadline(timeout)
                )
                job.tickets.append(self.engine.submit(request, job.mailbox.slot(index)))
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
        """Has the worker do what the engine does not, in turn, until it is done, late, or the client has gone.

        Raises:
            ApiError: too many wait; it took too long; the server takes no requests.
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
            ends.append(asyncio.create_task(_await_leaving(http_request)))
        try:
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Dropped
            return answer.result()
        except Dropped:
            self.check_open()
            raise ApiError(504, "there was not enough time for this request: ask for less, or later") from None
        finally:
            work.drop()
            for end in ends:
                end.cancel()

    def drain(self) -> None:
        """Takes no more requests; those that run return what they have after `ServerSettings.drain_seconds`."""
        if not self.is_draining:
            self.is_draining = True
            asyncio.get_running_loop().call_later(self.settings.drain_seconds, self._cut)

    def _cut(self) -> None:
        for job in list(self.open_jobs):
            job.cancel()
        self.worker.drop_all()

    def close(self) -> None:
        """Ends the engine and the worker."""
        self.worker.close()
        self.engine.close(drain=False, timeout=self.settings.drain_seconds)


async def _await_leaving(http_request: HttpRequest) -> None:
    """Ends once the client has gone."""
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


class Job:
    """What the engine does for one request, until it is closed or the client goes."""

    def __init__(
        self, backend: Backend, http_request: HttpRequest | None, contexts: int, n: int, *, wakes_every_token: bool
    ) -> None:
        self.backend = backend
        self.tickets: list[Ticket] = []
        self.prompt_tokens = 0
        self.mailbox = Mailbox(contexts * n, backend.metrics, wakes_every_token=wakes_every_token)
        backend.open_jobs.add(self)
        self.watcher = None if http_request is None else asyncio.create_task(self._watch(http_request))

    def close(self) -> None:
        """Has the engine drop what is not done."""
        self.backend.open_jobs.discard(self)
        if self.watcher is not None:
            self.watcher.cancel()
        self.cancel()

    def cancel(self) -> None:
        """Has the engine stop; its last word of each sample still comes."""
        for ticket in self.tickets:
            ticket.cancel()

    async def _watch(self, http_request: HttpRequest) -> None:
        await _await_leaving(http_request)
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
            if isinstance(progress.error, GmaskError) and not isinstance(progress.error, EngineClosed):
                raise ApiError(500, str(progress.error))
            raise progress.error or RuntimeError("the engine failed at this request")
        if progress.end in ("timeout", "cancelled") and not (progress.done or progress.open.ids):
            if progress.end == "timeout":
                raise ApiError(504, "there was no time for this request: the server is busy; ask later", retry_after=5)
            self.backend.check_open()
            raise ApiError(503, "the request was given up before it began", retry_after=5)
