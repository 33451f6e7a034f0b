"""Does `gmask chat` talk as the model does, from a pipe and on a terminal, and obey who is typing?"""

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gmask
from gmask.cli import main
from gmask.models.chatglm import ChatGLMForConditionalGeneration
from terminal import Terminal
from test_chatglm_chat import VOCABULARY, needs_vocabulary
from test_chatglm_parity import TINY, read_case
from test_cli import Outcome

FOLDER = VOCABULARY.parent
GOLDEN = Path(__file__).parent / "golden"
GREEDY = ("--set", "temperature=0")
Run = Callable[..., Outcome]

pytestmark = needs_vocabulary


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(verb: str, *arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["gmask", verb, "--model", str(FOLDER), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_piped_lines_are_the_rounds_of_one_conversation(run: Run, tmp_path: Path) -> None:
    piped = run("chat", "--max-tokens", 12, *GREEDY, stdin="你是谁？\n\nhello\n")
    chat = gmask.Chat(*gmask.load(FOLDER, device="cpu"), temperature=0, max_tokens=12)
    assert piped.out.splitlines() == [chat.ask("你是谁？").text, chat.ask("hello").text]
    assert piped.err.splitlines() == ["note: cut at 12 tokens; --max-tokens sets the limit"] * 2
    assert run("chat", "--max-tokens", 12, *GREEDY, "你是谁？", "hello").out == piped.out
    published = read_case(TINY)[0]["chat_end_to_end"][0]["chat_response"]
    assert published.startswith(piped.out.splitlines()[0])
    chat.save(tmp_path / "talk.json")
    further = run("chat", "--max-tokens", 12, *GREEDY, "--load", tmp_path / "talk.json", "再见")
    assert further.out.splitlines() == [chat.ask("再见").text]


def test_a_trained_prefix_changes_the_reply(run: Run) -> None:
    adapter = GOLDEN / "chatglm-tiny-ptuning" / "ptuning"
    tuned = run("chat", "--adapter", adapter, "--max-tokens", 12, *GREEDY, "你好").out
    chat = gmask.Chat(*gmask.load(FOLDER, device="cpu", adapter=adapter), temperature=0, max_tokens=12)
    assert tuned.strip() == chat.ask("你好").text
    assert tuned != run("chat", "--max-tokens", 12, *GREEDY, "你好").out


def test_counts_are_told_where_the_context_ends(run: Run) -> None:
    longer = run("chat", "--context-length", 100, "--max-tokens", 4, *GREEDY, "hello")
    assert "a context of 100 tokens, but the model was trained on at most 64" in longer.err
    forgetful = run("chat", "--context-length", 40, "--max-tokens", 10, *GREEDY, "hello", "hello", "hello")
    assert "note: the oldest 1 round(s) had no room in the context" in forgetful.err
    refused = run("chat", "--context-length", 10, "--max-tokens", 4, "hello hello hello world")
    assert (refused.code, len(refused.err.splitlines())) == (
        2,
        1,
    ) and "21 tokens, but there is room for 6" in refused.err


@pytest.mark.parametrize("verb", [("infill",), ("score", "--answers", "a|b"), ("embed",)])
def test_verbs_for_blanks_say_in_one_line_that_this_model_chats(run: Run, verb: tuple[str, ...]) -> None:
    done = run(*verb, "a [MASK] b")
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert "is a ChatGLM, which has no blanks to fill: use `gmask chat`" in done.err


def test_mistakes_are_one_line(run: Run) -> None:
    for arguments, message in (
        (["--max-tokens", 64, "hello"], "no room for a prompt"),
        (["--dtype", "int3", "hello"], "dtype 'int3' is not one of"),
        (["--set", "n=2", "hello"], "one reply"),
        ([], "standard input is empty"),
    ):
        done = run("chat", *arguments)
        assert (done.code, len(done.err.splitlines())) == (2, 1) and message in done.err


def test_integers_reply_as_those_of_the_folder_that_gmask_quantize_writes(run: Run, tmp_path: Path) -> None:
    options = ("--max-tokens", 12, *GREEDY, "你是谁？")
    quantized = run("chat", "--quantize", "int4", *options).out
    model, tokenizer = gmask.load(FOLDER, device="cpu")
    chat = gmask.Chat(model.quantize(4), tokenizer, temperature=0, max_tokens=12)
    assert quantized.strip() == chat.ask("你是谁？").text
    assert quantized != run("chat", *options).out
    refused = run("chat", "--quantize", "int5", *options)
    assert (refused.code, refused.err) == (2, "gmask: quantize 'int5' is not one of int8, int4\n")


def test_too_little_memory_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ChatGLMForConditionalGeneration, "forward", fail)
    done = run("chat", "--context-length", 48, "--max-tokens", 12, "hello")
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert done.err.startswith("gmask: not enough memory for a context of") and "--context-length" in done.err


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A conversation whose replies are so long that there is time to stop one."""
    command = [sys.executable, "-m", "gmask", "chat", "--model", str(FOLDER), *GREEDY]
    command += ["--context-length", "20000", "--max-tokens", "19000"]
    terminal = Terminal(command, HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path), OMP_NUM_THREADS="1")
    yield terminal
    terminal.close()


def say(terminal: Terminal, text: str, answer: str) -> None:
    """Types a line at the prompt and waits for what it should bring."""
    terminal.read_until_prompt()
    terminal.press(f"{text}\r")
    terminal.read_until(answer)


def stop_reply(terminal: Terminal) -> None:
    """What Ctrl-C does where the terminal is that of the session, which it is not in a test."""
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_until("...")


def test_a_scripted_conversation_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    terminal.read_until("Ctrl-D ends.")
    say(terminal, "你是谁？", "应该怎么办")  # it is streamed: the whole reply has 19000 tokens
    stop_reply(terminal)
    say(terminal, f"/save {first}", ": 2 messages")
    stopped = json.loads(first.read_text("utf-8"))["messages"]
    assert stopped[0] == {"role": "user", "content": "你是谁？"}
    assert stopped[1]["content"].startswith("应该怎么办")
    say(terminal, "/nothing", "there is no command /nothing")
    terminal.read_until_prompt()
    terminal.press("\x03")  # at the prompt: a new line
    say(terminal, "clear", "begins anew")
    chat = gmask.Chat(*gmask.load(FOLDER, device="cpu"), temperature=0, max_tokens=12)
    begun = chat.ask("hello\nworld").text[:6]
    terminal.read_until_prompt()
    terminal.press("hello\\\r")
    say(terminal, "world", begun)
    stop_reply(terminal)
    say(terminal, f"/save {second}", ": 2 messages")
    assert json.loads(second.read_text("utf-8"))["messages"][0]["content"] == "hello\nworld"
    say(terminal, "/undo", "taken back")
    say(terminal, "/undo", "nothing to take back")
    say(terminal, f"/load {first}", "2 messages")
    say(terminal, f"/save {second}", ": 2 messages")
    assert json.loads(second.read_text("utf-8"))["messages"] == stopped
    terminal.read_until_prompt()
    terminal.press("stop\r")
    assert terminal.process.wait(timeout=600) == 0
