"""Do the weights, the config and the vocabulary of a model belong together?"""

import re
from collections.abc import Collection

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.architectures import architecture_of
from gmask.checkpoints.configs import Config
from gmask.checkpoints.reading import Checkpoint
from gmask.checkpoints.tensor_files import SCALES
from gmask.checkpoints.weight_maps import bare_name
from gmask.errors import GmaskError
from gmask.models.glm.prompts import find_token_id

HEAD = "lm_head.weight"
PREFIX = "transformer.prefix_encoder."
"""What P-tuning adds to a ChatGLM; its published checkpoints hold nothing else."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raises `GmaskError` if a tokenizer cannot be that of a model."""
    source = tokenizer.name_or_path or "the tokenizer"
    if len(tokenizer) > config.vocab_size:
        raise GmaskError(
            f"{source}: has {len(tokenizer)} tokens, but the model only {config.vocab_size}; the vocabulary files "
            "belong to another model or revision: take all files from one"
        )
    for role in architecture_of(config).prompt_ids:
        token_id = find_token_id(tokenizer, role)
        known = getattr(config, role)
        if token_id is not None and known is not None and token_id != known:
            raise GmaskError(
                f"{source}: its {role} is {token_id}, but that of the model {known}; the vocabulary files belong to "
                "another model or revision: take all files from one"
            )


def match_keys(checkpoint: Checkpoint, model: PreTrainedModel, elsewhere: Collection[str] = ()) -> dict[str, str]:
    """For each tensor of a checkpoint that a model takes, its name in the model.

    Args:
        elsewhere: bare names of tensors that the model has from another checkpoint.

    Raises:
        GmaskError: the model lacks a tensor, has no place for one, or has another shape for one.
    """
    state = model.state_dict()
    own = {bare_name(key): key for key in state}
    skipped = {HEAD, f"{HEAD}_scale"} if model.config.tie_word_embeddings else set()
    unread = model._keys_to_ignore_on_load_unexpected or []
    skipped |= {key for key in checkpoint if any(re.search(pattern, key) for pattern in unread)}
    expected = own.keys() - skipped - set(elsewhere)
    found = set(checkpoint) - skipped - set(elsewhere)
    if expected != found:
        if found and all(key.startswith(PREFIX) for key in found):
            raise GmaskError(
                f"{checkpoint.folder}: holds no more than a P-tuning prefix: load the model that it was trained for, "
                f"with adapter={checkpoint.folder}"
            )
        raise GmaskError(f"{checkpoint.folder}: {_explain_keys(checkpoint, expected - found, found - expected, model)}")
    for key in checkpoint:
        if key in own and checkpoint.shape(key) != state[own[key]].shape:
            shapes = f"{list(checkpoint.shape(key))}, but the config asks for {list(state[own[key]].shape)}"
            if key.endswith(("word_embeddings.weight", HEAD)):
                shapes += "; take all files from one revision"
            elif checkpoint.dtype(key) == torch.int8:
                shapes += "; quantization_bit there says another number of bits than the weights have"
            raise GmaskError(f"{checkpoint.folder}: {checkpoint.stored_name(key)} has the shape {shapes}")
    return {key: own[key] for key in checkpoint if key in expected}


def _explain_keys(
    checkpoint: Checkpoint, missing: Collection[str], unexpected: Collection[str], model: PreTrainedModel
) -> str:
    if any(key.startswith("image_encoder.") for key in unexpected):
        return "holds an image_encoder, so it is VisualGLM, which gmask does not run; use github.com/THUDM/VisualGLM-6B"
    if scales := [key for key in missing if key.endswith(SCALES)]:
        if not any(checkpoint.dtype(key) == torch.int8 for key in checkpoint):
            return "the weights are not quantized, though config.json says so: take quantization_bit out of it"
        return f"the weights lack their scales ({min(scales)} ...); download the model again, or quantize it anew"
    if any(key.endswith(SCALES) for key in unexpected):
        return (
            "holds quantized weights, where config.json says nothing of it; take all files from one revision, or name "
            "the folder of the unquantized model"
        )
    fault, keys = ("lack", missing) if missing else ("hold the unexpected", unexpected)
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return (
        f"the weights {fault} {', '.join(sorted(keys)[:3])}{more}; they do not fit the config, or are not those of "
        f"{type(model).__name__}"
    )


def check_head(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raises `GmaskError` if a head that the config ties to the embedding was stored, and differs from it."""
    embedding = architecture_of(model.config).embedding
    for head, twin in ((HEAD, embedding), (f"{HEAD}_scale", f"{embedding}_scale")):
        if not model.config.tie_word_embeddings or head not in checkpoint or twin not in checkpoint:
            continue
        if not torch.equal(checkpoint.read(head), checkpoint.read(twin)):
            raise GmaskError(
                f"{checkpoint.folder}: {head} differs from {twin}, though config.json ties them; "
                "set tie_word_embeddings to false there to use it"
            )
