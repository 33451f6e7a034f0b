"""The objectives that a GLM is pretrained on, and their mixture.

There are three: short spans (token), whole sentences (sentence) and a long span (document). Not offered are
`encoder_decoder`, in which the published code always stops with an error, `masked_lm`, BERT's objective, and sentinel
masks, which no published model was trained with.
"""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt

from gmask.errors import GmaskError
from gmask.infilling.blanks import (
    BlankTokens,
    InfillingExample,
    IntArray,
    blank_out,
    cut_suffix,
    hide_answers,
    hide_context,
)
from gmask.infilling.spans import (
    BoolArray,
    choose_sentences,
    draw_span_lengths,
    find_documents,
    find_sentences,
    place_in_documents,
    widen_to_words,
)

Objective = Literal["token", "sentence", "document"]
OBJECTIVES: tuple[Objective, ...] = ("token", "sentence", "document")


def token_infilling(
    tokens: npt.ArrayLike,
    *,
    special: BlankTokens,
    rng: np.random.Generator,
    ratio: float = 0.15,
    mean_span_length: float = 3.0,
    single_span: bool = False,
    word_edges: BoolArray | None = None,
    shuffle: bool = True,
) -> InfillingExample | None:
    """Hides spans of Poisson lengths that hold `ratio` of the text, or one such span (`single_span`).

    Args:
        tokens: [L], a row: `[CLS] text <eos>`, several such documents, or a piece of one.
        word_edges: [2, V] of `spans.mark_word_edges`; spans are widened to whole words.

    Returns:
        None where nothing can be hidden: the text is too short, or its spans do not fit (dropped as published).
    """
    row = np.asarray(tokens, np.int64)
    total = 1 if single_span else int(ratio * len(row))
    lengths = draw_span_lengths(total, mean=mean_span_length, rng=rng)
    if not len(lengths):
        return None
    spans = place_in_documents(lengths, find_documents(row, special=special), ratio=ratio, rng=rng)
    if spans is None:
        return None
    if word_edges is not None:
        spans = widen_to_words(spans, row, word_edges)
    order = rng.permutation(len(spans)) if shuffle else None
    return blank_out(row, spans, mask=special.mask, special=special, objective="token", order=order)


def sentence_infilling(
    tokens: npt.ArrayLike,
    *,
    special: BlankTokens,
    sentence_ends: BoolArray,
    rng: np.random.Generator,
    ratio: float = 0.15,
    shuffle: bool = True,
) -> InfillingExample | None:
    """Hides whole sentences that hold `ratio` of the text, each behind a `[sMASK]`.

    Args:
        tokens: [L], a row.
        sentence_ends: [V] of `spans.mark_sentence_ends`, true for the ids that end a sentence.

    Returns:
        None where the row has no sentence.
    """
    row = np.asarray(tokens, np.int64)
    sentences = find_sentences(row, sentence_ends=sentence_ends, special=special)
    if not len(sentences):
        return None
    spans = choose_sentences(sentences, int(ratio * len(row)), rng=rng)
    order = rng.permutation(len(spans)) if shuffle else None
    return blank_out(row, spans, mask=special.smask, special=special, objective="sentence", order=order)


def document_infilling(
    tokens: npt.ArrayLike,
    *,
    special: BlankTokens,
    rng: np.random.Generator,
    min_ratio: float = 0.25,
    suffix_prob: float = 0.5,
) -> InfillingExample | None:
    """Hides one span of `int(min_ratio * L)` to `L - 2` tokens, all equally likely, behind `[gMASK]`.

    With probability `suffix_prob`, and always if the row [L] holds several documents, the span is the end of the row,
    and its answer has no end (`cut_suffix`). Otherwise it may be anywhere, and its answer ends with `<eop>`.

    Returns:
        None where the text has fewer than three tokens.
    """
    row = np.asarray(tokens, np.int64)
    if len(row) < 3:
        return None
    shortest = min(max(int(min_ratio * len(row)), 1), len(row) - 2)
    length = int(rng.integers(shortest, len(row) - 1))
    # The published code also looks only at the first end-of-text token.
    several_documents = bool((row[:-1] == special.eos).any())
    if several_documents or rng.random() < suffix_prob:
        return cut_suffix(row, length, special=special)
    start, end = find_documents(row, special=special)[-1]
    start += int(rng.integers(0, end - start - length + 1))
    spans = np.array([[start, start + length]], np.int64)
    return blank_out(row, spans, mask=special.gmask, special=special, objective="document")


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """A mixture of the objectives in the proportion `token : sentence : document`, with their settings.

    Defaults and names are those of the published models and options.
    """

    special: BlankTokens
    sentence_ends: BoolArray  # [V]
    word_edges: BoolArray | None = None  # [2, V], for `whole_words`
    token: float = 0.5
    sentence: float = 0.3
    document: float = 0.2
    token_ratio: float = 0.15
    sentence_ratio: float = 0.15
    mean_span_length: float = 3.0
    whole_words: bool = False  # widens spans of the token objective; not published
    min_ratio: float = 0.25  # of a text that the document objective hides
    suffix_prob: float = 0.5  # published as gpt_infill_prob
    single_span_prob: float = 0.0  # that an example hides one short span; the shares hold for the others
    block_mask_prob: float = 0.0  # that an answer token of the token objective becomes [dBLOCK]
    context_mask_ratio: float = 0.0  # of the text, near masks of the token objective, that becomes [dBLOCK]
    shuffle: bool = True
    task_mask: bool = True  # sentences have [sMASK], documents [gMASK]; if False, all have [MASK]

    def __post_init__(self) -> None:
        shares = (self.token, self.sentence, self.document)
        if min(shares) < 0 or sum(shares) <= 0:
            raise GmaskError(f"shares of token, sentence and document must be positive, not {shares}")
        for name in (f.name for f in fields(self) if f.name.endswith(("_prob", "_ratio"))):
            if not 0 <= getattr(self, name) <= 1:
                raise GmaskError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.mean_span_length <= 0:
            raise GmaskError(f"mean_span_length must be positive, not {self.mean_span_length}")
        if self.whole_words and self.word_edges is None:
            raise GmaskError("whole_words needs word_edges, a table of the vocabulary")
        if self.special.dblock is None and (self.block_mask_prob or self.context_mask_ratio):
            raise GmaskError("block_mask_prob and context_mask_ratio need a vocabulary with [dBLOCK]")

    def sample(
        self, tokens: npt.ArrayLike, rng: np.random.Generator, objective: Objective | None = None
    ) -> InfillingExample | None:
        """Draws an example of a row `tokens` [L], by the given objective or by one drawn by the shares.

        Returns:
            None where the objective cannot hide anything in this row.
        """
        single_span = False
        if objective is None:
            single_span = self.single_span_prob > 0 and rng.random() < self.single_span_prob
            objective = "token" if single_span else self._draw_objective(rng)
        special = self.special if self.task_mask else self.special.with_one_mask()
        if objective == "token":
            return self._token_example(np.asarray(tokens, np.int64), special, rng, single_span)
        if objective == "sentence":
            return sentence_infilling(
                tokens,
                special=special,
                sentence_ends=self.sentence_ends,
                rng=rng,
                ratio=self.sentence_ratio,
                shuffle=self.shuffle,
            )
        return document_infilling(
            tokens, special=special, rng=rng, min_ratio=self.min_ratio, suffix_prob=self.suffix_prob
        )

    def _draw_objective(self, rng: np.random.Generator) -> Objective:
        draw = rng.random() * (self.token + self.sentence + self.document)
        if draw < self.token:
            return "token"
        return "sentence" if draw < self.token + self.sentence else "document"

    def _token_example(
        self, row: IntArray, special: BlankTokens, rng: np.random.Generator, single_span: bool
    ) -> InfillingExample | None:
        example = token_infilling(
            row,
            special=special,
            rng=rng,
            ratio=self.token_ratio,
            mean_span_length=self.mean_span_length,
            single_span=single_span,
            word_edges=self.word_edges if self.whole_words else None,
            shuffle=self.shuffle,
        )
        if example is None or special.dblock is None:
            return example
        if self.block_mask_prob:
            example = hide_answers(example, self.block_mask_prob, dblock=special.dblock, rng=rng)
        count = int(self.context_mask_ratio * len(row))
        if count:
            example = hide_context(example, count, special=special, dblock=special.dblock, rng=rng)
        return example
