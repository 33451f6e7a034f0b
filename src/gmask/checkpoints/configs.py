"""Which config has a folder with weights of any published form?"""

from pathlib import Path
from typing import TypeAlias

from gmask.checkpoints.architectures import GLM, find_architecture, find_class_name
from gmask.checkpoints.json_files import read_object
from gmask.checkpoints.reading import is_megatron, open_checkpoint
from gmask.errors import GmaskError, one_line
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.glm import GLMConfig

SPECIAL_IDS = GLM.special_ids
"""Ids that published configs leave out."""

Config: TypeAlias = GLMConfig | ChatGLMConfig


def read_config(folder: Path, like: str | None = None, heads: int | None = None) -> Config:
    """The config of a folder, with the special ids that a published one leaves out.

    For a checkpoint of the training code it is made from the shapes of the weights and from the catalog.

    Args:
        like: for a checkpoint of the training code, the published model that it is made like.
        heads: for such a checkpoint, the number of attention heads, in place of ``like``.

    Raises:
        GmaskError: no JSON, or the config of another architecture; nothing that tells the number of heads.
    """
    path = folder / "config.json"
    if lacks_config(folder):
        from gmask.checkpoints.megatron_config import config_values  # reads the catalog

        source = folder
        with open_checkpoint(folder) as checkpoint:
            values = config_values(checkpoint, like, heads)
    else:
        source = path
        values = read_object(path)
    values.pop("auto_map", None)  # names remote code
    architecture = find_architecture(values, source)
    values["architectures"] = [find_class_name(values, source)]
    if any(values.get(role) is None for role in architecture.special_ids):
        from gmask.checkpoints.special_ids import special_ids  # reads the catalog

        values |= special_ids(folder, values, architecture)
    config_class = architecture.config_class
    try:
        config: Config = config_class.from_dict({**values, "model_type": config_class.model_type})
    except (TypeError, ValueError) as error:
        raise GmaskError(f"{source}: {one_line(error)}") from error
    for role in architecture.special_ids:
        token_id = getattr(config, role)
        if isinstance(token_id, int) and token_id >= config.vocab_size:
            raise GmaskError(f"{source}: {role} {token_id} is beyond the vocab_size of {config.vocab_size}")
    config.name_or_path = str(folder)
    return config


def read_glm_config(folder: Path, like: str | None = None, heads: int | None = None) -> GLMConfig:
    """`read_config` for what only a GLM can be used for; errors also for a ChatGLM."""
    config = read_config(folder, like, heads)
    if not isinstance(config, GLMConfig):
        raise GmaskError(
            f"{folder}: is a ChatGLM, which the training code of GLM does not know; convert it to gmask or huggingface"
        )
    return config


def lacks_config(folder: Path) -> bool:
    """Whether a folder is a checkpoint of the training code, whose config has to be inferred."""
    return not (folder / "config.json").is_file() and is_megatron(folder)
