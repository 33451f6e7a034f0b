"""The recipes of sums and of sorting: what is asked, what is rewarded, and the table that compares models."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from gmask.recipes.feedback import load_feedback_recipe
from gmask.recipes.grpo import load_grpo_recipe
from gmask.recipes.ppo import load_ppo_recipe
from gmask.recipes.tuning import load_tuning_recipe
from gmask.training.rollouts import load_function

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(autouse=True)
def _beside_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))


def test_the_recipes_are_read() -> None:
    assert load_feedback_recipe(RECIPES / "dpo-sums.yaml", "dpo").trl == {"beta": 0.1}
    assert load_tuning_recipe(RECIPES / "finetune-sums.yaml").task == "chat/alpaca"
    assert load_grpo_recipe(RECIPES / "grpo-sorting.yaml").reward.function == "sorting:grade"
    assert load_ppo_recipe(RECIPES / "ppo-words.yaml").reward.function == "sorting:grade"


def test_a_sum_in_a_new_wording_is_new_and_its_answer_is_right() -> None:
    import sums
    from chat_data import asked_sum, make_sum

    rng, taught = random.Random(0), set()
    for _ in range(300):
        asked, (question, _answer) = make_sum(rng)
        taught.add(question["content"].translate(str.maketrans("", "", "0123456789")))
    found = set()
    for asked in [(7, "+", 85), (85, "-", 7), (9, "-", 9)] * 20:
        record = sums.reword(asked, rng)
        found.add(record["instruction"].translate(str.maketrans("", "", "0123456789")))
        assert asked_sum(record["instruction"]) == asked
        assert sums.grade_answer(record["instruction"], record["output"]) == 1.0
    assert len(found) == 2 * len(sums.NEW_WORDINGS) and not found & taught


def test_sums_are_asked_in_one_split_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sums
    from chat_data import asked_sum, read

    monkeypatch.setattr("sys.argv", ["sums.py", str(tmp_path), "--train", "50", "--validation", "30"])
    sums.main()
    names = ("train", "validation", "reworded")
    train, validation, reworded = (
        [asked_sum(record["instruction"]) for record in read(tmp_path / f"{name}.jsonl")] for name in names
    )
    assert (len(set(train)), len(set(validation))) == (50, 30) and reworded == validation
    assert not set(train) & set(validation)
    assert not {sign for _, sign, _ in [*train, *validation]} - {"+", "-"}
    assert not set(validation) & sums.drawn_for_tuning()


def test_answers_are_split_by_their_reward() -> None:
    from own_answers import load_reward, split_by_reward

    texts = ["3 + 4 = 8", "3 + 4 = 7", "seven", "3 + 4 = 7.", "3 + 4 = 7"]
    assert split_by_reward(load_reward("sums:grade"), "3 + 4 = ?", texts) == (
        ["3 + 4 = 7", "3 + 4 = 7."],
        ["3 + 4 = 8", "seven"],
    )


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("1, 2, 9, 30, 77.", 1.0), ("1、2、9、30、77。", 1.0), ("2, 1, 9, 30, 77.", 0.3), ("1, 2, 9, 30.", 0.0),
        ("1, 2, 9, 30, 77, 77.", 0.0), ("1 2 9 30 77.", 0.0), ("Sorted: 1, 2, 9, 30, 77.", 0.0), ("", 0.0),
    ],
)  # fmt: skip
def test_sorted_numbers_are_rewarded(answer: str, reward: float) -> None:
    prompt = "Sort these numbers from smallest to largest: 30, 2, 77, 1, 9."
    assert load_function("sorting:grade", [RECIPES])(prompts=[prompt], completions=[answer]) == [reward]


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("apple, bird, horse, ocean, river.", 1.0), ("bird, apple, horse, ocean, river.", 0.3),
        ("apple, bird, horse, ocean, ocean.", 0.0), ("apple, bird, horse, ocean, river", 0.0), ("1, 2, 3, 4, 5.", 0.0),
    ],
)  # fmt: skip
def test_sorted_words_are_rewarded(answer: str, reward: float) -> None:
    prompt = "Sort these words in alphabetical order: ocean, river, apple, horse, bird."
    assert load_function("sorting:grade", [RECIPES])(prompts=[prompt], completions=[answer]) == [reward]


def test_five_words_are_asked_once_and_not_those_that_were_taught(tmp_path: Path) -> None:
    import sorting

    taught = frozenset(sorting.WORDS[:5])
    (tmp_path / "word_tasks.train.jsonl").write_text(
        json.dumps({"instruction": f"{sorting.WORDING}{', '.join(sorting.WORDS[4::-1])}.", "output": "?"}) + "\n"
    )
    excluded = sorting.taught_lists(tmp_path)
    assert excluded == {taught}
    found = sorting.draw_words(400, excluded, random.Random(0))
    asked = [frozenset(sorting.items_of(record["instruction"])) for record in found]
    assert len({*asked, taught}) == 401 and {len(words) for words in asked} == {5}
    assert {sorting.grade_answer(record["instruction"], record["output"]) for record in found} == {1.0}


def test_the_table_counts_what_is_mended_and_broken_and_takes_the_mean_of_seeds() -> None:
    from compare_answers import render

    def run(greedy: list[int], sampled: float) -> dict[str, Any]:
        return {"greedy": [bool(one) for one in greedy], "sampled": sampled, "one_of_8": 1.0, "kl": sampled}

    rows = {
        "start": [run([1, 0, 0, 1], 0.5)],
        "tuned": [run([1, 1, 1, 1], 0.75), run([0, 1, 0, 1], 0.25)],
    }
    table = render("words", rows)
    assert table.columns[:2] == ["words (4 questions)", "seeds"]
    assert table.rows[0] == ["start", "1", "50.0", "15.0 to 85.0", "0", "0", "50.0", "100.0", "0.50"]
    assert table.rows[1] == ["tuned", "2", "75.0", "15.0 to 100.0", "2", "0", "50.0", "100.0", "0.50"]
