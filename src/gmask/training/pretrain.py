"""Pretraining by a recipe, on the loop of `gmask.training.loop`."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from tqdm import tqdm

from gmask.checkpoints.load import open_folder
from gmask.corpus.shards import TokenSource
from gmask.errors import GmaskError
from gmask.files import write_text, written_folder
from gmask.hardware import (
    bound_primitive_cache,
    cpu_instructions,
    describe_training_dtype,
    multiplies_in_bfloat16,
    training_dtype,
)
from gmask.infilling.blanks import NOT_SCORED, InfillingExample
from gmask.infilling.collator import collate
from gmask.infilling.objectives import OBJECTIVES, Objective
from gmask.models.base import FLEX
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.models.tensor_parallel import check_processes
from gmask.recipes.pretraining import (
    VOCABULARY_MULTIPLE,
    OptimizationSettings,
    ParallelSettings,
    PretrainingRecipe,
    find_blank_tokens,
    load_recipe,
    make_mixture,
)
from gmask.tasks.records import Source
from gmask.training.accelerator import describe_restarts, find_device, join_processes
from gmask.training.corpus_rows import RowStream, open_texts, validation_rows
from gmask.training.diagnostics import SpikeGuard, training_flops
from gmask.training.examples import Batch
from gmask.training.float8 import check_float8, multiply_in_float8
from gmask.training.initial_weights import begin_with, make_whole
from gmask.training.loop import Loop, Schedule, StepData, StepResult
from gmask.training.muon import make_muon
from gmask.training.parallel import Grid, divide_model, hand_out, is_divided, unsharded, whole_weights
from gmask.training.report import CURVES_FILE, draw_curves
from gmask.training.run_folder import (
    LOG_FILE,
    RunProgress,
    last_checkpoint,
    random_state,
    read_metrics,
    set_random_state,
)
from gmask.training.tokenizer import train_from_sources
from gmask.training.validation import BlankSet, choose_blanks, score_blanks


def run_pretraining(recipe_path: str, overrides: Sequence[str] = (), *, resume: bool = True) -> Path:
    """Trains by a recipe, resuming from its last checkpoint, and returns the folder of the finished model.

    Raises:
        GmaskError: a mistake in the recipe or the texts, a checkpoint of another version of gmask in the folder, a full
            disk, a loss that is not finite.
    """
    return Pretraining(load_recipe(recipe_path, overrides)).train(resume=resume)


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
        self._check_attention()
        if self.recipe.optimization.float8:
            check_float8(self.device)
        self.dtype = training_dtype(self.recipe.optimization.dtype, self.device)
        bound_primitive_cache()
        self.accelerator = join_processes(settings, device=self.device.type, dtype=self.dtype)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.grid = Grid(self.accelerator.num_processes, self.accelerator.process_index, self.recipe.parallel.tensor)
        torch.manual_seed(settings.seed)
        data = self.recipe.data
        sources = [] if data.prepared is not None else data.resolved_sources
        prepared = None if data.prepared is None else str(Path(data.prepared) / "tokenizer")
        start = self.recipe.start
        self.beginning = None if start is None else open_folder(start)  # the model to begin with
        beside = None if self.beginning is None else self.beginning.path
        self.tokenizer_folder = Path(self.recipe.tokenizer.path or prepared or beside or self.out / "tokenizer")
        with self.accelerator.main_process_first():  # which writes the tokenizer and the tokens for the others
            tokenizer = self._load_tokenizer(sources)
            self.train_sources, self.validation_sources = (
                open_texts(data, tokenizer, split=split, progress=self.is_main) for split in ("train", "validation")
            )
        special = None  # found by the spellings of gmask's own vocabularies, or by the roles in a folder
        if self.beginning is not None and self.tokenizer_folder == self.beginning.path:
            special = find_blank_tokens(self.beginning.read_tokenizer(required=True))
        self.mixture = make_mixture(tokenizer, self.recipe.objective, special)
        self.special = self.mixture.special
        self.decay_mixture = make_mixture(tokenizer, self.recipe.objective | self.recipe.decay.objective, self.special)
        self._make_models(self._model_config(tokenizer))
        self._choose_activations()
        # No position in a layout may lie beyond the model's tables, in training or in validation.
        self.max_piece = min(data.max_piece or data.row_length, self.model.config.max_position_embeddings)
        self.streams = [
            RowStream(
                self.train_sources,
                self.mixture,
                row_length=data.row_length,
                seed=settings.seed,
                max_piece=self.max_piece,
                part=part,
                parts=data.streams,
            )
            for part in self._own_streams()
        ]
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
            tensor=self.grid.tensor,
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
        """Raises `GmaskError` if the processes cannot share the rows of a step, or the matrices of the model."""
        parallel, rows = self.recipe.parallel, self.recipe.optimization.rows_per_step
        if processes % parallel.tensor:
            raise GmaskError(
                f"parallel.tensor is {parallel.tensor}, and there are {processes} processes: start a multiple of "
                f"{parallel.tensor}, by torchrun"
            )
        replicas, streams = processes // parallel.tensor, self.recipe.data.streams
        if rows % replicas:
            many = f"{replicas} processes" if parallel.tensor == 1 else f"{replicas} groups of processes"
            raise GmaskError(
                f"optimization.rows_per_step is {rows}, which {many} cannot share evenly: make it a "
                f"multiple of {replicas}, or start as many processes as divide it"
            )
        if streams > 1 and (streams % replicas or rows % streams):
            raise GmaskError(
                f"data.streams is {streams}: it must divide optimization.rows_per_step ({rows}), and be a multiple of "
                f"the {replicas} processes that read rows of their own"
            )
        if parallel.tensor > 1:
            self._check_tensor(parallel, replicas)
        if parallel.tensor > 1 and self.recipe.optimization.float8:
            raise GmaskError("parallel.tensor: float8 needs whole matrices: set optimization.float8 to false")
        if parallel.offload and (not parallel.shard or self.device.type != "cuda"):
            raise GmaskError(
                "parallel.offload moves the shards of GPUs to the host's memory: leave it out, or set parallel.shard "
                "and run on GPUs"
            )

    def _check_attention(self) -> None:
        """Raises `GmaskError` if flex_attention cannot train the recipe's model on this device."""
        if self.recipe.optimization.attention != "flex":
            return
        if self.device.type != "cuda":
            raise GmaskError(
                f"optimization.attention: flex trains on CUDA alone, and this run is on {self.device.type}: set it to "
                "sdpa"
            )
        if GLMConfig(**self.recipe.shape).attention_dropout > 0:
            raise GmaskError("optimization.attention: flex has no dropout: set model.attention_dropout to 0")

    def _check_tensor(self, parallel: ParallelSettings, replicas: int) -> None:
        check_processes(GLMConfig(**self.recipe.shape).num_attention_heads, parallel.tensor)
        if replicas > 1 and not parallel.shard:
            raise GmaskError(
                f"parallel.tensor: {replicas} groups of {parallel.tensor} processes divide what each holds: set "
                f"parallel.shard, or start {parallel.tensor} processes"
            )
        if self.recipe.optimization.optimizer == "muon":
            raise GmaskError("parallel.tensor: Muon needs whole matrices: set optimization.optimizer to adamw")

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
        if optimization.attention == "flex":
            self.model.set_attn_implementation(FLEX)

    def _load_tokenizer(self, sources: Sequence[Source]) -> Tokenizer:
        """The recipe's tokenizer. Without a path in the recipe it is learnt into the run's folder, once."""
        settings, path = self.recipe.tokenizer, self.tokenizer_folder / "tokenizer.json"
        if not path.is_file():
            if self.tokenizer_folder != self.out / "tokenizer":
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

    def _make_models(self, config: GLMConfig) -> None:
        """Makes the model as it is before the first step, and the average of its weights, on the device.

        Of a model that the processes divide, the first one makes the whole on the CPU and hands out the weights one by
        one: the others never hold more than their parts, and one tensor.
        """
        parallel, settings = self.recipe.parallel, self.recipe.run
        divides = (parallel.shard or parallel.tensor > 1) and self.grid.processes > 1
        initialization = self.recipe.optimization.initialization
        whole = make_whole(config, self.beginning, initialization, self.out) if not divides or self.is_main else None
        if whole is not None and not divides:
            self.model: GLMForConditionalGeneration = whole
            self.model.to(self.device)
        else:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                self.model = GLMForConditionalGeneration(config)
        if self.recipe.optimization.float8:
            multiply_in_float8(self.model)
        self.average: AveragedModel | None = None
        if self.recipe.optimization.ema is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=moving_average(self.recipe.optimization.ema))
        if divides:
            mesh, copies = self.grid.mesh(self.device, timeout=settings.timeout), [self.model]
            copies += [] if self.average is None else [self.final_model]
            for model in copies:
                divide_model(
                    model, mesh, shard=parallel.shard, device=self.device, dtype=self.dtype, offload=parallel.offload
                )
            hand_out(whole, copies, device=torch.device("cpu") if parallel.offload else self.device)
            (state,) = broadcast_object_list([random_state()])
            set_random_state(state)
        if self.grid.replica:
            torch.manual_seed(settings.seed + self.grid.replica)  # else all would leave out the same activations

    def _model_config(self, tokenizer: Tokenizer) -> GLMConfig:
        """The config of the model: the recipe's keys, and what follows from the tokenizer or the model to begin with.

        Raises:
            GmaskError: the model to begin with is no GLM, has another shape, or fewer tokens than the tokenizer.
        """
        special, tokens = self.special, tokenizer.get_vocab_size()
        if self.beginning is not None:
            return begin_with(self.beginning, self.recipe.shape, tokens)
        settings: dict[str, Any] = {
            "vocab_size": -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            "hidden_act": "gelu_pytorch_tanh",  # as in the published training code
            "pad_token_id": special.pad,
            "eos_token_id": special.eop,  # the end of an answer
            "sop_token_id": special.sop,
            "eop_token_id": special.eop,
            "mask_token_id": special.mask,
            "smask_token_id": special.smask,
            "gmask_token_id": special.gmask,
        }
        return GLMConfig(**settings | self.recipe.shape)

    def train(self, *, resume: bool = True) -> Path:
        """Makes the steps that are left, and exports the model."""
        checkpoint = last_checkpoint(self.out)
        if checkpoint is not None and not resume:
            raise GmaskError(f"{self.out} holds a run already: resume it, or choose another run.out")
        self._report(describe_training_dtype(self.recipe.optimization.dtype, self.device))
        if warning := describe_restarts():
            self._report(warning)
        if checkpoint is not None:
            state = self.loop.restore()
            saved = state.get("streams") or [state["stream"]]
            self._resume_streams(checkpoint, self.loop.progress, saved)
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
        """This process's rows of the next steps, from its streams, which are at the run's step already.

        The rows of a step come from all streams in turn, as many from each, so that they are the same rows in the same
        order for any number of processes. With one stream every process draws all of them, and takes its share.
        """
        rows_per_step, streams = self.recipe.optimization.rows_per_step, self.recipe.data.streams
        share = rows_per_step // self.grid.replicas
        own = slice(0, share) if streams > 1 else slice(share * self.grid.replica, share * (self.grid.replica + 1))
        while True:
            if self.loop.progress.step == self.recipe.decay_start:
                self._begin_decay()
            drawn = [
                (stream.row, stream.next_row()) for stream in self.streams for _ in range(rows_per_step // streams)
            ]
            rows = [row for _, row in drawn[own]]
            batches = list(self._batches(rows))
            numbers = iter([number for number, _ in drawn[own]])
            yield StepData(
                batches,
                numbers=[[next(numbers) for _ in batch["input_ids"]] for batch in batches],
                labelled=sum(int((batch["labels"] != NOT_SCORED).sum()) for batch in batches),
                tokens=sum(int((batch["sequence_ids"] >= 0).sum()) for batch in batches),
            )

    def _own_streams(self) -> range:
        """The streams whose rows this process reads: its share, or the only one."""
        streams = self.recipe.data.streams
        share = max(1, streams // self.grid.replicas)
        return range(share * self.grid.replica, share * (self.grid.replica + 1)) if streams > 1 else range(1)

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
                self.model.config, tokens=result.tokens, labelled=result.labelled, row_length=self.streams[0].row_length
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
        if self.recipe.data.streams == 1:
            return {"stream": self.streams[0].state_dict()}
        states = [stream.state_dict() for stream in self.streams]
        if self.grid.processes > 1:
            states = gather_object([states])[:: self.grid.tensor]
            states = [state for group in states for state in group]
        return {"streams": states}

    # Parts of a step and of a validation

    def _begin_decay(self) -> None:
        """Switches the rows to those of the recipe's section ``decay``; from here on the learning rate falls."""
        self.loop.progress.decay_start = self.recipe.decay_start
        row_length = self.recipe.decay.row_length or self.recipe.data.row_length
        longest = self.recipe.data.max_piece or row_length
        for stream in self.streams:
            stream.mixture, stream.row_length = self.decay_mixture, row_length
            stream.max_piece = min(longest, self.model.config.max_position_embeddings)

    def _batches(
        self, rows: Sequence[list[InfillingExample]], row_length: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of one pass each. Of rows longer than ``data.row_length`` a pass takes fewer."""
        row_length = row_length or self.streams[0].row_length
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
        for start in range(0, len(batches), self.grid.replicas):
            index = start + self.grid.replica
            batch = batches[index if index < len(batches) else 0]
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            total = self.loss(self.final_model, batch)
            if index < len(batches):
                found += torch.stack((total.double(), (batch["labels"] != NOT_SCORED).sum().double()))
        total, count = self.accelerator.reduce(found, reduction="sum")
        return float(total / count)

    def _resume_streams(self, checkpoint: Path, progress: RunProgress, saved: Sequence[dict[str, Any]]) -> None:
        """Restores the streams to where the checkpoint was made, and warns if this machine computes in another way.

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
        if len(saved) != self.recipe.data.streams:
            raise GmaskError(
                f"{checkpoint}: data.streams was {len(saved)} and is now {self.recipe.data.streams}: set it as it was"
            )
        for part, stream in zip(self._own_streams(), self.streams, strict=True):
            stream.load_state_dict(saved[part])
        if progress.arithmetic and progress.arithmetic != self._arithmetic():
            self._report(
                f"warning: {checkpoint} was made with {progress.arithmetic}, and this is {self._arithmetic()}: the run "
                "goes on, but not bit for bit as it would have there"
            )

    def _arithmetic(self) -> str:
        """The dtype of the forward pass and the device's instructions, such as ``float32 on avx512``."""
        unit = cpu_instructions() if self.device.type == "cpu" else self.device.type
        muon = self.recipe.optimization.optimizer == "muon" and not multiplies_in_bfloat16(self.device)
        return f"{str(self.dtype).removeprefix('torch.')} on {unit}{', Muon in float32' if muon else ''}"

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
    """AdamW, or Muon for the matrices of the layers and AdamW for the rest. Norms and biases do not decay."""
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
        optimizers.append(make_muon(matrices, learning_rate=rate, weight_decay=decay))
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
