"""Does a batch hold its examples whole, each apart from its neighbours?"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmask.errors import GmaskError
from gmask.infilling.blanks import BlankTokens, InfillingExample
from gmask.infilling.collator import collate
from gmask.infilling.objectives import Mixture

SPECIAL = BlankTokens(pad=0, eos=1, cls=2, mask=5, smask=6, gmask=7, sop=8, eop=9)
MIXTURE = Mixture(SPECIAL, np.isin(np.arange(1000), [16, 17]))


def make(length: int, seed: int) -> InfillingExample:
    rng = np.random.default_rng(seed)
    example = MIXTURE.sample([SPECIAL.cls, *rng.integers(18, 900, length), SPECIAL.eos], rng, "document")
    assert example is not None
    return example


examples = st.builds(make, st.integers(4, 30), st.integers(0, 99))
batches = st.lists(st.lists(examples, max_size=4), min_size=1, max_size=4)


@given(batches, st.integers(0, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_each_example_comes_back_whole(rows: list[list[InfillingExample]], spare: int) -> None:
    longest = max(sum(len(example.input_ids) for example in row) for row in rows)
    batch = collate(rows, row_length=longest + spare, pad_id=SPECIAL.pad)
    assert batch["input_ids"].shape == (len(rows), longest + spare)
    assert batch["layout"].shape == (len(rows), 2, longest + spare)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    for b, row in enumerate(rows):
        sequence_ids = batch["sequence_ids"][b]
        for i, example in enumerate(row):
            mine = sequence_ids == i
            np.testing.assert_array_equal(batch["input_ids"][b, mine], example.input_ids)
            np.testing.assert_array_equal(batch["labels"][b, mine], example.labels)
            np.testing.assert_array_equal(batch["layout"][b][:, mine], example.layout)
        padding = sequence_ids == -1
        used = sum(len(example.input_ids) for example in row)
        assert padding.tolist() == [False] * used + [True] * (longest + spare - used)
        assert sequence_ids[:used].tolist() == sorted(sequence_ids[:used].tolist())
        assert (batch["input_ids"][b, padding] == SPECIAL.pad).all()
        assert (batch["labels"][b, padding] == -100).all()
        assert (batch["layout"][b][:, padding] == 0).all()


def test_without_a_row_length_the_longest_row_decides() -> None:
    long, short = make(20, 0), make(5, 0)
    batch = collate([[long], [short]], row_length=None, pad_id=SPECIAL.pad)
    assert batch["input_ids"].shape == (2, len(long.input_ids))


def test_too_long_a_row_is_an_error_with_both_counts() -> None:
    example = make(20, 0)
    with pytest.raises(GmaskError, match=rf"{len(example.input_ids)} tokens do not fit in a row of 8"):
        collate([[example]], row_length=8, pad_id=SPECIAL.pad)
