"""Do the weights, the config and the vocabulary of a model belong together?"""

import torch
from transformers import PreTrainedTokenizerBase

from gmask.checkpoints.reading import Checkpoint
from gmask.checkpoints.weight_maps import bare_name
from gmask.errors import GmaskError
from gmask.models.glm import GLMConfig
from gmask.models.glm.modeling import GLMPreTrainedModel


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: GLMConfig) -> None:
    """Raises `GmaskError` if a tokenizer cannot be that of a model."""
    source = tokenizer.name_or_path or "the tokenizer"
    if len(tokenizer) > config.vocab_size:
        raise GmaskError(
            f"{source}: has {len(tokenizer)} tokens, but the model only {config.vocab_size}; the vocabulary files "
            "belong to another model"
        )
    for role in ("sop_token_id", "eop_token_id"):
        try:
            token_id = getattr(tokenizer, role, None)
        except NotImplementedError:  # a GLM tokenizer whose vocabulary has no such token
            token_id = None
        known = getattr(config, role)
        if token_id is not None and known is not None and token_id != known:
            raise GmaskError(
                f"{source}: its {role} is {token_id}, but that of the model {known}; the vocabulary files belong to "
                "another model"
            )


def match_keys(checkpoint: Checkpoint, model: GLMPreTrainedModel) -> dict[str, str]:
    """For each tensor of a checkpoint that a model takes, its name in the model.

    Raises:
        GmaskError: the model lacks a tensor, has no place for one, or has another shape for one.
    """
    state = model.state_dict()
    own = {bare_name(key): key for key in state}
    is_tied = bool(model.config.tie_word_embeddings)
    expected = {key for key in own if not (is_tied and key == "lm_head.weight")}
    found = {key for key in checkpoint if not (is_tied and key == "lm_head.weight")}
    kind = type(model).__name__
    for fault, keys in (("lack", expected - found), ("hold the unexpected", found - expected)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise GmaskError(
                f"{checkpoint.folder}: the weights {fault} {', '.join(sorted(keys)[:3])}{more}; they do not fit "
                f"the config, or are not those of {kind}"
            )
    for key in checkpoint:
        if key in own and checkpoint.shape(key) != state[own[key]].shape:
            shapes = f"{list(checkpoint.shape(key))}, but the config asks for {list(state[own[key]].shape)}"
            raise GmaskError(f"{checkpoint.folder}: {checkpoint.stored_name(key)} has the shape {shapes}")
    return {key: own[key] for key in checkpoint if key in expected}


def check_head(checkpoint: Checkpoint, model: GLMPreTrainedModel) -> None:
    """Raises `GmaskError` if a head that the config ties to the embedding was stored, and differs from it."""
    if not model.config.tie_word_embeddings or "lm_head.weight" not in checkpoint:
        return
    if not torch.equal(checkpoint.read("lm_head.weight"), checkpoint.read("word_embeddings.weight")):
        raise GmaskError(
            f"{checkpoint.folder}: lm_head.weight differs from word_embeddings.weight, though config.json ties them; "
            "set tie_word_embeddings to false there to use it"
        )
