"""Does the page of results mark those scores, and only those, that are better than chance?"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from gmask.evaluation.results import EvaluationReport, RunRecord, TaskResult, TaskScore

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "evaluation-results.md"
RUN = RunRecord(
    model="bundled", adapter=None, weights={"model.safetensors": "a" * 64}, dtype="float32", device="CPU", processes=1,
    threads=1, versions={"gmask": "0.1.0"}, commit=None, started="2026-01-01",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluation_page", ROOT / "recipes" / "evaluation_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_report(**scores: TaskScore) -> EvaluationReport:
    task = TaskResult(name="mine", task="mine", kind="cloze", samples=50, scores=scores, chance=0.5,
                      majority={"accuracy": 60.0, "f1": 0.0})  # fmt: skip
    return EvaluationReport(run=RUN, tasks=[task])


@pytest.mark.parametrize(
    ("metric", "score", "is_bold"),
    [
        ("accuracy", TaskScore(70.0, 61.0, 80.0), True),
        ("accuracy", TaskScore(70.0, 59.0, 80.0), False),  # above guessing alone
        ("f1", TaskScore(5.0, 1.0, 9.0), True),
        ("bleu-4", TaskScore(5.0, 4.0, 6.0), True),  # above the random model's 1 to 3
        ("bleu-4", TaskScore(5.0, 3.0, 6.0), False),
        ("nats", TaskScore(0.5, 0.4, 0.6), True),  # less is better
        ("nats", TaskScore(5.0, 4.0, 6.0), False),
        ("perplexity", TaskScore(0.5), False),  # one document
    ],
)
def test_what_is_better_than_chance_is_bold(recipe: ModuleType, metric: str, score: TaskScore, is_bold: bool) -> None:
    ours, theirs = make_report(**{metric: score}), make_report(**{metric: TaskScore(2.0, 1.0, 3.0)})
    page = recipe.render_page(ours, theirs)
    assert (f"**{score.value:.2f}**" in page) == is_bold
    assert (
        f"Of 1 scores {int(is_bold)} are better than chance by their interval: {'mine' if is_bold else 'none'}." in page
    )


def test_an_f1_of_labels_counts_where_accuracy_does(recipe: ModuleType) -> None:
    high, low, theirs = TaskScore(90.0, 80.0, 99.0), TaskScore(50.0, 40.0, 60.0), TaskScore(2.0, 1.0, 3.0)
    chance = make_report(accuracy=theirs, f1=theirs)
    assert "**90.00**" not in recipe.render_page(make_report(accuracy=low, f1=high), chance)
    assert recipe.render_page(make_report(accuracy=high, f1=high), chance).count("**90.00**") == 2


def test_the_page_in_the_documentation_is_of_this_form(recipe: ModuleType) -> None:
    page, written = (
        recipe.render_page(*[make_report(accuracy=TaskScore(1.0, 0.0, 2.0))] * 2, ["| task |"]),
        PAGE.read_text("utf-8"),
    )
    headings = re.findall(r"^#.*", page, re.M)
    assert re.findall(r"^#.*", written, re.M) == headings
    assert page.splitlines()[:5] == written.splitlines()[:5]
    suite = {str(entry.task) for entry in recipe.load_suite("offline")}
    assert suite == set(re.findall(r"^\| ([\w/-]+) \| [\w-]+ \| [\d,]+ \|", written, re.M))
