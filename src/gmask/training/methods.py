"""Methods of tuning: which weights train, in which model, and which of them are saved.

PEFT puts the layers of LoRA and its like into the model in place. A prefix and trained vectors are modules of the model
itself. So the class of the model stays, and with it all that works on it. The weights that train are float32, in
whatever precision the others are.
"""

import copy
import dataclasses
import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.architectures import architecture_of
from gmask.checkpoints.adapters import (
    NAME,
    PREFIX_TUNING,
    PROMPTS,
    has_layers,
    head_parameters,
    inject,
    load_adapter,
    read_adapter,
    require_peft,
    save_adapter,
)
from gmask.checkpoints.folder import read_config
from gmask.checkpoints.load import find_folder, load, load_tokenizer
from gmask.checkpoints.save import write_tokenizer
from gmask.errors import GmaskError
from gmask.hardware import bound_primitive_cache, read_dtype
from gmask.models.base import attach_prefix
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration, attach_prompts
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.quantization.linear import QuantizedLayer
from gmask.recipes.tuning import Method, MethodSettings, TuningRecipe, check_model
from gmask.tasks.metrics import Rows
from gmask.tasks.task import Task

if TYPE_CHECKING:
    from peft import PeftConfig


LAYER_PATHS = {
    "query_key_value": "attention.query_key_value",
    "dense": "attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}
"""The paths of the linear layers in a block. The name alone would not do: a classifier's head has a ``dense``, too."""

ADALORA_WARMUP, ADALORA_END = 0.1, 0.3
"""The shares of the steps before and after those that drop ranks; near those of the paper."""


@dataclass(frozen=True, slots=True)
class TrainableRow:
    """The parameters of one kind of module, summed over the layers."""

    module: str  # its path, with * for the number of a layer
    tensors: int
    trainable: int  # parameters
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class TrainableTable:
    """The numbers of parameters that train, and of all, by kind of module."""

    rows: tuple[TrainableRow, ...]

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows)

    @property
    def total(self) -> int:
        return sum(row.total for row in self.rows)

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total if self.total else 0.0

    def to_rows(self) -> Rows:
        """The table as text, for a terminal of 80 columns or a page: what is frozen is one row."""
        cells = [
            (_short(row.module), f"{row.trainable:,}", f"{row.total:,}", f"{row.percent:.3g} %")
            for row in self.rows
            if row.trainable
        ]
        if frozen := sum(row.total for row in self.rows if not row.trainable):
            cells.append(("all else is frozen", "0", f"{frozen:,}", "0 %"))
        sums = ("all", f"{self.trainable:,}", f"{self.total:,}", f"{self.percent:.3g} %")
        return Rows(("module", "trainable", "of", "share"), [*cells, sums])


def _short(module: str) -> str:
    """The path of a module below the body of the model."""
    return module.removeprefix("glm.").removeprefix("transformer.")


def apply_method(model: PreTrainedModel, settings: MethodSettings, *, steps: int | None = None) -> TrainableTable:
    """Prepares a model for training by a method, in place: adds the method's parameters, and freezes the others.

    Args:
        model: without an adapter. The head for a task, if it has one, trains with every method.
        steps: of the run, from which adalora plans its ranks; see `RankSchedule`.

    Raises:
        GmaskError: a method that this model cannot be trained by.
    """
    is_quantized = any(isinstance(module, QuantizedLayer) for module in model.modules())
    check_model(settings, is_quantized=is_quantized, is_glm=isinstance(model.config, GLMConfig))
    if settings.name in ("full", "frozen-embeddings"):
        _train_weights(model, with_embeddings=settings.name == "full")
    elif settings.name == "p-tuning-v2":
        model.requires_grad_(False)
        attach_prefix(model, settings.prefix_length, projection=settings.projection).requires_grad_(True)
    elif settings.name == "p-tuning":
        model.requires_grad_(False)
        attach_prompts(model, settings.prompt_tokens, settings.prompt_encoder).requires_grad_(True)
    else:
        inject(model, make_peft_config(settings, steps=steps))
    for parameter in head_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return count_trainable(model)


def resume_adapter(model: PreTrainedModel, folder: Path | str) -> TrainableTable:
    """Loads an adapter and continues to train it; the rest of the model is frozen.

    Raises:
        GmaskError: as of `load_adapter`.
    """
    load_adapter(model, folder, trainable=True)
    return count_trainable(model)


def count_trainable(model: nn.Module) -> TrainableTable:
    """The table of a model's parameters. Packed integers count as the weights that they encode."""
    packed = {
        f"{name}.weight": 8 // module.bits
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    }
    sums: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("weight_scale"):
            continue
        count = parameter.numel() * packed.get(name, 1)
        row = sums.setdefault(_module_kind(name), [0, 0, 0])
        row[0] += 1
        row[1] += count * parameter.requires_grad
        row[2] += count
    return TrainableTable(tuple(TrainableRow(module, *row) for module, row in sums.items()))


def make_peft_config(settings: MethodSettings, *, steps: int | None = None) -> "PeftConfig":
    """PEFT's config of a low-rank method, or of ia3.

    Raises:
        GmaskError: adalora without a number of steps that leaves time to drop ranks.
    """
    peft = require_peft()
    config: PeftConfig
    targets = [LAYER_PATHS[layer] for layer in settings.adapted_layers]
    if settings.name == "ia3":
        config = peft.IA3Config(target_modules=targets, feedforward_modules=[LAYER_PATHS["dense_4h_to_h"]])
        return config
    common: dict[str, Any] = {
        "target_modules": targets,
        "lora_alpha": settings.scale,
        "lora_dropout": settings.dropout,
    }
    if settings.name == "adalora":
        ranks = {"target_r": settings.rank, "init_r": settings.first_rank}  # target_r: their mean at the end
        config = peft.AdaLoraConfig(**common, **ranks, **_plan_steps(steps))
    else:
        config = peft.LoraConfig(**common, r=settings.rank, use_dora=settings.name == "dora")
    return config


class RankSchedule:
    """Drops the least important ranks of adalora's layers while a model trains.

    The loop adds `penalty` to each loss, and calls `update` after each step of the optimizer, before the gradients are
    cleared. `state` and `restore` make an exact resume possible.
    """

    def __init__(self, model: PreTrainedModel, *, steps: int | None = None) -> None:
        """
        Args:
            model: prepared for adalora by `apply_method`.
            steps: of the run, if `apply_method` got another number.
        """
        from peft.tuners.adalora.layer import RankAllocator

        self.model, self.config = model, model.peft_config[NAME]
        if steps is not None:
            for name, value in _plan_steps(steps).items():
                setattr(self.config, name, value)
        self._allocator: Any = RankAllocator(model, self.config, NAME)  # type: ignore[no-untyped-call]

    @staticmethod
    def of(model: PreTrainedModel, *, steps: int | None = None) -> "RankSchedule | None":
        """The schedule of a model that trains by adalora; None for others."""
        is_adalora = has_layers(model) and model.peft_config[NAME].peft_type == "ADALORA"
        return RankSchedule(model, steps=steps) if is_adalora else None

    def penalty(self) -> Tensor:
        """The distance of the layers' matrices from orthogonal ones, weighted as in the paper (equation 4)."""
        distances = []
        for name, matrix in self.model.named_parameters():
            if matrix.requires_grad and (".lora_A." in name or ".lora_B." in name):
                product = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
                distances.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        penalty: Tensor = self.config.orth_reg_weight * torch.stack(distances).mean()
        return penalty

    def update(self, step: int) -> None:
        """Weighs the ranks by the gradients of a step, counted from 1, and sets the weakest to 0."""
        last = self.config.total_step - self.config.tfinal
        if step > last:
            self._allocator.mask_using_rank_pattern(self.model, self.config.rank_pattern)
            return
        _, pattern = self._allocator.update_and_allocate(self.model, step, force_mask=step == last)
        if pattern:
            self.config.rank_pattern = pattern

    def state(self) -> dict[str, Tensor]:
        """The estimates of the ranks' importance, and the ranks that are kept, as ``KIND.NAME``."""
        allocator = self._allocator
        estimates = {
            "importance": allocator.ipt,
            "average": allocator.exp_avg_ipt,
            "uncertainty": allocator.exp_avg_unc,
        }
        state = {f"{kind}.{name}": value for kind, values in estimates.items() for name, value in values.items()}
        pattern = self.config.rank_pattern or {}
        return state | {f"kept.{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continues from the `state` of another schedule."""
        kinds: dict[str, dict[str, Tensor]] = {"importance": {}, "average": {}, "uncertainty": {}, "kept": {}}
        for full_name, value in state.items():
            kind, _, name = full_name.partition(".")
            kinds[kind][name] = value.to(self.model.device)
        allocator = self._allocator
        allocator.ipt, allocator.exp_avg_ipt = kinds["importance"], kinds["average"]
        allocator.exp_avg_unc = kinds["uncertainty"]
        self.config.rank_pattern = {name: kept.tolist() for name, kept in kinds["kept"].items()} or None


def _train_weights(model: PreTrainedModel, *, with_embeddings: bool) -> None:
    model.float()  # the embeddings too, though they may not train: the head shares them
    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(with_embeddings)


def _plan_steps(steps: int | None) -> dict[str, int]:
    """The steps at which adalora drops ranks, as keywords of PEFT's config."""
    if steps is None or steps < 10:
        raise GmaskError(
            "adalora drops ranks step by step and needs to know of at least 10 steps: set steps, or epochs"
        )
    return {
        "tinit": int(ADALORA_WARMUP * steps),
        "tfinal": int(ADALORA_END * steps),
        "deltaT": max(1, steps // 100),
        "total_step": steps,
    }


def _module_kind(name: str) -> str:
    """``glm.transformer.layers.3.mlp.dense_4h_to_h.weight`` as ``glm.transformer.layers.*.mlp.dense_4h_to_h``."""
    path = re.sub(r"\.\d+\.", ".*.", name.replace(".base_layer", "").replace(f".{NAME}", ""))
    return re.sub(r"\.(?:weight|bias)$", "", path)


METHODS_OF: dict[str, tuple[Method, ...]] = {
    "LORA": ("lora", "dora", "qlora"), "ADALORA": ("adalora",), "IA3": ("ia3",), PREFIX_TUNING: ("p-tuning-v2",),
    PROMPTS: ("p-tuning",),
}  # fmt: skip
"""The methods that train an adapter, by its kind."""

SIZES = {"LORA": ("r", "rank"), PREFIX_TUNING: ("num_virtual_tokens", "prefix_length"),
         PROMPTS: ("num_virtual_tokens", "prompt_tokens")}  # fmt: skip
"""The key of an adapter's size in its folder, and in a recipe."""


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
    """Prepares the model for training: by the recipe's method, or by an adapter that is trained on.

    Raises:
        GmaskError: an adapter or a method that does not fit the model.
    """
    torch.manual_seed(recipe.run.seed)  # of the parameters that the method adds
    if recipe.model.adapter is not None:
        _check_adapter(Path(recipe.model.adapter).expanduser(), recipe.method)
        table = resume_adapter(model, recipe.model.adapter)
    else:
        table = apply_method(model, recipe.method, steps=steps)
    for parameter in model.parameters():
        if parameter.requires_grad:  # master weights, whatever the dtype of the forward pass
            parameter.data = parameter.data.float()
    if recipe.optimization.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # reentrant needs inputs with gradients
    return table


def _check_adapter(folder: Path, method: MethodSettings) -> None:
    """Raises `GmaskError` if the adapter in a folder has another method or another size than the recipe."""
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


def peak_memory(device: torch.device) -> int:
    """The peak of memory so far, in bytes: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _make_random(name: str, device: torch.device, *, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with the shape of another and random weights, and its tokenizer."""
    folder = find_folder(name)
    config = read_config(folder)
    torch.manual_seed(seed)
    model: PreTrainedModel = architecture_of(config).find_class((config.architectures or [None])[0])(config)
    return model.to(device).eval(), load_tokenizer(folder)
