"""Measures the bundled model, and a random model of its shape, on the small sets, and writes the page of results.

    OMP_NUM_THREADS=1 python recipes/evaluation_page.py --data CORPUS --out results
        [--model bundled] [--page docs/explanation/evaluation-results.md]
        [--tuned runs/superglue/superglue.md [runs/superglue-random/superglue.md]]

CORPUS is a folder above the files that the suite ``offline`` names. A run that was stopped goes on in the folder of
results; with other weights the predictions are made anew. The two models take about seven minutes of one core.
``--tuned`` names the table of recipes/superglue.py, and that of the random model (``results/random-model``).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from gmask.checkpoints.load import load
from gmask.config import plain_values
from gmask.errors import GmaskError
from gmask.evaluation.harness import run_tasks
from gmask.evaluation.pages import format_interval
from gmask.evaluation.results import EvaluationReport, TaskResult, TaskScore
from gmask.evaluation.suite import SuiteEntry, load_suite
from gmask.files import write_text
from gmask.tasks.metrics import NOT_PER_CENT, Rows
from gmask.tasks.sources import find_pattern
from gmask.tasks.task import load_task

SUITE = "offline"
PAGE = "docs/explanation/evaluation-results.md"
LIMITS = {"clue/cmrc2019": 10, "clue/cmrc": 15, "seq2seq/adgen": 40}
"""Records of the tasks that take long. The other sets are read whole: some are sorted by their labels."""

LABEL_F1 = ("f1", "macro-f1", "multirc-f1a")
"""Metrics that some answer that needs no model may raise above that of the majority."""

CHARACTERS = 60_000
"""Of WikiText-2, which is one document and so has no records to limit."""

INTRODUCTION = """# Results of the bundled model

What `gmask evaluate` finds on the small sets of the suite `offline`, with the bundled model and with random weights in
its shape. Each task is asked zero-shot, by its cloze pattern or blank; nothing was tuned but for [SuperGLUE's second
table](#superglue-tuned). Both models read the same samples. [How a model is measured](evaluation.md) says what each
number means.

{summary}

This page is written by one command, which is run again when the bundled model is replaced:

```bash
OMP_NUM_THREADS=1 python recipes/evaluation_page.py --data CORPUS --out results
```"""

LEGEND = """In per cent but for {plain}, of which less is better. Behind each score is its
95 % interval, from bootstrap resamples of the samples; a single document has none. *Majority* always gives the most
frequent label of these samples; *guessing* is the accuracy of a random choice. **Bold**: the interval lies above both
or, where there is neither, on the better side of the random model's; F1 of labels is bold only where accuracy is, as
always giving the rarer label can have a higher F1 than the majority. Among as many scores as these, one or two are
bold by luck. An interval says how far a number moves with other samples of the same kind, not with another pattern."""

TUNED = """## SuperGLUE, tuned

The eight tasks by one command, which tunes the model on each by a cloze question (all weights, four epochs;
MultiRC one) and measures what was not tuned on:

```bash
OMP_NUM_THREADS=1 python recipes/superglue.py --data CORPUS --out runs/superglue
```

{tables}

Of 32 samples each quarter is measured by a model that was tuned on the three others. *Tuned* is the mean of the four,
± their standard deviation. A quarter has eight samples (MultiRC: the answers about eight passages), so one answer moves
it by 12.5 points, and none of these differences is more than a hint. All 32 samples of WSC have the label true, so any
tuned model is right. The published scores come from models of up to a thousand times this size, which were tuned on
thousands of samples."""

CAVEATS = """## What these numbers are not

- Not the scores of leaderboards: the sets are samples of test, development or training files, 32 records of each task
  of SuperGLUE. Of those that take long only the first records are read: {limits}.
- Not of balanced sets: where *majority* is high, the records that are here have few labels.
- Not comparable between tasks: chance differs, and so does the number of samples.
- WikiText-2 is the first {characters:,} characters of the test file, as one document.
- The bundled model is small. It is there so that everything can be tried, not to be good at these tasks."""


def measure(model: str, data: Path, out: Path, texts: Path) -> EvaluationReport:
    """Both parts of the suite: what has records, and WikiText's slice."""
    parts = [
        run_tasks(model, suite=str(out.parent / "suite.yaml"), data=str(data), out=str(out), device="cpu"),
        run_tasks(model, tasks=[name for name, _ in split_suite()[1]], data=str(texts), out=str(out / "documents"),
                  device="cpu"),
    ]  # fmt: skip
    if refused := [one for part in parts for one in part.refused]:
        raise GmaskError(f"{refused[0].name}: {refused[0].reason}")
    return replace(parts[0], tasks=[task for part in parts for task in part.tasks])


def split_suite() -> tuple[list[SuiteEntry], list[tuple[str, SuiteEntry]]]:
    """The entries with their limits, and those of WikiText."""
    entries = [(str(entry.task), entry) for entry in load_suite(SUITE)]
    documents = [(name, entry) for name, entry in entries if "wikitext" in name]
    limited = [replace(entry, limit=LIMITS.get(name)) for name, entry in entries if "wikitext" not in name]
    return limited, documents


def prepare(model: str, data: Path, out: Path) -> tuple[Path, Path]:
    """Writes the suite with its limits, the slice of WikiText and the random model; returns the last two folders."""
    limited, documents = split_suite()
    rows = [{name: value for name, value in plain_values(entry).items() if value} for entry in limited]
    write_text(out / "suite.yaml", yaml.safe_dump(rows, sort_keys=False))
    source = load_task(documents[0][0]).data
    if (found := find_pattern(source, data, "validation")) is None:
        raise GmaskError(f"{data}: has no {' or '.join(source.files)}")
    texts, name = out / "texts", source.files[-1]
    write_text(texts / name, Path(found).read_text(encoding="utf-8")[:CHARACTERS])
    chance = out / "random-model"
    if not (chance / "config.json").is_file():
        network, tokenizer = load(model, device="cpu")
        torch.manual_seed(0)
        type(network)(network.config).save_pretrained(chance)
        tokenizer.save_pretrained(chance)
    return texts, chance


def render_page(ours: EvaluationReport, chance: EvaluationReport, tuned: Sequence[str] = ()) -> str:
    """The page. ``tuned`` has the table of the tuned model and, if there is a second, that of the tuned random one."""
    by_name = {task.name: task for task in chance.tasks}
    rows = [row for task in ours.tasks for row in _list_rows(task, by_name[task.name])]
    above = [row[0] for row in rows if "**" in row[3]]
    table = Rows(("task", "metric", "samples", "bundled", "random weights", "majority", "guessing"), rows, n_labels=2)
    limits = ", ".join(f"{count} of {name}" for name, count in LIMITS.items())
    facts = {
        "weights": ", ".join(f"{name} `{digest[:16]}`" for name, digest in ours.run.weights.items()),
        "random weights": "`torch.manual_seed(0)`, as the model is initialized",
        "device": f"{ours.run.device}, {ours.run.dtype}, {ours.run.threads} thread",
        "versions": ", ".join(f"{name} {number}" for name, number in ours.run.versions.items()),
        "commit": ours.run.commit or "-",
    }
    data = [(task.name, file, f"`{digest[:16]}`") for task in ours.tasks for file, digest in task.hashes.items()]
    summary = (
        f"Of {len(rows)} scores {len(above)} are better than chance by their interval: "
        f"{', '.join(dict.fromkeys(above)) or 'none'}."
    )
    return (
        "\n\n".join(
            (
                INTRODUCTION.format(summary=summary),
                "## Scores",
                table.to_markdown(),
                LEGEND.format(plain=", ".join(NOT_PER_CENT)),
                *([TUNED.format(tables="\n\nWith random weights:\n\n".join(tuned))] if tuned else []),
                CAVEATS.format(limits=limits, characters=CHARACTERS),
                "## Run",
                Rows(("", ""), list(facts.items()), n_labels=2).to_markdown(),
                "## Data",
                Rows(("task", "file", "SHA-256"), data, n_labels=3).to_markdown(),
            )
        )
        + "\n"
    )


def _list_rows(task: TaskResult, chance: TaskResult) -> Iterator[tuple[str, ...]]:
    guesses = {} if task.chance is None else {"accuracy": 100 * task.chance}
    above = {
        metric
        for metric, score in task.scores.items()
        if is_above(metric, score, chance.scores[metric], task.majority.get(metric), guesses.get(metric))
    }
    if "accuracy" in task.scores.keys() - above:
        above -= set(LABEL_F1)
    for metric, score in task.scores.items():
        majority, guessing = task.majority.get(metric), guesses.get(metric)
        mark = "**" if metric in above else ""
        yield (
            task.name,
            metric,
            f"{task.samples:,}",
            f"{mark}{score.value:.2f}{mark} ({format_interval(score)})",
            f"{chance.scores[metric].value:.2f} ({format_interval(chance.scores[metric])})",
            "-" if majority is None else f"{majority:.2f}",
            "-" if guessing is None else f"{guessing:.2f}",
        )


def is_above(metric: str, score: TaskScore, chance: TaskScore, majority: float | None, guessing: float | None) -> bool:
    """Whether the interval is better than what needs no model; without such a number, than the random model's."""
    if score.low is None or score.high is None:
        return False
    known = [value for value in (majority, guessing) if value is not None]
    if known:
        return score.low > max(known)
    if chance.low is None or chance.high is None:
        return False
    return score.high < chance.low if metric in NOT_PER_CENT else score.low > chance.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--page", type=Path, default=Path(PAGE))
    parser.add_argument("--tuned", type=Path, nargs="+", default=[], metavar="TABLE")
    options = parser.parse_args()
    tuned = [path.read_text(encoding="utf-8").strip() for path in options.tuned]
    texts, chance = prepare(options.model, options.data, options.out)
    ours = measure(options.model, options.data, options.out / "model", texts)
    theirs = measure(str(chance), options.data, options.out / "random", texts)
    write_text(options.page, render_page(ours, theirs, tuned))
    print(options.page)


if __name__ == "__main__":
    main()
