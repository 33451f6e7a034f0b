"""How do a name or a folder become a model and its tokenizer?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gmask.checkpoints.architectures import LANGUAGE_MODEL
from gmask.checkpoints.configs import lacks_config
from gmask.checkpoints.configs import read_config as read_config
from gmask.checkpoints.fit import check_head, check_vocabulary, match_keys
from gmask.checkpoints.memory import check_room
from gmask.checkpoints.reading import Checkpoint, is_megatron, open_checkpoint
from gmask.checkpoints.reading import weight_files as weight_files
from gmask.checkpoints.tensor_files import refuse_placeholder
from gmask.checkpoints.tokenizer_files import read_tokenizer
from gmask.checkpoints.weight_maps import bare_name
from gmask.errors import GmaskError
from gmask.models import glm
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.models.glm.modeling import GLMPreTrainedModel

BUNDLED = Path(__file__).parent / "pretrained"

VOCABULARY_FILES = {
    "chinese": "cog-pretrain.model",
    "gpt2": "vocab.json and merges.txt of GPT-2",
    "bert": "vocab.txt of BERT (uncased)",
    "roberta": "vocab.json and merges.txt of RoBERTa",
}
"""What a tokenizer is read from, by its name in the catalog."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Model = TypeVar("Model", bound=GLMPreTrainedModel)


@overload
def load(
    name: str | Path = ...,
    *,
    dtype: str | torch.dtype | None = ...,
    device: str | torch.device | None = ...,
    revision: str | None = ...,
    like: str | None = ...,
    tokenizer: str | Path | None = ...,
    model_class: None = None,
) -> tuple[GLMForConditionalGeneration, PreTrainedTokenizerBase]: ...
@overload
def load(
    name: str | Path = ...,
    *,
    dtype: str | torch.dtype | None = ...,
    device: str | torch.device | None = ...,
    revision: str | None = ...,
    like: str | None = ...,
    tokenizer: str | Path | None = ...,
    model_class: type[Model],
) -> tuple[Model, PreTrainedTokenizerBase]: ...
def load(
    name: str | Path = "bundled",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    like: str | None = None,
    tokenizer: str | Path | None = None,
    model_class: type[GLMPreTrainedModel] | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a model, ready to fill blanks, and its tokenizer.

    Tensors go one by one from the files to their places in the model, so that at no time more memory is taken than the
    model needs, and one tensor. No code from the folder is run.

    Args:
        name: ``"bundled"`` for the model that comes with gmask; the folder of another one: our own, one in the
            published Hugging Face form, or a checkpoint of the original training code (Megatron, DeepSpeed); or the
            name of a published model, such as ``THUDM/glm-10b``, which is downloaded once.
        dtype: of the weights, such as ``"bfloat16"``. By default float32 on a CPU, where log-probabilities are then
            exact, and as stored elsewhere.
        device: such as ``"cpu"`` or ``"cuda:1"``. By default the best there is: CUDA, Apple's MPS, the CPU.
        revision: a branch, tag or commit of a published model.
        like: for a checkpoint of the training code whose shape does not tell, the published model that it is made
            like, such as ``"GLM-10B"``: number of heads, vocabulary and special ids come from there.
        tokenizer: the folder with the vocabulary, if it is not beside the weights.
        model_class: one of those in `gmask.models.glm`; by default the one that the config names.

    Raises:
        GmaskError: no such model; a missing, damaged, dangerous or unsuitable file, which is named; too little memory.
    """
    folder = find_folder(name, revision)
    config = read_config(folder, like)
    words = load_tokenizer(folder if tokenizer is None else Path(tokenizer).expanduser(), kind=_find_kind(folder, like))
    check_vocabulary(words, config)
    model = _fill_model(folder, config, dtype=dtype, device=device, like=like, model_class=model_class)
    return model, words


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder that a name stands for; that of a published model is downloaded first, if need be.

    Raises:
        GmaskError: there is none, or it holds no model.
    """
    folder = BUNDLED if name == "bundled" else Path(name).expanduser()
    if revision is not None and (name == "bundled" or folder.exists()):
        raise GmaskError(f"{name}: is a folder of this machine, which has no revision {revision}")
    if (folder / "config.json").is_file():
        return folder
    if name == "bundled":
        raise GmaskError(
            "this installation lacks the bundled model: install gmask again, or name the folder of another model"
        )
    if folder.is_dir():
        if is_megatron(folder):
            return folder
        if (folder / "config.json").exists():
            raise GmaskError(f"{folder / 'config.json'}: is a folder, where a file is expected")
        raise GmaskError(f"{folder}: no config.json there, so it is not the folder of a model")
    if folder.exists():
        raise GmaskError(f"{folder}: is a file; name the folder of a model")
    return _fetch(str(name), revision)


def _fetch(name: str, revision: str | None) -> Path:
    from gmask.checkpoints.catalog import find_family  # parses a table, which the bundled model needs not wait for
    from gmask.checkpoints.hub import fetch, looks_like_hub_name

    if looks_like_hub_name(name) or find_family(name):
        return fetch(name, revision=revision)
    raise GmaskError(f"{name}: no such folder; name the folder of a model, a published model, or bundled")


def load_model(
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    like: str | None = None,
    model_class: type[GLMPreTrainedModel] | None = None,
) -> Any:
    """The model alone, in evaluation mode; arguments and errors as in `load`."""
    return _fill_model(
        folder, read_config(folder, like), dtype=dtype, device=device, like=like, model_class=model_class
    )


def _fill_model(
    folder: Path,
    config: GLMConfig,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    like: str | None,
    model_class: type[GLMPreTrainedModel] | None,
) -> GLMPreTrainedModel:
    place = torch.device(device or best_device())
    wanted = _read_dtype(dtype, place)
    chosen = model_class or getattr(glm, (config.architectures or [LANGUAGE_MODEL])[0])
    with torch.device("meta"):  # shapes alone: the weights come from the files
        model: GLMPreTrainedModel = chosen(config)
    with open_checkpoint(folder) as checkpoint:
        names = match_keys(checkpoint, model)
        wanted = wanted or checkpoint.dtype("word_embeddings.weight")
        _check_memory(checkpoint, names, wanted, place)
        weights: dict[str, Tensor] = {}
        for key in tqdm(names, desc=f"loading {folder.name}", delay=3, leave=False, disable=None):
            weights[names[key]] = checkpoint.copy(key, device=place, dtype=wanted)
        check_head(checkpoint, model)
        if lacks_config(folder):
            _copy_rows(checkpoint, weights, model, like)
    model.load_state_dict(weights, strict=False, assign=True)  # strict already, but for the tied head
    model.tie_weights()
    model.eval()
    return model


def best_device() -> str:
    """The fastest device of this machine: CUDA, Apple's MPS, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_tokenizer(folder: Path, *, kind: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Args:
        kind: of its vocabulary, as the catalog calls it, for files that do not say.

    Raises:
        GmaskError: no vocabulary there, or a damaged one.
    """
    if folder.is_dir():
        names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                 "cog-pretrain.model", "vocab.txt", "vocab.json", "merges.txt"}  # fmt: skip
        found = [path for path in sorted(folder.iterdir()) if path.name in names]
        if is_megatron(folder) and not found:
            files = VOCABULARY_FILES[kind] if kind else " or ".join(VOCABULARY_FILES.values())
            raise GmaskError(
                f"{folder}: has no vocabulary beside it: give tokenizer=FOLDER (gmask convert: --tokenizer FOLDER), "
                f"one that holds {files}"
            )
        for path in found:
            refuse_placeholder(path)
    return read_tokenizer(folder, kind=kind)


def _find_kind(folder: Path, like: str | None) -> str | None:
    """The vocabulary of a checkpoint of the training code, by the catalog; None where files say it."""
    if not lacks_config(folder):
        return None
    from gmask.checkpoints.megatron_config import find_row

    with open_checkpoint(folder) as checkpoint:
        return find_row(checkpoint, like).tokenizer


def _read_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return torch.float32 if device.type == "cpu" else None
    if dtype not in DTYPES:
        raise GmaskError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def _check_memory(checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype, place: torch.device) -> None:
    """Raises `GmaskError` if the weights do not fit into memory, before any is filled."""
    numbers = [checkpoint.shape(key).numel() for key in names]
    passing = max(checkpoint.shape(key).numel() * checkpoint.dtype(key).itemsize for key in names)
    is_host = place.type != "cuda"
    extra = passing if checkpoint.parallel_size > 1 and is_host else 0
    if is_host:
        extra = max(extra, checkpoint.unmapped_bytes - sum(numbers) * dtype.itemsize)
    elif checkpoint.unmapped_bytes:
        check_room(checkpoint.folder, checkpoint.unmapped_bytes, torch.device("cpu"))
    smaller = 2 * sum(numbers) + extra if dtype.itemsize > 2 else None
    check_room(checkpoint.folder, sum(numbers) * dtype.itemsize + extra, place, smaller=smaller)


def _copy_rows(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], model: GLMPreTrainedModel, like: str | None
) -> None:
    """Gives special tokens that the training code did not tell apart the rows that they have in the published form."""
    from gmask.checkpoints.megatron_config import rows_to_copy

    embedding = weights[next(key for key in weights if bare_name(key) == "word_embeddings.weight")]
    for row, source in rows_to_copy(checkpoint, model.config, like).items():
        embedding[row] = embedding[source]
