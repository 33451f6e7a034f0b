"""Training sequences, made of a text and the spans that are hidden in it."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
NOT_SCORED = -100  # the label that a loss ignores


@dataclass(frozen=True, slots=True)
class BlankTokens:
    """The special ids that the objective needs."""

    mask: int
    smask: int
    gmask: int
    sop: int
    eop: int
    pad: int
    cls: int
    eos: int
    dblock: int | None = None

    def with_one_mask(self) -> "BlankTokens":
        """Returns the ids with `[MASK]` for all objectives (published as training without `--task-mask`)."""
        return replace(self, smask=self.mask, gmask=self.mask)


@dataclass(frozen=True, slots=True)
class InfillingExample:
    """A context with its answers, as one sequence."""

    input_ids: IntArray  # [T]: context, then `<sop> answer` pieces
    labels: IntArray  # [T], not shifted; NOT_SCORED in the context
    layout: IntArray  # [2, T]: position in the context; position inside the answer (0 in the context)
    context_length: int
    objective: str  # "token" | "sentence" | "document"


def blank_out(
    tokens: IntArray,
    spans: IntArray,
    *,
    mask: int,
    special: BlankTokens,
    objective: str,
    order: IntArray | None = None,
) -> InfillingExample:
    """Replaces each span by one `mask`, and appends the spans as answers.

    Args:
        tokens: [L], the text.
        spans: [N, 2], one or more `[start, end)`, ascending, not empty, not overlapping (they may touch).
        order: [N], a permutation: `order[k]` is the span answered k-th; by default from left to right.

    The sequence has `L + 2 * N` tokens: a mask and a `<sop>` more for each span, whose `<eop>` is only a label.
    The tokens of an answer have the position of its mask in the context, and count 1, 2, ... from `<sop>`.
    Source: GLM (Du et al. 2022), section 2.1; THUDM/GLM blocklm_utils.py.
    """
    starts = spans[:, 0]
    lengths = spans[:, 1] - starts
    assert (starts[1:] >= spans[:-1, 1]).all(), "spans must be ascending and must not overlap"
    surplus = lengths - 1  # a mask is one token
    removed = surplus.cumsum()
    masks = starts - removed + surplus  # positions in the context
    total = len(tokens) + 2 * len(spans)
    context_length = len(tokens) - int(removed[-1])
    input_ids = np.empty(total, np.int64)
    labels = np.empty(total, np.int64)
    layout = np.zeros((2, total), np.int64)

    step = np.ones(context_length + 1, np.int64)  # tokens of the text from each position of the context to the next
    step[0] = 0
    step[masks + 1] = lengths
    context = tokens[step[:-1].cumsum()]
    context[masks] = mask
    input_ids[:context_length] = context
    labels[:context_length] = NOT_SCORED
    layout[0, :context_length] = np.arange(context_length)

    if order is not None:
        starts, lengths, masks = starts[order], lengths[order], masks[order]
    pieces = lengths + 1  # `<sop>` and the span
    piece_ends = pieces.cumsum()
    piece_starts = piece_ends - pieces
    within = np.arange(total - context_length) - piece_starts.repeat(pieces)
    answers = labels[context_length:]
    # The last index of a piece is behind its span, perhaps behind the text; `<eop>` replaces what is read there.
    tokens.take(starts.repeat(pieces) + within, out=answers, mode="clip")
    answers[piece_ends - 1] = special.eop
    input_ids[context_length + 1 :] = answers[:-1]
    input_ids[context_length + piece_starts] = special.sop
    layout[0, context_length:] = masks.repeat(pieces)
    layout[1, context_length:] = within + 1
    return InfillingExample(input_ids, labels, layout, context_length, objective)


def cut_suffix(tokens: IntArray, length: int, *, special: BlankTokens) -> InfillingExample:
    """Replaces the last `length` tokens by `[gMASK]`; they become one open-ended answer.

    The sequence has `L + 1` tokens. The answer has no `<eop>`: the text may go on after the end of the row.
    The start of a further document (`[CLS]`) in the answer is not scored, as published.
    """
    assert 0 < length < len(tokens), f"cannot cut {length} of {len(tokens)} tokens"
    cut = len(tokens) - length
    context_length = cut + 1
    input_ids = np.empty(len(tokens) + 1, np.int64)
    input_ids[:cut] = tokens[:cut]
    input_ids[cut] = special.gmask
    input_ids[cut + 1] = special.sop
    input_ids[cut + 2 :] = tokens[cut:-1]
    labels = np.empty(len(tokens) + 1, np.int64)
    labels[:context_length] = NOT_SCORED
    labels[context_length:] = tokens[cut:]
    labels[labels == special.cls] = NOT_SCORED
    layout = np.zeros((2, len(tokens) + 1), np.int64)
    layout[0, :cut] = np.arange(cut)
    layout[0, cut:] = cut
    layout[1, context_length:] = np.arange(1, length + 1)
    return InfillingExample(input_ids, labels, layout, context_length, "document")


def hide_answers(
    example: InfillingExample, probability: float, *, dblock: int, rng: np.random.Generator
) -> InfillingExample:
    """Replaces each answer token of the input by `[dBLOCK]` with the given probability; labels stay.

    Published as `block_mask_prob`: the model then relies less on the answer so far.
    """
    hidden = (example.layout[1] > 1) & (rng.random(len(example.input_ids)) < probability)
    return replace(example, input_ids=np.where(hidden, dblock, example.input_ids))


def hide_context(
    example: InfillingExample,
    count: int,
    *,
    special: BlankTokens,
    dblock: int,
    rng: np.random.Generator,
    reach: int = 3,
) -> InfillingExample:
    """Replaces `count` context tokens at most `reach` from a mask, or from the context's end, by `[dBLOCK]`.

    Published as `context_mask_ratio` and `context_mask_range`. Masks and `[CLS]` stay; where fewer than
    `count` tokens are near enough, all of them are replaced (the published code stops with an error).
    """
    context_length = example.context_length
    masks = example.layout[0, context_length:][example.layout[1, context_length:] == 1]
    near = np.zeros(context_length, np.bool_)
    near[(masks[:, None] + np.arange(-reach, reach + 1)).clip(0, context_length - 1)] = True
    near[-reach:] = True
    near[masks] = False
    near &= example.input_ids[:context_length] != special.cls
    candidates = np.flatnonzero(near)
    chosen = rng.choice(candidates, min(count, len(candidates)), replace=False, shuffle=False)
    input_ids = example.input_ids.copy()
    input_ids[chosen] = dblock
    return replace(example, input_ids=input_ids)
