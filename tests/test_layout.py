"""Are places and visibility read off the tokens as the slow definitions say?"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from conftest import GMASK, MASK, PAD, SMASK, SOP
from gmask.models.layout import derive_layout, extend_layout, published_mask, visible_keys

BLANKS = [MASK, SMASK, GMASK]
GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Rows:
    """A batch of padded rows, each with one or more packed sequences."""

    input_ids: Tensor  # B T
    sequence_ids: Tensor  # B T, -1 at padding

    @property
    def is_real(self) -> Tensor:
        return self.sequence_ids >= 0

    @property
    def layout(self) -> Tensor:
        return derive_layout(self.input_ids, blank_token_ids=BLANKS, sop_token_id=SOP, sequence_ids=self.sequence_ids)


WORD = st.integers(min_value=16, max_value=30)
BLANK = st.sampled_from(BLANKS)


@st.composite
def sequences(draw: st.DrawFn) -> list[int]:
    """A context, and answers to some of its blanks; tokens of an answer may look like blanks."""
    context = draw(st.lists(st.one_of(WORD, BLANK), min_size=1, max_size=8))
    if any(token in BLANKS for token in context):
        answers = draw(st.lists(st.lists(st.one_of(WORD, WORD, BLANK), max_size=4), max_size=4))
    else:
        answers = []
    return context + [token for answer in answers for token in (SOP, *answer)]


@st.composite
def batches(draw: st.DrawFn, *, most_packed: int = 3) -> Rows:
    packed = draw(st.lists(st.lists(sequences(), min_size=1, max_size=most_packed), min_size=1, max_size=3))
    left = draw(st.booleans())
    width = max(sum(map(len, row)) for row in packed) + draw(st.integers(0, 2))
    ids, sequence_ids = [], []
    for row in packed:
        padding = width - sum(map(len, row))
        tokens = [token for sequence in row for token in sequence]
        belongs = [index for index, sequence in enumerate(row) for _ in sequence]
        ids.append([PAD] * padding + tokens if left else tokens + [PAD] * padding)
        sequence_ids.append([-1] * padding + belongs if left else belongs + [-1] * padding)
    return Rows(torch.tensor(ids), torch.tensor(sequence_ids))


def plain_layout(ids: list[int], sequence_ids: list[int]) -> list[list[int]]:
    """The layout of one row, token by token."""
    context_places, answer_places = [], []
    sequence, place, blanks, sops, opened = None, 0, [], 0, 0
    for column, (token, belongs) in enumerate(zip(ids, sequence_ids, strict=True)):
        if belongs < 0:
            context_places.append(0)
            answer_places.append(0)
            continue
        if belongs != sequence:
            sequence, place, blanks, sops = belongs, 0, [], 0
        if token == SOP:
            sops, opened = sops + 1, column
        if sops:
            context_places.append(blanks[min(sops, len(blanks)) - 1])
            answer_places.append(column - opened + 1)
        else:
            if token in BLANKS:
                blanks.append(place)
            context_places.append(place)
            answer_places.append(0)
            place += 1
    return [context_places, answer_places]


def plain_visible(layout: Tensor, sequence_ids: Tensor) -> Tensor:
    """The visibility ``[B, T, T]`` of the paper: all of the context, and the answer so far."""
    places, belongs = layout[:, 1].tolist(), sequence_ids.tolist()
    length = layout.shape[-1]
    return torch.tensor(
        [
            [
                [
                    belongs[row][query] == belongs[row][key]
                    and (places[row][key] == 0 or (places[row][query] > 0 and key <= query))
                    for key in range(length)
                ]
                for query in range(length)
            ]
            for row in range(len(layout))
        ]
    )


@given(batches())
@settings(deadline=None, max_examples=50)
def test_derive_layout_equals_its_plain_twin(rows: Rows) -> None:
    expected = [
        plain_layout(ids, belongs)
        for ids, belongs in zip(rows.input_ids.tolist(), rows.sequence_ids.tolist(), strict=True)
    ]
    assert rows.layout.tolist() == expected


@given(batches(most_packed=1))
@settings(deadline=None, max_examples=50)
def test_a_padding_mask_says_the_same_as_sequence_ids(rows: Rows) -> None:
    by_mask = derive_layout(
        rows.input_ids, blank_token_ids=BLANKS, sop_token_id=SOP, attention_mask=rows.is_real.long()
    )
    assert torch.equal(by_mask, rows.layout)


@given(batches())
@settings(deadline=None, max_examples=50)
def test_a_packed_or_padded_sequence_keeps_the_layout_that_it_has_alone(rows: Rows) -> None:
    for ids, belongs, layout in zip(rows.input_ids, rows.sequence_ids, rows.layout, strict=True):
        for sequence in range(int(belongs.max()) + 1):
            columns = belongs == sequence
            alone = derive_layout(ids[None, columns], blank_token_ids=BLANKS, sop_token_id=SOP)
            assert torch.equal(alone[0], layout[:, columns])


@pytest.mark.parametrize(
    ("ids", "places", "answer_places"),
    [
        (
            [2, 20, MASK, 21, GMASK, SOP, 30, 31, SOP, 32],
            [0, 1, 2, 3, 4, 2, 2, 2, 4, 4],
            [0] * 5 + [1, 2, 3, 1, 2],
        ),
        (
            [2, MASK, SOP, 30, SOP, 31, SOP],
            [0, 1, 1, 1, 1, 1, 1],
            [0, 0, 1, 2, 1, 2, 1],
        ),  # more answers than blanks
        (
            [2, SMASK, SOP, MASK, SOP],
            [0, 1, 1, 1, 1],
            [0, 0, 1, 2, 1],
        ),  # a blank in an answer is a word like others
        ([2, 20, MASK], [0, 1, 2], [0, 0, 0]),  # a context alone
    ],
)
def test_derive_layout_by_hand(ids: list[int], places: list[int], answer_places: list[int]) -> None:
    layout = derive_layout(torch.tensor([ids]), blank_token_ids=BLANKS, sop_token_id=SOP)
    assert layout.tolist() == [[places, answer_places]]
    assert layout.dtype == torch.int64


def test_derive_layout_equals_the_published_positions() -> None:
    thudm = load_file(GOLDEN / "thudm-glm-tiny" / "tensors.safetensors")
    ids = json.loads((GOLDEN / "thudm-glm-tiny" / "case.json").read_text("utf-8"))["tokenizer"]["ids"]
    is_real = thudm["gpt.loss_mask"].flip(-1).cummax(-1).values.flip(-1)
    layout = derive_layout(
        thudm["gpt.text"], blank_token_ids=[ids["gMASK"]], sop_token_id=ids["sop"], attention_mask=is_real
    )
    assert torch.equal(layout, thudm["gpt.position_id"] * is_real[:, None])

    case = json.loads((GOLDEN / "hf-glm-tiny" / "case.json").read_text("utf-8"))
    (train,) = (item for item in case["forward_cases"] if item["tag"] == "train_right")
    input_ids = torch.tensor(train["inputs"]["input_ids"]["value"])
    published = torch.tensor(train["inputs"]["position_ids"]["value"])
    is_real = torch.ones_like(input_ids)
    context_mask = torch.tensor(train["encoded"]["attention_mask"])
    is_real[:, : context_mask.shape[1]] = context_mask
    blanks = [case["special_ids"][f"{name}_token_id"] for name in ("mask", "smask", "gmask")]
    layout = derive_layout(
        input_ids,
        blank_token_ids=blanks,
        sop_token_id=case["special_ids"]["sop_token_id"],
        attention_mask=is_real,
    )
    assert torch.equal(layout, published * is_real[:, None])  # padding takes no place here, and an unused one there


@pytest.mark.parametrize(
    ("ids", "sequence_ids"),
    [
        ([2, 20, SOP], None),
        ([2, SOP, MASK], None),  # a blank behind <sop> is part of the answer
        ([2, MASK, 2, 20, SOP], [0, 0, 1, 1, 1]),  # another sequence has the blank
        ([MASK, 2, 20, SOP], [-1, 0, 0, 0]),  # padding has it
    ],
)
def test_an_answer_without_a_blank_is_an_error(ids: list[int], sequence_ids: list[int] | None) -> None:
    belongs = None if sequence_ids is None else torch.tensor([sequence_ids])
    with pytest.raises(ValueError, match="put the blank into the context"):
        derive_layout(torch.tensor([ids]), blank_token_ids=BLANKS, sop_token_id=SOP, sequence_ids=belongs)


@given(batches(most_packed=1), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_extend_layout_counts_on_as_if_derived(rows: Rows, new_tokens: int) -> None:
    first, last = torch.full((len(rows.input_ids), 1), MASK), torch.full((len(rows.input_ids), 1), SOP)
    ids = torch.cat((first, rows.input_ids, last), dim=1)
    longer = torch.cat((ids, torch.full((len(ids), new_tokens), 20)), dim=1)
    layout = derive_layout(ids, blank_token_ids=BLANKS, sop_token_id=SOP)
    expected = derive_layout(longer, blank_token_ids=BLANKS, sop_token_id=SOP)
    assert torch.equal(extend_layout(layout, new_tokens), expected)


@given(batches())
@settings(deadline=None, max_examples=40)
def test_visible_keys_equals_its_plain_twin(rows: Rows) -> None:
    layout, length = rows.layout, rows.input_ids.shape[1]
    visible = visible_keys(layout[:, 1] == 0, key_length=length, sequence_ids=rows.sequence_ids)
    expected = plain_visible(layout, rows.sequence_ids)
    assert visible.shape == (len(layout), 1, length, length)
    assert torch.equal(visible[:, 0], expected)


@given(batches(most_packed=1), st.data())
@settings(deadline=None, max_examples=40)
def test_visible_keys_continues_a_cache(rows: Rows, data: st.DataObject) -> None:
    layout, length = rows.layout, rows.input_ids.shape[1]
    past = data.draw(st.integers(0, length - 1))
    room = data.draw(st.integers(0, 3))  # of a static cache
    expected = torch.nn.functional.pad(plain_visible(layout, rows.sequence_ids), (0, room))[:, past:]
    queries = rows.is_real[:, past:]
    for past_length in (past, torch.tensor(past)):
        visible = visible_keys(
            layout[:, 1, past:] == 0,
            key_length=length + room,
            past_length=past_length,
            key_padding=rows.is_real,
        )
        assert torch.equal(visible[:, 0][queries], expected[queries])


def test_published_masks_by_hand() -> None:
    def seen(mask: Tensor, *, query_length: int, past_length: int = 0) -> list[list[int]]:
        additive = published_mask(mask, query_length=query_length, past_length=past_length, dtype=torch.float32)
        assert set(additive.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
        return (additive == 0).int()[:, 0].tolist()

    assert seen(torch.tensor(2), query_length=3) == [[[1, 1, 0], [1, 1, 0], [1, 1, 1]]]
    assert seen(torch.tensor([0]), query_length=2, past_length=2) == [[[1, 1, 1, 0], [1, 1, 1, 1]]]
    assert seen(torch.tensor([1, 2]), query_length=2) == [[[1, 0], [1, 1]], [[1, 1], [1, 1]]]
    assert seen(torch.tensor([1, 1, 0])[None, None, None], query_length=3) == [[[1, 1, 0]]]
    given_mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]])[None, None]
    assert seen(given_mask, query_length=2, past_length=1) == [[[1, 1, 0], [1, 0, 1]]]
    with pytest.raises(ValueError, match="3 dimensions"):
        published_mask(torch.ones(1, 2, 2), query_length=2, past_length=0, dtype=torch.float32)
