"""Loads models and tokenizers by the name of a model or its folder, and quantizes them on the way."""

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gmask.architectures import architecture_of
from gmask.checkpoints.adapters import PREFIX_TUNING, Adapter, attach, read_adapter, read_parts
from gmask.checkpoints.folder import Config, Folder
from gmask.checkpoints.formats import Checkpoint, bare_name, holds_published
from gmask.checkpoints.hub import BUNDLED_MODELS, fetch, find_local
from gmask.checkpoints.save import main_dtype
from gmask.checkpoints.tensor_files import SCALES
from gmask.errors import GmaskError
from gmask.hardware import (
    best_device,
    bfloat16_slowdown,
    bound_primitive_cache,
    check_room,
    format_bytes,
    has_bfloat16,
    read_dtype,
)
from gmask.models.base import PLACEMENTS, new_parts
from gmask.models.cache import read_kv_cache
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, spread_layers
from gmask.models.glm import GLMForConditionalGeneration
from gmask.native.ops import instruction_sets
from gmask.quantization.kernels import PackedWeight, adopt_blocks
from gmask.quantization.linear import QuantizedLayer, without_numbers
from gmask.quantization.quantizer import (
    ModelType,
    QuantizationConfig,
    detach_from_files,
    finish,
    lay_out,
    quantize_weight,
    read_form,
)
from gmask.tokenizers.special_tokens import find_token_id

LanguageModel: TypeAlias = GLMForConditionalGeneration | ChatGLMForConditionalGeneration


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
    kv_cache: str | None = ...,
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
    kv_cache: str | None = ...,
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
    kv_cache: str | None = ...,
    model_class: type[ModelType],
) -> tuple[ModelType, PreTrainedTokenizerBase]: ...
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
    kv_cache: str | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a model, ready to fill blanks or to chat, and its tokenizer.

    Tensors are copied one by one from the files into the model, and quantized on the way, so that loading takes the
    memory of the model and of one tensor. No code from the folder is run.

    Args:
        name: ``"bundled"`` for the model that comes with gmask, or ``"bundled-chat"``, the same tuned to answer; the
            folder of another one: our own, one in the published Hugging Face form, or a checkpoint of the original
            training code (Megatron, DeepSpeed); or the name of a published model, such as ``THUDM/glm-10b`` or
            ``THUDM/chatglm-6b``, which is downloaded once.
        dtype: of the weights that are not quantized, and of the activations, such as ``"bfloat16"``. By default, on a
            CPU, float32, with which log-probabilities are exact, or bfloat16 for a model of more than 3 billion
            parameters; on other devices as stored.
        device: such as ``"cpu"`` or ``"cuda:1"``. By default the best there is: CUDA, Apple's MPS, the CPU.
        quantize: ``"int8"`` or ``"int4"`` for integers in the four linear layers of every block, the same that
            ``gmask quantize`` writes. It need not be given for a folder of quantized weights; another form is refused.
        group_size: columns that share a scale, 32, 64 or 128; by default all of a row, as published.
        revision: a branch, tag or commit of a published model.
        like: the published model that a checkpoint of the training code is an instance of, such as ``"GLM-10B"``, if
            its shape is not unique. Number of heads, vocabulary and special ids are those of this model.
        tokenizer: the folder with the vocabulary, if it is not beside the weights.
        adapter: the folder of an adapter that was trained for this model: LoRA, DoRA, AdaLoRA, IA3 or a prefix, as
            saved by PEFT or gmask; trained vectors (P-tuning) of gmask; for a ChatGLM also a prefix as the published
            ``ptuning`` code saved it.
        kv_cache: ``"int8"`` to hold keys and values in int8 while answers are written, which takes half the memory of
            bfloat16; by default they have the dtype of the activations. Beams, `generate` and scores do not use it.
        model_class: one of those in `gmask.models.glm` or `gmask.models.chatglm`; by default the one that the adapter
            was trained for, or that the config names.

    Raises:
        GmaskError: no such model; a missing, damaged, dangerous or unsuitable file; too little memory.
    """
    wanted, form = read_dtype(dtype), read_form(quantize, group_size)
    held = read_kv_cache(kv_cache)
    vocabulary = None if tokenizer is None else Path(tokenizer).expanduser()
    with open_folder(name, revision, like=like, tokenizer=vocabulary) as folder:
        config = folder.config
        loaded_tokenizer = folder.read_tokenizer()
        check_vocabulary(loaded_tokenizer, config)
        model = fill_model(
            folder,
            device=torch.device(device or best_device()),
            dtype=wanted,
            form=form,
            adapter=None if adapter is None else Path(adapter).expanduser(),
            model_class=model_class,
        )
    model.kv_cache = held
    return model, loaded_tokenizer


def open_folder(
    name: str | Path, revision: str | None = None, *, like: str | None = None, tokenizer: Path | None = None
) -> Folder:
    """Opens the folder of a model by its name or path; downloads a published model first, if need be.

    Args:
        like: and ``tokenizer``: as of `Folder`.

    Raises:
        GmaskError: no such folder, or one without a model.
    """
    path = find_local(name)
    if path is None:
        return Folder(fetch(str(name), revision=revision), like=like, tokenizer=tokenizer)
    if revision is not None:
        raise GmaskError(f"{name}: is a folder of this machine, which has no revision {revision}")
    folder = Folder(path, like=like, tokenizer=tokenizer)
    if folder.has_config:
        return folder
    if name in BUNDLED_MODELS:
        raise GmaskError(
            "this installation lacks the bundled model: install gmask again, or name the folder of another model"
        )
    if folder.is_megatron:
        return folder
    if (path / "config.json").exists():
        raise GmaskError(f"{path / 'config.json'}: is a folder, where a file is expected")
    raise GmaskError(f"{path}: no config.json there, so it is not the folder of a model")


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """Returns the path of the folder that `open_folder` would open."""
    return open_folder(name, revision).path


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
    """Loads a model without its tokenizer, in evaluation mode; arguments and errors as in `load`."""
    with Folder(folder, like=like) as opened:
        return fill_model(
            opened,
            device=torch.device(device or best_device()),
            dtype=read_dtype(dtype),
            form=read_form(quantize, group_size),
            model_class=model_class,
        )


def load_model_on_gpus(
    checkpoint_path: str | Path,
    num_gpus: int = 2,
    device_map: Mapping[str, int | str] | None = None,
    **kwargs: Any,
) -> ChatGLMForConditionalGeneration:
    """Loads a ChatGLM in float16 over several GPUs, as the published ``utils.load_model_on_gpus``.

    Args:
        checkpoint_path: a folder, or the name of a published model.
        num_gpus: the number of GPUs over which the layers are spread evenly. The first one also gets the embeddings,
            the last norm and the head.
        device_map: the device of each module instead, such as ``{"transformer.layers.0": 1, ...}``: the number of a
            GPU, ``"cpu"`` or ``"disk"``.
        **kwargs: as for `transformers.PreTrainedModel.from_pretrained`, such as ``dtype`` or ``offload_folder``.

    Raises:
        GmaskError: there are fewer GPUs; the model is not a ChatGLM; as of `load`.
    """
    folder = open_folder(checkpoint_path)
    config = folder.config
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
        folder.path, device_map=dict(device_map), **settings
    )
    model.eval()
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder.

    Raises:
        GmaskError: no vocabulary there, or a damaged one.
    """
    with Folder(folder) as opened:
        return opened.read_tokenizer()


LARGE = 3_000_000_000
"""Models with more parameters are loaded in bfloat16 on a CPU by default: in float32 this many take 12 GB."""

DENSE = torch.contiguous_format


def fill_model(
    folder: Folder,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    form: QuantizationConfig | None = None,
    adapter: Path | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """Makes the model of a folder, tensor by tensor, in evaluation mode; arguments and errors as of `gmask.load`.

    ``form``: to which the weights are quantized, unless the folder holds quantized ones.
    """
    bound_primitive_cache()
    config, stored_form = folder.config, folder.quantization
    opened = None if adapter is None else _open_adapter(adapter, folder)
    named = None if opened is None else opened.model_class
    model = folder.shape_model(model_class or _find_class(config, named), quantized=False)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if stored_form is not None:
        _check_form(folder, stored_form, form)
        form = stored_form
        lay_out(model, form)
    tensors = {} if opened is None else opened.read()
    parts = {} if opened is None else read_parts(opened, model, tensors)
    elsewhere = {bare_name(name) for name in parts}
    if opened is not None and opened.kind == PREFIX_TUNING:  # it replaces a prefix that the folder may hold
        elsewhere |= {key for key in folder.weights if "prefix_encoder." in key}
    names = folder.compare(model, elsewhere)
    if form is not None and stored_form is None:
        lay_out(model, form)
    wanted = dtype or _default_dtype(folder, device, numbers)
    plan = plan_weights(model, {name: _loaded_dtype(folder.weights, key, wanted) for key, name in names.items()})
    check_memory(folder.weights, plan, device)
    mapped = find_mapped(folder, model, names) if device.type == "cpu" else {}
    names = {key: name for key, name in names.items() if name not in mapped}
    weights = {
        # Integers are not copied here: `detach_from_files` packs them straight out of the file.
        name: tensor.to(device, plan[name].dtype, copy=tensor.dtype != torch.int8, memory_format=DENSE)
        for name, tensor in stream_weights(folder, model, names, label=f"loading {folder.path.name}")
    }
    folder.check_head(model)
    weights |= {name: tensor.to(device) for name, tensor in parts.items()}
    weights |= {name: without_numbers(plan[name], device) for name in mapped}
    model.load_state_dict(weights, strict=False, assign=True)  # names were compared; only a tied head is absent
    model.tie_weights()
    if form is not None:
        finish(model, form)
    for name, product in mapped.items():
        if product is not None:
            model.get_submodule(name.rpartition(".")[0]).adopt(product)
    if opened is not None:
        attach(model, opened, tensors)
    if form is not None:
        detach_from_files(model)
    return model.eval()


def _open_adapter(path: Path, folder: Folder) -> Adapter:
    """Opens an adapter, and changes the config of the model as the adapter needs it.

    Raises:
        GmaskError: no adapter there, or one for another model.
    """
    opened, config = read_adapter(path), folder.config
    opened.check_base(config, folder.path)
    if opened.kind == PREFIX_TUNING:
        config.pre_seq_len = None
    if "num_labels" in opened.notes:
        config.num_labels = opened.notes["num_labels"]
    return opened


def _find_class(config: Config, name: str | None) -> type[PreTrainedModel] | None:
    """Returns the class of a name, if it is one of ours; else None."""
    architecture = architecture_of(config)
    found: type[PreTrainedModel] | None = architecture.find_class(name) if name in architecture.classes else None
    return found


def plan_weights(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Returns the tensors that a model will hold, by name, on the meta device.

    ``dtypes``: of the tensors by name; integers stay int8.
    """
    tied = model.all_tied_weights_keys
    return {
        name: tensor if tensor.dtype == torch.int8 else tensor.to(dtypes.get(name, tensor.dtype))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def stream_weights(
    folder: Folder, model: PreTrainedModel, names: Mapping[str, str], *, label: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a model by name, one after the other; quantizes those that `lay_out` prepared it for.

    The others have their stored dtype, and may be views of the file, so copy them.

    Args:
        names: of `Folder.compare`.
        label: of a progress bar; None for none.
    """
    rows = folder.copied_rows()
    bar = tqdm(names.items(), desc=label, delay=3, leave=False, disable=None if label else True)
    for key, name in bar:
        tensor = folder.weights.read(key)
        if rows and key == "word_embeddings.weight":
            tensor = tensor.clone()
            for row, source in rows.items():
                tensor[row] = tensor[source]
        yield from quantize_weight(model, name, tensor).items()


def find_mapped(folder: Folder, model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, PackedWeight | None]:
    """Returns the weights that lie in the blocks that this CPU multiplies by, views of their files, by name in a model.

    Their scales are in them; by their own names there is None. A CPU with another path has none.

    Args:
        model: laid out by `lay_out`.
        names: of `Folder.compare`.
    """
    found: dict[str, PackedWeight | None] = {}
    for key, name in names.items() if folder.weights.layout == "mapped" else ():
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, QuantizedLayer) or not name.endswith(".weight"):
            continue
        blocks, scale = (folder.weights.read_blocks(part) for part in (key, f"{key}_scale"))
        if blocks is None or scale is None:
            continue
        rows, width = folder.weights.shape(key)
        form = {"bits": layer.bits, "outputs": rows, "columns": width * 8 // layer.bits}
        product = adopt_blocks(blocks, scale, group_size=layer.group_size, **form)
        if product is not None:
            found |= {name: product, f"{name}_scale": None}
    return found


def _check_form(folder: Folder, stored: QuantizationConfig, wanted: QuantizationConfig | None) -> None:
    """Raises `GmaskError` if a folder holds integers of another form than is asked for.

    If the wanted form has no group size, any is accepted. The embeddings may be quantized or not.
    """
    if wanted is None:
        return
    if wanted.bits != stored.bits or wanted.group_size not in (None, stored.group_size):
        raise GmaskError(f"{folder}: is quantized already ({stored}); for {wanted}, quantize the original model")


def _default_dtype(folder: Folder, device: torch.device, numbers: int) -> torch.dtype:
    if device.type == "cpu":
        return torch.bfloat16 if numbers > LARGE else torch.float32
    return main_dtype(folder.weights, architecture_of(folder.config).embedding)


def _loaded_dtype(checkpoint: Checkpoint, key: str, wanted: torch.dtype) -> torch.dtype:
    """Returns the dtype of a tensor in the model: integers and scales stay as they are stored."""
    stored = checkpoint.dtype(key)
    return wanted if stored.is_floating_point and not key.endswith(SCALES) else stored


def check_memory(checkpoint: Checkpoint, plan: Mapping[str, Tensor], device: torch.device) -> None:
    """Raises `GmaskError` if the weights do not fit into memory, before any is loaded."""
    needed = sum(tensor.nbytes for tensor in plan.values())
    passing = max(checkpoint.shape(key).numel() * checkpoint.dtype(key).itemsize for key in checkpoint)
    is_host = device.type != "cuda"
    extra = passing if checkpoint.parallel_size > 1 and is_host else 0
    if is_host:
        extra = max(extra, checkpoint.unmapped_bytes - needed)
    elif checkpoint.unmapped_bytes:
        check_room(checkpoint.folder, checkpoint.unmapped_bytes, torch.device("cpu"))

    def advise() -> str:
        advice = []
        halved = sum(tensor.numel() * min(tensor.itemsize, 2) for tensor in plan.values())
        if halved < needed:
            slower = ""
            if device.type == "cpu" and not has_bfloat16(device) and not instruction_sets():
                factor = bfloat16_slowdown()
                slower = f", but this CPU has no instructions for it (a product takes {factor:.1f} times as long)"
            advice.append(f"dtype='bfloat16' needs {format_bytes(halved + extra)}{slower}")
        if not any(tensor.dtype == torch.int8 for tensor in plan.values()):
            advice.append("quantize='int4' needs less")
        return "; ".join(advice)

    check_room(checkpoint.folder, needed + extra, device, advise=advise)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raises `GmaskError` if a tokenizer does not belong to a model."""
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


def check_pretrained(path: Path, model_class: Any, *, config: Any = None, **settings: Any) -> None:
    """Runs `check_folder` for the arguments of `from_pretrained`, unless the folder holds no weights.

    Args:
        settings: the keywords of `from_pretrained`, also those for the config.
    """
    if not holds_published(path):
        return
    dtype = settings.pop("dtype", None) or settings.pop("torch_dtype", None)
    placed = {name: settings.pop(name, None) for name in PLACEMENTS}
    form = placed.pop("quantization_config")
    is_ours = form is None or isinstance(form, QuantizationConfig)
    if not isinstance(config, PreTrainedConfig):
        config = model_class.config_class.from_pretrained(config or path, **settings)
    with Folder(path, config=copy.deepcopy(config)) as folder:  # making a model changes its config
        check_folder(
            folder,
            model_class,
            dtype=getattr(torch, dtype, None) if isinstance(dtype, str) else dtype,
            form=form if is_ours else None,
            on_cpu=is_ours and all(value is None for value in placed.values()),
        )


def check_folder(
    folder: Folder,
    model_class: type[PreTrainedModel],
    *,
    dtype: torch.dtype | None = None,
    form: QuantizationConfig | None = None,
    on_cpu: bool = True,
) -> None:
    """Raises `GmaskError` if weights do not belong to a model, or do not fit into memory, before the model is built.

    Args:
        model_class: of the model. The head of a task may be absent from the weights, and the bare body ignores heads.
        dtype: of the loaded weights; None for as stored.
        form: to which they are quantized while they are loaded.
        on_cpu: True if they all go into the memory of the CPU; then its free memory is checked.
    """
    weights = folder.weights
    if weights.layout == "mapped":
        raise GmaskError(
            f"{folder}: is laid out for gmask's CPU kernels, and read by gmask.load; for from_pretrained convert it: "
            f"gmask convert {folder} NEW --to gmask"
        )
    is_body = model_class.__name__ == architecture_of(folder.config).body
    model = folder.shape_model(None if is_body else model_class)
    folder.compare(model, _new_parts(weights, model) | (_outside_body(weights, model) if is_body else set()))
    if not is_body:
        folder.check_head(model)
    if on_cpu:
        if form is not None and folder.quantization is None:
            lay_out(model, form)
        wanted = dtype or folder.config.dtype or torch.float32
        plan = plan_weights(model, {name: wanted for name in model.state_dict() if not name.endswith(SCALES)})
        check_memory(weights, plan, torch.device("cpu"))


def _new_parts(checkpoint: Checkpoint, model: Any) -> set[str]:
    """Returns the bare names of a task's head and of an adapter, if the checkpoint has no tensor of it."""
    parts = ({bare_name(name) for name in names} for names in new_parts(model))
    return {bare for part in parts if part.isdisjoint(checkpoint) for bare in part}


def _outside_body(checkpoint: Checkpoint, model: Any) -> set[str]:
    """Returns the bare names of all tensors outside of the body, that is, of heads."""
    own = {bare_name(key): key for key in model.state_dict()}
    body = {bare.partition(".")[0] for bare, key in own.items() if key.startswith(f"{model.base_model_prefix}.")}
    return {bare for bare in {*own, *checkpoint} if bare.partition(".")[0] not in body}
