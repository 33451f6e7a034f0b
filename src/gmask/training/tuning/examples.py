"""How does a sample become what a model is trained on?

Shape letters: T positions of an example.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.context import Context
from gmask.generation.reading import ReadSample, SampleReader, locate
from gmask.infilling.blanks import NOT_SCORED, InfillingExample, IntArray
from gmask.models.glm import GLMConfig
from gmask.tasks.samples import CHOICES, Sample, TaskKind, Truncation


@dataclass(frozen=True, slots=True, eq=False)
class Example(InfillingExample):
    """A context with the answers that are taught, in the sight of those before them, or with candidates, which are not.

    A GLM takes its labels as they are; those of a ChatGLM stand one position later, and its model shifts them. The
    published tuning of ChatGLM also taught its ``<sop>``, which is never predicted.
    """

    pieces: IntArray  # [T]: 0 in the context, n in the n-th answer or candidate
    choice: int | None = None  # the right candidate, or the class

    @property
    def length(self) -> int:
        """In tokens."""
        return len(self.input_ids)


@dataclass(slots=True)
class Truncated:
    """How much of the samples was left out."""

    samples: int = 0  # that were encoded
    sources: int = 0  # samples whose text was cut
    targets: int = 0  # samples whose answer was cut
    rounds: int = 0  # earlier rounds of conversations

    def __str__(self) -> str:
        return (
            f"of {self.samples} samples, {self.sources} texts and {self.targets} answers were cut, and {self.rounds} "
            "earlier rounds were left out"
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """One answer."""

    place: int  # of its blank in the context
    ids: tuple[int, ...]
    end: int  # what the model must predict behind the last token, or NOT_SCORED


class SampleEncoder:
    """Encodes the samples of one kind for models of one config.

    Args:
        max_source: tokens of a context, blanks and control tokens counted.
        max_target: positions of an answer: its ``<sop>`` and its tokens; of a ChatGLM also its ``<eop>``, which that
            reads as well. Longer answers are cut, and end there, as published; candidates, which are compared as a
            whole, are not. A document of a language model is taught in several pieces, of which the last has an end.
        truncation: where a text that is too long is cut; see `SampleReader`.

    Raises:
        GmaskError: limits that the model has no positions for, or a kind that it cannot do.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        kind: TaskKind,
        *,
        max_source: int,
        max_target: int,
        truncation: Truncation = "left",
    ) -> None:
        self.reader = SampleReader(tokenizer, config, kind, max_source=max_source, truncation=truncation)
        self.kind = kind
        self.shifts_labels = not isinstance(config, GLMConfig)
        self.longest = max_target - 1 - self.shifts_labels  # tokens of an answer
        positions = config.max_position_embeddings
        if self.longest < 1:
            raise GmaskError(f"max_target is {max_target}: give at least {max_target - self.longest + 1}")
        if max_target > positions:
            raise GmaskError(f"max_target is {max_target}, but the model has only {positions} positions")
        self.truncated = Truncated()

    def encode(self, sample: Sample) -> Example:
        """The example of a sample. A document, or a choice with several right candidates, may make several:
        `encode_all` gives them.

        Raises:
            GmaskError: a sample that cannot be read, or that teaches nothing; with its file and line.
        """
        (example,) = self._encode(sample)
        return example

    def encode_all(self, samples: Iterable[Sample]) -> list[Example]:
        """The examples of samples, in order; errors as of `encode`."""
        return [example for sample in samples for example in self._encode(sample)]

    def _encode(self, sample: Sample) -> list[Example]:
        question = self.reader.read(sample)
        try:
            examples = self._make_examples(question, sample)
        except GmaskError as error:
            raise locate(error, sample) from error
        self.truncated.samples += 1
        self.truncated.sources += question.tokens_cut > 0
        self.truncated.rounds += question.rounds_left_out
        self.truncated.targets += self._cuts_answers and any(len(ids) > self.longest for ids in question.answers)
        return examples

    @property
    def _cuts_answers(self) -> bool:
        return self.kind in ("seq2seq", "infill", "chat")

    def _make_examples(self, question: ReadSample, sample: Sample) -> list[Example]:
        context, answers, places = question.context, question.answers, question.context.places
        if self.kind == "classification":
            return [self._join(context, [], choice=_known_label(sample, None))]
        if not answers:
            raise GmaskError("the sample has no answer, so that nothing can be learnt from it")
        if self.kind in CHOICES:
            return [self._join_candidates(question, right, kept) for right, kept in _contests(sample)]
        if self.kind != "infill" and len(answers) > 1:
            raise GmaskError(f"{self.kind} takes one answer, but the sample has {len(answers)}")
        if self.kind == "language-model":
            return [self._join(context, [piece]) for piece in self._cut_document(places[0], answers[0])]
        eop = self.reader.special.eop
        pieces = [Piece(place, ids[: self.longest], eop) for place, ids in zip(places, answers, strict=True)]
        return [self._join(context, pieces)]

    def _join_candidates(self, question: ReadSample, right: int, kept: Sequence[int]) -> Example:
        """The context and the candidates ``kept``, of which one is right."""
        place = question.context.places[0]
        candidates = [Piece(place, question.answers[index], NOT_SCORED) for index in kept]
        return self._join(question.context, candidates, choice=kept.index(right))

    def _cut_document(self, place: int, ids: tuple[int, ...]) -> list[Piece]:
        """Pieces of a document, each behind a blank; where the text goes on behind one, no end is taught."""
        if not ids:
            raise GmaskError("the document is empty, so that nothing can be learnt from it")
        starts = range(0, len(ids), self.longest)
        pieces = [Piece(place, ids[start : start + self.longest], NOT_SCORED) for start in starts]
        return [*pieces[:-1], replace(pieces[-1], end=self.reader.special.eop)]

    def _join(self, context: Context, pieces: Sequence[Piece], *, choice: int | None = None) -> Example:
        """The context, and behind it ``<sop> answer`` for each of the pieces."""
        ids, labels = list(context.ids), [NOT_SCORED] * len(context.ids)
        places, steps, numbers = list(range(len(ids))), [0] * len(ids), [0] * len(ids)
        for number, piece in enumerate(pieces, start=1):
            fed, taught = self._lay_out(piece)
            ids += fed
            labels += taught
            places += [piece.place] * len(fed)
            steps += range(1, len(fed) + 1)
            numbers += [number] * len(fed)
        return Example(
            input_ids=np.array(ids, np.int64),
            labels=np.array(labels, np.int64),
            layout=np.array((places, steps), np.int64),
            context_length=len(context.ids),
            objective=self.kind,
            pieces=np.array(numbers, np.int64),
            choice=choice,
        )

    def _lay_out(self, piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of a piece, and their labels; shifted ones need a position of their own for the end."""
        sop = self.reader.special.sop
        if not self.shifts_labels:
            return (sop, *piece.ids), (*piece.ids, piece.end)
        end = () if piece.end == NOT_SCORED else (piece.end,)
        return (sop, *piece.ids, *end), (NOT_SCORED, *piece.ids, *end)


def _contests(sample: Sample) -> list[tuple[int, list[int]]]:
    """Each right candidate of a sample, and those that it is compared with: itself and the wrong ones.

    Source: THUDM/GLM tasks/superglue, where ReCoRD gives an example for each right entity.
    """
    label = _known_label(sample, len(sample.answers))
    right = [index for index, text in enumerate(sample.answers) if index == label or text in sample.references]
    wrong = [index for index in range(len(sample.answers)) if index not in right]
    return [(index, sorted((index, *wrong))) for index in right]


def _known_label(sample: Sample, choices: int | None) -> int:
    """The label of a sample to learn from."""
    if sample.label is None:
        raise GmaskError("the sample has no label, so that nothing can be learnt from it")
    if sample.label < 0 or (choices is not None and sample.label >= choices):
        raise GmaskError(f"the label is {sample.label}, but there are {choices} candidates, counted from 0")
    return sample.label
