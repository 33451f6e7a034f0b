"""The report of a run that learns from its own answers: curves, answers before and after, card, results.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gmask.evaluation.comparison import AnswerFigures, warn_of_change
from gmask.files import written
from gmask.recipes.pretraining import base_name
from gmask.tasks.metrics import Rows, as_cell

ROLLOUT_NUMBERS = (
    "reward", "kl", "kl_k3", "entropy", "length", "repetition", "truncated", "without_text", "groups_without_spread",
)  # fmt: skip
"""The numbers of a rollout that results.json and the card show."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers of a model to the validation prompts."""

    texts: list[str]
    lengths: list[int]  # tokens
    rewards: list[float]

    @property
    def reward(self) -> float:
        """The mean reward."""
        return sum(self.rewards) / max(1, len(self.rewards))

    @property
    def length(self) -> float:
        """The mean length in tokens."""
        return sum(self.lengths) / max(1, len(self.lengths))


@dataclass(frozen=True, slots=True)
class RolloutResults:
    """The numbers of a finished run."""

    algorithm: str  # PPO, GRPO or RLOO
    recipe: Any  # of `gmask ppo` or `gmask grpo`
    task: str
    records: Sequence[Mapping[str, Any]]  # metrics.jsonl
    before: Answered | None
    after: Answered | None
    trainable_parameters: int
    parameters: int
    peak_memory_bytes: int

    @property
    def last(self) -> Mapping[str, Any]:
        return self.records[-1]

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for results.json."""
        before, after = (
            None if one is None else {"reward": one.reward, "length": one.length} for one in (self.before, self.after)
        )
        return {
            "task": self.task,
            "method": self.recipe.method.name,
            "seed": self.recipe.run.seed,
            "trainable_parameters": self.trainable_parameters,
            "parameters": self.parameters,
            "steps": self.last["step"],
            "rollouts": self.last["rollout"],
            "answers": self.last["rollout"] * self.recipe.answers,
            "seconds": self.last["seconds"],
            "peak_memory_bytes": self.peak_memory_bytes,
            "first_rollout": numbers_of(self.records[0]),
            "last_rollout": numbers_of(self.last),
            "validation": {"before": before, "after": after},
        }

    def summary(self) -> list[str]:
        """The outcome in a few lines, with warnings."""
        first, last = self.records[0], self.last
        lines = [f"sampled answers: reward {first['reward']:.3f} at first, {last['reward']:.3f} at last"]
        divergence = last.get("kl", last.get("kl_k3"))
        if divergence is not None:
            lines[0] += f", {divergence:.2f} nats an answer from the reference"
        if self.before is not None and self.after is not None:
            lines.append(f"greedy answers: reward {self.before.reward:.3f} before, {self.after.reward:.3f} after")
        without = [100 * record["groups_without_spread"] for record in (first, last)]
        spread = f"{without[0]:.0f} % at first, {without[1]:.0f} % at last"
        lines.append(f"prompts whose answers all had the same reward: {spread}")
        lines += [f"warning: {line}" for line in warn_of_change(*map(figures_of, (first, last)))]
        if without[1] > 90:
            lines.append("warning: of most prompts all answers had the same reward, which teaches little")
        if last["without_text"] > 0.05:
            lines.append(f"warning: {100 * last['without_text']:.0f} % of the answers had no text")
        return lines


def numbers_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the rollout that a record of the log is of."""
    return {name: record[name] for name in ROLLOUT_NUMBERS if name in record}


def figures_of(record: Mapping[str, Any]) -> AnswerFigures:
    """The same, as far as warnings need them. A log of an earlier version has no repetition."""
    return AnswerFigures(record["reward"], record["length"], record.get("repetition", 0.0), record["entropy"])


PANELS: Sequence[tuple[str, Sequence[str]]] = (
    ("reward", ("reward",)),
    ("nats an answer from the reference", ("kl", "kl_k3")),
    ("entropy (nats a token)", ("entropy",)),
    ("length (tokens)", ("length",)),
    ("shares", ("truncated", "groups_without_spread", "repetition", "clip_fraction")),
    ("value loss", ("value_loss",)),
)


def draw_reward_curves(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws what a run logged, over its steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(3, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for panel, (label, names) in zip(panels.flat, PANELS, strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                panel.plot(*zip(*points, strict=True), linewidth=1, label=name)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    validated = [(record["step"], record["validation"]["validation"]["reward"]) for record in records
                 if "validation" in record]  # fmt: skip
    if validated:
        panels[0, 0].plot(*zip(*validated, strict=True), marker="o", markersize=3, label="greedy, validation")
    for panel in panels.flat:
        if panel.lines:
            panel.legend()
    for panel in panels[-1]:
        panel.set_xlabel("steps")
    with written(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
    plt.close(figure)
    return path


MOST_SHOWN = 40
"""Prompts in samples.md."""


def render_samples(prompts: Sequence[str], before: Answered, after: Answered) -> str:
    """A page of greedy answers before and after, those whose reward changed first."""
    order = sorted(range(len(prompts)), key=lambda index: before.rewards[index] == after.rewards[index])[:MOST_SHOWN]
    rows = [
        (
            as_cell(prompts[index]),
            as_cell(before.texts[index]),
            f"{before.rewards[index]:.2f}",
            as_cell(after.texts[index]),
            f"{after.rewards[index]:.2f}",
        )
        for index in order
    ]
    table = Rows(("prompt", "before", "reward", "after", "reward"), rows, n_labels=5).to_markdown()
    return f"# Greedy answers before and after\n\n{table}\n"


def render_rollout_card(results: RolloutResults) -> str:
    """The model card in markdown, with the front matter of model hubs."""
    recipe, base = results.recipe, base_name(results.recipe.model.name)
    matter = {
        "base_model": base,
        "library_name": "gmask",
        "tags": ["glm", results.algorithm.lower(), recipe.method.name],
    }
    facts = [(name, f"{value}") for name, value in results.to_dict().items() if not isinstance(value, dict)]
    names = [name for name in ROLLOUT_NUMBERS if name in results.last]
    rollouts = [(name, *(f"{record[name]:.4g}" for record in (results.records[0], results.last))) for name in names]
    outcome = "\n".join(f"- {line}" for line in results.summary())
    folder = f"{base!r}, adapter='this folder'" if recipe.method.makes_adapter else "'this folder'"
    return f"""---
{yaml.safe_dump(matter, allow_unicode=True, sort_keys=False)}---

# {results.task}: {base} trained with {results.algorithm} ({recipe.method.name})

```python
import gmask

model, tokenizer = gmask.load({folder})
```

{outcome}

{Rows(("sampled answers", "first rollout", "last rollout"), rollouts).to_markdown()}

{Rows(("", ""), facts, 2).to_markdown()}

![Reward, divergence, entropy, length, shares and value loss over the steps](curves.png)

```yaml
{recipe.portable().to_yaml().rstrip()}
```
"""
