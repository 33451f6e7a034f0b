"""How does what the engine's thread tells reach the event loop?"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from gmask.generation.requests import Progress
from gmask.serving.metrics import Metrics
from gmask.serving.samples import Tops, blank_of

Key = tuple[int, int]
"""Which context of a request, and which of its samples."""


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
