"""Does it help to see both sides? LAMBADA's last words and WikiText-2, read in both directions and from the left alone.

    OMP_NUM_THREADS=1 python recipes/both_sides.py --data CORPUS --out results [--model bundled] [--limit 1000]

CORPUS is a folder above lambada/ and wikitext2/. Each blank is asked in both directions by `gmask evaluate`, whose
predictions in ``--out`` hold the nats of each token; the differences are taken of the same words and tokens, with
intervals of 95 % from a paired bootstrap. A run that was stopped goes on. Prints the tables in Markdown.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gmask.errors import GmaskError
from gmask.evaluation.harness import run_tasks
from gmask.evaluation.infilling import estimate_mean
from gmask.evaluation.suite import folder_of
from gmask.files import write_json, write_text
from gmask.tasks.metrics import Rows
from gmask.tasks.sources import find_pattern
from gmask.tasks.task import Task, load_task

LAMBADA, WIKITEXT = "language-model/lambada", "language-model/wikitext2"
DIRECTIONS = {"both": "", "left": "-left"}
BLANKS = ("[MASK]", "[sMASK]", "[gMASK]")
CHARACTERS = 60_000  # of WikiText-2
PLACES = (0, 1, 2, 4, 8, 16, 64, 128, 256)  # tokens of an answer before one, from and to

Numbers = npt.NDArray[np.float64]


def measure(model: str, data: Path, out: Path, limit: int | None) -> None:
    """Predicts all words and tokens, with each blank in each direction."""
    whole = Path(find(load_task(WIKITEXT), data)).read_text(encoding="utf-8")
    write_text(out / "texts" / "wikitext2" / "test.txt", whole[:CHARACTERS])
    for task, folder, changes in ((LAMBADA, data, "template"), (WIKITEXT, out / "texts", "blank")):
        suite = [
            {"task": {"use": task + end, changes: "{before?} " * (task == LAMBADA) + blank}, "limit": limit,
             "name": name_of(task, way, blank)}
            for way, end in DIRECTIONS.items() for blank in BLANKS
        ]  # fmt: skip
        write_json(out / "suite.yaml", suite)
        report = run_tasks(model, suite=str(out / "suite.yaml"), data=str(folder), out=str(out), tables=False)
        if report.refused:
            raise GmaskError(f"{report.refused[0].name}: {report.refused[0].reason}")


def find(task: Task, data: Path) -> str:
    if (found := find_pattern(task.data, data, "validation")) is None:
        raise GmaskError(f"{data}: has no {' or '.join(task.data.files)}; get it from {task.data.url}")
    return found


def name_of(task: str, way: str, blank: str) -> str:
    return f"{task.rpartition('/')[2]} {way} {blank.strip('[]')}"


def read_nats(out: Path, task: str, way: str, blank: str) -> list[Numbers]:
    """Of each sample the nats of its tokens."""
    lines = (out / folder_of(name_of(task, way, blank)) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [-np.array(json.loads(line)["scores"]) for line in lines]


def compare_words(out: Path) -> Rows:
    rows = []
    for blank in BLANKS:
        both, left = (np.array([one.sum() for one in read_nats(out, LAMBADA, way, blank)]) for way in DIRECTIONS)
        gain = left - both
        rows.append((f"`{blank}`", f"{both.mean():.2f}", f"{left.mean():.2f}", show_mean(gain),
                     f"{100 * (gain > 0).mean():.0f} %"))  # fmt: skip
    return Rows(("blank", "both", "left", "left - both", "better with both"), rows, n_labels=1)


def compare_tokens(out: Path) -> Rows:
    rows = []
    for blank in BLANKS:
        both, left = (cut_answers(out, way, blank) for way in DIRECTIONS)
        gain = [theirs - ours for ours, theirs in zip(both, left, strict=True)]
        means = (f"{np.concatenate(one).mean():.2f}" for one in (both, left))
        rows.append((f"`{blank}`", *means, show_mean(*gain)))
    return Rows(("blank", "both", "left", "left - both"), rows, n_labels=1)


def compare_places(out: Path, blank: str) -> Rows:
    both, left = (cut_answers(out, way, blank) for way in DIRECTIONS)
    rows = []
    for begin, end in itertools.pairwise(PLACES):
        ours, theirs = ([one[begin:end] for one in answers if len(one) > begin] for answers in (both, left))
        gain = [there - here for here, there in zip(ours, theirs, strict=True)]
        means = (f"{np.concatenate(one).mean():.2f}" for one in (ours, theirs))
        rows.append((f"{begin} to {end - 1}" if end - begin > 1 else str(begin), *means, show_mean(*gain)))
    return Rows(("tokens of the answer before it", "both", "left", "left - both"), rows, n_labels=1)


def cut_answers(out: Path, way: str, blank: str) -> list[Numbers]:
    """The nats of the tokens behind the first window, by the answers that are scored together."""
    task = load_task(WIKITEXT)
    assert task.window and task.stride, "the task says how it is cut"
    (nats,) = read_nats(out, WIKITEXT, way, blank)
    behind = nats[task.window - 1 :]  # the first token of the text has none
    return [behind[begin : begin + task.stride] for begin in range(0, len(behind), task.stride)]


def show_mean(*parts: Any) -> str:
    """The mean of numbers, and its interval; of several parts, these are drawn."""
    units: Sequence[Numbers] = parts if len(parts) > 1 else [np.array([one]) for one in parts[0]]
    sums, sizes = [one.sum() for one in units], [len(one) for one in units]
    found = estimate_mean(sums, sizes=sizes, rng=np.random.default_rng(0))
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--limit", type=int, help="of LAMBADA's passages")
    options = parser.parse_args()
    measure(options.model, options.data, options.out, options.limit)
    tables = (compare_words(options.out), compare_tokens(options.out), compare_places(options.out, "[gMASK]"))
    print("\n\n".join(table.to_markdown() for table in tables))


if __name__ == "__main__":
    main()
