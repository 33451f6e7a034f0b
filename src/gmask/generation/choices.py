"""Which of the given answers fit the blanks best, jointly?"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from gmask.errors import GmaskError
from gmask.generation.answers import Choices, Combination
from gmask.generation.context import BlankedText, TextReader
from gmask.generation.decoding import Answer
from gmask.generation.likelihood import AnswerRow, AnswerScorer, encode_answer
from gmask.models.glm import GLMForConditionalGeneration

EXACT_LIMIT = 256
"""Up to this many combinations, all are scored."""

BEAM_WIDTH = 64
"""Beyond it, so many are kept after each blank."""

ChoiceLists = Sequence[str] | Sequence[Sequence[str]] | Mapping[int, Sequence[str]]
"""One list for a single blank; or a list for every blank, in order or by its number from 0."""


@dataclass(frozen=True, slots=True)
class ScoredChoices:
    """Combinations and the answers that they are made of, best first."""

    choices: Choices
    answers: tuple[tuple[Answer, ...], ...]


def read_choices(choices: ChoiceLists, blanks: int) -> list[Sequence[str]]:
    """A list of candidates for every blank.

    Raises:
        GmaskError: a blank without candidates, or lists for blanks that are not there.
    """
    if isinstance(choices, Mapping):
        if unknown := [blank for blank in choices if blank not in range(blanks)]:
            raise GmaskError(f"choices for blank {unknown[0]}, but the text has only blanks 0 to {blanks - 1}")
        lists = [choices.get(blank, ()) for blank in range(blanks)]
    elif all(isinstance(choice, str) for choice in choices):
        lists = [cast(Sequence[str], choices)]
    else:
        lists = [[choice] if isinstance(choice, str) else choice for choice in choices]
    if len(lists) != blanks:
        raise GmaskError(f"choices for {len(lists)} blanks, but the text has {blanks}: give a list for each")
    if empty := [blank for blank, candidates in enumerate(lists) if not candidates]:
        raise GmaskError(f"blank {empty[0]} (from 0) has no choices: give at least one for every blank")
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
        ranking = sorted(range(len(picks)), key=lambda index: -_joint(scored[index]))
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
