"""How do a client's texts and parameters become what the engine takes?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gmask.errors import GmaskError
from gmask.generation import constraints
from gmask.generation.chat import read_rounds
from gmask.generation.constraints import Constraint
from gmask.generation.context import Context, encode_plain
from gmask.generation.conversation import Prompt, Rounds, fit_prompt
from gmask.generation.sampling import SamplingParameters
from gmask.generation.streaming import settle_blank
from gmask.serving.backend import Backend
from gmask.serving.errors import ApiError
from gmask.serving.samples import Settle
from gmask.serving.schema import ChatMessage, CompletionRequest, Constrained, Sampled

SAMPLED = ("temperature", "top_p", "top_k", "min_tokens", "seed", "repetition_penalty", "presence_penalty",
           "frequency_penalty", "logit_bias")  # fmt: skip
"""Parameters that are passed on as they are."""


@dataclass(frozen=True, slots=True)
class Question:
    """What the engine reads, and how its answer becomes text."""

    context: Context
    settle: Settle
    text: str = ""  # of the prompt, for echo
    ids: tuple[int, ...] = ()  # of that text

    def without_space(self) -> "Question":
        """The same for an answer of a given form, before which the constraint lets a space stand."""
        return replace(self, settle=lambda text, is_whole: self.settle(text, is_whole).removeprefix(" "))


def read_sampling(
    request: Sampled, defaults: Mapping[str, Any], backend: Backend, *, max_tokens: int, **others: Any
) -> SamplingParameters:
    """The parameters of a request, with an endpoint's defaults for those that are not stated.

    Raises:
        ApiError: more tokens than the server writes, or a bias on a token that is not in the vocabulary.
        GmaskError: another value that does not fit.
    """
    if max_tokens > backend.longest_answer:
        raise ApiError(
            400,
            f"max_tokens is {max_tokens}, but an answer has at most {backend.longest_answer} here",
            param="max_tokens",
        )
    size = len(backend.tokenizer)
    if unknown := [token for token in request.logit_bias or {} if not 0 <= token < size]:
        raise ApiError(400, f"token {unknown[0]} is not one of the {size} of this vocabulary", param="logit_bias")
    stated = {name: getattr(request, name) for name in SAMPLED if getattr(request, name) is not None}
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    values = {**defaults, **stated, "max_tokens": max_tokens, "stop": stop, **others}
    if values.get("min_tokens", 0) > max_tokens:
        raise ApiError(400, f"min_tokens is above max_tokens, {max_tokens}", param="min_tokens")
    return SamplingParameters(**values)


def read_constraint(request: Constrained, backend: Backend) -> Constraint | None:
    """What an answer may consist of. Compiling it may take a while: call it in a thread.

    Raises:
        GmaskError: a schema or pattern that cannot be followed.
        ApiError: several of them.
    """
    tokenizer, size = backend.tokenizer, backend.model.config.vocab_size
    wanted = request.response_format if request.response_format and request.response_format.type != "text" else None
    if sum(one is not None for one in (wanted, request.guided_regex, request.guided_choice)) > 1:
        raise ApiError(400, "response_format, guided_regex and guided_choice exclude each other: give one")
    if request.guided_regex is not None:
        return constraints.regex(tokenizer, request.guided_regex, vocabulary_size=size)
    if request.guided_choice is not None:
        return constraints.choices(tokenizer, request.guided_choice, vocabulary_size=size)
    if wanted is None:
        return None
    if wanted.type == "json_object":
        return constraints.json_schema(tokenizer, {"type": "object"}, vocabulary_size=size)
    if wanted.json_schema is None:
        raise ApiError(400, "response_format of type json_schema needs a json_schema", param="response_format")
    return constraints.json_schema(tokenizer, wanted.json_schema.schema_, vocabulary_size=size)


def read_messages(messages: Sequence[ChatMessage]) -> tuple[str, Rounds]:
    """The last question and the rounds before it.

    Raises:
        GmaskError: messages that do not take turns.
        ApiError: the last one is not the user's.
    """
    texts = [{"role": message.role, "content": message.text} for message in messages]
    system = ""
    while texts and texts[0]["role"] in ("system", "developer"):
        system += texts.pop(0)["content"] + "\n"
    if not texts or texts[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", param="messages")
    texts[0]["content"] = system + texts[0]["content"]
    return texts[-1]["content"], read_rounds(texts[:-1])


def fit_chat(query: str, rounds: Rounds, backend: Backend, *, longest: int, max_tokens: int | None) -> Prompt:
    """The prompt of a conversation, with room for the reply in ``longest`` tokens; the oldest rounds go first.

    Without ``max_tokens`` the reply gets half of them, or less for a question that is longer than that.

    Raises:
        GmaskError: the question has no room.
    """
    if max_tokens is None:
        bare = Prompt(backend.format.encode(query, ()), len(rounds)).length
        if bare >= longest:
            raise GmaskError(f"the message has {bare} tokens, prompt and reply together at most {longest}: shorten it")
        room = max(longest // 2, bare)
    else:
        room = longest - max_tokens
    recent = _recent(rounds, backend, room)
    prompt = fit_prompt(query, recent, backend.format, room=room)
    return Prompt(prompt.context, prompt.rounds_left_out + len(rounds) - len(recent))


def settle_reply(backend: Backend) -> Settle:
    """What is certain of a reply, in the form in which it is shown."""
    shape = backend.format
    return lambda text, is_whole: shape.clean(text) if is_whole else shape.settled(text)


def _recent(rounds: Rounds, backend: Backend, room: int) -> Rounds:
    """The latest rounds that could have room, each counted once: fitting them reads a long history many times."""
    for kept in range(len(rounds)):
        texts = rounds[len(rounds) - 1 - kept]
        tokens = sum(len(encode_plain(backend.tokenizer, text)) for text in texts)
        room -= max(1, tokens - 4)  # pieces may join with what stands beside them
        if room < 0:
            return rounds[len(rounds) - kept :]
    return rounds


def read_prompts(request: CompletionRequest, backend: Backend) -> list[Question]:
    """What a completion asks: one question, or several of one kind."""
    prompts = request.prompt
    if isinstance(prompts, str):
        return [_read_text(prompts, request.suffix, backend)]
    if not prompts:
        raise ApiError(400, "prompt: there is none", param="prompt")
    if isinstance(prompts[0], int):
        return [_read_ids(prompts, request.suffix, backend)]
    if isinstance(prompts[0], str):
        return [_read_text(text, request.suffix, backend) for text in prompts]
    return [_read_ids(ids, request.suffix, backend) for ids in prompts]


def _read_text(text: str, suffix: str | None, backend: Backend) -> Question:
    ids = tuple(encode_plain(backend.tokenizer, text))
    if not backend.fills_blanks:
        if suffix is not None:
            backend.require_blanks("suffix")
        return Question(backend.format.encode(text, ()), lambda reply, _: reply, text, ids)
    blank = "[MASK]" if suffix is not None or "[gMASK]" not in backend.reader.blank_ids else "[gMASK]"
    blanked = backend.reader.read(escape(text, backend) + blank + escape(suffix or "", backend))
    return Question(blanked.context, settle_blank(blanked, 0), text, ids)


def escape(text: str, backend: Backend) -> str:
    """A text whose special tokens are meant as text, and that a blank may follow."""
    escaped = backend.reader.pattern.sub(lambda match: 2 * match[1] + "\\" + match[2], text)
    return escaped + "\\" * (len(text) - len(text.rstrip("\\")))


def _read_ids(ids: Sequence[int], suffix: str | None, backend: Backend) -> Question:
    if suffix is not None:
        raise ApiError(400, "suffix goes with a prompt that is text", param="suffix")
    size = len(backend.tokenizer)
    if unknown := [token for token in ids if token >= size]:
        raise ApiError(400, f"token {unknown[0]} is not one of the {size} of this vocabulary", param="prompt")
    special = backend.format.special
    if forbidden := set(ids) & {special.mask, special.smask, special.gmask, special.sop, special.eop}:
        raise ApiError(400, f"token {min(forbidden)} is a blank or an end, which the server sets", param="prompt")
    head = (special.cls,) if backend.fills_blanks and ids[0] != special.cls else ()
    context = Context((*head, *ids, special.gmask), (len(head) + len(ids),))
    text = backend.tokenizer.decode(list(ids), skip_special_tokens=True)
    return Question(context, lambda answer, _: answer, text, tuple(ids))
