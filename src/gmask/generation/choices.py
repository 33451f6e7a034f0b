"""Which of the given answers fit the blanks best, jointly?"""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import DynamicCache

from gmask.errors import GmaskError
from gmask.generation.answers import Choices, Combination
from gmask.generation.context import BlankedText, Context, TextReader
from gmask.generation.decoding import Answer, log_softmax
from gmask.infilling.blanks import BlankTokens
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
        [_encode_candidate(candidate, text, blank, reader, model) for candidate in candidates]
        for blank, candidates in enumerate(lists)
    ]
    scorer = AnswerScorer(model, text.context, reader.special, batch_size)
    is_exact = math.prod(map(len, lists)) <= EXACT_LIMIT
    stages = [len(lists)] if is_exact else range(1, len(lists) + 1)
    picks: list[tuple[int, ...]] = [()]
    scored: list[tuple[Answer, ...]] = []
    for stage in stages:
        new = [range(len(candidates)) for candidates in lists[len(picks[0]) : stage]]
        picks = [(*pick, *more) for pick in picks for more in itertools.product(*new)]
        scored = scorer.score([[ids[blank][choice] for blank, choice in enumerate(pick)] for pick in picks])
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


def _encode_candidate(
    candidate: str, text: BlankedText, blank: int, reader: TextReader, model: GLMForConditionalGeneration
) -> tuple[int, ...]:
    """The ids of a candidate, with the white space that the blank took from the text before it."""
    space = text.swallowed_space(blank)[-1:]
    ids = reader.encode_plain(candidate if candidate[:1].isspace() else space + candidate)
    positions = model.config.max_position_embeddings
    if len(ids) >= positions:
        raise GmaskError(
            f"the choice {candidate[:20]!r} has {len(ids)} tokens; the model's {positions} positions hold fewer"
        )
    return tuple(ids)


class AnswerScorer:
    """Log-probabilities of given answers to the blanks of one context, which is read once.

    An answer ends with ``<eop>`` or ``<|endoftext|>``, whichever is more probable.
    """

    def __init__(
        self, model: GLMForConditionalGeneration, context: Context, special: BlankTokens, batch_size: int
    ) -> None:
        self.model = model
        self.context = context
        self.special = special
        self.batch_size = batch_size
        self.cache = DynamicCache(config=model.config)
        places = torch.arange(len(context.ids), device=model.device)
        with torch.inference_mode():
            model(
                input_ids=torch.tensor([context.ids], device=model.device),
                layout=torch.stack((places, torch.zeros_like(places)))[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )

    def score(self, rows: Sequence[Sequence[tuple[int, ...]]]) -> list[tuple[Answer, ...]]:
        """Scores R rows of answers, each to the first blanks of the context, in order."""
        with torch.inference_mode():
            chunks = (rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size))
            return [answers for chunk in chunks for answers in self._score_chunk(chunk)]

    def _score_chunk(self, rows: Sequence[Sequence[tuple[int, ...]]]) -> list[tuple[Answer, ...]]:
        width = max(sum(len(ids) + 1 for ids in row) for row in rows)
        input_ids = torch.full((len(rows), width), self.special.pad)
        targets = torch.zeros(len(rows), width, dtype=torch.long)
        layout = torch.zeros(len(rows), 2, width, dtype=torch.long)
        layout[:, 1] = 1  # padding: behind the answers, so that none of them sees it
        for index, row in enumerate(rows):
            start = 0
            for place, ids in zip(self.context.places, row, strict=False):
                piece = slice(start, start + len(ids) + 1)
                input_ids[index, piece] = torch.tensor((self.special.sop, *ids))
                targets[index, piece] = torch.tensor((*ids, self.special.eop))
                layout[index, 0, piece] = place
                layout[index, 1, piece] = torch.arange(1, len(ids) + 2)
                start = piece.stop
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(rows))
        device = self.model.device
        outputs = self.model(
            input_ids=input_ids.to(device), layout=layout.to(device), past_key_values=cache, use_cache=True
        )
        logprobs = log_softmax(outputs.logits)  # R T V
        of_target = logprobs.gather(-1, targets.to(device)[..., None])[..., 0].tolist()
        of_end = logprobs[..., [self.special.eop, self.special.eos]].amax(-1).tolist()
        return [_cut_answers(row, tokens, ends) for row, tokens, ends in zip(rows, of_target, of_end, strict=True)]


def _cut_answers(
    row: Sequence[tuple[int, ...]], of_target: Sequence[float], of_end: Sequence[float]
) -> tuple[Answer, ...]:
    """The answers of one row, from the log-probabilities of its tokens and of an end at each position."""
    answers, start = [], 0
    for ids in row:
        end = start + len(ids)
        answers.append(Answer(tuple(ids), tuple(of_target[start:end]), of_end[end], "end"))
        start = end + 1
    return tuple(answers)
