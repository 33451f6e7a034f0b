"""How does plain text become what a model reads when it is in use, so that its weights can be rounded for that?

A ChatGLM reads a context and writes on behind ``[gMASK]``. A GLM also fills in what is missing, so its pieces are of
the kinds that it was trained on in turn: short spans, longer ones, and all that follows a context. Rounded by one kind
alone, a GLM loses on the others more than calibration gains.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gmask.errors import GmaskError

PIECE_TOKENS = 256
PIECES = 256
SHORT_SPANS = ((1, 6), (2, 13), (3, 20), (4, 27), (6, 40))
"""Hidden tokens, and those of the text that they are in the middle of; in turn. About 15 of 100, as in pretraining."""
LONG_SPAN, LONG_STRIDE = 24, 120
SHARES = (0.25, 0.5, 0.75)  # of a piece that is context when the rest is to be written


def cut_texts(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    texts: Iterable[str],
    *,
    length: int = PIECE_TOKENS,
    pieces: int = PIECES,
) -> list[dict[str, Tensor]]:
    """The arguments of ``forward``, a row each, for pieces of the texts.

    Args:
        config: the model's, for its kind, its special ids and its number of positions.
        length: tokens of text in a piece.
        pieces: at most; taken from the texts in their order.

    Raises:
        GmaskError: less text than one piece takes.
    """
    length = min(length, config.max_position_embeddings - 8)
    is_chat = config.model_type == "chatglm"
    opening = [] if is_chat or tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
    joined: list[int] = []
    found: list[dict[str, Tensor]] = []
    for text in texts:
        joined += tokenizer.encode(text, add_special_tokens=False)
        while len(joined) >= length and len(found) < pieces:
            piece, joined = joined[:length], joined[length:]
            kind = 2 if is_chat else len(found) % 3
            share = SHARES[len(found) // 3 % 3]
            found.append(_hide(opening, piece, config, kind=kind, share=share))
        if len(found) == pieces:
            break
    if not found:
        raise GmaskError(f"the text to calibrate with has fewer than {length} tokens; give more")
    return found


def _hide(
    opening: Sequence[int], piece: Sequence[int], config: PreTrainedConfig, *, kind: int, share: float
) -> dict[str, Tensor]:
    """A piece with short spans hidden (kind 0), longer ones (1), or its end (2)."""
    if kind == 2:
        return _lay_out(opening, piece, [(int(share * len(piece)), len(piece))], config.gmask_token_id, config)
    spans: list[tuple[int, int]] = []
    start = 0
    while True:
        size, stride = SHORT_SPANS[len(spans) % len(SHORT_SPANS)] if kind == 0 else (LONG_SPAN, LONG_STRIDE)
        first = start + (stride - size) // 2
        if first + size >= len(piece):
            break
        spans.append((first, first + size))
        start += stride
    if not spans:  # a short piece
        spans = [(len(piece) // 3, 2 * len(piece) // 3)]
    mask = config.mask_token_id if kind == 0 or config.smask_token_id is None else config.smask_token_id
    return _lay_out(opening, piece, spans, mask, config)


def _lay_out(
    opening: Sequence[int], piece: Sequence[int], spans: Sequence[tuple[int, int]], mask: int, config: PreTrainedConfig
) -> dict[str, Tensor]:
    """``input_ids`` [1, T] and ``layout`` [1, 2, T]: the context with a blank for each span, then the spans."""
    ids, answers, end = list(opening), list[tuple[int, Sequence[int]]](), 0
    for start, stop in spans:
        ids += piece[end:start]
        answers.append((len(ids), piece[start:stop]))
        ids.append(mask)
        end = stop
    ids += piece[end:]
    places, steps = list(range(len(ids))), [0] * len(ids)
    for place, answer in answers:
        ids += [config.sop_token_id, *answer]
        places += [place] * (len(answer) + 1)
        steps += range(1, len(answer) + 2)
    return {"input_ids": torch.tensor([ids]), "layout": torch.tensor([[places, steps]])}
