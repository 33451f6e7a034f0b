"""``gmask estimate``: the memory that a model takes in use, or while it is tuned."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.options import BUNDLED, DTYPE_NAMES, AsJson, read_pairs, refuse_unknown
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.checkpoints.folder import Config
    from gmask.estimation.inference import MemoryEstimate
    from gmask.estimation.training import TrainingEstimate
    from gmask.quantization.quantizer import QuantizationConfig
    from gmask.recipes.tuning import MethodSettings


CONTEXT_LENGTHS = (512, 2048)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A form to load a model in, as it is typed."""

    dtype: str
    quantize: str | None
    form: "QuantizationConfig | None"  # None: as the config says

    @property
    def label(self) -> str:
        return f"{self.quantize}, else {self.dtype}" if self.quantize else self.dtype

    @property
    def options(self) -> str:
        """What loads it; more than ``--quantize`` says, `gmask quantize` has to write before."""
        if self.form is None:
            return f"--dtype {self.dtype}"
        if self.form.group_size is None and not self.form.embeddings:
            return f"--dtype {self.dtype} --quantize {self.quantize}"
        group = f" --group-size {self.form.group_size}" if self.form.group_size else ""
        embeddings = " --embeddings" if self.form.embeddings else ""
        return f"--dtype {self.dtype}, after gmask quantize --bits {self.form.bits}{group}{embeddings},"


def estimate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder or checkpoint of a model, or the name of a published one."),
    ] = "bundled",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar=DTYPE_NAMES,
            help="Precision of what is not quantized.",
            show_default="float32 and bfloat16",
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="int8|int4", help="Form of the weights.", show_default="each")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="32|64|128", help="Columns that share a scale.", show_default="a row")
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Embeddings and head quantized too.")] = False,
    context_length: Annotated[
        list[int] | None,
        typer.Option(
            "--context-length",
            "--length",
            help="Tokens of a prompt and its answer, or of a sample; once for each length.",
            show_default="512 and 2048",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that are answered, or samples that are read, at once.")] = 1,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="lora|full|...", help="Memory for tuning by this method.", show_default="memory for answering"
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="With --method: blocks are computed twice.")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(help="With --method: GPUs that FSDP divides the model among.", show_default="this machine"),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="With --method: its settings, such as rank=16; optimizer, answer_length, accumulation.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell how much memory a model takes to run or to tune, and what fits here, without loading or fetching it."""
    config = find_config(model)
    lengths = sorted(set(context_length or (min(n, config.max_position_embeddings) for n in CONTEXT_LENGTHS)))
    choices = list_choices(config, dtype, quantize, group_size=group_size, embeddings=embeddings)
    if method is None:
        if gradient_checkpointing or gpus is not None or pairs:
            raise GmaskError("--gradient-checkpointing, --gpus and --set are about tuning: add --method lora")
        tell_inference(model, config, choices, lengths, batch_size, as_json=as_json)
        return

    plan = Plan.read(method, pairs or [], batch_size, gpus, gradient_checkpointing=gradient_checkpointing)
    tell_training(model, config, plan, choices, lengths, as_json=as_json)


def tell_inference(
    model: str,
    config: "Config",
    choices: Sequence[Choice],
    lengths: Sequence[int],
    batch_size: int,
    *,
    as_json: bool,
) -> None:
    """Prints what answering takes."""
    import torch

    from gmask.hardware import best_device, free_bytes

    device = torch.device(best_device())
    free = free_bytes(device)
    found = {choice: inference_figure(config, choice, lengths, batch_size, device.type) for choice in choices}
    if as_json:
        rows = [
            describe_inference(choice, length, batch_size, figures)
            for choice, row in found.items()
            for length, figures in zip(lengths, row, strict=True)
        ]
        print(json.dumps({"model": model, "device": device.type, "free_bytes": free, "estimates": rows}, indent=2))
        return
    print_inference(found, lengths)
    print(
        advise_inference(
            {choice: row[-1] for choice, row in found.items()}, free, device=device.type, length=lengths[-1]
        )
    )


def inference_figure(
    config: "Config", choice: Choice, lengths: Sequence[int], batch_size: int, device_kind: Any
) -> "list[MemoryEstimate]":
    """The estimates of one form, one for each length of the context."""
    from gmask.estimation.inference import estimate_inference
    from gmask.hardware import DTYPES

    return [
        estimate_inference(
            config,
            dtype=DTYPES[choice.dtype],
            form=choice.form,
            context_length=length,
            batch_size=batch_size,
            device_kind=device_kind,
        )
        for length in lengths
    ]


def find_config(name: str) -> "Config":
    """The config of a folder, or of a published model, which need not be on this machine.

    Raises:
        GmaskError: neither a folder of a model nor a name in the catalog.
    """
    from gmask.checkpoints.hub import find_cached
    from gmask.checkpoints.load import find_folder
    from gmask.checkpoints.zoo import find_family
    from gmask.estimation.inference import config_of_family, read_shape_config

    if name in BUNDLED or Path(name).expanduser().exists():
        return read_shape_config(find_folder(name))
    if family := find_family(name):
        return config_of_family(family)
    if cached := find_cached(name):
        return read_shape_config(cached)
    refuse_unknown(name)


def list_choices(
    config: "Config", dtype: str | None, quantize: str | None, *, group_size: int | None, embeddings: bool
) -> list[Choice]:
    """What is asked for; without words the plain precisions, and both kinds of integers.

    Raises:
        GmaskError: an unknown dtype or form.
    """
    from gmask.hardware import DTYPES
    from gmask.quantization.quantizer import NAMES, QuantizationConfig, form_of, read_form

    if dtype is not None and dtype not in DTYPES:
        raise GmaskError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    read_form(quantize)
    if quantize is None and (group_size is not None or embeddings):
        raise GmaskError("--group-size and --embeddings are for quantized weights: add --quantize int4")
    dtypes = [dtype] if dtype else ["float32", "bfloat16"]
    if quantize is None and (stored := form_of(config)):
        return [Choice(name, f"int{stored.bits}", None) for name in dtypes]
    plain = [] if quantize else [Choice(name, None, None) for name in dtypes]
    return plain + [
        Choice(dtypes[-1], name, QuantizationConfig(bits, group_size, embeddings))
        for name, bits in NAMES.items()
        if quantize in (None, name)
    ]


def describe_inference(
    choice: Choice, context_length: int, batch_size: int, figures: "MemoryEstimate"
) -> dict[str, Any]:
    """One estimate for programs; sizes in bytes."""
    return {
        "dtype": choice.dtype,
        "quantize": choice.quantize,
        "context_length": context_length,
        "batch_size": batch_size,
        **asdict(figures),
        "resident": figures.resident,
        "peak": figures.peak,
    }


def print_inference(found: "dict[Choice, list[MemoryEstimate]]", lengths: Sequence[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from gmask.hardware import format_bytes

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("form", no_wrap=True)
    for heading in ("weights", *(f"cache\nat {n}" for n in lengths), *(f"peak\nat {n}" for n in lengths)):
        table.add_column(heading, justify="right", no_wrap=True)
    for choice, row in found.items():
        sizes = [row[0].weights, *(figures.cache for figures in row), *(figures.peak for figures in row)]
        table.add_row(choice.label, *map(format_bytes, sizes))
    Console(markup=False, highlight=False).print(table)


def advise_inference(peaks: "dict[Choice, MemoryEstimate]", free: int, *, device: str, length: int) -> str:
    """What fits into the free memory, and which options load the most exact of it."""
    from gmask.hardware import format_bytes

    room = f"{format_bytes(free)} are free on {device}"
    fitting = [choice for choice, figures in peaks.items() if figures.peak <= free]
    if not fitting:
        smallest = min(figures.peak for figures in peaks.values())
        return f"{room}: nothing of this fits at {length} tokens, the smallest needs {format_bytes(smallest)}."
    if len(fitting) == len(peaks):
        return f"{room}: all of this fits at {length} tokens; {fitting[0].options} is the most exact."
    labels = "; ".join(choice.label for choice in fitting)
    return f"{room}: at {length} tokens fits {labels}. Choose {fitting[0].options}."


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
        from gmask.config import build
        from gmask.recipes.tuning import MethodSettings

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

    from gmask.hardware import best_device, free_bytes

    fitting = [choice for choice in choices if plan.fits(choice)]
    if not fitting:
        raise GmaskError(f"{plan.method.name} cannot tune {choices[0].label}: choose another --quantize, or --method")
    kind = "cuda" if plan.gpus else best_device()
    found = {choice: [training_figure(config, choice, plan, length, kind) for length in lengths] for choice in fitting}
    if as_json:
        print(
            json.dumps({"model": model, "device": kind, "estimates": describe_training(found, lengths, plan)}, indent=2)
        )
        return
    print_training(found, lengths)
    (trainable,) = {figures.trainable for row in found.values() for figures in row}
    print(f"{plan.method.name}: {trainable:,} numbers train.")
    if plan.gpus:
        print(f"For each of {plan.gpus} GPUs; estimates, which were not measured.")
    else:
        print(
            advise_training(
                {choice: row[-1].peak for choice, row in found.items()}, free_bytes(torch.device(kind)), kind
            )
        )


def training_figure(config: "Config", choice: Choice, plan: Plan, length: int, device_kind: Any) -> "TrainingEstimate":
    from gmask.estimation.training import estimate_training
    from gmask.hardware import DTYPES

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


def describe_training(
    found: "dict[Choice, list[TrainingEstimate]]", lengths: Sequence[int], plan: Plan
) -> list[dict[str, Any]]:
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


def print_training(found: "dict[Choice, list[TrainingEstimate]]", lengths: Sequence[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from gmask.hardware import format_bytes

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("form", no_wrap=True)
    for heading in ("tokens", "weights", "gradi-\nents", "opti-\nmizer", "acti-\nvations", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for choice, row in found.items():
        for length, one in zip(lengths, row, strict=True):
            sizes = (one.weights, one.gradients, one.optimizer, one.activations, one.peak)
            table.add_row(choice.label, str(length), *map(format_bytes, sizes))
    Console(markup=False, highlight=False).print(table)


def advise_training(peaks: dict[Choice, int], free: int, device: str) -> str:
    """What fits into the free memory."""
    from gmask.hardware import format_bytes

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
