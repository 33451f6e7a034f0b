"""Which model does a run tune, and what does it leave of it?"""

import copy
import dataclasses
import resource
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.adapter_files import PREFIX_TUNING, PROMPTS, read_adapter
from gmask.checkpoints.adapters import save_adapter
from gmask.checkpoints.architectures import architecture_of
from gmask.checkpoints.model_folder import write_tokenizer
from gmask.errors import GmaskError
from gmask.loading import find_folder, load, load_tokenizer, read_config, read_dtype
from gmask.models.glm import GLMForConditionalGeneration, GLMForSequenceClassification
from gmask.native.primitive_cache import bound_primitive_cache
from gmask.tasks.recipes.methods import Method, MethodSettings
from gmask.tasks.recipes.tuning import TuningRecipe
from gmask.tasks.task import Task
from gmask.training.tuning.methods import TrainableTable, apply_method, resume_adapter

METHODS_OF: dict[str, tuple[Method, ...]] = {
    "LORA": ("lora", "dora", "qlora"), "ADALORA": ("adalora",), "IA3": ("ia3",), PREFIX_TUNING: ("p-tuning-v2",),
    PROMPTS: ("p-tuning",),
}  # fmt: skip
"""The methods that train an adapter, by its kind."""

SIZES = {"LORA": ("r", "rank"), PREFIX_TUNING: ("num_virtual_tokens", "prefix_length"),
         PROMPTS: ("num_virtual_tokens", "prompt_tokens")}  # fmt: skip
"""What an adapter's folder calls its size, and what a recipe calls it."""


def load_tuned_model(
    recipe: TuningRecipe, task: Task, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a recipe, with a head for the task if that needs one, and its tokenizer.

    Raises:
        GmaskError: as of `gmask.load`; a head on a model that is quantized or no GLM.
    """
    bound_primitive_cache()
    settings = recipe.model
    if settings.initialization == "random":
        model, tokenizer = _make_random(settings.name, device, seed=recipe.run.seed)
    else:
        model, tokenizer = load(settings.name, dtype=settings.dtype, device=device, quantize=settings.quantize)
    if task.kind == "classification":
        torch.manual_seed(recipe.run.seed)
        model = as_classifier(model, len(task.choices))
    return model, tokenizer


def choose_trainable(model: PreTrainedModel, recipe: TuningRecipe, *, steps: int) -> TrainableTable:
    """Makes ready what the recipe trains: an adapter to go on from, or what its method says.

    Raises:
        GmaskError: an adapter or a method that does not fit the model.
    """
    torch.manual_seed(recipe.run.seed)  # of what the method adds
    if recipe.model.adapter is not None:
        _check_adapter(Path(recipe.model.adapter).expanduser(), recipe.method)
        table = resume_adapter(model, recipe.model.adapter)
    else:
        table = apply_method(model, recipe.method, steps=steps)
    for parameter in model.parameters():
        if parameter.requires_grad:  # master weights, whatever the forward pass computes in
            parameter.data = parameter.data.float()
    if recipe.optimization.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # inputs need no gradients
    return table


def _check_adapter(folder: Path, method: MethodSettings) -> None:
    """Raises `GmaskError` if what a folder holds is of another method, or of another size, than the recipe says."""
    adapter = read_adapter(folder)
    methods = METHODS_OF[adapter.kind]
    if method.name not in methods:
        raise GmaskError(
            f"{folder}: was trained by {' or '.join(methods)}, and method.name is {method.name}: set it to that"
        )
    name, key = SIZES.get(adapter.kind, ("", ""))
    stored, wanted = adapter.values.get(name), getattr(method, key, None)
    if stored != wanted and name in adapter.values:
        raise GmaskError(f"{folder}: its {key} is {stored}, and method.{key} is {wanted}: set it to {stored}")


def as_classifier(model: PreTrainedModel, classes: int) -> GLMForSequenceClassification:
    """A GLM with a new head in place of its own; one that classifies already stays as it is.

    Raises:
        GmaskError: a ChatGLM, a quantized model, or a head with another number of classes.
    """
    if isinstance(model, GLMForSequenceClassification):
        if model.num_labels != classes:
            raise GmaskError(f"the model has a head for {model.num_labels} classes, and the task has {classes}")
        return model
    if not isinstance(model, GLMForConditionalGeneration):
        raise GmaskError("classification puts a head on a GLM; for a ChatGLM make the task a cloze or seq2seq")
    if getattr(model, "is_quantized", False):
        raise GmaskError("classification trains a head beside float weights: leave model.quantize out")
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    config.architectures = [GLMForSequenceClassification.__name__]
    with torch.device("meta"):
        classifier = GLMForSequenceClassification(config)
    classifier.glm = model.glm
    for head in (classifier.dense, classifier.out_proj):
        head.to_empty(device=model.device)
        torch.nn.init.normal_(head.weight, std=config.initializer_range)
        torch.nn.init.zeros_(head.bias)
    classifier.name_or_path = model.name_or_path
    classifier.to(model.dtype).eval()
    return classifier


def save_tuned_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TuningRecipe,
    folder: Path,
    *,
    dtype: torch.dtype,
) -> None:
    """Writes the adapter, or the whole model with its tokenizer.

    dtype: of a whole model's weights, unless the recipe names one.
    """
    if recipe.method.makes_adapter:
        save_adapter(model, folder, base=recipe.model.name, settings=dataclasses.asdict(recipe.method))
    else:
        is_sharded = isinstance(model, FSDPModule)
        if is_sharded:  # it cannot be cast, and its own state is in parts
            model.save_pretrained(folder, state_dict={name: value.detach() for name, value in model.named_parameters()})
        else:
            model.to(read_dtype(recipe.model.dtype) or dtype).save_pretrained(folder)
        write_tokenizer(tokenizer, folder, published=False)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors' own would keep other users out


def peak_memory(device: torch.device) -> int:
    """The most bytes that were taken so far: of a GPU by its tensors, else by this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _make_random(name: str, device: torch.device, *, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of the shape of another, which has learnt nothing."""
    folder = find_folder(name)
    config = read_config(folder)
    torch.manual_seed(seed)
    model: PreTrainedModel = architecture_of(config).find_class((config.architectures or [None])[0])(config)
    return model.to(device).eval(), load_tokenizer(folder)
