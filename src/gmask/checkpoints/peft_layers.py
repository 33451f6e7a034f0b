"""How do the layers of PEFT (LoRA, DoRA, AdaLoRA, IA3) get into a model, and their numbers into files and back?

They take the place of linear layers inside the model, so that its class stays what it is and every verb works on it; a
wrapper of PEFT would hide the model. What they add is float32, whatever the precision of the model.
"""

import copy
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmask.checkpoints.adapter_files import WRAPPER, Adapter
from gmask.errors import GmaskError, one_line
from gmask.quantization.linear import QuantizedLayer

if TYPE_CHECKING:
    from peft import PeftConfig

NAME = "default"
"""What PEFT calls an adapter that has no name."""


def require_peft() -> ModuleType:
    """The library.

    Raises:
        GmaskError: it is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise GmaskError("LoRA and its like need peft, which is not installed: pip install 'gmask[train]'") from error
    return peft


def inject(model: PreTrainedModel, config: "PeftConfig") -> Any:
    """Puts new layers into a model, in place, and freezes all but these; returns PEFT's tuner, which knows of them.

    Raises:
        GmaskError: the model has such layers already.
        ValueError: no layer of the model is meant.
    """
    peft = require_peft()
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if has_layers(model):
        raise GmaskError("the model has an adapter already: merge it, or load the model alone")
    tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name=NAME)
    cast_adapter_dtype(model, NAME)
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:  # adalora's count of ranks, which PEFT has train on a bfloat16 model
            parameter.requires_grad_(False)
    model._hf_peft_config_loaded = True  # as transformers' add_adapter has it, for what transformers does with models
    model.train(model.training)
    return tuner


def has_layers(model: PreTrainedModel) -> bool:
    """Whether layers of PEFT stand in the model; transformers' own `add_adapter` leaves the same mark."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def fill_layers(model: PreTrainedModel, adapter: Adapter, tensors: Mapping[str, Tensor], *, trainable: bool) -> None:
    """Puts the layers of a folder into a model.

    Args:
        tensors: all of the folder, by their names there.

    Raises:
        GmaskError: no peft; a folder that does not belong to this model, or lacks a tensor.
    """
    peft = require_peft()
    try:
        config = peft.PeftConfig.from_peft_type(**adapter.values)
        config.inference_mode, config.modules_to_save = not trainable, None  # these are whole parts: see Adapter
        pattern = config.rank_pattern if adapter.kind == "ADALORA" else None
        if pattern:
            config.rank_pattern = None
        tuner = inject(model, config)
        if pattern:  # ranks of which some were dropped for good
            tuner.resize_modules_by_rank_pattern(pattern, NAME)
    except GmaskError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GmaskError(f"{adapter.folder}: cannot be put into this model ({one_line(error)})") from error
    parts = adapter.whole_parts()
    own = {name.removeprefix(WRAPPER): tensor for name, tensor in tensors.items() if name not in parts}
    _check_tensors(adapter, {name: tensor.shape for name, tensor in layer_tensors(model).items()}, own)
    peft.set_peft_model_state_dict(model, own, adapter_name=NAME)


def layer_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the layers have added, by the names that PEFT gives these in files, less its `WRAPPER`."""
    peft = require_peft()
    own = {name: tensor for name, tensor in model.named_parameters() if ".base_layer." not in name}
    config = model.peft_config[NAME]
    pattern = getattr(config, "rank_pattern", None)
    if config.peft_type == "ADALORA":  # PEFT would ask its wrapper to cut the ranks; those dropped are 0
        config.rank_pattern = None
    found: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, state_dict=own, adapter_name=NAME, save_embedding_layers=False
    )
    if config.peft_type == "ADALORA":
        config.rank_pattern = pattern
    return found


def layer_values(model: PreTrainedModel) -> dict[str, Any]:
    """The values of ``adapter_config.json``."""
    config = copy.copy(model.peft_config[NAME])
    config.inference_mode = True
    if config.peft_type == "ADALORA":
        config.rank_pattern = None
    values = config.to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def fold_layers(model: PreTrainedModel) -> int:
    """Folds the layers into the weights, in float32 and in place; returns how many there were.

    Raises:
        GmaskError: the weights are integers, or the numbers are not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in layers:
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        if isinstance(base, QuantizedLayer):
            raise GmaskError(
                "nothing can be folded into int8 or int4 weights: merge into the unquantized model, then quantize that"
            )
        dtype = base.weight.dtype
        base.to(torch.float32)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise GmaskError(f"{name}: the adapter holds values that are not finite") from error
        model.set_submodule(name, base.to(dtype))
    del model.peft_config
    model._hf_peft_config_loaded = False
    return len(layers)


def _check_tensors(adapter: Adapter, wanted: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    """Raises `GmaskError` for a tensor that lacks, that has no place, or has another shape."""
    if missing := sorted(wanted.keys() - found.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GmaskError(f"{adapter.folder}: lacks {missing[0]}{more}; it was trained for another model, or is damaged")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise GmaskError(f"{adapter.folder}: this model has no place for {unknown[0]}: it was trained for another")
    for name, tensor in found.items():
        if tensor.shape != wanted[name]:
            shapes = f"is {list(tensor.shape)}, but {list(wanted[name])} for this model"
            raise GmaskError(f"{adapter.folder}: {name} {shapes}: it was trained for another")
