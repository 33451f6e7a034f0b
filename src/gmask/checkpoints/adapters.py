"""Adapters: put into a model, saved, merged for good; PEFT's folders and the published ones.

The folders have three forms: PEFT's, which `gmask` writes too (``adapter_config.json`` and
``adapter_model.safetensors``); the published one of P-tuning v2 (a checkpoint with ``transformer.prefix_encoder.*``
alone, by ``ptuning/trainer.py``); and trained vectors (P-tuning), whose ``adapter_config.json`` PEFT does not read.

PEFT's layers (LoRA, DoRA, AdaLoRA, IA3) take the place of linear layers inside the model, so that its class stays what
it is and every verb works on it; a wrapper of PEFT would hide the model. What they add is float32, whatever the
precision of the model.
"""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gmask.architectures import architecture_of
from gmask.checkpoints.tensor_files import PickledFile, SafetensorsFile, TensorFile
from gmask.checkpoints.weights import PREFIX, Checkpoint, open_checkpoint
from gmask.errors import GmaskError, one_line
from gmask.files import read_object, write_json, written
from gmask.models.base import Mismatch, attach_prefix
from gmask.models.glm import GLMConfig, Network, attach_prompts, has_prompts
from gmask.quantization.linear import QuantizedLayer

if TYPE_CHECKING:
    from peft import PeftConfig


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


@dataclass(frozen=True)
class Adapter:
    """The folder of an adapter, read but for its tensors.

    Attributes:
        folder: where it lies.
        kind: PEFT's ``peft_type``: one of `LAYERS`, or `PREFIX_TUNING`, which a published prefix is too; or `PROMPTS`.
        values: of ``adapter_config.json``; of a published prefix, what the shapes tell.
        tensors: where they are read from, opened.
    """

    folder: Path
    kind: str
    values: Mapping[str, Any]
    tensors: TensorFile | Checkpoint

    @property
    def notes(self) -> Mapping[str, Any]:
        """What gmask notes of the base model; empty for folders that others wrote."""
        notes = self.values.get("auto_mapping")
        return notes if isinstance(notes, dict) else {}

    @property
    def model_class(self) -> str | None:
        """The name of the class that it was trained for, if gmask wrote it."""
        name = self.notes.get("base_model_class")
        return name if isinstance(name, str) and "base_shape" in self.notes else None

    @property
    def is_published_prefix(self) -> bool:
        return isinstance(self.tensors, Checkpoint)

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return self.tensors.keys() if isinstance(self.tensors, Checkpoint) else self.tensors.names()

    def whole_parts(self) -> dict[str, str]:
        """Tensors that stand for those of the base model, such as the head of a classifier: their names in both."""
        mark = f".{LAYERS[self.kind]}" if self.kind in LAYERS else ENCODERS[self.kind]
        return {
            name: name.removeprefix(WRAPPER).replace(".base_layer.", ".")
            for name in self.names
            if mark not in name and name != VECTORS
        }

    def read(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU and in memory of their own."""
        return {name: self.tensors.read(name).clone() for name in self.names}

    def check_base(self, config: PreTrainedConfig, base: Path) -> None:
        """Raises `GmaskError` if it was trained for a model of another shape than that of the folder ``base``."""
        wanted, found = self.notes.get("base_shape"), shape_of(config)
        if isinstance(wanted, dict) and wanted != found:
            key = next(key for key in {**wanted, **found} if wanted.get(key) != found.get(key))
            name = self.values.get("base_model_name_or_path") or "another model"
            raise GmaskError(
                f"{self.folder}: was trained for {name}, whose {key} is {wanted.get(key)}; that of {base} is "
                f"{found.get(key)}: name the model that it was trained for"
            )
        if self.is_published_prefix and config.model_type != "chatglm":
            raise GmaskError(f"{self.folder}: a published P-tuning prefix belongs to a ChatGLM, and {base} is a GLM")

    def check_weights(self, model: PreTrainedModel) -> None:
        """Raises `GmaskError` if it was trained for other weights than those of a model of the same shape."""
        wanted = self.notes.get("base_fingerprint")
        if wanted is not None and wanted != fingerprint(model):
            name = self.values.get("base_model_name_or_path") or "another model"
            raise GmaskError(
                f"{self.folder}: was trained for {name}, and {model.name_or_path or 'this model'} has other weights: "
                "name the model that it was trained for"
            )


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
    parts = {own: tensors[name] for name, own in adapter.whole_parts().items()}
    own = {name: parameter for name, parameter in model.named_parameters() if name in parts}
    _compare(adapter, parts, own, trained_for=adapter.model_class)
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
        raise _refusal(adapter, Mismatch((name,), (), {}))
    return tensors[name]


def _fill(encoder: nn.Module, network: Mapping[str, Tensor], adapter: Adapter, mark: str) -> None:
    """Raises `GmaskError` for tensors that are not those of the encoder."""
    found = {f"{mark}{name}": tensor for name, tensor in network.items()}
    _compare(adapter, found, {f"{mark}{name}": tensor for name, tensor in encoder.state_dict().items()})
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


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
LAYERS = {"LORA": "lora_", "ADALORA": "lora_", "IA3": "ia3_"}
"""What the tensors that PEFT's layers add begin with, by ``peft_type``; DoRA is a kind of LORA."""

PREFIX_TUNING = "PREFIX_TUNING"
PROMPTS = "GMASK_P_TUNING"
"""What ``peft_type`` says of trained vectors in the text, which PEFT has no form for."""

VECTORS = "prompt_embeddings"
"""The trained vectors as such, or the prefix as a table ``[P, 2 L H]``: what PEFT calls the result of its encoders."""

ENCODERS = {PREFIX_TUNING: "prefix_encoder.", PROMPTS: "prompt_encoder."}
"""What the network begins with that they come out of, where there is one."""

WRAPPER = "base_model.model."
"""What PEFT puts before the names that a model gives its tensors."""

SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def fingerprint(model: PreTrainedModel) -> str:
    """What tells the weights of a model from others of its shape: a digest of its last layer norm.

    That is never quantized, and rounded to bfloat16 it is the same in every precision. Weights with LoRA folded in keep
    it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".final_layernorm." in name:
            rounded = parameter.detach().to("cpu", torch.bfloat16)
            digest.update(rounded.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_adapter(folder: Path) -> Adapter:
    """Opens the folder of an adapter.

    Raises:
        GmaskError: none there, or a damaged one.
    """
    if folder.exists() and not folder.is_dir():
        raise GmaskError(f"{folder}: is no folder; name that of an adapter")
    if not folder.is_dir():
        raise GmaskError(f"{folder}: no such folder; name that of an adapter")
    if not (folder / CONFIG).is_file():
        return _read_published_prefix(folder)
    values = read_object(folder / CONFIG)
    kind = values.get("peft_type")
    if kind not in (*LAYERS, PREFIX_TUNING, PROMPTS):
        said = f"peft_type {kind!r} is" if kind else "names no peft_type, so it is"
        raise GmaskError(
            f"{folder / CONFIG}: {said} none of {', '.join(LAYERS)} and {PREFIX_TUNING}, which gmask reads"
        )
    return Adapter(folder, kind, values, open_weights(folder))


def open_weights(folder: Path) -> TensorFile:
    """The file of tensors beside an ``adapter_config.json``.

    Raises:
        GmaskError: missing or damaged.
    """
    if not (folder / WEIGHTS).is_file() and (folder / OLD_WEIGHTS).is_file():
        return PickledFile(folder / OLD_WEIGHTS)
    return SafetensorsFile(folder / WEIGHTS)


def write_adapter(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter into a folder; each of the two files is there as a whole, or as it was before."""
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with written(folder / WEIGHTS) as draft:
        draft.write_bytes(save(own, metadata={"format": "pt"}))
    write_json(folder / CONFIG, values, indent=2, sort_keys=True)


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a base model's config says of its shape: an adapter fits no model where this differs."""
    return {"model_type": config.model_type, **{name: getattr(config, name) for name in SHAPE}}


def describe_base(model: PreTrainedModel) -> dict[str, Any]:
    """What is noted of a base model, in a place of ``adapter_config.json`` where PEFT leaves room for it."""
    config = model.config
    return {
        "base_model_class": type(model).__name__,
        "parent_library": architecture_of(config).home,
        "base_shape": shape_of(config),
        "base_fingerprint": fingerprint(model),
        "num_labels": config.num_labels,
    }


def _read_published_prefix(folder: Path) -> Adapter:
    table, checkpoint = f"{PREFIX}embedding.weight", open_checkpoint(folder)
    others = [key for key in checkpoint if not key.startswith(PREFIX)]
    if others or table not in checkpoint:
        held = f"holds {others[0]}" if others else f"has no {table}"
        raise GmaskError(f"{folder}: {held}, so it is not a P-tuning prefix, and no {CONFIG} makes it an adapter")
    projection = f"{PREFIX}trans.0.weight" in checkpoint
    values = {"num_virtual_tokens": checkpoint.shape(table)[0], "prefix_projection": projection}
    return Adapter(folder, PREFIX_TUNING, values, checkpoint)


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
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RecursionError) as error:
        raise GmaskError(f"{adapter.folder}: cannot be put into this model ({one_line(error)})") from error
    parts = adapter.whole_parts()
    own = {name.removeprefix(WRAPPER): tensor for name, tensor in tensors.items() if name not in parts}
    _compare(adapter, own, layer_tensors(model))
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


def _compare(
    adapter: Adapter, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, trained_for: str | None = None
) -> None:
    """Raises `GmaskError` if tensors of an adapter are not those that a model has a place for.

    trained_for: the class of the model that would have one.
    """
    shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (found, wanted))
    if mismatch := Mismatch.between(*shapes):
        raise _refusal(adapter, mismatch, trained_for)


def _refusal(adapter: Adapter, mismatch: Mismatch, trained_for: str | None = None) -> GmaskError:
    return GmaskError(
        f"{adapter.folder}: {mismatch.explain()}; the adapter was trained for {trained_for or 'another model'}, or is "
        "damaged"
    )
