"""Where do ChatGLM's queries and keys turn to beyond the places that it was trained on, and in half precision?"""

import copy

import pytest
import torch

from gmask.models.chatglm import ChatGLMConfig, inverse_frequencies, rotary_tables
from test_chatglm_parity import TINY, load_chatglm, read_case

TRAINED = 2048
LAYOUT = torch.tensor([[[0, 1, 2, 3, 2, 2], [0, 0, 0, 0, 1, 2]]])


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


def test_a_config_that_asks_for_stretched_places_is_refused() -> None:
    assert not hasattr(ChatGLMConfig(rotary_stretch=1.0), "rotary_stretch")  # as earlier versions wrote it
    with pytest.raises(ValueError, match="rotary_stretch is not supported any more"):
        ChatGLMConfig(rotary_stretch=2.0)
