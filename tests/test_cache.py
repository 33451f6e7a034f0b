"""Does the growing cache hold what transformers' own holds, whatever is done to it?"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from gmask.models.cache import ROOM, GrowingCache, capacity_for

LAYERS, HEADS, SIZE = 2, 3, 4
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from([1, 1, 1, 2, 50, ROOM - 1, ROOM, ROOM + 1])),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        st.tuples(st.just("reorder"), st.permutations([0, 1])),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=12,
)


def make_cache() -> GrowingCache:
    return GrowingCache(SimpleNamespace(num_hidden_layers=LAYERS))


def rows_of(cache: DynamicCache) -> int:
    return len(cache.layers[0].keys) if cache.get_seq_length() else 2


@settings(max_examples=100, deadline=None)
@given(steps=steps)
def test_it_holds_what_a_dynamic_cache_holds(steps: list[tuple[str, object]]) -> None:
    ours, plain = make_cache(), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for name, value in steps:
        rows = rows_of(ours)
        if name == "add":
            for layer in range(LAYERS):
                states = [torch.randn(rows, HEADS, value, SIZE, generator=generator) for _ in range(2)]
                for found, expected in zip(ours.update(*states, layer), plain.update(*states, layer), strict=True):
                    assert torch.equal(found, expected)
        elif ours.get_seq_length() > 4 or name == "reset":
            for cache in (ours, plain):
                change(cache, name, value, rows)
        assert ours.get_seq_length() == plain.get_seq_length()
    if ours.get_seq_length():
        for found, expected in zip(ours.layers, plain.layers, strict=True):
            assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)


def change(cache: DynamicCache, name: str, value: object, rows: int) -> None:
    if name == "crop":
        cache.crop(-value)
    elif name == "select":
        cache.batch_select_indices(torch.tensor([index % rows for index in value]))
    elif name == "reorder":
        cache.reorder_cache(torch.tensor([value[index % 2] % rows for index in range(rows)]))
    elif name == "repeat" and rows <= 4:
        cache.batch_repeat_interleave(value)
    elif name == "reset":
        cache.reset()


def test_a_new_token_stays_in_the_room_that_is_there() -> None:
    cache = make_cache()
    one = torch.randn(1, HEADS, 1, SIZE)
    places = {cache.update(one, one, 0)[0].data_ptr() for _ in range(ROOM - 1)}
    assert len(places) == 1
    assert cache.layers[0].keys.stride(1) == capacity_for(ROOM - 1) * SIZE


def test_selecting_leaves_the_other_copy_alone() -> None:
    cache = make_cache()
    states = torch.randn(2, HEADS, 5, SIZE)
    cache.update(states, states, 0)
    before: Tensor = cache.layers[0].keys
    kept = before.clone()
    cache.batch_select_indices(torch.tensor([1, 1]))
    one = torch.randn(2, HEADS, 1, SIZE)
    cache.update(one, one, 0)
    assert torch.equal(before, kept)


@pytest.mark.parametrize("has_room", [False, True])
def test_gradients_flow(has_room: bool) -> None:
    cache = make_cache()
    if has_room:
        with torch.no_grad():
            cache.update(torch.randn(1, HEADS, 5, SIZE), torch.randn(1, HEADS, 5, SIZE), 0)
    first, second = (torch.randn(1, HEADS, 2, SIZE, requires_grad=True) for _ in range(2))
    cache.update(first, first, 0)
    keys, values = cache.update(second, second, 0)
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(first.grad, torch.full_like(first, 3)) and torch.equal(second.grad, torch.full_like(second, 3))


def test_without_spare_room_no_more_is_kept_than_keys_and_values() -> None:
    cache = GrowingCache(SimpleNamespace(num_hidden_layers=1), spare=False)
    joined = torch.randn(2, 5, 3, HEADS, SIZE)  # queries, keys and values of one product
    _, keys, values = joined.permute(2, 0, 3, 1, 4)
    with torch.inference_mode():
        held = cache.update(keys, values, 0)
    for states, expected in zip(held, (keys, values), strict=True):
        assert torch.equal(states, expected)
        assert states.untyped_storage().nbytes() == states.nbytes
