"""What has the conversion of a ChatGLM to write, and what should be known about the result?"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from gmask.checkpoints.architectures import architecture_of
from gmask.checkpoints.configs import read_config
from gmask.checkpoints.content import Content, main_dtype
from gmask.checkpoints.fit import HEAD, check_head, check_vocabulary, match_keys
from gmask.checkpoints.model_folder import verify_folder, write_config, write_shards, write_tokenizer
from gmask.checkpoints.model_weights import shape_model
from gmask.checkpoints.plans import Advance, Origin, Plan
from gmask.checkpoints.preflight import shape_stored
from gmask.checkpoints.reading import Checkpoint
from gmask.checkpoints.tokenizer_files import read_tokenizer
from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig
from gmask.quantization.quantizer import form_of

OURS_ALONE = ("residual_alpha", "rotary_stretch")
"""Settings that change what is computed, and that the published code does not know."""


def plan_chat_folder(checkpoint: Checkpoint, origin: Origin, dtype: torch.dtype | None, *, published: bool) -> Plan:
    """Plans a folder of safetensors, in the published form or in ours; integers and scales stay as they are.

    Ours holds what the model takes. The published one holds all that the source does, and a head beside the embedding
    that it equals, without which the published code would start with a random one.

    Raises:
        GmaskError: weights, config and vocabulary do not fit; integers that the published form has no place for.
    """
    config = read_config(checkpoint.folder)
    assert isinstance(config, ChatGLMConfig)
    form = form_of(config)
    if published and form is not None and form.group_size is not None:
        raise GmaskError(
            f"{checkpoint.folder}: has {form}, and the published form has a scale a row; convert it to gmask"
        )
    tokenizer = read_tokenizer(origin.tokenizer or checkpoint.folder)
    check_vocabulary(tokenizer, config)
    model = shape_stored(checkpoint.folder, config)
    content = _choose_content(checkpoint, model, dtype, published=published)
    config.dtype = main_dtype(content, architecture_of(config).embedding)

    def write(folder: Path, advance: Advance) -> None:
        write_shards(content, folder, advance)
        write_tokenizer(tokenizer, folder, published=published)
        write_config(config, folder, published=published)

    return Plan(
        content,
        shape_model(checkpoint.folder, config).num_parameters(),
        write,
        lambda folder: verify_folder(folder, config, tokenizer),
        _tell_unknown(config) if published else [],
    )


def _choose_content(
    checkpoint: Checkpoint, model: PreTrainedModel, dtype: torch.dtype | None, *, published: bool
) -> Content:
    taken = match_keys(checkpoint, model)
    check_head(checkpoint, model)
    places = {name: place for place, name in enumerate(model.state_dict())}  # scales behind their integers
    names = {key: taken[key] for key in sorted(taken, key=lambda key: places[taken[key]])}
    if not published:
        return Content(checkpoint, names, dtype)
    names |= {key: checkpoint.stored_name(key) for key in sorted(checkpoint) if key not in names}
    embedding = architecture_of(model.config).embedding
    tied = {HEAD: embedding, f"{HEAD}_scale": f"{embedding}_scale"} if model.config.tie_word_embeddings else {}
    twins = {head: key for head, key in tied.items() if key in checkpoint and head not in checkpoint}
    return Content(checkpoint, names | {key: key for key in twins}, dtype, twins=twins)


def _tell_unknown(config: ChatGLMConfig) -> list[str]:
    usual = ChatGLMConfig()
    found = {name: getattr(config, name) for name in OURS_ALONE}
    return [
        f"config.json says {name} {value:g}, which gmask heeds, and which the published code does not know"
        for name, value in found.items()
        if value != getattr(usual, name)
    ]
