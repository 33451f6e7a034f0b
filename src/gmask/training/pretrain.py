"""Pretraining by a recipe, on the loop of `gmask.training.loop`; with the `neighbours` initialisation for small models.

With random position tables every head attends to all positions at first, and a run of some ten million tokens may end
before a head has found the words beside a blank. With `initialization: neighbours` the tables start as sinusoids, in
which a step of one position is the same rotation everywhere. Each head of the first layers starts with its query
rotated against its key, so that it attends to one neighbour of its own position. These are initial values only: every
weight trains, and the architecture is unchanged.

The idea is that of mimetic initialisation (Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers",
ICML 2023), with a chosen neighbour in place of the token itself.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from tqdm import tqdm

from gmask.corpus.shards import TokenSource
from gmask.errors import GmaskError
from gmask.estimation.inference import weight_bytes
from gmask.files import write_text, written_folder
from gmask.hardware import bound_primitive_cache, check_room, cpu_instructions, describe_training_dtype, training_dtype
from gmask.infilling.blanks import NOT_SCORED, InfillingExample
from gmask.infilling.collator import collate
from gmask.infilling.objectives import OBJECTIVES, Objective
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.recipes.pretraining import (
    VOCABULARY_MULTIPLE,
    OptimizationSettings,
    PretrainingRecipe,
    load_recipe,
    make_mixture,
)
from gmask.tasks.records import Source
from gmask.training.accelerator import find_device, join_processes
from gmask.training.corpus_rows import RowStream, open_texts, validation_rows
from gmask.training.diagnostics import SpikeGuard, training_flops
from gmask.training.examples import Batch
from gmask.training.loop import Loop, Schedule, StepData, StepResult
from gmask.training.parallel import is_divided, shard_model, unsharded, whole_weights
from gmask.training.report import CURVES_FILE, draw_curves
from gmask.training.run_folder import LOG_FILE, RunProgress, last_checkpoint, read_metrics
from gmask.training.tokenizer import train_from_sources
from gmask.training.validation import BlankSet, choose_blanks, score_blanks


def run_pretraining(recipe_path: str, overrides: Sequence[str] = (), *, resume: bool = True) -> Path:
    """Trains by a recipe, resuming from its last checkpoint, and returns the folder of the finished model.

    Raises:
        GmaskError: a mistake in the recipe or the texts, a checkpoint of another version of gmask in the folder, a full
            disk, a loss that is not finite.
    """
    return Pretraining(load_recipe(recipe_path, overrides)).train(resume=resume)


STATES = 4
"""Numbers in memory for each weight: itself, its gradient, and two moments of the optimizer."""


class Pretraining:
    """One run of a recipe. Whatever process makes it, a recipe gives the same model, rows and optimizers."""

    name, unit, advice = "pretraining", "rows", "lower optimization.learning_rate and resume"

    def __init__(self, recipe: PretrainingRecipe) -> None:
        self.recipe = recipe
        settings = self.recipe.run
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.out = Path(settings.out)
        self.device = torch.device(find_device(settings.device))
        self._check_processes(int(os.environ.get("WORLD_SIZE", "1")))
        self.dtype = training_dtype(self.recipe.optimization.dtype, self.device)
        bound_primitive_cache()
        self.accelerator = join_processes(settings, device=self.device.type, dtype=self.dtype)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        torch.manual_seed(settings.seed)
        data = self.recipe.data
        sources = [] if data.prepared is not None else data.resolved_sources
        prepared = None if data.prepared is None else str(Path(data.prepared) / "tokenizer")
        self.tokenizer_folder = Path(self.recipe.tokenizer.path or prepared or self.out / "tokenizer")
        with self.accelerator.main_process_first():  # which writes the tokenizer and the tokens for the others
            tokenizer = self._load_tokenizer(sources)
            self.train_sources, self.validation_sources = (
                open_texts(data, tokenizer, split=split, progress=self.is_main) for split in ("train", "validation")
            )
        self.mixture = make_mixture(tokenizer, self.recipe.objective)
        self.decay_mixture = make_mixture(tokenizer, self.recipe.objective | self.recipe.decay.objective)
        self.special = self.mixture.special
        self.model = self._make_model(self._model_config(tokenizer))
        if self.recipe.optimization.initialization == "neighbours":
            start_with_neighbours(self.model)
        self._choose_activations()
        self.model.to(self.device)
        if replica := self.accelerator.process_index:
            torch.manual_seed(settings.seed + replica)  # else all processes would leave out the same activations
        # No position in a layout may lie beyond the model's tables, in training or in validation.
        self.max_piece = min(data.max_piece or data.row_length, self.model.config.max_position_embeddings)
        self.stream = RowStream(
            self.train_sources,
            self.mixture,
            row_length=data.row_length,
            seed=settings.seed,
            max_piece=self.max_piece,
        )
        self.average: AveragedModel | None = None
        if self.recipe.optimization.ema is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=moving_average(self.recipe.optimization.ema))
        if self.recipe.parallel.shard and self.accelerator.num_processes > 1:
            for model in (self.model, *([] if self.average is None else [self.average.module])):
                shard_model(model, device=self.device, dtype=self.dtype, offload=self.recipe.parallel.offload)
        self.loop = Loop(
            self,
            self.model,
            make_optimizers(self.model, self.recipe.optimization),
            accelerator=self.accelerator,
            out=self.out,
            schedule=Schedule(
                steps=self.recipe.optimization.steps,
                validate_every=settings.validate_every,
                log_every=settings.log_every,
                save_every=settings.save_every,
                keep_last=settings.keep_last,
                keep=self.recipe.decay_start,  # a longer run can continue from there
            ),
            clip_norm=self.recipe.optimization.clip_norm,
            average=self.average,
            timeout=settings.timeout,
            time_limit=settings.time_limit,
            guard=self._guard(),
            layers_every=settings.layers_every,
        )
        self.blanks: BlankSet | None = None
        if settings.validation_sentences:
            self.blanks = choose_blanks(
                sources,
                tokenizer,
                self.special,
                sentences=settings.validation_sentences,
                longest=self.model.config.max_position_embeddings,
            )

    def _check_processes(self, processes: int) -> None:
        """Raises `GmaskError` if the processes cannot share the rows of a step."""
        rows = self.recipe.optimization.rows_per_step
        if rows % processes:
            raise GmaskError(
                f"optimization.rows_per_step is {rows}, which {processes} processes cannot share evenly: make it a "
                f"multiple of {processes}, or start as many processes as divide it"
            )
        if self.recipe.parallel.offload and (not self.recipe.parallel.shard or self.device.type != "cuda"):
            raise GmaskError(
                "parallel.offload moves the shards of GPUs to the host's memory: leave it out, or set parallel.shard "
                "and run on GPUs"
            )

    def _guard(self) -> SpikeGuard | None:
        settings = self.recipe.optimization
        if settings.spike_factor is None:
            return None
        return SpikeGuard(settings.spike_factor, settings.spike_window, stops=settings.on_spike == "stop")

    def _choose_activations(self) -> None:
        """Sets which activations are kept for the backward pass, and compiles the blocks if the recipe says so."""
        optimization = self.recipe.optimization
        if optimization.gradient_checkpointing:
            kept = {"context_fn": keep_products} if optimization.gradient_checkpointing == "selective" else {}
            self.model.activation_checkpointing_enable({"use_reentrant": False, **kept})
        if optimization.compile:
            for block in self.model.glm.transformer.layers:
                block.compile()

    def _load_tokenizer(self, sources: Sequence[Source]) -> Tokenizer:
        """The recipe's tokenizer. Without a path in the recipe it is learnt into the run's folder, once."""
        settings, path = self.recipe.tokenizer, self.tokenizer_folder / "tokenizer.json"
        if not path.is_file():
            if settings.path or self.recipe.data.prepared:
                raise GmaskError(f"{self.tokenizer_folder}: no tokenizer.json there")
            train_from_sources(
                sources,
                vocab_size=settings.vocab_size,
                alphabet_size=settings.alphabet_size,
                max_han_chars=settings.max_han_chars,
                sample_bytes=settings.sample_bytes,
                seed=self.recipe.run.seed,
                skip_bad_lines=self.recipe.data.skip_bad_lines,
                out=self.tokenizer_folder,
            )
        return Tokenizer.from_file(str(path))

    def _make_model(self, config: GLMConfig) -> GLMForConditionalGeneration:
        """A new model. Raises `GmaskError` if it, its gradients and the optimizer's moments do not fit into memory."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            needed = STATES * weight_bytes(GLMForConditionalGeneration(config))
        check_room(self.out, needed, torch.device("cpu"), advise=lambda: "make the model smaller (the section model)")
        return GLMForConditionalGeneration(config)

    def _model_config(self, tokenizer: Tokenizer) -> GLMConfig:
        """The config of the model: the recipe's keys, and what follows from the tokenizer."""
        rows = -(-tokenizer.get_vocab_size() // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        special = self.special
        settings: dict[str, Any] = {
            "vocab_size": rows,
            "hidden_act": "gelu_pytorch_tanh",  # as in the published training code
            "pad_token_id": special.pad,
            "eos_token_id": special.eop,  # the end of an answer
            "sop_token_id": special.sop,
            "eop_token_id": special.eop,
            "mask_token_id": special.mask,
            "smask_token_id": special.smask,
            "gmask_token_id": special.gmask,
        }
        return GLMConfig(**settings | self.recipe.model)

    def train(self, *, resume: bool = True) -> Path:
        """Makes the steps that are left, and exports the model."""
        checkpoint = last_checkpoint(self.out)
        if checkpoint is not None and not resume:
            raise GmaskError(f"{self.out} holds a run already: resume it, or choose another run.out")
        self._report(describe_training_dtype(self.recipe.optimization.dtype, self.device))
        if checkpoint is not None:
            state = self.loop.restore()
            self._resume_stream(checkpoint, self.loop.progress, state["stream"])
        self.loop.progress.arithmetic = self._arithmetic()
        if self.is_main:
            write_text(self.out / "recipe.yaml", self.recipe.to_yaml())
        self.loop.fit()
        if self.is_main:
            draw_curves(read_metrics(self.out / LOG_FILE), self.out / CURVES_FILE)
        self.export()
        self.accelerator.wait_for_everyone()
        return self.out / "model"

    def _report(self, line: str) -> None:
        """Prints a line, once for all processes."""
        if self.is_main:
            tqdm.write(line, file=sys.stderr)

    # The protocol `Run` of the loop

    def data(self, step: int) -> Iterator[StepData]:
        """This process's rows of the next steps, from the stream, which is at the run's step already.

        Every process draws all rows of a step and takes its share of them, so that they are the same rows in the same
        order for any number of processes.
        """
        share = self.recipe.optimization.rows_per_step // self.accelerator.num_processes
        while True:
            if self.loop.progress.step == self.recipe.decay_start:
                self._begin_decay()
            first = self.stream.row + share * self.accelerator.process_index
            drawn = [self.stream.next_row() for _ in range(self.recipe.optimization.rows_per_step)]
            rows = drawn[share * self.accelerator.process_index :][:share]
            batches = list(self._batches(rows))
            numbers = iter(range(first, first + share))
            yield StepData(
                batches,
                numbers=[[next(numbers) for _ in batch["input_ids"]] for batch in batches],
                labelled=sum(int((batch["labels"] != NOT_SCORED).sum()) for batch in batches),
                tokens=sum(int((batch["sequence_ids"] >= 0).sum()) for batch in batches),
            )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum over the labelled tokens; by a call of the model as a whole, which DDP and FSDP need."""
        with self.accelerator.autocast():
            total: Tensor = model(
                **batch,
                use_cache=False,
                skip_logits=True,
                num_items_in_batch=1,
                loss_chunk=self.recipe.optimization.loss_chunk,
            ).loss
        return total

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.recipe)

    def record(self, result: StepResult) -> dict[str, Any]:
        now, peak = self.loop.progress, self.recipe.run.peak_tflops
        if result.is_skipped:
            self._report(f"step {now.step}: skipped, for its loss of {result.loss:.3f} is a spike")
        found: dict[str, Any] = {
            "step": now.step,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "tokens": now.tokens,
            "labelled_tokens": now.labelled,
            "tokens_per_second": result.tokens / result.seconds,
            "seconds": now.seconds,
        }
        if peak is not None:
            flops = training_flops(
                self.model.config, tokens=result.tokens, labelled=result.labelled, row_length=self.stream.row_length
            )
            found["mfu"] = flops / (result.seconds * peak * 1e12 * self.accelerator.num_processes)
        return (
            found
            | ({"skipped": True} if result.is_skipped else {})
            | ({"layers": result.layers} if result.layers else {})
        )

    def validate(self) -> dict[str, Any]:
        found: dict[str, Any] = {"validation": self.validate_sources()}
        if self.blanks is not None:
            found["blanks"] = self.validate_blanks(self.blanks)
            self._report(f"step {self.loop.progress.step}: {describe_blanks(found['blanks'])}")
        return found

    def describe(self, data: StepData) -> str:
        return f"{data.numbers[0][0]} to {data.numbers[-1][-1]}"

    def save_weights(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def state(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict()}

    # Parts of a step and of a validation

    def _begin_decay(self) -> None:
        """Switches the rows to those of the recipe's section ``decay``; from here on the learning rate falls."""
        self.loop.progress.decay_start = self.recipe.decay_start
        self.stream.mixture = self.decay_mixture
        self.stream.row_length = self.recipe.decay.row_length or self.recipe.data.row_length
        longest = self.recipe.data.max_piece or self.stream.row_length
        self.stream.max_piece = min(longest, self.model.config.max_position_embeddings)

    def _batches(
        self, rows: Sequence[list[InfillingExample]], row_length: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of one pass each. Of rows longer than ``data.row_length`` a pass takes fewer."""
        row_length = row_length or self.stream.row_length
        per_pass = max(1, self.recipe.optimization.rows_per_pass * self.recipe.data.row_length // row_length)
        for start in range(0, len(rows), per_pass):
            yield collate(
                rows[start : start + per_pass],
                row_length=row_length,
                pad_id=self.special.pad,
            )

    @torch.no_grad()
    def validate_sources(self) -> dict[str, dict[str, float]]:
        """Mean loss in nats of every source and objective, on rows that never change."""
        self.final_model.eval()
        losses: dict[str, dict[str, float]] = {}
        for source in self.validation_sources:
            losses[source.name] = {
                objective: self._validation_loss(source, objective)
                for objective in OBJECTIVES
                if getattr(self.mixture, objective) > 0
            }
        self.final_model.train()
        return losses

    @torch.no_grad()
    def validate_blanks(self, blanks: BlankSet) -> dict[str, dict[str, float]]:
        """The scores of `score_blanks`, for each language and kind of text."""
        self.final_model.eval()
        with self.accelerator.autocast(), unsharded(self.final_model):
            found = score_blanks(self.final_model, blanks, pad_id=self.special.pad)
        self.final_model.train()
        return found

    @property
    def final_model(self) -> GLMForConditionalGeneration:
        """What is validated and exported: the moving average of the weights where there is one, else the weights."""
        if self.average is None:
            return self.model
        return cast("GLMForConditionalGeneration", self.average.module)

    def _validation_loss(self, source: TokenSource, objective: Objective) -> float:
        rows = validation_rows(
            source,
            self.mixture,
            objective,
            row_length=self.recipe.data.row_length,
            max_rows=self.recipe.run.validation_rows,
            max_piece=self.max_piece,
        )
        batches = list(self._batches(rows, self.recipe.data.row_length))
        found = torch.zeros(2, dtype=torch.float64, device=self.device)  # the sum of the losses, and their number
        # The processes share the batches. All of them make as many passes: one whose turn finds none repeats the first.
        for start in range(0, len(batches), self.accelerator.num_processes):
            index = start + self.accelerator.process_index
            batch = batches[index if index < len(batches) else 0]
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            total = self.loss(self.final_model, batch)
            if index < len(batches):
                found += torch.stack((total.double(), (batch["labels"] != NOT_SCORED).sum().double()))
        total, count = self.accelerator.reduce(found, reduction="sum")
        return float(total / count)

    def _resume_stream(self, checkpoint: Path, progress: RunProgress, stream: dict[str, Any]) -> None:
        """Restores the stream to where the checkpoint was made, and warns if this machine computes in another way.

        Raises:
            GmaskError: the recipe's learning rate falls from another step; the texts have changed.
        """
        if progress.decay_start is not None:
            if progress.decay_start != self.recipe.decay_start:
                raise GmaskError(
                    f"{checkpoint}: its learning rate has fallen since step {progress.decay_start}, and by this recipe "
                    f"it falls from step {self.recipe.decay_start}; to make the run longer or shorter, delete the "
                    "checkpoints after that step and resume, or set optimization.steps as it was"
                )
            self._begin_decay()
        elif progress.step > self.recipe.decay_start:
            raise GmaskError(
                f"{checkpoint}: is past step {self.recipe.decay_start}, where the learning rate is to begin to fall; "
                "raise optimization.steps"
            )
        self.stream.load_state_dict(stream)
        if progress.arithmetic and progress.arithmetic != self._arithmetic():
            self._report(
                f"warning: {checkpoint} was made with {progress.arithmetic}, and this is {self._arithmetic()}: the run "
                "goes on, but not bit for bit as it would have there"
            )

    def _arithmetic(self) -> str:
        """The dtype of the forward pass and the device's instructions, such as ``float32 on avx512``."""
        unit = cpu_instructions() if self.device.type == "cpu" else self.device.type
        return f"{str(self.dtype).removeprefix('torch.')} on {unit}"

    def export(self) -> Path:
        """Writes ``out/model``: bfloat16 weights, configuration, tokenizer and the curves.

        All processes must call this together; the first one writes.
        """
        weights = None
        if is_divided(self.final_model):
            weights = {name: value.to(torch.bfloat16) for name, value in whole_weights(self.final_model).items()}
        if not self.is_main:
            return self.out / "model"
        with written_folder(self.out / "model", kept="the run, to be resumed,") as folder:
            if weights is None:
                self.final_model.to(torch.bfloat16).save_pretrained(folder)
            else:
                self.final_model.config.dtype = torch.bfloat16
                self.final_model.save_pretrained(folder, state_dict=weights)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes((self.tokenizer_folder / name).read_bytes())
            for name in (CURVES_FILE, LOG_FILE):
                (folder / name).write_bytes((self.out / name).read_bytes())
            (folder / "recipe.yaml").write_text(self.recipe.portable().to_yaml(), "utf-8")
        return self.out / "model"


def describe_run(folder: Path) -> dict[str, Any]:
    """The last figures of a run, by the folder of its model: steps, tokens, seconds, and the last validation.

    Raises:
        GmaskError: its log is missing or damaged.
    """
    records = read_metrics(folder / LOG_FILE)
    last = {name: records[-1][name] for name in ("step", "tokens", "loss", "seconds")}
    validated: dict[str, Any] = next((record for record in reversed(records) if "validation" in record), {})
    return last | {name: validated[name] for name in ("validation", "blanks") if name in validated}


def make_optimizers(model: GLMForConditionalGeneration, settings: OptimizationSettings) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the layers and AdamW for the rest. Norms and biases do not decay.

    Muon's steps are scaled to the size of AdamW's, so that both use one learning rate and one weight decay.
    Source: Liu et al. 2025, "Muon is Scalable for LLM Training".
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in tables]
    embeddings = [p for p in parameters if id(p) in tables]
    others = [p for p in parameters if p.ndim < 2]
    with_muon = settings.optimizer == "muon"
    decaying = ([] if with_muon else matrices) + (embeddings if settings.decay_embeddings else [])
    free = others + ([] if settings.decay_embeddings else embeddings)
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decaying, settings.weight_decay), (free, 0.0))
        if group
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
    ]
    if with_muon:
        rate, decay = settings.learning_rate, settings.weight_decay
        optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""The operations whose results selective checkpointing keeps: they take most of the time of a block."""


def keep_products() -> tuple[Any, Any]:
    """The contexts of `torch.utils.checkpoint` in which norms, activations and dropouts alone are computed again."""
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(PRODUCTS)  # type: ignore[no-untyped-call]
    return contexts


Tensors = tuple[Tensor, ...] | list[Tensor]


def moving_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """The update of an exponential moving average, for `AveragedModel`.

    The average of the first steps forgets faster: after ``n`` updates its decay is ``(1 + n) / (10 + n)`` where that is
    less than ``decay``, so that a young run is not judged by its first weights. The rule is that of TensorFlow's
    ExponentialMovingAverage (``num_updates``).
    """

    def update(average: Tensors, current: Tensors, count: Tensor | int) -> None:
        updates = int(count)
        average, current = (
            [t.to_local() if isinstance(t, DTensor) else t for t in group] for group in (average, current)
        )
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + updates) / (10 + updates)))

    return update


def learning_rate(step: int, recipe: PretrainingRecipe) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up to the peak, then one of two schedules.

    - cosine: falls to the final rate until the end of the run.
    - constant: stays at the peak until `decay` begins, then falls linearly to the final rate.
    """
    settings = recipe.optimization
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        falling = max(0, step - recipe.decay_start) / max(1, settings.steps - recipe.decay_start)
        return settings.learning_rate + (settings.final_learning_rate - settings.learning_rate) * falling
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    fall = settings.learning_rate - settings.final_learning_rate
    return settings.final_learning_rate + fall * 0.5 * (1 + math.cos(math.pi * done))


def describe_blanks(found: Mapping[str, Mapping[str, float]]) -> str:
    """One line with the share of right first tokens and their loss in each language."""
    languages = {group: values for group, values in found.items() if "," not in group}
    parts = [f"{name} {values['top1']:.1%}, {values['nats']:.2f} nats" for name, values in languages.items()]
    return f"first token of one-unit blanks: {'; '.join(parts)}"


CONTEXT_OFFSETS = (-1, 1, -2, 2)  # positions from the blank, or from the token itself if it is of the context
ANSWER_OFFSETS = (-1, -2, -3, -4)  # positions in the answer
FASTEST = 3.0  # radians a position; a little under half a turn, so that adjacent positions are far apart
AMPLITUDE = 2.0  # of the sinusoids, in standard deviations of the word embeddings
SHARPNESS = 2.0  # with it the chosen neighbour gets a third or more of its head's attention


def start_with_neighbours(model: GLMForConditionalGeneration) -> None:
    """Sets the position tables, and the queries and keys of the first two layers, in place.

    Positions in the context rotate in the first half of the hidden dimensions, positions in the answer in the second.
    Layer 0 attends to positions beside the blank (`CONTEXT_OFFSETS`, one for each head), layer 1 to earlier positions
    of the answer (`ANSWER_OFFSETS`). The latter is weak: layer 0 adds to the residual stream, which blurs the positions
    that layer 1 compares.
    """
    config = model.config
    half = config.hidden_size // 2
    transformer = model.glm.transformer
    frequencies = find_frequencies(half // 2)
    with torch.no_grad():
        for table, start in ((transformer.position_embeddings, 0), (transformer.block_position_embeddings, half)):
            waves = sinusoids(table.num_embeddings, frequencies)
            assert isinstance(table, nn.Embedding)
            table.weight[:, start : start + half] = AMPLITUDE * config.initializer_range * waves
        plans = ((CONTEXT_OFFSETS, 0), (ANSWER_OFFSETS, half))
        for layer, (offsets, start) in zip(transformer.layers, plans, strict=False):
            weight = layer.get_parameter("attention.query_key_value.weight")  # [3 H, H]: queries, keys, values
            pairs = torch.linspace(0, len(frequencies) - 1, config.head_dim // 2).round().long()
            for head, offset in enumerate(offsets[: config.num_attention_heads]):
                rows = torch.arange(config.head_dim) + head * config.head_dim
                query, key = neighbour_projection(frequencies, pairs, offset, width=config.hidden_size, start=start)
                weight[rows] = SHARPNESS**0.5 * query
                weight[rows + config.hidden_size] = SHARPNESS**0.5 * key


def find_frequencies(count: int) -> Tensor:
    """``[count]`` frequencies in radians a position, unevenly spaced so that no two positions look alike."""
    return FASTEST * (torch.arange(1, count + 1) / count) ** 1.5


def sinusoids(positions: int, frequencies: Tensor) -> Tensor:
    """``[positions, 2 F]``: the sine and cosine of each frequency side by side."""
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def neighbour_projection(
    frequencies: Tensor, pairs: Tensor, offset: int, *, width: int, start: int
) -> tuple[Tensor, Tensor]:
    """Query and key weights ``[2 P, width]`` whose product is highest for the key ``offset`` positions from the query.

    pairs: ``[P]`` indices of the frequencies to compare; start: the first dimension of the sinusoids.
    """
    query, key = torch.zeros(2 * len(pairs), width), torch.zeros(2 * len(pairs), width)
    sine, cosine = torch.arange(len(pairs)) * 2, torch.arange(len(pairs)) * 2 + 1
    turn = frequencies[pairs] * offset
    from_sine, from_cosine = start + 2 * pairs, start + 2 * pairs + 1
    query[sine, from_sine], query[sine, from_cosine] = turn.cos(), turn.sin()  # sin(a + t)
    query[cosine, from_cosine], query[cosine, from_sine] = turn.cos(), -turn.sin()  # cos(a + t)
    key[sine, from_sine] = key[cosine, from_cosine] = 1.0
    return query, key
