"""Replies to conversations: `Chat` for one, whole or streamed, and `reply_all` for many in batches."""

import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.conversation import History, Round, read_conversation
from gmask.errors import GmaskError, is_shortage
from gmask.files import read_json, write_json
from gmask.generation.answers import Answer, AnswerStream, answer_text
from gmask.generation.encoding import Prompt, PromptFormat, find_format, fit_prompt
from gmask.generation.engine import Request, Stepper
from gmask.generation.sampling import Sampler
from gmask.generation.settings import make_sampling
from gmask.models.chatglm_chat import most_tokens

DEFAULTS = {"temperature": 0.95, "top_p": 0.7, "top_k": 50}
"""The defaults of the published ``chat``. Its top-k of 50 was transformers' default."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply of a model."""

    text: str
    finish: Literal["end", "stop", "length", "cancelled"]
    prompt_tokens: int
    reply_tokens: int
    rounds_left_out: int = 0  # the oldest ones, for which the context had no room
    logprob: float = 0.0  # of its tokens and its end token, in nats


class Chatter:
    """A model, its tokenizer and the settings by which it replies."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int | None = None,
        **settings: Any,
    ) -> None:
        """Arguments as for `Chat`."""
        trained = model.config.max_position_embeddings
        self.model, self.tokenizer = model, tokenizer
        self.context_length = trained if context_length is None else context_length
        if not isinstance(self.context_length, int) or self.context_length < 2:
            raise GmaskError(f"context_length is {context_length!r}: it must be a whole number from 2")
        if self.context_length > (most := most_tokens(trained)):
            raise GmaskError(f"context_length is {self.context_length}: it must be at most {most}")
        self.sampling = make_sampling({**DEFAULTS, "max_tokens": self.context_length // 2, **settings})
        if self.sampling.beams > 1 or self.sampling.n > 1:
            raise GmaskError("a conversation has one reply: leave n and num_beams at 1")
        if self.sampling.max_tokens >= self.context_length:
            raise GmaskError(
                f"max_tokens {self.sampling.max_tokens} leaves no room for a prompt in {self.context_length} tokens"
            )
        if self.context_length > trained:
            warnings.warn(
                f"a context of {self.context_length} tokens, but the model was trained on at most {trained}: replies "
                "get worse beyond them",
                stacklevel=3,
            )
        self.format: PromptFormat = find_format(model, tokenizer)
        special, forbidden = self.format.special, self.format.forbidden_ids
        self.sampler = Sampler.for_model(special, forbidden, tokenizer, model.config.vocab_size)

    def fit(self, history: History, query: str | None = None) -> Prompt:
        """Returns the prompt of a history and a query, with as many rounds as leave room for the reply.

        Without a ``query`` the last message of the history is the query.

        Raises:
            GmaskError: not a conversation, or one without a query; a query that has no room.
        """
        found = read_conversation(history, query)
        return fit_prompt(
            found.require_query(),
            found.rounds,
            self.format,
            longest=self.context_length,
            max_tokens=self.sampling.max_tokens,
        )

    def reply(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Reply]:
        """Returns the replies to prompts in one batch; each draws by its own seed, as it would alone."""
        stepper = Stepper(self.model, self.tokenizer, self.sampler, self.format.special)
        try:
            found = stepper.run([prompt.context for prompt in prompts], self.sampling, seeds=seeds)
        except (MemoryError, RuntimeError) as error:
            # The traceback is dropped: its frames hold the tensors that filled the memory.
            raise self._explain(error, prompts) from error.with_traceback(None)
        return [self._read(prompt, best.done[0]) for prompt, (best,) in zip(prompts, found, strict=True)]

    def stream(self, prompt: Prompt, seed: int) -> Generator[str, None, Reply]:
        """Yields the reply in fragments, which joined are its text; the generator returns the `Reply`."""
        stepper = Stepper(self.model, self.tokenizer, self.sampler, self.format.special)
        stream = AnswerStream(self.tokenizer, self.format.stable_text, stops=self.sampling.stop)
        answer = Answer()
        try:
            for progress in stepper.stream(Request(context=prompt.context, sampling=self.sampling), seed=seed):
                answer = progress.done[0] if progress.done else progress.open
                if new := stream.take(answer):
                    yield new
        except (MemoryError, RuntimeError) as error:
            raise self._explain(error, [prompt]) from error.with_traceback(None)
        return self._read(prompt, answer)

    def _explain(self, error: Exception, prompts: Sequence[Prompt]) -> GmaskError:
        """Returns the error for too little memory, with advice; raises any other error as it is."""
        if not is_shortage(error):
            raise error
        longest = max(prompt.length for prompt in prompts)
        together = f"{len(prompts)} conversations at once, with " if len(prompts) > 1 else ""
        asked = f"{together}a context of {longest + self.sampling.max_tokens} tokens (a prompt of {longest})"
        return GmaskError(
            f"not enough memory for {asked}: a shorter one (--context-length, context_length=) or --quantize int4 "
            "(quantize='int4') needs less"
        )

    def _read(self, prompt: Prompt, answer: Answer) -> Reply:
        assert answer.finish is not None, "a reply is read once it is complete"
        text = answer_text(answer, self.tokenizer, self.sampling.stop)
        left_out = prompt.rounds_left_out
        return Reply(self.format.clean(text), answer.finish, prompt.length, len(answer.ids), left_out, answer.logprob)


class Chat:
    """A conversation.

    Args:
        model, tokenizer: as `gmask.load` returns them. A ChatGLM-6B is prompted as published, another GLM as
            ``问：...答：[gMASK]``.
        context_length: tokens of prompt and reply together; by default what the model was trained on. If it has no room
            for all rounds, the oldest ones are left out.
        settings: as of `gmask.infill`; by default ``temperature=0.95``, ``top_p=0.7``, ``top_k=50``, as published, and
            ``max_tokens`` half of the context. ``seed``: round i draws by ``seed + i``.

    Raises:
        GmaskError: a wrong setting.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int | None = None,
        **settings: Any,
    ) -> None:
        self.chatter = Chatter(model, tokenizer, context_length=context_length, **settings)
        (self.first_seed,) = self.chatter.sampling.seeds(1)
        self.rounds: list[Round] = []
        self.last_reply: Reply | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as a list of messages."""
        return [
            {"role": role, "content": content}
            for asked, answered in self.rounds
            for role, content in (("user", asked), ("assistant", answered))
        ]

    def ask(self, text: str) -> Reply:
        """Returns the reply to a message; both become part of the conversation.

        Raises:
            GmaskError: the message alone does not fit into the context, or the context into memory.
        """
        prompt = self.chatter.fit(self.rounds, text)
        (reply,) = self.chatter.reply([prompt], [self._seed()])
        self._keep(text, reply)
        return reply

    def stream(self, text: str) -> Generator[str, None, Reply]:
        """Yields the reply in fragments; the generator returns the `Reply`.

        If it is closed early, the model stops, and the text so far stays in the conversation. If the model fails, the
        conversation stays as it was.

        Raises:
            GmaskError: as of `ask`.
        """
        prompt = self.chatter.fit(self.rounds, text)
        said = ""
        with closing(self.chatter.stream(prompt, self._seed())) as fragments:
            try:
                while True:
                    fragment = next(fragments)
                    said += fragment
                    yield fragment
            except StopIteration as done:
                reply: Reply = done.value
            except (GeneratorExit, KeyboardInterrupt):
                self._keep(text, Reply(said, "cancelled", prompt.length, 0, prompt.rounds_left_out))
                raise
        self._keep(text, reply)
        return reply

    def undo(self) -> bool:
        """Removes the last round; returns False if there is none."""
        if not self.rounds:
            return False
        self.rounds.pop()
        return True

    def clear(self) -> None:
        """Removes all rounds."""
        self.rounds.clear()

    def save(self, path: str | Path) -> None:
        """Writes the messages to a JSON file. Raises `GmaskError` if it cannot be written."""
        write_json(path, {"messages": self.messages}, indent=2)

    def load(self, path: str | Path) -> None:
        """Replaces the conversation by the messages of a JSON file.

        Raises:
            GmaskError: not such a file, or the last message is not the assistant's.
        """
        values = read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("messages"), list):
            raise GmaskError(f'{path}: not a saved conversation (it is no object with a list of "messages")')
        try:
            found = read_conversation(values["messages"])
        except GmaskError as error:
            raise GmaskError(f"{path}: not a saved conversation ({error})") from error
        if found.query is not None:
            raise GmaskError(f"{path}: not a saved conversation (the last message is the user's, and has no reply)")
        self.rounds = list(found.rounds)

    def _seed(self) -> int:
        return self.first_seed + len(self.rounds)

    def _keep(self, text: str, reply: Reply) -> None:
        self.rounds.append((text, reply.text))
        self.last_reply = reply


def reply_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[History],
    *,
    context_length: int | None = None,
    batch_size: int = 8,
    **settings: Any,
) -> list[Reply]:
    """Returns a reply to each of several conversations, as `Chat` would give it. Their last message is the user's.

    Args:
        conversations: messages with ``role`` and ``content``, as `gmask.conversation.read_conversation` reads them.
        batch_size: conversations that are answered together.
        settings: as of `Chat`; conversation i draws by ``seed + i``.

    Raises:
        GmaskError: not a conversation, or one whose last message is not the user's; a message that does not fit.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise GmaskError("reply_all takes a list of conversations, each of which is a list of messages")
    if batch_size < 1:
        raise GmaskError(f"batch_size must be at least 1, not {batch_size}")
    chatter = Chatter(model, tokenizer, context_length=context_length, **settings)
    prompts = [chatter.fit(messages) for messages in conversations]
    seeds = chatter.sampling.seeds(len(prompts))
    replies: list[Reply] = []
    for start in range(0, len(prompts), batch_size):
        replies += chatter.reply(prompts[start : start + batch_size], seeds[start : start + batch_size])
    return replies
