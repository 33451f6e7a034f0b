"""What do a few labelled samples teach by a cloze question, with and without pretraining, and beside a classifier?

    python benchmarks/cloze_tuning.py --data-root CORPUS --out FOLDER [--tasks eprstmt ...] [--seeds 0 1 2] [--sweep]

Each task is tuned from 32 samples (tnews: 64) in three ways, by recipes/cloze-study.yaml: the bundled model by a cloze
question; the same model shape with random weights, by the same question; the bundled model with a classification head.
Beside them stand the majority label of the training samples and the cloze question without any tuning. CORPUS holds the
FewCLUE files, measured on their test split, and the FewGLUE files, measured by 4-fold cross-validation.

`--sweep` is where each way got its learning rate and number of steps, CHOSEN: the best on the samples of eprstmt that
are set aside for that, never on a test split.

Every run leaves its numbers in a folder of FOLDER and is not made again; `study.json` has all of them. The weights are
thrown away. Seconds are those of the processor, which other work on the machine moves less than the clock's.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from gmask.evaluation.harness import run_tasks
from gmask.files import write_json
from gmask.tasks.metrics import Rows
from gmask.tasks.task import load_task
from gmask.training.finetune import read_results, run_finetuning
from gmask.training.run_folder import read_metrics
from machine import describe_machine

RECIPE = Path(__file__).parents[1] / "recipes" / "cloze-study.yaml"
FOLDS = 4
ACCURACY, RECALL = "accuracy", "recall"

CLOZE, RANDOM, HEAD, UNTUNED, MAJORITY = "cloze", "cloze, random weights", "head", "cloze, untuned", "majority"
TUNED = (CLOZE, RANDOM, HEAD)
CHOSEN = {CLOZE: (1e-3, 4), RANDOM: (3e-4, 2), HEAD: (1e-3, 6)}
"""Learning rate, and passes over the samples, of the highest accuracy in the table of `--sweep`."""

SWEEP_TASK = "eprstmt"
SWEEP_RATES = (1e-4, 3e-4, 1e-3)
SWEEP_EPOCHS = 6
SWEEP_EVERY = 8  # steps: two passes over the samples

WEIGHTS = ("checkpoint-*", "best.safetensors", "model", "tensorboard")
"""What a run leaves that the study has no use for."""

Overrides = Mapping[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class FewShot:
    """The files of a task, relative to the corpus."""

    task: str
    train: str
    test: str | None = None  # without one: cross-validation on `train`
    validation: str | None = None
    max_source: int = 96  # tokens; longer questions are cut
    truncation: str = "left"  # of a cloze question

    @classmethod
    def fewclue(cls, name: str, **settings: Any) -> "FewShot":
        train, test, validation = (f"nc/fewclue/{name}/{file}.json" for file in ("train_0", "test_public", "dev_0"))
        return cls(f"clue/{name}", train, test, validation, **settings)

    @classmethod
    def fewglue(cls, name: str, folder: str, **settings: Any) -> "FewShot":
        return cls(f"superglue/{name}", f"{folder}/train.jsonl", **settings)

    @property
    def tunings(self) -> int:
        """Models that are tuned in a run."""
        return 1 if self.test else FOLDS


TASKS = {
    "eprstmt": FewShot.fewclue("eprstmt"),
    "bustm": FewShot.fewclue("bustm"),
    "ocnli": FewShot.fewclue("ocnli"),
    "cluewsc": FewShot.fewclue("cluewsc", max_source=128),
    "tnews": FewShot.fewclue("tnews"),
    "csl": FewShot.fewclue("csl", max_source=512),
    "wic": FewShot.fewglue("wic", "nc/superglue/WiC"),
    "copa": FewShot.fewglue("copa", "eval/superglue/COPA"),
    "cb": FewShot.fewglue("cb", "nc/superglue/CB", max_source=192, truncation="right"),
    "rte": FewShot.fewglue("rte", "nc/superglue/RTE", max_source=192, truncation="right"),
    "boolq": FewShot.fewglue("boolq", "eval/superglue/BoolQ", max_source=256),
}
"""FewGLUE's WSC is left out: all of its 32 samples are true."""

STUDIED = ("eprstmt", "bustm", "ocnli", "wic", "copa", "cb")
"""Those that are run by default: without long texts, and enough for a quarter of an hour of one core."""


class Study:
    """Runs that are made once: each has a folder, and a record in it as soon as it is finished."""

    def __init__(self, out: Path, data_root: str, *, threads: int, limit: int | None) -> None:
        self.out, self.data_root, self.threads, self.limit = out, data_root, threads, limit
        self.recipe = yaml.safe_load(RECIPE.read_text("utf-8"))

    def tune(self, name: str, way: str, seed: int, changes: Overrides, *, folder: str = "runs") -> Record:
        """The record of a tuning of task `name` by a way of `TUNED`.

        changes: keys of the recipe with other values than the recipe and `CHOSEN` give.
        """
        few = TASKS[name]
        settings = {
            "task": {"use": few.task, "kind": "classification"} if way == HEAD else few.task,
            "model.initialization": "random" if way == RANDOM else "pretrained",
            "data.train": few.train,
            "data.test": few.test,
            "data.folds": None if few.test else FOLDS,
            "data.limit": self.limit,
            "data.max_source": few.max_source,
            "data.truncation": "left" if way == HEAD else few.truncation,
            "optimization.learning_rate": CHOSEN[way][0],
            "optimization.epochs": CHOSEN[way][1],
            "run.seed": seed,
            **changes,
        }
        rate = settings["optimization.learning_rate"]
        place = self.out / folder / name / f"{way.replace(', ', '-').replace(' ', '-')}-{rate:g}-seed-{seed}"
        about = {"task": name, "way": way, "seed": seed, "settings": settings, "recipe": self.recipe}
        return self._once(place, about, lambda: self._tune(place, settings, few))

    def ask_untuned(self, name: str) -> Record:
        """The record of the bundled model as it is: on the test split, or on all samples of a cross-validation."""
        few = TASKS[name]
        data = few.test or few.train
        about = {"task": name, "way": UNTUNED, "seed": None, "settings": {"data": data, "data.limit": self.limit}}
        place = self.out / "runs" / name / "untuned"
        return self._once(place, about, lambda: self._ask(place, few.task, data))

    def _once(self, place: Path, about: Record, make: Callable[[], Record]) -> Record:
        path = place / "record.json"
        if path.is_file():
            found: Record = json.loads(path.read_text("utf-8"))
            if any(found[key] != value for key, value in about.items()):
                sys.exit(f"{place} holds a run of other settings: delete it, or choose another --out")
        else:
            print(f"{about['task']}: {about['way']}, seed {about['seed']}", file=sys.stderr)
            clock, processor = time.perf_counter(), time.process_time()
            found = about | make()
            found |= {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}
            write_json(path, found)
        found["scores"][RECALL] = mean_recall(place)
        return found

    def _tune(self, place: Path, settings: Overrides, few: FewShot) -> Record:
        places = {"run.out": str(place), "run.device": "cpu", "run.threads": self.threads, "data.root": self.data_root}
        overrides = [f"{key}={json.dumps(value)}" for key, value in (places | dict(settings)).items()]
        results = read_results(run_finetuning(str(RECIPE), overrides))
        steps = read_metrics(place / "metrics.jsonl") if few.test else []
        validated = [(step["step"], step["validation"]["validation"]) for step in steps if "validation" in step]
        for pattern in WEIGHTS:
            for path in sorted(place.rglob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {
            "scores": _final(results["metrics"], few),
            "majority": _final(results["majority"], few),
            "validated": validated,
            "steps": results.get("runs", [results])[0]["steps"],
            "tunings": few.tunings,
        }

    def _ask(self, place: Path, task: str, data: str) -> Record:
        data = str(Path(self.data_root) / data)
        report = run_tasks(tasks=[task], data=data, out=str(place), limit=self.limit, device="cpu", tables=False)
        (found,) = report.tasks
        return {"scores": {name: score.value for name, score in found.scores.items()}, "samples": found.samples}


def mean_recall(place: Path) -> float:
    """The share of a label's samples that a run got right, averaged over the labels, in per cent.

    Of two labels it is 50 for whoever always says the same, however frequent that is. Folds are taken together.
    """
    right = defaultdict[int, list[bool]](list)
    for path in place.rglob("predictions.jsonl"):
        with path.open(encoding="utf-8") as lines:
            for sample in map(json.loads, lines):
                right[sample["label"]].append(sample["predicted_label"] == sample["label"])
    return 100 * statistics.fmean(map(statistics.fmean, right.values()))


def _final(metrics: Mapping[str, Any], few: FewShot) -> dict[str, float]:
    """Of a run's results: the one split that was measured, or the mean over the folds."""
    scores = next(iter(metrics.values()))
    return dict(scores) if few.test else {name: found["mean"] for name, found in scores.items()}


# The study


def make_records(study: Study, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Record]:
    """All runs, a seed of every task before the next seed."""
    for name in names:
        yield study.ask_untuned(name)
    for seed in seeds:
        for name in names:
            for way in TUNED:
                if way == HEAD and load_task(TASKS[name].task).kind != "cloze":
                    continue  # candidates of their own for each sample are no classes
                yield study.tune(name, way, seed, {})


class Table:
    """The scores of all runs, by task and way."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.names = list(dict.fromkeys(record["task"] for record in records))

    def accuracies(self) -> str:
        """With the majority label's, and the seconds of a tuning with its measurement."""
        ways = (MAJORITY, UNTUNED, RANDOM, HEAD, CLOZE)
        rows = []
        for name in self.names:
            few, samples = TASKS[name], self._of(name, UNTUNED)[0]["samples"]
            seconds = [r["cpu_seconds"] / r["tunings"] for way in TUNED for r in self._of(name, way)]
            measured = f"{samples}" if few.test else f"{samples}, {FOLDS} folds"
            scores = [_spread(self.scores(name, way, ACCURACY)) for way in ways]
            rows.append([name, measured, *scores, f"{statistics.fmean(seconds):.0f}"])
        rows.append([f"**mean of {len(self._whole)}**", "", *self._means(ways, ACCURACY), ""])
        return Rows(["accuracy", "samples", *ways, "seconds"], rows, n_labels=2).to_markdown()

    def recalls(self) -> str:
        """With what the cloze question gains over other ways; of the means, with the standard error over tasks."""
        ways, others = (UNTUNED, RANDOM, HEAD, CLOZE), (RANDOM, HEAD)
        rows = []
        for name in self.names:
            scores = [_spread(self.scores(name, way, RECALL)) for way in ways]
            rows.append([name, *scores, *(_spread(self.gains(name, over), sign="+") for over in others)])
        gains = [[statistics.fmean(self.gains(name, over)) for name in self._whole] for over in others]
        errors = [_spread(each, sign="+", error=True) for each in gains]
        rows.append([f"**mean of {len(self._whole)}**", *self._means(ways, RECALL), *errors])
        return Rows(["mean recall", *ways, "gain of pretraining", "gain over the head"], rows).to_markdown()

    def scores(self, name: str, way: str, metric: str) -> list[float]:
        """One for each seed; for `MAJORITY` as the runs by a cloze question found it."""
        kind = "majority" if way == MAJORITY else "scores"
        found = [record[kind] for record in self._of(name, CLOZE if way == MAJORITY else way)]
        return [scores[metric] for scores in found]

    def gains(self, name: str, over: str) -> list[float]:
        """Of the cloze question over another way, seed by seed; empty where there is no such run."""
        others = self.scores(name, over, RECALL)
        return [a - b for a, b in zip(self.scores(name, CLOZE, RECALL), others, strict=True)] if others else []

    @property
    def _whole(self) -> list[str]:
        """The tasks that can be done in every way."""
        return [name for name in self.names if self._of(name, HEAD)]

    def _of(self, name: str, way: str) -> list[Record]:
        return [record for record in self.records if (record["task"], record["way"]) == (name, way)]

    def _means(self, ways: Sequence[str], metric: str) -> list[str]:
        return [
            f"{statistics.fmean(statistics.fmean(self.scores(name, way, metric)) for name in self._whole):.1f}"
            for way in ways
        ]


def _spread(values: Sequence[float], *, sign: str = "", error: bool = False) -> str:
    """Mean ± deviation, or ± the standard error of the mean; a dash for no value."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{sign}.1f}"
    if len(values) == 1:
        return mean
    spread = statistics.stdev(values) / (len(values) ** 0.5 if error else 1)
    return f"{mean} ± {spread:.1f}"


# The sweep


def sweep(study: Study, seeds: Sequence[int]) -> str:
    """The table of accuracy and loss on the validation samples of eprstmt, by way, learning rate and step."""
    rows = []
    for way in TUNED:
        for rate in SWEEP_RATES:
            found: dict[int, list[Mapping[str, float]]] = {}
            for seed in seeds:
                for step, scores in _validated(study, way, rate, seed):
                    found.setdefault(step, []).append(scores)
            cells = [
                f"{statistics.fmean(s[ACCURACY] for s in each):.1f} ({statistics.fmean(s['loss'] for s in each):.3f})"
                for each in found.values()
            ]
            rows.append([way, f"{rate:g}", *cells])
    steps = [f"step {step}" for step in found]
    return Rows(["way", "learning rate", *steps], rows).to_markdown()


def _validated(study: Study, way: str, rate: float, seed: int) -> list[tuple[int, Mapping[str, float]]]:
    few = TASKS[SWEEP_TASK]
    changes = {
        "data.validation": few.validation,
        "data.test": None,
        "optimization.learning_rate": rate,
        "optimization.epochs": SWEEP_EPOCHS,
        "optimization.evaluate_every": SWEEP_EVERY,
    }
    record = study.tune(SWEEP_TASK, way, seed, changes, folder="sweep")
    return [(step, scores) for step, scores in record["validated"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="the folder of the corpus")
    parser.add_argument("--out", required=True, type=Path, help="where the runs are kept")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(STUDIED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="samples of each file that are read, from the first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sweep", action="store_true", help="compare learning rates and steps instead")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    study = Study(options.out, options.data_root, threads=options.threads, limit=options.limit)
    if options.sweep:
        print(sweep(study, options.seeds))
        return
    records = list(make_records(study, options.tasks, options.seeds))
    versions = {name: version(name) for name in ("gmask", "torch", "transformers")}
    machine = describe_machine(options.threads)
    write_json(options.out / "study.json", {"machine": machine, "versions": versions, "runs": records})
    table = Table(records)
    print(table.accuracies(), table.recalls(), sep="\n\n")


if __name__ == "__main__":
    main()
