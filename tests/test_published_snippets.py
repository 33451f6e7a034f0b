"""Does the published example code run with `import gmask` added, and give what the published code gave?"""

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForMultipleChoice, AutoModelForSeq2SeqLM, AutoTokenizer

import gmask
from gmask.tokenizers.glm_build_inputs import GLMBatchEncoding

SHARED = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN = SHARED / "hf-glm-tiny-fullvocab"
CASE = json.loads((Path(__file__).parent / "golden" / GOLDEN.name / "case.json").read_text("utf-8"))
CHINESE = "sunzeyeah/glm-350M-chinese"
ENGLISH = "THUDM/glm-10b"
COMMIT = "5a7c0fd5c2fd7cf2e4c9f6be5b0e8a0c4ad1e1d2"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the published vocabularies are not in this checkout")

# From the model card of sunzeyeah/glm-350M-chinese.
CHINESE_GENERATION = """
from transformers import AutoTokenizer, AutoModelForSeq2SeqLM
tokenizer = AutoTokenizer.from_pretrained("sunzeyeah/glm-350M-chinese", trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained("sunzeyeah/glm-350M-chinese", trust_remote_code=True)
model = model.half().cuda()

max_length = 512
prompt = "我不能确定对方是不是喜欢我,我却想分分秒秒跟他在一起,有谁能告诉我如何能想他少一点"
prefix = "回答："
encoded_prompt = tokenizer(prompt, prefix + tokenizer.mask_token)
prompt_length = len(encoded_prompt['input_ids'])
encoded_dict = tokenizer(prompt, prefix + tokenizer.mask_token,
                         max_length=min(prompt_length, max_length),
                         truncation="only_first",
                         return_tensors="pt",
                         return_token_type_ids=False)
max_gen_length = max_length - encoded_dict['input_ids'].shape[1]
inputs = tokenizer.build_inputs_for_generation(encoded_dict, max_gen_length=max_gen_length, padding=True)
inputs = inputs.cuda()
outputs = model.generate(**inputs,
                         max_new_tokens=max_gen_length,
                         eos_token_id=tokenizer.eop_token_id,
                         pad_token_id=tokenizer.pad_token_id,
                         do_sample=False,
                         num_return_sequences=1,
                         top_p=0.8,
                         temperature=1.0)
results = tokenizer.batch_decode(outputs, skip_special_tokens=True)
print(results)
"""

# From the README of THUDM/GLM.
ENGLISH_GENERATION = """
from transformers import AutoTokenizer, AutoModelForSeq2SeqLM
tokenizer = AutoTokenizer.from_pretrained("THUDM/glm-10b", trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained("THUDM/glm-10b", trust_remote_code=True)
model = model.half().cuda()
model.eval()

# Inference
inputs = tokenizer("Ng is an adjunct professor at [MASK] (formerly associate professor and Director of its Stanford AI \
Lab or SAIL ). Also a pioneer in online education, Ng co-founded Coursera and deeplearning.ai.", return_tensors="pt")
inputs = tokenizer.build_inputs_for_generation(inputs, max_gen_length=512)
inputs = inputs.to('cuda')
outputs = model.generate(**inputs, max_length=512, eos_token_id=tokenizer.eop_token_id)
print(tokenizer.decode(outputs[0].tolist()))
"""

ENGLISH_TRAINING = """
inputs = tokenizer(
    ["Tsinghua University is located in [MASK].", "One minus one equals zero, is it correct? Answer: [MASK]"],
    return_tensors="pt", padding=True)
inputs = tokenizer.build_inputs_for_generation(inputs, targets=["Beijing", "No"], max_gen_length=8, padding=False)
inputs = inputs.to('cuda')
outputs = model(**inputs)
loss = outputs.loss
logits = outputs.logits
"""

ENGLISH_CHOICE = """
from transformers import AutoTokenizer, AutoModelForMultipleChoice
tokenizer = AutoTokenizer.from_pretrained("THUDM/glm-10b", trust_remote_code=True)
model = AutoModelForMultipleChoice.from_pretrained("THUDM/glm-10b", trust_remote_code=True)
model = model.half().cuda()
model.eval()

inputs = tokenizer(["Tsinghua University is located in [MASK].",
                    "One minus one equals zero, is it correct? Answer: [MASK]"], return_tensors="pt", padding=True)
choices = [["Beijing", "Shanghai"], ["Yes", "No"]]
inputs = tokenizer.build_inputs_for_multiple_choice(inputs, choices)
inputs = inputs.to('cuda')
outputs = model(**inputs)
logits = outputs.logits
"""

CONFIG = {
    "model_name_or_path": "",
    "architectures": ["GLMModel"],
    "attention_dropout_prob": 0.1,
    "attention_scale": 1.0,
    "auto_map": {
        "AutoConfig": "configuration_glm.GLMConfig",
        "AutoModel": "modeling_glm.GLMModel",
        "AutoModelForSeq2SeqLM": "modeling_glm.GLMForConditionalGeneration",
        "AutoModelForMultipleChoice": "modeling_glm.GLMForMultipleChoice",
    },
    "block_position_encoding": True,
    "checkpoint_activations": False,
    "checkpoint_num_layers": 1,
    "embedding_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "max_sequence_length": 1024,
    "model_type": "glm",
    "num_attention_heads": 2,
    "num_layers": 2,
    "output_dropout_prob": 0.1,
    "output_predict": True,
    "parallel_output": True,
    "pool_token": "cls",
    "relative_encoding": False,
    "spell_func": "lstm",
    "spell_length": None,
    "torch_dtype": "float16",
    "vocab_size": 50304,
}
TOKENIZER_CONFIG = {
    "name_or_path": "THUDM/glm-10b",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "additional_special_tokens": ["<|startofpiece|>", "<|endofpiece|>", "[gMASK]", "[sMASK]"],
    "add_prefix_space": False,
    "tokenizer_class": "GLMGPT2Tokenizer",
    "use_fast": False,
    "auto_map": {"AutoTokenizer": ["tokenization_glm.GLMGPT2Tokenizer", None]},
}
ADDED_TOKENS = {
    "<|startofpiece|>": 50257, "<|endofpiece|>": 50258, "[CLS]": 50259, "[MASK]": 50260,
    "[SEP]": 50261, "[UNK]": 50262, "[gMASK]": 50263, "[sMASK]": 50264,
}  # fmt: skip
CODE = ("configuration_glm.py", "modeling_glm.py", "tokenization_glm.py")


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def draw_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights under the published names, far enough apart for greedy ids not to hang on rounding."""
    values = {key: value for key, value in config.items() if key not in ("auto_map", "model_type", "torch_dtype")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = gmask.GLMModel(gmask.GLMConfig(**{**values, "initializer_range": 0.3}))
    return {key: tensor.half() for key, tensor in model.state_dict().items()}


def publish_chinese(folder: Path) -> None:
    """The golden model, with positions for the 512 tokens that the example asks for."""
    for name in ("added_tokens.json", "cog-pretrain.model", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / "model" / name, folder / name)
    config = json.loads((GOLDEN / "model" / "config.json").read_text("utf-8")) | {"max_sequence_length": 1024}
    write_json(folder / "config.json", config)
    weights = torch.load(GOLDEN / "model" / "pytorch_model.bin", weights_only=True)
    for key, drawn in draw_weights(config).items():
        if "position_embeddings" in key:
            weights[key] = torch.cat((weights[key], drawn[len(weights[key]) :]))
    torch.save(weights, folder / "pytorch_model.bin")


def publish_english(folder: Path) -> None:
    """A random model in two shards, with the vocabulary of GLM-10B."""
    for name in ("vocab.json", "merges.txt"):
        packed = SHARED / "tokenizers" / "vocab" / f"gpt2-{name}.gz"
        (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(folder / "added_tokens.json", ADDED_TOKENS)
    weights = draw_weights(CONFIG)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": list(weights)[i::2] for i in range(2)}
    for name, keys in shards.items():
        torch.save({key: weights[key] for key in keys}, folder / name)
    places = {key: name for name, keys in shards.items() for key in keys}
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub that holds both models, beside code that must not run, and the golden model as it is."""
    cache = tmp_path_factory.mktemp("hub")
    for name, publish in ((CHINESE, publish_chinese), (ENGLISH, publish_english)):
        repository = cache / f"models--{name.replace('/', '--')}"
        folder = repository / "snapshots" / COMMIT
        folder.mkdir(parents=True)
        publish(folder)
        for code in CODE:
            (folder / code).write_text("raise SystemExit('remote code ran')\n")
        (repository / "refs").mkdir()
        for ref in ("main", "v1.1"):
            (repository / "refs" / ref).write_text(COMMIT)
    return cache


@pytest.fixture(autouse=True)
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield


def run(*snippets: str, on_gpu: bool = False) -> dict[str, Any]:
    """What the names stand for after the code has run; the calls for CUDA are left out unless wanted."""
    code = "import gmask\n" + "".join(snippets)
    if not on_gpu:
        code, dropped = re.subn(r"^\w+ = \w+\.(half\(\)\.cuda\(\)|cuda\(\)|to\('cuda'\))\n", "", code, flags=re.M)
        assert dropped >= 1 and "cuda" not in code
    found: dict[str, Any] = {}
    exec(code, found)
    return found


def answer_layout(context: list[int], answer_length: int, mask_id: int) -> torch.Tensor:
    """``[1, 2, T]`` for a context and an answer behind it, start token included: written down for the tests."""
    places = [*range(len(context)), *[context.index(mask_id)] * answer_length]
    blocks = [0] * len(context) + list(range(1, answer_length + 1))
    return torch.tensor([[places, blocks]])


@torch.no_grad()
def answer_log_probs(found: dict[str, Any], text: str, answer: str, *, end: bool) -> torch.Tensor:
    """Log-probabilities of an answer's tokens: one text alone, nothing padded, no mask but the layout's."""
    tokenizer, model = found["tokenizer"], found["model"]
    context = tokenizer(text).input_ids
    target = tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eop_token_id] * end
    layout = answer_layout(context, len(target), tokenizer.mask_token_id)
    ids = torch.tensor([[*context, tokenizer.sop_token_id, *target[:-1]]])
    states = model.glm(ids, layout=layout).last_hidden_state[0, len(context) :]
    logits = states @ model.glm.word_embeddings.weight.T
    return F.log_softmax(logits, dim=-1)[range(len(target)), target]


def assert_greedy(found: dict[str, Any], mask_id: int) -> None:
    """Each generated token is the likeliest one, by a single pass over all of them."""
    model, outputs = found["model"], found["outputs"]
    context, sop = found["inputs"]["input_ids"].shape[1] - 1, found["tokenizer"].sop_token_id
    ids = outputs[0].tolist()
    assert ids[context] == sop
    layout = answer_layout(ids[:context], len(ids) - context, mask_id)
    logits = model(outputs, layout=layout).logits[0, context:-1]
    chosen = logits[range(len(logits)), ids[context + 1 :]]
    assert torch.all(chosen > logits.max(-1).values - 1e-3)


def test_the_chinese_generation_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad():
        found = run(CHINESE_GENERATION)
        assert_greedy(found, 50003)
    assert type(found["model"]) is gmask.GLMForConditionalGeneration
    assert found["outputs"].shape[1] <= 513 and found["outputs"].shape[1] - found["prompt_length"] > 20
    assert capsys.readouterr().out == f"{found['results']}\n"
    assert "对方是不是喜欢我" in found["results"][0] and "[MASK]" not in found["results"][0]


def test_the_pair_call_cuts_the_first_text_only() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHINESE)
    whole = tokenizer("我不能确定对方是不是喜欢我", "回答：[MASK]").input_ids
    cut = tokenizer(
        "我不能确定对方是不是喜欢我", "回答：[MASK]", max_length=len(whole) - 2, truncation="only_first"
    ).input_ids
    assert cut == [whole[0], *whole[3:]]  # from its left: the question ends next to the answer


@pytest.mark.parametrize("case", CASE["generation"], ids=lambda case: case["tag"])
def test_greedy_ids_are_those_of_the_published_code(case: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHINESE, revision="v1.1", padding_side=case["padding_side"])
    model = AutoModelForSeq2SeqLM.from_pretrained(CHINESE, revision=COMMIT)
    encoded = tokenizer(case["prompts"], return_tensors="pt", padding=True)
    inputs = tokenizer.build_inputs_for_generation(encoded, max_gen_length=case["max_gen_length"])
    assert inputs["input_ids"].tolist() == case["input_ids"]
    outputs = model.generate(**inputs, max_length=case["max_length"], eos_token_id=tokenizer.eop_token_id)
    assert outputs.tolist() == case["output_ids"]
    assert [tokenizer.decode(row.tolist()) for row in outputs] == case["decoded"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_training_loss_is_that_of_the_published_code(side: str) -> None:
    (case,) = (case for case in CASE["forward_cases"] if case["tag"] == f"train_{side}")
    tokenizer = AutoTokenizer.from_pretrained(CHINESE, padding_side=side)
    model = AutoModelForSeq2SeqLM.from_pretrained(CHINESE)
    texts, targets = zip(*case["prompts"], strict=True)
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
    inputs = tokenizer.build_inputs_for_generation(inputs, targets=list(targets), max_gen_length=12, padding=False)
    assert model(**inputs).loss.item() == pytest.approx(case["loss"], abs=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_the_scores_of_choices_are_those_of_the_published_code(index: int) -> None:
    case = CASE["multiple_choice"][index]
    tokenizer = AutoTokenizer.from_pretrained(CHINESE)
    model = AutoModelForMultipleChoice.from_pretrained(CHINESE)
    inputs = tokenizer(case["prompts"], return_tensors="pt", padding=True)
    inputs = tokenizer.build_inputs_for_multiple_choice(inputs, case["choices"])
    assert torch.allclose(model(**inputs).logits, torch.tensor(case["logits"]), atol=2e-5, rtol=1e-4)


def test_the_english_generation_and_training_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad():
        found = run(ENGLISH_GENERATION)
        assert_greedy(found, 50260)
    assert "Ng is an adjunct professor at" in capsys.readouterr().out
    found = run(ENGLISH_GENERATION.split("# Inference")[0], ENGLISH_TRAINING)
    texts = ["Tsinghua University is located in [MASK].", "One minus one equals zero, is it correct? Answer: [MASK]"]
    scores = [answer_log_probs(found, *row, end=True) for row in zip(texts, ["Beijing", "No"], strict=True)]
    assert found["loss"].item() == pytest.approx(-torch.cat(scores).mean().item(), abs=1e-4)
    assert found["logits"].shape == (*found["inputs"]["input_ids"].shape, 50304)
    found["loss"].backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in found["model"].parameters())


def test_the_multiple_choice_example_runs() -> None:
    with torch.no_grad():
        found = run(ENGLISH_CHOICE)
    assert type(found["model"]).__name__ == "GLMForMultipleChoice"
    texts = ["Tsinghua University is located in [MASK].", "One minus one equals zero, is it correct? Answer: [MASK]"]
    sums = [
        [answer_log_probs(found, text, choice, end=False).sum() for choice in choices]
        for text, choices in zip(texts, found["choices"], strict=True)
    ]
    assert torch.allclose(found["logits"], torch.tensor(sums), atol=1e-3)


def test_encodings_move_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ENGLISH)
    inputs = tokenizer("It is [MASK].", return_tensors="pt")
    generation = tokenizer.build_inputs_for_generation(inputs, max_gen_length=4)
    choice = tokenizer.build_inputs_for_multiple_choice(inputs, [["a", "b c"]])
    for moved in (generation.cuda("meta"), choice.to("meta")):
        tensors = [*moved.values()]
        while any(isinstance(value, list) for value in tensors):
            tensors = [part for value in tensors for part in (value if isinstance(value, list) else [value])]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    asked: list[Any] = []
    monkeypatch.setattr(GLMBatchEncoding, "to", lambda self, device, **settings: asked.append(device))
    generation.cuda()
    assert [torch.device(device).type for device in asked] == ["cuda"]


def test_the_names_are_read_by_gmask_load_as_well() -> None:
    model, tokenizer = gmask.load(ENGLISH, device="cpu", revision="v1.1")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(ENGLISH)
    inputs = tokenizer.build_inputs_for_generation(tokenizer("It is [MASK].", return_tensors="pt"), max_gen_length=4)
    assert torch.equal(model(inputs["input_ids"]).logits, theirs(inputs["input_ids"]).logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_examples_run_on_a_gpu_to_the_letter() -> None:
    for snippets in ((CHINESE_GENERATION,), (ENGLISH_GENERATION, ENGLISH_TRAINING), (ENGLISH_CHOICE,)):
        found = run(*snippets, on_gpu=True)
        assert found["model"].dtype == torch.float16
        outputs = found["outputs"]
        assert (outputs if isinstance(outputs, torch.Tensor) else outputs.logits).device.type == "cuda"
    assert found["logits"].isfinite().all()
