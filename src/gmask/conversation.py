"""Reads conversations in all accepted forms as rounds of a question and its answer.

The published chat, `gmask.Chat`, `gmask.reply_all`, the server, the page and training all read conversations here, so
that the same conversation is the same prompt everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gmask.errors import GmaskError, type_name
from gmask.files import check_text

Round = tuple[str, str]
"""A question and its answer."""

Rounds = Sequence[Round]
"""Oldest first."""

History = Sequence[Sequence[str] | Mapping[str, Any]]
"""Pairs of texts (asked, answered), as published, or messages ``{"role": ..., "content": ...}``, oldest first."""

SPEAKERS = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip
"""OpenAI's names of the speakers and ShareGPT's."""

CALLS = ("tool_calls", "function_call")
"""OpenAI's fields of a message whose contents no prompt holds."""

ACCEPTED = 'give pairs of texts (asked, answered) or messages such as {"role": "user", "content": "..."}'


@dataclass(frozen=True, slots=True)
class Conversation:
    """The rounds of a conversation, and the question that waits for a reply."""

    rounds: tuple[Round, ...]
    query: str | None = None  # None: the last message is the assistant's, or there is none
    is_greeted: bool = False  # the first message is the assistant's: the first round has an empty question

    def require_query(self) -> str:
        """Returns the question to reply to. Raises `GmaskError` if there is none."""
        if self.query is None:
            raise GmaskError("a conversation to reply to ends with a message of the user")
        return self.query


def read_conversation(history: History | None, query: str | None = None) -> Conversation:
    """Reads the rounds of a history, and the question behind it.

    - Consecutive messages of one speaker are joined by a newline.
    - These models have no system role. A system message is put before the next message of the user, on a line of its
      own; right behind a message of the user it is appended to that one.
    - If the assistant speaks first, that is a round with an empty question.
    - The texts of a message in parts, as OpenAI's clients send it, are joined.

    Args:
        history: pairs or messages, also mixed; messages may be those of ShareGPT, with ``from`` and ``value``. None is
            an empty history.
        query: the last message of the user, if it is not in the history.

    Raises:
        GmaskError: anything else, such as a bare text, None instead of a text, an unknown role or an image.
    """
    turns: list[tuple[str, str]] = []
    system: list[str] = []  # system messages since the last message of the user
    for number, entry in enumerate(_entries(history), 1):
        try:
            said = _read_entry(entry)
        except GmaskError as error:
            raise GmaskError(f"message {number}: {error}") from error
        for role, text in said:
            _add(turns, system, role, text)
    if query is not None:
        _add(turns, system, "user", read_content(query))
    if system:
        raise GmaskError("the system speaks, and no message of the user follows it")
    is_greeted = bool(turns) and turns[0][0] == "assistant"
    if is_greeted:
        turns.insert(0, ("user", ""))
    texts = [text for _, text in turns]
    rounds = tuple(zip(texts[::2], texts[1::2], strict=False))
    return Conversation(rounds, texts[-1] if len(texts) % 2 else None, is_greeted)


def read_content(content: Any) -> str:
    """Returns the text of a message, which may come in parts.

    Raises:
        GmaskError: not a text, such as None or an image.
    """
    if isinstance(content, str):
        return check_text(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise GmaskError(f"the content is {type_name(content)}, where a text is expected")
    return "".join(map(_read_part, content))


def _entries(history: Any) -> Sequence[Any]:
    if history is None:
        return ()
    if not _is_list(history):
        raise GmaskError(f"the conversation is {type_name(history)}, not a list: {ACCEPTED}")
    entries: Sequence[Any] = history
    return entries


def _read_entry(entry: Any) -> list[tuple[str, str]]:
    """Returns role and text of a message, or of both messages of a pair."""
    if isinstance(entry, Mapping):
        return [_read_message(entry)]
    if not _is_list(entry) or len(entry) != 2:
        size = f" of {len(entry)}" if _is_list(entry) else ""
        raise GmaskError(f"{type_name(entry)}{size} is not a pair of texts and no message: {ACCEPTED}")
    for name, text in zip(("question", "answer"), entry, strict=True):
        if not isinstance(text, str):
            raise GmaskError(f"the {name} is {type_name(text)}, where a text is expected: {ACCEPTED}")
    asked, answered = map(check_text, entry)
    return [("user", asked), ("assistant", answered)]


def _read_message(message: Mapping[str, Any]) -> tuple[str, str]:
    is_sharegpt = "from" in message and "role" not in message
    names = ("from", "value") if is_sharegpt else ("role", "content")
    for name in names:
        if name not in message:
            raise GmaskError(f"it has no {name!r}: {ACCEPTED}")
    role = message[names[0]]
    if not isinstance(role, str) or role not in SPEAKERS:
        shown = repr(role)[:50] if isinstance(role, str) else type_name(role)
        raise GmaskError(f"the role {shown} is none of {', '.join(SPEAKERS)}")
    if any(message.get(name) for name in CALLS):
        raise GmaskError("it calls a tool, and these models call none: leave the call out")
    return SPEAKERS[role], read_content(message[names[1]])


def _read_part(part: Any) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type_name(part)
    if kind != "text":
        shown = ascii(kind)[1:-1][:50] if isinstance(kind, str) else type_name(kind)
        raise GmaskError(f"the content has a part that is {shown}: these models read parts of type text alone")
    text = part.get("text")
    if not isinstance(text, str):
        raise GmaskError(f"the text of a part is {type_name(text)}, where a text is expected")
    return check_text(text)


def _add(turns: list[tuple[str, str]], system: list[str], role: str, text: str) -> None:
    """Adds a message to the turns, which alternate; system messages wait in ``system`` for the next user message."""
    if role == "system" and not (turns and turns[-1][0] == "user"):
        system.append(text)
        return
    if role == "system":
        role = "user"
    elif role == "user" and system:
        text = "\n".join([*system, text])
        system.clear()
    if turns and turns[-1][0] == role:
        turns[-1] = (role, f"{turns[-1][1]}\n{text}")
    else:
        turns.append((role, text))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
