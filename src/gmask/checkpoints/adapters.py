"""How does an adapter get into a model, into a folder, and into the weights for good?

What its folder holds is said in adapter_files.py, what PEFT's layers are in peft_layers.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmask.checkpoints.adapter_files import (
    ENCODERS,
    LAYERS,
    PREFIX_TUNING,
    PROMPTS,
    VECTORS,
    WRAPPER,
    Adapter,
    describe_base,
    read_adapter,
    write_adapter,
)
from gmask.checkpoints.fit import PREFIX
from gmask.checkpoints.peft_layers import fill_layers, fold_layers, has_layers, layer_tensors, layer_values
from gmask.errors import GmaskError
from gmask.models.glm import GLMConfig
from gmask.models.glm.configuration import Network
from gmask.models.glm.prompt_vectors import attach_prompts, has_prompts
from gmask.models.prefix import attach_prefix

LANGUAGE_MODELS = ("GLMForConditionalGeneration", "ChatGLMForConditionalGeneration")


def load_adapter(model: PreTrainedModel, folder: Path | str, *, trainable: bool = False) -> None:
    """Puts the adapter of a folder into a model, in place.

    Args:
        model: of a class of ours, without an adapter or with a prefix, which is replaced.
        folder: PEFT's form of LoRA, DoRA, AdaLoRA, IA3 and prefix tuning, `save_adapter`'s, or a published prefix.
        trainable: whether it is to be trained on, and the rest of the model frozen.

    Raises:
        GmaskError: no such folder, a damaged one, or one that was trained for another model.
    """
    adapter = read_adapter(Path(folder).expanduser())
    adapter.check_base(model.config, Path(model.name_or_path or type(model).__name__))
    tensors = adapter.read()
    parts = read_parts(adapter, model, tensors)
    placed = {name: tensor.to(model.device) for name, tensor in parts.items()}
    model.load_state_dict(placed, strict=False, assign=True)  # in the precision that they were trained in
    attach(model, adapter, tensors, trainable=trainable)
    if trainable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in parts)


def attach(model: PreTrainedModel, adapter: Adapter, tensors: Mapping[str, Tensor], *, trainable: bool = False) -> None:
    """Puts an adapter that was read into a model, but for whole parts of this: `read_parts`.

    Raises:
        GmaskError: it was trained for other weights.
    """
    adapter.check_weights(model)
    if adapter.kind in LAYERS:
        fill_layers(model, adapter, tensors, trainable=trainable)
        return
    if adapter.kind == PREFIX_TUNING:
        encoder = _attach_prefix(model, adapter, tensors, trainable=trainable)
    else:
        encoder = _attach_prompts(model, adapter, tensors, trainable=trainable)
    if trainable:
        model.requires_grad_(False)
    encoder.requires_grad_(trainable)


def read_parts(adapter: Adapter, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter that stand for those of the model, by their names there.

    Raises:
        GmaskError: the model has no place for one.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parts = {own: tensors[name] for name, own in adapter.whole_parts().items()}
    for name, tensor in parts.items():
        if tensor.shape != shapes.get(name):
            wanted = f"the shape {list(shapes[name])}" if name in shapes else "no such tensor"
            raise GmaskError(
                f"{adapter.folder}: holds {name} {list(tensor.shape)}, but {type(model).__name__} has {wanted}: it was "
                f"trained for {adapter.model_class or 'another model'}"
            )
    return parts


def save_adapter(
    model: PreTrainedModel, folder: Path | str, *, base: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Writes what was trained beside a model into a folder that names the model.

    PEFT reads the folder too, but for trained vectors in the text, which it has no form for.

    Args:
        base: the name or folder of the model, for others to find it.
        settings: of the method, to be noted.

    Raises:
        GmaskError: the model has no adapter.
    """
    config, body = model.config, model.base_model
    if has_layers(model):
        values = layer_values(model)
        tensors = {f"{WRAPPER}{name}": tensor for name, tensor in layer_tensors(model).items()}
    elif config.pre_seq_len is not None:
        values = _prefix_values(model)
        tensors = _encoder_tensors(body.prefix_encoder, body.prefix_encoder.table(), ENCODERS[PREFIX_TUNING])
    elif has_prompts(model):
        values = _prompt_values(model)
        tensors = _encoder_tensors(body.prompt_encoder, body.prompt_encoder(), ENCODERS[PROMPTS])
    else:
        raise GmaskError("the model has no adapter that could be saved: save the model itself")
    tensors |= {f"{WRAPPER}{name}": parameter for name, parameter in head_parameters(model).items()}
    notes = describe_base(model) | ({"settings": dict(settings)} if settings else {})
    task = "CAUSAL_LM" if type(model).__name__ in LANGUAGE_MODELS else None
    values |= {"base_model_name_or_path": base, "task_type": task, "auto_mapping": notes}
    write_adapter(Path(folder).expanduser(), values, tensors)


def merge_adapter(model: PreTrainedModel) -> int:
    """Folds LoRA, DoRA, AdaLoRA or IA3 into the weights of a model, in place; returns the number of layers.

    Raises:
        GmaskError: no such adapter; a prefix or trained vectors, which no weight can stand for; integers as weights.
    """
    if has_layers(model):
        return fold_layers(model)
    if model.config.pre_seq_len is not None or has_prompts(model):
        raise GmaskError(
            "a prefix and trained vectors cannot be folded into the weights: load them beside the model, as an adapter"
        )
    raise GmaskError("the model has no adapter that could be folded into its weights")


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The head for a task, which every method trains as a whole; empty for a language model."""
    if model.base_model is model:
        return {}
    body = (f"{model.base_model_prefix}.", "lm_head.")
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(body)}


def _attach_prefix(
    model: PreTrainedModel, adapter: Adapter, tensors: Mapping[str, Tensor], *, trainable: bool
) -> nn.Module:
    """A prefix as it was stored; of PEFT's form and ours, the table that a network made, unless that is to learn."""
    mark = PREFIX if adapter.is_published_prefix else ENCODERS[PREFIX_TUNING]
    network = {name.removeprefix(mark): tensor for name, tensor in tensors.items() if name.startswith(mark)}
    if not adapter.is_published_prefix and not (trainable and network):
        network = {"embedding.weight": _find(adapter, tensors, VECTORS)}
    encoder = attach_prefix(model, len(network["embedding.weight"]), projection="trans.0.weight" in network)
    _fill(encoder, network, adapter, mark)
    return encoder


def _attach_prompts(
    model: PreTrainedModel, adapter: Adapter, tensors: Mapping[str, Tensor], *, trainable: bool
) -> nn.Module:
    if not isinstance(model.config, GLMConfig):
        raise GmaskError(f"{adapter.folder}: holds trained vectors for the texts of a GLM, and the model is a ChatGLM")
    mark = ENCODERS[PROMPTS]
    network = {name.removeprefix(mark): tensor for name, tensor in tensors.items() if name.startswith(mark)}
    if not trainable:
        network = {"embedding.weight": _find(adapter, tensors, VECTORS)}
    kind = adapter.values.get("prompt_encoder") if trainable else "none"
    if kind not in get_args(Network):
        raise GmaskError(f"{adapter.folder}: prompt_encoder {kind!r} is none of {', '.join(get_args(Network))}")
    encoder = attach_prompts(model, len(_find(adapter, network, "embedding.weight")), cast(Network, kind))
    _fill(encoder, network, adapter, mark)
    return encoder


def _find(adapter: Adapter, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise GmaskError(f"{adapter.folder}: lacks {name}; it is damaged: copy it again")
    return tensors[name]


def _fill(encoder: nn.Module, network: Mapping[str, Tensor], adapter: Adapter, mark: str) -> None:
    """Raises `GmaskError` for tensors that are not those of the encoder."""
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    found = {name: tensor.shape for name, tensor in network.items()}
    if found != shapes:
        name = min(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        stored, wanted = (list(shape) if shape else "absent" for shape in (found.get(name), shapes.get(name)))
        raise GmaskError(
            f"{adapter.folder}: {mark}{name} is {stored}, but {wanted} for this model: it was trained for another"
        )
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(network[name])


def _prefix_values(model: PreTrainedModel) -> dict[str, Any]:
    """Of a prefix, as PEFT's ``PrefixTuningConfig`` calls them."""
    config = model.config
    return {
        "peft_type": PREFIX_TUNING,
        "num_virtual_tokens": config.pre_seq_len,
        "token_dim": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": config.hidden_size,
        "prefix_projection": config.prefix_projection,
        "inference_mode": True,
    }


def _prompt_values(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "peft_type": PROMPTS,
        "num_virtual_tokens": config.prompt_tokens,
        "prompt_encoder": config.prompt_encoder,
        "inference_mode": True,
    }


def _encoder_tensors(encoder: nn.Module, result: Tensor, mark: str) -> dict[str, Tensor]:
    """What an encoder computes, and the network that does, to train on; a table that is its own result stands once."""
    own = dict(encoder.named_parameters())
    network = {f"{mark}{name}": parameter for name, parameter in own.items()} if len(own) > 1 else {}
    return {VECTORS: result, **network}
