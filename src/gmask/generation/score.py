"""Which of the given answers to the blank of a text is the most probable, and by how much?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args, overload

from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.answers import Token, token_texts
from gmask.generation.context import BlankedText, TextReader
from gmask.generation.decoding import Answer
from gmask.generation.likelihood import encode_answer, score_answers, score_shared
from gmask.models.glm import GLMForConditionalGeneration

Normalization = Literal["sum", "mean", "unconditional"]
"""What is made of an answer's log-probability; see `score`."""


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One of the answers. Log-probabilities are in nats, over the model's whole vocabulary."""

    text: str  # as given
    logprob: float  # sum over the tokens, without the end
    score: float  # the same, normalised
    probability: float  # among the answers: the softmax of their scores
    tokens: tuple[Token, ...]
    end_logprob: float  # of the answer's end behind its last token; no part of logprob


@dataclass(frozen=True, slots=True)
class Scoring:
    """The answers to one text, in the order in which they were given."""

    text: str
    answers: tuple[ScoredAnswer, ...]

    @property
    def best(self) -> ScoredAnswer:
        """The answer of the highest score; the first of equal ones."""
        return max(self.answers, key=lambda answer: answer.score)

    def to_dict(self) -> dict[str, Any]:
        """The form of ``gmask score --json``: ``{"text", "best", "answers": [{"text", "logprob", "score", ...}]}``."""
        answers = [
            {
                "text": answer.text,
                "logprob": answer.logprob,
                "score": answer.score,
                "probability": answer.probability,
                "tokens": [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in answer.tokens],
                "end_logprob": answer.end_logprob,
            }
            for answer in self.answers
        ]
        return {"text": self.text, "best": self.best.text, "answers": answers}


@overload
def score(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    answers: Sequence[str],
    *,
    normalization: Normalization = ...,
    batch_size: int = ...,
) -> Scoring: ...
@overload
def score(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[str],
    answers: Sequence[str] | Sequence[Sequence[str]],
    *,
    normalization: Normalization = ...,
    batch_size: int = ...,
) -> list[Scoring]: ...
def score(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    answers: Sequence[str] | Sequence[Sequence[str]],
    *,
    normalization: Normalization = "sum",
    batch_size: int = 16,
) -> Scoring | list[Scoring]:
    """Scores given answers to the blank of a text: exact log-probabilities, not samples.

    A text is read as by `infill`, and an answer is fitted to its place: after a space in the text it is read with that
    space. Each answer is scored by itself; the text is read once for all of them.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        text: one text with one blank, or several such texts; the results of several are those of single runs.
        answers: the answers to a text; for several texts, a list for each or one list for all.
        normalization: ``"sum"`` is the log-probability of the answer's tokens, without its end, as the published
            multiple choice has it; it favours short answers. ``"mean"`` divides it by the number of tokens.
            ``"unconditional"`` takes from it the log-probability of the same tokens where nothing is known, in the
            text that is nothing but the same blank (``[CLS] [MASK] <|endoftext|>``); what is left says how much the
            text speaks for the answer, however common that is.
        batch_size: texts that are read together, and answers that are scored together.

    Returns:
        A `Scoring` for a text, a list of them for several.

    Raises:
        GmaskError: no blank or several; an unknown special token; more tokens than the model has positions; no answers,
            or an empty one; an unknown normalization.

    Source: sum: GLMForMultipleChoice of the published modeling_glm.py. unconditional: Brown et al., "Language Models
    are Few-Shot Learners", 2020, section 2.4; Holtzman et al., "Surface Form Competition", EMNLP 2021, whose PMI_DC
    has words in the place of our blank alone.
    """
    scorer = Scorer(model, tokenizer, normalization, batch_size)
    if isinstance(text, str):
        return scorer.score([scorer.read(text, cast(Sequence[str], answers))])[0]
    lists = _read_lists(answers, len(text))
    return scorer.score([scorer.read(one, candidates) for one, candidates in zip(text, lists, strict=True)])


def _read_lists(answers: Sequence[str] | Sequence[Sequence[str]], texts: int) -> list[Sequence[str]]:
    """A list of answers for each text."""
    if not isinstance(answers, str) and all(map(_is_text, answers)):
        return [cast(Sequence[str], answers)] * texts
    if len(answers) != texts:
        raise GmaskError(f"lists of answers for {len(answers)} texts, but there are {texts}: give one for each")
    return list(answers)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True, slots=True)
class Question:
    """A text with one blank, and its answers."""

    text: str
    blanked: BlankedText
    answers: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]  # of the answers

    @property
    def blank_id(self) -> int:
        context = self.blanked.context
        return context.ids[context.places[0]]


@dataclass(frozen=True)
class Scorer:
    """A model, its tokenizer and the way in which answers are scored; arguments and errors as in `score`."""

    model: GLMForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    normalization: Normalization = "sum"
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.normalization not in get_args(Normalization):
            known = ", ".join(get_args(Normalization))
            raise GmaskError(f"normalization must be one of {known}, not {self.normalization!r}")
        if self.batch_size < 1:
            raise GmaskError(f"batch_size must be at least 1, not {self.batch_size}")

    @cached_property
    def reader(self) -> TextReader:
        return TextReader(self.tokenizer, self.model.config.prompt_ids)

    def read(self, text: str, answers: Sequence[str]) -> Question:
        """Cuts and encodes a text and its answers, and checks that they fit the model."""
        blanked = self.reader.read(text)
        if len(blanked.context.places) > 1:
            raise GmaskError(
                f"the text has {len(blanked.context.places)} blanks, and answers are scored for one: "
                "gmask.infill(choices=...) scores several jointly"
            )
        blanked.context.check_length(self.model.config.max_position_embeddings)
        if isinstance(answers, str) or not isinstance(answers, Sequence) or not all(map(_is_text, answers)):
            raise GmaskError(f"the answers must be a list of texts, such as ['sunny', 'rainy'], not {answers!r}")
        if not answers:
            raise GmaskError("there are no answers to score: give at least one")
        if not all(answers):
            raise GmaskError("an answer is empty: only texts with at least one token can be scored")
        ids = [encode_answer(answer, blanked, 0, self.reader, self.model) for answer in answers]
        return Question(text, blanked, tuple(answers), tuple(ids))

    def score(self, questions: Sequence[Question]) -> list[Scoring]:
        """Scores questions that were read by this scorer."""
        asked = [(question.blanked.context, question.ids) for question in questions]
        found = score_answers(self.model, asked, self.reader.special, batch_size=self.batch_size)
        if self.normalization == "unconditional":
            baselines = self._score_without_text(questions)
        else:
            baselines = [[0.0] * len(question.ids) for question in questions]
        return list(map(self._assemble, questions, found, baselines))

    def _score_without_text(self, questions: Sequence[Question]) -> list[list[float]]:
        """The log-probability of each answer to each question where the text is nothing but the question's blank."""
        bare = [(self.reader.read_blank(question.blank_id), question.ids) for question in questions]
        return score_shared(self.model, bare, self.reader.special, batch_size=self.batch_size)

    def _assemble(self, question: Question, answers: Sequence[Answer], baselines: Sequence[float]) -> Scoring:
        logprobs = [sum(answer.logprobs) for answer in answers]
        if self.normalization == "mean":
            scores = [logprob / len(ids) for logprob, ids in zip(logprobs, question.ids, strict=True)]
        else:
            scores = [logprob - baseline for logprob, baseline in zip(logprobs, baselines, strict=True)]
        weights = [math.exp(value - max(scores)) for value in scores]
        scored = []
        for text, answer, logprob, value, weight in zip(
            question.answers, answers, logprobs, scores, weights, strict=True
        ):
            tokens = tuple(map(Token, answer.ids, token_texts(answer.ids, self.tokenizer), answer.logprobs))
            assert answer.end_logprob is not None, "a scored answer has an end"
            scored.append(ScoredAnswer(text, logprob, value, weight / sum(weights), tokens, answer.end_logprob))
        return Scoring(question.text, tuple(scored))
