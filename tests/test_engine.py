"""Does the engine answer each request as a single run does, whatever else is in the batch, and never lose a slot?"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gmask
from gmask.errors import GmaskError
from gmask.generation import engine as engines
from gmask.generation.constraints import TokenMask
from gmask.generation.encoding import Context, TextReader
from gmask.generation.engine import Engine, QueueFull, Request, SampleProgress
from gmask.generation.settings import Sampling
from slow_engine import SlowEngine, assert_as_alone, assert_idle, wait_until
from tiny_folder import make_folder

GOLDEN = Path(__file__).with_name("golden")
TEXTS = (
    "[MASK]",
    "a b [MASK] c",
    "[MASK] b c d e f [MASK] g",
    "one [gMASK]",
    "a [MASK] b [sMASK] c [MASK]",
    "x y z [MASK]",
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def engine(loaded: tuple[Any, Any]) -> Iterator[Engine]:
    made = Engine(*loaded, max_rows=5, max_queue=64, prefill_tokens=24)
    yield made
    made.close()


@pytest.fixture
def slow(loaded: tuple[Any, Any]) -> Iterator[SlowEngine]:
    made = SlowEngine(*loaded)
    yield made
    made.gate.set()
    made.engine.close(drain=False)


requests = st.fixed_dictionaries(
    {"text": st.sampled_from(TEXTS), "max_tokens": st.integers(1, 9), "n": st.sampled_from([1, 1, 1, 2, 3])}
)

fates = st.sampled_from(["stay", "stay", "cancel", "late"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    traffic=st.lists(st.tuples(requests, st.sampled_from(["stay", "stay", "cancel", "late"])), min_size=1, max_size=12)
)
def test_greedy_answers_are_those_of_single_runs(
    traffic: list[tuple[dict[str, Any], str]], loaded: tuple[Any, Any], engine: Engine
) -> None:
    reader = TextReader(loaded[1])
    tickets = []
    for request, fate in traffic:
        ticket = engine.submit(
            Request(
                context=reader.read(request["text"]).context,
                sampling=Sampling(max_tokens=request["max_tokens"], n=request["n"]),
                timeout=0.0 if fate == "late" else None,
            )
        )
        if fate == "cancel":
            ticket.cancel()
        tickets.append(ticket)
    for (request, fate), ticket in zip(traffic, tickets, strict=True):
        for progress in ticket.wait(20):
            assert progress.end == "complete" or fate != "stay"
            if progress.end == "complete":
                assert_as_alone(progress, request, loaded)
    assert_idle(engine)


@pytest.mark.parametrize(
    "kind", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0, "top_p": 0.6}]
)
def test_samples_are_those_of_infill_with_the_same_seed(
    kind: dict[str, float], loaded: tuple[Any, Any], engine: Engine
) -> None:
    context = TextReader(loaded[1]).read(TEXTS[2]).context
    sampling = Sampling(seed=7, max_tokens=6, n=3, **kind)  # type: ignore[arg-type]
    found = engine.submit(Request(context=context, sampling=sampling)).wait(20)
    alone = gmask.infill(*loaded, TEXTS[2], n=3, seed=7, max_tokens=6, **kind)  # type: ignore[arg-type]
    drawn = {
        tuple(tuple(token.id for token in blank.tokens) for blank in one.blanks) for one in (alone, *alone.alternatives)
    }
    assert {tuple(answer.ids for answer in progress.done) for progress in found} == drawn


def test_a_chatglm_is_answered_too() -> None:
    folder = GOLDEN / "chatglm-tiny" / "model"
    shared = Path(__file__).parents[2] / "shared" / "golden" / "chatglm-tiny" / "model"
    source = folder if (folder / "ice_text.model").is_file() else shared
    if not (source / "ice_text.model").is_file():
        pytest.skip("the published vocabulary is not here")
    model, tokenizer = gmask.load(source)
    chatter = gmask.Chat(model, tokenizer, max_tokens=12, temperature=0).chatter
    queries = ["你好", "hello there, how are you today?", "1 + 1"]
    engine = Engine(model, tokenizer, max_rows=4)
    prompts = [chatter.fit([], query) for query in queries]
    tickets = [engine.submit(Request(context=prompt.context, sampling=Sampling(max_tokens=12))) for prompt in prompts]
    for prompt, ticket in zip(prompts, tickets, strict=True):
        (progress,) = ticket.wait(30)
        (alone,) = chatter.reply([prompt], [0])
        assert len(progress.done[0].ids) == alone.reply_tokens
        assert progress.done[0].logprob == pytest.approx(alone.logprob, abs=1e-3)
    engine.close()


def test_memory_is_given_back_behind_the_contexts_of_a_large_model(
    loaded: tuple[Any, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(engines, "GIVES_BACK_FROM", 0)
    monkeypatch.setattr(engines, "give_back_freed_memory", lambda: given.append(1))
    made = Engine(*loaded, max_rows=2)
    request = {"text": TEXTS[1], "max_tokens": 6, "n": 1}
    for _ in range(2):
        context = TextReader(loaded[1]).read(TEXTS[1]).context
        (progress,) = made.submit(Request(context=context, sampling=Sampling(max_tokens=6))).wait(20)
        assert_as_alone(progress, request, loaded)
    made.close()
    assert made.gives_back
    assert len(given) == 4  # twice here, twice alone
    assert not engine.gives_back  # made for the same model, which counts as small


def test_what_is_told_grows_token_by_token(loaded: tuple[Any, Any], engine: Engine) -> None:
    told: list[SampleProgress] = []
    context = TextReader(loaded[1]).read(TEXTS[4]).context
    sampling = Sampling(max_tokens=4, min_tokens=2, top_logprobs=3)
    ticket = engine.submit(Request(context=context, sampling=sampling), told.append)
    (last,) = ticket.wait(20)
    assert told[-1] == last and last.end == "complete" and len(last.done) == 3
    assert [progress.end for progress in told[:-1]] == [None] * (len(told) - 1)
    spoken = [sum(len(answer.ids) for answer in (*progress.done, progress.open)) for progress in told]
    assert spoken == sorted(spoken)
    for progress in told:
        answer = progress.open if progress.open.ids else progress.done[-1]
        ended = [] if progress.open.ids or answer.end_logprob is None else [answer.end_logprob]
        for token, logprob, top in zip(answer.ids, answer.logprobs, progress.top_logprobs, strict=False):
            assert logprob <= top[0][1] + 1e-5
            assert dict(top).get(token, logprob) == pytest.approx(logprob)
        assert len(progress.top_logprobs) == len(answer.ids) + len(ended)
        assert all(len(top) == 3 and top[0][1] >= top[1][1] >= top[2][1] for top in progress.top_logprobs)


def test_stop_texts_end_an_answer_across_tokens(loaded: tuple[Any, Any], engine: Engine) -> None:
    text = "a b [MASK] c"
    whole = gmask.infill(*loaded, text, max_tokens=9, min_tokens=9).blanks[0]
    raw = "".join(token.text for token in whole.tokens)
    stop = raw[3:6]
    context = TextReader(loaded[1]).read(text).context
    sampling = Sampling(max_tokens=9, min_tokens=9, stop=(stop,))
    (progress,) = engine.submit(Request(context=context, sampling=sampling)).wait(20)
    alone = gmask.infill(*loaded, text, max_tokens=9, min_tokens=9, stop=stop).blanks[0]
    assert progress.done[0].finish == alone.finish == "stop"
    assert progress.done[0].ids == tuple(token.id for token in alone.tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"logit_bias": {20: 100.0}},
        {"repetition_penalty": 1e6},
        {"presence_penalty": 1e6},
        {"frequency_penalty": 1e6},
    ],
)
def test_scores_are_changed(change: dict[str, Any], loaded: tuple[Any, Any], engine: Engine) -> None:
    context = TextReader(loaded[1]).read("a [MASK]").context
    sampling = Sampling(max_tokens=6, min_tokens=6, **change)
    (progress,) = engine.submit(Request(context=context, sampling=sampling)).wait(20)
    ids = progress.done[0].ids
    if "logit_bias" in change:
        assert ids == (20,) * 6
    else:
        assert len(set(ids)) == 6, "nothing is said twice"


class OnlyTokens:
    """A constraint: these tokens, in this order."""

    def __init__(self, vocabulary_size: int, *tokens: int) -> None:
        self.vocabulary_size, self.tokens = vocabulary_size, tokens

    def start(self) -> TokenMask:
        return Written(self.vocabulary_size, self.tokens)


class Written:
    def __init__(self, vocabulary_size: int, tokens: tuple[int, ...]) -> None:
        self.vocabulary_size, self.left = vocabulary_size, list(tokens)

    def allowed(self) -> Tensor:
        mask = torch.zeros(self.vocabulary_size, dtype=torch.bool)
        mask[self.left[:1]] = True
        return mask

    def accept(self, token_id: int) -> None:
        assert self.left.pop(0) == token_id

    def is_complete(self) -> bool:
        return not self.left


def test_a_constraint_holds_for_every_blank(loaded: tuple[Any, Any], engine: Engine) -> None:
    context = TextReader(loaded[1]).read(TEXTS[4]).context
    sampling = Sampling(max_tokens=9, min_tokens=5, constraint=OnlyTokens(loaded[0].config.vocab_size, 30, 31, 32))
    (progress,) = engine.submit(Request(context=context, sampling=sampling)).wait(20)
    assert [answer.ids for answer in progress.done] == [(30, 31, 32)] * 3
    assert {answer.finish for answer in progress.done} == {"end"}


class NoWay(OnlyTokens):
    """A constraint that cannot be met."""

    def start(self) -> TokenMask:
        raise GmaskError("no token can spell this")


def test_a_constraint_that_cannot_be_met_harms_no_other(loaded: tuple[Any, Any], engine: Engine) -> None:
    context = TextReader(loaded[1]).read("a [MASK]").context
    tickets = [
        engine.submit(Request(context=context, sampling=Sampling(max_tokens=3, constraint=constraint)))
        for constraint in (None, NoWay(0), None)
    ]
    ends = [ticket.wait(20)[0] for ticket in tickets]
    assert [end.end for end in ends] == ["complete", "failed", "complete"]
    assert str(ends[1].error) == "no token can spell this"
    assert_idle(engine)


def test_priority_goes_before_order(slow: SlowEngine) -> None:
    ended: list[str] = []
    first = slow.fill()
    for name, priority in (("late", 1), ("early", 0)):
        context = slow.reader.read("b [MASK]").context
        slow.engine.submit(
            Request(context=context, sampling=Sampling(max_tokens=1, n=2), priority=priority),
            lambda progress, name=name: ended.append(name),
        )
    slow.gate.set()
    first.wait(20)
    wait_until(lambda: len(ended) == 4)
    assert ended == ["early", "early", "late", "late"]


def test_the_queue_is_bounded(slow: SlowEngine) -> None:
    running = slow.fill()
    waiting = [slow.submit() for _ in range(3)]
    with pytest.raises(QueueFull) as caught:
        slow.submit()
    assert caught.value.retry_after >= 1
    slow.gate.set()
    assert all(ticket.wait(20)[0].end == "complete" for ticket in [running, *waiting])


def test_cancelling_gives_the_slots_back(slow: SlowEngine) -> None:
    cancelled, waiting = slow.fill(), slow.submit()
    cancelled.cancel()
    slow.gate.set()
    assert [latest.end for latest in cancelled.wait(20)] == ["cancelled"] * 2
    assert all(latest.open.ids for latest in cancelled.latest), "what was said is told"
    assert waiting.wait(20)[0].end == "complete"
    assert_idle(slow.engine)


def test_a_row_that_goes_between_two_steps_leaves_the_others_as_they_are(
    loaded: tuple[Any, Any], slow: SlowEngine
) -> None:
    with slow.engine._wake:  # so that both are read together
        cancelled, running = slow.submit(), slow.submit()
    wait_until(lambda: slow.engine.counts().running == 2)
    cancelled.cancel()
    slow.gate.set()
    assert cancelled.wait(20)[0].end == "cancelled"
    assert_as_alone(running.wait(20)[0], {"text": "a [MASK] b", "max_tokens": 8}, loaded, min_tokens=8)


def test_what_is_too_late_ends_where_it_stands(slow: SlowEngine) -> None:
    context = slow.reader.read("a [MASK]").context
    sampling = Sampling(max_tokens=8, min_tokens=8, n=2)
    late = slow.engine.submit(Request(context=context, sampling=sampling, timeout=0.05))
    wait_until(lambda: slow.engine.counts().running == 2 or late.latest[0].end)
    time.sleep(0.06)
    slow.gate.set()
    assert [latest.end for latest in late.wait(20)] == ["timeout"] * 2
    assert_idle(slow.engine)


def test_closing_finishes_or_returns_what_there_is(loaded: tuple[Any, Any]) -> None:
    slow = SlowEngine(*loaded)
    tickets = [slow.fill(), *(slow.submit() for _ in range(3))]
    closing = threading.Thread(target=slow.engine.close)
    closing.start()
    wait_until(lambda: slow.engine._is_draining)
    with pytest.raises(GmaskError, match="closed"):
        slow.submit()
    slow.gate.set()
    closing.join(20)
    assert [ticket.wait(0)[0].end for ticket in tickets] == ["complete"] * 4
    abrupt = SlowEngine(*loaded)
    tickets = [abrupt.fill(), abrupt.submit()]
    threading.Timer(0.05, abrupt.gate.set).start()
    abrupt.engine.close(drain=False)
    assert [ticket.wait(0)[0].end for ticket in tickets] == ["cancelled"] * 2


@pytest.mark.parametrize(
    ("request_values", "sampling", "message"),
    [
        ({}, {"n": 0}, "n is 0: it must be above 0"),
        ({}, {"n": 6}, "the engine has .* 5 rows"),
        ({}, {"max_tokens": 10**6}, "max_tokens is 1000000"),
        ({"context": Context(tuple(range(16, 40)) * 30, (3,))}, {}, "tokens, but the model has only"),
    ],
)
def test_what_has_no_room_is_refused_at_once(
    request_values: dict[str, Any], sampling: dict[str, Any], message: str, loaded: tuple[Any, Any], engine: Engine
) -> None:
    context = TextReader(loaded[1]).read("a [MASK]").context
    values: dict[str, Any] = {"context": context, **request_values}
    with pytest.raises(GmaskError, match=message):
        engine.submit(Request(sampling=Sampling(**sampling), **values))
