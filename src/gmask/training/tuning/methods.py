"""Which weights of a model train, by which method, and how many are they?

LoRA and its like are put into the model in place by PEFT, a prefix and trained vectors live in modules of the model's
own: its class, and every verb that works on it, stays. What trains is float32, whatever the precision of the rest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmask.checkpoints.adapters import head_parameters, load_adapter
from gmask.checkpoints.peft_layers import NAME, has_layers, inject, require_peft
from gmask.errors import GmaskError
from gmask.models.glm import GLMConfig
from gmask.models.glm.prompt_vectors import attach_prompts
from gmask.models.prefix import attach_prefix
from gmask.quantization.linear import QuantizedLayer
from gmask.tasks.recipes.methods import MethodSettings, check_model
from gmask.tasks.tables import Rows

if TYPE_CHECKING:
    from peft import PeftConfig

PLACES = {
    "query_key_value": "attention.query_key_value",
    "dense": "attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}
"""Where the linear layers of a block are; the head of a classifier has a ``dense``, too."""

ADALORA_WARMUP, ADALORA_END = 0.1, 0.3
"""Shares of the steps before ranks are dropped and after that, near those of the paper."""


@dataclass(frozen=True, slots=True)
class TrainableRow:
    """The parameters of one kind of module, in all layers together."""

    module: str  # its name, with * for the number of a layer
    tensors: int
    trainable: int  # numbers
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class TrainableTable:
    """What trains, and what does not."""

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
        """For a terminal or a page."""
        cells = [
            (row.module, str(row.tensors), f"{row.trainable:,}", f"{row.total:,}", f"{row.percent:.3g} %")
            for row in self.rows
        ]
        tensors = sum(row.tensors for row in self.rows)
        sums = ("all", str(tensors), f"{self.trainable:,}", f"{self.total:,}", f"{self.percent:.3g} %")
        return Rows(("module", "tensors", "trainable", "of", "share"), [*cells, sums])


def apply_method(model: PreTrainedModel, settings: MethodSettings, *, steps: int | None = None) -> TrainableTable:
    """Makes a model ready to be trained by a method, in place: adds what it needs, freezes what it leaves alone.

    Args:
        model: without an adapter. The head for a task, if it has one, trains with every method.
        steps: of the run, by which adalora plans its ranks; see `RankSchedule`.

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
    """Loads an adapter to train it on; the rest of the model is frozen.

    Raises:
        GmaskError: as of `load_adapter`.
    """
    load_adapter(model, folder, trainable=True)
    return count_trainable(model)


def count_trainable(model: nn.Module) -> TrainableTable:
    """The table of a model's parameters as they are now; integers count as the weights that they stand for."""
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
    """What PEFT calls a method of low rank, or ia3.

    Raises:
        GmaskError: adalora without a number of steps that leaves time to drop ranks.
    """
    peft = require_peft()
    config: PeftConfig
    targets = [PLACES[layer] for layer in settings.adapted_layers]
    if settings.name == "ia3":
        config = peft.IA3Config(target_modules=targets, feedforward_modules=[PLACES["dense_4h_to_h"]])
        return config
    common: dict[str, Any] = {
        "target_modules": targets,
        "lora_alpha": settings.scale,
        "lora_dropout": settings.dropout,
    }
    if settings.name == "adalora":
        ranks = {"target_r": settings.rank, "init_r": settings.first_rank}  # the first is the mean of those that stay
        config = peft.AdaLoraConfig(**common, **ranks, **_plan_steps(steps))
    else:
        config = peft.LoraConfig(**common, r=settings.rank, use_dora=settings.name == "dora")
    return config


class RankSchedule:
    """Drops the least important ranks of adalora's layers while a model trains.

    A trainer adds `penalty` to each loss, and calls `update` after each step of the optimizer, before the gradients are
    cleared. `state` and `restore` are for an exact resume.
    """

    def __init__(self, model: PreTrainedModel, *, steps: int | None = None) -> None:
        """
        Args:
            model: as `apply_method` made it ready for adalora.
            steps: of the run, where they are other than `apply_method` was told.
        """
        from peft.tuners.adalora.layer import RankAllocator

        self.model, self.config = model, model.peft_config[NAME]
        if steps is not None:
            for name, value in _plan_steps(steps).items():
                setattr(self.config, name, value)
        self._allocator: Any = RankAllocator(model, self.config, NAME)  # type: ignore[no-untyped-call]

    @staticmethod
    def of(model: PreTrainedModel, *, steps: int | None = None) -> "RankSchedule | None":
        """That of a model which trains by adalora; None for others."""
        is_adalora = has_layers(model) and model.peft_config[NAME].peft_type == "ADALORA"
        return RankSchedule(model, steps=steps) if is_adalora else None

    def penalty(self) -> Tensor:
        """How far the layers' matrices are from orthogonal, weighted as in the paper (equation 4)."""
        distances = []
        for name, matrix in self.model.named_parameters():
            if matrix.requires_grad and (".lora_A." in name or ".lora_B." in name):
                product = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
                distances.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        penalty: Tensor = self.config.orth_reg_weight * torch.stack(distances).mean()
        return penalty

    def update(self, step: int) -> None:
        """Weighs the ranks by the gradients of a step, counted from 1, and sets those to 0 that are to go."""
        last = self.config.total_step - self.config.tfinal
        if step > last:
            self._allocator.mask_using_rank_pattern(self.model, self.config.rank_pattern)
            return
        _, pattern = self._allocator.update_and_allocate(self.model, step, force_mask=step == last)
        if pattern:
            self.config.rank_pattern = pattern

    def state(self) -> dict[str, Any]:
        """What has been learnt of the ranks."""
        allocator = self._allocator
        return {
            "importance": allocator.ipt,
            "average": allocator.exp_avg_ipt,
            "uncertainty": allocator.exp_avg_unc,
            "ranks": self.config.rank_pattern,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from the `state` of another run."""
        allocator = self._allocator
        allocator.ipt, allocator.exp_avg_ipt = dict(state["importance"]), dict(state["average"])
        allocator.exp_avg_unc, self.config.rank_pattern = dict(state["uncertainty"]), state["ranks"]


def _train_weights(model: PreTrainedModel, *, with_embeddings: bool) -> None:
    model.float()  # the embeddings too, though they may not train: the head shares them
    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(with_embeddings)


def _plan_steps(steps: int | None) -> dict[str, int]:
    """When adalora drops ranks."""
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
