"""Does the table of both directions compare the same words and tokens?"""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from evaluation_data import write_lines

RECIPE = Path(__file__).parents[1] / "recipes" / "both_sides.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("both_sides", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_scores(recipe: ModuleType, out: Path, task: str, way: str, scores: list[list[float]]) -> None:
    for blank in recipe.BLANKS:
        name = recipe.folder_of(recipe.name_of(task, way, blank))
        write_lines(out / name / "predictions.jsonl", [{"scores": one} for one in scores])


def test_words_are_compared_by_the_nats_of_all_their_tokens(recipe: ModuleType, tmp_path: Path) -> None:
    write_scores(recipe, tmp_path, recipe.LAMBADA, "both", [[-1.0, -1.0], [-4.0]])
    write_scores(recipe, tmp_path, recipe.LAMBADA, "left", [[-2.0, -3.0], [-3.0]])
    *_, last = recipe.compare_words(tmp_path).to_markdown().splitlines()
    # 2 and 4 nats against 5 and 3; the interval is between the differences 3 and -1
    assert last == "| `[gMASK]` | 3.00 | 4.00 | 1.00 [-1.00, 3.00] | 50 % |"


def test_tokens_are_compared_behind_the_first_window_and_by_their_place(recipe: ModuleType, tmp_path: Path) -> None:
    first, answers = [-99.0] * 510, 3  # a window of 511 tokens, of which the first has no score; then steps of 256
    both, left = [-1.0] * 256, [-2.0] + [-1.5] * 255
    write_scores(recipe, tmp_path, recipe.WIKITEXT, "both", [first + both * answers])
    write_scores(recipe, tmp_path, recipe.WIKITEXT, "left", [first + left * answers])
    *_, last = recipe.compare_tokens(tmp_path).to_markdown().splitlines()
    assert last == "| `[gMASK]` | 1.00 | 1.50 | 0.50 [0.50, 0.50] |"
    places = recipe.compare_places(tmp_path, "[gMASK]").to_markdown().splitlines()[2:]
    assert places[0] == "| 0 | 1.00 | 2.00 | 1.00 [1.00, 1.00] |"
    assert places[-1] == "| 128 to 255 | 1.00 | 1.50 | 0.50 [0.50, 0.50] |"


def test_an_interval_is_of_the_units_that_are_drawn(recipe: ModuleType) -> None:
    rng = np.random.default_rng(1)
    shifts = rng.normal(size=40)
    apart = recipe.show_mean(np.repeat(shifts, 50))  # as if each token were a draw of its own
    together = recipe.show_mean(*[np.full(50, shift) for shift in shifts])
    widths = [float(text.split(", ")[1][:-1]) - float(text.split("[")[1].split(",")[0]) for text in (apart, together)]
    assert apart.split()[0] == together.split()[0] and widths[1] > 4 * widths[0]
