"""Do adapters come back from their folders as they were, between gmask and PEFT, and are wrong ones refused?"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

import gmask
from conftest import PAD
from gmask.checkpoints.adapters import load_adapter, save_adapter
from gmask.checkpoints.folder import Folder
from gmask.checkpoints.load import fill_model
from gmask.cli import app
from gmask.cli.options import base_of
from gmask.errors import GmaskError
from gmask.generation.score import Scorer
from gmask.models.glm import GLMForConditionalGeneration
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.quantization.quantizer import QuantizationConfig
from gmask.recipes.tuning import MethodSettings
from gmask.training.methods import apply_method, resume_adapter
from tiny_folder import make_folder
from tuning import BUILDERS, METHODS, RATES, STEPS, batch_of, build_glm_of, logits_of, train, tune

CPU = torch.device("cpu")
PEFTS_OWN = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # it calls an old name


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path, Tensor]]:
    """The folders of a tiny model and of an adapter that was trained for it, and the logits of both together."""
    made: dict[tuple[str, str], tuple[Path, Path, Tensor]] = {}
    root = tmp_path_factory.mktemp("adapters")

    def make(family: str, name: str) -> tuple[Path, Path, Tensor]:
        if (family, name) not in made:
            base, folder = root / family, root / f"{family}-{name}"
            model = BUILDERS[family]()
            model.save_pretrained(base)
            tune(model, name)
            save_adapter(model, folder, base=str(base), settings={"name": name})
            made[family, name] = base, folder, logits_of(model)
        return made[family, name]

    return make


def fill(base: Path, adapter: Path | None = None, **settings: Any) -> PreTrainedModel:
    return fill_model(Folder(base), device=CPU, adapter=adapter, **settings)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_is_loaded_as_it_was_saved(tuned, family: str, name: str) -> None:
    base, folder, logits = tuned(family, name)
    model = fill(base, folder)
    assert torch.equal(logits_of(model), logits)
    assert not torch.allclose(logits_of(fill(base)), logits, atol=1e-2)
    assert not model.training and all(not module.training for module in model.modules())
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(base)
    assert values["auto_mapping"]["settings"] == {"name": name}
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < 0.9 * (base / "model.safetensors").stat().st_size
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", METHODS)
def test_generation_is_the_same_with_a_cache_and_without(tuned, family: str, name: str) -> None:
    base, folder, _ = tuned(family, name)
    model = fill(base, folder)
    ids = batch_of(model)["input_ids"]
    sop = model.config.sop_token_id
    row = ids[:1, : int((ids[0] == sop).nonzero()[0]) + 1]
    padded = torch.cat((torch.full_like(row[:, :2], PAD), row), dim=-1)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(row, use_cache=False, **settings)[:, row.shape[1] :]
    for caching in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(row, **settings, **caching)[:, row.shape[1] :], expected)
        mask = (padded != PAD).long()
        left = model.generate(padded, attention_mask=mask, **settings, **caching)
        assert torch.equal(left[:, padded.shape[1] :], expected)


@PEFTS_OWN
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", METHODS)
def test_peft_reads_our_folders(tuned, family: str, name: str) -> None:
    base, folder, logits = tuned(family, name)
    wrapped = peft.PeftModel.from_pretrained(fill(base), folder).eval()
    assert torch.allclose(logits_of(wrapped), logits, atol=2e-5)


def peft_config(name: str) -> peft.PeftConfig:
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    layers: dict[str, Any] = {**task, "target_modules": ["query_key_value", "dense_4h_to_h"]}
    ranks = {"init_r": 3, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": STEPS}
    return {
        "lora": lambda: peft.LoraConfig(**layers, r=3, bias="lora_only"),
        "dora": lambda: peft.LoraConfig(**layers, r=3, use_dora=True),
        "adalora": lambda: peft.AdaLoraConfig(**layers, **ranks),
        "ia3": lambda: peft.IA3Config(**layers, feedforward_modules=["dense_4h_to_h"]),
        "prefix": lambda: peft.PrefixTuningConfig(**task, num_virtual_tokens=3),
        "projection": lambda: peft.PrefixTuningConfig(
            **task, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
        ),
    }[name]()


@PEFTS_OWN
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3", "prefix", "projection"])
def test_we_read_the_folders_of_peft(tmp_path: Path, family: str, name: str) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = BUILDERS[family]()
    model.save_pretrained(base)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(BUILDERS[family](), peft_config(name))
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        wrapped(**batch_of(model)).loss.backward()
        optimizer.step()
        if name == "adalora":
            wrapped.base_model.update_and_allocate(step)
    wrapped.eval().save_pretrained(folder)
    if name == "adalora":
        assert json.loads((folder / "adapter_config.json").read_text())["rank_pattern"], "ranks were dropped"
    logits = logits_of(wrapped)
    found = logits_of(fill(base, folder))
    assert torch.allclose(found, logits, atol=2e-5)
    assert not torch.allclose(found, logits_of(model), atol=1e-2)
    again = BUILDERS[family]()
    load_adapter(again, folder)
    assert torch.equal(logits_of(again), found)


@pytest.mark.parametrize("name", [*METHODS, "p-tuning"])
def test_an_adapter_that_is_trained_on_begins_where_it_was(tmp_path: Path, name: str) -> None:
    model = build_glm_of()
    if name == "p-tuning":
        apply_method(model, MethodSettings(name="p-tuning", prompt_tokens=2))
    else:
        tune(model, name)
    save_adapter(model, tmp_path / "one", base="tiny")
    again = build_glm_of()
    table = resume_adapter(again, tmp_path / "one")
    trained = {key: p.shape for key, p in model.named_parameters() if p.requires_grad}
    assert {key: p.shape for key, p in again.named_parameters() if p.requires_grad} == trained
    assert table.trainable == sum(shape.numel() for shape in trained.values())
    save_adapter(again, tmp_path / "two", base="tiny")
    first, second = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("one", "two"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    if name != "p-tuning":
        losses = train(again, rate=RATES.get(name, 0.02) / 2)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["lora", "adalora", "ia3", "p-tuning-v2"])
def test_an_adapter_works_beside_integers(tuned, bits: int, name: str) -> None:
    base, folder, _ = tuned("glm", name)
    quantized = fill(base, folder, form=QuantizationConfig(bits))
    plain = build_glm_of().quantize(bits)
    load_adapter(plain, folder)
    assert torch.equal(logits_of(quantized), logits_of(plain))
    assert not torch.allclose(logits_of(quantized), logits_of(fill(base, form=QuantizationConfig(bits))), atol=1e-2)
    packed = [parameter for key, parameter in quantized.named_parameters() if hasattr(parameter, "packed")]
    assert len(packed) == 8, "the integers keep the layout of their fast product"


def test_trained_vectors_come_back_and_are_scored(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    model, tokenizer = gmask.load(folder, device="cpu")
    torch.manual_seed(4)
    apply_method(model, MethodSettings(name="p-tuning", prompt_tokens=2))
    with torch.no_grad():
        model.glm.prompt_encoder.mlp_head[-1].weight.normal_(std=0.5)
    save_adapter(model, tmp_path / "adapter", base=str(folder))
    loaded, _ = gmask.load(folder, device="cpu", adapter=tmp_path / "adapter")
    text, answers = "[PROMPT] The old man [PROMPT] took his [MASK] to the river.", ["dog", "cat"]
    expected, found = (gmask.score(one, tokenizer, text, answers) for one in (model, loaded))
    assert [one.logprob for one in found.answers] == pytest.approx([one.logprob for one in expected.answers], abs=1e-5)
    other = gmask.score(loaded, tokenizer, text.replace("[PROMPT]", ""), answers)
    assert other.answers[0].logprob != pytest.approx(found.answers[0].logprob, abs=1e-2)
    filled = gmask.infill(loaded, tokenizer, [text, "It was [MASK] day."], max_tokens=4)
    alone = gmask.infill(loaded, tokenizer, text, max_tokens=4)
    assert filled[0].text == alone.text and "[PROMPT]" in alone.text
    context = Scorer(loaded, tokenizer).reader.read(text).context
    ids = tokenizer(" dog", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        row = torch.tensor([[*context.ids, loaded.config.sop_token_id, *ids]])
        logprobs = loaded(row, use_cache=False).logits[0].log_softmax(-1)[len(context.ids) :]
    direct = sum(float(logprobs[place, token]) for place, token in enumerate(ids))
    assert found.answers[0].logprob == pytest.approx(direct, abs=1e-4)


@pytest.mark.parametrize("name", ["lora", "p-tuning-v2"])
def test_the_head_of_a_classifier_comes_with_its_adapter(tmp_path: Path, name: str) -> None:
    base = build_glm_of()
    base.save_pretrained(tmp_path / "base")
    base.config.num_labels = 3
    model = GLMForSequenceClassification(base.config).eval()
    model.glm.load_state_dict(base.glm.state_dict())
    apply_method(model, METHODS[name])
    save_adapter(model, tmp_path / "adapter", base="tiny")
    loaded = fill(tmp_path / "base", tmp_path / "adapter")
    assert isinstance(loaded, GLMForSequenceClassification) and loaded.config.num_labels == 3
    inputs = {key: value for key, value in batch_of(base).items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    half = fill(tmp_path / "base", tmp_path / "adapter", dtype=torch.bfloat16)
    assert torch.allclose(half(**inputs).logits, model(**inputs).logits, atol=0.1)
    with pytest.raises(GmaskError, match="trained for GLMForSequenceClassification"):
        fill(tmp_path / "base", tmp_path / "adapter", model_class=GLMForConditionalGeneration)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(GmaskError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", METHODS)
def test_a_model_of_another_shape_is_refused(tuned, tmp_path: Path, name: str) -> None:
    _, folder, _ = tuned("glm", name)
    build_glm_of(hidden_size=48).save_pretrained(tmp_path / "wide")
    message = refusal(lambda: fill(tmp_path / "wide", folder))
    assert "was trained for" in message and "hidden_size is 32; that of" in message and "is 48" in message
    BUILDERS["chatglm"]().save_pretrained(tmp_path / "chat")
    assert "model_type is glm_blank" in refusal(lambda: fill(tmp_path / "chat", folder))
    values = json.loads((folder / "adapter_config.json").read_text())
    shutil.copytree(folder, tmp_path / "foreign")
    (tmp_path / "foreign" / "adapter_config.json").write_text(json.dumps({**values, "auto_mapping": None}))
    assert "trained for another" in refusal(lambda: fill(tmp_path / "wide", tmp_path / "foreign"))


def test_other_weights_of_the_same_shape_are_refused_in_any_precision(tmp_path: Path) -> None:
    """The two bundled models have one shape; an adapter on the other one would answer nonsense without a word."""
    model, _ = gmask.load("bundled", dtype="float32", device="cpu")
    apply_method(model, MethodSettings(name="lora"))
    save_adapter(model, tmp_path / "adapter", base="bundled")
    for dtype in ("float32", "bfloat16"):
        gmask.load("bundled", adapter=tmp_path / "adapter", dtype=dtype, device="cpu")
    with pytest.raises(GmaskError, match=r"was trained for bundled, and .* has other weights"):
        gmask.load("bundled-chat", adapter=tmp_path / "adapter", device="cpu")
    assert base_of(tmp_path / "adapter", "bundled-chat") == "bundled"


@pytest.mark.parametrize("name", METHODS)
def test_a_folder_that_lacks_something_is_refused(tuned, tmp_path: Path, name: str) -> None:
    base, source, _ = tuned("glm", name)
    folder = tmp_path / "adapter"
    shutil.copytree(source, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = "prompt_embeddings" if "prompt_embeddings" in tensors else min(tensors)
    del tensors[lost]
    whole = weights.read_bytes()
    save_file(tensors or {"prefix_encoder.x": torch.zeros(1)}, weights)
    assert "the weights lack " in refusal(lambda: fill(base, folder))
    weights.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in refusal(lambda: fill(base, folder))
    weights.unlink()
    assert "missing" in refusal(lambda: fill(base, folder))
    (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    assert "'LOHA' is none of LORA" in refusal(lambda: fill(base, folder))
    (folder / "adapter_config.json").write_text("[")
    assert "not JSON" in refusal(lambda: fill(base, folder))
    assert "no such folder" in refusal(lambda: fill(base, tmp_path / "absent"))
    assert "has no adapter" in refusal(lambda: save_adapter(build_glm_of(), folder, base="tiny"))


def test_the_old_form_of_peft_is_read_and_code_in_it_is_not_run(tuned, tmp_path: Path) -> None:
    base, source, logits = tuned("glm", "lora")
    folder = tmp_path / "adapter"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert torch.equal(logits_of(fill(base, folder)), logits)
    torch.save({"x": CliRunner()}, folder / "adapter_model.bin")
    assert "refused" in refusal(lambda: fill(base, folder))


def test_every_verb_that_runs_a_model_takes_an_adapter(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    model, tokenizer = gmask.load(folder, device="cpu")
    torch.manual_seed(1)
    apply_method(model, MethodSettings(rank=2, targets="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(model, tmp_path / "adapter", base=str(folder))
    runner = CliRunner()

    def run(*arguments: object) -> str:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    options = ("--model", folder, "--adapter", tmp_path / "adapter")
    text = "The old man took his [MASK] to the river."
    scored = json.loads(run("score", *options, "--json", "--answers", "dog|cat", text))
    expected = gmask.score(model, tokenizer, text, ["dog", "cat"])
    assert scored["answers"][0]["logprob"] == pytest.approx(expected.answers[0].logprob, abs=1e-5)
    filled = json.loads(run("infill", *options, "--json", "--max-tokens", 4, text))
    assert filled["text"] == gmask.infill(model, tokenizer, text, max_tokens=4).text
    vector = json.loads(run("embed", *options, text))["embedding"]
    assert vector == pytest.approx(gmask.embed(model, tokenizer, [text])[0].tolist(), abs=1e-5)
    for verb in ("infill", "score", "embed", "chat", "serve", "webui", "evaluate"):
        assert "--adapter" in run(verb, "--help")


@pytest.mark.parametrize(
    ("key", "value"),
    [("bias", "abc"), ("trainable_token_indices", 1.5), ("trainable_token_indices", "abc"), ("r", "abc"), ("r", [])],
)
def test_absurd_values_of_a_config_are_one_line(tuned, tmp_path: Path, key: str, value: object) -> None:
    base, source, _ = tuned("glm", "lora")
    shutil.copytree(source, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert str(tmp_path / "adapter") in refusal(lambda: fill(base, tmp_path / "adapter"))
