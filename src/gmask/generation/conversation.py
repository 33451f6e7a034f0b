"""How do the rounds of a conversation become a context, and which of them have room in it?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.context import Context, TextReader, encode_plain
from gmask.infilling.blanks import BlankTokens
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.chatglm.prompts import FULL_WIDTH, TRAINING_TIME, build_prompt, clean_reply
from gmask.tasks.vocabulary import find_blank_tokens

Rounds = Sequence[tuple[str, str]]
"""What was asked and what was answered, oldest first."""


class PromptFormat(Protocol):
    """How a kind of model is talked to."""

    special: BlankTokens
    forbidden_ids: tuple[int, ...]

    def encode(self, query: str, rounds: Rounds) -> Context:
        """What the model reads; its blank is the reply."""

    def clean(self, text: str) -> str:
        """A reply as it is shown."""

    def settled(self, text: str) -> str:
        """The start of a cleaned reply that no further token changes."""


class ChatGLMFormat:
    """The published prompt of ChatGLM-6B: bare for the first round, then all rounds, numbered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        ids = {name: tokenizer.convert_tokens_to_ids(f"[{name}]") for name in ("MASK", "sMASK", "gMASK")}
        self.special = BlankTokens(
            mask=ids["MASK"],
            smask=ids["sMASK"],
            gmask=ids["gMASK"],
            sop=tokenizer.bos_token_id,
            eop=tokenizer.convert_tokens_to_ids("<eop>"),  # of the first vocabulary, eos is </s>
            pad=tokenizer.pad_token_id,
            cls=tokenizer.pad_token_id,  # has none, and begins with the text
            eos=tokenizer.eos_token_id,
        )
        self.forbidden_ids: tuple[int, ...] = (
            self.special.pad,
            self.special.mask,
            self.special.smask,
            self.special.gmask,
        )

    def encode(self, query: str, rounds: Rounds) -> Context:
        ids = encode_plain(self.tokenizer, build_prompt(query, rounds))
        return Context((*ids, self.special.gmask), (len(ids),))

    def clean(self, text: str) -> str:
        return clean_reply(text)

    def settled(self, text: str) -> str:
        """Marks at the end wait for the character after them, which decides on their width."""
        for length in range(len(TRAINING_TIME) - 1, 0, -1):
            if text.endswith(TRAINING_TIME[:length]):
                text = text[:-length]
                break
        return clean_reply(text.rstrip().rstrip("".join(FULL_WIDTH)))


class QuestionAnswerFormat:
    """``问：...答：[gMASK]``, for a GLM that was not tuned for another prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special = find_blank_tokens(tokenizer)
        kept = {self.special.eop, self.special.eos}
        self.forbidden_ids = tuple(sorted(set(TextReader(tokenizer).special_ids.values()) - kept))

    def encode(self, query: str, rounds: Rounds) -> Context:
        text = "".join(f"问：{asked}答：{answered}" for asked, answered in rounds) + f"问：{query}答："
        ids = encode_plain(self.tokenizer, text)
        return Context((self.special.cls, *ids, self.special.gmask), (len(ids) + 1,))

    def clean(self, text: str) -> str:
        return text.strip()

    def settled(self, text: str) -> str:
        return text.strip()


def find_format(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The prompt that a model was made for."""
    return format_of(model.config, tokenizer)


def format_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The prompt of models with such a config."""
    return ChatGLMFormat(tokenizer) if isinstance(config, ChatGLMConfig) else QuestionAnswerFormat(tokenizer)


@dataclass(frozen=True)
class Prompt:
    """A context, and how many of the oldest rounds it had to leave out."""

    context: Context
    rounds_left_out: int

    @cached_property
    def length(self) -> int:
        """In tokens, ``<sop>`` counted."""
        return len(self.context.ids) + 1


def fit_prompt(query: str, rounds: Rounds, prompt_format: PromptFormat, *, room: int) -> Prompt:
    """The prompt with as many of the latest rounds as fit into ``room`` tokens.

    Raises:
        GmaskError: the query alone does not fit.
    """
    for left_out in range(len(rounds) + 1):
        prompt = Prompt(prompt_format.encode(query, rounds[left_out:]), left_out)
        if prompt.length <= room:
            return prompt
    raise GmaskError(
        f"the message has {prompt.length} tokens, but there is room for {room}: shorten it, lower max_tokens, "
        "or raise the context length"
    )
