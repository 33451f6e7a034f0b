"""Padding: the tensors of several contexts side by side, and items of similar length that share a batch.

Shape letters: B rows, T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gmask.errors import GmaskError
from gmask.generation.encoding import Context
from gmask.infilling.blanks import BlankTokens

NOT_NUMBERS = "the model computes values that are not numbers: its weights are damaged, or overflow in this dtype"


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yields the indices of ``batch_size`` items at a time, the shortest items first: there is little padding then."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def stack_contexts(contexts: Sequence[Context], *, pad: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pads contexts on the left. Returns ids ``[B, T]``, layout ``[B, 2, T]`` and a mask ``[B, T]``, False at padding.

    The mask is None if nothing is padded.
    """
    width = max(len(context.ids) for context in contexts)
    input_ids = torch.full((len(contexts), width), pad)
    layout = torch.zeros(len(contexts), 2, width, dtype=torch.long)
    is_real = torch.zeros(len(contexts), width, dtype=torch.bool)
    for row, context in enumerate(contexts):
        start = width - len(context.ids)
        input_ids[row, start:] = torch.tensor(context.ids)
        layout[row, 0, start:] = torch.arange(len(context.ids))
        is_real[row, start:] = True
    return input_ids, layout, None if bool(is_real.all()) else is_real


def stack_prompts(
    contexts: Sequence[Context], special: BlankTokens, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns what `stack_contexts` does, on a device, with a ``<sop>`` behind each context for its first blank."""
    input_ids, layout, is_real = stack_contexts(contexts, pad=special.pad)
    first = torch.tensor([(context.blanks[0], 1) for context in contexts])
    input_ids = F.pad(input_ids, (0, 1), value=special.sop)
    layout = torch.cat((layout, first[..., None]), dim=-1)
    if is_real is not None:
        is_real = F.pad(is_real, (0, 1), value=True).to(device)
    return input_ids.to(device), layout.to(device), is_real


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32.

    Raises:
        GmaskError: a logit is not a number.
    """
    logprobs = logits.float().log_softmax(-1)
    check_numbers(logprobs)
    return logprobs


def check_numbers(values: Tensor) -> None:
    """Raises `GmaskError` if a value that a model computed is not a number."""
    if bool(values.isnan().any()):
        raise GmaskError(NOT_NUMBERS)
