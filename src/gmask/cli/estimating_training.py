"""What does ``gmask estimate --method`` say about the memory that tuning a model will take?"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gmask.cli.arguments import read_pairs
from gmask.cli.estimating import Choice
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.checkpoints.configs import Config
    from gmask.estimation.training import TrainingEstimate
    from gmask.tasks.recipes.methods import MethodSettings

OTHER_SETTINGS = ("optimizer", "answer_length", "accumulation")
"""What ``--set`` takes beside the settings of a method."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is to be tuned."""

    method: "MethodSettings"
    others: dict[str, Any]  # of OTHER_SETTINGS
    batch_size: int
    gpus: int | None  # None: on this machine's best device
    gradient_checkpointing: bool

    @staticmethod
    def read(
        method: str, pairs: Sequence[str], batch_size: int, gpus: int | None, *, gradient_checkpointing: bool
    ) -> "Plan":
        """Of what was typed.

        Raises:
            GmaskError: an unknown method or setting, or a value that it cannot have.
        """
        from gmask.tasks.recipes.methods import MethodSettings
        from gmask.tasks.recipes.settings_tree import build

        values = read_pairs(pairs)
        if "name" in values:
            raise GmaskError("--method and --set name say the same: give --method alone")
        others = {name: values.pop(name) for name in OTHER_SETTINGS if name in values}
        for name in ("answer_length", "accumulation"):
            if not isinstance(others.get(name, 1), int):
                raise GmaskError(f"--set {name}={others[name]}: expected a whole number")
        settings = build(MethodSettings, {"name": method, **values}, "method")
        return Plan(settings, others, batch_size, gpus, gradient_checkpointing)

    def fits(self, choice: Choice) -> bool:
        """Whether weights in this form can be tuned by the method."""
        if self.method.name == "qlora":
            return choice.quantize is not None
        return choice.quantize is None or self.method.name not in ("full", "frozen-embeddings", "dora")


def tell_training(
    model: str, config: "Config", plan: Plan, choices: Sequence[Choice], lengths: Sequence[int], *, as_json: bool
) -> None:
    """Prints what tuning takes, in each form that the method can be used with."""
    import torch

    from gmask.checkpoints.memory import free_bytes
    from gmask.loading import best_device

    fitting = [choice for choice in choices if plan.fits(choice)]
    if not fitting:
        raise GmaskError(f"{plan.method.name} cannot tune {choices[0].label}: choose another --quantize, or --method")
    kind = "cuda" if plan.gpus else best_device()
    found = {choice: [figure(config, choice, plan, length, kind) for length in lengths] for choice in fitting}
    if as_json:
        print(json.dumps({"model": model, "device": kind, "estimates": describe(found, lengths, plan)}, indent=2))
        return
    print_table(found, lengths)
    (trainable,) = {figures.trainable for row in found.values() for figures in row}
    print(f"{plan.method.name}: {trainable:,} numbers train.")
    if plan.gpus:
        print(f"For each of {plan.gpus} GPUs; estimates, which were not measured.")
    else:
        print(advise({choice: row[-1].peak for choice, row in found.items()}, free_bytes(torch.device(kind)), kind))


def figure(config: "Config", choice: Choice, plan: Plan, length: int, device_kind: Any) -> "TrainingEstimate":
    from gmask.estimation.training import estimate_training
    from gmask.loading import DTYPES

    return estimate_training(
        config,
        method=plan.method,
        dtype=DTYPES[choice.dtype],
        form=choice.form,
        batch_size=plan.batch_size,
        length=length,
        gradient_checkpointing=plan.gradient_checkpointing,
        shards=1 if plan.gpus is None else plan.gpus,
        device_kind=device_kind,
        **plan.others,
    )


def describe(found: "dict[Choice, list[TrainingEstimate]]", lengths: Sequence[int], plan: Plan) -> list[dict[str, Any]]:
    """The estimates for programs; sizes in bytes."""
    settings = {
        **dataclasses.asdict(plan.method), **plan.others, "batch_size": plan.batch_size,
        "gradient_checkpointing": plan.gradient_checkpointing, "gpus": plan.gpus,
    }  # fmt: skip
    return [
        {"dtype": choice.dtype, "quantize": choice.quantize, "length": length, "settings": settings, **asdict(figures)}
        for choice, row in found.items()
        for length, figures in zip(lengths, row, strict=True)
    ]


def print_table(found: "dict[Choice, list[TrainingEstimate]]", lengths: Sequence[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from gmask.checkpoints.memory import format_bytes

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("form", no_wrap=True)
    for heading in ("tokens", "weights", "gradi-\nents", "opti-\nmizer", "acti-\nvations", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for choice, row in found.items():
        for length, one in zip(lengths, row, strict=True):
            sizes = (one.weights, one.gradients, one.optimizer, one.activations, one.peak)
            table.add_row(choice.label, str(length), *map(format_bytes, sizes))
    Console(markup=False, highlight=False).print(table)


def advise(peaks: dict[Choice, int], free: int, device: str) -> str:
    """What fits into the free memory."""
    from gmask.checkpoints.memory import format_bytes

    room = f"{format_bytes(free)} are free on {device}"
    fitting = [choice.label for choice, peak in peaks.items() if peak <= free]
    if len(fitting) == len(peaks):
        return f"{room}: all of this fits."
    if fitting:
        return f"{room}: fits {'; '.join(fitting)}."
    return (
        f"{room}: nothing of this fits, the smallest needs {format_bytes(min(peaks.values()))}; try a smaller "
        "--batch-size, --gradient-checkpointing, or --method lora or qlora."
    )
