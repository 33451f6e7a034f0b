"""The reports of a run: a summary before it starts, the curves, a table of metrics, a model card."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gmask.files import written
from gmask.infilling.blanks import NOT_SCORED
from gmask.infilling.objectives import OBJECTIVES
from gmask.recipes.pretraining import base_name
from gmask.recipes.tuning import TuningRecipe
from gmask.tasks.metrics import Rows
from gmask.tasks.task import Task
from gmask.training.examples import DataFile, Example, TruncationCounts
from gmask.training.methods import TrainableTable
from gmask.training.validation import Forgetting

# Before a fine-tuning run starts

SUPERVISED_STYLE = "bold green"
LONGEST_SHOWN = 2000
"""Characters of a part of the sample; of a longer one the middle is left out."""


@dataclass(frozen=True, slots=True)
class StartSummary:
    """The summary of a fine-tuning run before it starts: its size, what trains, its first sample, what was cut."""

    recipe: TuningRecipe
    task: Task
    example: Example
    sop: int
    trainable: TrainableTable
    truncated: TruncationCounts
    samples: int
    dropped: int  # records that could not be used
    steps: int
    processes: int
    advice: Sequence[str]  # a line each

    def show(self, console: Console, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prints the summary. Supervised text is green on a terminal, and in ⟦ ⟧ elsewhere."""
        optimization = self.recipe.optimization
        shared = f" in {self.processes} processes" if self.processes > 1 else ""
        console.print(
            f"{self.task.name}: {self.task.kind}, {self.samples} samples, {self.steps} steps of "
            f"{optimization.batch_size * optimization.accumulation}{shared}, learning rate "
            f"{optimization.learning_rate:g}",
            highlight=False,
        )
        console.print(self.trainable.to_rows().to_rich(f"What trains ({self.recipe.method.name})"))
        console.print(self._render_sample(console, tokenizer), soft_wrap=True, highlight=False)
        for line in (*self._warnings(), *self.advice):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render_sample(self, console: Console, tokenizer: PreTrainedTokenizerBase) -> Text:
        mark = "green" if console.is_terminal else "⟦ ⟧"
        text = Text(f"The first sample as the model reads it; what the loss is of, in {mark}:\n")
        for piece, supervised in render_example(self.example, tokenizer, sop=self.sop):
            if supervised and not console.is_terminal:
                text.append(f"⟦{piece}⟧")
            else:
                text.append(piece, style=SUPERVISED_STYLE if supervised else "")
        if self.example.choice is not None:
            text.append(f" → {'class' if self.task.kind == 'classification' else 'candidate'} {self.example.choice}")
        return text

    def _warnings(self) -> Iterator[str]:
        """A line about samples that were cut, and one about records that were left out."""
        if self.truncated.sources or self.truncated.targets or self.truncated.rounds:
            yield (
                f"cut: {self.truncated}; questions lose tokens on the {self.recipe.data.truncation} (data.truncation); "
                f"raise data.max_source ({self.recipe.data.max_source}) or data.max_target "
                f"({self.recipe.data.max_target}) to keep them whole"
            )
        if self.dropped:
            yield f"{self.dropped} records could not be used and are left out"


def render_example(example: Example, tokenizer: PreTrainedTokenizerBase, *, sop: int) -> list[tuple[str, bool]]:
    """The parts of an example as a model reads and predicts them, each with whether it is supervised.

    sop: the id that begins an answer. It is followed by what it predicts, whether the labels are shifted or not.
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
    """The text of ids, with the names of control tokens. Trained vectors, beyond the vocabulary, are shown as ▢."""

    def name(token: int) -> str | None:
        if token >= len(tokenizer):
            return "▢"
        return None if tokenizer.decode([token]) else str(tokenizer.convert_ids_to_tokens(token))

    parts = [(found, list(group)) for found, group in groupby(ids, key=name)]
    text = "".join(tokenizer.decode(part) if found is None else found * len(part) for found, part in parts)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]} … {text[-LONGEST_SHOWN // 2 :]}"


# The curves

CURVES_FILE = "curves.png"

LOSSES = ("loss", *OBJECTIVES)
"""Names of validation losses, in nats; all other validation values are metrics, in per cent."""


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws the losses, the metrics of a task if there are any, and the learning rate with the gradient norm.

    The x axis is the number of tokens seen where that is counted, else the steps. A validation on several sources is
    drawn as their mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axis = "tokens" if records and "tokens" in records[0] else "step"
    scale = 1e6 if axis == "tokens" else 1
    validated = [
        (record[axis] / scale, list(record["validation"].values())) for record in records if "validation" in record
    ]
    names = sorted({name for _, sources in validated for found in sources for name in found})
    has_metrics = any(name not in LOSSES for name in names)
    ratios = [3, 2, 1] if has_metrics else [3, 1]
    figure, panels = plt.subplots(
        len(ratios), 1, figsize=(9, 2.4 * len(ratios) + 2), sharex=True, height_ratios=ratios, layout="constrained"
    )
    positions = [record[axis] / scale for record in records]
    panels[0].plot(positions, [record["loss"] for record in records], color="0.7", linewidth=1, label="training")
    for name in names:
        means = [sum(found[name] for found in sources) / len(sources) for _, sources in validated]
        panel = panels[0] if name in LOSSES else panels[1]
        label = "validation" if name == "loss" else f"validation, {name}"
        panel.plot([position for position, _ in validated], means, marker="o", markersize=3, label=label)
    panels[0].set_ylabel("loss (nats per labelled token)" if axis == "tokens" else "loss (nats)")
    if has_metrics:
        panels[1].set_ylabel("validation, %")
    for panel in panels[:-1]:
        panel.grid(alpha=0.3)
        panel.legend()
    _draw_rates(panels[-1], positions, records)
    panels[-1].set_xlabel("tokens seen (millions)" if axis == "tokens" else "steps")
    with written(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
    plt.close(figure)
    return path


def _draw_rates(panel: Any, positions: Sequence[float], records: Sequence[Mapping[str, Any]]) -> None:
    panel.plot(positions, [record["learning_rate"] for record in records], color="tab:blue")
    panel.set_ylabel("learning rate", color="tab:blue")
    norms = panel.twinx()
    norms.plot(positions, [record["gradient_norm"] for record in records], color="tab:orange", alpha=0.6, linewidth=1)
    norms.set_ylabel("gradient norm", color="tab:orange")


# After a fine-tuning run


@dataclass(frozen=True, slots=True)
class TuningResults:
    """The numbers of a finished fine-tuning run, for results.json and the model card."""

    recipe: TuningRecipe
    task: Task
    files: Sequence[DataFile]
    trainable_parameters: int
    parameters: int
    records: Sequence[Mapping[str, Any]]  # metrics.jsonl
    metrics: Mapping[str, Mapping[str, float]]  # by split; in per cent, the loss in nats
    majority: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    best_step: int | None = None
    stopped_early: bool = False
    truncated: Mapping[str, int] = field(default_factory=dict)
    evaluation_seconds: float = 0.0  # of validations, and of the scores before the first and after the last step
    peak_memory_bytes: int = 0
    forgetting: Forgetting | None = None

    def advise_evaluations(self, between_steps: float) -> str | None:
        """How evaluations are made fewer or shorter, where those between the steps took longer than the steps.

        between_steps: their seconds.
        """
        steps = self.records[-1]["seconds"]
        if between_steps <= max(steps, 1.0):
            return None
        return (
            f"evaluations between the steps took {between_steps:,.0f} s, the steps {steps:,.0f} s: a higher "
            "optimization.evaluate_every or a lower data.validation_limit saves time"
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for results.json."""
        last = self.records[-1]
        return {
            "task": self.task.name,
            "method": self.recipe.method.name,
            "seed": self.recipe.run.seed,
            "trainable_parameters": self.trainable_parameters,
            "parameters": self.parameters,
            "steps": last["step"],
            "epochs": last["epoch"],
            "best_step": self.best_step,
            "stopped_early": self.stopped_early,
            "train_loss": last["loss"],
            "supervised_tokens": last["all_supervised_tokens"],
            "truncated": dict(self.truncated),
            "seconds": last["seconds"],
            "evaluation_seconds": self.evaluation_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "metrics": {split: dict(found) for split, found in self.metrics.items()},
            "majority": {split: dict(found) for split, found in self.majority.items()},
            "forgetting": None if self.forgetting is None else self.forgetting.numbers(),
            "data": [{"split": f.split, "file": f.name, "samples": f.samples, "sha256": f.sha256} for f in self.files],
        }


def metric_rows(results: TuningResults) -> Rows:
    """A table of every metric on every split, beside the majority baseline where there is one."""
    rows = []
    for split, metrics in results.metrics.items():
        baseline = results.majority.get(split, {})
        rows += [
            (split, name, format_metric(name, value), format_metric(name, baseline[name]) if name in baseline else "-")
            for name, value in metrics.items()
        ]
    return Rows(("split", "metric", "this model", "majority"), rows, n_labels=2)


def format_metric(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "loss" else f"{value:.2f}"


def render_tuning_card(results: TuningResults) -> str:
    """The model card in markdown, with the front matter of model hubs."""
    sections = (
        _front_matter(results),
        _introduction(results),
        _usage(results),
        f"## Metrics\n\nIn per cent; the loss in nats.\n\n{metric_rows(results).to_markdown()}",
        _training(results),
        _data(results),
        _licence(results),
        f"{results.forgetting.summary()}\n\nThe answers: `forgetting.md` of the run." if results.forgetting else "",
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(results: TuningResults) -> str:
    matter = {
        "base_model": base_name(results.recipe.model.name),
        "library_name": "gmask",
        "tags": ["glm", results.task.kind, results.recipe.method.name],
    }
    return "---\n" + yaml.safe_dump(matter, allow_unicode=True, sort_keys=False) + "---"


def _introduction(results: TuningResults) -> str:
    base, method = base_name(results.recipe.model.name), results.recipe.method.name
    share = 100 * results.trainable_parameters / results.parameters
    begun = " with random weights" if results.recipe.model.initialization == "random" else ""
    return f"""# {results.task.name}: {base} tuned with {method}

`{base}`{begun}, tuned by gmask on the task `{results.task.name}` ({results.task.kind}).
{results.trainable_parameters:,} of {results.parameters:,} parameters were trained ({share:.2f} %)."""


def _usage(results: TuningResults) -> str:
    base = base_name(results.recipe.model.name)
    if results.recipe.method.makes_adapter:
        return f"""## Use

```python
import gmask

model, tokenizer = gmask.load({base!r}, adapter="this folder")
```"""
    return """## Use

```python
import gmask

model, tokenizer = gmask.load("this folder")
```"""


def _training(results: TuningResults) -> str:
    optimization, last = results.recipe.optimization, results.records[-1]
    ended = " (stopped early)" if results.stopped_early else ""
    facts = [
        ("steps", f"{last['step']:,}{ended}, {last['epoch']:.2f} epochs"),
        ("samples of a step", f"{optimization.batch_size * optimization.accumulation}"),
        ("supervised tokens", f"{last['all_supervised_tokens']:,}"),
        ("peak learning rate", f"{optimization.learning_rate:g}, {optimization.schedule}"),
        ("seed", f"{results.recipe.run.seed}"),
        ("last training loss", f"{last['loss']:.4f} nats"),
        ("time of the steps", f"{last['seconds']:,.0f} s"),
        ("time of the evaluations", f"{results.evaluation_seconds:,.0f} s"),
        ("peak memory", f"{results.peak_memory_bytes / 1e9:.2f} GB"),
    ]
    if results.best_step is not None:
        facts.insert(1, ("best checkpoint", f"step {results.best_step:,}, by {results.task.best} on validation"))
    facts += [(f"{kind} samples", f"{count:,}") for kind, count in results.truncated.items() if count]
    return f"""## Training

{Rows(("", ""), facts, 2).to_markdown()}

![Losses, metrics, learning rate and gradient norm over the steps](curves.png)

The whole recipe:

```yaml
{results.recipe.portable().to_yaml().rstrip()}
```"""


def _data(results: TuningResults) -> str:
    rows = [(file.split, file.name, f"`{file.sha256}`", f"{file.samples:,}") for file in results.files]
    source = f"\n\nThe task: {results.task.source}" if results.task.source else ""
    return f"## Data\n\n{Rows(('split', 'file', 'SHA-256', 'samples'), rows, 3).to_markdown()}{source}"


def _licence(results: TuningResults) -> str:
    base = base_name(results.recipe.model.name)
    return f"""## Licence

These weights derive from `{base}` and from the data named above. The licence of `{base}` holds for them, and what the
licences of the data ask for; neither was checked here."""
