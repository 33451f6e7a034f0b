"""How is a model shaped, and how many bytes have its weights, by its config alone?"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from gmask.checkpoints.architectures import class_of
from gmask.checkpoints.catalog import Family
from gmask.checkpoints.configs import Config, lacks_config, read_config
from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.glm import GLMConfig
from gmask.quantization.quantizer import QuantizationConfig, form_of, lay_out


def read_shape_config(folder: Path) -> Config:
    """The config of a folder; of a checkpoint of the training code, what its shapes tell.

    Such a checkpoint does not tell the number of attention heads, on which no size depends.

    Raises:
        GmaskError: as of `gmask.checkpoints.configs.read_config`.
    """
    return read_config(folder, heads=1 if lacks_config(folder) else None)


def config_of_family(family: Family) -> Config:
    """The config of a published model, by its row of the catalog."""
    config_class: type[GLMConfig | ChatGLMConfig] = GLMConfig if family.architecture == "glm" else ChatGLMConfig
    stored = {"quantization_bit": family.bits, "quantization_embeddings": family.quantized_embeddings}
    return config_class(
        vocab_size=family.vocab_size,
        hidden_size=family.hidden_size,
        num_hidden_layers=family.layers,
        num_attention_heads=family.heads,
        max_position_embeddings=family.positions,
        **(stored if family.bits else {}),
    )


def shape_at(config: Config, *, dtype: torch.dtype, form: QuantizationConfig | None = None) -> PreTrainedModel:
    """The model of a config on the meta device: shapes and dtypes without numbers.

    Args:
        dtype: of the weights that are not quantized, and of the activations.
        form: of those that are; by default what the config says.

    Raises:
        GmaskError: a form that does not fit the model, or another one than its weights have already.
    """
    stored = form_of(config)
    if form is not None and stored is not None and form.to_dict() != stored.to_dict():
        raise GmaskError(f"the weights are {stored} already, and cannot become {form}: name the unquantized model")
    model_class = class_of(config)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config).to(dtype)
        model.tie_weights()
        if chosen := form or stored:
            lay_out(model, chosen)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model or a part of it; a head tied to the embeddings counts once."""
    tensors = [*model.parameters(), *model.buffers()]  # each shared one comes once
    return sum(tensor.nbytes for tensor in tensors)
