"""Encoding: how texts with blanks and conversations become the context of a model, and answers part of the text."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Protocol

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gmask.conversation import Rounds
from gmask.errors import GmaskError, type_name
from gmask.files import LONGEST_TOKEN, check_characters, check_text, cut_characters, require_text
from gmask.infilling.blanks import BlankTokens
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.chatglm_chat import FULL_WIDTH, TRAINING_TIME, build_prompt, clean_reply
from gmask.recipes.pretraining import find_blank_tokens

BLANKS = ("[MASK]", "[sMASK]", "[gMASK]")
PROMPT = "[PROMPT]"
"""Stands for one of a model's trained vectors (P-tuning). For a model without them it is plain text."""


@dataclass(frozen=True, slots=True)
class Context:
    """The tokens that the model reads in both directions."""

    ids: tuple[int, ...]
    blanks: tuple[int, ...]  # their indices among the ids, ascending

    def check_length(self, positions: int) -> None:
        """Raises `GmaskError` for a context longer than the positions of the model."""
        if len(self.ids) > positions:
            raise GmaskError(
                f"the text has {len(self.ids)} tokens, but the model has only {positions} positions: shorten it"
            )


@dataclass(frozen=True, slots=True)
class SplicedText:
    """A text with its blanks filled."""

    text: str
    answers: tuple[str, ...]  # as they stand in the text
    spans: tuple[tuple[int, int], ...]  # [start, end) of each answer in the text


@dataclass(frozen=True, slots=True)
class BlankedText:
    """A text cut at its blanks."""

    pieces: tuple[str, ...]  # the text before, between and behind the blanks, without escapes
    context: Context

    def space_before(self, blank: int) -> str:
        """The white space before a blank. It is not in the context: the answer begins with white space of its own."""
        piece = self.pieces[blank]
        return piece[len(piece.rstrip()) :]

    def fit_answer(self, answer: str, blank: int) -> str:
        """Returns an answer as it stands in the text.

        The user's text is never altered. If it has white space before the blank, or begins with the blank, the leading
        space of the answer is dropped. If white space follows the blank, its trailing space is dropped.
        """
        space = self.space_before(blank)
        if "\n" in space:
            answer = answer.lstrip()
        elif space or (blank == 0 and not self.pieces[0]):
            answer = answer.lstrip(" ")
        return answer.rstrip(" ") if self.pieces[blank + 1][:1].isspace() else answer

    def splice(self, answers: Sequence[str]) -> SplicedText:
        """Returns the text with an answer in place of each blank."""
        fitted = tuple(self.fit_answer(answer, blank) for blank, answer in enumerate(answers))
        text, spans = self.pieces[0], []
        for answer, piece in zip(fitted, self.pieces[1:], strict=True):
            spans.append((len(text), len(text) + len(answer)))
            text += answer + piece
        return SplicedText(text, fitted, tuple(spans))


def list_texts(texts: Any) -> list[str]:
    """Returns several texts, of a list, an array or an iterator, as a list; each is checked where it is read.

    Raises:
        GmaskError: one text, or what holds none.
    """
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise GmaskError(f"the texts are {type_name(texts)}: give a list of texts")
    return list(texts)


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text. Special tokens in it are read as plain text.

    Raises:
        GmaskError: it holds half of a character.
    """
    encoded = tokenizer(check_text(text), add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    return ids


class TextReader:
    """Reads texts with blanks by the vocabulary of one tokenizer.

    ``\\[MASK]`` is the text "[MASK]", not a blank; every special token can be escaped so. Two backslashes before a
    blank are one backslash and the blank.

    Args:
        prompt_ids: `GLMConfig.prompt_ids` of a model with trained vectors (P-tuning). The text has a ``[PROMPT]`` for
            each of them, or none at all; then they come before the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.prompt_ids = prompt_ids
        self.special = find_blank_tokens(tokenizer)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special_ids: dict[str, int] = {
            token: tokenizer.convert_tokens_to_ids(token) for token in [*added, *tokenizer.all_special_tokens]
        }
        known = {token: self.special_ids[token] for token in BLANKS if token in self.special_ids}
        self.blank_ids = {BLANKS[0]: self.special.mask, **known}
        self.blank_ids[str(tokenizer.mask_token)] = self.special.mask  # RoBERTa's is <mask>
        known_tokens = {*self.special_ids, *BLANKS, *([PROMPT] if prompt_ids else ())}
        spellings = "|".join(map(re.escape, sorted(known_tokens, key=len, reverse=True)))
        # The look-behind: else each backslash of a long row would begin a search of its own
        self.pattern = re.compile(rf"(?<!\\)(\\*)({spellings}|\[(?i:[a-z]*mask)\])")

    def read(self, text: str, *, positions: int | None = None) -> BlankedText:
        """Cuts a text at its blanks and encodes it as ``[CLS] text <|endoftext|>``.

        As published, white space before a blank is not encoded, since the answer begins with its own, and a text that
        ends with ``[gMASK]`` has no ``<|endoftext|>``.

        Args:
            positions: of the model, if the text has to fit them.

        Raises:
            GmaskError: no blank, or another special token that is not escaped; a text that does not fit.
        """
        blanked = self.read_any(text, positions=positions)
        if not blanked.context.blanks:
            raise GmaskError(
                f"the text has no blank: put {BLANKS[0]}, {BLANKS[1]} or {BLANKS[2]} where words are missing"
            )
        return blanked

    def read_any(
        self, text: str, *, positions: int | None = None, most: int | None = None, cut_start: bool = False
    ) -> BlankedText:
        """As `read`, but the text need not have a blank.

        Args:
            most: tokens of the context that its reader keeps. Far longer pieces of the text are cut at their end, or
                with ``cut_start``, before the first blank, at their start, before they are tokenized.
        """
        require_text(text)
        if positions is not None:
            check_characters(text, positions, self.tokenizer)
        pieces: list[str] = [""]
        parts: list[str | int] = [""]  # texts, and the special ids between them
        prompts, end = list(self.prompt_ids), 0
        for match in self.pattern.finditer(text):
            slashes, token = match.groups()
            plain = text[end : match.start()] + "\\" * (len(slashes) // 2) + (token if len(slashes) % 2 else "")
            pieces[-1] += plain
            parts[-1] = f"{parts[-1]}{plain}"
            end = match.end()
            if len(slashes) % 2:
                continue
            if token in self.blank_ids:
                parts += [self.blank_ids[token], ""]
                pieces.append("")
            elif token == PROMPT:
                parts += [prompts.pop(0) if prompts else -1, ""]
                pieces[-1] += token
            else:
                self._refuse(token)
        pieces[-1] += text[end:]
        parts[-1] = f"{parts[-1]}{text[end:]}"
        self._check_prompts(parts)
        context = self._encode(parts, most=most, cut_start=cut_start)
        if positions is not None:
            context.check_length(positions)
        return BlankedText(tuple(pieces), context)

    def _check_prompts(self, parts: Sequence[str | int]) -> None:
        """Raises `GmaskError` unless the text has all trained vectors, or none."""
        wanted, found = len(self.prompt_ids), sum(part == -1 or part in self.prompt_ids for part in parts)
        if found not in (0, wanted):
            raise GmaskError(
                f"the text has {found} {PROMPT}, but the model {wanted} trained vectors: write one for each, or none, "
                "and they stand before the text"
            )

    def _refuse(self, token: str) -> NoReturn:
        known = [blank for blank in BLANKS if blank in self.blank_ids]
        if token in BLANKS:
            raise GmaskError(f"this model was not trained with {token}: write {' or '.join(known)}")
        kind = "holds the special token" if token in self.special_ids else "holds the unknown special token"
        raise GmaskError(
            f"the text {kind} {token}: blanks are {', '.join(known)}; write \\{token} if it is meant as text"
        )

    def find_blank(self, blank: str) -> int:
        """Returns the id of a blank. Raises `GmaskError` for one that the model was not trained with."""
        if blank not in self.blank_ids:
            known = [one for one in BLANKS if one in self.blank_ids]
            raise GmaskError(f"this model has no {blank}: take {' or '.join(known)}")
        return self.blank_ids[blank]

    def read_blank(self, blank: int, before: str = "", *, most: int | None = None, cut_start: bool = False) -> Context:
        """Returns a context that ends with a blank of this id, behind a text in which special tokens are plain text.

        ``most`` and ``cut_start`` are as of `read_any`.
        """
        return self._encode((before, blank, ""), most=most, cut_start=cut_start)

    def encode_plain(self, text: str) -> list[int]:
        """Returns the ids of a text. Special tokens in it are read as plain text."""
        return encode_plain(self.tokenizer, text)

    def encode_answer(self, answer: str, text: BlankedText, blank: int) -> tuple[int, ...]:
        """Returns the ids of an answer, with the white space that stands before the blank in the text."""
        space = text.space_before(blank)[-1:]
        return tuple(self.encode_plain(answer if answer[:1].isspace() else space + answer))

    def _encode(self, parts: Sequence[str | int], *, most: int | None = None, cut_start: bool = False) -> Context:
        """Encodes texts and the ids between them; white space before an id is left out."""
        blanks = set(self.blank_ids.values())
        if not any(part in self.prompt_ids for part in parts):
            parts = [*self.prompt_ids, *parts]
        ids, positions = [self.special.cls], list[int]()
        for index, part in enumerate(parts):
            if isinstance(part, str):
                plain = part if index == len(parts) - 1 else part.rstrip()
                if most is not None:
                    plain = cut_characters(plain, most, self.tokenizer, keep_end=cut_start and not positions)
                ids += self.encode_plain(plain)
                continue
            if part in blanks:
                positions.append(len(ids))
            ids.append(part)
        if ids[-1] != self.blank_ids.get("[gMASK]"):
            ids.append(self.special.eos)
        return Context(tuple(ids), tuple(positions))


class PromptFormat(Protocol):
    """The form of a conversation's prompt for one kind of model."""

    tokenizer: PreTrainedTokenizerBase
    special: BlankTokens
    forbidden_ids: tuple[int, ...]  # never part of a reply

    def encode(self, query: str, rounds: Rounds) -> Context:
        """Returns the context of a query and earlier rounds; its one blank is the reply."""

    def clean(self, text: str) -> str:
        """Returns a reply as it is shown."""

    def stable_text(self, text: str, is_whole: bool) -> str:
        """Returns the start of the cleaned reply that no further token can change; all of it if the reply is whole."""


class ChatGLMFormat:
    """The published prompt of ChatGLM-6B: the first query as it is; later, all rounds, numbered."""

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
            cls=tokenizer.pad_token_id,  # not used: a ChatGLM's prompt has no [CLS]
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

    def stable_text(self, text: str, is_whole: bool) -> str:
        """Holds back punctuation at the end: the next character decides whether it becomes full-width."""
        if is_whole:
            return self.clean(text)
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

    def stable_text(self, text: str, is_whole: bool) -> str:
        return text.strip()


def find_format(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Returns the prompt format of a model."""
    return format_of(model.config, tokenizer)


def format_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Returns the prompt format of models with such a config."""
    return ChatGLMFormat(tokenizer) if isinstance(config, ChatGLMConfig) else QuestionAnswerFormat(tokenizer)


@dataclass(frozen=True)
class Prompt:
    """The context of a conversation, and the number of oldest rounds that it leaves out."""

    context: Context
    rounds_left_out: int

    @cached_property
    def length(self) -> int:
        """The number of tokens, including ``<sop>``."""
        return len(self.context.ids) + 1


def fit_prompt(
    query: str, rounds: Rounds, prompt_format: PromptFormat, *, longest: int, max_tokens: int | None
) -> Prompt:
    """Returns the prompt with as many of the latest rounds as leave room for a reply.

    Args:
        longest: tokens of prompt and reply together.
        max_tokens: of the reply. None: a prompt with rounds has at most half of ``longest``, a query alone may take all
            but one token.

    Raises:
        GmaskError: the query alone does not fit, or no prompt would.
    """
    room, most = (longest // 2, longest - 1) if max_tokens is None else (longest - max_tokens,) * 2
    if most < 0:
        raise GmaskError(f"max_tokens {max_tokens} leaves no room for a prompt in {longest} tokens")
    check_characters(query, most, prompt_format.tokenizer, name="the message")

    def read(left_out: int) -> Prompt:
        return Prompt(prompt_format.encode(query, rounds[left_out:]), left_out)

    prompt = read(first := _first_candidate(query, rounds, room))
    if prompt.length > room:  # halved, and not one by one: to encode a long history for every round takes minutes
        candidates = range(first + 1, len(rounds) + 1)
        fitting = bisect_left(candidates, True, key=lambda left_out: read(left_out).length <= room)
        prompt = read(min(first + 1 + fitting, len(rounds)))
    if prompt.length > most:
        raise GmaskError(
            f"the message has {prompt.length} tokens, but there is room for {most}: shorten it, lower max_tokens, "
            "or raise the context length"
        )
    return prompt


def _first_candidate(query: str, rounds: Rounds, room: int) -> int:
    """Returns the index of the oldest round that could fit if all tokens were the longest.

    The form of a round counts as one token.
    """
    characters = room * LONGEST_TOKEN - len(query)
    for kept, (asked, answered) in enumerate(reversed(rounds)):
        characters -= len(asked) + len(answered) + LONGEST_TOKEN
        if characters < 0:
            return len(rounds) - kept
    return 0
