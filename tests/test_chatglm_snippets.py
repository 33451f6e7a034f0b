"""Does the published code for ChatGLM-6B run with `import gmask` added, and give what the published model gave?"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gmask.models.chatglm_chat import build_prompt, clean_reply
from gmask.quantization.linear import QuantLinear

TESTS = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
COMMIT = "8b7d33596d18c5e83e2da052d05ca4db02e60620"
CODE = ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py")

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the tiny vocabulary is not here")

# From the README of THUDM/ChatGLM-6B.
CHAT = """
from transformers import AutoTokenizer, AutoModel
tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True)
model = AutoModel.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True).half().cuda()
model = model.eval()
response, history = model.chat(tokenizer, "你好", history=[])
print(response)
response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history=history)
print(response)
"""
QUANTIZED = """
from transformers import AutoTokenizer, AutoModel
tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True)
model = AutoModel.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True).quantize({bits}).half().cuda()
"""
ON_A_CPU = """
from transformers import AutoTokenizer, AutoModel
tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True)
model = AutoModel.from_pretrained("THUDM/chatglm-6b-int4",trust_remote_code=True).float()
"""

# From ptuning/README.md there.
TUNED = """
import os
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True)
config = AutoConfig.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True, pre_seq_len=8)
model = AutoModel.from_pretrained("THUDM/chatglm-6b", config=config, trust_remote_code=True)
prefix_state_dict = torch.load(os.path.join(CHECKPOINT_PATH, "pytorch_model.bin"))
new_prefix_state_dict = {}
for k, v in prefix_state_dict.items():
    if k.startswith("transformer.prefix_encoder."):
        new_prefix_state_dict[k[len("transformer.prefix_encoder."):]] = v
model.transformer.prefix_encoder.load_state_dict(new_prefix_state_dict)
"""


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the hub with the published models, beside code that must not run."""
    from huggingface_hub import constants

    for name, source in {"chatglm-6b": "chatglm-tiny", "chatglm-6b-int4": "chatglm-tiny-int4"}.items():
        repository = tmp_path / f"models--THUDM--{name}"
        folder = repository / "snapshots" / COMMIT
        shutil.copytree(TESTS / source / "model", folder)
        folder.chmod(0o755)
        for vocabulary in ("ice_text.model", "tokenizer_config.json"):
            shutil.copyfile(SHARED / "chatglm-tiny" / "model" / vocabulary, folder / vocabulary)
        for code in CODE:
            (folder / code).write_text("raise SystemExit('remote code ran')\n")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def read_case(name: str) -> dict[str, Any]:
    return json.loads((TESTS / name / "case.json").read_text("utf-8"))


def run(snippet: str, *, half: bool = False, **names: Any) -> dict[str, Any]:
    """What the names stand for after the code has run, on the CPU, with short replies.

    Without ``half`` in float32, and the most probable token at each step, as the goldens were made.
    """
    code = snippet.replace(".cuda()", "")
    if not half:
        code = code.replace(".half()", "")
    greedy = "" if half else ", do_sample=False"
    code = re.sub(r"(history=\w+|history=\[\])\)", rf"\1, max_new_tokens=16{greedy})", code)
    found: dict[str, Any] = dict(names)
    exec("import gmask\n" + code, found)
    return found


def test_two_rounds_of_chat_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(CHAT)
    assert [asked for asked, _ in found["history"]] == ["你好", "晚上睡不着应该怎么办"]
    assert capsys.readouterr().out == "".join(f"{reply}\n" for _, reply in found["history"])
    # The second reply is what the model makes of the published prompt of both rounds.
    tokenizer, model = found["tokenizer"], found["model"]
    prompt = tokenizer(build_prompt("晚上睡不着应该怎么办", found["history"][:1]), return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["response"] == clean_reply(text)


def test_published_replies() -> None:
    found = run(CHAT.split("model = model.eval()")[0])
    for known in read_case("chatglm-tiny")["chat_end_to_end"]:
        history = [tuple(pair) for pair in known["history"]]
        reply, _ = found["model"].chat(found["tokenizer"], known["query"], history, max_length=60, do_sample=False)
        assert reply == known["chat_response"]


def test_half_precision_and_drawing_as_in_the_published_lines() -> None:
    torch.manual_seed(0)
    found = run(CHAT, half=True)
    assert found["model"].dtype == torch.float16 and len(found["history"]) == 2
    assert isinstance(found["response"], str)


def greedy_ids(model: Any, prompt: list[int], length: int) -> list[int]:
    ids = torch.tensor([prompt])
    output: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=length, do_sample=False)[
        0
    ].tolist()
    return output


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_in_memory_gives_the_tokens_of_the_published_integers(bits: int) -> None:
    model = run(QUANTIZED.format(bits=bits))["model"]
    layer = model.transformer.layers[0].mlp.dense_h_to_4h
    assert isinstance(layer, QuantLinear) and layer.weight.dtype == torch.int8
    for known in read_case(f"chatglm-tiny-int{bits}")["greedy_float32"]:
        (ids,) = known["output_ids"]
        assert greedy_ids(model, ids[: ids.index(516) + 1], len(ids)) == ids, known["text"]
    half = run(QUANTIZED.format(bits=bits), half=True)["model"]
    assert half.dtype == torch.float16
    assert torch.equal(half.transformer.layers[0].mlp.dense_h_to_4h.weight, layer.weight)


def test_a_published_quantized_model_on_a_cpu() -> None:
    model = run(ON_A_CPU)["model"]
    assert model.dtype == torch.float32
    known = read_case("chatglm-tiny-int4")["greedy_float32"][0]["output_ids"][0]
    assert greedy_ids(model, known[: known.index(516) + 1], len(known)) == known


def test_a_tuned_prefix_by_the_published_lines() -> None:
    case = read_case("chatglm-tiny-ptuning")
    folder = str(TESTS / "chatglm-tiny-ptuning" / "ptuning")
    model = run(TUNED, CHECKPOINT_PATH=folder)["model"]
    for known in case["greedy"]:
        (ids,) = known["output_ids"]
        assert greedy_ids(model, ids[: ids.index(516) + 1], len(ids)) == ids, known["text"]
