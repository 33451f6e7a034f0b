"""``gmask evaluate``."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gmask.cli.options import AdapterFolder, AsJson, SkipBadLines, output_option, parse_settings
from gmask.cli.printing import print_json, print_table
from gmask.errors import GmaskError

FOR_TASKS = ("adapter", "set", "limit", "shots", "seeds", "batch-size", "normalization", "train", "shuffle-labels",
             "skip-bad-lines")  # fmt: skip
"""Options that the held-out suite does not have."""


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A model folder, or bundled; with --compare folders of results.",
            show_default="bundled",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="Measure tasks: names, patterns such as superglue/*, or YAML files.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Measure a list of tasks: paper, superglue, clue, ..., or a YAML file.", show_default=False),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--data",
            "--corpus",
            help="Folder of the tasks' files; of one task also a file, or a glob. Without tasks, folder of the texts.",
            show_default="the recipe's data.root",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Records of each task, from the first.", min=1, show_default="all")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(help="Examples in front of each text, from the training records.", min=0, show_default="0"),
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="The file of the examples.", show_default="the task's training records")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N[,N]", help="By which examples and answers are drawn; one run each.", show_default="0"),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(metavar="auto|N", help="Rows that are read together.", show_default="auto"),
    ] = None,
    normalization: Annotated[
        Literal["sum", "mean", "unconditional"] | None,
        typer.Option(help="What is made of candidates' log-probabilities, as in score.", show_default="sum"),
    ] = None,
    adapter: AdapterFolder = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="How a task's texts are written, such as max_tokens=128 or num_beams=4; once for each.",
            show_default=False,
        ),
    ] = None,
    shuffle_labels: Annotated[
        bool, typer.Option("--shuffle-labels", help="Exchange the labels of the samples: what is found is chance.")
    ] = False,
    skip_bad_lines: SkipBadLines = False,
    recipe: Annotated[str, typer.Option(help="The recipe that it was trained by.")] = "recipes/bundled.yaml",
    out: Annotated[
        str | None,
        output_option(
            "Folder for the figures; of tasks, for predictions and reports: a run that was stopped goes on there.",
            "--out",
            show_default="the model's; of tasks, none",
        ),
    ] = None,
    sentences: Annotated[int, typer.Option(help="Held-out sentences of each language.", min=1)] = 300,
    compare: Annotated[
        bool, typer.Option("--compare", help="Set the results of several runs side by side, which --out wrote.")
    ] = False,
    list_tasks: Annotated[
        bool, typer.Option("--list", help="List the tasks, and whether --data or the hub has their records.")
    ] = False,
    export: Annotated[
        str | None,
        typer.Option(
            "--export-lm-eval",
            metavar="DIR",
            help="Measure nothing: write the tasks for lm-eval, with their samples, into this folder.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: on held-out text, or on tasks.

    On held-out text: losses, and blanks filled as the author did, beside n-gram baselines. On tasks: their metrics with
    95 % intervals, beside always choosing the most frequent label, and beside published numbers.
    """
    if list_tasks:
        _list_tasks(tasks, corpus, as_json)
        return
    if compare:
        _compare(models or [], out, as_json)
        return
    if export is not None:
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        seed = _parse_seeds(seeds or "0")[0]
        _export(export, names, suite, as_json, data=corpus, train=train, limit=limit, shots=shots, seed=seed)
        return
    if len(models or []) > 1:
        raise GmaskError("one model is measured at a time; --compare sets the results of several side by side")
    model = (models or ["bundled"])[0]
    if tasks is None and suite is None:
        given = (adapter, pairs, limit, shots, seeds, batch_size, normalization, train, shuffle_labels, skip_bad_lines)
        if named := [name for name, value in zip(FOR_TASKS, given, strict=True) if value]:
            raise GmaskError(
                f"{' and '.join(f'--{name}' for name in named)}: for tasks; name some with --tasks, such as "
                "superglue/rte, or with --suite"
            )
        _evaluate_held_out(model, recipe=recipe, corpus=corpus, out=out, sentences=sentences, as_json=as_json)
        return
    options = {
        "tasks": [name.strip() for name in (tasks or "").split(",") if name.strip()],
        "suite": suite,
        "data": corpus,
        "train": train,
        "adapter": None if adapter is None else str(adapter),
        "out": out,
        "limit": limit,
        "shots": shots,
        "seeds": _parse_seeds(seeds or "0"),
        "settings": parse_settings(pairs or []),
        "normalization": normalization,
        "batch_size": _parse_batch_size(batch_size or "auto"),
        "shuffle_labels": shuffle_labels,
        "skip_bad_lines": skip_bad_lines,
    }
    _evaluate_tasks(model, options, as_json)


def _evaluate_tasks(model: str, options: dict[str, Any], as_json: bool) -> None:
    """Exit code 2 if a task could not be measured for another reason than that its records are not here."""
    from gmask.checkpoints.hub import check_name

    check_name(model)  # before torch is imported, which takes seconds
    _check_tasks(options["tasks"], options["suite"])
    from gmask.evaluation.harness import run_tasks
    from gmask.evaluation.pages import list_notes

    try:
        report = run_tasks(model, **options, tables=not as_json)
    except KeyboardInterrupt:
        if options["out"] is not None:
            print(f"gmask: stopped; the same command goes on with what is in {options['out']}", file=sys.stderr)
        raise
    if os.environ.get("RANK", "0") != "0":  # of several processes only the first one prints
        return
    if as_json:
        for line in list_notes(report):
            print("gmask:", line, file=sys.stderr)
        print_json(report.to_dict())
    if any(not refusal.is_missing for refusal in report.refused):
        raise typer.Exit(2)


def _evaluate_held_out(
    model: str, *, recipe: str, corpus: str | None, out: str | None, sentences: int, as_json: bool
) -> None:
    from gmask.checkpoints.hub import check_name

    check_name(model)  # before torch is imported, which takes seconds
    from gmask.evaluation.infilling import evaluate_held_out

    written = evaluate_held_out(
        model, recipe=recipe, data_root=corpus, out=out, sentences=sentences, tables=not as_json
    )
    print(written.read_text(encoding="utf-8") if as_json else written)


def _compare(folders: list[str], out: str | None, as_json: bool) -> None:
    if len(folders) < 2:
        raise GmaskError("--compare sets several runs side by side: name two or more folders that --out wrote")
    from rich.console import Console

    from gmask.evaluation.pages import compare_rows, label_reports, write_comparison
    from gmask.evaluation.results import read_report

    reports = label_reports({folder: read_report(Path(folder)) for folder in folders})
    if out is not None:
        write_comparison(reports, Path(out))
    if as_json:
        print_json({label: report.to_dict() for label, report in reports.items()})
    else:
        Console().print(compare_rows(reports).to_rich("Scores with their 95 % intervals"))


def _check_tasks(tasks: list[str], suite: str | None) -> None:
    """Raises `GmaskError` for tasks that cannot be measured, before torch is imported."""
    from gmask.evaluation.suite import plan_tasks

    plan_tasks(tasks, suite)


def _export(out: str, tasks: list[str], suite: str | None, as_json: bool, **options: Any) -> None:
    """Exit code 2 if a task could not be written for another reason than that its records are not here."""
    if not tasks and suite is None:
        raise GmaskError(
            "--export-lm-eval writes tasks: name some with --tasks, such as superglue/copa, or with --suite"
        )
    _check_tasks(tasks, suite)
    from gmask.evaluation.export import export_tasks

    export = export_tasks(out, tasks=tasks, suite=suite, **options)
    for refusal in export.refused:
        print(f"gmask: not written: {refusal.reason}", file=sys.stderr)
    if as_json:
        print_json({name: str(path) for name, path in export.written.items()})
    else:
        print("\n".join(export.written))
    if any(not refusal.is_missing for refusal in export.refused):
        raise typer.Exit(2)


def _list_tasks(patterns: str | None, data: str | None, as_json: bool) -> None:
    from gmask.evaluation.suite import match_tasks
    from gmask.tasks.sources import find_pattern
    from gmask.tasks.task import load_task, task_names

    names = match_tasks([name.strip() for name in patterns.split(",")]) if patterns else task_names()
    root = Path(data) if data else None
    rows = []
    for name in names:
        task = load_task(name)
        found = find_pattern(task.data, root, "validation")
        hub = f"hub: {task.data.hub}" if task.data.hub else None
        rows.append({"task": name, "kind": task.kind, "metrics": list(task.metrics), "licence": task.data.licence,
                     "records": found or hub, "is_found": found is not None, **asdict(task.data)})  # fmt: skip
    if as_json:
        print_json(rows, indent=2)
        return
    # What fits 80 columns; --json has all metrics, the licences and the names of files and sets.
    cells = [(str(r["task"]), str(r["kind"]), next(iter(r["metrics"]), "-"),
              "found" if r["is_found"] else "hub" if r["hub"] else "-") for r in rows]  # fmt: skip
    print_table(("task", "kind", "first metric", "records"), cells)


def _parse_seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise GmaskError(f"--seeds {text}: write numbers, such as 0,1,2") from error


def _parse_batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise GmaskError(f"--batch-size {text}: write auto, or a number of rows") from error
