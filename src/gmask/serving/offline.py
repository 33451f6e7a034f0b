"""Who does what the engine does not (beams, scores, embeddings), and when does it stop?

One thread, one piece of work after the other. A piece is many passes through the model; one that is late, or that
nobody waits for any more, ends before its next pass.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

Result = TypeVar("Result")


class Dropped(Exception):
    """The work is late, or nobody waits for it."""


class Work(Generic[Result]):
    """A piece of work."""

    def __init__(self, function: Callable[[], Result], *, deadline: float) -> None:
        """``deadline``: a time of `time.monotonic`."""
        self.function, self.deadline = function, deadline
        self.is_dropped = False
        self.future: Future[Result]

    def drop(self) -> None:
        """Has it end before its next pass."""
        self.is_dropped = True

    def check(self) -> None:
        """Raises `Dropped` if it is to end."""
        if self.is_dropped or time.monotonic() > self.deadline:
            raise Dropped


class Worker:
    """The thread.

    Attributes:
        waiting: pieces that are not done, the running one among them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gmask-offline")
        self._thread = threading.local()  # the engine's passes go through the same model, in a thread of its own
        self._hook = model.base_model.register_forward_pre_hook(self._check)
        self._lock = threading.Lock()
        self._open: set[Work[Any]] = set()

    @property
    def waiting(self) -> int:
        return len(self._open)

    def submit(self, function: Callable[[], Result], *, seconds: float) -> Work[Result]:
        """Has a function run in its turn, ``seconds`` from now at the latest."""
        work = Work(function, deadline=time.monotonic() + seconds)
        with self._lock:
            self._open.add(work)
        work.future = self._pool.submit(self._run, work)
        work.future.add_done_callback(lambda _: self._forget(work))
        return work

    def drop_all(self) -> None:
        """Has all work end."""
        with self._lock:
            left = list(self._open)
        for work in left:
            work.drop()

    def close(self) -> None:
        """Ends the thread, and all work."""
        self.drop_all()
        self._pool.shutdown(wait=False)
        self._hook.remove()

    def _run(self, work: Work[Result]) -> Result:
        work.check()
        self._thread.work = work
        try:
            return work.function()
        finally:
            self._thread.work = None

    def _forget(self, work: Work[Any]) -> None:
        with self._lock:
            self._open.discard(work)

    def _check(self, *_: Any) -> None:
        work: Work[Any] | None = getattr(self._thread, "work", None)
        if work is not None:
            work.check()
