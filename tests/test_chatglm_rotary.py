"""Where do ChatGLM's queries and keys turn to beyond the places that it was trained on, and in half precision?"""

import copy

import pytest
import torch

from gmask.models.chatglm import ChatGLMConfig, inverse_frequencies, rotary_tables
from test_chatglm_parity import TINY, load_chatglm, read_case

TRAINED = 2048
LAYOUT = torch.tensor([[[0, 1, 2, 3, 2, 2], [0, 0, 0, 0, 1, 2]]])
IDS = torch.tensor([[20, 21, 513, 22, 516, 30]])


@pytest.mark.parametrize("stretch", [2.0, 3.5])
@pytest.mark.parametrize("two_dimensional", [True, False])
def test_stretched_places_beyond_the_trained_ones_get_angles_within_them(stretch: float, two_dimensional: bool) -> None:
    model = load_chatglm(rotary_stretch=stretch, position_encoding_2d=two_dimensional).transformer
    reach = int(stretch * TRAINED)
    places = torch.tensor([[[TRAINED, TRAINED + 1, reach - 1], [0, TRAINED + 7, reach - 2]]])
    groups = 2 if two_dimensional else 1
    cosines, sines = model.rotary_tables(places, torch.float32)
    frequencies = inverse_frequencies(model.config.head_dim // groups).double()
    for group in range(groups):
        for column, place in enumerate(places[0, group].tolist()):
            assert place / stretch < TRAINED
            angles = (place / stretch * frequencies).repeat(2)
            assert torch.allclose(cosines[0, 0, column, group].double(), angles.cos(), atol=2e-4)
            assert torch.allclose(sines[0, 0, column, group].double(), angles.sin(), atol=2e-4)
    plain, _ = load_chatglm(position_encoding_2d=two_dimensional).transformer.rotary_tables(places, torch.float32)
    assert (plain - cosines).abs().max() > 0.1, "without it the angles go on"


@torch.no_grad()
def test_a_text_whose_places_are_as_many_times_wider_gives_the_same_logits() -> None:
    far = LAYOUT + torch.tensor([[[TRAINED], [0]]])
    expected = load_chatglm()(IDS, layout=far).logits
    assert torch.allclose(load_chatglm(rotary_stretch=4.0)(IDS, layout=4 * far).logits, expected, atol=1e-5)
    assert not torch.allclose(load_chatglm()(IDS, layout=4 * far).logits, expected, atol=1e-2)


def test_float32_tables_keep_far_places_apart_in_half_precision() -> None:
    frequencies = inverse_frequencies(32)
    places = torch.arange(TRAINED - 64, TRAINED)[None, None]
    exact = torch.stack(rotary_tables(places, frequencies, dtype=torch.float32))
    half = torch.stack(rotary_tables(places, frequencies, dtype=torch.float16)).float()
    assert exact.to(torch.float16).float().sub(exact).abs().max() < 1e-3 < 0.1 < half.sub(exact).abs().max()
    model = load_chatglm().transformer
    assert {table.dtype for table in model.rotary_tables(LAYOUT, torch.float16)} == {torch.float32}
    module = load_chatglm(rotary_dtype="module").transformer
    assert {table.dtype for table in module.rotary_tables(LAYOUT, torch.float16)} == {torch.float16}


@pytest.mark.parametrize("tables", ["float32", "module"])
@torch.no_grad()
def test_a_half_precision_model_writes_on_a_cpu_what_the_whole_one_does(tables: str) -> None:
    found = read_case(TINY)[0]["greedy"][0]
    ids = torch.tensor(found["input_ids"])
    model = copy.deepcopy(load_chatglm(rotary_dtype=tables)).half()
    assert model.dtype == torch.float16
    output = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=3)
    assert output[0].tolist() == found["output_ids"][0][: output.shape[1]]


@pytest.mark.parametrize("stretch", [0, -1.0, float("nan")])
def test_a_stretch_that_is_none_is_refused(stretch: float) -> None:
    with pytest.raises(ValueError, match=r"rotary_stretch .* above 0"):
        ChatGLMConfig(rotary_stretch=stretch)
