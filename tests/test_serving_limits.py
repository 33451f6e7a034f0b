"""Does the server keep its door, its limits and its peace, whatever one client does?"""

import asyncio
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

import gmask
from fake_engine import FakeEngine
from gmask.cli import main
from gmask.errors import GmaskError
from gmask.generation.adapters import AdapterSet
from gmask.serving.app import create_app, open_port, web_address
from gmask.serving.middleware import JsonFormatter, explain_invalid_body, host_name, is_authorized
from gmask.serving.settings import ServerSettings, default_model_name
from tiny_folder import make_folder

COMPLETION = {"prompt": "The dog", "max_tokens": 3}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture
def serve(loaded) -> Callable[..., Any]:
    @contextmanager
    def start(engine: FakeEngine | None = None, **limits: Any) -> Iterator[TestClient]:
        app = create_app(*loaded, settings=ServerSettings(**limits), engine=engine or FakeEngine())
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client

    return start


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json={**COMPLETION, **body})


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@pytest.mark.parametrize("verb", ["serve", "webui"])
def test_a_taken_port_is_one_line_before_the_model_is_loaded(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if verb == "webui":
        pytest.importorskip("gradio", reason="the page needs gmask[webui]")
    monkeypatch.setattr("gmask.checkpoints.load.load", lambda *_, **__: pytest.fail("the model is loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["gmask", verb, "--port", str(port)])
        with pytest.raises(SystemExit) as ended:
            main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    line = f"gmask: port {port} of 127.0.0.1 cannot be used: it is taken, or is not this machine's\n"
    assert (told.out, told.err) == ("", line)


def test_a_name_is_opened_at_each_of_its_addresses_that_there_is() -> None:
    opened = open_port("localhost", 0)
    assert opened and all(one.getsockname()[1] > 0 for one in opened)
    for one in opened:
        one.close()
    with pytest.raises(GmaskError, match=r"port 80 of 192\.0\.2\.1 cannot be used"):
        open_port("192.0.2.1", 80)


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "a\0b", "\udcff", "\ud83d", "[::1]", "http://127.0.0.1", " "])
def test_what_is_no_name_of_a_host_is_one_line(host: str) -> None:
    with pytest.raises(GmaskError, match="cannot be used: it is taken, or is not this machine's"):
        open_port(host, 8000)


def test_an_address_of_ipv6_is_shown_in_brackets() -> None:
    assert web_address("::1", 8000) == "http://[::1]:8000"
    assert web_address("127.0.0.1", 8000) == "http://127.0.0.1:8000"


def test_without_a_key_only_the_probes_answer(serve) -> None:
    with serve(api_keys=("first", "second")) as client:
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/nothing"):
            response = client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        for key in ("first", "second"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for header in ("Bearer third", "Bearer", "first", "Basic first", "Bearer first second", "Bearer \xff"):
            assert client.get("/v1/models", headers={"Authorization": header.encode("latin-1")}).status_code == 401


@given(st.text(max_size=20), st.lists(st.text(st.characters(codec="ascii"), min_size=1), min_size=1, max_size=3))
def test_a_key_opens_exactly_if_it_is_one_of_them(given_key: str, keys: list[str]) -> None:
    assert is_authorized(f"Bearer {given_key}", keys) == (given_key.strip() in keys)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("127.0.0.1:8000", "127.0.0.1"),
        ("LocalHost", "localhost"),
        ("[::1]:8000", "[::1]"),
        ("[::1]", "[::1]"),
        ("", ""),
    ],
)
def test_host_names_are_read_without_their_port(header: str, name: str) -> None:
    assert host_name(header) == name


def test_a_strange_host_name_is_refused(serve) -> None:
    with serve(allowed_hosts=("localhost",)) as client:
        assert client.get("/health", headers={"Host": "localhost:8000"}).status_code == 200
        assert "allowed_hosts" in client.get("/health", headers={"Host": "evil.example"}).json()["error"]["message"]


def test_no_other_site_may_read_the_answers(serve) -> None:
    with serve() as client:
        asked = client.options(
            "/v1/completions", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        )
        answered = client.post("/v1/completions", json=COMPLETION, headers={"Origin": "https://evil.example"})
        for response in (asked, answered):
            assert not [name for name in response.headers if name.startswith("access-control")]
        plain = client.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": "text/plain"})
        assert plain.status_code == 400  # what a page may send without being asked


def test_a_large_body_is_refused_whether_it_says_its_length_or_not(serve) -> None:
    with serve(max_body_bytes=1000) as client:
        assert ask(client, prompt="a" * 900).status_code == 200
        long = json.dumps({**COMPLETION, "prompt": "a" * 1001})
        for content in (long, iter([long[:600].encode(), long[600:].encode()])):
            response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        lie = client.post("/v1/completions", content=b"{}", headers={"Content-Length": "9" * 30})
        assert lie.status_code == 413


def test_a_body_that_dawdles_is_refused(serve, loaded) -> None:
    app = create_app(*loaded, settings=ServerSettings(body_seconds=0.05), engine=FakeEngine())
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    sent: list[dict[str, Any]] = []

    async def never() -> dict[str, Any]:
        await asyncio.sleep(100)
        return {}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, never, send))
    assert sent[0]["status"] == 408
    app.state.backend.close()


def test_a_full_queue_says_when_to_come_back(serve) -> None:
    engine = FakeEngine(max_queue=0)
    with serve(engine) as client:
        response = ask(client)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "7"
        assert response.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_list_of_prompts_is_taken_whole_or_not_at_all(serve) -> None:
    engine = FakeEngine(max_queue=2, runs=False)
    with serve(engine) as client:
        assert ask(client, prompt=["a", "b", "c"]).status_code == 429
        wait_until(lambda: not engine.live)
        assert engine.ends == {"cancelled": 2}


def test_scores_wait_in_a_queue_with_an_end(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, answers = threading.Event(), []
    monkeypatch.setattr("gmask.serving.blanks.score", lambda *args, **kwargs: goes_on.wait(20) and [])
    body = {"text": "[MASK]", "answers": ["a"]}
    with serve(max_queue=2) as client:
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/score", json=body).status_code))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: client.app.state.backend.worker.waiting == 2)
        refused = client.post("/v1/score", json=body)
        assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
        goes_on.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert client.post("/v1/score", json=body).status_code == 200


LONG = "a " * 400_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": "a"}]}),
        ("/", {"prompt": LONG, "history": []}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": ["a", LONG]}),
        ("/v1/completions", {"prompt": "a", "suffix": LONG}),
        ("/v1/completions", {"prompt": LONG, "echo": True, "max_tokens": 0}),
        ("/v1/infill", {"text": f"{LONG} [MASK]"}),
        ("/v1/infill", {"text": "[MASK]", "choices": [LONG]}),
        ("/v1/score", {"text": f"{LONG} [MASK]", "answers": ["a"]}),
        ("/v1/score", {"text": "[MASK]", "answers": [LONG]}),
        ("/v1/embeddings", {"input": LONG}),
    ],
)
def test_a_text_that_no_model_could_hold_is_refused_before_it_is_cut_into_tokens(
    serve, loaded, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    encode = type(loaded[1]).__call__

    def encode_little(tokenizer: Any, text: str, **options: Any) -> Any:
        assert len(text) < 100_000, "it is cut into tokens"
        return encode(tokenizer, text, **options)

    monkeypatch.setattr(type(loaded[1]), "__call__", encode_little)
    with serve() as client:
        refused = client.post(path, json=body)
        assert refused.status_code == 400, refused.text
        assert "characters, and there is room for" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a"] * 10_000},
        {"prompt": [[17]] * 10_000},
        {"prompt": ["a"] * 10_000, "echo": True, "max_tokens": 0},
        {"prompt": "a", "n": 1000, "echo": True, "max_tokens": 0},
        {"prompt": "a", "best_of": 65},
        {"prompt": ["a"] * 33, "n": 2},
    ],
)
def test_answers_are_counted_before_a_prompt_is_read(
    serve, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    monkeypatch.setattr("gmask.serving.openai.read_prompts", lambda *_: pytest.fail("a prompt is read"))
    with serve() as client:
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 400
        assert "answers in one request; this server writes at most 64" in refused.json()["error"]["message"]


def test_what_is_asked_for_is_counted_before_texts_are_read(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a text is read")

    monkeypatch.setattr("gmask.serving.backend.Backend.fit", fail)
    monkeypatch.setattr("gmask.generation.encoding.TextReader.read", fail)
    many = {"text": ["[MASK]"] * 256, "answers": ["a"] * 1024}
    with serve() as client:
        for path, body, reason in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 65}, "at most 64"),
            ("/v1/infill", {"text": "[MASK]", "n": 65}, "64 at most"),
            ("/v1/score", many, "262144 answers"),
            (
                "/v1/completions",
                {"prompt": "a", "logit_bias": {str(token): 1 for token in range(1025)}},
                "1025 entries",
            ),
        ):
            refused = client.post(path, json=body)
            assert refused.status_code == 400 and reason in refused.json()["error"]["message"], refused.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [-1] * 1000}),
        ("/v1/completions", {"prompt": [[None]] * 1000}),
        ("/v1/chat/completions", {"messages": [None] * 1000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **{f"x{i}": i for i in range(1000)}}),
        ("/v1/completions", {"prompt": "a", "metadata": {str(i): i for i in range(2000)}}),
        ("/v1/infill", {"text": "[MASK]", "choices": [[""]] * 1000}),
        ("/v1/score", {"text": "[MASK]", "answers": [None] * 1000}),
    ],
)  # fmt: skip
def test_of_a_thousand_faults_one_is_looked_for(
    serve, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    found: list[int] = []

    def count(errors: Any, body: Any) -> Any:
        found.append(len(errors))
        return explain_invalid_body(errors, body)

    monkeypatch.setattr("gmask.serving.middleware.explain_invalid_body", count)
    with serve() as client:
        assert client.post(path, json=body).status_code == 400
    assert found and found[0] <= 8  # one for each type that the parameter may have


def test_what_a_body_is_told_by_its_headers(serve) -> None:
    with serve() as client:
        plain = client.post("/v1/completions", content=json.dumps(COMPLETION))
        assert plain.status_code == 400 and "Content-Type: application/json" in plain.json()["error"]["message"]
        empty = client.post("/v1/completions")
        assert empty.status_code == 400 and "there is no body" in empty.json()["error"]["message"]
        packed = client.post("/v1/completions", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
        assert packed.status_code == 415 and "Content-Encoding" in packed.json()["error"]["message"]


def test_a_length_beside_chunks_ends_the_connection(serve) -> None:
    headers = {"Content-Length": "2", "Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    with serve() as client:
        refused = client.post("/v1/completions", content=b"{}", headers=headers)
    assert (refused.status_code, refused.headers["connection"]) == (400, "close")
    assert "Content-Length and Transfer-Encoding" in refused.json()["error"]["message"]


def test_a_deadline_returns_what_there_is(serve) -> None:
    engine = FakeEngine()
    engine.tokens_before_pause = 2
    with serve(engine, request_seconds=0.2) as client:
        choice = ask(client, timeout=1000).json()["choices"][0]
        assert (choice["finish_reason"], len(choice["text"]) > 0) == ("length", True)
        engine.tokens_before_pause = 0
        late = ask(client)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        filled = client.post("/v1/infill", json={"text": "a [MASK] b [MASK].", "timeout": 0.01})
        assert filled.status_code == 504


def test_a_failed_answer_is_its_own_affair(serve, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    with serve(engine) as client:
        engine.error = GmaskError("the model computes values that are not numbers")
        found = ask(client)
        assert (found.status_code, found.json()["error"]["message"]) == (500, str(engine.error))
        engine.error = RuntimeError("secret inside")
        found = ask(client)
        assert found.status_code == 500 and "secret" not in found.text
        assert "secret inside" in caplog.text
        streamed = ask(client, stream=True)
        assert '"type":"server_error"' in streamed.text and "[DONE]" not in streamed.text
        engine.error = None
        assert ask(client).status_code == 200


def test_the_page_asks_for_the_key_itself(serve) -> None:
    with serve(api_keys=("key",)) as client:
        statuses = [client.get(path).status_code for path in ("/ui", "/ui/login", "/uix", "/v1/ui/", "/ui/../metrics")]
        assert statuses == [404, 404, 401, 401, 401]


def test_a_slow_reader_holds_one_progress_for_each_sample(serve, loaded) -> None:
    engine = FakeEngine(ids=[20] * 60, runs=False)
    with (
        serve(engine) as client,
        client.stream(
            "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 60, "n": 2, "stream": True}
        ) as response,
    ):
        wait_until(lambda: engine.live)
        (job,) = client.app.state.backend.open_jobs
        engine.runs.set()
        wait_until(lambda: not engine.live)
        assert len(job.unread) <= 2
        texts = {0: "", 1: ""}
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                texts[choice["index"]] += choice["text"]
    assert texts[0] == texts[1] and len(texts[0]) == 60


def test_the_end_of_the_server_refuses_new_requests_and_returns_what_the_old_ones_have(serve) -> None:
    engine, answers = FakeEngine(), []
    engine.tokens_before_pause = 2
    with serve(engine, drain_seconds=0.3) as client:
        thread = threading.Thread(target=lambda: answers.append(ask(client)))
        thread.start()
        wait_until(lambda: engine.live and engine.live[0].latest[0].open.ids)
        client.portal.call(client.app.state.backend.drain)
        for response in (ask(client), client.get("/ready"), client.post("/v1/embeddings", json={"input": "a"})):
            assert response.status_code == 503 and "retry-after" in response.headers
        assert client.get("/health").status_code == 200
        thread.join()
    assert answers[0].json()["choices"][0]["finish_reason"] == "length"
    assert engine.is_closed


def test_requests_have_ids_and_lines_without_their_text(serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gmask.serving")
    with serve() as client:
        assert client.get("/health", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
        forged = client.get("/health", headers={"X-Request-ID": 'a"b c'}).headers["x-request-id"]
        assert len(forged) == 32
        ask(client, prompt="the secret")
        line = json.loads(JsonFormatter().format(caplog.records[-1]))
        assert (line["endpoint"], line["status"], line["completion_tokens"]) == ("/v1/completions", 200, 3)
        assert "secret" not in json.dumps(line)
    with serve(log_prompts=True) as client:
        ask(client, prompt="the secret\nline")
        formatted = JsonFormatter().format(caplog.records[-1])
        assert json.loads(formatted)["prompt"] == ["the secret\nline"] and "\n" not in formatted


def test_metrics_count_what_happened(serve) -> None:
    with serve() as client, serve() as other:
        ask(client, n=2)
        client.get("/no/such/path/that/a/client/made/up")
        text = client.get("/metrics").text
        assert 'gmask_http_requests_total{endpoint="/v1/completions",status="200"} 1.0' in text
        assert "gmask_time_to_first_token_seconds_count 2.0" in text
        assert "gmask_inter_token_latency_seconds_count 4.0" in text
        assert 'gmask_samples_total{end="complete"} 2.0' in text
        assert "made/up" not in text
        assert "gmask_time_to_first_token_seconds_count 0.0" in other.get("/metrics").text


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"max_rows": 0}, {"max_body_bytes": 1.5}, {"body_seconds": "long"}, {"request_seconds": float("nan")},
                  {"api_keys": ("",)}, {"api_keys": ("schlüssel",)}, {"max_queue": True}):  # fmt: skip
        with pytest.raises(GmaskError, match=next(iter(wrong)).replace("api_keys", "API key")):
            ServerSettings(**wrong)


TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # halves of surrogate pairs, too
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = SCALAR | st.lists(SCALAR | st.lists(SCALAR, max_size=2), max_size=3) | st.dictionaries(TEXT, SCALAR, max_size=3)
PATHS = ["/", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/infill", "/v1/score"]
FIELDS = ["prompt", "messages", "text", "answers", "input", "n", "max_tokens", "stop", "logit_bias", "choices",
          "history", "temperature", "seed", "logprobs", "stream", "suffix", "echo", "response_format",
          "guided_regex", "tools", "tool_choice", "stream_options", "metadata", "model", "pooling"]  # fmt: skip
GOOD = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "text": "[MASK]", "answers": ["a"], "input": "a"}


@pytest.fixture(scope="module")
def fuzzed(loaded) -> Iterator[TestClient]:
    app = create_app(*loaded, settings=ServerSettings(max_body_bytes=10_000), engine=FakeEngine())  # type: ignore[arg-type]
    with TestClient(app) as client:  # an exception that nobody handled is raised here
        yield client


INNER = re.compile(r"function-|\b0x[0-9a-f]{6}|pydantic|instance of|[a-z]+Request\b|ChatMessage|Traceback|https?://")
"""What no client is told: names from inside, addresses in memory, links to the documentation of our libraries."""


def is_calm(response: Any) -> bool:
    """Whether a request was answered, or refused by a message that says nothing of the server's inside."""
    if response.status_code == 200:
        return True
    is_error = set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.status_code < 500 and is_error and not INNER.search(response.text)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_no_json_makes_the_server_fail(fuzzed: TestClient, path: str, body: dict[str, Any]) -> None:
    needed = {"/": ["prompt"], "/v1/chat/completions": ["messages"], "/v1/completions": ["prompt"],
              "/v1/embeddings": ["input"], "/v1/infill": ["text"], "/v1/score": ["text", "answers"]}[path]  # fmt: skip
    text = json.dumps({**{name: GOOD[name] for name in needed}, **body})
    response = fuzzed.post(path, content=text, headers={"Content-Type": "application/json"})
    assert is_calm(response), response.text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(PATHS), st.binary(max_size=60), st.binary(max_size=30))
def test_no_bytes_and_no_header_make_the_server_fail(
    fuzzed: TestClient, path: str, content: bytes, header: bytes
) -> None:
    clean = bytes(byte for byte in header if byte not in b"\r\n\0")
    headers = {"Content-Type": "application/json", "Authorization": clean, "X-Request-ID": clean, "Accept": clean}
    response = fuzzed.post(path, content=content, headers=headers)
    assert is_calm(response), response.text


@pytest.mark.parametrize(
    "body",
    [b"[" * 9000, b'{"prompt": ' + b"9" * 5000 + b"}", b'{"a\\ud800": 1}', b'{"prompt": "\\ud800"}', b"\xff\xfe", b"",
     b'{"prompt": NaN}', b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "a", "seed": 1e400}', b"null"],
)  # fmt: skip
def test_json_at_the_edge_is_refused(fuzzed: TestClient, body: bytes) -> None:
    response = fuzzed.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and is_calm(response), response.text


def test_names_that_no_answer_could_hold_are_refused_or_escaped(tmp_path: Path, loaded, serve: Any) -> None:
    with pytest.raises(GmaskError, match="the name of the model holds half of a character"):
        ServerSettings(model_name="m\udcff")
    folder = tmp_path / os.fsdecode(b"m\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    name = default_model_name(str(folder))
    assert name.isascii()
    with serve(model_name=name) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == name
    with pytest.raises(GmaskError, match="the name of an adapter holds half of a character"):
        AdapterSet(loaded[0], {"a\udcff": folder})
