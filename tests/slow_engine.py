"""Which engine waits before every step, and when is an answer what a single run gives?"""

import threading
import time
from typing import Any

import pytest

import gmask
from gmask.generation.encoding import TextReader
from gmask.generation.engine import Engine, Request, SampleProgress, Submission
from gmask.generation.settings import Sampling


class SlowEngine:
    """An engine of two rows that waits at a gate before every decoding step."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.gate = threading.Event()
        self.reader = TextReader(tokenizer)
        self.engine = Engine(model, tokenizer, max_rows=2, max_queue=3)
        decode = self.engine._decode

        def wait_and_decode() -> None:
            self.gate.wait()
            decode()

        self.engine._decode = wait_and_decode  # type: ignore[method-assign]

    def submit(self, n: int = 1) -> Submission:
        sampling = Sampling(max_tokens=8, min_tokens=8, n=n)
        return self.engine.submit(Request(context=self.reader.read("a [MASK] b").context, sampling=sampling))

    def fill(self) -> Submission:
        """Has both rows run, and wait at the gate."""
        ticket = self.submit(n=2)
        wait_until(lambda: self.engine.counts().running == 2)
        return ticket


def wait_until(is_so: Any) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.005)


def assert_idle(engine: Engine) -> None:
    wait_until(lambda: engine.counts().running == 0 and engine.counts().waiting == 0)
    assert engine.slots.lengths == []


def assert_as_alone(
    progress: SampleProgress, request: dict[str, Any], loaded: tuple[Any, Any], *, min_tokens: int = 1
) -> None:
    alone = gmask.infill(*loaded, request["text"], max_tokens=request["max_tokens"], min_tokens=min_tokens)
    assert [answer.ids for answer in progress.done] == [
        tuple(token.id for token in blank.tokens) for blank in alone.blanks
    ]
    assert sum(answer.logprob for answer in progress.done) == pytest.approx(alone.logprob, abs=1e-3)
