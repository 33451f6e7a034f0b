"""The config of a folder in any published form, and the one that a training checkpoint stands for.

Of a training checkpoint, which stores no config, shapes tell all but the number of heads and the vocabulary; the table
of published models knows these.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from gmask.checkpoints.weights import Checkpoint, is_megatron, open_checkpoint
from gmask.checkpoints.zoo import (
    FAMILIES,
    GLM,
    Family,
    family_of_shape,
    find_architecture,
    find_class_name,
    find_family,
)
from gmask.errors import GmaskError, one_line
from gmask.files import read_object
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


ROWS_APART = "fix_command_token"
"""The entry of a checkpoint that `gmask convert` made, if tokens that the training code took for one have rows of their
own: the training code then needs its option of this name."""


def read_shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of a config that shapes tell: all but the number of heads.

    Raises:
        GmaskError: the weights are not those of a GLM.
    """
    found = set(checkpoint)
    needed = ("word_embeddings.weight", "transformer.position_embeddings.weight")
    for key in needed:
        if key not in found:
            raise GmaskError(f"{checkpoint.folder}: has no {key}, so it is not a checkpoint of a GLM")
    layers = {int(match[1]) for key in found if (match := re.match(r"transformer\.layers\.(\d+)\.", key))}
    vocab_size, hidden_size = checkpoint.shape(needed[0])
    has_two_tables = "transformer.block_position_embeddings.weight" in found
    return {
        "num_hidden_layers": len(layers),
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": checkpoint.shape(needed[1])[0] - int(has_two_tables),
        "block_position_encoding": has_two_tables,
    }


def find_row(checkpoint: Checkpoint, like: str | None = None) -> Family:
    """The row of the catalog that a checkpoint is an instance of: the one named, or the one of its shape.

    Raises:
        GmaskError: no such name, a row of another shape, or no way to tell.
    """
    shape = read_shape(checkpoint)
    layers, width = shape["num_hidden_layers"], shape["hidden_size"]
    names = ", ".join(family.name for family in FAMILIES if family.architecture == "glm")
    if like is not None:
        family = find_family(like)
        if family is None or family.architecture != "glm":
            raise GmaskError(f"like={like!r}: no such GLM; there are {names}")
        if (family.layers, family.hidden_size) != (layers, width):
            wanted = f"{family.layers} layers of width {family.hidden_size}"
            raise GmaskError(f"{checkpoint.folder}: has {layers} layers of width {width}, but {family.name} {wanted}")
        return family
    family = row_of_shape(checkpoint)
    if family is None:
        raise GmaskError(
            f"{checkpoint.folder}: {layers} layers of width {width}, {shape['vocab_size']} tokens and "
            f"{shape['max_position_embeddings']} positions do not tell which GLM it is; give like=NAME "
            f"(gmask convert: --like NAME), one of {names}"
        )
    return family


def row_of_shape(checkpoint: Checkpoint) -> Family | None:
    """The row of the catalog that has a checkpoint's shape; None if none has, or several that differ.

    Raises:
        GmaskError: the weights are not those of a GLM.
    """
    shape = read_shape(checkpoint)
    return family_of_shape(
        layers=shape["num_hidden_layers"],
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocab_size"],
        positions=shape["max_position_embeddings"],
    )


def rows_to_copy(checkpoint: Checkpoint, config: GLMConfig, like: str | None = None) -> Mapping[int, int]:
    """Rows of the word embedding that the Hugging Face form takes from others: ``{to: from}``.

    GLM-10B-Chinese was trained with one id for ``[gMASK]`` and the end token. Its Hugging Face form, whose ids we take,
    has two, and a copy of the row.
    """
    family = row_of_shape(checkpoint) if like is None else find_family(like)
    if family is None or checkpoint.bookkeeping.get(ROWS_APART):
        return {}
    return copies_of(family, config)


def copies_of(family: Family, config: GLMConfig) -> dict[int, int]:
    """`Family.copied_rows` that a model of this config has: those of its own ``[gMASK]``."""
    return {row: source for row, source in family.copied_rows.items() if row == config.gmask_token_id}


def config_values(checkpoint: Checkpoint, like: str | None = None, heads: int | None = None) -> dict[str, Any]:
    """The values of a config for a checkpoint of the training code: from its shapes, and from the catalog.

    The activation is the tanh form of GELU, as in the training code. A checkpoint with the layers of a classifier is
    one for sequence classification.

    Args:
        like: the name of a row.
        heads: the number of attention heads, in place of a row; special ids are then left out.

    Raises:
        GmaskError: as `find_row`.
    """
    family = find_row(checkpoint, like) if heads is None else None
    values = {
        **(family.special_ids if family else {}),
        **read_shape(checkpoint),
        "num_attention_heads": family.heads if family else heads,
        "hidden_act": "gelu_pytorch_tanh",
    }
    if "out_proj.weight" in checkpoint:
        values |= {
            "architectures": ["GLMForSequenceClassification"],
            "num_labels": checkpoint.shape("out_proj.weight")[0],
        }
    return values
