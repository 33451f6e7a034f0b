"""Is the same conversation the same prompt, wherever it comes in, and what is none one line?"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from transformers import GenerationConfig

import gmask
from fake_engine import FakeEngine
from gmask.conversation import Conversation, read_conversation
from gmask.errors import GmaskError
from gmask.generation import chat
from gmask.generation.predict import SampleReader
from gmask.models.chatglm_chat import build_prompt
from gmask.serving.app import create_app
from gmask.tasks.records import Record
from gmask.tasks.task import load_task
from gmask.tokenizers.chatglm import ChatGLMTokenizer
from test_chatglm_chat import VOCABULARY, needs_vocabulary
from test_chatglm_parity import load_chatglm

Messages = list[dict[str, Any]]
POSITIONS = 4096

pytestmark = needs_vocabulary


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, ChatGLMTokenizer]:
    """A model whose context holds every conversation of these tests; nothing is decoded."""
    model = copy.copy(load_chatglm())
    model.config = copy.deepcopy(model.config)
    model.config.max_position_embeddings = POSITIONS
    return model, ChatGLMTokenizer(str(VOCABULARY))


@pytest.fixture(scope="module")
def client(loaded) -> Iterator[TestClient]:
    with TestClient(create_app(*loaded, engine=FakeEngine())) as client:
        yield client


def asked_of(client: TestClient) -> tuple[int, ...]:
    return client.app.state.backend.engine.requests[-1].context.ids


def published(loaded, messages: Messages, client, monkeypatch, folder: Path) -> tuple[int, ...]:
    model, tokenizer = loaded
    ids = model.encode_chat(tokenizer, messages[-1]["content"], messages[:-1], max_length=None)["input_ids"]
    return tuple(ids[0, :-1].tolist())  # without <sop>


def chatted(loaded, messages: Messages, client, monkeypatch, folder: Path) -> tuple[int, ...] | None:
    """A conversation that was saved goes on; one that does not end with a reply cannot be."""
    path = folder / "talk.json"
    path.write_text(json.dumps({"messages": messages[:-1]}), "utf-8")
    talk = chat.Chat(*loaded, max_tokens=4)
    try:
        talk.load(path)
    except GmaskError:
        roles = [message["role"] for message in messages[:-1]]
        assert roles[-1] != "assistant" or "system" in roles  # and no message of the user behind that
        return None
    contexts: list[Any] = []
    answer = chat.Reply("", "end", 0, 0)
    monkeypatch.setattr(chat.Chatter, "reply", lambda self, prompts, seeds: contexts.extend(prompts) or [answer])
    talk.ask(messages[-1]["content"])
    return contexts[0].context.ids


def replied(loaded, messages: Messages, client, monkeypatch, folder: Path) -> tuple[int, ...]:
    contexts: list[Any] = []
    monkeypatch.setattr(chat.Chatter, "reply", lambda self, prompts, seeds: contexts.extend(prompts) or [])
    chat.reply_all(*loaded, [messages], max_tokens=4)
    return contexts[0].context.ids


def served(loaded, messages: Messages, client, monkeypatch, folder: Path) -> tuple[int, ...]:
    response = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4})
    assert response.status_code == 200, response.text
    return asked_of(client)


def served_as_published(loaded, messages: Messages, client, monkeypatch, folder: Path) -> tuple[int, ...]:
    body = {"prompt": messages[-1]["content"], "history": messages[:-1], "max_length": POSITIONS}
    response = client.post("/", json=body)
    assert response.status_code == 200, response.text
    return asked_of(client)


def shown(loaded, messages: Messages, client, monkeypatch, folder: Path) -> tuple[int, ...]:
    webui = pytest.importorskip("gmask.serving.webui", reason="the page needs gmask[webui]")
    history = [say(one["role"], [{"type": "text", "text": webui.guard(one["content"])}]) for one in messages[:-1]]
    found = webui.read_shown(history, messages[-1]["content"])
    return tuple(loaded[1](build_prompt(found.query, found.rounds), split_special_tokens=True)["input_ids"][:-1])


def taught(loaded, messages: Messages, client, monkeypatch, folder: Path) -> tuple[int, ...]:
    samples = load_task("chat/messages").samples(
        [Record({"messages": [*messages, say("assistant", "learnt")]}, Path("a.jsonl"), 1)]
    )
    assert samples[-1].answers == ("learnt",)
    reader = SampleReader(loaded[1], loaded[0].config, "chat", max_source=POSITIONS)
    return reader.read(samples[-1]).context.ids


DOORS = [published, chatted, replied, served, served_as_published, shown, taught]
texts = st.text("好问 aB[]<&\n，", max_size=6)
conversations = st.lists(st.builds(say, st.sampled_from(["user", "assistant", "system"]), texts), max_size=6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations, texts)
def test_all_ways_in_give_the_same_prompt(loaded, client, tmp_path_factory, before: Messages, query: str) -> None:
    messages = [*before, say("user", query)]
    folder = tmp_path_factory.mktemp("talk")
    found = set()
    for door in DOORS:
        with pytest.MonkeyPatch.context() as patch:
            # a reply that nobody learns may be empty
            if door is taught and any(one["role"] == "assistant" and not one["content"].strip() for one in before):
                continue
            found.add(door(loaded, messages, client, patch, folder))
    assert len(found - {None}) == 1


def test_pairs_and_messages_are_the_same(loaded, client) -> None:
    pairs, messages = (
        [("a", "b"), ["c", "d"]],
        [say(*one) for one in zip(["user", "assistant"] * 2, "abcd", strict=True)],
    )
    wanted = Conversation((("a", "b"), ("c", "d")), "e")
    for history in (pairs, messages, [pairs[0], *messages[2:]], tuple(pairs)):
        assert read_conversation(history, "e") == wanted
    assert read_conversation([*messages, say("user", "e")]) == wanted
    for history in ([["a", "b"], ["c", "d"]], messages):
        assert client.post("/", json={"prompt": "e", "history": history}).json()["history"][:2] == [
            ["a", "b"],
            ["c", "d"],
        ]


@pytest.mark.parametrize(
    ("messages", "rounds", "query"),
    [
        ([], (), None),
        ([say("user", "a"), say("user", "b")], (), "a\nb"),
        ([say("user", "a"), say("assistant", "b"), say("assistant", "c")], (("a", "b\nc"),), None),
        ([say("assistant", "hi"), say("user", "a")], (("", "hi"),), "a"),
        ([say("system", "s"), say("developer", "t"), say("user", "a")], (), "s\nt\na"),
        ([say("system", "s"), say("assistant", "hi"), say("user", "a")], (("", "hi"),), "s\na"),
        ([say("user", "a"), say("system", "s")], (), "a\ns"),
        ([say("user", "a"), say("assistant", "b"), say("system", "s"), say("user", "c")], (("a", "b"),), "s\nc"),
        ([say("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], (), "ab"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], (("a", "b"),), None),
        ([{"role": "user", "content": "a", "name": "Ann"}], (), "a"),
    ],
)
def test_messages_become_rounds(messages: Messages, rounds: tuple[Any, ...], query: str | None) -> None:
    found = read_conversation(messages)
    assert (found.rounds, found.query) == (rounds, query)


WRONG = [
    ("你好", "the conversation is a str, not a list: give pairs of texts"),
    ({"role": "user", "content": "a"}, "the conversation is a dict, not a list"),
    (3, "the conversation is an int, not a list"),
    (["你好", "再见"], "message 1: a str is not a pair of texts and no message: give pairs"),
    ([["a", "b"], ["a", "b", "c"]], "message 2: a list of 3 is not a pair"),
    ([("a", None)], "message 1: the answer is None, where a text is expected"),
    ([(1, "b")], "message 1: the question is an int"),
    ([say("user", None)], "message 1: the content is None, where a text is expected"),
    ([say("robot", "a")], "message 1: the role 'robot' is none of system, developer, user"),
    ([say(None, "a")], "message 1: the role None is none of"),
    ([{"role": "user"}], "message 1: it has no 'content'"),
    ([say("user", [{"type": "image_url", "image_url": {"url": "http://x"}}])], "a part that is image_url"),
    ([say("user", ["a"])], "message 1: the content has a part that is a str"),
    ([say("user", [{"type": "text", "text": None}])], "the text of a part is None"),
    ([say("user", [{"type": "x" * 900, "text": "a"}])], f"a part that is {'x' * 50}: these models"),
    ([say("user", [{"type": "\ud83d", "text": "a"}])], r"a part that is \ud83d: these models"),
    ([say("user", [{"type": {"a": "b"}, "text": "a"}])], "a part that is a dict: these models"),
    ([say("user", "\ud83d")], "holds half of a character"),
    ([say("user", "a"), {**say("assistant", ""), "tool_calls": [{"id": "1"}]}], "message 2: it calls a tool"),
    ([say("user", "a"), {**say("assistant", "b"), "function_call": {"name": "f"}}], "message 2: it calls a tool"),
    ([say("user", "a"), say("assistant", "b"), say("system", "s")], "no message of the user follows"),
]


@pytest.mark.parametrize(("history", "message"), WRONG)
def test_what_is_no_conversation_is_one_line_everywhere(loaded, client, history: Any, message: str) -> None:
    model, tokenizer = loaded
    ways: list[Callable[[], Any]] = [
        lambda: read_conversation(history),
        lambda: gmask.reply_all(model, tokenizer, [history], max_tokens=4),
        lambda: load_task("chat/messages").samples([Record({"messages": history}, Path("a"), 1)]),
    ]
    if "follows" not in message:  # behind which the question goes
        ways += [
            lambda: model.chat(tokenizer, "q", history=history),
            lambda: next(iter(model.stream_chat(tokenizer, "q", history=history))),
        ]
        body = json.dumps({"prompt": "q", "history": history})
        response = client.post("/", content=body, headers={"Content-Type": "application/json"})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "history")
        assert message in error["message"] and "\n" not in error["message"]
    for way in ways:
        with pytest.raises(GmaskError) as caught:
            way()
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], [say("user", "a"), say("assistant", "b")], [say("assistant", "b")]])
def test_a_conversation_without_a_question_has_no_reply(loaded, client, messages: Messages) -> None:
    with pytest.raises(GmaskError, match="ends with a message of the user"):
        gmask.reply_all(*loaded, [messages])
    response = client.post("/v1/chat/completions", json={"messages": messages})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_a_published_history_is_returned_in_rounds(loaded) -> None:
    model, tokenizer = load_chatglm(), loaded[1]
    settings = dict(max_length=60, do_sample=False)
    pairs = model.chat(tokenizer, "你好", history=[("x", "y")], **settings)
    messages = [say("user", "x"), say("assistant", "y")]
    assert model.chat(tokenizer, "你好", history=messages, **settings) == pairs
    assert list(model.stream_chat(tokenizer, "你好", history=messages, **settings))[-1] == pairs
    assert pairs[1] == [("x", "y"), ("你好", pairs[0])]


@pytest.mark.parametrize(
    "more",
    [
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"output_scores": True},
        {"n": 2},
        {"best_of": 2},
        {"generation_config": GenerationConfig(do_sample=True, num_return_sequences=2)},
    ],
)
def test_a_chat_refuses_what_it_would_drop(loaded, more: dict[str, Any]) -> None:
    model, tokenizer = loaded
    for talk in (model.chat, lambda *args, **values: list(model.stream_chat(*args, **values))):
        with pytest.raises(GmaskError, match="a chat returns one reply and no more: leave out"):
            talk(tokenizer, "你好", do_sample=True, max_length=20, **more)
    own = load_chatglm()
    for nothing in (1, None):
        assert own.chat(tokenizer, "你好", max_length=8, num_return_sequences=nothing, output_scores=False)[0]


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds", "attention_mask", "layout"])
def test_a_chat_makes_its_prompt_itself(loaded, name: str) -> None:
    model, tokenizer = loaded
    for talk in (model.chat, lambda *args, **values: list(model.stream_chat(*args, **values))):
        with pytest.raises(GmaskError, match=f"a chat makes the prompt of query and history: leave out {name}"):
            talk(tokenizer, "q", **{name: torch.tensor([[1]])})


def test_what_is_streamed_is_one_reply(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_chatglm(), loaded[1]
    inputs = model.encode_chat(tokenizer, "你好", [], max_length=None)
    with pytest.raises(GmaskError, match="leave out num_return_sequences=2"):
        next(model.stream_generate(inputs["input_ids"], do_sample=True, num_return_sequences=2))
    with pytest.raises(GmaskError, match="leave out streamer"):
        next(model.stream_chat(tokenizer, "你好", max_length=20, streamer=object()))
    monkeypatch.setattr(model, "generation_config", GenerationConfig(do_sample=True, num_return_sequences=2))
    with pytest.raises(GmaskError, match="leave out num_return_sequences=2"):
        model.chat(tokenizer, "你好", max_length=20)


def test_a_conversation_that_no_context_holds_is_refused_before_it_is_cut_into_tokens(
    loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("it is cut into tokens"))
    long = "好" * 2_000_000
    for query, history in ((long, []), ("你好", [(long, "好")])):
        for talk in (model.chat, lambda *args, **values: list(model.stream_chat(*args, **values))):
            with pytest.raises(GmaskError, match="characters, and there is room for 2048 tokens"):
                talk(tokenizer, query, history=history)
    with pytest.raises(GmaskError, match="characters, and there is room for"):
        chat.Chat(model, tokenizer).ask(long)
    with pytest.raises(GmaskError, match="characters, and there is room for"):
        gmask.reply_all(model, tokenizer, [[say("user", long)]])
