"""Is a folder fit for `from_pretrained`? What `gmask.load` would refuse is refused here, in the same words."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gmask.checkpoints.architectures import architecture_of
from gmask.checkpoints.configs import Config
from gmask.checkpoints.fit import check_head, match_keys
from gmask.checkpoints.model_weights import check_memory, plan_weights, shape_model
from gmask.checkpoints.reading import WEIGHT_FILES, Checkpoint, open_checkpoint
from gmask.checkpoints.tensor_files import SCALES
from gmask.checkpoints.weight_maps import bare_name
from gmask.models.strict_loading import PLACEMENTS
from gmask.quantization.quantizer import QuantizationConfig, form_of, lay_out


def check_pretrained(folder: Path, model_class: Any, *, config: Any = None, **settings: Any) -> None:
    """`check_folder` for what `from_pretrained` is given; nothing for a folder without weights, which that refuses.

    Args:
        settings: the keywords of `from_pretrained`, those for the config among them.
    """
    if not any((folder / name).exists() for name in WEIGHT_FILES):
        return
    dtype = settings.pop("dtype", None) or settings.pop("torch_dtype", None)
    placed = {name: settings.pop(name, None) for name in PLACEMENTS}
    form = placed.pop("quantization_config")
    is_ours = form is None or isinstance(form, QuantizationConfig)
    if not isinstance(config, PreTrainedConfig):
        config = model_class.config_class.from_pretrained(config or folder, **settings)
    check_folder(
        folder,
        copy.deepcopy(config),  # a model leaves marks in its config
        model_class,
        dtype=getattr(torch, dtype, None) if isinstance(dtype, str) else dtype,
        form=form if is_ours else None,
        on_cpu=is_ours and all(value is None for value in placed.values()),
    )


def check_folder(
    folder: Path,
    config: Config,
    model_class: type[PreTrainedModel],
    *,
    dtype: torch.dtype | None = None,
    form: QuantizationConfig | None = None,
    on_cpu: bool = True,
) -> None:
    """Raises `GmaskError` for weights that do not belong to a model, or do not fit into memory, before it is built.

    Args:
        model_class: what they are for. A head for a task may be new, and the bare body takes no head.
        dtype: what they become; None for as stored.
        form: what they are to be quantized to while they are loaded.
        on_cpu: whether they all go into the memory of the CPU, which is asked for room.
    """
    is_body = model_class.__name__ == architecture_of(config).body
    with open_checkpoint(folder) as checkpoint:
        model = shape_stored(folder, config, None if is_body else model_class)
        elsewhere = _new_parts(checkpoint, model) | (_outside_body(checkpoint, model) if is_body else set())
        match_keys(checkpoint, model, elsewhere=elsewhere)
        if not is_body:
            check_head(checkpoint, model)
        if on_cpu:
            if form is not None and form_of(config) is None:
                lay_out(model, form)
            wanted = dtype or config.dtype or torch.float32
            plan = plan_weights(model, {name: wanted for name in model.state_dict() if not name.endswith(SCALES)})
            check_memory(checkpoint, plan, torch.device("cpu"))


def shape_stored(folder: Path, config: Config, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """The model of a folder without numbers, as its weights are stored; by default of the class that the config names.

    Raises:
        GmaskError: a class or a form that is not for this kind of model.
    """
    model = shape_model(folder, config, model_class=model_class)
    form = form_of(config)
    if form is not None:
        lay_out(model, form)
    return model


def _new_parts(checkpoint: Checkpoint, model: Any) -> set[str]:
    """Bare names of a head for a task, and of what tuning adds, of which a checkpoint has nothing."""
    own = {bare_name(key): key for key in model.state_dict()}
    body = (f"{model.base_model_prefix}.", "lm_head.")
    parts = [
        {bare for bare, key in own.items() if not key.startswith(body)},
        {bare for bare, key in own.items() if key.startswith(model.tuned_parts)},
    ]
    return {bare for part in parts if part.isdisjoint(checkpoint) for bare in part}


def _outside_body(checkpoint: Checkpoint, model: Any) -> set[str]:
    """Bare names of all that is not of the body: heads of any kind."""
    own = {bare_name(key): key for key in model.state_dict()}
    body = {bare.partition(".")[0] for bare, key in own.items() if key.startswith(f"{model.base_model_prefix}.")}
    return {bare for bare in {*own, *checkpoint} if bare.partition(".")[0] not in body}
