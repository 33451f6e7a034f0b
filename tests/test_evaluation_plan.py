"""Do evaluations stay a minor share of a run whose recipe does not say how often and on what it is evaluated?"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmask.training import finetune
from gmask.training.run_folder import read_metrics
from gmask.training.validation import EVALUATION_SHARE, FEWEST, plan_evaluations
from tuning_data import CHAT, write_recipe

counts = st.integers(1, 10_000)


@given(samples=counts, steps=counts, per_step=st.integers(1, 512), cost=st.sampled_from([1, 8]))
def test_the_evaluations_of_a_run_cost_their_share_at_most(samples: int, steps: int, per_step: int, cost: int) -> None:
    every, scored = plan_evaluations(None, None, samples=samples, steps=steps, samples_per_step=per_step, cost=cost)
    assert 1 <= every <= steps and min(samples, FEWEST) <= scored <= samples
    between = steps // every - (steps % every == 0)  # the one after the last step is made in any case
    assert between * scored * cost <= EVALUATION_SHARE * steps * per_step


@pytest.mark.parametrize(
    ("every", "limit", "expected"),
    [
        (3, None, (3, 5000)),  # what is asked for is done
        (3, 100, (3, 100)),
        (None, 100, (100, 100)),
        (None, 8, (100, 8)),
        (None, None, (100, 200)),
    ],
)
def test_what_a_recipe_says_counts(every: int | None, limit: int | None, expected: tuple[int, int]) -> None:
    assert plan_evaluations(every, limit, samples=5000, steps=1000, samples_per_step=8, cost=1) == expected


def test_a_short_run_that_writes_texts_is_evaluated_after_its_last_step(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, task="chat/alpaca", records=CHAT, forgetting={"skip": True}, optimization={"evaluate_every": None}
    )
    finetune.run_finetuning(path)
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [record["step"] for record in records if "validation" in record] == [4]
