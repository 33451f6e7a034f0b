"""How probable is a text, token by token, where nothing stands before it?

Shape letters: T tokens of the text, V vocabulary.
"""

from collections.abc import Sequence

import torch

from gmask.errors import GmaskError
from gmask.generation.answers import token_texts
from gmask.generation.decoding import log_softmax
from gmask.serving.backend import Backend
from gmask.serving.samples import ToldToken, name_tokens


def score_text(backend: Backend, ids: Sequence[int], *, top: int) -> tuple[ToldToken, ...]:
    """The tokens of a text as the answer to a blank alone: ``[gMASK] <sop> text``, with ``[CLS]`` before it for a GLM.

    Args:
        ids: T of them.
        top: so many of the most probable tokens are told beside each one.

    Raises:
        GmaskError: more tokens than the model has positions.
    """
    special, model = backend.format.special, backend.model
    if len(ids) >= backend.positions:
        raise GmaskError(f"the text has {len(ids)} tokens; the model's {backend.positions} positions hold fewer")
    if not ids:
        return ()
    head = [*([special.cls] if backend.fills_blanks else []), special.gmask, special.sop]
    with torch.inference_mode():
        input_ids = torch.tensor([[*head, *ids[:-1]]], device=model.device)
        logprobs = log_softmax(model(input_ids=input_ids, use_cache=False).logits[0, len(head) - 1 :])  # T V
        chosen = logprobs.gather(-1, torch.tensor(ids, device=model.device)[:, None])[:, 0].tolist()
        best = logprobs.topk(top, dim=-1)
    tops = [
        name_tokens(zip(row, values, strict=True), backend.tokenizer)
        for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return tuple(map(ToldToken, token_texts(ids, backend.tokenizer), chosen, tops))
