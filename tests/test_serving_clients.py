"""Do clients that were not written here understand the server?

The server is a real one, on a port of its own.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient

import gmask
from fake_engine import FakeEngine
from gmask.checkpoints.adapters import save_adapter
from gmask.cli import main
from gmask.generation.chat import Chat
from gmask.models.base import attach_prefix
from gmask.serving.app import create_app, make_server
from gmask.serving.settings import ServerSettings
from tiny_folder import make_folder

KEY = "the-key"
MESSAGES: list[Any] = [{"role": "user", "content": "The dog?"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")), device="cpu")


def run(app: Any) -> Iterator[str]:
    """The address of a server that ends when its user does."""
    server = make_server(app, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(loaded) -> Iterator[str]:
    """Of a server that asks for a key."""
    yield from run(create_app(*loaded, settings=ServerSettings(model_name="bundled", api_keys=(KEY,))))


@pytest.fixture(scope="module")
def open_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of one that does not, for the published API knew no keys; it has the adapter of the guide."""
    base, adapter = make_folder(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("adapter")
    model, _ = gmask.load(base, device="cpu")
    attach_prefix(model, 2, projection=False)
    save_adapter(model, adapter, base=str(base))
    yield from run(create_app(*gmask.load(base, device="cpu"), adapters={"news": adapter}))


@pytest.fixture(scope="module")
def hasty_address(loaded) -> Iterator[str]:
    """Of one that waits for 0.2 s."""
    yield from run(create_app(*loaded, settings=ServerSettings(body_seconds=0.2), engine=FakeEngine()))


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_chats(client, loaded) -> None:
    found = client.chat.completions.create(model="bundled", messages=MESSAGES, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == Chat(*loaded, max_tokens=8, temperature=0).ask("The dog?").text
    assert found._request_id
    stream = client.chat.completions.create(
        model="bundled",
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == found.choices[0].message.content
    assert last.usage.completion_tokens == found.usage.completion_tokens


def test_openai_parses_an_answer_that_follows_a_schema(client) -> None:
    pytest.importorskip("llguidance")
    from pydantic import BaseModel

    class Verdict(BaseModel):
        dog: bool

    found = client.chat.completions.parse(
        model="bundled", messages=MESSAGES, max_tokens=40, seed=1, response_format=Verdict
    )
    assert isinstance(found.choices[0].message.parsed.dog, bool)


def test_openai_completes(client) -> None:
    found = client.completions.create(
        model="bundled", prompt=["The old ", "A"], suffix=" went", max_tokens=5, n=2, logprobs=2, seed=1
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) for choice in found.choices)
    stream = client.completions.create(model="bundled", prompt="The", max_tokens=5, temperature=0, stream=True)
    whole = client.completions.create(model="bundled", prompt="The", max_tokens=5, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_openai_embeds(client, loaded) -> None:
    found = client.embeddings.create(model="bundled", input=["The dog."])  # asks for base64 by itself
    expected = gmask.embed(*loaded, ["The dog."])[0]
    assert found.data[0].embedding == pytest.approx(expected.tolist(), abs=1e-6)


def test_openai_raises_its_own_errors(client, address: str) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="bundled", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_who_breaks_a_stream_off_leaves_a_server_that_answers(client, address: str) -> None:
    for _ in range(3):
        with client.completions.create(model="bundled", prompt="The", max_tokens=90, stream=True) as stream:
            next(iter(stream))
    assert client.completions.create(model="bundled", prompt="The", max_tokens=2).choices[0].text


def test_many_clients_at_once_get_what_each_would_get_alone(client, loaded) -> None:
    questions = [f"The {word}?" for word in ["dog", "man", "river", "day", "apple", "market", "season", "old"]]
    chat = {text: Chat(*loaded, max_tokens=12, temperature=0).ask(text).text for text in questions}
    blanks = {text: gmask.infill(*loaded, f"{text} [MASK] [MASK]", max_tokens=6).text for text in questions}
    scores = {text: gmask.score(*loaded, f"{text} [MASK]", ["dog", "sunny"]).best.text for text in questions}

    def ask(number: int) -> None:
        text = questions[number % len(questions)]
        if number % 5 == 0:  # some go before they have their answer
            with client.completions.create(model="bundled", prompt=text, max_tokens=50, stream=True) as stream:
                next(iter(stream))
        messages: list[Any] = [{"role": "user", "content": text}]
        found = client.chat.completions.create(model="bundled", messages=messages, max_tokens=12, temperature=0)
        assert found.choices[0].message.content == chat[text]
        filled = client.post("/infill", body={"text": f"{text} [MASK] [MASK]", "max_tokens": 6}, cast_to=dict[str, Any])
        assert filled["text"] == blanks[text]
        scored = client.post(
            "/score", body={"text": f"{text} [MASK]", "answers": ["dog", "sunny"]}, cast_to=dict[str, Any]
        )
        assert scored["data"][0]["best"] == scores[text]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(48)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_langchain_chats(address: str, loaded) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        model="bundled", base_url=f"{address}/v1", api_key=KEY, max_tokens=8, temperature=0, max_retries=0
    )
    expected = Chat(*loaded, max_tokens=8, temperature=0).ask("The dog?").text
    assert model.invoke([("human", "The dog?")]).content == expected
    assert "".join(chunk.content for chunk in model.stream([("human", "The dog?")])) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # langchain-community announces its own end
def test_langchains_chatglm_speaks_the_published_api(open_address: str) -> None:
    llms = pytest.importorskip("langchain_community.llms")
    model = llms.ChatGLM(endpoint_url=open_address, max_token=60, with_history=True)
    first = model.invoke("The dog?")
    assert model.history == [["The dog?", first]]
    second = model.invoke("And?")
    assert model.history == [["The dog?", first], ["And?", second]]
    assert llms.ChatGLM(endpoint_url=open_address).invoke("The dog?")  # asks for 20000 tokens


LM_EVAL_TASK = """
task: go_on
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, temperature: 0}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'gmask[eval]'")
def test_lm_eval_lets_the_server_write(address: str, loaded, tmp_path: Path) -> None:
    texts = ["The old man", "It was a", "我今天", "The dog ran"]
    documents = [
        {"text": text, "answer": gmask.infill(*loaded, f"{text}[gMASK]", max_tokens=6).blanks[0].text} for text in texts
    ]
    documents[-1]["answer"] += " not"
    (tmp_path / "texts.json").write_text(json.dumps(documents), "utf-8")
    (tmp_path / "go_on.yaml").write_text(LM_EVAL_TASK % (tmp_path / "texts.json"), "utf-8")
    options = f"model=bundled,base_url={address}/v1/completions,tokenizer_backend=none,num_concurrent=2"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", options,
               "--tasks", "go_on", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]  # fmt: skip
    own = {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text("utf-8"))["results"]["go_on"]["exact_match,none"] == 0.75


def tell(address: str, data: bytes) -> bytes:
    """What a server answers to these bytes before it ends the connection."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKS = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
BODY = b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"", 408, "more than 0.2 s to arrive"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX-A", 408, "more than 0.2 s to arrive"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{", 408, "more than 0.2 s to arrive"),
        (HEALTH + b"GET /hea", 200, '"status":"ok"'),
        (BODY, 413, "larger than"),
        (CHUNKS + HEALTH, 400, "Content-Length and Transfer-Encoding exclude each other"),
        (b"nonsense\r\n\r\n", 400, "not a request in HTTP/1.1"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "not a request in HTTP/1.1"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000, 400, "headers are too long"),
    ],
)
def test_a_connection_ends_when_its_request_does_not(hasty_address: str, data: bytes, status: int, reason: str) -> None:
    answered = tell(hasty_address, data).decode()
    assert answered.startswith(f"HTTP/1.1 {status} ") and answered.count("HTTP/1.1 ") == 1
    assert reason in answered


def test_the_curl_lines_of_the_guide_work(open_address: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "serve.md").read_text("utf-8")
    lines = re.findall(r"^curl (?:.*\\\n)*.*$", page, re.M)
    assert len(lines) >= 4
    for line in lines:
        if "/classify" in line:  # of a reward model, which is not served here
            continue
        command = line.replace("http://127.0.0.1:8000", open_address).replace("curl ", "curl -sS --fail-with-body ", 1)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*jsonschema:UserWarning")
@pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_the_schema_is_kept(loaded, examples: int) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import CHECKS

    names = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    app = create_app(*loaded, engine=FakeEngine())  # type: ignore[arg-type]
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:

        @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy())
        def check(case: Any) -> None:
            response = case.call()
            if response.status_code == 504 and isinstance(case.body, dict) and case.body.get("timeout") is not None:
                return  # the time that the request gave itself, perhaps 5e-324 seconds, is over
            case.validate_response(response, checks=CHECKS.get_by_names(names))

        check()
    app.state.backend.close()


@pytest.mark.parametrize(
    ("arguments", "served"),
    [
        ([], ["bundled", "bundled-chat"]),
        (["bundled"], ["bundled"]),
        (["bundled-chat"], ["bundled-chat"]),
        (["--set", "model_name=mine"], ["mine", "bundled-chat"]),
    ],
)
def test_gmask_serve_without_a_model_serves_the_one_that_talks_too(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], served: list[str]
) -> None:
    found: list[str] = []

    class Ended:
        def __init__(self, app: Any, **_: Any) -> None:
            self.app = app

        def run(self, sockets: Any) -> None:
            with TestClient(self.app, base_url="http://127.0.0.1") as client:
                found.extend(model["id"] for model in client.get("/v1/models").json()["data"])

    monkeypatch.setattr("gmask.serving.app.make_server", Ended)
    monkeypatch.setattr("gmask.serving.middleware.log_as_json", lambda: None)
    monkeypatch.setattr("sys.argv", ["gmask", "serve", *arguments])
    monkeypatch.setattr("gmask.serving.app.open_port", lambda *_: [])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0, found) == (0, served)


def test_gmask_serve_answers_and_ends_when_it_is_told(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder = make_folder(tmp_path / "tiny")
    command = [sys.executable, "-m", "gmask", "serve", str(folder), "--port", str(port), "--set", "max_rows=2"]
    environment = {**os.environ, "GMASK_API_KEY": KEY}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        while "Uvicorn running" not in (line := process.stderr.readline()):
            assert line, "it ended before it began"
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 3}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            assert json.load(response)["choices"][0]["message"]["content"] is not None
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=600)[1]
        (told,) = [line for line in map(json.loads, rest.splitlines()) if line["message"] == "request"]
        assert (told["status"], told["endpoint"]) == (200, "/v1/chat/completions")
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
