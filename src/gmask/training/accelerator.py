"""The accelerator of a run: device, precision, processes and sharding, and the optimizer that a recipe names.

accelerate does the work. `optimization.trainer` of a recipe holds keywords of `transformers.TrainingArguments`: its
options of optimizers, sharding and compilation are applied here, and keys without an effect are refused.
"""

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import get_available_trackers  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
)
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer, get_parameter_names

from gmask.config import check_keys, hints_of, read_values
from gmask.errors import GmaskError, one_line
from gmask.hardware import best_device, training_dtype
from gmask.recipes.pretraining import RunSettings
from gmask.recipes.tuning import TuningRecipe

RECIPE_KEYS = {
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
"""The recipe's own keys for some arguments of `TrainingArguments`."""

APPLIED = {
    "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs",
    "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "ddp_backend", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_timeout", "dataloader_pin_memory", "tf32",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "log_level", "report_to",
}  # fmt: skip
"""The arguments that a run applies."""


def check_trainer_keys(values: dict[str, Any]) -> None:
    """Raises `GmaskError` for an argument that does not exist, has a key of its own in a recipe, or has no effect."""
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    check_keys(values, known, "optimization.trainer")
    for key in values:
        if key in RECIPE_KEYS:
            raise GmaskError(f"optimization.trainer.{key}: set {RECIPE_KEYS[key]} instead")
        if key not in APPLIED:
            raise GmaskError(f"optimization.trainer.{key} has no effect on a run: leave it out")
    read_values(values, hints_of(TrainingArguments), "optimization.trainer")


def training_arguments(recipe: TuningRecipe) -> TrainingArguments:
    """The arguments of this process. Under torchrun or ``accelerate launch`` this joins the process group.

    Raises:
        GmaskError: an unknown key in ``optimization.trainer``, a value that transformers refuses, or a device that this
            machine does not have.
    """
    optimization, device = recipe.optimization, find_device(recipe.run.device)
    check_trainer_keys(optimization.trainer)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    values: dict[str, Any] = {
        "seed": recipe.run.seed,
        "per_device_train_batch_size": optimization.batch_size,
        "gradient_accumulation_steps": -(-optimization.accumulation // processes),
        "learning_rate": optimization.learning_rate,
        "lr_scheduler_type": optimization.schedule,
        "warmup_steps": optimization.warmup,
        "weight_decay": optimization.weight_decay,
        "max_grad_norm": optimization.clip_norm,
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if device == "cpu" and processes > 1 else None,
    }
    return make_arguments(
        recipe.run.out,
        device=device,
        dtype=forward_dtype(recipe, device),
        **values | copy.deepcopy(optimization.trainer),  # copied, since transformers changes them
    )


def make_arguments(out: str, *, device: str, dtype: torch.dtype, **values: Any) -> TrainingArguments:
    """Arguments for a device of this machine and a forward pass in float32 or bfloat16.

    Raises:
        GmaskError: values that transformers refuses.
    """
    try:
        arguments = TrainingArguments(
            output_dir=out,
            use_cpu=device == "cpu",
            bf16=dtype == torch.bfloat16,
            **{"report_to": "none", **values},
        )
        _ = arguments.device
    except (ValueError, TypeError, ImportError) as error:
        raise GmaskError(f"optimization: {one_line(error)}") from error
    return arguments


def join_processes(settings: RunSettings, *, device: str, dtype: torch.dtype) -> Accelerator:
    """The accelerator of a pretraining run. Under torchrun this joins the process group, over gloo on CPUs."""
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    arguments = make_arguments(
        settings.out,
        device=device,
        dtype=dtype,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if device == "cpu" and not is_alone else None,
        ddp_timeout=settings.timeout,
    )
    return make_accelerator(arguments)


def describe_restarts() -> str | None:
    """A warning if torchrun is to restart processes, and would hand them the addresses of those that ended.

    Source: pytorch/pytorch issues 135712 and 167288.
    """
    variables = ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE")
    restarts, shares = (os.environ.get(name, "") for name in variables)
    if restarts in ("", "0") or shares != "True":
        return None
    return (
        "warning: torchrun would give processes that it restarts the addresses of those before, and they may not meet: "
        "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
    )


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """The accelerator of these arguments. It does not accumulate: the loop divides its losses itself.

    Raises:
        GmaskError: options that exclude each other, or that this machine cannot do.
    """
    configured = args.accelerator_config.to_dict()
    ddp = {
        name: value
        for name in ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph")
        if (value := getattr(args, f"ddp_{name}")) is not None
    }
    accumulation = {**(configured["gradient_accumulation_kwargs"] or {}), "num_steps": 1}
    sharding = args.fsdp_plugin_args
    trackers = [name for name in args.report_to if name != "tensorboard"]  # every run writes its files
    if missing := set(trackers) - {str(tracker) for tracker in get_available_trackers()}:
        raise GmaskError(f"optimization.trainer.report_to: {', '.join(sorted(missing))} is not installed")
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            deepspeed_plugin=args.deepspeed_plugin,
            fsdp_plugin=None if sharding is None else FullyShardedDataParallelPlugin(**sharding),
            gradient_accumulation_plugin=GradientAccumulationPlugin(**accumulation),
            parallelism_config=args.parallelism_config,
            dynamo_plugin=TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode),
            kwargs_handlers=[DistributedDataParallelKwargs(**ddp)],
            log_with=trackers or None,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise GmaskError(f"optimization.trainer: {one_line(error)}") from error
    if args.fsdp and not accelerator.is_fsdp2:
        on_cpu = accelerator.device.type == "cpu"
        remedy = "this run is on the CPU: leave it out" if on_cpu else "that takes torchrun and version 2 of FSDP"
        raise GmaskError(f"optimization.trainer.fsdp shards the weights on GPUs, and {remedy}")
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the weights are divided among the processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def uses_deepspeed(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Patterns of the names of parameters without weight decay, as in transformers' Trainer."""


def make_optimizer(model: PreTrainedModel, args: TrainingArguments, *, steps: int) -> torch.optim.Optimizer:
    """The optimizer of ``optimization.trainer.optim`` for the weights that train. Norms and biases do not decay.

    steps: of the run, for a DeepSpeed configuration.

    Raises:
        GmaskError: an optimizer that is not installed, or one that changes weights within the backward pass.
    """
    decaying = set(get_parameter_names(model, [nn.LayerNorm], list(NO_DECAY)))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: Any = [
        {"params": [p for name, p in trained.items() if name in decaying], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained.items() if name not in decaying], "weight_decay": 0.0},
    ]
    if args.deepspeed:
        args.hf_deepspeed_config.trainer_config_finalize(args, model, steps)
        if "scheduler" in args.hf_deepspeed_config.config:
            raise GmaskError(
                "optimization.trainer.deepspeed: the learning rate follows optimization.schedule: take scheduler out"
            )
        if "optimizer" in args.hf_deepspeed_config.config:
            from accelerate.utils.deepspeed import DummyOptim  # type: ignore[import-untyped]

            optimizer: torch.optim.Optimizer = DummyOptim(groups, lr=args.learning_rate, weight_decay=args.weight_decay)
            return optimizer
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError, TypeError, NotImplementedError) as error:
        raise GmaskError(f"optimization.trainer: {one_line(error)}") from error
    if kind is LayerWiseDummyOptimizer:
        raise GmaskError(
            f"optimization.trainer.optim={args.optim.value} changes weights within the backward pass, where no step "
            "can be checked: take the one without layerwise"
        )
    groups = settings.pop("params", settings.pop("model", groups))
    made: torch.optim.Optimizer = kind(groups, **settings)
    if settings.get("optim_bits") == 8 and "bitsandbytes" in str(kind):
        _keep_embedding_moments_in_32_bits(model)
    return made


def _keep_embedding_moments_in_32_bits(model: nn.Module) -> None:
    """Tells bitsandbytes to keep the moments of embeddings in 32 bits: in 8 they are unstable."""
    from bitsandbytes.optim import GlobalOptimManager  # type: ignore[import-not-found]

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


def make_learning_rate(args: TrainingArguments, *, steps: int) -> Callable[[int], float]:
    """The learning rate of a step, counted from 0, by ``optimization.schedule`` and ``warmup``."""
    placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        placeholder,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    (base,), (factor,) = scheduler.base_lrs, scheduler.lr_lambdas
    return lambda step: base * factor(step)


def find_device(name: str | None) -> str:
    """``cpu``, ``cuda`` or ``mps``; the best one if none is named.

    Raises:
        GmaskError: another name, or a device that this machine does not have.
    """
    kind = name or best_device()
    if kind not in ("cpu", "cuda", "mps"):
        raise GmaskError(f"run.device is {kind}: choose cpu, cuda or mps (of several GPUs by CUDA_VISIBLE_DEVICES)")
    is_available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_available[kind]:
        raise GmaskError(f"run.device is {kind}, which this machine does not have")
    return kind


def forward_dtype(recipe: TuningRecipe, device: str) -> torch.dtype:
    """The dtype of the forward pass. The weights that train are float32 in any case."""
    return training_dtype(named_dtype(recipe, device), torch.device(device))


def named_dtype(recipe: TuningRecipe, device: str) -> str:
    """The recipe's name of the dtype of the forward pass, or the default of the device."""
    return recipe.optimization.dtype or ("bfloat16" if device == "cuda" else "float32")
