"""How probable is a text, token by token, where nothing stands before it?

Shape letters: T tokens of the text, C of a chunk of it, V vocabulary.
"""

from collections.abc import Sequence

import torch

from gmask.errors import GmaskError
from gmask.generation.answers import token_texts
from gmask.generation.decoding import log_softmax
from gmask.serving.backend import Backend
from gmask.serving.samples import ToldToken, name_tokens

CHUNK = 64
"""Tokens whose log-probabilities over the whole vocabulary are held together: 32 MiB for a ChatGLM-6B."""


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
    told: list[ToldToken] = []
    texts = iter(token_texts(ids, backend.tokenizer))
    with torch.inference_mode():
        input_ids = torch.tensor([[*head, *ids[:-1]]], device=model.device)
        layout = model.read_prompt_layout(input_ids, None)
        outputs = model.base_model(input_ids=input_ids, layout=layout, use_cache=False)
        states = outputs.last_hidden_state[0, len(head) - 1 :]
        targets = torch.tensor(ids, device=model.device)
        for chunk, wanted in zip(torch.split(states, CHUNK), torch.split(targets, CHUNK), strict=True):
            logprobs = log_softmax(model.lm_head(chunk))  # C V
            chosen = logprobs.gather(-1, wanted[:, None])[:, 0].tolist()
            best = logprobs.topk(top, dim=-1)
            for logprob, row, values in zip(chosen, best.indices.tolist(), best.values.tolist(), strict=True):
                tokens = name_tokens(zip(row, values, strict=True), backend.tokenizer)
                told.append(ToldToken(next(texts), logprob, tokens))
    return tuple(told)
