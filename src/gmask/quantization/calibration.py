"""GPTQ: weights are rounded so that the outputs of the layers change least on real text.

Columns are rounded one after another. The error in the layer's output that rounding a column causes is compensated by
the columns not rounded yet, with the second moments of the layer's inputs. The result has the same form as without
calibration, and runs as fast.

The text is cut into pieces. A ChatGLM continues a context behind ``[gMASK]``. A GLM also fills blanks, so its pieces
alternate among the objectives that it was trained on: short spans, longer ones, and the rest of a text. Calibrated by
one objective alone, a GLM loses more on the others than calibration gains.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
section 3 and algorithm 1; columns in the order of their second moments as in the authors' code (``act-order``), with
scales that are computed first.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.quantization.formats import check_format
from gmask.quantization.linear import SCALE_DTYPE, QuantEmbedding, QuantLinear
from gmask.quantization.quantizer import QUANTIZED_LINEARS, ModelType, QuantizationConfig, find_layers, finish

COLUMN_BLOCK = 128  # columns whose errors are propagated to the later ones in one product
DAMPING = 0.01  # this share of the mean second moment is added to each
CLIPPINGS = torch.linspace(0.7, 1.15, 19)  # tried factors of the scale that maps the extreme to the lowest integer


@dataclass(frozen=True, slots=True)
class _BlockInputs:
    """The arguments of a block for one batch."""

    hidden_states: Tensor
    others: Mapping[str, Any]


def calibrate_model(
    model: ModelType,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    bits: int = 4,
    group_size: int | None = 128,
    embeddings: bool = False,
) -> ModelType:
    """Quantizes a model in place, block by block, each on the outputs of the quantized blocks before it.

    It takes the memory of the model, of the hidden states of all batches, and of K^2 numbers for a layer of K columns.

    Args:
        model: a GLM or ChatGLM, with or without a head.
        batches: arguments of the model's ``forward``, without padding (`cut_texts`).
        bits, group_size, embeddings: as in `quantizer.quantize_model`; embeddings are quantized without calibration.

    Returns:
        The same model.

    Raises:
        GmaskError: as of `quantizer.quantize_model`; no batches.
    """
    config = QuantizationConfig(bits, group_size, embeddings)
    names = find_layers(model, config)
    if not batches:
        raise GmaskError("no text to calibrate with: give some that is like what the model will read")
    was_training = model.training
    model.eval()
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Embedding):
            model.set_submodule(name, QuantEmbedding.from_embedding(layer, bits=bits, group_size=group_size))
            finish(model, config)
    blocks = [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    with torch.no_grad():
        inputs = _record_block_inputs(model, blocks[0], batches)
        for block in tqdm(blocks, desc=f"calibrating int{bits}", delay=3, leave=False, disable=None):
            _quantize_block(block, inputs, bits=bits, group_size=group_size)
            inputs = [_BlockInputs(block(batch.hidden_states, **batch.others), batch.others) for batch in inputs]
    for name in names:  # an untied head
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantLinear | QuantEmbedding):
            assert isinstance(layer, nn.Linear)
            model.set_submodule(name, QuantLinear.from_linear(layer, bits=bits, group_size=group_size))
    model.train(was_training)
    return finish(model, config)


class _StopForward(Exception):
    """Ends a forward pass at the first block."""


def _record_block_inputs(
    model: PreTrainedModel, block: nn.Module, batches: Sequence[Mapping[str, Tensor]]
) -> list[_BlockInputs]:
    inputs = []

    def record(module: nn.Module, args: tuple[Tensor, ...], others: dict[str, Any]) -> None:
        inputs.append(_BlockInputs(args[0], others))
        raise _StopForward

    handle = block.register_forward_pre_hook(record, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False)
            except _StopForward:
                continue
    finally:
        handle.remove()
    return inputs


def _quantize_block(block: nn.Module, inputs: Sequence[_BlockInputs], *, bits: int, group_size: int | None) -> None:
    linears = {name: module for name, module in block.named_modules() if QUANTIZED_LINEARS.search(f"layers.0.{name}")}
    for name, linear in linears.items():  # in the order in which they are run, so that each sees the errors before it
        assert isinstance(linear, nn.Linear)
        with _second_moments(linear) as moments:
            for batch in inputs:
                block(batch.hidden_states, **batch.others)
        layer = QuantLinear.like(linear, bits=bits, group_size=group_size)
        layer.set_integers(*round_columns(linear.weight, moments, bits=bits, group_size=group_size))
        block.set_submodule(name, layer)


@contextmanager
def _second_moments(linear: nn.Linear) -> Iterator[Tensor]:
    """Yields ``[K, K]`` float32, to which each forward pass inside the block adds ``x x^T`` of the layer's inputs."""
    moments = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].flatten(0, -2).float()
        moments.addmm_(inputs.T, inputs)

    with ExitStack() as stack:
        stack.callback(linear.register_forward_pre_hook(add).remove)
        yield moments


def round_columns(weight: Tensor, moments: Tensor, *, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Rounds a weight by GPTQ; returns integers and scales.

    Args:
        weight: ``[N, K]``, floating point.
        moments: ``[K, K]`` float32, the sum of ``x x^T`` over the inputs x of the layer.

    Returns:
        int8 ``[N, K]``, and float16 scales ``[N]`` or ``[N, K / group_size]``, some of which may be negative.

    Raises:
        GmaskError: a format that is not supported; a weight or inputs with NaN or infinity.
    """
    rows, columns = weight.shape
    width = check_format(columns, bits, group_size)
    weight = weight.detach().float().clone()
    if not (weight.isfinite().all() and moments.isfinite().all()):
        raise GmaskError("a weight, or what the model computes on the text, is not finite: it cannot be calibrated")
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = torch.split(weight, width, dim=1)
    scales = torch.stack([_find_scale(group, lowest, highest) for group in groups], dim=1)
    # The most important columns are rounded first, while many others are left to compensate for their errors.
    order = moments.diagonal().argsort(descending=True)
    weight, factor = weight[:, order], _inverse_factor(moments[order][:, order])
    integers = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    for start in range(0, columns, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, columns)
        errors = weight.new_empty(rows, stop - start)
        for column in range(start, stop):
            original = int(order[column])
            scale = scales[:, original // width].float()
            values = weight[:, column]
            rounded = (values / torch.where(scale == 0, 1, scale)).round().clamp_(lowest, highest)
            integers[:, original] = rounded.to(torch.int8)
            error = (values - rounded * scale) / factor[column, column]
            weight[:, column:stop] -= torch.outer(error, factor[column, column:stop])
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return integers, scales if group_size else scales.squeeze(1)


def _inverse_factor(moments: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of the inverse of the damped second moments."""
    moments = moments.clone()
    diagonal = moments.diagonal()
    unused = diagonal == 0
    damping = DAMPING * diagonal.mean().clamp(min=torch.finfo(moments.dtype).tiny)
    diagonal[unused] = diagonal.mean().clamp(min=1e-6)
    for _ in range(6):
        diagonal += damping
        factor, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper: Tensor = torch.linalg.cholesky_ex(inverse, upper=True).L
            if bool(upper.isfinite().all()) and bool((upper.diagonal() > 0).all()):
                return upper
        damping *= 10
    raise GmaskError("what the model computes on the text does not suffice to calibrate with; give more text")


def _find_scale(group: Tensor, lowest: int, highest: int) -> Tensor:
    """Returns the scale with the least squared error for each row of ``[N, W]``.

    There is one more negative integer than positive ones, so the extreme of a group is mapped to the lowest integer:
    the scale has the opposite sign of the extreme.
    """
    extreme = group.gather(1, group.abs().argmax(dim=1, keepdim=True)) / lowest  # [N, 1]
    best = torch.zeros_like(extreme)
    least = torch.full_like(extreme, torch.inf)
    for clipping in CLIPPINGS.tolist():
        scale = (extreme * clipping).to(SCALE_DTYPE).float()
        rounded = (group / torch.where(scale == 0, 1, scale)).round().clamp_(lowest, highest)
        error = (group - rounded * scale).square().sum(dim=1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best.squeeze(1).to(SCALE_DTYPE)


PIECE_TOKENS = 256
PIECES = 256
SHORT_SPANS = ((1, 6), (2, 13), (3, 20), (4, 27), (6, 40))
"""In turn: tokens of a span, and of the text from which it is taken. About 15 % are hidden, as in pretraining."""

LONG_SPAN, LONG_STRIDE = 24, 120
SHARES = (0.25, 0.5, 0.75)  # in turn: the share of a piece that is context, if the rest is to be generated


def cut_texts(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    texts: Iterable[str],
    *,
    length: int = PIECE_TOKENS,
    pieces: int = PIECES,
) -> list[dict[str, Tensor]]:
    """Cuts texts into pieces, and returns the arguments of ``forward`` for each.

    Args:
        config: of the model: its architecture, special ids and number of positions are used.
        length: tokens of text in a piece.
        pieces: the most pieces; they are taken from the texts in order.

    Raises:
        GmaskError: less text than one piece needs.
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
    """Hides short spans (kind 0), longer ones (1), or the end (2) of a piece."""
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
    """Returns ``input_ids [1, T]`` and ``layout [1, 2, T]``: the context with a blank for each span, then the spans."""
    ids, answers, end = list(opening), list[tuple[int, Sequence[int]]](), 0
    for start, stop in spans:
        ids += piece[end:start]
        answers.append((len(ids), piece[start:stop]))
        ids.append(mask)
        end = stop
    ids += piece[end:]
    context_positions, answer_positions = list(range(len(ids))), [0] * len(ids)
    for blank, answer in answers:
        ids += [config.sop_token_id, *answer]
        context_positions += [blank] * (len(answer) + 1)
        answer_positions += range(1, len(answer) + 2)
    return {"input_ids": torch.tensor([ids]), "layout": torch.tensor([[context_positions, answer_positions]])}
