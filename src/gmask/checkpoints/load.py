"""A name or a folder becomes a model and its tokenizer, quantized on the way; what does not fit is refused."""

import copy
import importlib.util
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.adapters import PREFIX, PREFIX_TUNING, Adapter, attach, read_adapter, read_parts
from gmask.checkpoints.config import Config, lacks_config, read_config
from gmask.checkpoints.folder import main_dtype
from gmask.checkpoints.tensor_files import SCALES
from gmask.checkpoints.weights import WEIGHT_FILES, Checkpoint, bare_name, is_megatron, open_checkpoint
from gmask.checkpoints.zoo import architecture_of, class_of
from gmask.errors import GmaskError
from gmask.files import refuse_placeholder
from gmask.hardware import (
    best_device,
    bfloat16_slowdown,
    bound_primitive_cache,
    check_room,
    format_bytes,
    has_bfloat16,
    read_dtype,
)
from gmask.models.base import PLACEMENTS
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, spread_layers
from gmask.models.glm import GLMForConditionalGeneration
from gmask.quantization.quantizer import (
    QuantizationConfig,
    finish,
    form_of,
    lay_out,
    quantize_weight,
    read_form,
    settle,
)
from gmask.tokenizers.folder import SETTINGS_FILES, VOCABULARY_FILES, read_tokenizer, require_vocabulary
from gmask.tokenizers.glm_published import find_token_id

BUNDLED = Path(__file__).parents[1] / "pretrained"
BUNDLED_MODELS = {"bundled": BUNDLED, "bundled-chat": BUNDLED / "chat"}
"""What comes with gmask: a model that fills blanks, and the same tuned to answer."""

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
    from gmask.checkpoints.hub import fetch, looks_like_hub_name
    from gmask.checkpoints.zoo import find_family  # parses a table, which the bundled model needs not wait for

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
    from gmask.checkpoints.config import find_row

    with open_checkpoint(folder) as checkpoint:
        return find_row(checkpoint, like).tokenizer


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
    from gmask.checkpoints.config import rows_to_copy  # parses a table, which others need not wait for

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


HEAD = "lm_head.weight"


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raises `GmaskError` if a tokenizer cannot be that of a model."""
    source = tokenizer.name_or_path or "the tokenizer"
    if len(tokenizer) > config.vocab_size:
        raise GmaskError(
            f"{source}: has {len(tokenizer)} tokens, but the model only {config.vocab_size}; the vocabulary files "
            "belong to another model or revision: take all files from one"
        )
    for role in architecture_of(config).prompt_ids:
        token_id = find_token_id(tokenizer, role)
        known = getattr(config, role)
        if token_id is not None and known is not None and token_id != known:
            raise GmaskError(
                f"{source}: its {role} is {token_id}, but that of the model {known}; the vocabulary files belong to "
                "another model or revision: take all files from one"
            )


def match_keys(checkpoint: Checkpoint, model: PreTrainedModel, elsewhere: Collection[str] = ()) -> dict[str, str]:
    """For each tensor of a checkpoint that a model takes, its name in the model.

    Args:
        elsewhere: bare names of tensors that the model has from another checkpoint.

    Raises:
        GmaskError: the model lacks a tensor, has no place for one, or has another shape for one.
    """
    state = model.state_dict()
    own = {bare_name(key): key for key in state}
    skipped = {HEAD, f"{HEAD}_scale"} if model.config.tie_word_embeddings else set()
    unread = model._keys_to_ignore_on_load_unexpected or []
    skipped |= {key for key in checkpoint if any(re.search(pattern, key) for pattern in unread)}
    expected = own.keys() - skipped - set(elsewhere)
    found = set(checkpoint) - skipped - set(elsewhere)
    if expected != found:
        if found and all(key.startswith(PREFIX) for key in found):
            raise GmaskError(
                f"{checkpoint.folder}: holds no more than a P-tuning prefix: load the model that it was trained for, "
                f"with adapter={checkpoint.folder}"
            )
        raise GmaskError(f"{checkpoint.folder}: {_explain_keys(checkpoint, expected - found, found - expected, model)}")
    for key in checkpoint:
        if key in own and checkpoint.shape(key) != state[own[key]].shape:
            shapes = f"{list(checkpoint.shape(key))}, but the config asks for {list(state[own[key]].shape)}"
            if key.endswith(("word_embeddings.weight", HEAD)):
                shapes += "; take all files from one revision"
            elif checkpoint.dtype(key) == torch.int8:
                shapes += "; quantization_bit there says another number of bits than the weights have"
            raise GmaskError(f"{checkpoint.folder}: {checkpoint.stored_name(key)} has the shape {shapes}")
    return {key: own[key] for key in checkpoint if key in expected}


def _explain_keys(
    checkpoint: Checkpoint, missing: Collection[str], unexpected: Collection[str], model: PreTrainedModel
) -> str:
    if any(key.startswith("image_encoder.") for key in unexpected):
        return "holds an image_encoder, so it is VisualGLM, which gmask does not run; use github.com/THUDM/VisualGLM-6B"
    if scales := [key for key in missing if key.endswith(SCALES)]:
        if not any(checkpoint.dtype(key) == torch.int8 for key in checkpoint):
            return "the weights are not quantized, though config.json says so: take quantization_bit out of it"
        return f"the weights lack their scales ({min(scales)} ...); download the model again, or quantize it anew"
    if any(key.endswith(SCALES) for key in unexpected):
        return (
            "holds quantized weights, where config.json says nothing of it; take all files from one revision, or name "
            "the folder of the unquantized model"
        )
    fault, keys = ("lack", missing) if missing else ("hold the unexpected", unexpected)
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return (
        f"the weights {fault} {', '.join(sorted(keys)[:3])}{more}; they do not fit the config, or are not those of "
        f"{type(model).__name__}"
    )


def check_head(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raises `GmaskError` if a head that the config ties to the embedding was stored, and differs from it."""
    embedding = architecture_of(model.config).embedding
    for head, twin in ((HEAD, embedding), (f"{HEAD}_scale", f"{embedding}_scale")):
        if not model.config.tie_word_embeddings or head not in checkpoint or twin not in checkpoint:
            continue
        if not torch.equal(checkpoint.read(head), checkpoint.read(twin)):
            raise GmaskError(
                f"{checkpoint.folder}: {head} differs from {twin}, though config.json ties them; "
                "set tie_word_embeddings to false there to use it"
            )


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
