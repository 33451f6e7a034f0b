"""Does the server answer what the same model answers without one?"""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import gmask
from gmask.generation.chat import Chat
from gmask.serving.app import create_app
from gmask.serving.backend import make_backend
from gmask.serving.settings import ServerSettings
from test_chatglm_chat import VOCABULARY, needs_vocabulary
from test_chatglm_parity import load_chatglm
from tiny_folder import make_folder

BLANKS = "The [MASK] dog [MASK]."
QUESTION = [{"role": "user", "content": "The dog?"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="module")
def client(loaded) -> Iterator[TestClient]:
    with TestClient(create_app(*loaded, settings=ServerSettings(model_name="tiny"))) as client:
        yield client


def ask(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refuse(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def events(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    response = client.post(path, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = re.findall(r"data: (.*)\n\n", response.text)
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_chat_is_answered_as_by_chat(client: TestClient, loaded) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "It ran."}, {"role": "user", "content": "And?"}]
    chat = Chat(*loaded, max_tokens=9, temperature=0)
    chat.rounds = [("The dog?", "It ran.")]
    expected = chat.ask("And?")
    found = ask(client, "/v1/chat/completions", model="tiny", messages=messages, max_tokens=9, temperature=0)
    (choice,) = found["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == {"end": "stop", "length": "length"}[expected.finish]
    assert found["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert found["usage"]["completion_tokens"] == expected.reply_tokens


def test_a_system_message_stands_before_the_first_question(client: TestClient, loaded) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "A?"}]},
    ]
    found = ask(client, "/v1/chat/completions", messages=messages, max_tokens=5, temperature=0)
    expected = Chat(*loaded, max_tokens=5, temperature=0).ask("Be brief.\nA?").text
    assert found["choices"][0]["message"]["content"] == expected


def test_old_rounds_that_have_no_room_are_counted(client: TestClient, loaded) -> None:
    rounds = [("The old man took his dog.", "It was a sunny day.")] * 40
    messages = [
        {"role": role, "content": text}
        for asked, answered in rounds
        for role, text in (("user", asked), ("assistant", answered))
    ]
    chat = Chat(*loaded, max_tokens=20, temperature=0)
    chat.rounds = list(rounds)
    expected = chat.ask("The dog?")
    found = ask(client, "/v1/chat/completions", messages=[*messages, *QUESTION], max_tokens=20, temperature=0)
    assert found["choices"][0]["message"]["content"] == expected.text
    assert found["rounds_left_out"] == expected.rounds_left_out > 30


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_is_the_whole_one(client: TestClient, n: int) -> None:
    body = dict(messages=QUESTION, max_tokens=9, seed=3, n=n, logprobs=True, top_logprobs=2)
    whole = ask(client, "/v1/chat/completions", **body)
    chunks = events(client, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(part["delta"].get("content") or "" for part in mine) == choice["message"]["content"]
        assert [part["finish_reason"] for part in mine if part["finish_reason"]] == [choice["finish_reason"]]
        tokens = [token for part in mine if part["logprobs"] for token in part["logprobs"]["content"]]
        whole_tokens = choice["logprobs"]["content"]
        assert [token["token"] for token in tokens[:-1]] == [token["token"] for token in whole_tokens[:-1]]
        assert [token["logprob"] for token in tokens] == pytest.approx(
            [token["logprob"] for token in whole_tokens], abs=1e-5
        )
        for token in tokens:
            assert len(token["top_logprobs"]) == 2
            assert token["top_logprobs"][0]["logprob"] >= token["logprob"]


def test_a_completion_is_the_answer_to_a_blank_at_the_end(client: TestClient, loaded) -> None:
    texts = ["The old man", "我今天", "a \\[MASK] b\\", "", "ends here "]
    found = ask(client, "/v1/completions", prompt=texts, max_tokens=6, temperature=0)
    written = [choice["text"] for choice in found["choices"]]
    escaped = [text.replace("\\[MASK]", "\\\\\\[MASK]") for text in texts]
    escaped = [text + "\\" * text.endswith("\\") + "[gMASK]" for text in escaped]
    filled = gmask.infill(*loaded, escaped, max_tokens=6)
    assert written == [infilling.blanks[0].text for infilling in filled]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3, 4]


def test_a_suffix_makes_a_blank_between_two_texts(client: TestClient, loaded) -> None:
    found = ask(client, "/v1/completions", prompt="The old ", suffix=" went [MASK]", max_tokens=6, temperature=0)
    expected = gmask.infill(*loaded, "The old [MASK] went \\[MASK]", max_tokens=6).blanks[0].text
    assert found["choices"][0]["text"] == expected


def test_token_ids_are_a_prompt(client: TestClient, loaded) -> None:
    tokenizer = loaded[1]
    ids = tokenizer("The old man", add_special_tokens=False)["input_ids"]
    by_ids = ask(client, "/v1/completions", prompt=ids, max_tokens=6, temperature=0)["choices"][0]["text"]
    by_text = ask(client, "/v1/completions", prompt="The old man", max_tokens=6, temperature=0)["choices"][0]["text"]
    assert by_ids == by_text
    assert "vocabulary" in refuse(client, "/v1/completions", prompt=[99999])["message"]
    assert "blank" in refuse(client, "/v1/completions", prompt=[tokenizer.mask_token_id])["message"]


def test_an_echoed_prompt_is_scored_from_left_to_right(client: TestClient, loaded) -> None:
    text = "The old man took"
    (choice,) = ask(client, "/v1/completions", prompt=text, echo=True, logprobs=3, max_tokens=0)["choices"]
    expected = gmask.score(*loaded, "[gMASK]", [text]).answers[0]
    logprobs = choice["logprobs"]
    assert choice["text"] == text
    assert logprobs["token_logprobs"] == pytest.approx([token.logprob for token in expected.tokens], abs=1e-4)
    assert sum(logprobs["token_logprobs"]) == pytest.approx(expected.logprob, abs=1e-3)
    assert logprobs["tokens"] == [token.text for token in expected.tokens]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    for token, logprob, top, start in zip(*(logprobs[name] for name in names), strict=True):
        assert text[start:].startswith(token)
        assert 1 <= len(top) <= 3 and max(top.values()) >= logprob - 1e-6
        assert token not in top or top[token] == pytest.approx(logprob)
    both = ask(client, "/v1/completions", prompt=text, echo=True, logprobs=0, max_tokens=3, temperature=0)["choices"][0]
    assert both["text"].startswith(text) and len(both["text"]) > len(text)
    assert both["logprobs"]["token_logprobs"][: len(expected.tokens)] == pytest.approx(
        logprobs["token_logprobs"], abs=1e-6
    )


def test_a_long_echo_holds_the_logits_of_a_few_tokens(
    client: TestClient, loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = dict(prompt="The old man took his dog", echo=True, logprobs=2, max_tokens=0)
    expected = ask(client, "/v1/completions", **body)["choices"][0]["logprobs"]
    monkeypatch.setattr("gmask.serving.openai.CHUNK", 3)
    held: list[int] = []
    hook = loaded[0].lm_head.register_forward_hook(lambda head, inputs, logits: held.append(logits.shape[:-1].numel()))
    found = ask(client, "/v1/completions", **body)["choices"][0]["logprobs"]
    hook.remove()
    assert max(held) == 3 and sum(held) == len(found["tokens"]) > 6
    assert found["tokens"] == expected["tokens"]
    assert found["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-5)


def test_best_of_keeps_the_most_probable_ones(client: TestClient) -> None:
    body = dict(prompt="The", min_tokens=4, max_tokens=4, seed=1, temperature=1.5, logprobs=0)

    def mean(choice: dict[str, Any]) -> float:
        return float(np.mean(choice["logprobs"]["token_logprobs"]))

    every = ask(client, "/v1/completions", **body, n=6)["choices"]
    best = ask(client, "/v1/completions", **body, n=2, best_of=6)["choices"]
    assert list(map(mean, best)) == pytest.approx(sorted(map(mean, every))[:-3:-1], abs=1e-5)
    assert [choice["index"] for choice in best] == [0, 1]
    assert mean(best[1]) > min(map(mean, every))


def test_a_streamed_completion_is_the_whole_one(client: TestClient) -> None:
    body = dict(prompt=["The", "我"], max_tokens=8, temperature=0, logprobs=1)
    whole = ask(client, "/v1/completions", **body)["choices"]
    chunks = [event["choices"][0] for event in events(client, "/v1/completions", **body)]
    for choice in whole:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        logprobs = [value for chunk in mine if chunk["logprobs"] for value in chunk["logprobs"]["token_logprobs"]]
        assert logprobs == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)


def test_stop_texts_end_an_answer_and_are_not_told(client: TestClient) -> None:
    body = dict(prompt="The", max_tokens=30, temperature=0)
    text = ask(client, "/v1/completions", **body)["choices"][0]["text"]
    stop = text[4:6]
    (choice,) = ask(client, "/v1/completions", **body, stop=stop)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    streamed = "".join(event["choices"][0]["text"] for event in events(client, "/v1/completions", **body, stop=[stop]))
    assert streamed == choice["text"]


def test_answers_follow_choices_patterns_and_schemas(client: TestClient) -> None:
    pytest.importorskip("llguidance")
    body = dict(prompt="The dog", max_tokens=40, seed=1)
    chosen = ask(client, "/v1/completions", **body, guided_choice=["dog", "man"])["choices"][0]["text"]
    assert chosen in ("dog", "man")
    matched = ask(client, "/v1/completions", **body, guided_regex="(dog|man) (was|ran)")["choices"][0]["text"]
    assert re.fullmatch("(dog|man) (was|ran)", matched)
    assert "exclude" in refuse(client, "/v1/completions", **body, guided_regex="a", guided_choice=["b"])["message"]
    assert refuse(client, "/v1/completions", **body, guided_regex="(")["type"] == "invalid_request_error"
    schema = {"name": "a", "schema": {"type": "nonsense"}}
    refused = dict(response_format={"type": "json_schema", "json_schema": schema})
    assert "schema" in refuse(client, "/v1/completions", **body, **refused)["message"]


def test_blanks_are_filled_as_by_infill(client: TestClient, loaded) -> None:
    expected = gmask.infill(*loaded, BLANKS, max_tokens=5)
    found = ask(client, "/v1/infill", text=BLANKS, max_tokens=5, logprobs=True)
    assert found["text"] == expected.text
    assert found["logprob"] == pytest.approx(expected.logprob, abs=1e-4)
    for blank, other in zip(found["blanks"], expected.blanks, strict=True):
        assert (blank["text"], blank["start"], blank["end"]) == (other.text, other.start, other.end)
        assert [token["text"] for token in blank["tokens"]] == [token.text for token in other.tokens]
    fragments = events(client, "/v1/infill", text=BLANKS, max_tokens=5)
    for index, other in enumerate(expected.blanks):
        told = [event["text"] for event in fragments[:-1] if event["blank"] == index]
        assert "".join(told) == other.text
    assert fragments[-1]["text"] == expected.text


def test_alternatives_beams_and_choices_are_those_of_infill(client: TestClient, loaded) -> None:
    drawn = ask(client, "/v1/infill", text=BLANKS, n=3, temperature=0.9, seed=4, max_tokens=5)
    expected = gmask.infill(*loaded, BLANKS, n=3, temperature=0.9, seed=4, max_tokens=5)
    assert [drawn["text"], *(other["text"] for other in drawn["alternatives"])] == [
        expected.text,
        *(other.text for other in expected.alternatives),
    ]
    beams = ask(client, "/v1/infill", text=BLANKS, n=2, max_tokens=4)
    assert beams["text"] == gmask.infill(*loaded, BLANKS, n=2, max_tokens=4).text
    chosen = ask(client, "/v1/infill", text=BLANKS, choices=[["old", "sunny"], ["went down", "ran"]])
    by_hand = gmask.infill(*loaded, BLANKS, choices=[["old", "sunny"], ["went down", "ran"]])
    assert chosen["text"] == by_hand.text
    assert chosen["choices"] == by_hand.to_dict()["choices"]


def test_answers_are_scored_as_by_score(client: TestClient, loaded) -> None:
    found = ask(client, "/v1/score", text=["The [MASK] dog.", "A [MASK]."], answers=["old", "sunny"])
    expected = gmask.score(*loaded, ["The [MASK] dog.", "A [MASK]."], ["old", "sunny"])
    assert found["data"] == json.loads(json.dumps([scoring.to_dict() for scoring in expected]))


def test_embeddings_are_those_of_embed(client: TestClient, loaded) -> None:
    texts = ["The dog.", "我喜欢苹果。"]
    expected = gmask.embed(*loaded, texts)
    plain = ask(client, "/v1/embeddings", model="tiny", input=texts)
    packed = ask(client, "/v1/embeddings", model="tiny", input=texts, encoding_format="base64")
    for row, one, other in zip(expected, plain["data"], packed["data"], strict=True):
        assert np.array_equal(np.array(one["embedding"], np.float32), row)
        assert np.array_equal(np.frombuffer(base64.b64decode(other["embedding"]), "<f4"), row)
    assert plain["usage"]["prompt_tokens"] > 4
    assert "dimensions" in refuse(client, "/v1/embeddings", input="a", dimensions=3)["message"]


def test_the_published_api_answers_in_its_own_form(client: TestClient, loaded) -> None:
    history = [["The dog?", "It ran."]]
    body = dict(prompt="The man?", history=history, max_length=90, top_p=0.7, temperature=0, unknown=1)
    found = ask(client, "/", **body)
    assert found["status"] == 200
    assert found["history"] == [*history, ["The man?", found["response"]]]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", found["time"])
    prompt_tokens = len(loaded[1]("问：The dog?答：It ran.问：The man?答：", add_special_tokens=False)["input_ids"]) + 3
    expected = Chat(*loaded, max_tokens=90 - prompt_tokens, temperature=0)
    expected.rounds = [("The dog?", "It ran.")]
    assert found["response"] == expected.ask("The man?").text
    assert ask(client, "/", prompt="The man?", history=None, max_length=None)["history"][0][0] == "The man?"
    assert "shorten" in refuse(client, "/", prompt="The man?", max_length=2)["message"]


def test_models_are_listed_and_found(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert client.get("/v1/models/tiny").json() == model
    missing = client.get("/v1/models/other/one")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert client.post("/v1/chat/completions", json={"model": "other", "messages": QUESTION}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, "user"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, "message 1: the content is None"),
        (
            "/v1/chat/completions",
            {"messages": QUESTION, "tools": [{"type": "function"}]},
            "tools: these models call no",
        ),
        (
            "/v1/chat/completions",
            {"messages": QUESTION, "tool_choice": "required"},
            "tool_choice: Input should be 'none'",
        ),
        ("/v1/chat/completions", {"messages": QUESTION, "stop": ["", "a"]}, "stop.0: String should have at least 1"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ("/v1/chat/completions", {}, "messages: Field required"),
        ("/v1/chat/completions", {"messages": QUESTION, "top_logprobs": 2}, "logprobs"),
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 96}, "room"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "dog " * 400}]}, "shorten"),
        ("/v1/chat/completions", {"messages": QUESTION, "logit_bias": {"99999": 1}}, "vocabulary"),
        ("/v1/chat/completions", {"messages": QUESTION, "n": 65}, "at most 64"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "echo"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 9999}, "at most"),
        ("/v1/completions", {"prompt": "a", "best_of": 2, "stream": True}, "streamed"),
        ("/v1/completions", {"prompt": "dog " * 400}, "positions"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature"),
        (
            "/v1/completions",
            {"prompt": "a", "max_tokens": 2, "min_tokens": 3},
            "it must be at most max_tokens",
        ),
        ("/v1/completions", {"prompt": "a", "stop": ""}, "stop"),
        ("/v1/infill", {"text": "no blank"}, "no blank"),
        ("/v1/infill", {"text": ""}, "text"),
        ("/v1/infill", {"text": BLANKS, "choices": [["a"]]}, "blanks"),
        ("/v1/infill", {"text": BLANKS, "choices": ["a"], "stream": True}, "streamed"),
        ("/v1/score", {"text": "no blank", "answers": ["a"]}, "no blank"),
        ("/v1/score", {"text": BLANKS, "answers": ["a"]}, "2 blanks"),
        ("/v1/embeddings", {"input": []}, "input: List should have at least 1 item"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input.1: String should have at least 1"),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, "input.0: Input should be a valid string"),
        ("/v1/infill", {"text": BLANKS, "choices": {"0": [""]}}, "choices.0.0: String should have at least 1"),
        ("/v1/embeddings", {"input": "a", "layer": 99}, "layer"),
        ("/", {"prompt": "a", "history": [["only one"]]}, "history"),
    ],
)
def test_what_cannot_be_done_is_said_in_openais_shape(client: TestClient, path: str, body: dict, reason: str) -> None:
    error = refuse(client, path, **body)
    assert reason in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", None), ("tools", []), ("tool_choice", None), ("tool_choice", "none"), ("functions", None),
        ("function_call", None), ("parallel_tool_calls", None), ("metadata", None), ("store", False),
        ("service_tier", None), ("reasoning_effort", None), ("logit_bias", {}), ("stop", None),
    ],
)  # fmt: skip
def test_a_parameter_that_asks_for_nothing_is_taken(client: TestClient, name: str, value: Any) -> None:
    asked = dict(messages=QUESTION, max_tokens=4, temperature=0)
    assert (
        ask(client, "/v1/chat/completions", **asked, **{name: value})["choices"][0]["message"]
        == (ask(client, "/v1/chat/completions", **asked)["choices"][0]["message"])
    )


ASKED = {
    "/v1/chat/completions": {"messages": QUESTION, "max_tokens": 2},
    "/v1/completions": {"prompt": "The dog", "max_tokens": 2},
    "/v1/embeddings": {"input": "The dog"},
    "/v1/infill": {"text": BLANKS, "max_tokens": 2},
    "/v1/score": {"text": "The [MASK].", "answers": ["dog", "cat"]},
    "/": {"prompt": "The dog", "max_length": 30},
}
NOTHING: list[tuple[str, Any]] = [
    *((name, None) for name in (
        "model", "user", "metadata", "service_tier", "stream_options", "seed", "stop", "n", "stream", "logprobs",
        "num_beams", "temperature", "timeout", "choices", "pooling", "layer", "normalization", "encoding_format",
        "dimensions", "tools", "audio")),
    ("tools", []), ("tool_choice", "none"), ("tool_choice", "auto"), ("tool_choice", ""), ("functions", []),
    ("function_call", "none"), ("parallel_tool_calls", False), ("parallel_tool_calls", True), ("response_format", {}),
    ("response_format", {"type": "text"}), ("logit_bias", {}), ("metadata", {}), ("store", False), ("user", ""),
    ("service_tier", "auto"), ("stream_options", {}), ("stop", []), ("stream", False), ("n", 1), ("model", ""),
    ("reasoning_effort", "none"), ("modalities", []), ("modalities", ["text"]),
]  # fmt: skip


@pytest.mark.parametrize("path", ASKED)
def test_on_every_route_what_asks_for_nothing_is_taken(client: TestClient, path: str) -> None:
    refused = [
        (name, value, response.json()["error"]["message"])
        for name, value in NOTHING
        if (response := client.post(path, json={**ASKED[path], name: value})).status_code != 200
    ]
    assert refused == []


def test_what_a_message_has_not_is_taken(client: TestClient) -> None:
    """Clients send their answers back with all fields of OpenAI's messages."""
    empty = {"tool_calls": [None, [], {}, "none"], "function_call": [None, {}], "refusal": [None, ""],
             "annotations": [None, [], {}], "audio": [None, {}], "name": [None, ""]}  # fmt: skip
    for name, values in empty.items():
        for value in values:
            said = {"role": "assistant", "content": "It ran.", name: value}
            ask(client, "/v1/chat/completions", messages=[*QUESTION, said, *QUESTION], max_tokens=1)
    for name, value in (("tool_calls", [{"id": "1"}]), ("function_call", {"name": "f"}), ("refusal", "no")):
        said = {"role": "assistant", "content": "It ran.", name: value}
        error = refuse(client, "/v1/chat/completions", messages=[*QUESTION, said, *QUESTION])
        assert error["param"] == f"messages.1.{name}"
        assert "leave it out" in error["message"]
        assert "None" not in error["message"]


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "\ud83d"}]),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "a", "\ud83d": 1}]),
        ("/v1/chat/completions", "stop", ["a", "\ud83d"]),
        ("/v1/chat/completions", "guided_regex", "\ud83d"),
        ("/v1/completions", "prompt", ["\ud83d"]),
        ("/v1/completions", "suffix", "\ud83d"),
        ("/v1/embeddings", "input", ["a", "\ud83d"]),
        ("/v1/embeddings", "input", "\ud83d"),
        ("/v1/infill", "text", "\ud83d [MASK]"),
        ("/v1/infill", "choices", ["\ud83d"]),
        ("/v1/score", "text", "\ud83d [MASK]"),
        ("/v1/score", "answers", ["\ud83d"]),
        ("/", "prompt", "\ud83d"),
    ],
)
def test_half_of_a_character_is_called_so_on_every_route(client: TestClient, path: str, name: str, value: Any) -> None:
    response = client.post(path, content=json.dumps({**ASKED[path], name: value}), headers=JSON)
    assert response.status_code == 400
    assert "half of a character (a lone surrogate)" in response.json()["error"]["message"]


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"prompt": "\xe9"}', "the body is not UTF-8 text"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "a number in it has too many digits"),
        (b"{'prompt': 1}", "the body is not JSON (at character 1)"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(client: TestClient, body: bytes, reason: str) -> None:
    for path in ASKED:
        response = client.post(path, content=body, headers=JSON)
        assert response.status_code == 400
        assert reason in response.json()["error"]["message"]


@pytest.mark.parametrize("path", list(ASKED)[:-1])  # the published API did nothing with what it did not know
def test_answers_that_would_be_dropped_are_refused(client: TestClient, path: str) -> None:
    for name in ("num_return_sequences", "best_of", "n"):
        body = {**ASKED[path], name: 2, "temperature": 0.5}
        if client.post(path, json=body).status_code == 200:
            assert (path, name) in TAKEN
    assert refuse(client, path, **ASKED[path], use_beam_search=True)["param"] == "use_beam_search"


TAKEN = {("/v1/chat/completions", "n"), ("/v1/completions", "n"), ("/v1/completions", "best_of"), ("/v1/infill", "n")}


@pytest.fixture
def two(loaded) -> Iterator[TestClient]:
    """Of a server with a model to fill blanks and one to talk with."""
    talks = make_backend(*gmask.load("bundled-chat"), name="talker", settings=ServerSettings(max_tokens=7))
    with TestClient(create_app(*loaded, settings=ServerSettings(model_name="filler"), chat_backend=talks)) as client:
        yield client


def test_of_two_models_a_conversation_is_with_the_one_that_talks(two: TestClient) -> None:
    assert [model["id"] for model in two.get("/v1/models").json()["data"]] == ["filler", "talker"]
    assert two.get("/v1/models/talker").json()["id"] == "talker"
    for path, body in ASKED.items():
        talks, fills = two.app.state.backends[::-1]
        before = [backend.engine.counts().prompt_tokens for backend in (talks, fills)]
        found = ask(two, path, **body)
        after = [backend.engine.counts().prompt_tokens for backend in (talks, fills)]
        if path in ("/v1/chat/completions", "/"):
            assert after[0] > before[0] and after[1] == before[1]
        else:
            assert found["model"] == "filler" and after[0] == before[0]
        if path != "/":
            for name in ("filler", "talker"):
                assert ask(two, path, **body, model=name)["model"] == name
    read = sum(backend.engine.counts().prompt_tokens for backend in two.app.state.backends)
    assert f"gmask_prompt_tokens_total {float(read)}" in two.get("/metrics").text
    assert two.get("/ready").status_code == two.get("/health").status_code == 200
    unknown = two.post("/v1/completions", json={"prompt": "a", "model": "gpt"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["message"] == "there is no model 'gpt' here, but 'filler', 'talker'"


def test_two_models_need_two_names(loaded) -> None:
    talks = make_backend(*loaded, name="one")
    try:
        with pytest.raises(gmask.GmaskError, match="two models have the name 'one'"):
            create_app(*loaded, settings=ServerSettings(model_name="one"), chat_backend=talks)
    finally:
        talks.close()


@needs_vocabulary
def test_chatglm_chats_and_has_no_blanks() -> None:
    from gmask.tokenizers.chatglm import ChatGLMTokenizer

    model, tokenizer = load_chatglm(), ChatGLMTokenizer(str(VOCABULARY))
    expected = Chat(model, tokenizer, max_tokens=6, temperature=0).ask("你好").text
    with TestClient(create_app(model, tokenizer)) as client:
        body = dict(messages=[{"role": "user", "content": "你好"}], max_tokens=6, temperature=0)
        assert ask(client, "/v1/chat/completions", **body)["choices"][0]["message"]["content"] == expected
        assert ask(client, "/v1/completions", prompt="你好", max_tokens=6, temperature=0)["choices"][0]["text"]
        scored = ask(client, "/v1/completions", prompt="你好", echo=True, logprobs=1, max_tokens=0)
        assert all(value < 0 for value in scored["choices"][0]["logprobs"]["token_logprobs"])
        for path, asked in (
            ("/v1/infill", {"text": "[MASK]"}),
            ("/v1/score", {"text": "[MASK]", "answers": ["a"]}),
            ("/v1/completions", {"prompt": "a", "suffix": "b"}),
            ("/v1/embeddings", {"input": "a"}),
        ):
            assert "ChatGLM" in refuse(client, path, **asked)["message"]
