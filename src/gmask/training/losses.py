"""Losses as sums, and the objective that a kind of task is fitted to.

Each function returns a sum in nats, float32, and how many tokens or samples it goes over: whoever divides, over
however many batches and processes, then has the mean of all of them. The models are called as a whole, so that a
wrapper of theirs (DDP, FSDP) sees the call.

Shape letters: B rows, T positions, n of them that predict something, V vocabulary, C candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.infilling.blanks import NOT_SCORED
from gmask.models.glm import GLMConfig
from gmask.recipes.tuning import TuningDataSettings
from gmask.tasks.records import CHOICES, LABELLED, Sample, TaskKind
from gmask.training.examples import Example, Row, SampleEncoder, find_collator, pack

Loss = Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, int]]
Normalization = Literal["sum", "mean"]
"""What is made of a candidate's log-probability: the sum over its tokens, or their mean."""


def find_loss(kind: TaskKind, *, normalization: Normalization = "sum") -> Loss:
    """The loss that a kind of task is trained with; ``normalization`` is of candidates.

    Raises:
        GmaskError: another normalization.
    """
    if normalization not in ("sum", "mean"):
        raise GmaskError(f"normalization must be sum or mean in training, not {normalization!r}")
    if kind == "classification":
        return class_loss
    return partial(choice_loss, normalization=normalization) if kind in CHOICES else token_loss


def token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The cross-entropy of all labelled tokens of a batch of `collate_tokens`, and their number.

    Raises:
        GmaskError: no token is labelled.
    """
    inputs = {name: batch[name] for name in ("input_ids", "layout", "sequence_ids")}
    logits, targets, _ = _predict(model, inputs, batch["labels"])
    return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def choice_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, normalization: Normalization = "sum"
) -> tuple[Tensor, int]:
    """The cross-entropy of the right candidates of a batch of `collate_choices`, and the number of samples.

    The candidates' log-probabilities are taken for logits; gradients go through all of them.

    Source: THUDM/GLM finetune_glm.py, multi-token cloze.
    """
    values = choice_logprobs(model, batch, normalization=normalization)
    return F.cross_entropy(values, batch["choice"], reduction="sum"), len(values)


def choice_logprobs(model: nn.Module, batch: Mapping[str, Tensor], *, normalization: Normalization = "sum") -> Tensor:
    """The log-probability ``[B, C]`` of each candidate of `collate_choices`, without its end; -inf where there is none.

    The context is read once: every candidate sees it, and itself, and no other one.
    """
    pieces = batch["pieces"]
    inputs = {"input_ids": batch["input_ids"], "layout": batch["layout"], "attention_mask": piece_mask(pieces)}
    logits, targets, scored = _predict(model, inputs, batch["labels"])
    logprobs = -F.cross_entropy(logits.float(), targets, reduction="none")
    rows, width = len(pieces), int(pieces.max())
    cells = scored.nonzero()[:, 0] * width + pieces[scored] - 1
    sums = logprobs.new_zeros(rows * width).index_add(0, cells, logprobs)
    counts = torch.bincount(cells, minlength=rows * width)
    if normalization == "mean":
        sums = sums / counts.clamp(min=1)
    return sums.masked_fill(counts == 0, -torch.inf).view(rows, width)


def class_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The cross-entropy of the classes of a batch of `collate_classes`, and the number of samples.

    Raises:
        GmaskError: a class that the model does not have.
    """
    labels = batch["choice"]
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "layout")}).logits
    if int(labels.max()) >= logits.shape[-1]:
        raise GmaskError(f"the label {int(labels.max())} is not one of the {logits.shape[-1]} classes of this model")
    return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)


def piece_mask(pieces: Tensor) -> Tensor:
    """What a token of ``pieces [B, T]`` sees, ``[B, 1, T, T]`` with 1 = visible: the context, and what precedes it in
    its own candidate. Padding sees padding, so that no row of the mask is empty."""
    query, key = pieces[:, :, None], pieces[:, None, :]
    own = (query == key).tril()
    return ((query >= 0) & (key == 0) | own)[:, None].to(torch.int8)  # a boolean one would mean the opposite to ChatGLM


def _predict(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[n, V]`` of the positions that have a target, the targets ``[n]``, and where they are, ``[B, T]``."""
    config: Any = getattr(model, "module", model).config  # a wrapper has none
    targets = labels if isinstance(config, GLMConfig) else F.pad(labels[:, 1:], (0, 1), value=NOT_SCORED)
    scored = targets != NOT_SCORED
    if not scored.any():
        raise GmaskError("a batch has no token to learn: all of its labels are masked")
    logits = model(**inputs, use_cache=False, logits_to_keep=scored).logits
    return logits, targets[scored], scored


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


def count_items(batch: Mapping[str, Tensor]) -> int:
    """By how many its loss is divided: labelled tokens, or samples where candidates or classes are compared."""
    return len(batch["choice"]) if "choice" in batch else int((batch["labels"] != NOT_SCORED).sum())


def examples_of(item: Item) -> Row:
    return (item,) if isinstance(item, Example) else item
