"""Do two processes that run a GLM or a ChatGLM together compute what one computes?"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import EOP, GMASK, MASK, PAD, SHAPE, SOP, SPECIAL
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.models.glm_heads import GLMForSequenceClassification
from tensor_parallel_worker import CACHES, compute

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
# Six heads, three for each process; a vocabulary that two processes do not share evenly.
UNEVEN = dict(vocab_size=49, hidden_size=36, num_attention_heads=6)
MODELS = {
    "ours": GLMForConditionalGeneration,
    "published": GLMForConditionalGeneration,
    "classifier": GLMForSequenceClassification,
    "chat": ChatGLMForConditionalGeneration,
    "int4": GLMForConditionalGeneration,
    "int4-groups": GLMForConditionalGeneration,
    "chat-int8": ChatGLMForConditionalGeneration,
    "chat-int4": ChatGLMForConditionalGeneration,
}
SMALL_CHAT = dict(
    vocab_size=49, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80,
    pad_token_id=PAD, mask_token_id=MASK, gmask_token_id=GMASK, bos_token_id=SOP, eos_token_id=EOP,
)  # fmt: skip
ROWS = [[16, 17, GMASK, SOP], [18, MASK, 19, 20, 21, SOP]]


def make_folder(folder: Path, model: PreTrainedModel, **form: Any) -> None:
    """A model with random weights; the biases too, which would be zero and hide a wrong split."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if form:
        model.quantize(**form)
    model.save_pretrained(folder)


def small_config(**settings: Any) -> GLMConfig:
    return GLMConfig(**{**SHAPE, **SPECIAL, **settings})


def make_published(folder: Path) -> None:
    """A checkpoint in the published form, a pickle with bare keys, and a config that this vocabulary suits."""
    golden = TESTS / "golden" / "hf-glm-tiny" / "model"
    folder.mkdir()
    shutil.copy(golden / "pytorch_model.bin", folder)
    shape = dict(vocab_size=512, hidden_size=64, num_hidden_layers=3, max_position_embeddings=128)
    GLMConfig(**{**SHAPE, **SPECIAL, **shape}).save_pretrained(folder)


def make_inputs(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def run_together(folder: Path) -> None:
    """Starts two workers as torchrun does, but for its own process."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "tensor_parallel_worker.py"), str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=600)
            assert worker.returncode == 0, errors[-4000:]
    finally:
        for worker in workers:
            worker.kill()


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process computes, under "one", and what each of two does, under 0 and 1."""
    folder = tmp_path_factory.mktemp("parallel")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make_folder(folder / "ours", GLMForConditionalGeneration(small_config(**UNEVEN)))
        make_folder(folder / "classifier", GLMForSequenceClassification(small_config(**UNEVEN)))
        odd = small_config(hidden_size=33, num_attention_heads=3)
        make_folder(folder / "odd", GLMForConditionalGeneration(odd))
        make_folder(folder / "chat", ChatGLMForConditionalGeneration(ChatGLMConfig(**SMALL_CHAT)))
        even = small_config(hidden_size=64)
        make_folder(folder / "int4", GLMForConditionalGeneration(even), bits=4)
        make_folder(folder / "int4-groups", GLMForConditionalGeneration(even), bits=4, group_size=32)
        make_folder(folder / "wide-groups", GLMForConditionalGeneration(even), bits=4, group_size=64)
        make_folder(folder / "chat-int8", ChatGLMForConditionalGeneration(ChatGLMConfig(**SMALL_CHAT)), bits=8)
        chat = ChatGLMForConditionalGeneration(ChatGLMConfig(**SMALL_CHAT))
        make_folder(folder / "chat-int4", chat, bits=4, embeddings=True)
        prefixed = ChatGLMConfig(**SMALL_CHAT, pre_seq_len=2)
        make_folder(folder / "chat-prefix", ChatGLMForConditionalGeneration(prefixed))
    make_published(folder / "published")
    inputs = make_inputs(ROWS)
    torch.save(inputs, folder / "inputs.pt")
    chat_inputs = make_inputs([[16, 17, 18, GMASK, SOP], [19, GMASK, SOP]])
    torch.save(chat_inputs, folder / "chat.pt")
    run_together(folder)
    one = {
        name: compute(
            model_class.from_pretrained(folder / name, dtype=torch.float32).eval(),
            chat_inputs if name.startswith("chat") else inputs,
        )
        for name, model_class in MODELS.items()
    }
    return {"folder": folder, "one": one, **{rank: torch.load(folder / f"{rank}.pt") for rank in range(2)}}


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_one_process(computed: dict[str, Any], name: str, rank: int) -> None:
    alone: Tensor = computed["one"][name]["logits"]
    assert torch.allclose(computed[rank][name]["logits"], alone, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("caching", CACHES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "classifier"])
def test_greedy_ids_are_those_of_one_process(computed: dict[str, Any], name: str, caching: str) -> None:
    for rank in range(2):
        assert torch.equal(computed[rank][name][caching], computed["one"][name][caching])


def test_each_process_holds_half_of_every_divided_weight(computed: dict[str, Any]) -> None:
    block = "glm.transformer.layers.0"
    shares = [computed[rank]["ours.local"] for rank in range(2)]
    assert [share["glm.word_embeddings.weight"] for share in shares] == [(25, 36), (24, 36)]
    for share in shares:
        assert share[f"{block}.attention.query_key_value.weight"] == (54, 36)
        assert share[f"{block}.attention.query_key_value.bias"] == (54,)
        assert share[f"{block}.attention.dense.weight"] == (36, 18)
        assert share[f"{block}.mlp.dense_h_to_4h.weight"] == (72, 36)
        assert share[f"{block}.mlp.dense_4h_to_h.weight"] == (36, 72)


def test_each_process_holds_whole_heads_of_a_chatglm(computed: dict[str, Any]) -> None:
    block = "transformer.layers.0"
    for rank in range(2):
        share = computed[rank]["chat.local"]
        assert share["transformer.word_embeddings.weight"] == ((25, 48), (24, 48))[rank]
        assert share[f"{block}.attention.query_key_value.weight"] == (72, 48)
        assert share[f"{block}.attention.query_key_value.bias"] == (72,)
        assert share[f"{block}.attention.dense.weight"] == (48, 24)
        assert share[f"{block}.mlp.dense_h_to_4h.weight"] == (40, 48)
        assert share[f"{block}.mlp.dense_4h_to_h.weight"] == (48, 40)


def test_each_process_holds_its_rows_or_columns_of_integers_and_scales(computed: dict[str, Any]) -> None:
    block = "glm.transformer.layers.0"
    for rank in range(2):
        plain, groups = computed[rank]["int4.local"], computed[rank]["int4-groups.local"]
        for share, columns in ((plain, ()), (groups, (2,))):
            assert share[f"{block}.attention.query_key_value.weight"] == (96, 32)  # two columns a byte
            assert share[f"{block}.attention.query_key_value.weight_scale"] == (96, *columns)
            assert share[f"{block}.attention.dense.weight"] == (64, 16)
            assert share[f"{block}.mlp.dense_4h_to_h.weight"] == (64, 64)
        assert plain[f"{block}.attention.dense.weight_scale"] == (64,), "of whole rows"
        assert groups[f"{block}.attention.dense.weight_scale"] == (64, 1)
        assert groups[f"{block}.mlp.dense_4h_to_h.weight_scale"] == (64, 4)
        embedding = computed[rank]["chat-int4.local"]["transformer.word_embeddings.weight"]
        assert embedding == (49, 24), "quantized embeddings are whole"


@pytest.mark.parametrize(("name", "source"), [("saved", "published"), ("saved-int4", "int4-groups")])
def test_a_divided_model_is_saved_whole(computed: dict[str, Any], name: str, source: str) -> None:
    folder = computed["folder"]
    saved = GLMForConditionalGeneration.from_pretrained(folder / name).state_dict()
    for key, value in GLMForConditionalGeneration.from_pretrained(folder / source).state_dict().items():
        assert torch.equal(saved[key], value), key


def test_an_odd_number_of_heads_is_refused_in_one_line(computed: dict[str, Any]) -> None:
    for rank in range(2):
        assert computed[rank]["odd"] == (
            "3 attention heads cannot be divided among 2 processes: start one of 1, 3 processes"
        )


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("chat-prefix", "prefix is not divided among processes: run one process"),
        ("wide-groups", "columns of glm.transformer.layers.0.attention.dense lie in groups of 64, which cannot be"),
        ("quantized while loading", "weights are not quantized while they are divided among processes"),
    ],
)
def test_what_is_not_divided_is_refused_in_one_line(computed: dict[str, Any], name: str, what: str) -> None:
    for rank in range(2):
        assert what in computed[rank][name]
        assert "\n" not in computed[rank][name]
