"""What does a chat model forget while it is tuned? Losses and answers on a fixed general set, before and after."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmask.errors import GmaskError
from gmask.tasks.recipes.tuning import ForgettingSettings
from gmask.tasks.records import Record, read_records
from gmask.tasks.samples import Sample
from gmask.tasks.tables import Rows
from gmask.training.tuning.validation import Measurer

GENERAL = Path(__file__).parents[2] / "tasks" / "general.jsonl"
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
        raise GmaskError(f'{bad.place}: expected a "text", or a "prompt" and a "response"')
    return GeneralSet(texts, prompts)


def measure(general: GeneralSet, measurer: Measurer, *, answers: int) -> GeneralMeasure:
    """What a model makes of a general set; the first ``answers`` prompts are answered."""
    asked = general.prompts[:answers]
    return GeneralMeasure(
        text_loss=measurer.loss("language-model", general.texts) if general.texts else None,
        reply_loss=measurer.loss("chat", general.prompts) if general.prompts else None,
        answers=[prediction.texts[0] for prediction in measurer.predict("chat", asked)] if asked else [],
    )


def save_measure(found: GeneralMeasure, path: Path) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(asdict(found), ensure_ascii=False), "utf-8")
    draft.replace(path)


def load_measure(path: Path) -> GeneralMeasure:
    values: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
    return GeneralMeasure(**values)


def _holds(record: Record, *columns: str) -> bool:
    return all(isinstance(record.values.get(column), str) and record.values[column].strip() for column in columns)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or "(nothing)"
