"""What is a model fitted to by the samples of a kind: how are they encoded, and what is their loss?"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.infilling.blanks import NOT_SCORED
from gmask.tasks.recipes.tuning import TuningDataSettings
from gmask.tasks.samples import LABELLED, Sample, TaskKind
from gmask.training.tuning.batches import Batch, Row, find_collator, pack
from gmask.training.tuning.examples import Example, SampleEncoder
from gmask.training.tuning.losses import find_loss

Item = Example | Row
"""What takes a row of a batch: an example, or several that are packed."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Items, and the samples that each was made of."""

    items: Sequence[Item]
    sources: Sequence[Sequence[Sample]]

    @property
    def lengths(self) -> list[int]:
        """In tokens."""
        return [sum(example.length for example in examples_of(item)) for item in self.items]

    @property
    def labelled(self) -> list[int]:
        """Tokens of each item that something is learnt from."""
        return [sum(int((part.labels != NOT_SCORED).sum()) for part in examples_of(item)) for item in self.items]

    def describe(self, number: int) -> str:
        """Where an item was read."""
        return ", ".join(f"{sample.path}:{sample.line}" for sample in self.sources[number])


class Objective:
    """The encoding and the loss of a kind of task, for models of one config."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        kind: TaskKind,
        data: TuningDataSettings,
    ) -> None:
        self.kind, self.packing = kind, data.packing
        self.encoder = SampleEncoder(
            tokenizer,
            config,
            kind,
            max_source=data.max_source,
            max_target=data.max_target,
            truncation=data.truncation,
        )
        self.collate = find_collator(kind, pad_id=self.encoder.reader.special.pad)
        self.loss = find_loss(kind)

    def encode(self, samples: Sequence[Sample]) -> Encoded:
        """The items of samples: one for each, several for a long document, fewer if they are packed.

        Raises:
            GmaskError: a sample that cannot be read or teaches nothing, with file and line.
        """
        pairs = [(example, sample) for sample in samples for example in self.encoder.encode_all([sample])]
        if self.packing is None:
            return Encoded([example for example, _ in pairs], [[sample] for _, sample in pairs])
        if self.kind in LABELLED:
            raise GmaskError(f"data.packing is for tasks that write, and a {self.kind} chooses: leave it out")
        origins = {id(example): sample for example, sample in pairs}
        rows = pack([example for example, _ in pairs], row_length=self.packing)
        return Encoded(rows, [[origins[id(example)] for example in row] for row in rows])


def count_items(batch: Batch) -> int:
    """By how many its loss is divided: labelled tokens, or samples where candidates or classes are compared."""
    return len(batch["choice"]) if "choice" in batch else int((batch["labels"] != NOT_SCORED).sum())


def examples_of(item: Item) -> Row:
    return (item,) if isinstance(item, Example) else item
