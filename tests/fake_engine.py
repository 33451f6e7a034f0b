"""Which engine do the tests of the server steer token by token?"""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from gmask.generation.adapters import AdapterSet
from gmask.generation.answers import Answer
from gmask.generation.engine import Counts, End, OnProgress, QueueFull, Request, SampleProgress, Submission


class FakeEngine:
    """Says the same tokens to every request, in a thread of its own, while `runs` is set.

    Its interface is that of `gmask.generation.engine.Engine`.
    """

    def __init__(self, ids: Sequence[int] = (20, 21, 22), *, max_queue: int = 256, runs: bool = True) -> None:
        self.adapters = AdapterSet(None, {})  # type: ignore[arg-type]
        self.ids = tuple(ids)
        self.max_queue = max_queue
        self.runs = threading.Event()
        self.tokens_before_pause = 10**9  # of each sample
        self.error: Exception | None = None  # of every request, instead of an answer
        self.requests: list[Request] = []
        self.live: list[Submission] = []
        self.ends: Counter[End] = Counter()
        self.lock = threading.Lock()
        self.is_closed = False
        if runs:
            self.runs.set()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def submit(self, request: Request, on_progress: OnProgress | None = None) -> Submission:
        with self.lock:
            if len(self.live) >= self.max_queue:
                raise QueueFull(len(self.live), 7.0)
            deadline = None if request.timeout is None else time.monotonic() + request.timeout
            submission = Submission(request, on_progress, seed=0, order=len(self.requests), deadline=deadline)
            self.requests.append(request)
            self.live.append(submission)
        return submission

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def counts(self) -> Counts:
        return Counts(0, len(self.live), 0, 1, 0, 0, 0, dict(self.ends))

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        self.is_closed = True
        self.thread.join()

    def _run(self) -> None:
        while not self.is_closed:
            with self.lock:
                live = list(self.live)
            for submission in live:
                self._step(submission)
            time.sleep(0.001)
        for submission in self.live:
            submission.give_up("cancelled")

    def _step(self, submission: Submission) -> None:
        if submission.is_cancelled:
            self._end(submission, "cancelled")
        elif submission.deadline is not None and time.monotonic() > submission.deadline:
            self._end(submission, "timeout")
        elif self.error is not None:
            self._end(submission, "failed")
        elif self.runs.is_set():
            for latest in list(submission.latest):
                if latest.end is None and len(latest.open.ids) < self.tokens_before_pause:
                    submission.report(self._say(submission, latest))
            if all(latest.end for latest in submission.latest):
                self._forget(submission, "complete")

    def _say(self, submission: Submission, latest: SampleProgress) -> SampleProgress:
        count = len(latest.open.ids)
        top = ((7, -0.5),) * bool(submission.request.sampling.top_logprobs)
        tops = (*(latest.top_logprobs if count else ()), top) if top else ()
        is_last = count == min(len(self.ids), submission.request.sampling.max_tokens)
        if not is_last:
            grown = Answer((*latest.open.ids, self.ids[count]), (*latest.open.logprobs, -0.25 * (latest.index + 1)))
            return replace(latest, open=grown, top_logprobs=tops)
        ended = replace(latest.open, end_logprob=-0.5, finish="end")
        done = (*latest.done, ended)
        end: End | None = "complete" if len(done) == len(submission.request.context.blanks) else None
        return replace(latest, done=done, open=Answer(), top_logprobs=tops, end=end)

    def _end(self, submission: Submission, end: End) -> None:
        submission.give_up(end, self.error)
        self._forget(submission, end)

    def _forget(self, submission: Submission, end: End) -> None:
        with self.lock:
            self.live.remove(submission)
            self.ends[end] += submission.request.sampling.n
