"""Does a fault of one request, one step or the whole engine stay where it belongs, and reach those who wait?"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import gmask
from gmask.generation.encoding import Context, TextReader
from gmask.generation.engine import Engine, EngineClosed, Request, SampleProgress
from gmask.generation.settings import Sampling
from slow_engine import SlowEngine, assert_as_alone, assert_idle, wait_until
from tiny_folder import make_folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def slow(loaded: tuple[Any, Any]) -> Iterator[SlowEngine]:
    made = SlowEngine(*loaded)
    yield made
    made.gate.set()
    made.engine.close(drain=False)


def test_a_listener_that_fails_harms_no_other(slow: SlowEngine, caplog: Any) -> None:
    def fail(progress: SampleProgress) -> None:
        raise RuntimeError("the client has gone")

    context = slow.reader.read("a [MASK]").context
    bad = slow.engine.submit(Request(context=context, sampling=Sampling(max_tokens=3)), fail)
    good = slow.engine.submit(Request(context=context, sampling=Sampling(max_tokens=3)))
    slow.gate.set()
    assert bad.wait(20)[0].end == good.wait(20)[0].end == "complete"
    assert "a listener failed" in caplog.text


def test_a_listener_that_fails_hides_no_end(slow: SlowEngine) -> None:
    def fail(progress: SampleProgress) -> None:
        raise RuntimeError("the client has gone")

    context = slow.reader.read("a [MASK]").context
    ticket = slow.engine.submit(Request(context=context, sampling=Sampling(max_tokens=3, n=2)), fail)
    ticket.cancel()
    slow.gate.set()
    assert [latest.end for latest in ticket.wait(20)] == ["cancelled"] * 2


def test_contexts_that_find_no_memory_leave_no_slot_behind(
    loaded: tuple[Any, Any], slow: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = slow.submit()
    wait_until(lambda: slow.engine.counts().running == 1)
    last = slow.engine.slots.layers[-1]
    reserve = last.reserve

    def fail(rows: int, *others: Any) -> None:
        if rows > 1:
            raise MemoryError
        reserve(rows, *others)

    scheduler = slow.engine.scheduler
    scheduler.budget = replace(scheduler.budget, rows=3, positions=1000)
    monkeypatch.setattr(last, "reserve", fail)  # when the other layers have their room
    tickets = [slow.submit() for _ in range(2)]
    slow.gate.set()
    assert [ticket.wait(20)[0].end for ticket in tickets] == ["failed"] * 2
    (progress,) = running.wait(20)
    assert progress.end == "complete"
    assert_as_alone(progress, {"text": "a [MASK] b", "max_tokens": 8}, loaded, min_tokens=8)
    assert_idle(slow.engine)


def test_an_engine_that_fails_for_good_tells_everybody(slow: SlowEngine, caplog: Any) -> None:
    running, waiting = slow.fill(), slow.submit()

    def fail(error: Exception) -> None:
        raise error

    slow.engine._fail_all = fail  # type: ignore[method-assign]
    slow.engine.model = None  # what no step can do without
    assert slow.engine.is_alive
    slow.gate.set()
    for ticket in (running, waiting):
        assert all(latest.end == "failed" and isinstance(latest.error, EngineClosed) for latest in ticket.wait(20))
    wait_until(lambda: not slow.engine.is_alive)
    with pytest.raises(EngineClosed):
        slow.submit()
    assert (slow.engine.counts().running, slow.engine.counts().waiting) == (0, 0)
    assert "the engine has ended" in caplog.text


def test_a_context_that_fails_harms_no_other(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, max_rows=4)
    good = TextReader(tokenizer).read("a [MASK] b").context
    bad = Context((10**6, *good.ids), tuple(place + 1 for place in good.blanks))
    tickets = [
        engine.submit(Request(context=context, sampling=Sampling(max_tokens=3))) for context in (good, bad, good)
    ]
    ends = [ticket.wait(20)[0] for ticket in tickets]
    assert [end.end for end in ends] == ["complete", "failed", "complete"] and ends[1].error is not None
    assert_idle(engine)
    engine.close()
