"""The report of an evaluation: tables for the terminal and Markdown, and one HTML file with plots."""

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gmask.evaluation.results import EvaluationReport, PublishedScore, TaskResult, TaskScore, read_published
from gmask.files import write_text
from gmask.tasks.metrics import NOT_PER_CENT, Rows

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
GENERATOR = "gmask evaluate"


def score_rows(report: EvaluationReport) -> Rows:
    """A row for each task and metric: the score, its interval, what needs no model, and the published number."""
    published = read_published()
    rows = []
    for task in report.tasks:
        for metric, score in task.scores.items():
            majority = task.majority.get(metric)
            chance = task.chance if metric == "accuracy" else None
            rows.append(
                (
                    task.name,
                    metric,
                    f"{task.samples:,}",
                    f"{score.value:.2f}",
                    format_interval(score),
                    "-" if majority is None else f"{majority:.2f}",
                    "-" if chance is None else f"{100 * chance:.2f}",
                    describe_published(find_published(published, task, metric)),
                )
            )
    columns = ("task", "metric", "samples", "score", "95 % interval", "majority", "random", "published")
    return Rows(columns, rows, n_labels=2)


def short_rows(report: EvaluationReport) -> Rows:
    """`score_rows` for a terminal: without the samples, and with published numbers alone."""
    whole = score_rows(report)
    known = read_published()
    found = [find_published(known, task, metric) for task in report.tasks for metric in task.scores]
    short = [
        (*row[:2], *row[3:-1], "-" if score is None else f"{score.value:.2f} †")
        for row, score in zip(whole.rows, found, strict=True)
    ]
    return Rows((*whole.columns[:2], *whole.columns[3:]), short, n_labels=2)


def _cite(report: EvaluationReport) -> Iterator[str]:
    known = read_published()
    found = [find_published(known, task, metric) for task in report.tasks for metric in task.scores]
    cited = dict.fromkeys(f"{one.model} ({one.how})" for one in found if one is not None)
    if cited:
        yield f"† published, not measured here: {', '.join(cited)}"


def format_interval(score: TaskScore) -> str:
    """The interval, and the deviation of the seeds if there are several."""
    interval = "-" if score.low is None or score.high is None else f"{score.low:.2f} to {score.high:.2f}"
    return interval + ("" if score.deviation is None else f" (seeds ±{score.deviation:.2f})")


def find_published(published: Sequence[PublishedScore], task: TaskResult, metric: str) -> PublishedScore | None:
    return next((one for one in published if (one.task, one.metric) == (task.task, metric)), None)


def describe_published(score: PublishedScore | None) -> str:
    return "-" if score is None else f"{score.model} {score.value:.2f} ({score.how})"


def compare_rows(reports: Mapping[str, EvaluationReport]) -> Rows:
    """A row for each task and metric that one of the runs has, a column for each run."""
    found: dict[tuple[str, str], dict[str, TaskScore]] = {}
    for label, report in reports.items():
        for task in report.tasks:
            for metric, score in task.scores.items():
                found.setdefault((task.name, metric), {})[label] = score
    rows = [
        (*place, *(_cell(scores[label]) if label in scores else "-" for label in reports))
        for place, scores in found.items()
    ]
    return Rows(("task", "metric", *reports), rows, n_labels=2)


def _cell(score: TaskScore) -> str:
    interval = "" if score.low is None or score.high is None else f" [{score.low:.2f}, {score.high:.2f}]"
    return f"{score.value:.2f}{interval}"


def label_reports(reports: Mapping[str, EvaluationReport]) -> dict[str, EvaluationReport]:
    """The reports under names of their models; where two are the same, the folder's name follows.

    reports: by the path of their folder.
    """
    labels = [report.run.label for report in reports.values()]
    short = [Path(folder).name for folder in reports]
    names = dict(zip(reports, short if len(set(short)) == len(short) else reports, strict=True))
    return {
        report.run.label if labels.count(report.run.label) == 1 else f"{report.run.label} ({names[folder]})": report
        for folder, report in reports.items()
    }


# The terminal


WIDE = 100
"""Columns of a terminal; a narrower one shows neither the scores of guessing nor published ones."""


def print_report(report: EvaluationReport, console: Console) -> None:
    scored = [task for task in report.tasks if task.scores]
    if scored:
        rows = short_rows(report)
        if console.width < WIDE:  # names would be folded into pieces
            rows = Rows(rows.columns[:5], [row[:5] for row in rows.rows], rows.n_labels)
        console.print(rows.to_rich(report.run.label))
        for line in _cite(report) if console.width >= WIDE else ():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for task in report.tasks:
        if not task.scores:
            console.print(f"{task.name}: {task.samples} samples without answers, so there is nothing to measure")
    for line in list_notes(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def list_notes(report: EvaluationReport) -> Iterator[str]:
    for task in report.tasks:
        yield from (f"{task.name}: {note}" for note in task.notes)
    yield from (f"not measured: {refusal.reason}" for refusal in report.refused)


def _plain_metrics() -> str:
    *first, last = NOT_PER_CENT
    return f"{', '.join(first)} and {last}"


# Markdown


def render_markdown(report: EvaluationReport) -> str:
    sections = [
        f"# Evaluation of {report.run.label}",
        f"In per cent but for {_plain_metrics()}, of which less is better. The intervals hold 95 % of the "
        "scores of bootstrap resamples of the samples. *Majority* always gives the most frequent label, *random* is "
        "the accuracy of guessing. *Published* numbers were not measured here.",
        score_rows(report).to_markdown(),
        *_group_sections(report),
        *(["## Notes\n\n" + "\n".join(f"- {line}" for line in list_notes(report))] if any(list_notes(report)) else []),
        f"## Data\n\n{_data_rows(report).to_markdown()}",
        f"## Run\n\n{_run_rows(report).to_markdown()}",
    ]
    return "\n\n".join(sections) + "\n"


def _group_sections(report: EvaluationReport) -> Iterator[str]:
    for task in report.tasks:
        if task.groups:
            rows = [(name, f"{count:,}", f"{score:.2f}") for name, (score, count) in task.groups.items()]
            yield f"## {task.name} by group\n\n{Rows(('group', 'samples', 'accuracy'), rows).to_markdown()}"


def _data_rows(report: EvaluationReport) -> Rows:
    rows = [
        (task.name, name, f"`{digest}`")
        for task in report.tasks
        for name, digest in (task.hashes or {task.data: "-"}).items()
    ]
    return Rows(("task", "file or set", "SHA-256 or commit"), rows, n_labels=3)


def _run_rows(report: EvaluationReport) -> Rows:
    run = report.run
    predicted = [task for task in report.tasks if task.samples_per_second]
    speeds = ", ".join(f"{task.name} {task.samples_per_second:.1f}" for task in predicted)
    facts = {
        "model": run.model,
        "adapter": run.adapter or "-",
        "weights": ", ".join(f"{name} `{digest[:16]}`" for name, digest in run.weights.items()),
        "device": f"{run.device}, {run.dtype}, {run.processes} processes, {run.threads} threads each",
        "versions": ", ".join(f"{name} {number}" for name, number in run.versions.items()),
        "commit": run.commit or "-",
        "started": run.started,
        "seconds": f"{run.seconds:,.1f}",
        "samples/s": speeds or "-",
    }
    return Rows(("", ""), list(facts.items()), n_labels=2)


# HTML

PAGE_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; } .label { text-align: left; }
code { font-size: .85em; } svg { max-width: 100%; height: auto; }
"""


def render_page(report: EvaluationReport) -> str:
    """The report as one HTML file, which needs no other."""
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in list_notes(report))
    body = [
        f"<h1>Evaluation of {html.escape(report.run.label)}</h1>",
        f"<p>In per cent but for {_plain_metrics()}. Intervals: 95 % of bootstrap resamples of the samples. Published "
        "numbers were not measured here.</p>",
        _draw({report.run.label: report}),
        score_rows(report).to_html(),
        f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "",
        f"<h2>Data</h2>{_data_rows(report).to_html()}",
        f"<h2>Run</h2>{_run_rows(report).to_html()}",
    ]
    return _page(f"Evaluation of {report.run.label}", body)


def render_comparison(reports: Mapping[str, EvaluationReport]) -> tuple[str, str]:
    """Several runs side by side: in Markdown, and as one HTML file. ``reports``: by their labels."""
    rows = compare_rows(reports)
    runs = [
        (label, report.run.model, report.run.started, report.run.device, str(len(report.tasks)))
        for label, report in reports.items()
    ]
    table = Rows(("", "model", "started", "device", "tasks"), runs, n_labels=4)
    title = "Evaluations side by side"
    hint = "Scores with their 95 % intervals, in per cent but for " + _plain_metrics() + "."
    markdown = f"# {title}\n\n{hint}\n\n{rows.to_markdown()}\n\n## Runs\n\n{table.to_markdown()}\n"
    body = [f"<h1>{title}</h1><p>{hint}</p>", _draw(reports), rows.to_html(), f"<h2>Runs</h2>{table.to_html()}"]
    return markdown, _page(title, body)


def write_reports(report: EvaluationReport, folder: Path) -> None:
    """Writes results.json, report.md and report.html."""
    report.write(folder)
    write_text(folder / REPORT_FILE, render_markdown(report))
    write_text(folder / PAGE_FILE, render_page(report))


def write_comparison(reports: Mapping[str, EvaluationReport], folder: Path) -> None:
    markdown, page = render_comparison(reports)
    write_text(folder / REPORT_FILE, markdown)
    write_text(folder / PAGE_FILE, page)


def _page(title: str, body: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="generator" content="{GENERATOR}"><title>{html.escape(title)}</title>'
    return (
        f"<!doctype html>\n<html><head>{head}<style>{PAGE_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _draw(reports: Mapping[str, EvaluationReport]) -> str:
    """A bar for the first metric of each task that is in per cent, with its interval, as an SVG in the page."""
    try:
        import matplotlib
    except ImportError:
        return "<p>There is no plot: it needs matplotlib (pip install 'gmask[train]').</p>"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = {
        task.name: (task, metric)
        for report in reports.values()
        for task in report.tasks
        for metric in list(task.scores)[:1]
        if metric not in NOT_PER_CENT
    }
    if not tasks:
        return ""
    names, published = list(tasks), read_published()
    height = 0.8 / len(reports)
    figure, panel = plt.subplots(
        figsize=(9, 1.2 + 0.35 * len(names) * max(1, len(reports) * 0.7)), layout="constrained"
    )
    for number, (label, report) in enumerate(reports.items()):
        found = {
            task.name: task.scores[tasks[task.name][1]] for task in report.tasks if task.name in tasks and task.scores
        }
        places = [names.index(name) + (number - (len(reports) - 1) / 2) * height for name in found]
        values = [score.value for score in found.values()]
        panel.barh(places, values, height, xerr=_errors(found.values()), capsize=2, label=label, alpha=0.8)
    for place, (task, metric) in enumerate(tasks.values()):
        lines = {"majority": (task.majority.get(metric), "tab:red", "-")}
        lines["random"] = (100 * task.chance if task.chance is not None and metric == "accuracy" else None, "0.3", ":")
        for name, (value, colour, style) in lines.items():
            if value is not None:
                panel.plot([value] * 2, [place - 0.45, place + 0.45], style, color=colour, label=name)
        if (known := find_published(published, task, metric)) is not None:
            panel.plot(
                known.value, place, "D", color="black", markerfacecolor="none", label="published, not measured here"
            )
    panel.set_yticks(range(len(names)), [f"{name}\n{tasks[name][1]}" for name in names], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 100)
    panel.set_xlabel("per cent, with 95 % intervals")
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))  # each name once
    panel.legend(handles.values(), handles.keys(), fontsize=8, loc="best")
    panel.grid(axis="x", alpha=0.3)
    picture = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": GENERATOR}):  # the same numbers give the same file
        figure.savefig(picture, format="svg", metadata={"Date": None})
    plt.close(figure)
    return picture.getvalue()[picture.getvalue().index("<svg") :]


def _errors(scores: Any) -> list[list[float]]:
    """The distances of the bounds from the scores, as bars of errors take them."""
    bounds = [
        (
            score.value - (score.value if score.low is None else score.low),
            (score.value if score.high is None else score.high) - score.value,
        )
        for score in scores
    ]
    return [[max(0.0, bound[side]) for bound in bounds] for side in (0, 1)]
