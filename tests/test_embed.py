"""Are the vectors of texts the hidden states they are said to be, whatever else is in the batch?"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gmask
from gmask.generation.embed import Embedder, as_floats, embed
from tiny_folder import CHINESE, ENGLISH, make_folder

TEXTS = ["The old man", CHINESE, "", "He [MASK] his dog [sMASK].", "It was [gMASK]", r"a \[MASK] day"]
POOLINGS = ["mean", "first", "last", "mask"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")), device="cpu")


def hidden_states(pair, text: str, layer: int) -> tuple[list[int], torch.Tensor]:
    """The ids of a text and the hidden states ``[T, H]`` of one layer, by transformers' own output."""
    ids = list(Embedder(*pair).read(text).ids)
    layout = torch.tensor([[[*range(len(ids))], [0] * len(ids)]])
    with torch.inference_mode():
        outputs = pair[0].glm(torch.tensor([ids]), layout=layout, use_cache=False, output_hidden_states=True)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    return ids, outputs.hidden_states[layer][0]


@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_each_pooling_is_what_it_says(pair, layer: int) -> None:
    for text in TEXTS[:2] + TEXTS[3:]:
        ids, states = hidden_states(pair, text, layer)
        assert ids[0] == pair[1].cls_token_id
        assert (ids[-1] == pair[1].eos_token_id) != text.endswith("[gMASK]")
        expected = {"mean": states.mean(0), "first": states[0], "last": states[-1]}
        blanks = [place for place, token in enumerate(ids) if token in (5, 6, 7)]
        if blanks:
            expected["mask"] = states[blanks[0]]
        for pooling, vector in expected.items():
            found = embed(*pair, [text], pooling=pooling, layer=layer, normalize=False)
            assert (found.shape, found.dtype) == ((1, 32), np.float32)
            np.testing.assert_allclose(found[0], vector.numpy(), atol=1e-5)


def test_a_text_without_a_blank_gets_one_at_its_end_for_mask_pooling(pair) -> None:
    found = embed(*pair, ["The old man", "The old man[MASK]"], pooling="mask")
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_size", [2, 16])
def test_padding_never_counts_and_a_batch_gives_what_single_runs_give(pair, pooling, batch_size: int) -> None:
    together = embed(*pair, TEXTS, pooling=pooling, batch_size=batch_size)
    alone = np.concatenate([embed(*pair, [text], pooling=pooling) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    raw = embed(*pair, TEXTS, pooling=pooling, normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), together, atol=1e-5)


words = st.lists(st.sampled_from([*ENGLISH.split(), *CHINESE[:8]]), max_size=8).map(" ".join)


@settings(deadline=None, max_examples=15)
@given(st.lists(words, min_size=1, max_size=6), st.sampled_from(POOLINGS), st.integers(1, 4))
def test_company_changes_no_vector(pair, texts: list[str], pooling, batch_size: int) -> None:
    forwards = embed(*pair, texts, pooling=pooling, batch_size=batch_size)
    backwards = embed(*pair, texts[::-1], pooling=pooling)
    np.testing.assert_allclose(forwards, backwards[::-1], atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_long_texts_are_refused_or_cut_behind_what_fits(pair, pooling) -> None:
    long = "river " * 200
    with pytest.raises(gmask.GmaskError, match="only 96 positions"):
        embed(*pair, [long], pooling=pooling)
    context = Embedder(*pair, pooling=pooling, truncate=True).read(long)
    assert len(context.ids) == 96
    assert context.ids[-1] == pair[1].eos_token_id
    full = Embedder(*pair).reader.read_any(long).context.ids
    kept = 94 if pooling == "mask" else 95
    assert context.ids[:kept] == full[:kept]
    assert [context.ids[place] for place in context.blanks] == ([5] if pooling == "mask" else [])


def test_blanks_keep_their_places_when_a_text_is_cut(pair) -> None:
    embedder = Embedder(*pair, pooling="mask", truncate=True)
    for text, blanks in (("a [MASK] b [sMASK] " + "c " * 200, [5, 6]), ("a [MASK] " + "c " * 200 + "[gMASK]", [5, 7])):
        context = embedder.read(text)
        assert len(context.ids) == 96
        assert [context.ids[place] for place in context.blanks] == blanks
    with pytest.raises(gmask.GmaskError, match="blank is beyond the 96 positions"):
        embedder.read("c " * 200 + "[MASK] d")


def test_half_precision_gives_float32_near_the_full_one(pair, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, tokenizer = gmask.load(make_folder(tmp_path_factory.mktemp("half")), device="cpu", dtype="bfloat16")
    found = embed(model, tokenizer, TEXTS)
    assert found.dtype == np.float32
    assert ((found * embed(*pair, TEXTS)).sum(1) > 0.98).all()


def test_shortened_decimals_are_the_same_float32() -> None:
    vector = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    assert np.array_equal(np.array(as_floats(vector), np.float32), vector)


def test_mistakes_are_named(pair) -> None:
    for keywords, message in (
        ({"pooling": "max"}, "one of mean, first, last, mask"),
        ({"layer": 3}, "from -3 to 2"),
        ({"layer": -4}, "from -3 to 2"),
        ({"batch_size": 0}, "at least 1"),
    ):
        with pytest.raises(gmask.GmaskError, match=message):
            embed(*pair, ["x"], **keywords)
    with pytest.raises(gmask.GmaskError, match="list of texts"):
        embed(*pair, "x")
    with pytest.raises(gmask.GmaskError, match=r"\[XMASK\]"):
        embed(*pair, ["a [XMASK]"])
    assert embed(*pair, []).shape == (0, 32)
