"""How well does a model predict the hidden parts of held-out texts?"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gmask.infilling.blanks import NOT_SCORED, BlankTokens, InfillingExample, IntArray
from gmask.infilling.collator import collate
from gmask.infilling.objectives import OBJECTIVES, Mixture, Objective
from gmask.models.glm import GLMForConditionalGeneration

BATCH = 8  # examples of one forward pass
MARGIN = 4  # positions kept free: hiding moves places on by two at most


@dataclass(frozen=True, slots=True)
class Loss:
    """Cross-entropy of the hidden tokens, end tokens included."""

    nats_per_token: float
    bits_per_character: float  # of the hidden text
    tokens: int  # labelled


@dataclass(frozen=True, slots=True)
class HeldOutTokens:
    """The documents of one source as ids [L] without `[CLS]` and end-of-text, and their characters."""

    documents: Sequence[IntArray]
    characters: int

    @property
    def characters_per_token(self) -> float:
        return self.characters / sum(map(len, self.documents))


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> HeldOutTokens:
    """Special tokens spelt out in a text are text here."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
    documents = [np.array(encoding.ids, np.int64) for encoding in encodings]
    return HeldOutTokens(documents, sum(map(len, texts)))


@torch.no_grad()
def measure_losses(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Mapping[str, HeldOutTokens],
    mixture: Mixture,
    *,
    max_tokens: int,
    seed: int,
    longest: int | None = None,
) -> dict[str, dict[str, Loss]]:
    """The loss of every source and objective, on pieces and blanks that depend on nothing but `seed`.

    longest: tokens of a piece; as many as the model has positions for, if not given.
    max_tokens: of each source, from its first documents. Objectives without a share in the mixture are left out.
    """
    objectives = [objective for objective in OBJECTIVES if getattr(mixture, objective) > 0]
    limit = min(longest or sys.maxsize, model.config.max_position_embeddings - MARGIN)
    losses: dict[str, dict[str, Loss]] = {}
    for name, tokens in heldout.items():
        pieces = list(_cut_pieces(tokens.documents, mixture.special, longest=limit, max_tokens=max_tokens))
        losses[name] = {}
        for number, objective in enumerate(objectives):
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
            loss = _measure_loss(model, tokenizer, pieces, mixture, objective, rng=rng)
            if loss is not None:
                losses[name][objective] = loss
    return losses


def _measure_loss(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[IntArray],
    mixture: Mixture,
    objective: Objective,
    *,
    rng: np.random.Generator,
) -> Loss | None:
    """None where nothing can be hidden in any piece."""
    drawn = [mixture.sample(piece, rng, objective) for piece in pieces]
    examples = sorted((example for example in drawn if example is not None), key=lambda e: len(e.input_ids))
    if not examples:
        return None
    nats, tokens = 0.0, 0
    for start in range(0, len(examples), BATCH):
        batch = collate([[e] for e in examples[start : start + BATCH]], row_length=None, pad_id=mixture.special.pad)
        scores = model.token_losses(**{key: tensor.to(model.device) for key, tensor in batch.items()})
        nats += float(scores.double().sum())
        tokens += len(scores)
    characters = sum(_count_characters(example, tokenizer) for example in examples)
    return Loss(nats / tokens, nats / math.log(2) / max(characters, 1), tokens)


def _count_characters(example: InfillingExample, tokenizer: PreTrainedTokenizerBase) -> int:
    hidden = example.labels[example.labels != NOT_SCORED]
    return len(tokenizer.decode(hidden.tolist(), skip_special_tokens=True))


def _cut_pieces(
    documents: Sequence[IntArray], special: BlankTokens, *, longest: int, max_tokens: int
) -> Iterator[IntArray]:
    """`[CLS] document <eos>`, cut every `longest` tokens, until `max_tokens` are out."""
    left = max_tokens
    for document in documents:
        whole = np.concatenate(([special.cls], document, [special.eos]))
        for start in range(0, len(whole), longest):
            if left <= 0:
                return
            piece = whole[start : start + min(longest, left)]
            left -= len(piece)
            if len(piece) > 2:  # the shortest text that every objective can hide something in
                yield piece
