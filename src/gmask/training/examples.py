"""A task's data: samples split, encoded as examples, packed into batches, and the order of the batches.

Shape letters: T positions of an example, B rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from gmask.errors import GmaskError
from gmask.generation.encoding import Context
from gmask.generation.predict import ReadSample, SampleReader, locate
from gmask.infilling.blanks import NOT_SCORED, InfillingExample, IntArray
from gmask.infilling.collator import collate
from gmask.models.glm import GLMConfig
from gmask.recipes.tuning import TuningDataSettings
from gmask.tasks.metrics import check_metrics, is_answered
from gmask.tasks.records import CHOICES, Sample, TaskKind, Truncation, find_files, hash_file, read_records
from gmask.tasks.task import Task

Unit = tuple[object, ...]
"""The key of one record, or one line of a file: its samples are never split into training and validation."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that samples were read from."""

    split: str  # train, validation or test
    name: str  # without its folder
    samples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Splits:
    """The samples of a run. Those of ``test`` may have no answers."""

    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]
    files: Sequence[DataFile]
    dropped: int = 0  # records that could not be used, where the recipe allows that


def read_splits(task: Task, data: TuningDataSettings, *, seed: int) -> Splits:
    """Reads the files of a recipe, and sets samples aside for validation where it says so.

    Raises:
        GmaskError: as of `read_records` and `Task.samples`; no sample is left to train on; a metric that cannot be
            measured on the samples.
    """
    bad: list[GmaskError] = []
    train, files = _read_split(task, data, data.train, "train", bad)
    validation, test = list[Sample](), list[Sample]()
    if isinstance(data.validation, str):
        validation, more = _read_split(task, data, data.validation, "validation", bad)
        files += more
    elif data.validation is not None:
        train, validation = hold_out(train, data.validation, seed=seed)
    elif data.folds is not None:
        train, validation = take_fold(train, data.folds, data.fold or 1, seed=seed)
    if data.test is not None:
        test, more = _read_split(task, data, data.test, "test", bad)
        files += more
    if not train:
        raise GmaskError(f"{data.resolve(data.train)}: validation takes all samples, and none is left to train on")
    for samples in (validation, test):
        if samples and task.metrics and is_answered(samples[0], task.kind):
            check_metrics(task.metrics, samples[0], task.kind)
    return Splits(train, validation, test, files, len(bad))


def hold_out(samples: Sequence[Sample], share: float, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Sets a share of the samples aside, at least one record; returns the rest, and those."""
    units = _shuffled_units(samples, seed)
    held = set(units[: max(1, round(share * len(units)))])
    return _divide(samples, held)


def take_fold(samples: Sequence[Sample], folds: int, fold: int, *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Sets one of several folds aside, counted from 1; returns the rest, and the fold. A record is in exactly one fold.

    Raises:
        GmaskError: fewer records than folds.
    """
    units = _shuffled_units(samples, seed)
    if len(units) < folds:
        raise GmaskError(f"data.folds is {folds}, but there are only {len(units)} records")
    return _divide(samples, set(units[fold - 1 :: folds]))


def _read_split(
    task: Task, data: TuningDataSettings, pattern: str, split: str, bad: list[GmaskError]
) -> tuple[list[Sample], list[DataFile]]:
    """The samples of a split and their files; errors that the recipe lets pass are added to ``bad``."""
    path_or_glob = data.resolve(pattern)
    on_bad = bad.append if data.skip_bad_lines else None
    records = read_records(path_or_glob, limit=data.limit, on_bad=on_bad)
    samples = task.samples(records, require_answers=split != "test", on_bad=on_bad)
    counts = Counter(sample.path for sample in samples)
    files = [path for path in find_files(path_or_glob) if path.suffix != ".target"]
    found = [DataFile(split, path.name, counts[path], hash_file(path)) for path in files]
    return samples, found


def _unit(sample: Sample, index: int) -> Unit:
    return (index,) if sample.path is None else (sample.path, sample.line)


def _shuffled_units(samples: Sequence[Sample], seed: int) -> list[Unit]:
    """Each unit once, in random order."""
    units = list(dict.fromkeys(_unit(sample, index) for index, sample in enumerate(samples)))
    return [units[index] for index in np.random.default_rng([seed, 1]).permutation(len(units))]


def _divide(samples: Sequence[Sample], held: set[Unit]) -> tuple[list[Sample], list[Sample]]:
    """The samples whose units are not in ``held``, and those whose units are."""
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for index, sample in enumerate(samples):
        parts[_unit(sample, index) in held].append(sample)
    return parts


@dataclass(frozen=True, slots=True, eq=False)
class Example(InfillingExample):
    """A context and its answers, or its candidates. An answer sees the answers before it, a candidate no other one.

    The labels of a GLM are at the positions that predict them; those of a ChatGLM are one position later, and its model
    shifts them. The published tuning of ChatGLM also taught its ``<sop>``, which is never predicted.
    """

    pieces: IntArray  # [T]: 0 in the context, n in the n-th answer or candidate
    choice: int | None = None  # the right candidate, or the class

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.input_ids)


@dataclass(slots=True)
class TruncationCounts:
    """Counts of what was cut from samples."""

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
    """One answer or candidate."""

    position: int  # of its blank in the context
    ids: tuple[int, ...]
    end: int  # the label behind the last token, or NOT_SCORED


class SampleEncoder:
    """Encodes the samples of one kind for models of one config.

    Args:
        max_source: tokens of a context, blanks and control tokens counted.
        max_target: positions of an answer: its ``<sop>`` and its tokens; of a ChatGLM also its ``<eop>``, which is an
            input there. Longer answers are cut, and end there, as published. Candidates are not cut, since they are
            compared as a whole. A document of a language model becomes several pieces, of which the last has an end.
        truncation: where a text that is too long is cut; see `SampleReader`.

    Raises:
        GmaskError: limits beyond the positions of the model, or a kind that it cannot do.
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
        self.truncated = TruncationCounts()

    def encode(self, sample: Sample) -> Example:
        """The only example of a sample. Documents, and choices with several right candidates, need `encode_all`.

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
        context, answers, positions = question.context, question.answers, question.context.blanks
        if self.kind == "classification":
            return [self._join(context, [], choice=_known_label(sample, None))]
        if not answers:
            raise GmaskError("the sample has no answer, so that nothing can be learnt from it")
        if self.kind in CHOICES:
            return [self._join_candidates(question, right, kept) for right, kept in _comparisons(sample)]
        if self.kind != "infill" and len(answers) > 1:
            raise GmaskError(f"{self.kind} takes one answer, but the sample has {len(answers)}")
        if self.kind == "language-model":
            return [self._join(context, [piece]) for piece in self._cut_document(positions[0], answers[0])]
        eop = self.reader.special.eop
        pieces = [Piece(position, ids[: self.longest], eop) for position, ids in zip(positions, answers, strict=True)]
        return [self._join(context, pieces)]

    def _join_candidates(self, question: ReadSample, right: int, kept: Sequence[int]) -> Example:
        """The context and the candidates ``kept``, of which one is right."""
        position = question.context.blanks[0]
        candidates = [Piece(position, question.answers[index], NOT_SCORED) for index in kept]
        return self._join(question.context, candidates, choice=kept.index(right))

    def _cut_document(self, position: int, ids: tuple[int, ...]) -> list[Piece]:
        """The pieces of a document, each the answer to a blank. Only the last is taught to end."""
        if not ids:
            raise GmaskError("the document is empty, so that nothing can be learnt from it")
        starts = range(0, len(ids), self.longest)
        pieces = [Piece(position, ids[start : start + self.longest], NOT_SCORED) for start in starts]
        return [*pieces[:-1], replace(pieces[-1], end=self.reader.special.eop)]

    def _join(self, context: Context, pieces: Sequence[Piece], *, choice: int | None = None) -> Example:
        """The example of a context, followed by ``<sop> answer`` for each piece."""
        ids, labels = list(context.ids), [NOT_SCORED] * len(context.ids)
        positions, answer_positions, numbers = list(range(len(ids))), [0] * len(ids), [0] * len(ids)
        for number, piece in enumerate(pieces, start=1):
            piece_ids, piece_labels = self._lay_out(piece)
            ids += piece_ids
            labels += piece_labels
            positions += [piece.position] * len(piece_ids)
            answer_positions += range(1, len(piece_ids) + 1)
            numbers += [number] * len(piece_ids)
        return Example(
            input_ids=np.array(ids, np.int64),
            labels=np.array(labels, np.int64),
            layout=np.array((positions, answer_positions), np.int64),
            context_length=len(context.ids),
            objective=self.kind,
            pieces=np.array(numbers, np.int64),
            choice=choice,
        )

    def _lay_out(self, piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of a piece, and their labels. Shifted labels need one more position, for the end."""
        sop = self.reader.special.sop
        if not self.shifts_labels:
            return (sop, *piece.ids), (*piece.ids, piece.end)
        end = () if piece.end == NOT_SCORED else (piece.end,)
        return (sop, *piece.ids, *end), (NOT_SCORED, *piece.ids, *end)


def _comparisons(sample: Sample) -> list[tuple[int, list[int]]]:
    """For each right candidate of a sample: its index, and the indices to compare, which are it and the wrong ones.

    Source: THUDM/GLM tasks/superglue, where ReCoRD gives an example for each right entity.
    """
    label = _known_label(sample, len(sample.answers))
    right = [index for index, text in enumerate(sample.answers) if index == label or text in sample.references]
    wrong = [index for index in range(len(sample.answers)) if index not in right]
    return [(index, sorted((index, *wrong))) for index in right]


def _known_label(sample: Sample, choices: int | None) -> int:
    """The label of a sample. Raises `GmaskError` if there is none, or no such choice."""
    if sample.label is None:
        raise GmaskError("the sample has no label, so that nothing can be learnt from it")
    if sample.label < 0 or (choices is not None and sample.label >= choices):
        raise GmaskError(f"the label is {sample.label}, but there are {choices} candidates, counted from 0")
    return sample.label


PackedRow = tuple[Example, ...]
"""Examples that share a row and do not see one another."""

BatchItem = Example | PackedRow
"""The content of a row of a batch: an example, or several that are packed."""

Batch = dict[str, Tensor]
OPEN_ROWS = 64
"""Rows that `pack_examples` keeps open. More would hardly save tokens."""


def pack_examples(examples: Sequence[Example], *, row_length: int) -> list[PackedRow]:
    """Packs examples into rows of at most ``row_length`` tokens, each into the fullest open row that has room for it.

    Packing is exact: the loss of an example is the same as in a row of its own.

    Raises:
        GmaskError: an example that is longer than a row.
    """
    rows: list[list[Example]] = []
    room: dict[int, int] = {}  # of the open rows, in the order in which they were opened
    for example in examples:
        if example.length > row_length:
            raise GmaskError(f"an example has {example.length} tokens, a row {row_length}: raise it, or do not pack")
        fitting = [row for row, free in room.items() if free >= example.length]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
        else:
            row = len(rows)
            rows.append([])
            room[row] = row_length
            if len(room) > OPEN_ROWS:
                del room[min(room, key=lambda row: room[row])]
        rows[row].append(example)
        if row in room:
            room[row] -= example.length
    return [tuple(row) for row in rows]


def find_collator(kind: TaskKind, *, pad_id: int) -> Callable[[Sequence[BatchItem]], Batch]:
    """The function that makes batches of the examples of a kind: one of those below."""
    if kind == "classification":
        return lambda items: collate_classes(items, pad_id=pad_id)
    if kind in CHOICES:
        return lambda items: collate_choices(items, pad_id=pad_id)
    return lambda items: collate_tokens(items, pad_id=pad_id)


def collate_tokens(items: Sequence[BatchItem], *, pad_id: int) -> Batch:
    """One row an item, padded on the left: then all answers are in the last columns, and the head computes only those.

    Returns:
        int64 tensors: ``input_ids [B, T]``; ``labels [B, T]`` as the model takes them, -100 where nothing is taught;
        ``layout [B, 2, T]``; ``sequence_ids [B, T]``, 0, 1, ... along a row and -1 at padding.
    """
    rows = [(item,) if isinstance(item, Example) else item for item in items]
    return _align_right(collate(rows, row_length=None, pad_id=pad_id), _lengths(rows))


def collate_choices(items: Sequence[BatchItem], *, pad_id: int) -> Batch:
    """One row a sample, padded on the left: its context once, and behind it all of its candidates.

    Returns:
        int64 tensors: ``input_ids``, ``labels``, ``layout`` as of `collate_tokens`; ``pieces [B, T]``, 0 in the
        context, n in the n-th candidate and -1 at padding; ``choice [B]``, the index of the right candidate.
    """
    examples = _flatten(items)
    batch = collate([(example,) for example in examples], row_length=None, pad_id=pad_id)
    pieces = batch.pop("sequence_ids")  # 0 in a row, -1 at padding
    for row, example in zip(pieces, examples, strict=True):
        row[: example.length] = torch.from_numpy(example.pieces)
    return _align_right({**batch, "pieces": pieces}, _lengths(examples)) | {"choice": _choices(examples)}


def collate_classes(items: Sequence[BatchItem], *, pad_id: int) -> Batch:
    """One row a sample, padded on the right: ``input_ids``, ``attention_mask [B, T]``, ``layout``, ``choice``."""
    examples = _flatten(items)
    batch = collate([(example,) for example in examples], row_length=None, pad_id=pad_id)
    mask = (batch["sequence_ids"] >= 0).long()
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": mask,
        "layout": batch["layout"],
        "choice": _choices(examples),
    }


def _flatten(items: Sequence[BatchItem]) -> list[Example]:
    """The examples of all items."""
    return [item for row in items for item in ((row,) if isinstance(row, Example) else row)]


def _lengths(rows: Sequence[BatchItem]) -> list[int]:
    return [sum(example.length for example in _flatten([row])) for row in rows]


def _choices(examples: Sequence[Example]) -> Tensor:
    return torch.from_numpy(np.array([example.choice for example in examples], dtype=np.int64))


def _align_right(batch: Batch, lengths: Sequence[int]) -> Batch:
    """Moves the padding of all rows from the right to the left."""
    width = batch["input_ids"].shape[-1]
    return {
        name: torch.stack([row.roll(width - length, -1) for row, length in zip(values, lengths, strict=True)])
        for name, values in batch.items()
    }


class BatchOrder:
    """The indices of the samples in each pass of one process, for a whole run; a pure function of its arguments.

    The samples come in an endless sequence of epochs, each shuffled anew. Every step takes the next
    ``batch_size * accumulation`` of them, across the end of an epoch if need be. The processes share the samples of a
    step, so that a step is the same for any number of processes. A resumed run begins `after` the steps that are done.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        steps: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        length_grouped: bool = False,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        """
        Args:
            lengths: of the samples, in tokens.
            batch_size: samples of one pass, at most.
            accumulation: passes of a step, if there is one process.
            length_grouped: samples of similar length come in the same step, and in the same pass.

        Raises:
            GmaskError: the samples of a step cannot be shared evenly.
        """
        self.lengths, self.steps, self.seed, self.length_grouped = lengths, steps, seed, length_grouped
        self.process, self.processes = process, processes
        self.samples_per_step = batch_size * accumulation
        self.passes = -(-accumulation // processes)
        if self.samples_per_step % processes:
            raise GmaskError(
                f"a step of {self.samples_per_step} samples cannot be shared by {processes} processes: make "
                f"optimization.batch_size x optimization.accumulation a multiple of {processes}"
            )

    def __len__(self) -> int:
        """The number of passes of this process in the whole run."""
        return self.steps * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        return self.after(0)

    def after(self, step: int) -> Iterator[list[int]]:
        """The passes of the steps after ``step``."""
        stream = self._stream(step * self.samples_per_step)
        for _ in range(step, self.steps):
            samples = list(islice(stream, self.samples_per_step))
            if self.length_grouped:
                samples.sort(key=lambda sample: -self.lengths[sample])
            mine = samples[self.process :: self.processes]
            yield from (part.tolist() for part in np.array_split(mine, self.passes))

    def _stream(self, start: int) -> Iterator[int]:
        epoch, begun = divmod(start, len(self.lengths))
        while True:
            yield from self._epoch(epoch)[begun:]
            epoch, begun = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[int]:
        (state,) = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state))
        if self.length_grouped:
            grouped: list[int] = get_length_grouped_indices(
                list(self.lengths), self.samples_per_step, generator=generator
            )
            return grouped
        return torch.randperm(len(self.lengths), generator=generator).tolist()


def steps_of(epochs: float, samples: int, *, samples_per_step: int) -> int:
    """The number of steps in which every sample is seen ``epochs`` times; the last step may see a few once more."""
    return max(1, int(np.ceil(epochs * samples / samples_per_step)))
