"""What does `gmask serve` document and answer? The application is asked without a port, as the command builds it."""

import base64
import json
import re
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from record.session import Session

QUESTION = [{"role": "user", "content": "The dog?"}]
ROUNDS = [*QUESTION, {"role": "assistant", "content": "It ran."}, {"role": "user", "content": "And?"}]
GREEDY = {"temperature": 0, "max_tokens": 6}
VARYING = {"id": re.compile("(chat)?cmpl-.*"), "created": re.compile(r"\d+"), "time": re.compile(".*")}
"""Keys of a reply, and which of their values differ from time to time."""


class Asked(NamedTuple):
    path: str
    body: dict[str, Any] | None = None  # None: a GET


COMPLETIONS, CHAT, INFILL, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/infill", "/v1/score"
EMBEDDINGS = "/v1/embeddings"

REQUESTS = [
    Asked("/health"),
    Asked("/ready"),
    Asked("/v1/models"),
    Asked("/v1/models/tiny:first"),
    Asked("/v1/models/other"),
    Asked(COMPLETIONS, {"prompt": "The old man", **GREEDY}),
    Asked(COMPLETIONS, {"prompt": "The old man", "suffix": " the river.", **GREEDY, "logprobs": 2}),
    Asked(COMPLETIONS, {"prompt": ["The dog", "我今天"], "seed": 3, "max_tokens": 5, "n": 2}),
    Asked(COMPLETIONS, {"prompt": "The dog", **GREEDY, "echo": True, "logprobs": 1}),
    Asked(COMPLETIONS, {"prompt": "The dog", **GREEDY, "stop": "h"}),
    Asked(COMPLETIONS, {"prompt": "The dog", **GREEDY, "model": "tiny:first"}),
    Asked(COMPLETIONS, {"prompt": "The dog", **GREEDY, "presence_penalty": 1.5, "frequency_penalty": 0.5}),
    Asked(COMPLETIONS, {"prompt": "The dog", **GREEDY, "repetition_penalty": 3.0, "logit_bias": {"294": -100}}),
    Asked(COMPLETIONS, {"prompt": "The dog", **GREEDY, "stream": True, "stream_options": {"include_usage": True}}),
    Asked(COMPLETIONS, {"prompt": [20, 21, 30], **GREEDY, "best_of": 1}),
    Asked(COMPLETIONS, {"prompt": "The", "guided_regex": "(old|new) dog", **GREEDY, "max_tokens": 12}),
    Asked(CHAT, {"messages": ROUNDS, **GREEDY}),
    Asked(CHAT, {"messages": QUESTION, "max_tokens": 6, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2}),
    Asked(CHAT, {"messages": QUESTION, "max_tokens": 5, "seed": 4, "stream": True}),
    Asked(CHAT, {"messages": [{"role": "system", "content": "Be brief."}, *QUESTION], **GREEDY}),
    Asked(CHAT, {"messages": [{"role": "assistant", "content": "Hi."}, *QUESTION, *QUESTION], "tools": [], **GREEDY}),
    Asked(CHAT, {"messages": QUESTION, "guided_choice": ["yes", "no"], "temperature": 0}),
    Asked(CHAT, {"messages": QUESTION, "temperature": 0, "max_tokens": 40, "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
            "additionalProperties": False}}}}),
    Asked(INFILL, {"text": "The [MASK] dog [MASK].", "max_tokens": 5, "logprobs": True}),
    Asked(INFILL, {"text": "The [MASK] dog.", "choices": ["old", "new"]}),
    Asked(INFILL, {"text": "The [MASK] dog.", "n": 2, "num_beams": 4, "max_tokens": 3}),
    Asked(INFILL, {"text": "The [MASK] dog [MASK].", "temperature": 1.2, "seed": 5, "n": 2, "max_tokens": 4}),
    Asked(INFILL, {"text": "The [MASK] dog.", "max_tokens": 4, "stream": True}),
    Asked(SCORE, {"text": "The [MASK] dog.", "answers": ["old", "small"]}),
    Asked(SCORE, {"text": ["The [MASK] dog.", "It [MASK]."], "answers": ["old", "is"], "normalization": "mean"}),
    Asked(EMBEDDINGS, {"input": ["a sunny day", "今天"]}),
    Asked(EMBEDDINGS, {"input": "a sunny day", "pooling": "last", "encoding_format": "base64", "dimensions": 32}),
    Asked("/", {"prompt": "The dog?", "history": [["A?", "B."]], "temperature": 0, "max_length": 40}),
    # refused
    Asked("/nowhere"),
    Asked(COMPLETIONS),
    Asked(COMPLETIONS, {}),
    Asked(COMPLETIONS, {"prompt": "x", "temprature": 0}),
    Asked(COMPLETIONS, {"prompt": "x", "model": "other"}),
    Asked(COMPLETIONS, {"prompt": "x", "max_tokens": 1000}),
    Asked(COMPLETIONS, {"prompt": "x", "top_p": 0}),
    Asked(COMPLETIONS, {"prompt": "x", "best_of": 1, "n": 2, "seed": 1, "max_tokens": 4}),
    Asked(COMPLETIONS, {"prompt": "x", "guided_regex": "("}),
    Asked(CHAT, {"messages": []}),
    Asked(CHAT, {"messages": [{"role": "robot", "content": "x"}]}),
    Asked(CHAT, {"messages": [{"role": "user", "content": None}]}),
    Asked(CHAT, {"messages": QUESTION, "stop": ["", "a"]}),
    Asked(CHAT, {"messages": QUESTION, "guided_choice": ["a"], "guided_regex": "a"}),
    Asked(INFILL, {"text": "no blank"}),
    Asked(INFILL, {"text": "[MASK]", "n": 1000}),
    Asked(SCORE, {"text": "[MASK]", "answers": []}),
    Asked(EMBEDDINGS, {"input": "a", "dimensions": 5}),
    Asked("/classify", {"messages": ROUNDS[:2]}),
    Asked("/v1/classify", {"input": "a", "use_activation": 1}),
    Asked("/", {"prompt": "", "temperature": 0}),
    Asked("/", {"prompt": "x", "history": ["ab"]}),
]  # fmt: skip


def with_served(session: Session, command: str, ask: Callable[[Any], Any]) -> Any:
    """What ``ask`` finds out of the application that ``gmask serve`` would run, through a test client."""
    import uvicorn
    from starlette.testclient import TestClient

    found = []

    def run(server: uvicorn.Server, *_: object, **__: object) -> None:
        with TestClient(server.config.app, base_url="http://127.0.0.1") as client:  # type: ignore[arg-type]
            found.append(ask(client))

    # Without gradio there is no page at /ui, which takes seconds to build and has tests of its own.
    gradio = sys.modules.get("gradio")
    sys.modules["gradio"] = None  # type: ignore[assignment]
    try:
        with mock.patch.object(uvicorn.Server, "run", run):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            session.must(f"{command} --port {port}")
    finally:
        del sys.modules["gradio"]
        if gradio is not None:
            sys.modules["gradio"] = gradio
    return found[0]


def record_openapi(session: Session) -> dict[str, Any]:
    def ask(client: Any) -> dict[str, Any]:
        document: dict[str, Any] = client.get("/openapi.json").json()
        return document

    found: dict[str, Any] = with_served(session, "serve tiny", ask)
    return found


def record_answers(session: Session) -> dict[str, Any]:
    def ask(client: Any) -> dict[str, Any]:
        answers = {_name(asked): _answer(client, asked) for asked in REQUESTS}
        lines = client.get("/metrics").text.splitlines()
        return answers | {
            "/metrics": sorted(line for line in lines if line.startswith(("# HELP gmask", "# TYPE gmask")))
        }

    found: dict[str, Any] = with_served(session, "serve tiny --adapter first=lora --set max_samples=8", ask)
    return found


def _name(asked: Asked) -> str:
    return asked.path + ("" if asked.body is None else " " + json.dumps(asked.body, ensure_ascii=False))


def _answer(client: Any, asked: Asked) -> dict[str, Any]:
    response = client.get(asked.path) if asked.body is None else client.post(asked.path, json=asked.body)
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        lines = re.findall(r"data: (.*)\n\n", response.text)
        body: Any = _gather([json.loads(line) for line in lines if line.startswith("{")]) | {"last": lines[-1]}
    else:
        body = _settle(response.json())
    return {"status": response.status_code, "body": body}


def _gather(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """What a stream says in all: where it is cut into chunks depends on the machine's speed."""
    texts: dict[str, str] = {}
    keys: set[str] = set()
    others: list[Any] = []
    for chunk in chunks:
        keys |= chunk.keys()
        choices = chunk.get("choices", [chunk])
        for choice in choices:
            said = choice.get("delta", choice)
            index = str(choice.get("index", choice.get("blank", "")))
            texts[index] = texts.get(index, "") + (said.get("content") or said.get("text") or "")
            if choice.get("finish_reason"):
                others.append({"index": index, "finish_reason": choice["finish_reason"]})
        if chunk.get("usage"):
            others.append({"usage": chunk["usage"]})
    return {"keys": sorted(keys), "texts": texts, "others": others}


def _settle(value: Any) -> Any:
    """A reply without what differs from time to time, its vectors as numbers."""
    if isinstance(value, list):
        return [_settle(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r" at 0x\w+", "", value)
    if not isinstance(value, dict):
        return value
    settled = {}
    for key, inner in value.items():
        if key in VARYING and VARYING[key].fullmatch(str(inner)):
            settled[key] = "..."
        elif key == "embedding" and isinstance(inner, str):
            settled[key] = np.frombuffer(base64.b64decode(inner), "<f4").tolist()
        else:
            settled[key] = _settle(inner)
    return settled
