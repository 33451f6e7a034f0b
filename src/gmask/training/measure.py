"""Measuring while a model is tuned: its task, and what it forgets on a fixed general set."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.evaluation.harness import Evaluation, evaluate
from gmask.generation.batches import batches_by_length
from gmask.generation.predict import predict
from gmask.generation.settings import Sampling
from gmask.recipes.tuning import ForgettingSettings, TuningDataSettings
from gmask.tasks.metrics import Rows
from gmask.tasks.records import Prediction, Record, Sample, TaskKind, read_records
from gmask.tasks.task import Task
from gmask.training.loop import unsharded
from gmask.training.losses import Objective, count_items, examples_of


class Measurer:
    """A model, and all that its losses and predictions depend on. All processes measure together, each its share."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        data: TuningDataSettings,
        *,
        settings: Sampling,
        batch_size: int,
        accelerator: Accelerator,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            settings: how texts are written.
            batch_size: samples that are read together.
            dtype: what the forward pass computes in.
        """
        self.model, self.tokenizer, self.task, self.data = model, tokenizer, task, data
        self.settings, self.batch_size, self.accelerator, self.dtype = settings, batch_size, accelerator, dtype
        self.cuts: list[str] = []  # what was told of the samples that were predicted last

    def measure(self, samples: Sequence[Sample], *, known: Sequence[Sample] = ()) -> Evaluation:
        """As `evaluate`, with the loss among the scores; ``known``: the samples that were learnt from."""
        return evaluate(
            self.task,
            samples,
            predict=lambda asked: self.predict(self.task.kind, asked),
            loss=lambda answered: self.loss(self.task.kind, answered),
            known=known,
        )

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
        items = objective.encode(self._share(samples)).items
        total, count = 0.0, 0
        with self._computing():
            for indices in batches_by_length([examples_of(item)[0].length for item in items], self.batch_size):
                batch = objective.collate([items[index] for index in indices])
                found, _ = objective.loss(
                    self.model, {name: value.to(self.accelerator.device) for name, value in batch.items()}
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
        enabled = self.dtype == torch.bfloat16 and (mixes or self.accelerator.device.type != "cpu")
        try:
            with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled), unsharded(self.model):
                yield
        finally:
            self.model.train(was_training)

    def _share(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        return samples[self.accelerator.process_index :: self.accelerator.num_processes]

    def _collect(self, found: list[Any]) -> list[Any]:
        """The parts of all processes in the order that `_share` took them from; in every process."""
        if self.accelerator.num_processes == 1:
            return found
        parts: list[list[Any]] = gather_object([found])
        return [part[index] for index in range(len(parts[0])) for part in parts if index < len(part)]


GENERAL = Path(__file__).parents[1] / "tasks" / "general.jsonl"
"""Short texts, and simple questions with their answers, in English and Chinese; written for gmask."""


@dataclass(frozen=True, slots=True)
class GeneralSet:
    """Texts to be read on, and prompts with replies."""

    texts: Sequence[Sample]  # of the kind language-model
    prompts: Sequence[Sample]  # of the kind chat


@dataclass(frozen=True, slots=True)
class GeneralMeasure:
    """What a model makes of the general set. Losses are in nats per token; None where there is nothing of the kind."""

    text_loss: float | None
    reply_loss: float | None
    answers: Sequence[str]  # to the first prompts


@dataclass(frozen=True, slots=True)
class Forgetting:
    """The general set before and after tuning."""

    prompts: Sequence[str]
    before: GeneralMeasure
    after: GeneralMeasure

    def numbers(self) -> dict[str, float | None]:
        return {
            "text_loss_before": self.before.text_loss,
            "text_loss_after": self.after.text_loss,
            "reply_loss_before": self.before.reply_loss,
            "reply_loss_after": self.after.reply_loss,
        }

    def summary(self) -> str:
        """The losses, for a model card."""
        rows = [
            (name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
            for name, before, after in (
                ("general texts", self.before.text_loss, self.after.text_loss),
                ("replies to general prompts", self.before.reply_loss, self.after.reply_loss),
            )
            if before is not None and after is not None
        ]
        table = Rows(("nats per token", "before", "after", "change"), rows).to_markdown()
        return f"""## Forgetting

The loss on a fixed general set that the run was not trained on, before and after; a rise is what was forgotten.

{table}"""

    def to_markdown(self) -> str:
        rows = [
            tuple(map(_cell, answered))
            for answered in zip(self.prompts, self.before.answers, self.after.answers, strict=True)
        ]
        answers = Rows(("prompt", "before", "after"), rows, n_labels=3).to_markdown()
        return f"# What was forgotten\n\n{self.summary()}\n\n## Answers\n\n{answers}\n"


def read_general_set(settings: ForgettingSettings, place: Callable[[str], str]) -> GeneralSet:
    """The texts and prompts of the recipe, or those that come with gmask.

    place: makes a path of the recipe one of this machine.

    Raises:
        GmaskError: a file that cannot be read, or a line with neither "text" nor "prompt" and "response".
    """
    records = read_records(GENERAL if settings.texts is None else place(settings.texts))
    texts = [Sample(answers=(record.values["text"],)) for record in records if _holds(record, "text")]
    prompts = [
        Sample(text=record.values["prompt"], answers=(record.values["response"],))
        for record in records
        if _holds(record, "prompt", "response")
    ]
    if len(texts) + len(prompts) < len(records):
        bad = next(r for r in records if not (_holds(r, "text") or _holds(r, "prompt", "response")))
        raise GmaskError(f'{bad.location}: expected a "text", or a "prompt" and a "response"')
    return GeneralSet(texts, prompts)


def measure(general: GeneralSet, measurer: Measurer, *, answers: int) -> GeneralMeasure:
    """What a model makes of a general set; the first ``answers`` prompts are answered."""
    asked = general.prompts[:answers]
    return GeneralMeasure(
        text_loss=measurer.loss("language-model", general.texts) if general.texts else None,
        reply_loss=measurer.loss("chat", general.prompts) if general.prompts else None,
        answers=[prediction.texts[0] for prediction in measurer.predict("chat", asked)] if asked else [],
    )


def load_measure(path: Path) -> GeneralMeasure:
    values: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
    return GeneralMeasure(**values)


def _holds(record: Record, *columns: str) -> bool:
    return all(isinstance(record.values.get(column), str) and record.values[column].strip() for column in columns)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or "(nothing)"
