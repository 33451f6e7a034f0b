"""``gmask estimate``: the memory that a model takes in use, or while it is tuned; what a pretraining run takes."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.options import DTYPE_NAMES, AsJson, KVCache, find_source, parse_settings
from gmask.cli.printing import print_json, print_table
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.checkpoints.folder import Config
    from gmask.estimation.inference import MemoryEstimate
    from gmask.estimation.pretraining import PretrainingMemory, PretrainingTime
    from gmask.estimation.scaling import Assumptions, ParallelLayout
    from gmask.estimation.training import TrainingEstimate
    from gmask.quantization.quantizer import QuantizationConfig
    from gmask.recipes.pretraining import PretrainingRecipe
    from gmask.recipes.tuning import MethodSettings

CONTEXT_LENGTHS = (512, 2048)


@dataclass(frozen=True, slots=True, eq=False)
class WeightForm:
    """A dtype and a quantization to load a model with."""

    dtype: str
    quantize: str | None
    form: "QuantizationConfig | None"  # None: that of the config

    @property
    def label(self) -> str:
        return f"{self.quantize}, else {self.dtype}" if self.quantize else self.dtype

    @property
    def options(self) -> str:
        """The options that load a model so. Some forms have to be written by `gmask quantize` first."""
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
        typer.Argument(
            metavar="MODEL",
            help="Folder or checkpoint of a model, or the name of a published one; or a recipe of pretraining (.yaml).",
        ),
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
    kv_cache: KVCache = None,
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
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="reward|dpo|kto|grpo|ppo", help="With --method: learning from feedback.", show_default="answers"
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="With --method or a recipe: blocks are computed twice."),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="With --method: GPUs that FSDP divides the model among. With a recipe: GPUs of the run.",
            show_default="this machine",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="v100|a100|h100|...", help="With a recipe: their kind; time and cost too.", show_default="none"
        ),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="ddp|zero2|fsdp|tp=K|fsdp,tp=K",
            help="With a recipe: how the model is divided among them.",
            show_default="ddp, zero2 and fsdp",
        ),
    ] = None,
    checkpointing: Annotated[
        str | None,
        typer.Option(
            metavar="none|selective|full",
            help="With a recipe: what is computed twice; selective: what is between the products.",
            show_default="each",
        ),
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="With a recipe: share of a GPU's peak by the products.", show_default="0.4, assumed"
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0.0, help="With a recipe: US dollars an hour of a GPU.", show_default="assumed by kind"),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="With --method: its settings, such as rank=16; optimizer, answer_length, accumulation; for ppo critic "
            "and reward_model. With a recipe: its keys, such as optimization.steps=1000.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell how much memory a model takes to run or to tune, and what fits here, without loading or fetching it.

    Of a recipe of pretraining: the memory of each GPU, and the time and the cost of the run.
    """
    if model.endswith((".yaml", ".yml")):
        tuned = (dtype, quantize, group_size, kv_cache, context_length, method, stage, embeddings or None)
        if any(value is not None for value in tuned) or batch_size != 1:
            raise GmaskError(
                f"{model} is a recipe, which says all but --gpus, --gpu, --parallel, --checkpointing, --utilization, "
                "--price: leave the other options out, and change its keys by --set section.key=value"
            )
        kept = "full" if gradient_checkpointing and checkpointing is None else checkpointing
        print_run(PlannedRun.read(model, pairs or [], gpus, gpu, parallel, kept, utilization, price), as_json=as_json)
        return
    if any(value is not None for value in (gpu, parallel, checkpointing, utilization, price)):
        raise GmaskError(
            "--gpu, --parallel, --checkpointing, --utilization and --price are for a recipe of pretraining: "
            "name its .yaml file in place of a model"
        )
    config = find_config(model)
    from gmask.hardware import best_device
    from gmask.models.cache import read_kv_cache

    lengths = sorted(set(context_length or (min(n, config.max_position_embeddings) for n in CONTEXT_LENGTHS)))
    forms = list_forms(config, dtype, quantize, group_size=group_size, embeddings=embeddings)
    if method is not None:
        if kv_cache is not None:
            raise GmaskError("--kv-cache is for answering: leave it out, or --method")
        tuning = Tuning.read(
            method, pairs or [], batch_size, gpus, stage=stage, gradient_checkpointing=gradient_checkpointing
        )
        print_estimates(tuning, model, config, tuning.usable_forms(forms), lengths, as_json=as_json)
    elif gradient_checkpointing or gpus is not None or pairs or stage is not None:
        raise GmaskError("--stage, --gradient-checkpointing, --gpus and --set are about tuning: add --method lora")
    else:
        answering = Answering(batch_size, best_device(), read_kv_cache(kv_cache))
        print_estimates(answering, model, config, forms, lengths, as_json=as_json)


def find_config(name: str) -> "Config":
    """Returns the config of a folder, or of a published model, which need not be on this machine.

    Raises:
        GmaskError: neither a folder of a model nor a name in the catalog.
    """
    source, family = find_source(name)  # a mistyped one is refused before torch is imported
    from gmask.checkpoints.load import find_folder
    from gmask.estimation.inference import config_of_family, read_shape_config

    if family is not None:
        return config_of_family(family)
    assert source is not None
    return read_shape_config(find_folder(source))


def list_forms(
    config: "Config", dtype: str | None, quantize: str | None, *, group_size: int | None, embeddings: bool
) -> list[WeightForm]:
    """Returns the forms that were asked for; by default float32, bfloat16, int8 and int4.

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
        return [WeightForm(name, f"int{stored.bits}", None) for name in dtypes]
    plain = [] if quantize else [WeightForm(name, None, None) for name in dtypes]
    return plain + [
        WeightForm(dtypes[-1], name, QuantizationConfig(bits, group_size, embeddings))
        for name, bits in NAMES.items()
        if quantize in (None, name)
    ]


def print_estimates(
    usage: "Answering | Tuning",
    model: str,
    config: "Config",
    forms: Sequence[WeightForm],
    lengths: Sequence[int],
    *,
    as_json: bool,
) -> None:
    """Prints the memory of a model in this use, in each form and at each length."""
    found: dict[WeightForm, list[Any]] = {form: [usage.estimate(config, form, n) for n in lengths] for form in forms}
    if as_json:
        estimates = [
            {"dtype": form.dtype, "quantize": form.quantize, **usage.describe(length, one)}
            for form, figures in found.items()
            for length, one in zip(lengths, figures, strict=True)
        ]
        print_json({"model": model, **usage.device(), "estimates": estimates}, indent=2)
        return
    columns = usage.columns(lengths)
    table = [[form.label, *cells] for form, figures in found.items() for cells in usage.rows(lengths, figures)]
    print_table(["form", *columns], table, figures=columns)
    print(usage.advise(found, lengths[-1]))


@dataclass(frozen=True, slots=True)
class Answering:
    """The use of a model for answering ``batch_size`` prompts at a time."""

    batch_size: int
    device_kind: Any  # of this machine's best device
    kv_cache: str | None  # form of keys and values

    def estimate(self, config: "Config", form: WeightForm, length: int) -> "MemoryEstimate":
        from gmask.estimation.inference import estimate_inference
        from gmask.hardware import DTYPES

        return estimate_inference(
            config,
            dtype=DTYPES[form.dtype],
            form=form.form,
            context_length=length,
            batch_size=self.batch_size,
            device_kind=self.device_kind,
            kv_cache=self.kv_cache,
        )

    def device(self) -> dict[str, Any]:
        """Returns the device, for JSON."""
        return {"device": self.device_kind, "free_bytes": _free_bytes(self.device_kind)}

    def describe(self, length: int, figures: "MemoryEstimate") -> dict[str, Any]:
        """Returns an estimate for JSON; sizes in bytes."""
        return {
            "context_length": length,
            "batch_size": self.batch_size,
            **asdict(figures),
            "resident": figures.resident,
            "peak": figures.peak,
        }

    def columns(self, lengths: Sequence[int]) -> list[str]:
        """Returns the headings of the table, without that of the form."""
        return ["weights", *(f"cache\nat {n}" for n in lengths), *(f"peak\nat {n}" for n in lengths)]

    def rows(self, lengths: Sequence[int], figures: "Sequence[MemoryEstimate]") -> list[list[str]]:
        """Returns the table rows of one form."""
        return [_sizes(figures[0].weights, *(one.cache for one in figures), *(one.peak for one in figures))]

    def advise(self, found: "dict[WeightForm, list[MemoryEstimate]]", length: int) -> str:
        """Returns a sentence on the forms that fit into the free memory at the longest length."""
        peaks = {form: figures[-1].peak for form, figures in found.items()}
        return advise_form(peaks, _free_bytes(self.device_kind), device=self.device_kind, length=length)


def advise_form(peaks: dict[WeightForm, int], free: int, *, device: str, length: int) -> str:
    """Returns a sentence on the forms that fit into the free memory, and the options for the most exact of them."""
    from gmask.hardware import format_bytes

    room = f"{format_bytes(free)} are free on {device}"
    fitting = [form for form, peak in peaks.items() if peak <= free]
    if not fitting:
        smallest = format_bytes(min(peaks.values()))
        return f"{room}: nothing of this fits at {length} tokens, the smallest needs {smallest}."
    if len(fitting) == len(peaks):
        return f"{room}: all of this fits at {length} tokens; {fitting[0].options} is the most exact."
    labels = "; ".join(form.label for form in fitting)
    return f"{room}: at {length} tokens fits {labels}. Choose {fitting[0].options}."


OTHER_SETTINGS = {
    "optimizer": str, "answer_length": int, "accumulation": int, "critic": str, "reward_model": bool,
}  # fmt: skip
"""Types of the settings that ``--set`` takes beside those of a method; they are arguments of `estimate_training`."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The use of a model for tuning; it has the same functions as `Answering`."""

    method: "MethodSettings"
    others: dict[str, Any]  # of OTHER_SETTINGS
    batch_size: int
    gpus: int | None  # None: on this machine's best device
    stage: str | None  # of learning from feedback
    gradient_checkpointing: bool
    device_kind: Any  # of those GPUs, or of this machine's best device

    @staticmethod
    def read(
        method: str,
        pairs: Sequence[str],
        batch_size: int,
        gpus: int | None,
        *,
        stage: str | None,
        gradient_checkpointing: bool,
    ) -> "Tuning":
        """Reads the options of the command line.

        Raises:
            GmaskError: an unknown method or setting, or a wrong value.
        """
        from gmask.config import build_settings, read_values
        from gmask.hardware import best_device
        from gmask.recipes.tuning import MethodSettings

        values = parse_settings(pairs)
        if "name" in values:
            raise GmaskError("--method and --set name say the same: give --method alone")
        given = {name: values.pop(name) for name in OTHER_SETTINGS if name in values}
        others = read_values(given, OTHER_SETTINGS, "--set ")
        settings = build_settings(MethodSettings, {"name": method, **values}, "method")
        kind = "cuda" if gpus else best_device()
        return Tuning(settings, others, batch_size, gpus, stage, gradient_checkpointing, kind)

    def usable_forms(self, forms: Sequence[WeightForm]) -> list[WeightForm]:
        """Returns the forms of weights that can be tuned by the method.

        Raises:
            GmaskError: there are none.
        """
        if self.method.name == "qlora":
            fitting = [form for form in forms if form.quantize is not None]
        else:
            takes_integers = self.method.name not in ("full", "frozen-embeddings", "dora")
            fitting = [form for form in forms if takes_integers or form.quantize is None]
        if not fitting:
            raise GmaskError(f"{self.method.name} cannot tune {forms[0].label}: choose another --quantize, or --method")
        return fitting

    def estimate(self, config: "Config", form: WeightForm, length: int) -> "TrainingEstimate":
        from gmask.estimation.training import estimate_training
        from gmask.hardware import DTYPES

        return estimate_training(
            config,
            method=self.method,
            dtype=DTYPES[form.dtype],
            form=form.form,
            batch_size=self.batch_size,
            length=length,
            gradient_checkpointing=self.gradient_checkpointing,
            stage=self.stage,  # type: ignore[arg-type]  # which is checked there
            shards=1 if self.gpus is None else self.gpus,
            device_kind=self.device_kind,
            **self.others,
        )

    def device(self) -> dict[str, Any]:
        return {"device": self.device_kind}

    def describe(self, length: int, figures: "TrainingEstimate") -> dict[str, Any]:
        settings = {
            **asdict(self.method), **self.others, "batch_size": self.batch_size,
            "gradient_checkpointing": self.gradient_checkpointing, "gpus": self.gpus, "stage": self.stage,
        }  # fmt: skip
        return {"length": length, "settings": settings, **asdict(figures)}

    def columns(self, lengths: Sequence[int]) -> list[str]:
        return ["tokens", "weights", "gradi-\nents", "opti-\nmizer", "acti-\nvations", "peak"]

    def rows(self, lengths: Sequence[int], figures: "Sequence[TrainingEstimate]") -> list[list[str]]:
        return [
            [str(length), *_sizes(one.weights, one.gradients, one.optimizer, one.activations, one.peak)]
            for length, one in zip(lengths, figures, strict=True)
        ]

    def advise(self, found: "dict[WeightForm, list[TrainingEstimate]]", length: int) -> str:
        from gmask.hardware import format_bytes

        (trainable,) = {one.trainable for figures in found.values() for one in figures}
        trains = f"{self.method.name}: {trainable:,} numbers train.\n"
        if self.gpus:
            return f"{trains}For each of {self.gpus} GPUs; estimates, which were not measured."
        free = _free_bytes(self.device_kind)
        room = f"{trains}{format_bytes(free)} are free on {self.device_kind}"
        peaks = {form.label: figures[-1].peak for form, figures in found.items()}
        fitting = [label for label, peak in peaks.items() if peak <= free]
        if len(fitting) == len(peaks):
            return f"{room}: all of this fits."
        if fitting:
            return f"{room}: fits {'; '.join(fitting)}."
        return (
            f"{room}: nothing of this fits, the smallest needs {format_bytes(min(peaks.values()))}; try a smaller "
            "--batch-size, --gradient-checkpointing, or --method lora or qlora."
        )


def _free_bytes(device_kind: str) -> int:
    import torch

    from gmask.hardware import free_bytes

    return free_bytes(torch.device(device_kind))


def _sizes(*sizes: int) -> list[str]:
    from gmask.hardware import format_bytes

    return [format_bytes(size) for size in sizes]


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A pretraining run, as the command line describes it."""

    recipe: "PretrainingRecipe"
    layouts: "tuple[ParallelLayout, ...]"
    checkpointings: tuple[Any, ...]
    gpu: Any  # None: this machine, whose speed is not known
    device_kind: Any
    assumed: "Assumptions"
    price: float | None  # None: that of the GPU's kind

    @staticmethod
    def read(
        path: str,
        pairs: Sequence[str],
        gpus: int | None,
        gpu: str | None,
        parallel: str | None,
        checkpointing: str | None,
        utilization: float | None,
        price: float | None,
    ) -> "PlannedRun":
        """Reads the options of the command line.

        Raises:
            GmaskError: a mistake in the recipe, an unknown GPU, layout or checkpointing.
        """
        from typing import get_args

        from gmask.estimation.gpus import find_gpu
        from gmask.estimation.scaling import Assumptions, DataParallel, ParallelLayout
        from gmask.estimation.training import Checkpointing
        from gmask.hardware import best_device
        from gmask.recipes.pretraining import load_recipe

        recipe = load_recipe(path, pairs)
        if gpu is None and (gpus is not None or utilization is not None or price is not None):
            raise GmaskError("the kind of the GPUs is missing: add --gpu h100")
        if checkpointing is not None and checkpointing not in get_args(Checkpointing):
            raise GmaskError(f"--checkpointing {checkpointing}: choose {', '.join(get_args(Checkpointing))}")
        count = 1 if gpus is None else gpus
        names = (parallel,) if parallel else get_args(DataParallel) if count > 1 else ("ddp",)
        return PlannedRun(
            recipe,
            tuple(ParallelLayout.read(name, count) for name in names),
            (checkpointing,) if checkpointing else get_args(Checkpointing),
            None if gpu is None else find_gpu(gpu),
            best_device() if gpu is None else "cuda",
            Assumptions() if utilization is None else Assumptions(utilization=utilization),
            price,
        )

    def estimates(self) -> "Iterator[tuple[ParallelLayout, str, PretrainingMemory, PretrainingTime | None]]":
        """Yields memory and time for each layout and checkpointing; without a kind of GPU there is no time."""
        from gmask.estimation.pretraining import estimate_memory, estimate_time

        for layout in self.layouts:
            for kept in self.checkpointings:
                memory = estimate_memory(self.recipe, layout=layout, checkpointing=kept, device_kind=self.device_kind)
                if self.gpu is None:
                    yield layout, kept, memory, None
                    continue
                time = estimate_time(
                    self.recipe,
                    gpu=self.gpu,
                    layout=layout,
                    checkpointing=kept,
                    assumed=self.assumed,
                    price=self.price,
                )
                yield layout, kept, memory, time

    @property
    def room(self) -> int:
        """Bytes of a GPU, or free ones of this machine."""
        return _free_bytes(self.device_kind) if self.gpu is None else int(self.gpu.memory)


def print_run(run: PlannedRun, *, as_json: bool) -> None:
    """Prints the memory of each GPU by part, and the time and the cost of a pretraining run."""
    import torch

    from gmask.estimation.inference import shape_at
    from gmask.estimation.pretraining import config_of_recipe, count_labels

    found = list(run.estimates())
    model = shape_at(config_of_recipe(run.recipe), dtype=torch.float32)
    parameters = sum(weight.numel() for weight in model.parameters())
    labels, settings = count_labels(run.recipe), run.recipe.optimization
    if as_json:
        rows = [
            {
                "parallel": str(layout),
                "checkpointing": kept,
                "memory": asdict(memory),
                "time": None if time is None else {**asdict(time), "exposed": time.step.exposed},
            }
            for layout, kept, memory, time in found
        ]
        print_json(
            {
                "parameters": parameters,
                "steps": settings.steps,
                "labelled_share": labels.share,
                "gpus": run.layouts[0].gpus,
                "gpu": None if run.gpu is None else asdict(run.gpu),
                "device": run.device_kind,
                "room": run.room,
                "assumptions": asdict(run.assumed),
                "estimates": rows,
            },
            indent=2,
        )
        return
    columns = ["weights", "gradi-\nents", "opti-\nmizer", "acti-\nvations", "logits", "peak"]
    sizes = [
        [
            f"{layout}, {kept}",
            *_sizes(memory.weights + memory.gathered, memory.gradients, memory.optimizer),
            *_sizes(memory.activations, memory.logits, memory.peak),
        ]
        for layout, kept, memory, _ in found
    ]
    print_table(["", *columns], sizes, figures=columns)
    if run.gpu is not None:
        columns = ["prod-\nucts", "waits", "update", "step", "MFU", "days", "cost"]
        times = [
            [
                f"{layout}, {kept}",
                *(f"{part:.2f} s" for part in (time.step.products, time.step.exposed, time.step.optimizer)),
                *(f"{time.step.total:.2f} s", f"{time.mfu:.0%}", f"{time.days:.1f}", f"${time.cost:,.0f}"),
            ]
            for layout, kept, _, time in found
            if time is not None
        ]
        print_table(["", *columns], times, figures=columns)
    positions = settings.rows_per_step * run.recipe.data.row_length
    print(
        f"{parameters:,} parameters; {settings.steps:,} steps of {positions:,} positions, "
        f"{labels.share:.0%} of them predicted."
    )
    print(_describe_room(run, [(f"{layout}, {kept}", memory.peak) for layout, kept, memory, _ in found]))


def _describe_room(run: PlannedRun, peaks: Sequence[tuple[str, int]]) -> str:
    """Says what fits, and what the figures assume."""
    from gmask.hardware import format_bytes

    fitting = [name for name, peak in peaks if peak <= run.room]
    fits = f"fits {'; '.join(fitting)}" if fitting else "nothing of this fits"
    if len(fitting) == len(peaks):
        fits = "all of this fits"
    if run.gpu is None:
        return f"{format_bytes(run.room)} are free on {run.device_kind}: {fits}."
    price = run.gpu.price if run.price is None else run.price
    assumed, gpu = run.assumed, run.gpu
    return (
        f"{format_bytes(run.room)} on each {gpu.name}: {fits}.\n"
        f"Computed, not measured. Assumed: products at {assumed.utilization:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s; "
        f"links at {assumed.link_efficiency:.0%} of {gpu.link / 1e9:.0f} GB/s in a machine of 8, and of "
        f"{gpu.network / 1e9:g} GB/s a GPU between machines; ${price:.2f} an hour of a GPU; no validation, no failures."
    )
