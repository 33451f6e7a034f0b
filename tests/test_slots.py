"""Do slots keep each row's keys and values, whatever rows come and go?"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmask.models.cache import ROOM, GrowingCache, SlotCache, quantize_states, total_positions

LAYERS, HEADS, SIZE = 2, 3, 4


class Shape:
    num_hidden_layers = LAYERS


def read(lengths: list[int], generator: torch.Generator) -> tuple[GrowingCache, Tensor | None]:
    """What a prefill of contexts of these lengths leaves, padded on the left."""
    width = max(lengths)
    cache = GrowingCache(Shape())  # type: ignore[arg-type]
    for layer in range(LAYERS):
        states = [torch.randn(len(lengths), HEADS, width, SIZE, generator=generator) for _ in range(2)]
        cache.update(*states, layer)
    if len(set(lengths)) == 1:
        return cache, None
    return cache, torch.arange(width) >= torch.tensor([width - length for length in lengths])[:, None]


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.lists(st.integers(1, 2 * ROOM), min_size=1, max_size=3)),
            st.tuples(st.just("remove"), st.integers(0, 9)),
            st.tuples(st.just("decode"), st.integers(1, 3)),
        ),
        max_size=10,
    ),
    is_int8=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows_hold_what_was_put_in(steps: list[tuple[str, object]], is_int8: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots, expected = SlotCache(LAYERS, is_int8=is_int8), list[list[Tensor]]()  # of each row: the keys of all layers
    for name, value in steps:
        if name == "add":
            cache, is_real = read(value, generator)
            copies = [1 + row % 2 for row in range(len(value))]
            for row, length in enumerate(value):
                own = [layer.keys[row, :, max(value) - length :].clone() for layer in cache.layers]
                expected += [list(own) for _ in range(copies[row])]
            slots.add(cache, is_real, copies=copies, room=max(value) + 4)
            assert not any(layer.keys.numel() for layer in cache.layers), "both copies are in memory for one layer only"
        elif name == "remove" and expected:
            row = value % len(expected)
            slots.remove(row)
            expected[row] = expected[-1]
            expected.pop()
        elif name == "decode" and expected:
            decode(slots, expected, generator)
        assert slots.lengths == [keys[0].shape[1] for keys in expected]
    for row, keys in enumerate(expected):
        for layer, own in zip(slots.layers, keys, strict=True):
            held = quantize_states(own[None])[0] if is_int8 else own
            assert torch.equal(layer.keys[row, :, : own.shape[1]], held)


def decode(slots: SlotCache, expected: list[list[Tensor]], generator: torch.Generator) -> None:
    wanted = max(keys[0].shape[1] for keys in expected) + 1
    visible = slots.begin_step(torch.device("cpu"))  # slots grow as they fill
    seen = [wanted] * len(expected) if visible is None else visible.sum(-1).tolist()
    assert seen == [keys[0].shape[1] + 1 for keys in expected]
    for index in range(LAYERS):
        new = torch.randn(len(expected), HEADS, 1, SIZE, generator=generator)
        keys, _ = slots.update(new, new, index)
        assert keys.shape[2] == wanted == slots.get_mask_sizes(1, index)[0]
        for row, own in enumerate(expected):
            own[index] = torch.cat((own[index], new[row]), dim=1)
    slots.end_step()


def test_positions_that_are_not_filled_hold_numbers() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # new memory is then NaN where it is not set
    try:
        slots = SlotCache(LAYERS)
        cache, is_real = read([3, 5], torch.Generator().manual_seed(0))
        slots.add(cache, is_real, copies=[1, 1], room=9)
        for count in (2, 2, 3):
            if count == 3:
                slots.add(*read([40], torch.Generator().manual_seed(0)), copies=[1])
            slots.begin_step(torch.device("cpu"))
            for index in range(LAYERS):
                new = torch.zeros(count, HEADS, 1, SIZE)
                assert all(states.isfinite().all() for states in slots.update(new, new, index))
            slots.end_step()
    finally:
        torch.use_deterministic_algorithms(before)


def test_rows_take_as_many_positions_as_the_longest() -> None:
    assert total_positions([]) == 0
    assert total_positions([1, ROOM + 1]) == 2 * 2 * ROOM


def test_the_first_context_is_not_copied() -> None:
    generator = torch.Generator().manual_seed(0)
    cache, _ = read([5], generator)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    slots = SlotCache(LAYERS)
    slots.add(cache, None, copies=[1])
    assert [slot.keys.data_ptr() for slot in slots.layers] == places
    larger, _ = read([5], generator)
    roomy = SlotCache(LAYERS)
    roomy.add(larger, None, copies=[1], room=ROOM + 1)
    assert all(slot.keys.shape[2] > ROOM for slot in roomy.layers), "what does not fit is copied"
