"""How does ``gmask chat`` talk to somebody?"""

import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmask.cli.arguments import base_of, merge_pairs, read_texts
from gmask.cli.options import Adapter, Dtype, Pairs, Quantize
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from gmask.generation.chat import Chat, Reply

GREETING = "A message, please; /help lists the commands, Ctrl-D ends."
COMMANDS = """\
/clear       begin anew (also: clear)
/undo        take the last round back
/save FILE   write the conversation to a JSON file
/load FILE   go on with one
/stop        end (also: stop, Ctrl-D)
Ctrl-C stops the reply that is being written and keeps what was said; \\ at the end of a line goes on with the next."""

Texts = Annotated[
    list[str] | None, typer.Argument(metavar="MESSAGE...", help="Answer these in turn and end.", show_default=False)
]
ContextLength = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and reply together.", show_default="what the model was trained on"),
]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens of a reply.", show_default="half of the context")]
Talker = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder or name of a model, or bundled, or bundled-chat.",
        show_default="bundled-chat, or the bundled model that the adapter is for",
    ),
]
History = Annotated[
    Path | None, typer.Option("--load", help="Go on with the conversation in this file.", show_default=False)
]


def chat(
    texts: Texts = None,
    model: Talker = None,
    context_length: ContextLength = None,
    max_tokens: MaxTokens = None,
    history: History = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    pairs: Pairs = None,
) -> None:
    """Talk with a model: ChatGLM-6B, or another GLM by questions and answers."""
    from gmask.generation.chat import Chat
    from gmask.generation.settings import make_settings
    from gmask.loading import load

    settings = merge_pairs(pairs, max_tokens=max_tokens)
    make_settings({"max_tokens": sys.maxsize, **settings})  # a mistake is told before the model and its limit are read
    chosen = model or (base_of(adapter, "bundled-chat") if adapter else "bundled-chat")
    network, tokenizer = load(chosen, dtype=dtype, quantize=quantize, adapter=adapter)
    conversation = Chat(network, tokenizer, context_length=context_length, **settings)
    _tell_context(conversation.chatter.context_length, network.config.max_position_embeddings)
    if history is not None:
        conversation.load(history)
    if texts or not sys.stdin.isatty():
        for text in read_texts(texts):
            reply = conversation.ask(text)
            print(reply.text, flush=True)
            _tell(reply)
    else:
        converse(conversation)


def converse(conversation: "Chat") -> None:
    """Answers one message after the other until the user ends it."""
    from prompt_toolkit import PromptSession

    from gmask.cli.interactive import history_file, open_history

    session: PromptSession[str] = PromptSession(history=open_history(history_file("chat")))
    print(GREETING)
    while True:
        try:
            text = read_message(session)
            if text and not answer(conversation, text):
                return
        except GmaskError as error:
            print(f"gmask: {error}")
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def read_message(session: "PromptSession[str]") -> str:
    """A message; a line that ends with a backslash goes on with the next."""
    lines = [session.prompt("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(session.prompt(". "))
    return "\n".join(lines).strip()


def answer(conversation: "Chat", text: str) -> bool:
    """Obeys a command or replies to a message; False if that was the end."""
    word, _, argument = text.partition(" ")
    if text in ("stop", "/stop", "/exit", "/quit"):
        return False
    if text == "clear":
        word = "/clear"
    obey = _commands(conversation).get(word)
    if obey is not None:
        print(obey(argument.strip()))
    elif text.startswith("/"):
        raise GmaskError(f"there is no command {word}; /help lists them")
    else:
        print_reply(conversation.stream(text))
    return True


def _commands(conversation: "Chat") -> dict[str, Callable[[str], str]]:
    def clear(_: str) -> str:
        conversation.clear()
        return "the conversation begins anew"

    def undo(_: str) -> str:
        return "the last round is taken back" if conversation.undo() else "there is nothing to take back"

    def save(name: str) -> str:
        if not name:
            raise GmaskError("/save needs the name of a file")
        conversation.save(Path(name).expanduser())
        return f"{name}: {len(conversation.messages)} messages"

    def load(name: str) -> str:
        if not name:
            raise GmaskError("/load needs the name of a file")
        conversation.load(Path(name).expanduser())
        return f"{len(conversation.messages)} messages"

    return {"/clear": clear, "/undo": undo, "/save": save, "/load": load, "/help": lambda _: COMMANDS}


def print_reply(fragments: Generator[str, None, "Reply"]) -> None:
    """Prints a reply while it is being written. Ctrl-C ends it; what was said stays in the conversation."""
    try:
        while True:
            print(next(fragments), end="", flush=True)
    except StopIteration as done:
        print()
        _tell(done.value)
    except KeyboardInterrupt:
        fragments.close()
        print(" ...")
    except GmaskError:
        print()  # the message has a line of its own
        raise


def _tell_context(wanted: int, trained: int) -> None:
    if wanted > trained:
        print(
            f"note: a context of {wanted} tokens, but the model was trained on at most {trained}: replies get worse "
            "beyond them",
            file=sys.stderr,
        )


def _tell(reply: "Reply") -> None:
    if reply.rounds_left_out:
        print(f"note: the oldest {reply.rounds_left_out} round(s) had no room in the context", file=sys.stderr)
    if reply.finish == "length":
        print(f"note: cut at {reply.reply_tokens} tokens; --max-tokens sets the limit", file=sys.stderr)
