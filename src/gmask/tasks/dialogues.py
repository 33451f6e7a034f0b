"""Which prompts and replies does a record of a conversation hold?"""

from collections.abc import Mapping, Sequence
from typing import Any

from gmask.errors import GmaskError
from gmask.tasks.samples import Sample
from gmask.tasks.templates import read_value

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip
"""OpenAI's names of the speakers and ShareGPT's."""


def read_messages(messages: Any, *, require_answers: bool) -> list[Sample]:
    """One sample for each reply of the assistant, with the rounds before it as history.

    A reply is learnt from a context that is read in both directions, so that one text cannot serve for several of them.
    Messages of one speaker in a row are one. What the system says stands before the first prompt.

    Args:
        messages: objects with ``role`` and ``content``, or with ``from`` and ``value``.
        require_answers: without it a last message of the user is a sample whose answer is not known.

    Raises:
        GmaskError: an unknown role, an empty message, or no reply.
    """
    system, turns = _join_turns(messages)
    if turns and system:
        turns[0] = ("user", f"{system}\n{turns[0][1]}")
    rounds = [(prompt, reply) for (_, prompt), (_, reply) in zip(turns[::2], turns[1::2], strict=False)]
    samples = [
        Sample(text=prompt, answers=(reply,), history=tuple(rounds[:index]))
        for index, (prompt, reply) in enumerate(rounds)
    ]
    if len(turns) % 2 and not require_answers:
        samples.append(Sample(text=turns[-1][1], history=tuple(rounds)))
    if not samples:
        raise GmaskError("the conversation has no reply of the assistant")
    return samples


def read_history(values: Mapping[str, Any], column: str) -> tuple[tuple[str, str], ...]:
    """The rounds before a prompt, as published: a list of pairs of prompt and reply. Absent or null is none."""
    rounds = values.get(column) or []
    if not isinstance(rounds, list):
        raise GmaskError(f"column {column!r} holds a {type(rounds).__name__}, not a list of [prompt, reply]")
    for one in rounds:
        if not isinstance(one, Sequence) or len(one) != 2 or not all(isinstance(text, str) for text in one):
            raise GmaskError(f"column {column!r} holds {one!r}, not a pair of texts [prompt, reply]")
    return tuple((prompt, reply) for prompt, reply in rounds)


def _join_turns(messages: Any) -> tuple[str, list[tuple[str, str]]]:
    """What the system says, and the turns of user and assistant by turns; the first is the user's."""
    if not isinstance(messages, list):
        raise GmaskError(f"the messages are a {type(messages).__name__}, not a list")
    system, turns = list[str](), list[tuple[str, str]]()
    for number, message in enumerate(messages, 1):
        try:
            role, content = _read_message(message)
        except GmaskError as error:
            raise GmaskError(f"message {number}: {error}") from error
        if role == "system":
            system.append(content)
        elif turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n{content}")
        elif not turns and role == "assistant":
            raise GmaskError("the assistant speaks before the user")
        else:
            turns.append((role, content))
    return "\n".join(system), turns


def _read_message(message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise GmaskError(f"{message!r} is no object with role and content")
    is_sharegpt = "from" in message and "role" not in message
    role = read_value(message, "from" if is_sharegpt else "role")
    content = read_value(message, "value" if is_sharegpt else "content")
    if role not in ROLES:
        raise GmaskError(f"the role {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, list):  # the parts of OpenAI's messages
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    if not isinstance(content, str) or not content.strip():
        raise GmaskError(f"what the {role} says is empty or no text")
    return ROLES[role], content.strip()
