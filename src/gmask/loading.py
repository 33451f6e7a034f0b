"""How do a name or a folder become a model and its tokenizer?"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.adapters import add_prefix, read_prefix
from gmask.checkpoints.architectures import architecture_of
from gmask.checkpoints.configs import Config, lacks_config
from gmask.checkpoints.configs import read_config as read_config
from gmask.checkpoints.fit import check_head, check_vocabulary, match_keys
from gmask.checkpoints.memory import check_room
from gmask.checkpoints.reading import Checkpoint, is_megatron, open_checkpoint
from gmask.checkpoints.reading import weight_files as weight_files
from gmask.checkpoints.tensor_files import SCALES, refuse_placeholder
from gmask.checkpoints.tokenizer_files import read_tokenizer
from gmask.checkpoints.weight_maps import bare_name
from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.chatglm.placement import spread_layers
from gmask.models.glm import GLMForConditionalGeneration
from gmask.quantization.quantizer import finish, form_of, lay_out

BUNDLED = Path(__file__).parent / "pretrained"

VOCABULARY_FILES = {
    "chinese": "cog-pretrain.model",
    "gpt2": "vocab.json and merges.txt of GPT-2",
    "bert": "vocab.txt of BERT (uncased)",
    "roberta": "vocab.json and merges.txt of RoBERTa",
}
"""What a tokenizer is read from, by its name in the catalog."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LanguageModel: TypeAlias = GLMForConditionalGeneration | ChatGLMForConditionalGeneration

Model = TypeVar("Model", bound=PreTrainedModel)


@overload
def load(
    name: Literal["bundled"] = ...,
    *,
    dtype: str | torch.dtype | None = ...,
    device: str | torch.device | None = ...,
    revision: None = ...,
    like: None = ...,
    tokenizer: str | Path | None = ...,
    adapter: None = ...,
    model_class: None = None,
) -> tuple[GLMForConditionalGeneration, PreTrainedTokenizerBase]: ...
@overload
def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = ...,
    device: str | torch.device | None = ...,
    revision: str | None = ...,
    like: str | None = ...,
    tokenizer: str | Path | None = ...,
    adapter: str | Path | None = ...,
    model_class: None = None,
) -> tuple[LanguageModel, PreTrainedTokenizerBase]: ...
@overload
def load(
    name: str | Path = ...,
    *,
    dtype: str | torch.dtype | None = ...,
    device: str | torch.device | None = ...,
    revision: str | None = ...,
    like: str | None = ...,
    tokenizer: str | Path | None = ...,
    adapter: str | Path | None = ...,
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
    adapter: str | Path | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a model, ready to fill blanks or to chat, and its tokenizer.

    Tensors go one by one from the files to their places in the model, so that at no time more memory is taken than the
    model needs, and one tensor. No code from the folder is run.

    Args:
        name: ``"bundled"`` for the model that comes with gmask; the folder of another one: our own, one in the
            published Hugging Face form, or a checkpoint of the original training code (Megatron, DeepSpeed); or the
            name of a published model, such as ``THUDM/glm-10b`` or ``THUDM/chatglm-6b``, which is downloaded once.
        dtype: of the weights, such as ``"bfloat16"``. By default float32 on a CPU, where log-probabilities are then
            exact, and as stored elsewhere.
        device: such as ``"cpu"`` or ``"cuda:1"``. By default the best there is: CUDA, Apple's MPS, the CPU.
        revision: a branch, tag or commit of a published model.
        like: for a checkpoint of the training code whose shape does not tell, the published model that it is made
            like, such as ``"GLM-10B"``: number of heads, vocabulary and special ids come from there.
        tokenizer: the folder with the vocabulary, if it is not beside the weights.
        adapter: for a ChatGLM, the folder of a trained P-tuning prefix, as the published ``ptuning`` code saved it.
        model_class: one of those in `gmask.models.glm` or `gmask.models.chatglm`; by default the one that the config
            names.

    Raises:
        GmaskError: no such model; a missing, damaged, dangerous or unsuitable file, which is named; too little memory.
    """
    folder = find_folder(name, revision)
    config = read_config(folder, like)
    words = load_tokenizer(folder if tokenizer is None else Path(tokenizer).expanduser(), kind=_find_kind(folder, like))
    check_vocabulary(words, config)
    prefix = None if adapter is None else Path(adapter).expanduser()
    return _fill_model(folder, config, prefix, dtype=dtype, device=device, like=like, model_class=model_class), words


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
    model_class: type[PreTrainedModel] | None = None,
) -> Any:
    """The model alone, in evaluation mode; arguments and errors as in `load`."""
    return _fill_model(
        folder, read_config(folder, like), None, dtype=dtype, device=device, like=like, model_class=model_class
    )


def _fill_model(
    folder: Path,
    config: Config,
    adapter: Path | None,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    like: str | None,
    model_class: type[PreTrainedModel] | None,
) -> PreTrainedModel:
    place = torch.device(device or best_device())
    wanted = _read_dtype(dtype, place)
    architecture = architecture_of(config)
    model = _shape_model(folder, config, adapter, model_class)
    prefix = {} if adapter is None else read_prefix(adapter, model)
    with open_checkpoint(folder) as checkpoint:
        names = match_keys(checkpoint, model, elsewhere=prefix)
        wanted = wanted or _find_dtype(checkpoint, architecture.embedding)
        dtypes = {key: _place_dtype(checkpoint, key, wanted) for key in names}
        _check_memory(checkpoint, dtypes, wanted, place)
        weights: dict[str, Tensor] = {}
        for key in tqdm(names, desc=f"loading {folder.name}", delay=3, leave=False, disable=None):
            weights[names[key]] = checkpoint.copy(key, device=place, dtype=dtypes[key])
        weights |= {key: tensor.to(place) for key, tensor in prefix.items()}
        check_head(checkpoint, model)
        if lacks_config(folder):
            _copy_rows(checkpoint, weights, model, like)
    model.load_state_dict(weights, strict=False, assign=True)  # strict already, but for the tied head
    model.tie_weights()
    model.eval()
    form = form_of(config)
    return model if form is None else finish(model, form)


def _shape_model(
    folder: Path, config: Config, adapter: Path | None, model_class: type[PreTrainedModel] | None
) -> PreTrainedModel:
    """The model of a config, without numbers, with room for the prefix of ``adapter``.

    Raises:
        GmaskError: a class or an adapter that is not for this kind of model.
    """
    architecture = architecture_of(config)
    chosen = model_class or architecture.find_class((config.architectures or [None])[0])
    if not issubclass(chosen.config_class, type(config)):
        if isinstance(config, ChatGLMConfig):
            raise GmaskError(f"{folder}: is a ChatGLM, which has no blanks to fill: use `gmask chat` or model.chat")
        raise GmaskError(f"{folder}: is a GLM, and {chosen.__name__} is not for one")
    if adapter is not None:
        if not isinstance(config, ChatGLMConfig):
            raise GmaskError(f"{adapter}: a P-tuning prefix belongs to a ChatGLM, and {folder} is a GLM")
        add_prefix(config, adapter)
    with torch.device("meta"):  # shapes alone: the weights come from the files
        model: PreTrainedModel = chosen(config)
        if form := form_of(config):
            lay_out(model, form)
    return model


def load_model_on_gpus(
    checkpoint_path: str | Path,
    num_gpus: int = 2,
    device_map: Mapping[str, int | str] | None = None,
    **kwargs: Any,
) -> ChatGLMForConditionalGeneration:
    """A ChatGLM over several GPUs, in float16: the published ``utils.load_model_on_gpus``, for folders and hub names.

    Args:
        num_gpus: how many to spread the layers evenly over; the first also gets the embeddings, the last norm and the
            head.
        device_map: where each module goes instead, such as ``{"transformer.layers.0": 1, ...}``; a GPU's number,
            ``"cpu"`` or ``"disk"``.
        **kwargs: as for `transformers.PreTrainedModel.from_pretrained`, such as ``dtype`` or ``offload_folder``.

    Raises:
        GmaskError: fewer GPUs, or not a ChatGLM; else as of `load`.
    """
    folder = find_folder(checkpoint_path)
    config = read_config(folder)
    if not isinstance(config, ChatGLMConfig):
        raise GmaskError(f"{folder}: is not a ChatGLM; from_pretrained(FOLDER, device_map='auto') spreads other models")
    if importlib.util.find_spec("accelerate") is None:
        raise GmaskError("placing a model on several devices needs accelerate: pip install accelerate")
    if device_map is None:
        if num_gpus > torch.cuda.device_count():
            raise GmaskError(f"num_gpus is {num_gpus}, but this machine has {torch.cuda.device_count()}")
        device_map = spread_layers(config, num_gpus)
    settings: dict[str, Any] = {"dtype": torch.float16, "config": config, **kwargs}
    model: ChatGLMForConditionalGeneration = ChatGLMForConditionalGeneration.from_pretrained(
        folder, device_map=dict(device_map), **settings
    )
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
                 "cog-pretrain.model", "ice_text.model", "vocab.txt", "vocab.json", "merges.txt"}  # fmt: skip
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


def _find_dtype(checkpoint: Checkpoint, embedding: str) -> torch.dtype:
    """The dtype that the weights are stored in, quantized ones and their scales left aside."""
    keys = [embedding, *(key for key in checkpoint if not key.endswith(SCALES))]
    return next(checkpoint.dtype(key) for key in keys if checkpoint.dtype(key).is_floating_point)


def _place_dtype(checkpoint: Checkpoint, key: str, wanted: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in the model: integers and scales stay as they are stored."""
    stored = checkpoint.dtype(key)
    return wanted if stored.is_floating_point and not key.endswith(SCALES) else stored


def _check_memory(
    checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype, place: torch.device
) -> None:
    """Raises `GmaskError` if the weights do not fit into memory, before any is filled."""
    numbers = [checkpoint.shape(key).numel() for key in dtypes]
    needed = sum(checkpoint.shape(key).numel() * kept.itemsize for key, kept in dtypes.items())
    passing = max(checkpoint.shape(key).numel() * checkpoint.dtype(key).itemsize for key in dtypes)
    is_host = place.type != "cuda"
    extra = passing if checkpoint.parallel_size > 1 and is_host else 0
    if is_host:
        extra = max(extra, checkpoint.unmapped_bytes - needed)
    elif checkpoint.unmapped_bytes:
        check_room(checkpoint.folder, checkpoint.unmapped_bytes, torch.device("cpu"))
    smaller = 2 * sum(numbers) + extra if dtype.itemsize > 2 else None
    check_room(checkpoint.folder, needed + extra, place, smaller=smaller)


def _copy_rows(checkpoint: Checkpoint, weights: Mapping[str, Tensor], model: PreTrainedModel, like: str | None) -> None:
    """Gives special tokens that the training code did not tell apart the rows that they have in the published form."""
    from gmask.checkpoints.megatron_config import rows_to_copy

    embedding = weights[next(key for key in weights if bare_name(key) == "word_embeddings.weight")]
    for row, source in rows_to_copy(checkpoint, model.config, like).items():
        embedding[row] = embedding[source]
