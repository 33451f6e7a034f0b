"""Does a conversation go on as it would message by message, within its context, and as its user steers it?"""

import gc
import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import gmask
from gmask.cli.generation import answer_message
from gmask.generation.chat import Chat, Reply, reply_all
from gmask.generation.encoding import ChatGLMFormat, Context, fit_prompt
from gmask.tokenizers.chatglm import ChatGLMTokenizer
from test_chatglm_chat import VOCABULARY, needs_vocabulary
from test_chatglm_parity import TINY, load_chatglm, read_case

pytestmark = needs_vocabulary


@pytest.fixture(scope="module")
def model():
    return load_chatglm()


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer(str(VOCABULARY))


@pytest.fixture
def chat(model, tokenizer) -> Chat:
    return Chat(model, tokenizer, context_length=64, max_tokens=12, seed=3)


def stream_all(chat: Chat, text: str) -> tuple[str, Reply]:
    said, fragments = "", chat.stream(text)
    while True:
        try:
            said += next(fragments)
        except StopIteration as done:
            return said, done.value


def test_greedy_replies_are_the_published_ones(model, tokenizer) -> None:
    for found in read_case(TINY)[0]["chat_end_to_end"]:
        chat = Chat(model, tokenizer, context_length=found["max_length"], max_tokens=10, temperature=0)
        chat.rounds = [tuple(pair) for pair in found["history"]]
        reply = chat.ask(found["query"])
        assert found["chat_response"].startswith(reply.text.rstrip("\ufffd")) and reply.text
        assert (reply.finish, reply.reply_tokens) == ("length", 10)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 5}, {"seed": 5, "stop": ["一", "上海"]}])
def test_a_streamed_reply_is_the_whole_one_and_nothing_is_taken_back(model, tokenizer, settings) -> None:
    at_once = Chat(model, tokenizer, context_length=64, max_tokens=20, **settings)
    streamed = Chat(model, tokenizer, context_length=64, max_tokens=20, **settings)
    for text in ("你是谁？", "hello", "再见"):
        reply = at_once.ask(text)
        said, last = stream_all(streamed, text)
        assert last == reply
        assert said == reply.text
    assert at_once.messages == streamed.messages


def test_a_seed_repeats_a_conversation_and_no_seed_is_that_of_a_draw(model, tokenizer) -> None:
    settings = dict(context_length=64, max_tokens=20, temperature=3.0, top_p=1.0)
    first, again, other = (Chat(model, tokenizer, seed=seed, **settings) for seed in (5, 5, 6))
    said = [[chat.ask(text).text for text in ("你是谁？", "hello")] for chat in (first, again, other)]
    assert said[0] == said[1] != said[2]
    assert Chat(model, tokenizer, **settings).first_seed != Chat(model, tokenizer, **settings).first_seed


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_broken_model_does_not_chat(model, tokenizer, fault: float, temperature: float) -> None:
    chat = Chat(model, tokenizer, context_length=64, max_tokens=8, temperature=temperature)
    bias = model.transformer.final_layernorm.bias
    kept = bias.detach().clone()
    try:
        bias.data[0] = fault
        with pytest.raises(gmask.GmaskError, match="values that are not numbers"):
            chat.ask("你好")
        with pytest.raises(gmask.GmaskError, match="values that are not numbers"):
            next(chat.stream("你好"))
    finally:
        bias.data.copy_(kept)


def test_a_batch_replies_as_single_conversations_do(model, tokenizer) -> None:
    texts = ["你是谁？", "hello", "一加一等于几？请回答"]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    settings = dict(context_length=64, max_tokens=16)
    together = reply_all(model, tokenizer, conversations, seed=5, **settings)
    alone = [reply_all(model, tokenizer, [one], seed=5 + row, **settings)[0] for row, one in enumerate(conversations)]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert [reply.logprob for reply in together] == pytest.approx([reply.logprob for reply in alone], abs=1e-4)
    assert reply_all(model, tokenizer, conversations, seed=5, batch_size=2, **settings) != []


def test_the_oldest_rounds_give_way_and_the_prompt_stays_whole(tokenizer) -> None:
    prompt_format = ChatGLMFormat(tokenizer)
    rounds = [(f"问题{number}", "好" * number) for number in range(6)]
    everything = fit_prompt("再见", rounds, prompt_format, longest=10_000, max_tokens=0)
    assert everything.rounds_left_out == 0
    for room in range(everything.length - 1, 30, -7):
        prompt = fit_prompt("再见", rounds, prompt_format, longest=room + 5, max_tokens=5)
        assert prompt.length <= room and prompt.rounds_left_out > 0
        assert prompt.context == prompt_format.encode("再见", rounds[prompt.rounds_left_out :])
        assert prompt.context.ids[-1] == tokenizer.gmask_token_id
        fuller = prompt_format.encode("再见", rounds[prompt.rounds_left_out - 1 :])
        assert len(fuller.ids) + 1 > room
    with pytest.raises(gmask.GmaskError, match=r"3 tokens, but there is room for 2"):
        fit_prompt("你好", rounds, prompt_format, longest=7, max_tokens=5)


def test_an_answer_that_leaves_no_room_for_a_prompt_is_told(tokenizer) -> None:
    with pytest.raises(gmask.GmaskError, match="max_tokens 1000 leaves no room for a prompt in 96 tokens"):
        fit_prompt("q", [], ChatGLMFormat(tokenizer), longest=96, max_tokens=1000)


def test_a_long_history_is_not_encoded_anew_for_every_round(tokenizer) -> None:
    asked: list[int] = []

    class Counting(ChatGLMFormat):
        def encode(self, query: str, rounds: Any) -> Context:
            asked.append(len(rounds))
            return super().encode(query, rounds)

    prompt = fit_prompt("再见", [("", "")] * 20_000, Counting(tokenizer), longest=256, max_tokens=16)
    assert prompt.length <= 240 and 19_900 < prompt.rounds_left_out < 20_000
    assert len(asked) < 20 and max(asked) <= 256
    asked.clear()
    with pytest.raises(gmask.GmaskError, match="the message has 4000000 characters, and there is room for 240 tokens"):
        fit_prompt("再见" * 2_000_000, [], Counting(tokenizer), longest=256, max_tokens=16)
    huge = fit_prompt("再见", [("好" * 4_000_000, "好")], Counting(tokenizer), longest=256, max_tokens=16)
    assert (huge.rounds_left_out, asked) == (1, [0])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"n": 2}, "a conversation has one reply"),
        ({"num_beams": 2, "temperature": 0}, "a conversation has one reply"),
        ({"num_return_sequences": 2}, "there is no setting 'num_return_sequences'"),
        ({"best_of": 2}, "there is no setting 'best_of'"),
        ({"stop": 5}, "stop is 5: give a text or a list of texts"),
        ({"context_length": "long"}, "context_length is 'long'"),
        ({"context_length": -1}, "context_length is -1"),
    ],
)
def test_settings_of_a_chat_that_make_no_sense_are_refused(
    model, tokenizer, values: dict[str, Any], reason: str
) -> None:
    settings = {"context_length": 64, "max_tokens": 2, **values}
    with pytest.raises(gmask.GmaskError, match=reason):
        Chat(model, tokenizer, **settings)
    with pytest.raises(gmask.GmaskError, match=reason):
        reply_all(model, tokenizer, [[{"role": "user", "content": "你好"}]], **settings)


def test_many_conversations_are_a_list(model, tokenizer) -> None:
    asked = [[{"role": "user", "content": "你好"}]]
    settings: dict[str, Any] = dict(context_length=64, max_tokens=2)
    assert len(reply_all(model, tokenizer, asked, stop=None, **settings)) == 1
    for wrong in (None, "你好", 5):
        with pytest.raises(gmask.GmaskError, match="reply_all takes a list of conversations"):
            reply_all(model, tokenizer, wrong, **settings)  # type: ignore[arg-type]
    with pytest.raises(gmask.GmaskError, match="batch_size must be at least 1, not 0"):
        reply_all(model, tokenizer, asked, batch_size=0, **settings)


def test_a_conversation_says_how_many_rounds_it_forgot(chat: Chat) -> None:
    replies = [chat.ask("请你说一说这个问题") for _ in range(4)]
    assert replies[0].rounds_left_out == 0 < replies[-1].rounds_left_out
    assert all(reply.prompt_tokens <= 64 - 12 for reply in replies)
    assert len(chat.messages) == 8


def test_a_stream_left_early_keeps_what_was_said(chat: Chat) -> None:
    stream = chat.stream("你好")
    said = next(stream)
    stream.close()
    assert chat.messages == [{"role": "user", "content": "你好"}, {"role": "assistant", "content": said}]
    assert chat.last_reply is not None and chat.last_reply.finish == "cancelled"


SHORTAGES = [  # as torch words them for a GPU, the CPU of Linux and Windows, and Apple's GPU, and as the kernel does
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried 8 bytes."
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried 8 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
    MemoryError("no memory for the activations of a quantized matrix product"),
]


def fail_after(chat: Chat, tokens: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the model raise an error once it has given some tokens."""
    forward, passes = chat.chatter.model.forward, itertools.count()

    def failing(*args: Any, **settings: Any) -> Any:
        if next(passes) >= tokens:
            raise error
        return forward(*args, **settings)

    monkeypatch.setattr(chat.chatter.model, "forward", failing)


@pytest.mark.parametrize("tokens", [0, 8])
@pytest.mark.parametrize("error", SHORTAGES)
def test_too_little_memory_is_one_line_and_the_conversation_stays(
    chat: Chat, error: Exception, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.ask("你好")
    before, prompt = chat.messages, chat.chatter.fit(chat.rounds, "hello")
    for attempt in (chat.ask, lambda text: list(chat.stream(text))):
        with monkeypatch.context() as patch:
            fail_after(chat, tokens, error, patch)
            with pytest.raises(gmask.GmaskError) as caught:
                attempt("hello")
        message = str(caught.value)
        assert message.startswith(
            f"not enough memory for a context of {prompt.length + 12} tokens (a prompt of {prompt.length}): "
        )
        assert "--context-length" in message and "--quantize int4" in message and "\n" not in message
        assert chat.messages == before
    assert chat.ask("hello").text and len(chat.messages) == 4


def test_what_torch_says_of_this_machine_is_understood(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.chatter.model, "forward", lambda **settings: torch.empty(1 << 60, dtype=torch.uint8))
    conversations = [[{"role": "user", "content": text}] for text in ("hello", "你好")]
    with pytest.raises(gmask.GmaskError, match="not enough memory for 2 conversations at once, with a context of"):
        reply_all(chat.chatter.model, chat.chatter.tokenizer, conversations, max_tokens=4)


def test_the_tensors_of_a_failed_reply_are_let_go(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def failing(**settings: Any) -> Any:
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise MemoryError

    monkeypatch.setattr(chat.chatter.model, "forward", failing)
    with pytest.raises(gmask.GmaskError) as caught:
        chat.ask("hello")
    assert isinstance(caught.value.__cause__, MemoryError)
    gc.collect()
    assert held[0]() is None


def test_no_other_error_is_explained_away(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(chat, 2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        chat.ask("hello")


def test_settings_that_do_not_fit_are_refused(model, tokenizer) -> None:
    for settings, named in (
        ({"n": 2}, "one reply"),
        ({"temperature": 0, "num_beams": 3}, "one reply"),
        ({"temperature": -1}, "temperature is -1: it must be at least 0"),
        ({"do_sample": False}, "no setting 'do_sample'"),
        ({"max_tokens": 64}, "no room for a prompt"),
        ({"temprature": 1}, "temperature"),
    ):
        with pytest.raises(gmask.GmaskError, match=named):
            Chat(model, tokenizer, context_length=64, **settings)
    with pytest.warns(UserWarning, match="trained on at most 64"):
        Chat(model, tokenizer, context_length=80)


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_long_history_has_room_as_if_every_start_were_tried(tokenizer, data: st.DataObject) -> None:
    text = st.text("好问 a[]M1\n，", max_size=12)
    rounds = data.draw(st.lists(st.tuples(text, text), max_size=9))
    prompt_format = ChatGLMFormat(tokenizer)
    longest, max_tokens = data.draw(st.integers(20, 160)), data.draw(st.none() | st.integers(0, 10))
    query = data.draw(text)

    def plain() -> tuple[Context, int] | None:
        """Each start in turn, from the oldest round on."""
        room = longest // 2 if max_tokens is None else longest - max_tokens
        for left_out in range(len(rounds) + 1):
            context = prompt_format.encode(query, rounds[left_out:])
            if len(context.ids) + 1 <= room:
                return context, left_out
        fits = max_tokens is None and len(context.ids) + 1 < longest
        return (context, len(rounds)) if fits else None

    def found() -> tuple[Context, int] | None:
        try:
            prompt = fit_prompt(query, rounds, prompt_format, longest=longest, max_tokens=max_tokens)
        except gmask.GmaskError:
            return None
        return prompt.context, prompt.rounds_left_out

    assert found() == plain()


def test_commands_steer_the_conversation(chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "talk.json"
    assert answer_message(chat, "你好") and answer_message(chat, "再见")
    assert answer_message(chat, f"/save {path}")
    messages = chat.messages
    assert json.loads(path.read_text("utf-8"))["messages"] == messages
    assert answer_message(chat, "/undo") and chat.messages == messages[:2]
    assert answer_message(chat, "clear") and chat.messages == []
    assert answer_message(chat, f"/load {path}") and chat.messages == messages
    assert not answer_message(chat, "stop") and not answer_message(chat, "/stop")
    assert answer_message(chat, "/help")
    assert "/undo" in capsys.readouterr().out
    for wrong in ("/nothing", "/save", f"/load {tmp_path / 'absent.json'}"):
        with pytest.raises(gmask.GmaskError):
            answer_message(chat, wrong)
    saved = path.read_bytes()
    path.write_text(json.dumps({"messages": [*messages, {"role": "user", "content": "more"}]}), "utf-8")
    with pytest.raises(gmask.GmaskError, match=r"not a saved conversation .*the last message is the user's"):
        chat.load(path)
    assert chat.messages == messages
    for other in ("null", "{}", "[]", '[["a", "b"]]', '{"messages": null}', '{"messages": "a"}', '{"messages": {}}'):
        path.write_text(other)
        with pytest.raises(gmask.GmaskError, match=r"not a saved conversation \(it is no object with a list"):
            chat.load(path)
        assert chat.messages == messages
    path.write_bytes(b"\xef\xbb\xbf" + saved)
    chat.load(path)
    assert chat.messages == messages
