"""Does the server stop work that nobody waits for, and say so when its engine has ended?"""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import gmask
from fake_engine import FakeEngine
from gmask.generation.constraints import ConstraintError
from gmask.generation.engine import Engine
from gmask.serving.app import create_app
from slow_engine import wait_until
from tiny_folder import make_folder

COMPLETION = {"prompt": "The dog", "max_tokens": 3}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")), device="cpu")


def drive(
    app: Any, path: str, body: dict[str, Any], has_begun: Callable[[], Any], *, leave_after: int
) -> list[dict[str, Any]]:
    """What is sent to a client that goes once its request has begun and it has had so many messages."""
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if len(sent) >= leave_after:
                gone.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        task = asyncio.create_task(app(scope, receive, send))
        while not has_begun():
            assert not task.done(), "it ended before it began"
            await asyncio.sleep(0.001)
        if leave_after == 0:
            gone.set()
        await asyncio.wait_for(task, 20)

    asyncio.run(run())
    return sent


@pytest.mark.parametrize(("stream", "leave_after"), [(False, 0), (True, 2), (True, 0)])
def test_who_leaves_is_not_written_for(loaded, stream: bool, leave_after: int) -> None:
    engine = FakeEngine()
    engine.tokens_before_pause = 1 if stream else 0
    app = create_app(*loaded, engine=engine)  # type: ignore[arg-type]
    body = {**COMPLETION, "n": 2, "stream": stream}
    # What was submitted, not what is live: the latter may have come and gone between two looks at it.
    drive(app, "/v1/completions", body, lambda: engine.requests, leave_after=leave_after)
    wait_until(lambda: not engine.live)
    assert engine.ends == {"cancelled": 2}
    assert app.state.backend.open_jobs == set()
    app.state.backend.close()


def pass_forever(model: Any) -> Any:
    """Work that is never done by itself."""

    def work(*args: Any, **kwargs: Any) -> None:
        while True:
            model.base_model(input_ids=torch.tensor([[16]]), layout=torch.zeros(1, 2, 1, dtype=torch.long))

    return work


def test_what_the_engine_does_not_do_ends_with_its_time(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmask.serving.blanks.infill", pass_forever(loaded[0]))
    with TestClient(create_app(*loaded, engine=FakeEngine())) as client:  # type: ignore[arg-type]
        late = client.post("/v1/infill", json={"text": "[MASK]", "n": 2, "timeout": 0.1})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert client.post("/v1/score", json={"text": "[MASK]", "answers": ["a"]}).status_code == 200
        assert client.app.state.backend.worker.waiting == 0


def test_what_the_engine_does_not_do_ends_when_its_client_leaves(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    work = pass_forever(loaded[0])
    monkeypatch.setattr("gmask.serving.blanks.score", lambda *args, **kwargs: begun.set() or work())
    app = create_app(*loaded, engine=FakeEngine())  # type: ignore[arg-type]
    drive(app, "/v1/score", {"text": "[MASK]", "answers": ["a"]}, begun.is_set, leave_after=0)
    wait_until(lambda: app.state.backend.worker.waiting == 0)
    app.state.backend.close()
    assert loaded[0].base_model._forward_pre_hooks == {}


def test_an_answer_that_cannot_go_on_as_its_client_wants_is_the_clients_mistake(loaded) -> None:
    engine = FakeEngine()
    engine.error = ConstraintError("the JSON schema asks for what the tokens of this vocabulary cannot spell")
    with TestClient(create_app(*loaded, engine=engine)) as client:  # type: ignore[arg-type]
        refused = client.post("/v1/completions", json=COMPLETION)
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
        assert (
            '"type":"invalid_request_error"' in client.post("/v1/completions", json={**COMPLETION, "stream": True}).text
        )


def test_an_engine_that_has_failed_for_good_is_told_to_the_probes(
    loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(engine: Engine) -> None:
        raise RuntimeError("secret inside")

    app = create_app(*loaded)
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/ready").status_code == client.get("/health").status_code == 200
        monkeypatch.setattr(Engine, "_wait", fail)
        assert client.post("/v1/completions", json=COMPLETION).status_code == 503
        wait_until(lambda: not app.state.backend.engine.is_alive)
        for response in (client.get("/ready"), client.get("/health"), client.post("/v1/completions", json=COMPLETION)):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
            assert "retry-after" in response.headers and "secret" not in response.text
    assert "the engine has ended" in caplog.text
