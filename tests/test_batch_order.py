"""Every sample has its turn, every process its share of the same steps, and a run can be entered anywhere."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmask.errors import GmaskError
from gmask.training.examples import BatchOrder, steps_of


@settings(deadline=None)  # the first example loads modules
@given(
    samples=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    processes=st.integers(1, 4),
    grouped=st.booleans(),
    seed=st.integers(0, 3),
)
def test_processes_share_the_steps_of_one(
    samples: int, batch_size: int, accumulation: int, processes: int, grouped: bool, seed: int
) -> None:
    order = dict(
        lengths=[3 + (7 * number) % 11 for number in range(samples)],
        steps=7, batch_size=batch_size, accumulation=accumulation, seed=seed, length_grouped=grouped,
    )  # fmt: skip
    if batch_size * accumulation % processes:
        with pytest.raises(GmaskError, match=f"a multiple of {processes}"):
            BatchOrder(**order, processes=processes)
        return
    alone = BatchOrder(**order)
    shared = [BatchOrder(**order, processes=processes, process=process) for process in range(processes)]
    divided = [samples_by_step(one) for one in shared]
    for number, step in enumerate(samples_by_step(alone)):
        assert sorted(sample for part in divided for sample in part[number]) == sorted(step)
    for one in (alone, *shared):
        batches = list(one)
        assert len(batches) == len(one)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        for step in (1, 4, 7):
            assert list(one.after(step)) == batches[step * one.passes :], "a run can be entered at any step"


def samples_by_step(order: BatchOrder) -> list[list[int]]:
    batches = list(order)
    return [
        [sample for batch in batches[start : start + order.passes] for sample in batch]
        for start in range(0, len(batches), order.passes)
    ]


@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_takes_each_sample_once_in_a_new_order(grouped: bool) -> None:
    lengths = [number % 5 + 1 for number in range(12)]
    order = BatchOrder(lengths, steps=9, batch_size=2, accumulation=2, seed=0, length_grouped=grouped)
    seen = [sample for batch in order for sample in batch]
    epochs = [seen[start : start + 12] for start in range(0, 36, 12)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1]
    assert list(order) == list(order)


def test_grouping_puts_like_lengths_together() -> None:
    lengths = [(37 * number) % 101 for number in range(400)]

    def spread(*, grouped: bool) -> float:
        order = BatchOrder(lengths, steps=40, batch_size=10, accumulation=1, seed=0, length_grouped=grouped)
        widths = [max(lengths[s] for s in batch) - min(lengths[s] for s in batch) for batch in order]
        return sum(widths) / len(widths)

    assert spread(grouped=True) < spread(grouped=False) / 4


def test_steps_cover_the_epochs() -> None:
    assert steps_of(1, 32, samples_per_step=8) == 4
    assert steps_of(1, 33, samples_per_step=8) == 5
    assert steps_of(0.1, 10, samples_per_step=8) == 1
    assert steps_of(2.5, 32, samples_per_step=8) == 10
