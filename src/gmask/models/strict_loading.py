"""How does `from_pretrained` refuse weights that do not fit the model?"""

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from gmask.errors import GmaskError, one_line
from gmask.models.quantizing import check_division

UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError)
LFS_POINTER = b"version https://git-lfs"
PLACEMENTS = ("device_map", "distributed_config", "gguf_file", "quantization_config", "tp_plan", "tp_size")
"""Keywords of `from_pretrained` by which the weights may go elsewhere than to the CPU, or be no floats."""

OTHER_FILES = ("gguf_file", "key_mapping", "state_dict", "subfolder", "use_safetensors", "variant")
"""Keywords of `from_pretrained` by which the weights are not simply those of the folder."""


class StrictLoadingMixin:
    """Makes `from_pretrained` exact where transformers' own warns and goes on with random weights."""

    base_model_prefix: str
    tuned_parts: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the keys that tuning adds: a checkpoint may lack them as a whole, like a head for a task."""

    check_source: ClassVar[Callable[..., None] | None] = None
    """Refuses a folder before it is loaded, as `gmask.load` does; whoever knows how checkpoints are read sets it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `transformers.PreTrainedModel.from_pretrained`, but every weight must be there, be known, and fit.

        A head for a task (not the one that predicts tokens) may be absent as a whole: it is then new, and transformers
        warns as usual. A model without a head leaves those of a checkpoint aside. Without a ``dtype`` the weights are
        float32, as with the published code, whatever their number (`gmask.load` takes bfloat16 on a CPU for more than
        3 billion); ``dtype="auto"`` takes the stored one.

        Raises:
            GmaskError: missing, unexpected or ill-shaped weights, which are named; unreadable files.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        lets_shapes_differ = kwargs.pop("ignore_mismatched_sizes", False)
        if all(kwargs.get(name) is None for name in ("dtype", "torch_dtype", *PLACEMENTS)):
            kwargs["dtype"] = torch.float32
        is_plain = not model_args and not lets_shapes_differ and all(not kwargs.get(name) for name in OTHER_FILES)
        if cls.check_source is not None and is_plain:
            cls.check_source(cls, pretrained_model_name_or_path, **kwargs)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that all faults are known before one is raised
                **kwargs,
            )
        except GmaskError:
            raise
        except Exception as error:  # a pointer read as JSON or as an archive fails in as many ways
            _explain(pretrained_model_name_or_path, error)
            raise
        if not getattr(model, "_hf_peft_config_loaded", False):  # else the report is on the adapter's weights
            if lets_shapes_differ:
                info = {**info, "mismatched_keys": set()}
            _check(model, info, pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    @classmethod
    def maybe_distribute_model(
        cls, model: PreTrainedModel, distributed_config: DistributedConfig | None, *args: Any
    ) -> PreTrainedModel:
        if distributed_config is not None:
            check_processes(model.config.num_attention_heads, distributed_config.tp_size)
            if model.config.pre_seq_len is not None:
                raise GmaskError("a P-tuning prefix is not divided among processes: run one process")
            check_division(model, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, *args)  # type: ignore[misc]


def check_processes(heads: int, processes: int) -> None:
    """Raises `GmaskError` for a number of processes that would have to cut a head."""
    if heads % processes:
        fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise GmaskError(
            f"{heads} attention heads cannot be divided among {processes} processes: start one of {fitting} processes"
        )


def _check(model: Any, info: Mapping[str, Any], source: Any) -> None:
    """Raises for what the loading report `info` says is amiss, but for heads."""
    prefix = f"{model.base_model_prefix}."
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if hasattr(model, model.base_model_prefix):
        keys = model.state_dict().keys()
        heads = {key for key in keys if not key.startswith((prefix, "lm_head."))}
        for added in (heads, {key for key in keys if key.startswith(model.tuned_parts)}):
            if added <= missing:
                missing -= added
    else:
        parts = (prefix, *(f"{name}." for name, _ in model.named_children()))
        unexpected = {key for key in unexpected if key.startswith(parts)}
    scales = {key for key in missing if key.endswith(".weight_scale")}
    if scales:
        raise GmaskError(
            f"{source}: the weights lack their scales ({_name_some(scales)}), so the integers mean nothing; download "
            "the whole model again, or quantize it anew"
        )
    if missing:
        raise GmaskError(f"{source}: the weights lack {_name_some(missing)}; they do not fit config.json")
    if unexpected:
        raise GmaskError(
            f"{source}: the weights hold the unexpected {_name_some(unexpected)}; they do not fit config.json, "
            f"or belong to another class than {type(model).__name__}"
        )
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        raise GmaskError(f"{source}: {key} has the shape {list(stored)}, but config.json asks for {list(wanted)}")


def _explain(source: Any, error: Exception) -> None:
    """Raises a `GmaskError` if the weights of the folder `source` are at fault, rather than an argument."""
    folder = Path(str(source)).expanduser()
    if not folder.is_dir():
        return
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise GmaskError(
                    f"{path}: a Git LFS pointer, not the weights: run `git lfs pull` there, or download the file"
                ) from error
    if isinstance(error, UNREADABLE):
        reason = one_line(error)
        raise GmaskError(f"{folder}: the weights cannot be read, download or copy them again ({reason})") from error


def _name_some(keys: Iterable[str]) -> str:
    named = sorted(keys)
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return ", ".join(named[:3]) + more
