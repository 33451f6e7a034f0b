"""Which arguments of transformers' Trainer does a recipe stand for?"""

import copy
import dataclasses
import os
from typing import Any

import torch
from transformers import TrainingArguments

from gmask.errors import GmaskError
from gmask.hardware import training_dtype
from gmask.loading import best_device
from gmask.tasks.recipes.settings_tree import check_keys
from gmask.tasks.recipes.tuning import TuningRecipe

OWN = {
    "output_dir": "run.out", "seed": "run.seed", "data_seed": "run.seed", "full_determinism": "run.deterministic",
    "use_cpu": "run.device", "logging_steps": "run.log_every", "resume_from_checkpoint": "--resume or --no-resume",
    "num_train_epochs": "optimization.epochs", "max_steps": "optimization.steps",
    "per_device_train_batch_size": "optimization.batch_size",
    "gradient_accumulation_steps": "optimization.accumulation", "learning_rate": "optimization.learning_rate",
    "lr_scheduler_type": "optimization.schedule", "warmup_steps": "optimization.warmup",
    "weight_decay": "optimization.weight_decay", "max_grad_norm": "optimization.clip_norm",
    "bf16": "optimization.dtype", "fp16": "optimization.dtype",
    "gradient_checkpointing": "optimization.gradient_checkpointing",
    "activation_checkpointing": "optimization.gradient_checkpointing",
    "train_sampling_strategy": "optimization.length_grouped", "eval_steps": "optimization.evaluate_every",
    "eval_strategy": "optimization.evaluate_every", "save_steps": "optimization.save_every",
    "save_strategy": "optimization.save_every", "save_total_limit": "optimization.keep_last",
    "metric_for_best_model": "task.best", "load_best_model_at_end": "task.best", "greater_is_better": "task.best",
}  # fmt: skip
"""Arguments that a recipe has keys of its own for."""

HEEDED = {
    "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs",
    "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "ddp_backend", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_timeout", "dataloader_pin_memory", "tf32",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "log_level",
}  # fmt: skip
"""Arguments that mean something to a run; what the Trainer would log, evaluate, load or save is done otherwise."""


def check_trainer_keys(values: dict[str, Any]) -> None:
    """Raises `GmaskError` for a key that the Trainer does not know, that has another place in a recipe, or none."""
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    check_keys(values, known, "optimization.trainer")
    for key in values:
        if key in OWN:
            raise GmaskError(f"optimization.trainer.{key}: set {OWN[key]} instead")
        if key not in HEEDED:
            raise GmaskError(f"optimization.trainer.{key} has no effect on a run: leave it out")


def training_arguments(recipe: TuningRecipe) -> TrainingArguments:
    """The arguments of this process; under torchrun or ``accelerate launch`` it joins the others here.

    Raises:
        GmaskError: an unknown key in ``optimization.trainer``, or a value that the Trainer refuses; a device that is
            not there.
    """
    optimization, device = recipe.optimization, find_device(recipe.run.device)
    check_trainer_keys(optimization.trainer)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    values: dict[str, Any] = {
        "output_dir": recipe.run.out,
        "seed": recipe.run.seed,
        "full_determinism": recipe.run.deterministic,
        "use_cpu": device == "cpu",
        "num_train_epochs": 1,  # one pass over the order of the whole run
        "per_device_train_batch_size": optimization.batch_size,
        "gradient_accumulation_steps": -(-optimization.accumulation // processes),
        "learning_rate": optimization.learning_rate,
        "lr_scheduler_type": optimization.schedule,
        "warmup_steps": optimization.warmup,
        "weight_decay": optimization.weight_decay,
        "max_grad_norm": optimization.clip_norm,
        "bf16": forward_dtype(recipe, device) == torch.bfloat16,
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if device == "cpu" and processes > 1 else None,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "use_cache": True,  # as the model's config has it, which is saved; the forward of a step keeps none
        "disable_tqdm": True,
        "report_to": "none",
    }
    values |= dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "no")
    try:
        arguments = TrainingArguments(**values | copy.deepcopy(optimization.trainer))  # which it fills in
        _ = arguments.device
    except (ValueError, TypeError, ImportError) as error:
        raise GmaskError(f"optimization: {' '.join(str(error).split())}") from error
    if processes == 1:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs: one process each, by torchrun
    return arguments


def find_device(name: str | None) -> str:
    """``cpu``, ``cuda`` or ``mps``. Raises `GmaskError` for another, or one that is not there."""
    kind = name or best_device()
    if kind not in ("cpu", "cuda", "mps"):
        raise GmaskError(f"run.device is {kind}: choose cpu, cuda or mps (of several GPUs by CUDA_VISIBLE_DEVICES)")
    is_there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_there[kind]:
        raise GmaskError(f"run.device is {kind}, which this machine does not have")
    return kind


def forward_dtype(recipe: TuningRecipe, device: str) -> torch.dtype:
    """What the forward pass computes in; the weights that train are float32 whatever it is."""
    return training_dtype(named_dtype(recipe, device), torch.device(device))


def named_dtype(recipe: TuningRecipe, device: str) -> str:
    """The recipe's word for the type of a pass, or the default of the device."""
    return recipe.optimization.dtype or ("bfloat16" if device == "cuda" else "float32")
