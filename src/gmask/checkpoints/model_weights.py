"""How do the weights of a folder get into its model, quantized on the way where that is asked for?"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from gmask.checkpoints.adapter_files import PREFIX_TUNING, Adapter, read_adapter
from gmask.checkpoints.adapters import attach, read_parts
from gmask.checkpoints.architectures import architecture_of, class_of
from gmask.checkpoints.configs import Config, lacks_config
from gmask.checkpoints.content import main_dtype
from gmask.checkpoints.fit import check_head, match_keys
from gmask.checkpoints.memory import check_room, format_bytes
from gmask.checkpoints.reading import Checkpoint, open_checkpoint
from gmask.checkpoints.tensor_files import SCALES
from gmask.checkpoints.weight_maps import bare_name
from gmask.errors import GmaskError
from gmask.hardware import bfloat16_slowdown, has_bfloat16
from gmask.models.chatglm import ChatGLMConfig
from gmask.native.primitive_cache import bound_primitive_cache
from gmask.quantization.quantizer import QuantizationConfig, finish, form_of, lay_out, quantize_weight, settle

LARGE = 3_000_000_000
"""Parameters beyond which a model is in bfloat16 on a CPU, unless another dtype is asked for: 12 GB in float32."""


DENSE = torch.contiguous_format


def fill_model(
    folder: Path,
    config: Config,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    form: QuantizationConfig | None = None,
    adapter: Path | None = None,
    like: str | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """The model of a folder in evaluation mode, filled tensor by tensor; arguments and errors as of `gmask.load`.

    form: in which the weights are to be kept, if the folder does not hold quantized ones.
    """
    bound_primitive_cache()
    held = None if adapter is None else _choose_adapter(adapter, folder, config)
    named = None if held is None else held.model_class
    model = shape_model(folder, config, model_class=model_class or _find_class(config, named))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    stored_form = form_of(config)
    if stored_form is not None:
        _check_form(folder, stored_form, form)
        form = stored_form
        lay_out(model, form)
    tensors = {} if held is None else held.read()
    parts = {} if held is None else read_parts(held, model, tensors)
    with open_checkpoint(folder) as checkpoint:
        elsewhere = {bare_name(name) for name in parts}
        if held is not None and held.kind == PREFIX_TUNING:  # in place of one that the folder may hold
            elsewhere |= {key for key in checkpoint if "prefix_encoder." in key}
        names = match_keys(checkpoint, model, elsewhere=elsewhere)
        if form is not None and stored_form is None:
            lay_out(model, form)
        wanted = dtype or _default_dtype(checkpoint, config, device, numbers)
        plan = plan_weights(model, {name: _place_dtype(checkpoint, key, wanted) for key, name in names.items()})
        check_memory(checkpoint, plan, device)
        weights = {
            # Integers are packed straight out of the file, below.
            name: tensor.to(device, plan[name].dtype, copy=tensor.dtype != torch.int8, memory_format=DENSE)
            for name, tensor in stream_weights(checkpoint, model, names, like=like, verb="loading")
        }
        check_head(checkpoint, model)
        weights |= {name: tensor.to(device) for name, tensor in parts.items()}
        model.load_state_dict(weights, strict=False, assign=True)  # strict already, but for the tied head
        model.tie_weights()
        if form is not None:
            finish(model, form)
        if held is not None:
            attach(model, held, tensors)
        if form is not None:
            settle(model)
    return model.eval()


def shape_model(
    folder: Path,
    config: Config,
    *,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """The model of a config, unquantized and without numbers.

    Raises:
        GmaskError: a class that is not for this kind of model.
    """
    chosen = model_class or class_of(config)
    if not issubclass(chosen.config_class, type(config)):
        if isinstance(config, ChatGLMConfig):
            raise GmaskError(f"{folder}: is a ChatGLM, which has no blanks to fill: use `gmask chat` or model.chat")
        raise GmaskError(f"{folder}: is a GLM, and {chosen.__name__} is not for one")
    with torch.device("meta"):  # shapes alone: the weights come from the files
        model: PreTrainedModel = chosen(config)
    return model


def _choose_adapter(adapter: Path, folder: Path, config: Config) -> Adapter:
    """The adapter of a folder, and a config without what it brings in place of the model's own.

    Raises:
        GmaskError: no adapter there, or one for another model.
    """
    held = read_adapter(adapter)
    held.check_base(config, folder)
    if held.kind == PREFIX_TUNING:
        config.pre_seq_len = None
    if "num_labels" in held.notes:
        config.num_labels = held.notes["num_labels"]
    return held


def _find_class(config: Config, name: str | None) -> type[PreTrainedModel] | None:
    """The class that an adapter was trained for, if it is one of ours."""
    architecture = architecture_of(config)
    found: type[PreTrainedModel] | None = architecture.find_class(name) if name in architecture.classes else None
    return found


def plan_weights(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """What a model that may be laid out for integers will hold, by name and without numbers.

    dtypes: of tensors by their names; they do not concern those that are to be quantized.
    """
    tied = model.all_tied_weights_keys
    return {
        name: tensor if tensor.dtype == torch.int8 else tensor.to(dtypes.get(name, tensor.dtype))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def stream_weights(
    checkpoint: Checkpoint, model: PreTrainedModel, names: Mapping[str, str], *, verb: str, like: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model by name, one after the other, those quantized that `lay_out` has prepared it for.

    The others are in their stored dtype, and may be views of the file: copy them.

    Args:
        names: of `match_keys`.
        verb: what is being done, for the progress bar.
        like: as of `gmask.load`.
    """
    rows = _rows_to_copy(checkpoint, model, like)
    label = f"{verb} {checkpoint.folder.name}"
    for key, name in tqdm(names.items(), desc=label, delay=3, leave=False, disable=None):
        tensor = checkpoint.read(key)
        if rows and key == "word_embeddings.weight":
            tensor = tensor.clone()
            for row, source in rows.items():
                tensor[row] = tensor[source]
        yield from quantize_weight(model, name, tensor).items()


def _rows_to_copy(checkpoint: Checkpoint, model: PreTrainedModel, like: str | None) -> Mapping[int, int]:
    """Rows of the embedding that special tokens have in the published form, where the training code had one row."""
    if not lacks_config(checkpoint.folder):
        return {}
    from gmask.checkpoints.megatron_config import rows_to_copy  # parses a table, which others need not wait for

    return rows_to_copy(checkpoint, model.config, like)


def _check_form(folder: Path, stored: QuantizationConfig, wanted: QuantizationConfig | None) -> None:
    """Raises `GmaskError` if a folder holds integers of another form than is asked for.

    A form without a group size leaves it open, and whether the embeddings are quantized is never asked.
    """
    if wanted is None:
        return
    if wanted.bits != stored.bits or wanted.group_size not in (None, stored.group_size):
        raise GmaskError(f"{folder}: is quantized already ({stored}); for {wanted}, quantize the original model")


def _default_dtype(checkpoint: Checkpoint, config: Config, device: torch.device, numbers: int) -> torch.dtype:
    if device.type == "cpu":
        return torch.bfloat16 if numbers > LARGE else torch.float32
    return main_dtype(checkpoint, architecture_of(config).embedding)


def _place_dtype(checkpoint: Checkpoint, key: str, wanted: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in the model: integers and scales stay as they are stored."""
    stored = checkpoint.dtype(key)
    return wanted if stored.is_floating_point and not key.endswith(SCALES) else stored


def check_memory(checkpoint: Checkpoint, plan: Mapping[str, Tensor], device: torch.device) -> None:
    """Raises `GmaskError` if the weights do not fit into memory, before any is filled."""
    needed = sum(tensor.nbytes for tensor in plan.values())
    passing = max(checkpoint.shape(key).numel() * checkpoint.dtype(key).itemsize for key in checkpoint)
    is_host = device.type != "cuda"
    extra = passing if checkpoint.parallel_size > 1 and is_host else 0
    if is_host:
        extra = max(extra, checkpoint.unmapped_bytes - needed)
    elif checkpoint.unmapped_bytes:
        check_room(checkpoint.folder, checkpoint.unmapped_bytes, torch.device("cpu"))
    advice = []
    halved = sum(tensor.numel() * min(tensor.itemsize, 2) for tensor in plan.values())
    if halved < needed:
        slower = ""
        if device.type == "cpu" and not has_bfloat16(device):
            slower = (
                f", but this CPU has no instructions for it (a product takes {bfloat16_slowdown():.1f} times as long)"
            )
        advice.append(f"dtype='bfloat16' needs {format_bytes(halved + extra)}{slower}")
    if not any(tensor.dtype == torch.int8 for tensor in plan.values()):
        advice.append("quantize='int4' needs less")
    check_room(checkpoint.folder, needed + extra, device, advice="; ".join(advice))
