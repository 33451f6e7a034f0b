"""Inputs of a GLM from texts with a mask, as published: for generation, training and multiple choice."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchEncoding

from gmask.errors import GmaskError
from gmask.files import refuse_placeholder
from gmask.tokenizers.special_tokens import GLM_SPELLINGS


class GLMBatchEncoding(BatchEncoding):
    """A `BatchEncoding` that moves lists of tensors, too, and has the published ``cuda()``."""

    data: dict[str, Any]

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> Self:
        """Moves every tensor and returns itself."""
        self.data = {key: _move(value, device, non_blocking) for key, value in self.data.items()}
        return self

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Moves every tensor to a CUDA device and returns itself."""
        return self.to(torch.device("cuda") if device is None else device)


def _move(value: Any, device: str | torch.device | int, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    return [_move(part, device, non_blocking) for part in value] if isinstance(value, list) else value


class BlankFilling:
    """Adds to a tokenizer the tokens of blanks, and the inputs of generation, training and multiple choice."""

    truncation_side = "left"  # blanks and questions are at the end

    # transformers' own
    mask_token: str
    mask_token_id: int
    pad_token_id: int
    encode: Callable[..., list[int]]
    get_added_vocab: Callable[[], dict[str, int]]

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files: dict[str, str | None], *args: Any, **kwargs: Any) -> Any:
        """Reads the files that ``from_pretrained`` found. Raises `GmaskError` for a Git LFS pointer."""
        for path in resolved_vocab_files.values():
            if path is not None:
                refuse_placeholder(Path(path))
        return super()._from_pretrained(resolved_vocab_files, *args, **kwargs)  # type: ignore[misc]

    @property
    def sop_token(self) -> str:
        return self._glm_token("sop_token")

    @property
    def sop_token_id(self) -> int:
        return self.get_added_vocab()[self.sop_token]

    @property
    def eop_token(self) -> str:
        return self._glm_token("eop_token")

    @property
    def eop_token_id(self) -> int:
        return self.get_added_vocab()[self.eop_token]

    @property
    def smask_token(self) -> str:
        return self._glm_token("smask_token")

    @property
    def smask_token_id(self) -> int:
        return self.get_added_vocab()[self.smask_token]

    @property
    def gmask_token(self) -> str:
        return self._glm_token("gmask_token")

    @property
    def gmask_token_id(self) -> int:
        return self.get_added_vocab()[self.gmask_token]

    @property
    def mask_token_ids(self) -> list[int]:
        """The ids of the mask tokens that the vocabulary has."""
        known = self.get_added_vocab()
        tokens = (self.mask_token, self._spelling("smask_token"), self._spelling("gmask_token"))
        return [known[token] for token in tokens if token in known]

    def build_inputs_for_generation(
        self,
        model_input: Any,
        max_gen_length: int = 512,
        targets: str | Sequence[str] | None = None,
        padding: bool = False,
    ) -> GLMBatchEncoding:
        """The inputs of `generate` or, with targets, of training. The first mask of each text is filled.

        Args:
            model_input: what the tokenizer returned for the texts, as tensors.
            max_gen_length: tokens of an answer with its ``<sop>`` or, of a target, its ``<eop>``.
            targets: the answer of each text; longer ones are cut.
            padding: targets are padded to ``max_gen_length``, by default to the longest of them.

        Raises:
            GmaskError: a text without a mask; another number of targets than of texts.
        """
        context, padding_mask = read_context(model_input)
        masks = find_first_masks(context, self.mask_token_ids)
        if targets is None:
            inputs = generation_inputs(context, padding_mask, masks, sop=self.sop_token_id, length=max_gen_length)
            return GLMBatchEncoding(inputs)
        answers = self._encode_answers([targets] if isinstance(targets, str) else targets)
        if len(answers) != len(context):
            raise GmaskError(f"{len(answers)} targets for {len(context)} texts: give one for each")
        answers = [[*answer[: max_gen_length - 1], self.eop_token_id] for answer in answers]
        pad: int = self.pad_token_id
        if padding:
            answers = [answer + [pad] * (max_gen_length - len(answer)) for answer in answers]
        inputs = training_inputs(context, padding_mask, masks, answers, sop=self.sop_token_id, pad=pad)
        return GLMBatchEncoding(inputs)

    def build_inputs_for_multiple_choice(
        self, model_input: Any, choices: Sequence[Sequence[str]], max_length: int | None = None
    ) -> GLMBatchEncoding:
        """The inputs of a multiple-choice model, whose choices answer the first ``[MASK]`` of each text.

        Args:
            model_input: what the tokenizer returned for the texts, as tensors.
            choices: the choices of each text.
            max_length: the most tokens of a row (the published code ignores it).

        Raises:
            GmaskError: a text without ``[MASK]``; another number of lists than of texts; an empty choice; a row that is
                too long.
        """
        context, padding_mask = read_context(model_input)
        if len(choices) != len(context):
            raise GmaskError(f"{len(choices)} lists of choices for {len(context)} texts: give one for each")
        masks = find_first_masks(context, [self.mask_token_id])
        ids = [self._encode_answers(texts) for texts in choices]
        if not all(encoded and all(encoded) for encoded in ids):
            raise GmaskError("a choice is empty: give every text one or more choices of one token or more")
        inputs = choice_inputs(context, padding_mask, masks, ids, sop=self.sop_token_id)
        length = inputs["input_ids"].shape[1]
        if max_length is not None and length > max_length:
            raise GmaskError(f"text and choices have {length} tokens, more than max_length={max_length}: shorten them")
        return GLMBatchEncoding(inputs)

    def _encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text, add_special_tokens=False) for text in texts]

    def _spelling(self, role: str) -> str:
        return str(self.__dict__.get("_special_tokens_map", {}).get(role) or GLM_SPELLINGS[role])

    def _glm_token(self, role: str) -> str:
        token = self._spelling(role)
        if token not in self.get_added_vocab():
            name = role.removesuffix("_token").replace("mask", "MASK")
            raise NotImplementedError(f"The model doesn't support {name}")
        return token


def read_context(model_input: Any) -> tuple[Tensor, Tensor]:
    """The ids and the padding mask of what a tokenizer returned for a batch of texts: ``[B, S]`` each, int64.

    Raises:
        GmaskError: rows of different lengths.
    """
    try:
        input_ids = torch.as_tensor(model_input["input_ids"], dtype=torch.long)
    except (TypeError, ValueError) as error:
        raise GmaskError('the texts differ in length: encode them with padding=True, return_tensors="pt"') from error
    input_ids = input_ids[None] if input_ids.dim() == 1 else input_ids
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else torch.as_tensor(mask, dtype=torch.long)
    return input_ids, mask.reshape(input_ids.shape)


def find_first_masks(input_ids: Tensor, mask_ids: Sequence[int]) -> Tensor:
    """The position of the first mask in each row of ``[B, S]``: ``[B]``.

    Raises:
        GmaskError: a row without a mask.
    """
    is_mask = torch.isin(input_ids, torch.tensor(mask_ids, device=input_ids.device))
    missing = (~is_mask.any(dim=1)).nonzero()
    if len(missing):
        raise GmaskError(
            f"Cannot find mask token in the input: text {int(missing[0])} (from 0) has none, or truncation took it"
        )
    return is_mask.long().argmax(dim=1)


def generation_inputs(
    context: Tensor, padding_mask: Tensor, masks: Tensor, *, sop: int, length: int
) -> dict[str, Tensor]:
    """The inputs of `generate`: the context ``[B, S]`` and ``<sop>``, with positions for ``length`` answer tokens.

    Args:
        masks: the position of the mask in each row, ``[B]``.

    Returns:
        ``input_ids [B, S + 1]``, ``position_ids [B, 2, S + length]`` (padding counts, as published) and
        ``generation_attention_mask [B, 1, S + length, S + length]``: every token sees the context, answers are causal.
    """
    return {
        "input_ids": F.pad(context, (0, 1), value=sop),
        "position_ids": _positions(context, masks, length),
        "generation_attention_mask": _visibility(padding_mask, length),
    }


def training_inputs(
    context: Tensor, padding_mask: Tensor, masks: Tensor, answers: Sequence[Sequence[int]], *, sop: int, pad: int
) -> dict[str, Tensor]:
    """The inputs of training; each answer ends with ``<eop>``.

    Returns:
        ``input_ids``, ``labels [B, S + G]`` with G the longest answer, ``position_ids [B, 2, S + G]`` and
        ``attention_mask [B, 1, S + G, S + G]``. Labels are not shifted; those of tokens that are not learnt
        are ``pad``.
    """
    length = max(map(len, answers))
    rows = torch.tensor([[*answer, *[pad] * (length - len(answer))] for answer in answers], device=context.device)
    return {
        "input_ids": torch.cat((F.pad(context, (0, 1), value=sop), rows[:, :-1]), dim=1),
        "position_ids": _positions(context, masks, length),
        "attention_mask": _visibility(padding_mask, length),
        "labels": torch.cat((torch.full_like(context, pad), rows), dim=1),
    }


def choice_inputs(
    context: Tensor, padding_mask: Tensor, masks: Tensor, choices: Sequence[Sequence[Sequence[int]]], *, sop: int
) -> dict[str, Any]:
    """The inputs of a multiple-choice model. The choices of a row follow each other, and none sees another.

    Returns:
        ``input_ids [B, T]`` padded with 0, ``position_ids [B, 2, T]``, ``attention_mask [B, 1, T, T]`` (padding sees
        nothing), and of each choice of a row ``choice_ids`` and ``choice_indices``, the positions of its logits.
    """
    start = context.shape[1]
    length = max(sum(map(len, row)) for row in choices)
    pieces = torch.zeros(len(choices), length, dtype=torch.long, device=context.device)
    positions = _positions(context, masks, length)
    visible = F.pad(padding_mask[:, None, :].expand(-1, start, -1), (0, length, 0, length)).contiguous()
    choice_ids, choice_indices = [], []
    for index, row in enumerate(choices):
        indices, offset = [], 0
        for ids in row:
            end = offset + len(ids)
            pieces[index, offset:end] = torch.tensor([sop, *ids[:-1]])
            positions[index, 1, start + offset : start + end] = torch.arange(1, len(ids) + 1)
            visible[index, start + offset : start + end, :start] = padding_mask[index]
            visible[index, start + offset : start + end, start + offset : start + end] = 1
            indices.append(torch.arange(start + offset, start + end, device=context.device))
            offset = end
        positions[index, 1, start + offset :] = len(row[-1])  # padding repeats the last position
        choice_ids.append([torch.tensor(ids, device=context.device) for ids in row])
        choice_indices.append(indices)
    causal = torch.ones(start + length, start + length, dtype=torch.long, device=context.device).tril()
    causal[:start, :start] = 1
    return {
        "input_ids": torch.cat((context, pieces), dim=1),
        "position_ids": positions,
        "attention_mask": (visible * causal)[:, None],
        "choice_ids": choice_ids,
        "choice_indices": choice_indices,
    }


def _positions(context: Tensor, masks: Tensor, length: int) -> Tensor:
    """Positions in the context and inside the answer: ``[B, 2, S + length]``."""
    rows, start = context.shape
    inside = F.pad(torch.arange(1, length + 1, device=context.device), (start, 0)).expand(rows, -1)
    in_context = torch.arange(start, device=context.device).expand(rows, -1)
    return torch.stack((torch.cat((in_context, masks[:, None].expand(-1, length)), dim=1), inside), dim=1)


def _visibility(padding_mask: Tensor, length: int) -> Tensor:
    """The attention mask of context and answer: ``[B, 1, S + length, S + length]``, 1 where a key is visible."""
    start = padding_mask.shape[1]
    visible = F.pad(padding_mask[:, None, :].repeat(1, start + length, 1), (0, length))
    visible[:, start:, start:] = torch.ones(length, length, dtype=torch.long, device=padding_mask.device).tril()
    return visible[:, None]
