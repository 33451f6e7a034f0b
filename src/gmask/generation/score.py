"""Scores given answers to the blanks of a text: each by itself, or combinations of them jointly.

Shape letters: B contexts, R rows of answers, T positions, V vocabulary.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast, get_args, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.config import show
from gmask.errors import GmaskError
from gmask.files import check_characters
from gmask.generation.answers import Answer, Choices, Combination, Token, rank_scores, token_texts
from gmask.generation.encoding import BlankedText, Context, TextReader, list_texts
from gmask.generation.padding import batches_by_length, log_softmax, stack_contexts
from gmask.generation.settings import ScoreNormalization
from gmask.infilling.blanks import BlankTokens
from gmask.models.cache import GrowingCache
from gmask.models.glm import GLMForConditionalGeneration


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One of the answers. Log-probabilities are in nats, over the model's whole vocabulary."""

    text: str  # as given
    logprob: float  # sum over the tokens, without the end token
    score: float  # the normalised log-probability
    probability: float  # among the answers: the softmax of their scores
    tokens: tuple[Token, ...]
    end_logprob: float  # of an end token behind the last token; not part of logprob


@dataclass(frozen=True, slots=True)
class Scoring:
    """The answers to one text, in the order in which they were given."""

    text: str
    answers: tuple[ScoredAnswer, ...]

    @property
    def best(self) -> ScoredAnswer:
        """The answer of the highest score; the first of equal ones."""
        return self.ranked[0]

    @property
    def ranked(self) -> list[ScoredAnswer]:
        """The answers from the highest score to the lowest; of equal ones the first comes first."""
        return [self.answers[index] for index in rank_scores([answer.score for answer in self.answers])]

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``gmask score --json`` prints.

        ``{"text", "best", "answers": [{"text", "logprob", "score", ...}]}``.
        """
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
    normalization: ScoreNormalization = ...,
    batch_size: int = ...,
) -> Scoring: ...
@overload
def score(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[str],
    answers: Sequence[str] | Sequence[Sequence[str]],
    *,
    normalization: ScoreNormalization = ...,
    batch_size: int = ...,
) -> list[Scoring]: ...
def score(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    answers: Sequence[str] | Sequence[Sequence[str]],
    *,
    normalization: ScoreNormalization = "sum",
    batch_size: int = 16,
) -> Scoring | list[Scoring]:
    """Scores given answers to the blank of a text: exact log-probabilities, not samples.

    A text is read as by `infill`. If it has a space before the blank, answers are read with that space. Each answer is
    scored by itself; the text is read once for all of them.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        text: one text with one blank, or several such texts; the results of several are those of single runs.
        answers: the answers to a text; for several texts, a list for each or one list for all.
        normalization: ``"sum"`` is the log-probability of the answer's tokens, without its end token, as in the
            published multiple choice; it favours short answers. ``"mean"`` divides it by the number of tokens.
            ``"unconditional"`` subtracts the log-probability of the same tokens without the text, in a context that is
            nothing but the blank (``[CLS] [MASK] <|endoftext|>``): the difference says how much the text speaks for the
            answer, however common the answer is.
        batch_size: texts that are read together, and answers that are scored together.

    Returns:
        A `Scoring` for a text, a list of them for several.

    Raises:
        GmaskError: no blank or several; an unknown special token; more tokens than the model has positions; no answers,
            or an empty one; an unknown normalization.

    Source: sum: GLMForMultipleChoice of the published modeling_glm.py. unconditional: Brown et al., "Language Models
    are Few-Shot Learners", 2020, section 2.4; Holtzman et al., "Surface Form Competition", EMNLP 2021, whose PMI_DC
    has words in place of the blank.
    """
    scorer = Scorer(model, tokenizer, normalization, batch_size)
    if isinstance(text, str):
        return scorer.score([scorer.read(text, cast(Sequence[str], answers))])[0]
    texts = list_texts(text)
    lists = _read_lists(answers, len(texts))
    return scorer.score([scorer.read(one, candidates) for one, candidates in zip(texts, lists, strict=True)])


def _read_lists(answers: Sequence[str] | Sequence[Sequence[str]], texts: int) -> list[Sequence[str]]:
    """Returns a list of answers for each text."""
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        raise GmaskError(f"the answers must be a list of texts, or one for each text, not {show(answers)}")
    if all(map(_is_text, answers)):
        return [cast(Sequence[str], answers)] * texts
    if len(answers) != texts:
        raise GmaskError(f"lists of answers for {len(answers)} texts, but there are {texts}: give one for each")
    return list(answers)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A text with one blank, and the answers to score."""

    text: str
    blanked: BlankedText
    answers: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]  # of the answers

    @property
    def blank_id(self) -> int:
        context = self.blanked.context
        return context.ids[context.blanks[0]]


@dataclass(frozen=True)
class Scorer:
    """A model, its tokenizer and the settings of scoring; arguments and errors as in `score`."""

    model: GLMForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    normalization: ScoreNormalization = "sum"
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_normalization(self.normalization)
        if self.batch_size < 1:
            raise GmaskError(f"batch_size must be at least 1, not {self.batch_size}")

    @cached_property
    def reader(self) -> TextReader:
        return TextReader(self.tokenizer, self.model.config.prompt_ids)

    def read(self, text: str, answers: Sequence[str]) -> ChoiceQuestion:
        """Cuts and encodes a text and its answers, and checks that they fit the model."""
        blanked = self.reader.read(text, positions=self.model.config.max_position_embeddings)
        if len(blanked.context.blanks) > 1:
            raise GmaskError(
                f"the text has {len(blanked.context.blanks)} blanks, and answers are scored for one: "
                "gmask.infill(choices=...) scores several jointly"
            )
        if isinstance(answers, str) or not isinstance(answers, Sequence) or not all(map(_is_text, answers)):
            raise GmaskError(f"the answers must be a list of texts, such as ['sunny', 'rainy'], not {answers!r}")
        if not answers:
            raise GmaskError("there are no answers to score: give at least one")
        if not all(answers):
            raise GmaskError("an answer is empty: only texts with at least one token can be scored")
        ids = [encode_answer(answer, blanked, 0, self.reader, self.model) for answer in answers]
        return ChoiceQuestion(text, blanked, tuple(answers), tuple(ids))

    def score(self, questions: Sequence[ChoiceQuestion]) -> list[Scoring]:
        """Scores questions that were read by this scorer."""
        asked = [(question.blanked.context, question.ids) for question in questions]
        found = score_answer_ids(self.model, asked, self.reader.special, batch_size=self.batch_size)
        bare = [self.reader.read_blank(question.blank_id) for question in questions]
        scores = normalize(self.model, found, bare, self.reader.special, self.normalization, batch_size=self.batch_size)
        return list(map(self._assemble, questions, found, scores))

    def _assemble(self, question: ChoiceQuestion, answers: Sequence[Answer], scores: Sequence[float]) -> Scoring:
        weights = [math.exp(value - max(scores)) for value in scores]
        scored = []
        for text, answer, value, weight in zip(question.answers, answers, scores, weights, strict=True):
            tokens = tuple(map(Token, answer.ids, token_texts(answer.ids, self.tokenizer), answer.logprobs))
            assert answer.end_logprob is not None, "a scored answer has an end"
            probability = weight / sum(weights)
            scored.append(ScoredAnswer(text, sum(answer.logprobs), value, probability, tokens, answer.end_logprob))
        return Scoring(question.text, tuple(scored))


EXACT_LIMIT = 256
"""All combinations are scored if there are at most this many; else a beam search chooses."""

BEAM_WIDTH = 64
"""The number of combinations that the beam search keeps after each blank."""

ChoiceLists = Sequence[str] | Sequence[Sequence[str]] | Mapping[int, Sequence[str]]
"""A list of candidates for a single blank; or a list for each blank, in order or by the blank's number from 0."""


@dataclass(frozen=True, slots=True)
class ScoredChoices:
    """Combinations of choices and their answers, best first."""

    choices: Choices
    answers: tuple[tuple[Answer, ...], ...]


def read_choice_lists(choices: ChoiceLists, blanks: int) -> list[Sequence[str]]:
    """Returns a list of candidates for each blank.

    Raises:
        GmaskError: a blank without candidates, lists for blanks that the text does not have, or what is no list.
    """
    if isinstance(choices, str) or not isinstance(choices, Mapping | Sequence):
        raise GmaskError(f"choices is {show(choices)}: give a list of texts, or such a list for each blank")
    if isinstance(choices, Mapping):
        if unknown := [blank for blank in choices if blank not in range(blanks)]:
            raise GmaskError(f"choices for blank {unknown[0]}, but the text has only blanks 0 to {blanks - 1}")
        lists = [choices.get(blank, ()) for blank in range(blanks)]
    elif all(isinstance(choice, str) for choice in choices):
        lists = [cast(Sequence[str], choices)]
    else:
        lists = list(choices)
    lists = [[candidates] if isinstance(candidates, str) else candidates for candidates in lists]
    if len(lists) != blanks:
        raise GmaskError(f"choices for {len(lists)} blanks, but the text has {blanks}: give a list for each")
    if empty := [blank for blank, candidates in enumerate(lists) if not candidates]:
        raise GmaskError(f"blank {empty[0]} (from 0) has no choices: give at least one for every blank")
    for candidates in lists:
        if not isinstance(candidates, Sequence) or not all(map(_is_text, candidates)):
            raise GmaskError(f"the choices of a blank must be a list of texts, not {show(candidates)}")
    return list(lists)


def score_choices(
    model: GLMForConditionalGeneration,
    reader: TextReader,
    text: BlankedText,
    lists: Sequence[Sequence[str]],
    *,
    batch_size: int,
) -> ScoredChoices:
    """Scores combinations of candidates; all of them if there are at most `EXACT_LIMIT`.

    Args:
        lists: the candidates of each blank.

    Raises:
        GmaskError: a candidate longer than the model has positions.
    """
    ids = [
        [encode_answer(candidate, text, blank, reader, model) for candidate in candidates]
        for blank, candidates in enumerate(lists)
    ]
    scorer = AnswerScorer(model, [text.context], reader.special, batch_size=batch_size)
    is_exact = math.prod(map(len, lists)) <= EXACT_LIMIT
    stages = [len(lists)] if is_exact else range(1, len(lists) + 1)
    picks: list[tuple[int, ...]] = [()]
    scored: list[tuple[Answer, ...]] = []
    for stage in stages:
        new = [range(len(candidates)) for candidates in lists[len(picks[0]) : stage]]
        picks = [(*pick, *more) for pick in picks for more in itertools.product(*new)]
        rows = [tuple(ids[blank][choice] for blank, choice in enumerate(pick)) for pick in picks]
        scored = scorer.score([AnswerRow(0, row) for row in rows])
        ranking = rank_scores([_joint(answers) for answers in scored])
        ranking = ranking if is_exact else ranking[:BEAM_WIDTH]
        picks, scored = [picks[index] for index in ranking], [scored[index] for index in ranking]
    logprobs = [_joint(answers) for answers in scored]
    total = math.log(sum(math.exp(value - logprobs[0]) for value in logprobs)) + logprobs[0]
    combinations = tuple(
        Combination(
            tuple(lists[blank][choice] for blank, choice in enumerate(pick)), logprob, math.exp(logprob - total)
        )
        for pick, logprob in zip(picks, logprobs, strict=True)
    )
    return ScoredChoices(Choices(is_exact, combinations), tuple(scored))


def _joint(answers: Sequence[Answer]) -> float:
    return sum(answer.logprob for answer in answers)


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """Answers to the first blanks of a context, in order. Each sees the answers before it."""

    context: int  # index of the context
    answers: tuple[tuple[int, ...], ...]  # ids, without end tokens
    unscored: int = 0  # leading tokens of the first answer that are read and left out of what is found


def encode_answer(
    answer: str, text: BlankedText, blank: int, reader: TextReader, model: GLMForConditionalGeneration
) -> tuple[int, ...]:
    """Returns the ids of an answer, with the white space that stands before the blank in the text.

    Raises:
        GmaskError: an answer longer than the model has positions.
    """
    positions = model.config.max_position_embeddings
    check_characters(answer, positions, reader.tokenizer, name=f"the answer {answer[:20]!r}")
    ids = reader.encode_answer(answer, text, blank)
    if len(ids) >= positions:
        raise GmaskError(
            f"the answer {answer[:20]!r} has {len(ids)} tokens; the model's {positions} positions hold fewer"
        )
    return ids


def check_normalization(normalization: str) -> None:
    """Raises `GmaskError` for a normalization that is not known."""
    if normalization not in get_args(ScoreNormalization):
        raise GmaskError(
            f"normalization must be one of {', '.join(get_args(ScoreNormalization))}, not {normalization!r}"
        )


def normalize(
    model: PreTrainedModel,
    answers: Sequence[Sequence[Answer]],
    bare: Sequence[Context],
    special: BlankTokens,
    normalization: ScoreNormalization,
    *,
    batch_size: int,
) -> list[list[float]]:
    """Returns the normalised scores of answers, as of `score`.

    Args:
        answers: to each question, with their log-probabilities.
        bare: of each question, the context that is nothing but its blank.
    """
    sums = [[sum(answer.logprobs) for answer in found] for found in answers]
    if normalization == "sum":
        return sums
    if normalization == "mean":
        return [[sum(answer.logprobs) / len(answer.ids) for answer in found] for found in answers]
    wanted: dict[Context, dict[tuple[int, ...], float]] = {}  # questions share bare contexts: each is read once
    for context, found in zip(bare, answers, strict=True):
        wanted.setdefault(context, {}).update((answer.ids, 0.0) for answer in found)
    asked = [(context, list(ids)) for context, ids in wanted.items()]
    for (context, _), found in zip(asked, score_answer_ids(model, asked, special, batch_size=batch_size), strict=True):
        wanted[context].update((answer.ids, sum(answer.logprobs)) for answer in found)
    return [
        [total - wanted[context][answer.ids] for total, answer in zip(totals, found, strict=True)]
        for context, totals, found in zip(bare, sums, answers, strict=True)
    ]


def score_answer_ids(
    model: PreTrainedModel,
    questions: Sequence[tuple[Context, Sequence[tuple[int, ...]]]],
    special: BlankTokens,
    *,
    batch_size: int,
) -> list[list[Answer]]:
    """Scores answers, given as ids, to the first blank of each context.

    ``batch_size`` contexts of similar length are read together, and as many answers are scored together.
    """
    found: list[list[Answer]] = [[] for _ in questions]
    for batch in batches_by_length([len(context.ids) for context, _ in questions], batch_size):
        scorer = AnswerScorer(model, [questions[index][0] for index in batch], special, batch_size=batch_size)
        rows = [AnswerRow(number, (ids,)) for number, index in enumerate(batch) for ids in questions[index][1]]
        for row, (answer,) in zip(rows, scorer.score(rows), strict=True):
            found[batch[row.context]].append(answer)
    return found


@dataclass(frozen=True, slots=True)
class Continuation:
    """A context, and a given answer to its first blank."""

    context: Context
    ids: tuple[int, ...]
    unscored: int = 0  # leading tokens of the answer that are read and not scored


def score_continuations(
    model: PreTrainedModel, continuations: Sequence[Continuation], special: BlankTokens, *, batch_size: int
) -> list[Answer]:
    """Scores one answer to each context, without the tokens that are only read; ``batch_size`` run together."""
    found: dict[int, Answer] = {}
    lengths = [len(one.context.ids) + len(one.ids) for one in continuations]
    for batch in batches_by_length(lengths, batch_size):
        asked = [continuations[index] for index in batch]
        scorer = AnswerScorer(model, [one.context for one in asked], special, batch_size=batch_size)
        rows = [AnswerRow(number, (one.ids,), one.unscored) for number, one in enumerate(asked)]
        found.update((index, answer) for index, (answer,) in zip(batch, scorer.score(rows), strict=True))
    return [found[index] for index in range(len(continuations))]


LOGITS_AT_ONCE = 2**25
"""The most logits that are computed at once: 128 MB in float32, however many tokens the answers of a batch have."""


class AnswerScorer:
    """Scores given answers to the blanks of B contexts, each of which is read once.

    The end of an answer is ``<eop>`` or ``<|endoftext|>``, whichever is more probable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        contexts: Sequence[Context],
        special: BlankTokens,
        *,
        batch_size: int,
    ) -> None:
        self.model = model
        self.contexts = contexts
        self.special = special
        self.batch_size = batch_size
        self.cache = GrowingCache(model.config, spare=False)
        input_ids, layout, self.is_real = stack_contexts(contexts, pad=special.pad)
        with torch.inference_mode():
            model.base_model(
                **self._inputs(input_ids, layout, self.is_real), past_key_values=self.cache, use_cache=True
            )

    def score(self, rows: Sequence[AnswerRow]) -> list[tuple[Answer, ...]]:
        """Returns the answers of R rows with their log-probabilities; ``batch_size`` rows run together."""
        scored: dict[int, tuple[Answer, ...]] = {}
        for batch in batches_by_length([sum(map(len, row.answers)) for row in rows], self.batch_size):
            chunk = [rows[index] for index in batch]
            input_ids, targets, layout = self._stack_answers(chunk)
            is_answer = layout[:, 1] > 0  # the rest is padding
            layout[:, 1][~is_answer] = 1
            contexts = torch.tensor([row.context for row in chunk])
            mask = None if self.is_real is None else torch.cat((self.is_real[contexts], is_answer), dim=1)
            with torch.inference_mode():
                cache = self.cache.select(contexts.to(self.model.device), room=input_ids.shape[1])
                outputs = self.model.base_model(
                    **self._inputs(input_ids, layout, mask), past_key_values=cache, use_cache=True
                )
                found = self._split(chunk, outputs.last_hidden_state, is_answer, targets)
            scored.update(zip(batch, found, strict=True))
        return [scored[index] for index in range(len(rows))]

    def _split(
        self, rows: Sequence[AnswerRow], hidden_states: Tensor, is_answer: Tensor, targets: Tensor
    ) -> list[tuple[Answer, ...]]:
        """Returns the answers of rows, from the hidden states of their tokens ``[R, T, H]``."""
        is_scored = is_answer.clone()
        for index, row in enumerate(rows):
            is_scored[index, : row.unscored] = False
        is_scored, targets = is_scored.to(self.model.device), targets.to(self.model.device)
        of_target, of_end, is_greedy = self._read_tokens(hidden_states[is_scored], targets[is_scored])
        found, start = [], 0
        for row in rows:
            answers = []
            for number, ids in enumerate(row.answers):
                ids = ids[row.unscored :] if number == 0 else ids
                end = start + len(ids)
                piece = slice(start, end)
                greedy = tuple(is_greedy[piece])
                answers.append(Answer(ids, tuple(of_target[piece]), of_end[end], "end", greedy))
                start = end + 1
            found.append(tuple(answers))
        return found

    def _read_tokens(self, hidden_states: Tensor, targets: Tensor) -> tuple[list[float], list[float], list[bool]]:
        """Returns of each of N tokens its log-probability, that of an end in its place, and whether it is the argmax.

        Args:
            hidden_states: ``[N, H]``.
            targets: ``[N]``.
        """
        of_target, of_end, is_greedy = list[float](), list[float](), list[bool]()
        size = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        for start in range(0, len(targets), size):
            wanted = targets[start : start + size]
            logprobs = log_softmax(self.model.lm_head(hidden_states[start : start + size]))
            of_target += logprobs.gather(-1, wanted[:, None])[:, 0].tolist()
            of_end += logprobs[:, [self.special.eop, self.special.eos]].amax(-1).tolist()
            is_greedy += (logprobs.argmax(-1) == wanted).tolist()
        return of_target, of_end, is_greedy

    def _stack_answers(self, rows: Sequence[AnswerRow]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ids ``[R, T]``, the next tokens ``[R, T]`` and the layout ``[R, 2, T]``, which is 0 at padding.

        Padding is on the right, where no answer sees it.
        """
        width = max(sum(len(ids) + 1 for ids in row.answers) for row in rows)
        input_ids = torch.full((len(rows), width), self.special.pad)
        targets = torch.zeros(len(rows), width, dtype=torch.long)
        layout = torch.zeros(len(rows), 2, width, dtype=torch.long)
        for index, row in enumerate(rows):
            start = 0
            for position, ids in zip(self.contexts[row.context].blanks, row.answers, strict=False):
                piece = slice(start, start + len(ids) + 1)
                input_ids[index, piece] = torch.tensor((self.special.sop, *ids))
                targets[index, piece] = torch.tensor((*ids, self.special.eop))
                layout[index, 0, piece] = position
                layout[index, 1, piece] = torch.arange(1, len(ids) + 2)
                start = piece.stop
        return input_ids, targets, layout

    def _inputs(self, input_ids: Tensor, layout: Tensor, mask: Tensor | None) -> dict[str, Any]:
        device = self.model.device
        return {
            "input_ids": input_ids.to(device),
            "layout": layout.to(device),
            "attention_mask": None if mask is None else mask.to(device),
        }
