"""Embeddings of texts: pooled hidden states.

Shape letters: B texts of a batch, T positions, H hidden size, N texts, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.encoding import Context, TextReader, list_texts
from gmask.generation.padding import batches_by_length, check_numbers, stack_contexts
from gmask.models.glm import GLMForConditionalGeneration

Pooling = Literal["mean", "first", "last", "mask"]
"""The hidden states that are pooled; see `embed`."""

Vectors = npt.NDArray[np.float32]


def embed(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    pooling: Pooling = "mean",
    layer: int = -1,
    normalize: bool = True,
    truncate: bool = False,
    batch_size: int = 16,
) -> Vectors:
    """Returns the hidden states of texts, pooled into one vector for each: float32 ``[N, H]``.

    A text is read as `infill` reads it, in both directions: ``[CLS] text <|endoftext|>``. It may have blanks, but needs
    none; ``\\[MASK]`` is the text "[MASK]".

    A model that fills blanks was not trained to put similar texts near each other. These vectors are features to train
    on rather than sentence vectors to search with: docs/how-to/embed.md has measurements.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        pooling: ``"mean"`` of all tokens, ``[CLS]`` and ``<|endoftext|>`` included; ``"first"``, which is ``[CLS]``;
            ``"last"``, which is ``<|endoftext|>``, or ``[gMASK]`` in a text that ends with it; ``"mask"``, the first
            blank; a text without one gets a ``[MASK]`` at its end.
        layer: whose hidden states: -1 is the last one, behind the final norm, which the head reads; -2 to -L, or 1 to
            L - 1, an earlier layer; 0 the embeddings.
        normalize: to Euclidean length 1, so that a dot product is a cosine.
        truncate: cut texts that are longer than the model has positions, at their end, instead of refusing them.
        batch_size: texts that are read together; results are those of single runs.

    Raises:
        GmaskError: a text with an unknown special token, or too long; an unknown pooling; no such layer.
    """
    if isinstance(texts, str):
        raise GmaskError("embed takes a list of texts, not one text: write [text]")
    embedder = Embedder(model, tokenizer, pooling, layer, normalize, truncate, batch_size)
    return embedder.embed([embedder.read(text) for text in list_texts(texts)])


@dataclass(frozen=True)
class Embedder:
    """A model, its tokenizer and the settings of embedding; arguments and errors as in `embed`."""

    model: GLMForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling = "mean"
    layer: int = -1
    normalize: bool = True
    truncate: bool = False
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise GmaskError(f"pooling must be one of {', '.join(get_args(Pooling))}, not {self.pooling!r}")
        layers = self.model.config.num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise GmaskError(f"layer must be from {-layers - 1} to {layers} in this model, not {self.layer}")
        if self.batch_size < 1:
            raise GmaskError(f"batch_size must be at least 1, not {self.batch_size}")

    @cached_property
    def reader(self) -> TextReader:
        return TextReader(self.tokenizer, self.model.config.prompt_ids)

    def read(self, text: str) -> Context:
        """Encodes a text, and cuts it if ``truncate`` says so; refuses one that does not fit the model."""
        positions = self.model.config.max_position_embeddings
        if self.truncate:
            context = self.reader.read_any(text, most=positions).context
        else:
            context = self.reader.read_any(text, positions=positions).context
        tail = 1  # tokens that stay when the text is cut
        if self.pooling == "mask" and not context.blanks:
            *ids, end = context.ids
            context, tail = Context((*ids, self.reader.special.mask, end), (len(ids),)), 2
        if self.truncate and len(context.ids) > positions:
            context = _cut(context, positions, tail)
        context.check_length(positions)
        if self.pooling == "mask" and not context.blanks:
            raise GmaskError(f"the blank is beyond the {positions} positions of the model: shorten the text before it")
        return context

    def embed(self, contexts: Sequence[Context]) -> Vectors:
        """The vectors ``[N, H]`` of contexts that were read by this embedder."""
        vectors = np.empty((len(contexts), self.model.config.hidden_size), np.float32)
        for batch in batches_by_length([len(context.ids) for context in contexts], self.batch_size):
            vectors[batch] = self._embed_batch([contexts[index] for index in batch]).cpu().numpy()
        return vectors

    def _embed_batch(self, contexts: Sequence[Context]) -> Tensor:
        input_ids, layout, is_real = stack_contexts(contexts, pad=self.reader.special.pad)
        device = self.model.device
        with torch.inference_mode():
            outputs = self.model.glm(
                input_ids=input_ids.to(device),
                layout=layout.to(device),
                attention_mask=None if is_real is None else is_real.to(device),
                use_cache=False,
                output_hidden_states=[self.layer],
            )
            weights = self._weigh(contexts, width=input_ids.shape[1]).to(device)
            pooled = (weights[:, None] @ outputs.hidden_states[self.layer].float())[:, 0]
            check_numbers(pooled)
            return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def _weigh(self, contexts: Sequence[Context], *, width: int) -> Tensor:
        """Returns the pooling weight of each token ``[B, T]``; rows sum to 1, and padding has 0."""
        weights = torch.zeros(len(contexts), width)
        for row, context in enumerate(contexts):
            start = width - len(context.ids)  # padding is on the left
            if self.pooling == "mean":
                weights[row, start:] = 1 / len(context.ids)
            elif self.pooling == "first":
                weights[row, start] = 1
            elif self.pooling == "last":
                weights[row, -1] = 1
            else:
                weights[row, start + context.blanks[0]] = 1
        return weights


def _cut(context: Context, length: int, tail: int) -> Context:
    """Returns the context cut to ``length`` tokens, the last ``tail`` of which are its last ones."""
    kept, surplus = length - tail, len(context.ids) - length
    positions = [index if index < kept else index - surplus for index in context.blanks]
    stays = [index < kept or index >= len(context.ids) - tail for index in context.blanks]
    return Context(
        context.ids[:kept] + context.ids[-tail:],
        tuple(position for position, stay in zip(positions, stays, strict=True) if stay),
    )


def as_floats(vector: Vectors) -> list[float]:
    """Returns a float32 vector as numbers whose shortest decimals are those of its float32 values."""
    return [float(str(value)) for value in vector]
