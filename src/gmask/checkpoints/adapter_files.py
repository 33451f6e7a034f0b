"""What does the folder of an adapter hold, and which model is it for?

There are three forms: PEFT's, which `gmask` writes too (``adapter_config.json`` and ``adapter_model.safetensors``); the
published one of P-tuning v2 (a checkpoint with ``transformer.prefix_encoder.*`` alone, by ``ptuning/trainer.py``); and
trained vectors (P-tuning), whose ``adapter_config.json`` PEFT does not read.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gmask.checkpoints.architectures import architecture_of
from gmask.checkpoints.fit import PREFIX
from gmask.checkpoints.json_files import read_object
from gmask.checkpoints.reading import open_checkpoint
from gmask.checkpoints.tensor_files import PickledFile, SafetensorsFile, TensorFile
from gmask.errors import GmaskError

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


@dataclass(frozen=True)
class Adapter:
    """The folder of an adapter, read but for its tensors.

    Attributes:
        folder: where it lies.
        kind: PEFT's ``peft_type``: one of `LAYERS`, or `PREFIX_TUNING`, which a published prefix is too; or `PROMPTS`.
        values: of ``adapter_config.json``; of a published prefix, what the shapes tell.
        shapes: of its tensors, by name.
    """

    folder: Path
    kind: str
    values: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]

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
        return not (self.folder / CONFIG).is_file()

    def whole_parts(self) -> dict[str, str]:
        """Tensors that stand for those of the base model, such as the head of a classifier: their names in both."""
        mark = f".{LAYERS[self.kind]}" if self.kind in LAYERS else ENCODERS[self.kind]
        return {
            name: name.removeprefix(WRAPPER).replace(".base_layer.", ".")
            for name in self.shapes
            if mark not in name and name != VECTORS
        }

    def read(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU and in memory of their own."""
        if self.is_published_prefix:
            with open_checkpoint(self.folder) as checkpoint:
                return {name: checkpoint.read(name).clone() for name in checkpoint}
        file = open_weights(self.folder)
        return {name: file.read(name).clone() for name in file.names()}

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
    file = open_weights(folder)
    return Adapter(folder, kind, values, {name: file.shape(name) for name in file.names()})


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
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    partial = folder / f".{WEIGHTS}.partial"
    partial.write_bytes(save(own, metadata={"format": "pt"}))
    os.replace(partial, folder / WEIGHTS)
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(json.dumps(values, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG)


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
    table = f"{PREFIX}embedding.weight"
    with open_checkpoint(folder) as checkpoint:
        others = [key for key in checkpoint if not key.startswith(PREFIX)]
        if others or table not in checkpoint:
            held = f"holds {others[0]}" if others else f"has no {table}"
            raise GmaskError(f"{folder}: {held}, so it is not a P-tuning prefix, and no {CONFIG} makes it an adapter")
        shapes = {key: checkpoint.shape(key) for key in checkpoint}
    values = {"num_virtual_tokens": shapes[table][0], "prefix_projection": f"{PREFIX}trans.0.weight" in shapes}
    return Adapter(folder, PREFIX_TUNING, values, shapes)
