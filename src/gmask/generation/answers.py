"""What does a filled text hold, and how do its tokens become text?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gmask.generation.context import BlankedText
from gmask.generation.decoding import Answer, Finish


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer. A character spelt in bytes is the text of its last byte."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Blank:
    """The answer to one blank.

    Log-probabilities are in nats and the model's own: over its whole vocabulary, before temperature, top-k, top-p,
    ``min_tokens`` and the ban on special tokens, none of which renormalises them.
    """

    text: str  # as it stands in the filled text
    logprob: float  # sum over the tokens and the end token
    tokens: tuple[Token, ...]  # without the end token
    end_logprob: float | None  # of the end token; None if something else ended the answer
    finish: Finish  # "end", "stop" (a stop text) or "length" (cut at max_tokens)
    start: int  # the answer is text[start:end] of the filled text
    end: int

    @property
    def finished(self) -> bool:
        """False for an answer that was cut at ``max_tokens``."""
        return self.finish != "length"


@dataclass(frozen=True, slots=True)
class Combination:
    """One choice for every blank."""

    texts: tuple[str, ...]  # as given
    logprob: float  # of all answers jointly, in nats
    probability: float  # among the combinations scored


@dataclass(frozen=True, slots=True)
class Choices:
    """How the choices were scored."""

    exact: bool  # every combination was scored; else the best ones of a beam search
    combinations: tuple[Combination, ...]  # best first


@dataclass(frozen=True, slots=True)
class Infilling:
    """A text with its blanks filled."""

    text: str
    blanks: tuple[Blank, ...]
    logprob: float  # sum over the blanks
    alternatives: tuple["Infilling", ...] = ()  # the next best, if n > 1, best first
    choices: Choices | None = None

    def to_dict(self) -> dict[str, Any]:
        """The form of ``gmask infill --json``.

        ``{"text", "logprob", "blanks": [{"text", "logprob", "tokens": [{"id", "text", "logprob"}]}]}``. A blank that
        was cut has ``"finished": false`` as well; ``alternatives`` and ``choices`` are there when they were asked for.
        """
        values: dict[str, Any] = {
            "text": self.text,
            "logprob": self.logprob,
            "blanks": [_blank_to_dict(blank) for blank in self.blanks],
        }
        if self.alternatives:
            values["alternatives"] = [infilling.to_dict() for infilling in self.alternatives]
        if self.choices:
            combinations = [
                {"texts": list(found.texts), "logprob": found.logprob, "probability": found.probability}
                for found in self.choices.combinations
            ]
            values["choices"] = {"exact": self.choices.exact, "combinations": combinations}
        return values


def _blank_to_dict(blank: Blank) -> dict[str, Any]:
    tokens = [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in blank.tokens]
    values: dict[str, Any] = {"text": blank.text, "logprob": blank.logprob, "tokens": tokens}
    return values if blank.finished else {**values, "finished": False}


class TextAssembler:
    """Turns the tokens of one answer into text as they come, and holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.continuation: str = getattr(tokenizer, "continuation", "")  # spelt before a piece inside a word
        self.ids: list[int] = []
        self.anchor = 0  # decoding starts here: far enough back for a tokenizer that looks at its neighbours
        self.told = 0  # ids before this one have been given out

    def push(self, token_id: int) -> str:
        """The text that the token completes; empty inside a character."""
        self.ids.append(token_id)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        if text.strip():  # a token without text, or of white space, tells nothing of its neighbours
            self.anchor = self.told
        self.told = len(self.ids)
        return text

    def finish(self) -> str:
        """What was held back, with the replacement character for bytes that make no character."""
        text = self._new_text()
        self.anchor = self.told = len(self.ids)
        return text

    def _new_text(self) -> str:
        known = self._decode(self.ids[self.anchor : self.told])
        text = self._decode(self.ids[self.anchor :])[len(known) :]
        return text if self.told else text.removeprefix(self.continuation)  # the answer may continue a word of the text

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A text for each token; joined, they are the answer."""
    assembler = TextAssembler(tokenizer)
    texts = [assembler.push(token_id) for token_id in ids]
    if texts:
        texts[-1] += assembler.finish()
    return texts


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts in it."""
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(found)] if found else text


def assemble_infilling(
    blanked: BlankedText, answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase, *, stops: Sequence[str] = ()
) -> Infilling:
    """Puts answers into their text."""
    texts = [token_texts(answer.ids, tokenizer) for answer in answers]
    raw = ["".join(parts) for parts in texts]
    filled = blanked.splice(
        [
            cut_at_stop(text, stops) if answer.finish == "stop" else text
            for text, answer in zip(raw, answers, strict=True)
        ]
    )
    blanks = []
    for answer, parts, text, span in zip(answers, texts, filled.answers, filled.spans, strict=True):
        assert answer.finish is not None, "an answer is spliced once it is complete"
        tokens = tuple(map(Token, answer.ids, parts, answer.logprobs))
        blanks.append(Blank(text, answer.logprob, tokens, answer.end_logprob, answer.finish, *span))
    return Infilling(filled.text, tuple(blanks), sum(blank.logprob for blank in blanks))
