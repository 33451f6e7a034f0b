"""Adapters: loads them into a model, saves them, and merges them into its weights.

Their folders have three forms: PEFT's, which `gmask` writes too (``adapter_config.json`` and
``adapter_model.safetensors``); the published one of P-tuning v2 (a checkpoint that holds only
``transformer.prefix_encoder.*``, by ``ptuning/trainer.py``); and trained vectors (P-tuning), whose
``adapter_config.json`` PEFT does not read.

PEFT's layers (LoRA, DoRA, AdaLoRA, IA3) replace linear layers inside the model. So the class of the model stays the
same, and every verb works on it, which would not be so with PEFT's wrapper. The added parameters are float32, whatever
the precision of the model.
"""

import copy
import hashlib
import re
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
from gmask.checkpoints.formats import PREFIX_ENCODER, Checkpoint, open_checkpoint
from gmask.checkpoints.tensor_files import PickledFile, SafetensorsFile, TensorFile
from gmask.config import show
from gmask.errors import GmaskError, one_line
from gmask.files import COPY_AGAIN, read_object, write_json, written
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
        trainable: whether the adapter is to be trained further, with the rest of the model frozen.

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
    """The opened folder of an adapter. The tensors are not read yet.

    Attributes:
        folder: its path.
        kind: PEFT's ``peft_type``: one of `LAYERS`; `PREFIX_TUNING`, also for a published prefix; or `PROMPTS`.
        values: of ``adapter_config.json``; for a published prefix, inferred from the shapes.
        tensors: the opened file or checkpoint of the tensors.
    """

    folder: Path
    kind: str
    values: Mapping[str, Any]
    tensors: TensorFile | Checkpoint

    @property
    def notes(self) -> Mapping[str, Any]:
        """The facts about the base model that gmask writes; empty for folders that gmask did not write."""
        notes = self.values.get("auto_mapping")
        return notes if isinstance(notes, dict) else {}

    @property
    def model_class(self) -> str | None:
        """The name of the class that it was trained for; None if gmask did not write it."""
        name = self.notes.get("base_model_class")
        return name if isinstance(name, str) and "base_shape" in self.notes else None

    @property
    def is_published_prefix(self) -> bool:
        return isinstance(self.tensors, Checkpoint)

    @property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return self.tensors.keys() if isinstance(self.tensors, Checkpoint) else self.tensors.names()

    def whole_parts(self) -> dict[str, str]:
        """Names of the tensors that replace those of the model, such as a classifier's head: ``{here: there}``."""
        mark = f".{LAYERS[self.kind]}" if self.kind in LAYERS else ENCODERS[self.kind]
        return {
            name: name.removeprefix(WRAPPER).replace(".base_layer.", ".")
            for name in self.names
            if mark not in name and name != VECTORS
        }

    def read(self) -> dict[str, Tensor]:
        """Returns all tensors by name, copied to memory of the CPU."""
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
        if wanted is not None and wanted != weights_fingerprint(model):
            name = self.values.get("base_model_name_or_path") or "another model"
            raise GmaskError(
                f"{self.folder}: was trained for {name}, and {model.name_or_path or 'this model'} has other weights: "
                "name the model that it was trained for"
            )


def attach(model: PreTrainedModel, adapter: Adapter, tensors: Mapping[str, Tensor], *, trainable: bool = False) -> None:
    """Puts an adapter that was read into a model, except for the parts that `read_parts` returns.

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
    """Returns the tensors of an adapter that replace those of the model, by their names there.

    Raises:
        GmaskError: the model has no such tensor, or one of another shape.
    """
    parts = {own: tensors[name] for name, own in adapter.whole_parts().items()}
    own = {name: parameter for name, parameter in model.named_parameters() if name in parts}
    _compare(adapter, parts, own, trained_for=adapter.model_class)
    return parts


def save_adapter(
    model: PreTrainedModel, folder: Path | str, *, base: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Writes the adapter of a model into a folder that names the model.

    PEFT reads the folder too, except for one with trained vectors (P-tuning), for which it has no format.

    Args:
        base: the name or folder of the model, which is written into the config.
        settings: of the tuning method, which are written, too.

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
    """Merges LoRA, DoRA, AdaLoRA or IA3 into the weights of a model, in place; returns the number of merged layers.

    Raises:
        GmaskError: no such adapter; a prefix or trained vectors, which cannot be merged; quantized weights.
    """
    if has_layers(model):
        return fold_layers(model)
    if model.config.pre_seq_len is not None or has_prompts(model):
        raise GmaskError(
            "a prefix and trained vectors cannot be folded into the weights: load them beside the model, as an adapter"
        )
    raise GmaskError("the model has no adapter that could be folded into its weights")


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Returns the parameters of a task's head, which every method trains fully; none for a language model."""
    if model.base_model is model:
        return {}
    body = (f"{model.base_model_prefix}.", "lm_head.")
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(body)}


def _attach_prefix(
    model: PreTrainedModel, adapter: Adapter, tensors: Mapping[str, Tensor], *, trainable: bool
) -> nn.Module:
    """Attaches a prefix.

    A published one is attached as it was stored. Of PEFT's and ours, which hold both the prefix and the network that
    computes it, the network is needed only for training.
    """
    mark = PREFIX_ENCODER if adapter.is_published_prefix else ENCODERS[PREFIX_TUNING]
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
    """Fills an encoder with its tensors. Raises `GmaskError` if they are not those of the encoder."""
    found = {f"{mark}{name}": tensor for name, tensor in network.items()}
    _compare(adapter, found, {f"{mark}{name}": tensor for name, tensor in encoder.state_dict().items()})
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(network[name])


def _prefix_values(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the config of a prefix by the keys of PEFT's ``PrefixTuningConfig``."""
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
    """Returns the output of an encoder and its own parameters, which further training needs.

    An encoder that is a table alone is its own output, and is returned once.
    """
    own = dict(encoder.named_parameters())
    network = {f"{mark}{name}": parameter for name, parameter in own.items()} if len(own) > 1 else {}
    return {VECTORS: result, **network}


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OLD_ADAPTER_WEIGHTS = "adapter_model.bin"
LAYERS = {"LORA": "lora_", "ADALORA": "lora_", "IA3": "ia3_"}
"""The start of the names of the tensors that PEFT's layers add, by ``peft_type``; DoRA is a kind of LORA."""

PREFIX_TUNING = "PREFIX_TUNING"
PROMPTS = "GMASK_P_TUNING"
"""The ``peft_type`` of trained vectors in the text, for which PEFT has no format."""

VECTORS = "prompt_embeddings"
"""PEFT's name for the output of its encoders: the trained vectors, or the prefix as a table ``[P, 2 L H]``."""

ENCODERS = {PREFIX_TUNING: "prefix_encoder.", PROMPTS: "prompt_encoder."}
"""The start of the names of the network's parameters that computes them."""

WRAPPER = "base_model.model."
"""PEFT's prefix of the names of a model's tensors."""

SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Returns a digest of a model's last layer norm, which differs between models of the same shape.

    The norm is never quantized, and merging LoRA does not change it. It is rounded to bfloat16, so that the digest is
    the same in every precision.
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
    if not (folder / ADAPTER_CONFIG).is_file():
        return _read_published_prefix(folder)
    values = read_object(folder / ADAPTER_CONFIG)
    kind = values.get("peft_type")
    if kind not in (*LAYERS, PREFIX_TUNING, PROMPTS):
        said = f"peft_type {show(kind)} is" if kind else "names no peft_type, so it is"
        raise GmaskError(
            f"{folder / ADAPTER_CONFIG}: {said} none of {', '.join(LAYERS)} and {PREFIX_TUNING}, which gmask reads"
        )
    return Adapter(folder, kind, values, open_weights(folder))


def open_weights(folder: Path) -> TensorFile:
    """Opens the file of tensors beside an ``adapter_config.json``.

    Raises:
        GmaskError: missing or damaged.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / OLD_ADAPTER_WEIGHTS).is_file():
        return PickledFile(folder / OLD_ADAPTER_WEIGHTS)
    return SafetensorsFile(folder / ADAPTER_WEIGHTS)


def write_adapter(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter into a folder. Each of the two files is replaced as a whole, or stays as it was."""
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with written(folder / ADAPTER_WEIGHTS) as draft:
        draft.write_bytes(save(own, metadata={"format": "pt"}))
    write_json(folder / ADAPTER_CONFIG, values, indent=2, sort_keys=True)


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the shape of a model by its config. An adapter fits only models of the same shape."""
    return {"model_type": config.model_type, **{name: getattr(config, name) for name in SHAPE}}


def describe_base(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the facts about a base model that are written as ``auto_mapping``, which PEFT leaves free for them."""
    config = model.config
    return {
        "base_model_class": type(model).__name__,
        "parent_library": architecture_of(config).home,
        "base_shape": shape_of(config),
        "base_fingerprint": weights_fingerprint(model),
        "num_labels": config.num_labels,
    }


def _read_published_prefix(folder: Path) -> Adapter:
    table, checkpoint = f"{PREFIX_ENCODER}embedding.weight", open_checkpoint(folder)
    others = [key for key in checkpoint if not key.startswith(PREFIX_ENCODER)]
    if others or table not in checkpoint:
        held = f"holds {others[0]}" if others else f"has no {table}"
        raise GmaskError(
            f"{folder}: {held}, so it is not a P-tuning prefix, and no {ADAPTER_CONFIG} makes it an adapter"
        )
    projection = f"{PREFIX_ENCODER}trans.0.weight" in checkpoint
    values = {"num_virtual_tokens": checkpoint.shape(table)[0], "prefix_projection": projection}
    return Adapter(folder, PREFIX_TUNING, values, checkpoint)


NAME = "default"
"""PEFT's name for an adapter that was given none."""


def require_peft() -> ModuleType:
    """Returns the module ``peft``.

    Raises:
        GmaskError: it is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise GmaskError("LoRA and its like need peft, which is not installed: pip install 'gmask[train]'") from error
    return peft


def inject(model: PreTrainedModel, config: "PeftConfig") -> Any:
    """Puts new layers of PEFT into a model, in place, and freezes everything else; returns PEFT's tuner.

    Raises:
        GmaskError: the model has such layers already.
        ValueError: the config names no layer of the model.
    """
    peft = require_peft()
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if has_layers(model):
        raise GmaskError("the model has an adapter already: merge it, or load the model alone")
    tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name=NAME)
    cast_adapter_dtype(model, NAME)
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's count of ranks, which PEFT would train on a bfloat16 model
            parameter.requires_grad_(False)
    model._hf_peft_config_loaded = True  # as transformers' add_adapter does, so that transformers knows of the adapter
    model.train(model.training)
    return tuner


def has_layers(model: PreTrainedModel) -> bool:
    """Returns True if the model has layers of PEFT, also those of transformers' `add_adapter`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def fill_layers(model: PreTrainedModel, adapter: Adapter, tensors: Mapping[str, Tensor], *, trainable: bool) -> None:
    """Puts PEFT's layers of a folder into a model.

    Args:
        tensors: all tensors of the folder, by their names there.

    Raises:
        GmaskError: peft is not installed; a folder that does not belong to this model, or lacks a tensor.
    """
    peft = require_peft()
    _check_layer_values(adapter)
    try:
        config = peft.PeftConfig.from_peft_type(**adapter.values)
        config.inference_mode, config.modules_to_save = not trainable, None  # these modules are read by `read_parts`
        pattern = config.rank_pattern if adapter.kind == "ADALORA" else None
        if pattern:
            config.rank_pattern = None
        tuner = inject(model, config)
        if pattern:  # some ranks were dropped in training
            tuner.resize_modules_by_rank_pattern(pattern, NAME)
    except GmaskError:
        raise
    except (
        ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RecursionError, ImportError, re.error,
    ) as error:  # fmt: skip
        raise GmaskError(f"{adapter.folder}: cannot be put into this model ({one_line(error)})") from error
    parts = adapter.whole_parts()
    own = {name.removeprefix(WRAPPER): tensor for name, tensor in tensors.items() if name not in parts}
    _compare(adapter, own, layer_tensors(model))
    peft.set_peft_model_state_dict(model, own, adapter_name=NAME)


MOST_KEYS = 1000
HIGHEST_RANK = 1 << 13
REPEATED_GROUP = re.compile(r"\)[*+{]")
REPETITION = re.compile(r"(?<!\\)[*+{]")
MOST_REPETITIONS = 4


def _check_layer_values(adapter: Adapter) -> None:
    """Raises `GmaskError` for values that would take PEFT minutes or gigabytes.

    Patterns of names are regular expressions, in which repetitions of repetitions take for ever.
    """
    where, values = adapter.folder / ADAPTER_CONFIG, adapter.values
    if len(values) > MOST_KEYS:
        raise GmaskError(f"{where}: has {len(values)} keys, and no such file has as many; {COPY_AGAIN}")
    tables = {name: values[name] for name in ("rank_pattern", "alpha_pattern") if isinstance(values.get(name), dict)}
    ranks = [values.get("r"), values.get("init_r"), values.get("target_r"), *tables.get("rank_pattern", {}).values()]
    for rank in ranks:
        if isinstance(rank, int | float) and not rank <= HIGHEST_RANK:
            raise GmaskError(f"{where}: a rank is {show(rank)}, and at most {HIGHEST_RANK} is read")
    patterns = [values.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns = [text for one in patterns for text in (one if isinstance(one, list) else [one])]
    for pattern in [*patterns, *(key for table in tables.values() for key in table)]:
        if not isinstance(pattern, str):
            continue
        if REPEATED_GROUP.search(pattern) or len(REPETITION.findall(pattern)) > MOST_REPETITIONS:
            raise GmaskError(
                f"{where}: the pattern {show(pattern)} of names repeats a group, or has more than {MOST_REPETITIONS} "
                "repetitions, and would be searched for ever: list the names"
            )


def layer_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the tensors that PEFT's layers added, by their names in PEFT's files, without `WRAPPER`."""
    peft = require_peft()
    own = {name: tensor for name, tensor in model.named_parameters() if ".base_layer." not in name}
    config = model.peft_config[NAME]
    pattern = getattr(config, "rank_pattern", None)
    if config.peft_type == "ADALORA":  # PEFT would need its wrapper to cut the ranks; dropped ranks are stored as 0
        config.rank_pattern = None
    found: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, state_dict=own, adapter_name=NAME, save_embedding_layers=False
    )
    if config.peft_type == "ADALORA":
        config.rank_pattern = pattern
    return found


def layer_values(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the values of ``adapter_config.json`` for a model with PEFT's layers."""
    config = copy.copy(model.peft_config[NAME])
    config.inference_mode = True
    if config.peft_type == "ADALORA":
        config.rank_pattern = None
    values = config.to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def fold_layers(model: PreTrainedModel) -> int:
    """Merges PEFT's layers into the weights, computed in float32, in place; returns the number of layers.

    Raises:
        GmaskError: the weights are quantized, or the adapter has values that are not finite.
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
    """Raises `GmaskError` if tensors of an adapter have other names or shapes than those ``wanted`` by a model.

    ``trained_for``: the class that the adapter was trained for, for the message.
    """
    shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (found, wanted))
    if mismatch := Mismatch.between(*shapes):
        raise _refusal(adapter, mismatch, trained_for)


def _refusal(adapter: Adapter, mismatch: Mismatch, trained_for: str | None = None) -> GmaskError:
    return GmaskError(
        f"{adapter.folder}: {mismatch.explain()}; the adapter was trained for {trained_for or 'another model'}, or is "
        "damaged"
    )
