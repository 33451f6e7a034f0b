"""What is asked of the engine, and what does it tell of it?"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gmask.errors import GmaskError
from gmask.generation.context import Context
from gmask.generation.decoding import Answer
from gmask.generation.sampling import SamplingParameters

End = Literal["complete", "cancelled", "timeout", "failed"]

log = logging.getLogger(__name__)


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
