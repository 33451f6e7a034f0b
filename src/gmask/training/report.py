"""What a fine-tuning run leaves to look at: a table of metrics, a picture of the curves, a model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from gmask.recipes.tuning import TuningRecipe, base_name
from gmask.tasks.metrics import Rows
from gmask.tasks.task import Task
from gmask.training.examples import DataFile
from gmask.training.measure import Forgetting


@dataclass(frozen=True, slots=True)
class TuningResults:
    """All that the report of a run is made from."""

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
    peak_memory_bytes: int = 0
    forgetting: Forgetting | None = None

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
            "peak_memory_bytes": self.peak_memory_bytes,
            "metrics": {split: dict(found) for split, found in self.metrics.items()},
            "majority": {split: dict(found) for split, found in self.majority.items()},
            "forgetting": None if self.forgetting is None else self.forgetting.numbers(),
            "data": [{"split": f.split, "file": f.name, "samples": f.samples, "sha256": f.sha256} for f in self.files],
        }


def metric_rows(results: TuningResults) -> Rows:
    """Every metric on every split, beside the majority baseline where there is one."""
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
        ("time", f"{last['seconds']:,.0f} s"),
        ("peak memory", f"{results.peak_memory_bytes / 1e9:.2f} GB"),
    ]
    if results.best_step is not None:
        facts.insert(1, ("best checkpoint", f"step {results.best_step:,}, by {results.task.best} on validation"))
    facts += [(f"{what} samples", f"{count:,}") for what, count in results.truncated.items() if count]
    return f"""## Training

{Rows(("", ""), facts, 2).to_markdown()}

![Losses, metrics, learning rate and gradient norm over the steps](curves.png)

The whole recipe:

```yaml
{results.recipe.without_places().to_yaml().rstrip()}
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
