"""SuperGLUE's eight tasks at one command: asked as they are (zero-shot), and tuned by a cloze question.

    python recipes/superglue.py --data FOLDER [--model MODEL] [--out FOLDER] [--tasks rte,copa] [KEY=VALUE ...]

FOLDER holds the archives (BoolQ/, CB/, ..., or superglue/BoolQ/, ...), in it or one folder deeper. A task with
train.jsonl and val.jsonl is tuned on the first and measured on the second, as in the paper; one that has train.jsonl
alone, as the 32 samples of FewGLUE, is cross-validated in four parts. `KEY=VALUE` changes the recipe,
recipes/superglue.yaml. A run that was stopped goes on, and a task that is finished is not tuned again. The table is
printed, and written to superglue.md and superglue.json.
"""

import argparse
from pathlib import Path
from typing import Any

from gmask.errors import GmaskError
from gmask.evaluation.harness import run_tasks
from gmask.files import write_json, write_text
from gmask.tasks.metrics import Rows
from gmask.tasks.sources import find_pattern
from gmask.tasks.task import load_task
from gmask.training.finetune import read_results, run_finetuning

RECIPE = Path(__file__).with_suffix(".yaml")
FOLDS = 4
NAMES = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
SETTINGS = {"multirc": ["optimization.epochs=1"]}
"""In place of the recipe's: five answers a passage make about as many steps as the other tasks' four epochs."""


def find_folder(data: Path, name: str) -> Path:
    """The folder of a task's files, which lie where its YAML says."""
    source = load_task(f"superglue/{name}").data
    if (found := find_pattern(source, data, "train")) is None:
        raise GmaskError(f"superglue/{name}: no {source.train[0]} in {data}: get it from {source.url}")
    return Path(found).parent


def run_one(name: str, folder: Path, model: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    """The scores of a task, in per cent: zero-shot, tuned, and of the most frequent label."""
    task, has_validation = f"superglue/{name}", (folder / "val.jsonl").is_file()
    measured = folder / ("val.jsonl" if has_validation else "train.jsonl")
    asked = run_tasks(model, tasks=[task], data=str(measured), out=str(out / name / "zero-shot"), tables=False).tasks[0]
    split = ["data.test=val.jsonl"] if has_validation else [f"data.folds={FOLDS}"]
    tuned = read_results(
        run_finetuning(
            str(RECIPE),
            [f"run.out={out / name / 'tuned'}", f"model.name={model}", f"task={task}", f"data.root={folder}", *split,
             *SETTINGS.get(name, []), *overrides],
        )
    )  # fmt: skip
    of_tuned = tuned["metrics"]["test" if has_validation else "validation"]
    return {
        "task": task,
        "samples": asked.samples,
        "measured": "val.jsonl" if has_validation else f"train.jsonl in {FOLDS} parts",
        "metrics": {
            metric: {
                "zero_shot": asked.scores[metric].value,
                "majority": asked.majority.get(metric),
                "tuned": of_tuned[metric],
            }
            for metric in load_task(task).metrics
        },
        "seconds": tuned["seconds"],
    }


def render(found: list[dict[str, Any]]) -> Rows:
    def show(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, dict):
            return f"{value['mean']:.1f} ± {value['deviation']:.1f}"
        return f"{value:.1f}"

    rows = [
        (one["task"], metric, str(one["samples"]), *(show(scores[key]) for key in ("majority", "zero_shot", "tuned")))
        for one in found
        for metric, scores in one["metrics"].items()
    ]
    return Rows(("task", "metric", "samples", "majority", "zero-shot", "tuned"), rows, n_labels=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--out", default="runs/superglue", type=Path)
    parser.add_argument("--tasks", default=",".join(NAMES), metavar="TASK[,TASK]")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()
    names = args.tasks.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"there is no task {unknown[0]}: choose from {', '.join(NAMES)}")
    found = [run_one(name, find_folder(args.data, name), args.model, args.out, args.overrides) for name in names]
    table = render(found)
    write_text(args.out / "superglue.md", table.to_markdown() + "\n")
    write_json(args.out / "superglue.json", {"model": args.model, "tasks": found})
    print(table.to_markdown())


if __name__ == "__main__":
    main()
