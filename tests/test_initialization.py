"""A model started with neighbour heads looks beside its blanks before it has learnt anything."""

import pytest
import torch

from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.training.initial_weights import (
    ANSWER_OFFSETS,
    CONTEXT_OFFSETS,
    find_frequencies,
    neighbour_projection,
    sinusoids,
    start_with_neighbours,
)

TEXT, BLANK, ANSWER = 40, 17, 6  # tokens, place of the blank, tokens of its answer with <sop>


@pytest.fixture(scope="module")
def attentions() -> tuple[torch.Tensor, ...]:
    """Attention weights [1, N, T, T] of each layer over a text with one blank and its answer."""
    torch.manual_seed(0)
    model = GLMForConditionalGeneration(
        GLMConfig(vocab_size=128, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.0625)
    ).eval()
    start_with_neighbours(model)
    model.set_attn_implementation("eager")
    ids = torch.randint(16, 128, (1, TEXT + ANSWER))
    places = torch.cat((torch.arange(TEXT), torch.full((ANSWER,), BLANK)))
    within = torch.cat((torch.zeros(TEXT, dtype=torch.long), torch.arange(1, ANSWER + 1)))
    with torch.no_grad():
        out = model.glm(ids, layout=torch.stack((places, within))[None], output_attentions=True)
    return tuple(out.attentions)


@pytest.mark.parametrize(("head", "offset"), list(enumerate(CONTEXT_OFFSETS)))
def test_the_first_layer_looks_beside_the_blank(attentions: tuple[torch.Tensor, ...], head: int, offset: int) -> None:
    first_token = attentions[0][0, head, TEXT]  # [T]
    assert int(first_token.argmax()) == BLANK + offset
    assert float(first_token.max()) > 0.3


@pytest.mark.parametrize("offset", sorted({*CONTEXT_OFFSETS, *ANSWER_OFFSETS}))
def test_a_query_and_a_key_agree_most_at_their_offset(offset: int) -> None:
    frequencies = find_frequencies(64)
    pairs = torch.linspace(0, 63, 32).round().long()
    query, key = neighbour_projection(frequencies, pairs, offset, width=256, start=128)
    places = torch.zeros(60, 256)
    places[:, 128:] = sinusoids(60, frequencies)
    scores = (places @ query.T) @ (places @ key.T).T  # [query place, key place]
    inside = torch.arange(5, 55)
    assert torch.equal(scores[inside].argmax(-1), inside + offset)


def test_a_step_of_one_place_is_the_same_rotation_everywhere() -> None:
    waves = sinusoids(300, find_frequencies(64))
    likeness = waves @ waves.T
    for step in (1, 2, 5):
        along = likeness.diagonal(step)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-2)
    others = likeness - torch.diag(likeness.diagonal())
    assert float(others.max()) < 0.75 * float(likeness[0, 0])


def test_fewer_heads_or_layers_than_neighbours_will_do() -> None:
    config = GLMConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = GLMForConditionalGeneration(config)
    start_with_neighbours(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
