"""Losses as sums, and the objective of each kind of task.

A loss function returns a sum in nats, float32, and the number of tokens or samples that it sums over. The training loop
divides once, by the number in all batches and processes of a step. The functions call the model as a whole, so that its
wrapper (DDP, FSDP) sees the call.

Shape letters: B rows, T positions, n positions that have a target, V vocabulary, C candidates.
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
from gmask.training.examples import BatchItem, Example, SampleEncoder, find_collator, pack_examples

LossFunction = Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, int]]
CandidateNormalization = Literal["sum", "mean"]
"""The log-probability of a candidate: the sum over its tokens, or their mean."""


def find_loss(kind: TaskKind, *, normalization: CandidateNormalization = "sum") -> LossFunction:
    """The loss function of a kind of task; ``normalization`` is that of candidates.

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
    model: nn.Module, batch: Mapping[str, Tensor], *, normalization: CandidateNormalization = "sum"
) -> tuple[Tensor, int]:
    """The cross-entropy of the right candidates of a batch of `collate_choices`, and the number of samples.

    The log-probabilities of the candidates serve as logits; gradients flow through all of them.

    Source: THUDM/GLM finetune_glm.py, multi-token cloze.
    """
    values = choice_logprobs(model, batch, normalization=normalization)
    return F.cross_entropy(values, batch["choice"], reduction="sum"), len(values)


def choice_logprobs(
    model: nn.Module, batch: Mapping[str, Tensor], *, normalization: CandidateNormalization = "sum"
) -> Tensor:
    """The log-probabilities ``[B, C]`` of the candidates of a batch of `collate_choices`, without their ends.

    A row with fewer candidates has -inf behind its last one. The context is read once: every candidate sees it and
    itself, and no other candidate.
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
    """The attention mask ``[B, 1, T, T]`` of ``pieces [B, T]``, 1 = visible.

    A token sees the context, and the tokens before it in its own candidate. Padding sees padding, so that no row of the
    mask is empty.
    """
    query, key = pieces[:, :, None], pieces[:, None, :]
    own = (query == key).tril()
    return ((query >= 0) & (key == 0) | own)[:, None].to(torch.int8)  # ChatGLM reads True of a boolean one as hidden


def _predict(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[n, V]`` and targets ``[n]`` of the positions that have one, and the mask ``[B, T]`` of these."""
    config: Any = getattr(model, "module", model).config  # DDP's wrapper has no config
    targets = labels if isinstance(config, GLMConfig) else F.pad(labels[:, 1:], (0, 1), value=NOT_SCORED)
    scored = targets != NOT_SCORED
    if not scored.any():
        raise GmaskError("a batch has no token to learn: all of its labels are masked")
    logits = model(**inputs, use_cache=False, logits_to_keep=scored).logits
    return logits, targets[scored], scored


@dataclass(frozen=True, slots=True)
class EncodedSamples:
    """EncodedSamples samples as items of batches, and the samples that each item was made of."""

    items: Sequence[BatchItem]
    sources: Sequence[Sequence[Sample]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item."""
        return [sum(example.length for example in examples_of(item)) for item in self.items]

    @property
    def labelled(self) -> list[int]:
        """Labelled tokens of each item."""
        return [sum(int((part.labels != NOT_SCORED).sum()) for part in examples_of(item)) for item in self.items]

    def describe(self, number: int) -> str:
        """The files and lines of the samples of an item."""
        return ", ".join(f"{sample.path}:{sample.line}" for sample in self.sources[number])


class TaskObjective:
    """The encoding, the collator and the loss of a kind of task, for models of one config."""

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

    def encode(self, samples: Sequence[Sample]) -> EncodedSamples:
        """The items of samples: one for each, several for a long document, fewer if they are packed.

        Raises:
            GmaskError: a sample that cannot be read or teaches nothing, with file and line.
        """
        pairs = [(example, sample) for sample in samples for example in self.encoder.encode_all([sample])]
        if self.packing is None:
            return EncodedSamples([example for example, _ in pairs], [[sample] for _, sample in pairs])
        if self.kind in LABELLED:
            raise GmaskError(f"data.packing is for tasks that write, and a {self.kind} chooses: leave it out")
        origins = {id(example): sample for example, sample in pairs}
        rows = pack_examples([example for example, _ in pairs], row_length=self.packing)
        return EncodedSamples(rows, [[origins[id(example)] for example in row] for row in rows])


def count_items(batch: Mapping[str, Tensor]) -> int:
    """The number of terms in the loss of a batch: labelled tokens, or samples if candidates or classes are compared."""
    return len(batch["choice"]) if "choice" in batch else int((batch["labels"] != NOT_SCORED).sum())


def examples_of(item: BatchItem) -> tuple[Example, ...]:
    return (item,) if isinstance(item, Example) else item
