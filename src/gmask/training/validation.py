"""Validation while a model trains: its task's metrics, one-word blanks in held-out sentences, and what it forgets.

Fine-tuning uses a `Validator`, and a `GeneralSet` for chat models. Pretraining fills the blanks of a `BlankSet`; its
losses on held-out texts are in `gmask.training.pretrain`.
"""

import contextlib
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.evaluation.harness import Evaluation, evaluate
from gmask.generation.padding import batches_by_length
from gmask.generation.predict import predict
from gmask.generation.settings import Sampling
from gmask.infilling.blanks import NOT_SCORED, BlankTokens, InfillingExample, blank_out
from gmask.infilling.collator import collate
from gmask.models.glm import GLMForConditionalGeneration
from gmask.recipes.tuning import ForgettingSettings, TuningDataSettings
from gmask.tasks.heldout import HELD_OUT_LANGUAGES, HeldOutBlank, draw_sentences, hide_span
from gmask.tasks.metrics import Rows, as_cell
from gmask.tasks.records import Prediction, Record, Sample, Source, TaskKind, find_files, read_records, read_texts
from gmask.tasks.task import Task
from gmask.training.losses import TaskObjective, count_items
from gmask.training.parallel import unsharded
from gmask.training.run_folder import read_fields

EVALUATION_SHARE = 0.25
"""The part of the work of training that the evaluations of a run are worth, where the recipe does not say."""

FEWEST = 16
"""Samples of a validation that says anything."""

COSTS = {"seq2seq": 8, "infill": 8, "chat": 8}
"""What a sample costs in a validation, in samples of training, by the kind of task: 1 if no text is written."""


def plan_evaluations(
    every: int | None, limit: int | None, *, samples: int, steps: int, samples_per_step: int, cost: float
) -> tuple[int, int]:
    """The steps between two validations and the samples of each, for the values of a recipe, or None where it has none.

    Without either, it is a tenth of the steps, and as many samples as cost `EVALUATION_SHARE` of them, but at least
    `FEWEST`; those are scored more seldom in a run that is so short that they would cost more.

    Args:
        samples: of the whole validation.
        cost: of a sample, in samples of training.
    """
    if every is not None:
        return every, samples if limit is None else min(limit, samples)
    tenth = max(1, steps // 10)
    room = EVALUATION_SHARE * samples_per_step / cost  # samples for each step between two validations
    scored = min(samples, max(FEWEST, int(room * tenth)) if limit is None else limit)
    return min(steps, max(tenth, math.ceil(scored / room))), scored


# A task


class Validator:
    """Computes losses, predictions and metrics of a model on a task. All processes call it together, each its share."""

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
            dtype: of the forward pass.
        """
        self.model, self.tokenizer, self.task, self.data = model, tokenizer, task, data
        self.settings, self.batch_size, self.accelerator, self.dtype = settings, batch_size, accelerator, dtype
        self.cuts: list[str] = []  # warnings about the samples that were predicted last

    def validate(self, samples: Sequence[Sample], *, known: Sequence[Sample] = ()) -> Evaluation:
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
        with self._inference(), warnings.catch_warnings(record=True) as caught:
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
        self.cuts = [str(warning.message) for warning in caught if warning.category is UserWarning]
        return self._gather(found)

    @torch.no_grad()
    def loss(self, kind: TaskKind, samples: Sequence[Sample]) -> float:
        """The mean loss in nats: over the labelled tokens, or over the samples of a task that chooses."""
        objective = TaskObjective(self.tokenizer, self.model.config, kind, self.data)
        encoded = objective.encode(self._share(samples))
        total, count = 0.0, 0
        with self._inference():
            for indices in batches_by_length(encoded.lengths, self.batch_size):
                batch = objective.collate([encoded.items[index] for index in indices])
                found, _ = objective.loss(
                    self.model, {name: value.to(self.accelerator.device) for name, value in batch.items()}
                )
                total, count = total + float(found), count + count_items(batch)
        sums = self._gather([(total, count)])
        mean: float = sum(one for one, _ in sums) / sum(many for _, many in sums)
        return mean

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Turns dropout off, and computes in the precision of training; a CPU stays exact unless dtypes are mixed."""
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

    def _gather(self, found: list[Any]) -> list[Any]:
        """The results of all processes, in every process, in the order of the samples before `_share`."""
        if self.accelerator.num_processes == 1:
            return found
        parts: list[list[Any]] = gather_object([found])
        return [part[index] for index in range(len(parts[0])) for part in parts if index < len(part)]


# Blanks in held-out sentences

BLANKS_PER_PASS = 64


@dataclass(frozen=True, slots=True)
class BlankSet:
    """The blanks that a run is validated on, always the same. A group is a language, or a language and a kind of text.

    Whether a model fills them is measured by the first token of each answer.
    """

    examples: Sequence[InfillingExample]
    groups: Mapping[str, Sequence[int]]  # indices of the examples


def choose_blanks(
    sources: Sequence[Source], tokenizer: Tokenizer, special: BlankTokens, *, sentences: int, longest: int
) -> BlankSet:
    """One blank of one word or character in each of `sentences` held-out sentences of each language.

    A language of which the held-out texts have no usable sentence is left out. longest: tokens of a sentence.
    """
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.encode_special_tokens = True  # a literal "[MASK]" in a text is no blank
    texts = {s.name: list(read_texts(find_files(s.validation))) for s in sources if s.validation}
    weights = {source.name: source.weight or 1.0 for source in sources}
    kinds = {source.name: source.kind for source in sources}
    examples: list[InfillingExample] = []
    groups = defaultdict[str, list[int]](list)
    for number, language in enumerate(HELD_OUT_LANGUAGES):
        rng = np.random.default_rng([number])
        try:
            chosen = draw_sentences(texts, weights, language, sentences, rng=rng)
        except GmaskError:
            continue
        size = next(iter(language.spans.values()))
        for source, sentence in chosen:
            blank = hide_span(sentence, language, size, source=source, rng=rng)
            example = encode_blank(blank, encoder, special)
            if len(example.input_ids) > longest:
                continue
            groups[language.name].append(len(examples))
            if kinds[source] is not None:
                groups[f"{language.name}, {kinds[source]}"].append(len(examples))
            examples.append(example)
    return BlankSet(examples, dict(groups))


def encode_blank(blank: HeldOutBlank, encoder: Tokenizer, special: BlankTokens) -> InfillingExample:
    """The blank as an example in which only the first token of the answer is scored.

    The texts before and after the blank are tokenised apart, as they are when a user hides the answer. The spaces
    before the blank belong to the answer, as `[MASK]` takes them.
    """
    left = blank.left.rstrip(" ")
    answer = re.match(" *", blank.left[len(left) :])[0] + blank.answer  # type: ignore[index]  # it always matches
    parts = [encoder.encode(text, add_special_tokens=False).ids for text in (left, answer, blank.right)]
    tokens = np.array([special.cls, *parts[0], *parts[1], *parts[2], special.eos], np.int64)
    start = 1 + len(parts[0])
    spans = np.array([[start, start + len(parts[1])]], np.int64)
    example = blank_out(tokens, spans, mask=special.mask, special=special, objective="token")
    example.labels[example.context_length + 1 :] = NOT_SCORED
    return example


@torch.no_grad()
def score_blanks(model: GLMForConditionalGeneration, blanks: BlankSet, *, pad_id: int) -> dict[str, dict[str, float]]:
    """For each group: the share of blanks whose first token is the most probable one, its mean loss in nats, the count.

    The model is to be in evaluation mode, under the caller's autocast.
    """
    if not blanks.examples:
        return {}
    right, nats = torch.empty(len(blanks.examples)), torch.empty(len(blanks.examples))
    for indices in batches_by_length([len(example.input_ids) for example in blanks.examples], BLANKS_PER_PASS):
        batch = collate([[blanks.examples[index]] for index in indices], row_length=None, pad_id=pad_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        states = model.glm(**batch, use_cache=False).last_hidden_state
        scored = labels != NOT_SCORED  # one position of each row
        logits = model.lm_head(states[scored]).float()
        nats[indices] = F.cross_entropy(logits, labels[scored], reduction="none").cpu()
        right[indices] = (logits.argmax(-1) == labels[scored]).float().cpu()
    return {
        group: {"top1": float(right[index].mean()), "nats": float(nats[index].mean()), "blanks": len(index)}
        for group, index in ((name, list(indices)) for name, indices in blanks.groups.items())
    }


# What a chat model forgets

GENERAL = Path(__file__).parents[1] / "tasks" / "general.jsonl"
"""Short texts, and simple questions with their answers, in English and Chinese; written for gmask."""


@dataclass(frozen=True, slots=True)
class GeneralSet:
    """Texts to be read, and prompts with replies, which a run was not trained on."""

    texts: Sequence[Sample]  # of the kind language-model
    prompts: Sequence[Sample]  # of the kind chat


@dataclass(frozen=True, slots=True)
class GeneralScores:
    """The losses and answers of a model on a general set, in nats per token; None where it has nothing of the kind."""

    text_loss: float | None
    reply_loss: float | None
    answers: list[str]  # to the first prompts


@dataclass(frozen=True, slots=True)
class Forgetting:
    """The scores on the general set before and after tuning."""

    prompts: Sequence[str]
    before: GeneralScores
    after: GeneralScores

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
            tuple(map(as_cell, answered))
            for answered in zip(self.prompts, self.before.answers, self.after.answers, strict=True)
        ]
        answers = Rows(("prompt", "before", "after"), rows, n_labels=3).to_markdown()
        return f"# What was forgotten\n\n{self.summary()}\n\n## Answers\n\n{answers}\n"


def read_general_set(settings: ForgettingSettings, resolve: Callable[[str], str]) -> GeneralSet:
    """The texts and prompts of the recipe, or those that come with gmask.

    resolve: makes a path of the recipe one of this machine.

    Raises:
        GmaskError: a file that cannot be read, or a line with neither "text" nor "prompt" and "response".
    """
    records = read_records(GENERAL if settings.texts is None else resolve(settings.texts))
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


def score_general_set(general: GeneralSet, validator: Validator, *, answers: int) -> GeneralScores:
    """The scores of a model on a general set; it answers the first ``answers`` prompts."""
    asked = general.prompts[:answers]
    return GeneralScores(
        text_loss=validator.loss("language-model", general.texts) if general.texts else None,
        reply_loss=validator.loss("chat", general.prompts) if general.prompts else None,
        answers=[prediction.texts[0] for prediction in validator.predict("chat", asked)] if asked else [],
    )


def read_general_scores(path: Path) -> GeneralScores:
    """The scores that an earlier start of a run wrote. Raises `GmaskError` for a damaged file."""
    return read_fields(GeneralScores, path)


def _holds(record: Record, *columns: str) -> bool:
    return all(isinstance(record.values.get(column), str) and record.values[column].strip() for column in columns)
