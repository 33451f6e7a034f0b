"""The answers of two models to the same prompts: who wins, and what a rise of the reward may hide."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gmask.evaluation.rewards import WinRate, share_of

NGRAM = 3
"""The tokens of what counts as a repetition."""

LIKE_LENGTH = 0.1
"""By which share of the longer one two answers of like length may differ; a token they may in any case."""

GROWTH = 1.5
REPETITION_RISE = 0.05
ENTROPY_LEFT = 0.1
"""From when on there is a warning: the length times so much, so much more of the answer repeated, the entropy times so
much."""


def share_repeated(ids: Sequence[int], size: int = NGRAM) -> float:
    """The share of an answer's n-grams that stood in it before; 0 of an answer that is shorter."""
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """The ids of an answer, its end included, and its reward."""

    ids: tuple[int, ...]
    reward: float


@dataclass(frozen=True, slots=True)
class Lead:
    """How often one model's answers are worth more than another's; ties count half."""

    all: WinRate
    like_length: WinRate | None  # among the pairs of like length; None if there are none


def find_lead(ours: Sequence[Sequence[JudgedAnswer]], theirs: Sequence[Sequence[JudgedAnswer]]) -> Lead:
    """The win rate of one model against another.

    With several answers to a prompt each meets each, and their mean counts once: the intervals are over prompts.

    Args:
        ours, theirs: the answers to each prompt.
    """
    wins, alike = list[float](), list[float]()
    for mine, others in zip(ours, theirs, strict=True):
        pairs = list(itertools.product(mine, others))
        wins.append(sum(won(one, other) for one, other in pairs) / len(pairs))
        near = [won(one, other) for one, other in pairs if are_of_like_length(one, other)]
        if near:
            alike.append(sum(near) / len(near))
    return Lead(share_of(wins), share_of(alike) if alike else None)


def won(one: JudgedAnswer, other: JudgedAnswer) -> float:
    """1 if an answer is worth more than another, 0.5 if as much, else 0. The same answer is worth the same.

    A reward model gives equal answers in other batches other last digits.
    """
    if one.ids == other.ids or math.isclose(one.reward, other.reward, rel_tol=1e-6, abs_tol=1e-6):
        return 0.5
    return float(one.reward > other.reward)


def are_of_like_length(one: JudgedAnswer, other: JudgedAnswer) -> bool:
    shorter, longer = sorted((len(one.ids), len(other.ids)))
    return longer - shorter <= max(1.0, LIKE_LENGTH * longer)


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """What the answers of a model are like, on average."""

    reward: float
    length: float  # tokens
    repetition: float  # the share of `share_repeated`
    entropy: float  # nats a token


def warn_of_change(before: AnswerFigures, after: AnswerFigures) -> list[str]:
    """Warnings about a reward that rose with length or repetition, and about an entropy that is gone."""
    found = []
    rises = after.reward > before.reward
    if rises and after.length > GROWTH * before.length:
        found.append(f"answers grew with the reward, from {before.length:.0f} to {after.length:.0f} tokens")
    if rises and after.repetition > before.repetition + REPETITION_RISE:
        shares = f"from {100 * before.repetition:.0f} % of their {NGRAM}-grams to {100 * after.repetition:.0f} %"
        found.append(f"answers repeat themselves with the reward, {shares}")
    if after.entropy < ENTROPY_LEFT * before.entropy:
        found.append("the entropy is nearly gone: the model always writes the same")
    return found


def warn_of_lengths(lead: Lead) -> list[str]:
    """A warning about a win rate whose lead is not there among answers of like length."""
    if lead.all.low <= 0.5:
        return []
    if lead.like_length is None:
        return ["it wins, but no two answers are of like length, so that the length alone may be what wins"]
    half = 0.5 + (lead.all.share - 0.5) / 2
    if lead.like_length.low <= 0.5 and lead.like_length.share < half:
        return [f"it wins {lead.all}, but of answers of like length only {lead.like_length}"]
    return []
