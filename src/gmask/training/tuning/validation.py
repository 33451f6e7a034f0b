"""How well does a model do its task while it is tuned?"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from gmask.generation.predictions import predict
from gmask.generation.settings import Settings
from gmask.tasks.metrics import evaluate
from gmask.tasks.recipes.tuning import TuningDataSettings
from gmask.tasks.samples import Prediction, Sample, TaskKind
from gmask.tasks.task import Task
from gmask.training.tuning.objective import Objective, count_items, examples_of
from gmask.training.tuning.sharding import unsharded


class Measurer:
    """A model, and all that its losses and predictions depend on. All processes measure together, each its share."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        data: TuningDataSettings,
        *,
        settings: Settings,
        batch_size: int,
        args: TrainingArguments,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            settings: by which texts are written.
            batch_size: samples that are read together.
            dtype: what the forward pass computes in.
        """
        self.model, self.tokenizer, self.task, self.data = model, tokenizer, task, data
        self.settings, self.batch_size, self.args, self.dtype = settings, batch_size, args, dtype
        self.cuts: list[str] = []  # what was told of the samples that were predicted last

    def measure(self, samples: Sequence[Sample]) -> tuple[dict[str, float], list[Prediction]]:
        """The loss and the metrics of the task, and the predictions that they are of."""
        predictions = self.predict(self.task.kind, samples) if self.task.metrics else []
        metrics = {"loss": self.loss(self.task.kind, samples)}
        if self.task.metrics:
            metrics |= evaluate(self.task.metrics, predictions, samples, language=self.task.language)
        return metrics, predictions

    def predict(self, kind: TaskKind, samples: Sequence[Sample]) -> list[Prediction]:
        """A prediction for each sample, in their order."""
        with self._computing(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            found = predict(
                self.model,
                self.tokenizer,
                kind,
                self._share(samples),
                settings=self.settings,
                batch_size=self.batch_size,
                max_source=self.data.max_source,
                truncation=self.data.truncation,
            )
        self.cuts = [str(warning.message) for warning in told if warning.category is UserWarning]
        return self._collect(found)

    @torch.no_grad()
    def loss(self, kind: TaskKind, samples: Sequence[Sample]) -> float:
        """The mean loss in nats: over the labelled tokens, or over the samples of a task that chooses."""
        objective = Objective(self.tokenizer, self.model.config, kind, self.data)
        items = sorted(objective.encode(self._share(samples)).items, key=lambda item: -examples_of(item)[0].length)
        total, count = 0.0, 0
        with self._computing():
            for start in range(0, len(items), self.batch_size):
                batch = objective.collate(items[start : start + self.batch_size])
                found, _ = objective.loss(
                    self.model, {name: value.to(self.args.device) for name, value in batch.items()}
                )
                total, count = total + float(found), count + count_items(batch)
        sums = self._collect([(total, count)])
        mean: float = sum(one for one, _ in sums) / sum(many for _, many in sums)
        return mean

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Without dropout, and in the precision of the training's forward pass, except that a CPU stays exact."""
        was_training = self.model.training
        self.model.eval()
        mixes = len({parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}) > 1
        enabled = self.dtype == torch.bfloat16 and (mixes or self.args.device.type != "cpu")
        try:
            with torch.autocast(self.args.device.type, torch.bfloat16, enabled=enabled), unsharded(self.model):
                yield
        finally:
            self.model.train(was_training)

    def _share(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        return samples[self.args.process_index :: self.args.world_size]

    def _collect(self, found: list[Any]) -> list[Any]:
        """The parts of all processes in the order that `_share` took them from; in every process."""
        if self.args.world_size == 1:
            return found
        parts: list[list[Any]] = gather_object([found])
        return [part[index] for index in range(len(parts[0])) for part in parts if index < len(part)]
