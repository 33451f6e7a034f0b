"""Do the parts of a ChatGLM on several devices compute what one device computes?"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import gmask
from gmask.checkpoints.load import load_model_on_gpus
from gmask.models.chatglm import ENDS, ChatGLMConfig, ChatGLMForConditionalGeneration, spread_layers

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "chatglm-tiny" / "model"
IDS = torch.tensor([[20, 21, 22, 513, 516]])
OFFLOADED = dict.fromkeys(ENDS, "cpu") | {f"transformer.layers.{n}": "cpu" if n < 2 else "disk" for n in range(4)}


def compute(model: ChatGLMForConditionalGeneration) -> tuple[torch.Tensor, list[list[int]]]:
    with torch.no_grad():
        return model(IDS).logits, model.generate(IDS, max_new_tokens=8, do_sample=False).tolist()


@pytest.mark.parametrize("place", [{"": "cpu"}, OFFLOADED, "auto"], ids=["one", "disk", "auto"])
def test_a_device_map_changes_no_number(place: Any, tmp_path: Path) -> None:
    alone = compute(ChatGLMForConditionalGeneration.from_pretrained(FOLDER))
    model = ChatGLMForConditionalGeneration.from_pretrained(FOLDER, device_map=place, offload_folder=tmp_path)
    if place is OFFLOADED:
        assert model.transformer.layers[3].mlp.dense_h_to_4h.weight.is_meta, "it stays on the disk"
    logits, ids = compute(model)
    assert torch.equal(logits, alone[0]) and ids == alone[1]


def test_the_published_function_takes_a_map(tmp_path: Path) -> None:
    model = load_model_on_gpus(FOLDER, num_gpus=2, device_map=OFFLOADED, offload_folder=tmp_path, dtype=torch.float32)
    assert compute(model)[1] == compute(ChatGLMForConditionalGeneration.from_pretrained(FOLDER))[1]
    assert not model.training


def test_a_prefix_goes_to_where_each_layer_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = ChatGLMForConditionalGeneration(ChatGLMConfig.from_pretrained(FOLDER, pre_seq_len=3)).eval()
    whole.save_pretrained(tmp_path)
    places = OFFLOADED | {"transformer.prefix_encoder": "cpu"}
    spread = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offloaded", dtype=torch.float32
    )
    expected, found = compute(whole), compute(spread)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.parametrize("devices", range(1, 11))
def test_layers_are_spread_evenly_in_their_order_with_both_ends_on_the_first(devices: int) -> None:
    config = ChatGLMConfig()
    places = spread_layers(config, devices)
    order = [places[f"transformer.layers.{layer}"] for layer in range(config.num_hidden_layers)]
    shares = Counter([*order, 0, 0])
    assert order == sorted(order) and {*shares} == {*range(devices)}
    assert max(shares.values()) - min(shares.values()) <= 1
    assert all(places[end] == 0 for end in ENDS)
    if devices == 2:  # what the published function gives
        assert shares == {0: 15, 1: 15}


def test_what_cannot_be_placed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(gmask.GmaskError, match=r"^num_gpus is 2, but this machine has 1$"):
        load_model_on_gpus(FOLDER)
    with pytest.raises(gmask.GmaskError, match="is not a ChatGLM"):
        load_model_on_gpus("bundled")
    with pytest.raises(gmask.GmaskError, match="choose 1 to 28"):
        spread_layers(ChatGLMConfig(), 29)
