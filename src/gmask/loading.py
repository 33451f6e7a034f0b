"""How do a name or a folder become a model and its tokenizer?"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.configs import lacks_config
from gmask.checkpoints.configs import read_config as read_config
from gmask.checkpoints.fit import check_vocabulary
from gmask.checkpoints.model_weights import fill_model
from gmask.checkpoints.reading import is_megatron, open_checkpoint
from gmask.checkpoints.reading import weight_files as weight_files
from gmask.checkpoints.tensor_files import refuse_placeholder
from gmask.checkpoints.tokenizer_files import SETTINGS_FILES, VOCABULARY_FILES, read_tokenizer, require_vocabulary
from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.chatglm.placement import spread_layers
from gmask.models.glm import GLMForConditionalGeneration
from gmask.quantization.quantizer import read_form

BUNDLED = Path(__file__).parent / "pretrained"

BUNDLED_MODELS = {"bundled": BUNDLED, "bundled-chat": BUNDLED / "chat"}
"""What comes with gmask: a model that fills blanks, and the same tuned to answer."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LanguageModel: TypeAlias = GLMForConditionalGeneration | ChatGLMForConditionalGeneration

Model = TypeVar("Model", bound=PreTrainedModel)


@overload
def load(
    name: Literal["bundled", "bundled-chat"] = ...,
    *,
    dtype: str | torch.dtype | None = ...,
    device: str | torch.device | None = ...,
    quantize: str | None = ...,
    group_size: int | None = ...,
    revision: None = ...,
    like: None = ...,
    tokenizer: str | Path | None = ...,
    adapter: str | Path | None = ...,
    model_class: None = None,
) -> tuple[GLMForConditionalGeneration, PreTrainedTokenizerBase]: ...
@overload
def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = ...,
    device: str | torch.device | None = ...,
    quantize: str | None = ...,
    group_size: int | None = ...,
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
    quantize: str | None = ...,
    group_size: int | None = ...,
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
    quantize: str | None = None,
    group_size: int | None = None,
    revision: str | None = None,
    like: str | None = None,
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a model, ready to fill blanks or to chat, and its tokenizer.

    Tensors go one by one from the files to their places in the model, and are quantized on the way, so that at no time
    more memory is taken than the model needs, and one tensor. No code from the folder is run.

    Args:
        name: ``"bundled"`` for the model that comes with gmask, or ``"bundled-chat"``, the same tuned to answer; the
            folder of another one: our own, one in the published Hugging Face form, or a checkpoint of the original
            training code (Megatron, DeepSpeed); or the name of a published model, such as ``THUDM/glm-10b`` or
            ``THUDM/chatglm-6b``, which is downloaded once.
        dtype: of the weights, or of those that are not quantized and of what is computed with them, such as
            ``"bfloat16"``. By default on a CPU float32, where log-probabilities are then exact, but bfloat16 for a
            model of more than 3 billion parameters; elsewhere as stored.
        device: such as ``"cpu"`` or ``"cuda:1"``. By default the best there is: CUDA, Apple's MPS, the CPU.
        quantize: ``"int8"`` or ``"int4"`` for integers in the four linear layers of every block, the same that
            ``gmask quantize`` writes. A folder that holds quantized weights needs no word; another form is refused.
        group_size: columns that share a scale, 32, 64 or 128; by default all of a row, as published.
        revision: a branch, tag or commit of a published model.
        like: for a checkpoint of the training code whose shape does not tell, the published model that it is made
            like, such as ``"GLM-10B"``: number of heads, vocabulary and special ids come from there.
        tokenizer: the folder with the vocabulary, if it is not beside the weights.
        adapter: the folder of what was trained for this model beside its weights: LoRA, DoRA, AdaLoRA, IA3 or a prefix,
            as PEFT or gmask saved them; trained vectors of gmask's (P-tuning); for a ChatGLM also a prefix as the
            published ``ptuning`` code saved it.
        model_class: one of those in `gmask.models.glm` or `gmask.models.chatglm`; by default the one that the adapter
            was trained for, or that the config names.

    Raises:
        GmaskError: no such model; a missing, damaged, dangerous or unsuitable file, which is named; too little memory.
    """
    wanted, form = read_dtype(dtype), read_form(quantize, group_size)
    folder = find_folder(name, revision)
    config = read_config(folder, like)
    words = load_tokenizer(folder if tokenizer is None else Path(tokenizer).expanduser(), kind=_find_kind(folder, like))
    check_vocabulary(words, config)
    model = fill_model(
        folder,
        config,
        device=torch.device(device or best_device()),
        dtype=wanted,
        form=form,
        adapter=None if adapter is None else Path(adapter).expanduser(),
        like=like,
        model_class=model_class,
    )
    return model, words


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder that a name stands for; that of a published model is downloaded first, if need be.

    Raises:
        GmaskError: there is none, or it holds no model.
    """
    folder = BUNDLED_MODELS.get(str(name)) or Path(name).expanduser()
    if revision is not None and (name in BUNDLED_MODELS or folder.exists()):
        raise GmaskError(f"{name}: is a folder of this machine, which has no revision {revision}")
    if (folder / "config.json").is_file():
        return folder
    if name in BUNDLED_MODELS:
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
    quantize: str | None = None,
    group_size: int | None = None,
    like: str | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> Any:
    """The model alone, in evaluation mode; arguments and errors as in `load`."""
    return fill_model(
        folder,
        read_config(folder, like),
        device=torch.device(device or best_device()),
        dtype=read_dtype(dtype),
        form=read_form(quantize, group_size),
        like=like,
        model_class=model_class,
    )


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
        for path in sorted(folder.iterdir()):
            if path.name in VOCABULARY_FILES | SETTINGS_FILES:
                refuse_placeholder(path)
        if is_megatron(folder):
            require_vocabulary(folder, kind)
    return read_tokenizer(folder, kind=kind)


def _find_kind(folder: Path, like: str | None) -> str | None:
    """The vocabulary of a checkpoint of the training code, by the catalog; None where files say it."""
    if not lacks_config(folder):
        return None
    from gmask.checkpoints.megatron_config import find_row

    with open_checkpoint(folder) as checkpoint:
        return find_row(checkpoint, like).tokenizer


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name; None for ``"auto"``.

    Raises:
        GmaskError: no such name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return None
    if dtype not in DTYPES:
        raise GmaskError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]
