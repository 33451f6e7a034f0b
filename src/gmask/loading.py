"""How do a name or a folder become a model and its tokenizer?"""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gmask.errors import GmaskError
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration

BUNDLED = Path(__file__).parent / "pretrained"

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights may lie, in the order of preference; an index names the files that they are spread over."""

TOKEN_ROLES = {
    "pad_token_id": "<|endoftext|>",
    "eos_token_id": "<|endoftext|>",
    "sop_token_id": "<|startofpiece|>",
    "eop_token_id": "<|endofpiece|>",
    "mask_token_id": "[MASK]",
    "smask_token_id": "[sMASK]",
    "gmask_token_id": "[gMASK]",
}
"""Ids that published configs leave out, and the tokens whose ids they are."""


def load(
    name: str | Path = "bundled",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[GLMForConditionalGeneration, PreTrainedTokenizerBase]:
    """Loads a model, ready to fill blanks, and its tokenizer.

    Args:
        name: ``"bundled"`` for the model that comes with gmask, or the folder of another one: our own, or one in the
            published Hugging Face form. Needs no network and runs no code from the folder.
        dtype: of the weights, such as ``"bfloat16"``. By default float32 on a CPU, where log-probabilities are then
            exact, and as stored elsewhere.
        device: such as ``"cpu"`` or ``"cuda:1"``. By default the best there is: CUDA, Apple's MPS, the CPU.

    Raises:
        GmaskError: no such folder; a missing, damaged or unsuitable file, which is named.
    """
    folder = find_folder(name)
    return load_model(folder, dtype=dtype, device=device), load_tokenizer(folder)


def find_folder(name: str | Path) -> Path:
    """The folder that a name stands for.

    Raises:
        GmaskError: there is none, or it holds no model.
    """
    folder = BUNDLED if name == "bundled" else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if name == "bundled":
        raise GmaskError(
            "this installation lacks the bundled model: install gmask again, or name the folder of another model"
        )
    if folder.is_dir():
        raise GmaskError(f"{folder}: no config.json there, so it is not the folder of a model")
    if folder.exists():
        raise GmaskError(f"{folder}: is a file; name the folder of a model")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise GmaskError(
            f"{name}: no such folder; models of the hub are not fetched yet, so download it and name its folder"
        )
    raise GmaskError(f"{name}: no such folder; name the folder of a model, or bundled")


def load_model(
    folder: Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> GLMForConditionalGeneration:
    """The model alone, in evaluation mode; arguments and errors as in `load`."""
    place = torch.device(device or best_device())
    wanted = _read_dtype(dtype, place)
    with torch.device("meta"):  # shapes alone: the weights come from the files
        model = GLMForConditionalGeneration(read_config(folder))
    weights = _match_keys(_read_weights(folder), model, folder)
    weights = {key: tensor.to(place, dtype=wanted) for key, tensor in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)  # strict already, but for the tied head
    model.tie_weights()
    model.eval()
    return model


def best_device() -> str:
    """The fastest device of this machine: CUDA, Apple's MPS, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        GmaskError: no ``tokenizer.json``, or a damaged one.
    """
    if not (folder / "tokenizer.json").is_file():
        raise GmaskError(f"{folder}: no tokenizer.json there; tokenizers in the published forms are not read yet")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise GmaskError(f"{folder / 'tokenizer.json'}: not a tokenizer ({_one_line(error)})") from error


def read_config(folder: Path) -> GLMConfig:
    """The config of a folder, with the special ids that a published one leaves out.

    Raises:
        GmaskError: no JSON, or the config of another architecture.
    """
    path = folder / "config.json"
    values = _read_json(path)
    ours = values.get("model_type") == GLMConfig.model_type
    if not ours and "block_position_encoding" not in values:  # which no other model_type "glm" has
        raise GmaskError(f"{path}: model_type {values.get('model_type')!r} is not a first-generation GLM")
    for role, token_id in _special_ids(folder).items():
        if values.get(role) is None:
            values[role] = token_id
    try:
        config: GLMConfig = GLMConfig.from_dict({**values, "model_type": GLMConfig.model_type})
    except (TypeError, ValueError) as error:
        raise GmaskError(f"{path}: {_one_line(error)}") from error
    config.name_or_path = str(folder)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder.

    Raises:
        GmaskError: there are none, or one that the index names is missing.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise GmaskError(f"{folder}: no weights there; expected {' or '.join(WEIGHT_FILES[::2])}")
    if found.suffix != ".json":
        return [found]
    files = [folder / name for name in sorted(set(_read_json(found).get("weight_map", {}).values()))]
    for path in files:
        if not path.is_file():
            raise GmaskError(f"{path}: missing, though {found.name} names it; download or copy it again")
    return files


def _read_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return torch.float32 if device.type == "cpu" else None
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise GmaskError(f"dtype {dtype!r} is not one of auto, {', '.join(names)}")
    return names[str(dtype)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GmaskError(f"{path}: not JSON ({_one_line(error)})") from error
    if not isinstance(values, dict):
        raise GmaskError(f"{path}: expected a JSON object")
    return values


def _special_ids(folder: Path) -> dict[str, int]:
    """Roles and ids of the special tokens, from whichever file beside the config lists them."""
    if (folder / "tokenizer.json").is_file():
        tokens = _read_json(folder / "tokenizer.json").get("added_tokens", [])
        ids = {token["content"]: token["id"] for token in tokens}
    elif (folder / "added_tokens.json").is_file():
        ids = _read_json(folder / "added_tokens.json")
    else:
        ids = {}
    return {role: ids[token] for role, token in TOKEN_ROLES.items() if token in ids}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                weights |= load_file(path)
            else:
                weights |= torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, TypeError) as error:
            raise GmaskError(f"{path}: truncated or damaged, download or copy it again ({_one_line(error)})") from error
    return weights


def _match_keys(weights: Mapping[str, Tensor], model: GLMForConditionalGeneration, folder: Path) -> dict[str, Tensor]:
    """The weights under the model's own keys; published files hold the bare keys of `GLMModel`."""
    prefix = f"{model.base_model_prefix}."
    if not any(key.startswith(prefix) for key in weights):
        weights = {key if key == "lm_head.weight" else prefix + key: tensor for key, tensor in weights.items()}
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
        weights = {key: tensor for key, tensor in weights.items() if key != "lm_head.weight"}
    for fault, keys in (
        ("lack", expected.keys() - weights.keys()),
        ("hold the unexpected", weights.keys() - expected.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise GmaskError(
                f"{folder}: the weights {fault} {', '.join(sorted(keys)[:3])}{more}; they do not fit config.json"
            )
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            shapes = f"{list(tensor.shape)}, but config.json asks for {list(expected[key].shape)}"
            raise GmaskError(f"{folder}: {key} has the shape {shapes}")
    return dict(weights)


def _one_line(error: Exception) -> str:
    """The start of another library's message."""
    return " ".join(str(error).split())[:160] or type(error).__name__
