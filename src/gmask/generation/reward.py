"""Questions and answers as the ids that a model is trained on, and the rewards that a reward model gives them.

Shape letters: B rows, T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.files import check_text, cut_characters
from gmask.generation.answers import rank_scores
from gmask.generation.encoding import encode_plain, fit_prompt, format_of
from gmask.generation.padding import batches_by_length, check_numbers
from gmask.models.reward import RewardHead
from gmask.tasks.preferences import GivenAnswer, Question


class TooLongError(GmaskError):
    """A question or an answer beyond the limits of an encoder; the message is the reason."""


class AnswerEncoder:
    """Encodes questions and answers for models of one config, as `gmask chat` does.

    Args:
        max_source: tokens of a question with its blank. Of a conversation, the oldest rounds are left out first.
        max_target: tokens of an answer with its end token.

    Raises:
        GmaskError: limits beyond the positions of the model.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, *, max_source: int, max_target: int
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.format = format_of(config, tokenizer)
        self.special = self.format.special
        self.max_source, self.max_target = max_source, max_target
        self.blanks = {self.special.mask, self.special.smask, self.special.gmask}
        positions = config.max_position_embeddings
        for name, limit in (("max_source", max_source), ("max_target", max_target)):
            if limit > positions:
                raise GmaskError(f"{name} is {limit}, but the model has only {positions} positions")

    def encode_question(self, question: Question) -> tuple[tuple[int, ...], int]:
        """Returns the ids of a question up to ``<sop>``, and the number of earlier rounds that are left out.

        Raises:
            TooLongError: the question alone has no room.
            GmaskError: ids without a blank and ``<sop>`` at their end.
        """
        if question.ids is not None:
            self._check_prompt(question.ids)
            if len(question.ids) > self.max_source + 1:
                raise TooLongError(f"the prompt has more than {self.max_source} tokens")
            return question.ids, 0
        try:
            prompt = fit_prompt(question.text, question.rounds, self.format, longest=self.max_source + 1, max_tokens=0)
        except GmaskError as error:
            raise TooLongError(f"the prompt has more than {self.max_source} tokens") from error
        return (*prompt.context.ids, self.special.sop), prompt.rounds_left_out

    def encode_answer(self, answer: GivenAnswer) -> tuple[int, ...]:
        """Returns the ids of an answer; that of a text ends with the end token.

        An answer far longer than `max_target` is cut before it is tokenized, and is still longer.

        Raises:
            GmaskError: no ids, or ids with a ``<sop>``, behind which a second answer would begin.
        """
        if isinstance(answer, str):
            text = cut_characters(answer.strip(), self.max_target, self.tokenizer)
            return (*encode_plain(self.tokenizer, text), self.special.eop)
        if not answer or self.special.sop in answer:
            what = "is empty" if not answer else "holds <sop>, behind which a second answer would begin"
            raise GmaskError(f"the ids of an answer: it {what}")
        return tuple(answer)

    def _check_prompt(self, ids: Sequence[int]) -> None:
        sop = self.special.sop
        if ids[-1:] != (sop,) or sop in ids[:-1] or self.blanks.isdisjoint(ids):
            raise GmaskError(
                "prompt_ids have no blank and no <sop> at their end, so that the answer would be read as context and "
                "nothing be learnt: make them by tokenizer.apply_chat_template(..., add_generation_prompt=True)"
            )
        if max(ids) >= self.config.vocab_size:
            raise GmaskError(f"prompt_ids hold {max(ids)}, and the model has {self.config.vocab_size} tokens")


@dataclass(frozen=True, slots=True)
class RewardQuestion:
    """A prompt and its answers, as texts and as the rows of ids that are rewarded."""

    text: str
    answers: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class RewardedAnswers:
    """The answers to a prompt and their rewards, in the order in which they were given."""

    text: str
    answers: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """The answers and rewards from the highest to the lowest; of equal ones the first comes first."""
        return [(self.answers[index], self.scores[index]) for index in rank_scores(self.scores)]

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``gmask score --reward --json`` prints."""
        answers = [{"text": text, "score": score} for text, score in zip(self.answers, self.scores, strict=True)]
        return {"text": self.text, "best": self.ranked[0][0], "answers": answers}


@dataclass(frozen=True)
class RewardScorer:
    """A reward model and its tokenizer.

    Raises:
        GmaskError: a model without a reward head.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_reward_model(self.model)

    @cached_property
    def encoder(self) -> AnswerEncoder:
        positions = self.model.config.max_position_embeddings
        return AnswerEncoder(self.tokenizer, self.model.config, max_source=positions - 1, max_target=positions)

    def read(self, text: str, answers: Sequence[str]) -> RewardQuestion:
        """Encodes a prompt and its answers.

        Raises:
            GmaskError: no answers, or an empty one; a prompt or an answer that the model has no positions for.
        """
        if isinstance(answers, str) or not answers or not all(isinstance(one, str) for one in answers):
            raise GmaskError(f"the answers must be a list of texts, such as ['sunny', 'rainy'], not {answers!r}")
        if not all(answer.strip() for answer in answers):
            raise GmaskError("an answer is empty: there is nothing to reward")
        return RewardQuestion(text, tuple(answers), tuple(self._rows(Question(check_text(text)), answers)))

    def rank(self, questions: Sequence[RewardQuestion]) -> list[RewardedAnswers]:
        """Returns the rewards of questions that were read by this scorer."""
        scores = iter(self.score_ids([row for question in questions for row in question.rows]))
        return [
            RewardedAnswers(question.text, question.answers, tuple(islice(scores, len(question.rows))))
            for question in questions
        ]

    def score(self, question: Question, answers: Sequence[GivenAnswer]) -> list[float]:
        """Returns the reward of each answer to a question.

        Raises:
            GmaskError: a question or an answer that the model has no positions for.
        """
        return self.score_ids(self._rows(question, answers))

    def _rows(self, question: Question, answers: Sequence[GivenAnswer]) -> list[tuple[int, ...]]:
        prompt, _ = self.encoder.encode_question(question)
        found = [self.encoder.encode_answer(answer) for answer in answers]
        if any(len(ids) > self.encoder.max_target for ids in found):
            raise TooLongError(f"an answer has more than {self.encoder.max_target} tokens")
        return [(*prompt, *ids) for ids in found]

    def read_row(self, question: Question, answer: GivenAnswer) -> tuple[int, ...]:
        """Returns the row of ids of a question and an answer, for `score_ids`; errors as of `score`."""
        (row,) = self._rows(question, [answer])
        return row

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Returns the reward of each row of ids, a prompt with ``<sop>`` and an answer. The order does not matter."""
        rewards = [0.0] * len(rows)
        pad = self.encoder.special.pad
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in batches_by_length([len(row) for row in rows], self.batch_size):
                input_ids, mask = pad_rows([rows[index] for index in batch], pad=pad)
                with torch.inference_mode():
                    found = self.model(
                        input_ids=input_ids.to(self.model.device), attention_mask=mask.to(self.model.device)
                    ).logits[:, 0]
                check_numbers(found)
                for index, reward in zip(batch, found.tolist(), strict=True):
                    rewards[index] = reward
        finally:
            self.model.train(was_training)
        return rewards


def check_reward_model(model: PreTrainedModel) -> None:
    """Raises `GmaskError` for a model without a reward head."""
    if not isinstance(model, RewardHead):
        raise GmaskError(
            f"{model.name_or_path or type(model).__name__}: is a {type(model).__name__}, which gives no rewards: name "
            "the folder that `gmask reward` wrote"
        )


def pad_rows(rows: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Returns ids and mask ``[B, T]`` of rows, padded on the right: the same columns of a pair's rows are compared."""
    width = max(map(len, rows))
    input_ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return input_ids, mask
