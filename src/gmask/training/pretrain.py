"""How is a GLM trained from scratch on one machine?

`run` is the whole of it: recipe, tokenizer, token cache, model, loop, checkpoints, report. The loop accumulates the
gradients of a step's passes; the loss is the mean over all labelled tokens of the step, whatever pass they fall into.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from gmask.errors import GmaskError
from gmask.infilling.blanks import InfillingExample
from gmask.infilling.collator import collate
from gmask.infilling.objectives import OBJECTIVES, Objective
from gmask.loading import best_device
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.native.primitive_cache import bound_primitive_cache
from gmask.tasks.recipes.pretraining import OptimizationSettings, Recipe, load_recipe
from gmask.tasks.vocabulary import make_mixture
from gmask.training.cache import TokenSource, open_sources
from gmask.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, write_folder
from gmask.training.datasets import RowStream, validation_rows
from gmask.training.initialization import start_with_neighbours
from gmask.training.report import MetricsLog
from gmask.training.tokenizer import train_from_sources

VOCABULARY_MULTIPLE = 128  # rows of the embedding, as published: even tiles for the matrix kernels


def run(recipe_path: str, overrides: Sequence[str] = (), *, resume: bool = True) -> Path:
    """Trains by a recipe, resuming from its last checkpoint, and returns the folder of the finished model.

    Raises:
        GmaskError: a mistake in the recipe or the texts, a full disk, a loss that is not finite.
    """
    return Pretraining(load_recipe(recipe_path, overrides)).train(resume=resume)


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint."""

    step: int = 0
    tokens: int = 0  # real ones, seen by the model
    labelled: int = 0
    seconds: float = 0.0


@dataclass
class Pretraining:
    """One run of a recipe. What `__post_init__` makes from it is the same in every process that runs it."""

    recipe: Recipe
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        settings = self.recipe.run
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.out = Path(settings.out)
        self.device = torch.device(settings.device or best_device())
        bound_primitive_cache()
        torch.manual_seed(settings.seed)
        data = self.recipe.data
        sources = data.placed_sources
        self.tokenizer_folder = Path(self.recipe.tokenizer.path or self.out / "tokenizer")
        if not (self.tokenizer_folder / "tokenizer.json").is_file():
            if self.recipe.tokenizer.path:
                raise GmaskError(f"{self.tokenizer_folder}: no tokenizer.json there")
            train_from_sources(
                sources,
                vocab_size=self.recipe.tokenizer.vocab_size,
                sample_bytes=self.recipe.tokenizer.sample_bytes,
                seed=settings.seed,
                skip_bad_lines=data.skip_bad_lines,
                out=self.tokenizer_folder,
            )
        tokenizer = Tokenizer.from_file(str(self.tokenizer_folder / "tokenizer.json"))
        self.mixture = make_mixture(tokenizer, self.recipe.objective)
        self.special = self.mixture.special
        self.model = GLMForConditionalGeneration(self._model_config(tokenizer))
        if self.recipe.optimization.initialization == "neighbours":
            start_with_neighbours(self.model)
        if self.recipe.optimization.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        self.model.to(self.device)
        cache = {"cache": data.cache, "skip_bad_lines": data.skip_bad_lines}
        self.train_sources = open_sources(sources, tokenizer, split="train", **cache)  # type: ignore[arg-type]
        self.validation_sources = open_sources(sources, tokenizer, split="validation", **cache)  # type: ignore[arg-type]
        # No place in a layout may lie beyond the model's tables, in training or in validation.
        self.max_piece = min(data.max_piece or data.row_length, self.model.config.max_position_embeddings)
        self.stream = RowStream(
            self.train_sources,
            self.mixture,
            row_length=data.row_length,
            seed=settings.seed,
            max_piece=self.max_piece,
        )
        self.optimizer = make_optimizer(self.model, self.recipe.optimization)

    def _model_config(self, tokenizer: Tokenizer) -> GLMConfig:
        rows = -(-tokenizer.get_vocab_size() // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        special = self.special
        settings: dict[str, Any] = {
            "vocab_size": rows,
            "hidden_act": "gelu_pytorch_tanh",  # as in the published training code
            "pad_token_id": special.pad,
            "eos_token_id": special.eop,  # what ends an answer
            "sop_token_id": special.sop,
            "eop_token_id": special.eop,
            "mask_token_id": special.mask,
            "smask_token_id": special.smask,
            "gmask_token_id": special.gmask,
        }
        return GLMConfig(**settings | self.recipe.model)

    def train(self, *, resume: bool = True) -> Path:
        """Runs the steps that are left and exports the model."""
        settings = self.recipe.run
        checkpoints = list_checkpoints(self.out)
        if checkpoints and not resume:
            raise GmaskError(f"{self.out} holds a run already: resume it, or choose another run.out")
        if checkpoints:
            self._restore(checkpoints[-1])
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "recipe.yaml").write_text(self.recipe.to_yaml(), "utf-8")
        steps = self.recipe.optimization.steps
        self.model.train()
        with (
            MetricsLog(self.out, after_step=self.progress.step) as log,
            _progress_bar(self.progress.step, steps) as bar,
        ):
            while self.progress.step < steps:
                record = self._step()
                step = self.progress.step
                last = step == steps
                if step % settings.validate_every == 0 or last:
                    record["validation"] = self.validate()
                if step % settings.log_every == 0 or last or "validation" in record:
                    log.add(record)
                if step % settings.save_every == 0 or last:
                    self._save()
                bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s")
                bar.update()
            log.draw_curves()
        return self.export()

    def _step(self) -> dict[str, Any]:
        """One optimizer step; returns its record for the log."""
        started = time.monotonic()
        optimization = self.recipe.optimization
        rows = [self.stream.next_row() for _ in range(optimization.rows_per_step)]
        batches = list(self._batches(rows))
        labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        rate = learning_rate(self.progress.step, optimization)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for batch in batches:
            loss = self._losses(batch).sum() / labelled
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), optimization.clip_norm)
        mean, norm_value = float(torch.stack(losses).sum()), float(norm)
        if not (math.isfinite(mean) and math.isfinite(norm_value)):
            self._refuse(batches, mean, norm_value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(int((batch["sequence_ids"] >= 0).sum()) for batch in batches)
        seconds = time.monotonic() - started
        now = self.progress
        self.progress = Progress(now.step + 1, now.tokens + tokens, now.labelled + labelled, now.seconds + seconds)
        return {
            "step": self.progress.step,
            "loss": mean,
            "learning_rate": rate,
            "gradient_norm": norm_value,
            "tokens": self.progress.tokens,
            "labelled_tokens": self.progress.labelled,
            "tokens_per_second": tokens / seconds,
            "seconds": self.progress.seconds,
        }

    def _batches(self, rows: Sequence[list[InfillingExample]]) -> Iterator[dict[str, Tensor]]:
        per_pass = self.recipe.optimization.rows_per_pass
        for start in range(0, len(rows), per_pass):
            yield collate(
                rows[start : start + per_pass],
                row_length=self.recipe.data.row_length,
                pad_id=self.special.pad,
            )

    def _losses(self, batch: dict[str, Tensor]) -> Tensor:
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        half = self.recipe.optimization.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            losses: Tensor = self.model.token_losses(**batch)
        return losses

    def _refuse(self, batches: Sequence[dict[str, Tensor]], loss: float, norm: float) -> None:
        step = self.progress.step + 1
        path = self.out / f"bad-batch-{step:08d}.safetensors"
        save_file({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, path)
        rows = self.recipe.optimization.rows_per_step
        raise GmaskError(
            f"step {step}: the loss is {loss} and the gradient's norm {norm}; its rows {self.stream.row - rows} to "
            f"{self.stream.row - 1} are kept in {path}; lower optimization.learning_rate and resume"
        )

    @torch.no_grad()
    def validate(self) -> dict[str, dict[str, float]]:
        """Mean loss in nats of every source and objective, on rows that never change."""
        self.model.eval()
        losses: dict[str, dict[str, float]] = {}
        for source in self.validation_sources:
            losses[source.name] = {
                objective: self._validation_loss(source, objective)
                for objective in OBJECTIVES
                if getattr(self.mixture, objective) > 0
            }
        self.model.train()
        return losses

    def _validation_loss(self, source: TokenSource, objective: Objective) -> float:
        rows = validation_rows(
            source,
            self.mixture,
            objective,
            row_length=self.recipe.data.row_length,
            max_rows=self.recipe.run.validation_rows,
            max_piece=self.max_piece,
        )
        losses = torch.cat([self._losses(batch) for batch in self._batches(rows)])
        return float(losses.mean())

    def _save(self) -> None:
        progress = {**vars(self.progress), "stream": self.stream.state_dict()}
        save_checkpoint(
            self.out,
            self.progress.step,
            self.model,
            self.optimizer,
            progress,
            keep_last=self.recipe.run.keep_last,
        )

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.model, self.optimizer)
        self.stream.load_state_dict(state.progress.pop("stream"))
        self.progress = Progress(**state.progress)

    def export(self) -> Path:
        """Writes ``out/model``: bfloat16 weights, configuration, tokenizer and the curves."""

        def fill(folder: Path) -> None:
            self.model.to(torch.bfloat16).save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes((self.tokenizer_folder / name).read_bytes())
            for name in ("curves.png", "metrics.jsonl"):
                (folder / name).write_bytes((self.out / name).read_bytes())
            (folder / "recipe.yaml").write_text(self.recipe.without_places().to_yaml(), "utf-8")
            for path in folder.iterdir():
                path.chmod(0o644)  # safetensors' own would keep other users out

        write_folder(self.out / "model", fill, kept="the run, to be resumed,")
        return self.out / "model"


def make_optimizer(model: torch.nn.Module, settings: OptimizationSettings) -> torch.optim.Optimizer:
    """AdamW; norms and biases do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def learning_rate(step: int, settings: OptimizationSettings) -> float:
    """Linear warm-up, then a cosine from the peak to the final rate; ``step`` counts from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    fall = settings.learning_rate - settings.final_learning_rate
    return settings.final_learning_rate + fall * 0.5 * (1 + math.cos(math.pi * done))


def _progress_bar(done: int, steps: int) -> Any:
    return tqdm(initial=done, total=steps, unit="step", desc="pretraining", dynamic_ncols=True)
