"""What does a model read of a sample, and with which tokens would it answer?

Training and prediction both ask here, so that a model is asked what it was taught. A GLM reads a text with blanks; a
ChatGLM reads a prompt and answers behind it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import get_args

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.context import BLANKS, BlankedText, Context, TextReader, encode_plain
from gmask.generation.conversation import fit_prompt, format_of
from gmask.models.chatglm import ChatGLMConfig
from gmask.tasks.samples import CHOICES, Sample, TaskKind, Truncation

LAST_BLANK = re.compile(rf"(\\*)({'|'.join(map(re.escape, BLANKS))})")


@dataclass(frozen=True, slots=True)
class ReadSample:
    """A sample as a model takes it."""

    context: Context
    answers: tuple[tuple[int, ...], ...]  # the ids of those that are known
    blanked: BlankedText | None = None  # of a text with blanks, for the way back
    tokens_cut: int = 0  # of the text
    rounds_left_out: int = 0  # the oldest ones


class SampleReader:
    """Reads samples of one kind for models of one config.

    Args:
        max_source: tokens of a context, blanks and control tokens counted. Where a text has more, tokens of the text
            are cut; of a conversation the oldest rounds are left out first. No blank and no control token is.
        truncation: where the text is cut.

    Raises:
        GmaskError: a kind that the model cannot do, or more tokens than it has positions.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        kind: TaskKind,
        *,
        max_source: int,
        truncation: Truncation = "left",
    ) -> None:
        if truncation not in get_args(Truncation):
            raise GmaskError(f"truncation must be left or right, not {truncation!r}")
        if max_source > config.max_position_embeddings:
            raise GmaskError(
                f"max_source is {max_source}, but the model has only {config.max_position_embeddings} positions"
            )
        is_chatglm = isinstance(config, ChatGLMConfig)
        if kind == "classification":
            if is_chatglm:
                raise GmaskError("a ChatGLM has no head to classify with: make the task a cloze")
            if config.pool_token == "start":
                raise GmaskError("pool_token start reads <sop>, which a text without a blank lacks: take cls or pad")
        self.tokenizer, self.config, self.kind = tokenizer, config, kind
        self.max_source, self.truncation = max_source, truncation
        self.format = format_of(config, tokenizer)
        self.special = self.format.special
        self.blanks = None if is_chatglm else TextReader(tokenizer, config.prompt_ids)
        special = self.special
        self.control_ids = {special.cls, special.eos, special.mask, special.smask, special.gmask}
        if self.blanks is not None:
            self.control_ids |= {*self.blanks.prompt_ids}

    def read(self, sample: Sample) -> ReadSample:
        """The context of a sample, cut to `max_source`, and the ids of its answers.

        Raises:
            GmaskError: a text without a blank where there must be one, or answers that do not fit the blanks; told with
                the file and line of the sample.
        """
        try:
            return self._read_chat(sample) if self.kind == "chat" else self._read_text(sample)
        except GmaskError as error:
            raise locate(error, sample) from error

    def read_bare(self, question: ReadSample) -> Context:
        """The context of a question whose text tells nothing: its blank alone."""
        if self.blanks is None:
            return self.format.encode("", ())
        return self.blanks.read_blank(question.context.ids[question.context.places[0]])

    def _read_chat(self, sample: Sample) -> ReadSample:
        answers = tuple(tuple(encode_plain(self.tokenizer, answer)) for answer in sample.answers)
        bare = self.format.encode(sample.text, ())
        if len(bare.ids) > self.max_source:
            context = self._cut(bare, self._frame(bare))
            return ReadSample(context, answers, None, len(bare.ids) - len(context.ids), len(sample.history))
        prompt = fit_prompt(sample.text, sample.history, self.format, room=self.max_source + 1)  # with <sop>
        return ReadSample(prompt.context, answers, rounds_left_out=prompt.rounds_left_out)

    def _frame(self, context: Context) -> set[int]:
        """Where the words of the prompt's form stand, which are there without a question, too."""
        empty, ids = self.format.encode("", ()).ids, context.ids
        head, tail = 0, 0
        while head < len(empty) and empty[head] == ids[head]:
            head += 1
        while tail < len(empty) - head and empty[-1 - tail] == ids[-1 - tail]:
            tail += 1
        return {*range(head), *range(len(ids) - tail, len(ids))}

    def _read_text(self, sample: Sample) -> ReadSample:
        blanked = None
        if self.blanks is None:
            text = sample.text if self.kind == "language-model" else before_last_blank(sample.text)
            whole = self.format.encode(text, ())
        elif self.kind == "language-model":
            whole = self.blanks.read_blank(self.special.gmask, before=sample.text)
        else:
            blanked = self.blanks.read_any(sample.text)
            self._check_blanks(len(blanked.context.places), sample)
            whole = blanked.context
        context = self._cut(whole, ())
        answers = tuple(self._encode_answer(sample, index, blanked) for index in range(len(sample.answers)))
        return ReadSample(context, answers, blanked, len(whole.ids) - len(context.ids))

    def _check_blanks(self, blanks: int, sample: Sample) -> None:
        if self.kind == "classification":
            if blanks:
                raise GmaskError(
                    f"the text of a classification has no blank, but this one has {blanks}: make it a cloze"
                )
        elif not blanks:
            raise GmaskError(f"the text has no blank: put {', '.join(BLANKS[:-1])} or {BLANKS[-1]} into the template")
        elif self.kind != "infill" and blanks > 1:
            raise GmaskError(f"the text has {blanks} blanks, {self.kind} takes one: make the task an infill")
        elif self.kind == "infill" and sample.answers and len(sample.answers) != blanks:
            raise GmaskError(f"the text has {blanks} blanks, but there are {len(sample.answers)} answers")

    def _encode_answer(self, sample: Sample, index: int, blanked: BlankedText | None) -> tuple[int, ...]:
        answer = sample.answers[index]
        if blanked is None or self.blanks is None:
            ids = tuple(encode_plain(self.tokenizer, answer))
        else:
            ids = self.blanks.encode_answer(answer, blanked, index if self.kind == "infill" else 0)
        if self.kind in CHOICES:
            if not ids:
                raise GmaskError("an answer is empty: only texts with at least one token can be scored")
            if len(ids) >= self.config.max_position_embeddings:
                raise GmaskError(f"the answer {answer[:20]!r} has {len(ids)} tokens, more than the model has positions")
        return ids

    def _cut(self, context: Context, kept: Collection[int]) -> Context:
        """The context in `max_source` tokens; what stands at the indices ``kept`` stays, as control tokens do."""
        surplus = len(context.ids) - self.max_source
        if surplus <= 0:
            return context
        loose = [i for i, token in enumerate(context.ids) if token not in self.control_ids and i not in kept]
        if surplus > len(loose):
            raise GmaskError(
                f"max_source is {self.max_source}, but what may not be cut has {len(context.ids) - len(loose)} tokens"
            )
        first = context.places[0] if context.places else len(context.ids)
        before = sum(index < first for index in loose)
        order = loose[:before] + loose[before:][::-1] if self.truncation == "left" else loose[::-1]
        gone = set(order[:surplus])
        stays = [index for index in range(len(context.ids)) if index not in gone]
        places = tuple(new for new, index in enumerate(stays) if index in context.places)
        return Context(tuple(context.ids[index] for index in stays), places)


def before_last_blank(text: str) -> str:
    r"""The prompt of a text whose one blank ends it; ``\[MASK]`` is the text "[MASK]".

    Raises:
        GmaskError: no blank, several, or one that does not end the text.
    """
    pieces, end = [""], 0
    for match in LAST_BLANK.finditer(text):
        slashes, token = match.groups()
        pieces[-1] += text[end : match.start()] + "\\" * (len(slashes) // 2)
        end = match.end()
        if len(slashes) % 2:
            pieces[-1] += token
        else:
            pieces.append("")
    if len(pieces) != 2 or (pieces[1] + text[end:]).strip():
        raise GmaskError("a ChatGLM answers behind its prompt: the text must end with its one blank, [gMASK]")
    return pieces[0].rstrip()


def locate(error: GmaskError, sample: Sample) -> GmaskError:
    """The error with the file and line of a sample in front, if it has them."""
    return GmaskError(f"{sample.path}:{sample.line}: {error}") if sample.path else error
