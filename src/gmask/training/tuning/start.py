"""What does a run show before it starts? A sample with its loss mask, what trains, what was cut, memory, advice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gmask.infilling.blanks import NOT_SCORED
from gmask.tasks.recipes.tuning import TuningRecipe
from gmask.tasks.task import Task
from gmask.training.tuning.examples import Example, Truncated
from gmask.training.tuning.methods import TrainableTable

SUPERVISED_STYLE = "bold green"
SHOWN = 2000
"""Characters of a part of the sample; more are left out of its middle."""


@dataclass(frozen=True, slots=True)
class Start:
    """All that is shown."""

    recipe: TuningRecipe
    task: Task
    example: Example
    sop: int
    trainable: TrainableTable
    truncated: Truncated
    samples: int
    dropped: int  # records that could not be used
    steps: int
    processes: int
    advice: Sequence[str]  # a line each

    def show(self, console: Console, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prints it, in colours on a terminal; elsewhere what is supervised stands in ⟦ ⟧."""
        optimization = self.recipe.optimization
        shared = f" in {self.processes} processes" if self.processes > 1 else ""
        console.print(
            f"{self.task.name}: {self.task.kind}, {self.samples} samples, {self.steps} steps of "
            f"{optimization.batch_size * optimization.accumulation}{shared}, learning rate "
            f"{optimization.learning_rate:g}",
            highlight=False,
        )
        console.print(self.trainable.to_rows().to_rich(f"What trains ({self.recipe.method.name})"))
        console.print(self._render(console, tokenizer), soft_wrap=True, highlight=False)
        for line in (*self._counts(), *self.advice):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render(self, console: Console, tokenizer: PreTrainedTokenizerBase) -> Text:
        told = "green" if console.is_terminal else "⟦ ⟧"
        text = Text(f"The first sample as the model reads it; what the loss is of, in {told}:\n")
        for piece, supervised in render_example(self.example, tokenizer, sop=self.sop):
            if supervised and not console.is_terminal:
                text.append(f"⟦{piece}⟧")
            else:
                text.append(piece, style=SUPERVISED_STYLE if supervised else "")
        if self.example.choice is not None:
            text.append(f" → {'class' if self.task.kind == 'classification' else 'candidate'} {self.example.choice}")
        return text

    def _counts(self) -> Iterator[str]:
        if self.truncated.sources or self.truncated.targets or self.truncated.rounds:
            yield (
                f"cut: {self.truncated}; questions lose tokens on the {self.recipe.data.truncation} (data.truncation); "
                f"raise data.max_source ({self.recipe.data.max_source}) or data.max_target "
                f"({self.recipe.data.max_target}) to keep them whole"
            )
        if self.dropped:
            yield f"{self.dropped} records could not be used and are left out"


def render_example(example: Example, tokenizer: PreTrainedTokenizerBase, *, sop: int) -> list[tuple[str, bool]]:
    """The parts of an example as a model reads and predicts them, and of each whether it is supervised.

    sop: the id that begins an answer. What it predicts stands behind it, whether the labels are shifted or not.
    """
    tokens = list[tuple[int, bool]]()
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        if label == NOT_SCORED and tokens and tokens[-1] == (token, True):
            continue  # the last token of a candidate: it was shown as a label already
        if label == NOT_SCORED or token == sop:
            tokens.append((token, False))
        if label != NOT_SCORED:
            tokens.append((label, True))
    parts = groupby(tokens, key=lambda one: one[1])
    return [(_decode([token for token, _ in part], tokenizer), supervised) for supervised, part in parts]


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of ids, with the names of control tokens; trained vectors, whose ids are none of its, are shown as ▢."""

    def name(token: int) -> str | None:
        if token >= len(tokenizer):
            return "▢"
        return None if tokenizer.decode([token]) else str(tokenizer.convert_ids_to_tokens(token))

    parts = [(found, list(group)) for found, group in groupby(ids, key=name)]
    text = "".join(tokenizer.decode(part) if found is None else found * len(part) for found, part in parts)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
