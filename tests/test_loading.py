"""Does `gmask.load` read good folders exactly, and name what is wrong with bad ones?"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gmask
from gmask import hardware
from gmask.checkpoints.folder import read_config
from gmask.checkpoints.formats import Checkpoint
from gmask.checkpoints.load import load_model, load_tokenizer
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.models.glm_heads import GLMForMultipleChoice, GLMForSequenceClassification
from tiny_folder import SPECIAL, make_folder

GOLDEN = Path(__file__).parent / "golden" / "hf-glm-tiny" / "model"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def load_error(folder: Path) -> str:
    with pytest.raises(gmask.GmaskError) as caught:
        gmask.load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_come_back_bit_for_bit_with_the_head_tied(folder: Path) -> None:
    model, tokenizer = gmask.load(folder, device="cpu")
    saved = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in saved.items())
    assert model.lm_head.weight is model.glm.word_embeddings.weight
    assert not model.training
    assert tokenizer.sop_token_id == model.config.sop_token_id == SPECIAL["sop_token_id"]


def test_on_a_cpu_half_precision_weights_become_float32_unless_asked(folder: Path) -> None:
    weights = {key: tensor.bfloat16() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    model, _ = gmask.load(folder, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.glm.word_embeddings.weight, weights["glm.word_embeddings.weight"].float())
    assert gmask.load(folder, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(gmask.GmaskError, match="float33"):
        gmask.load(folder, dtype="float33")


def test_sharded_weights_and_pickled_ones_load_as_well(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, device="cpu")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    for place in (folder, tmp_path / "sharded"):
        again = load_model(place, device="cpu").state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())
    next((tmp_path / "sharded").glob("model-00002*")).unlink()
    with pytest.raises(gmask.GmaskError, match=r"model-00002.*missing"):
        load_model(tmp_path / "sharded")


@pytest.mark.skipif(not (GOLDEN / "pytorch_model.bin").is_file(), reason="the golden checkpoint is not here")
def test_a_published_folder_loads_and_gets_its_special_ids_from_the_added_tokens() -> None:
    model = load_model(GOLDEN, device="cpu")
    assert (model.config.sop_token_id, model.config.eop_token_id) == (476, 477)
    assert model.config.blank_token_ids == [473, 478, 479]
    assert model.config.hidden_act == "gelu"
    with pytest.raises(gmask.GmaskError, match=r"cog-pretrain\.model"):
        gmask.load(GOLDEN)


def test_a_name_that_is_no_folder_says_what_to_give(tmp_path: Path) -> None:
    assert "no such folder" in load_error(tmp_path / "nothing")
    assert "config.json" in load_error(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in load_error(tmp_path / "file")
    assert "no such folder" in load_error(Path("nothing here"))
    with pytest.raises(gmask.GmaskError, match="has no revision v1"):
        gmask.load(tmp_path, revision="v1")


def test_missing_and_damaged_files_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"x" * 100):
        weights.write_bytes(damaged)
        assert "model.safetensors: truncated or damaged" in load_error(folder)
    weights.unlink()
    assert "no weights there" in load_error(folder)
    torch.save(load_model_state(whole, folder), folder / "pytorch_model.bin")
    pickled = (folder / "pytorch_model.bin").read_bytes()
    for damaged in (pickled[: len(pickled) // 2], b"", b"not a pickle"):
        (folder / "pytorch_model.bin").write_bytes(damaged)
        assert "pytorch_model.bin: truncated or damaged" in load_error(folder)


def load_model_state(whole: bytes, folder: Path) -> dict[str, torch.Tensor]:
    copy = folder / "copy.safetensors"
    copy.write_bytes(whole)
    return load_file(copy)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from a checkpoint ran')",)


def test_a_pickle_cannot_run_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"glm.word_embeddings.weight": Payload()}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in load_error(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda weights: weights.pop("glm.transformer.final_layernorm.bias"),
            "lack transformer.final_layernorm.bias",
        ),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda weights: weights.update({"glm.transformer.final_layernorm.bias": torch.zeros(3)}),
            r"final_layernorm.bias has the shape [3], but the model asks for [32]",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(folder: Path, change, named: str) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    assert named in load_error(folder)


def test_a_config_that_is_not_a_glm_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text('{"model_type": "glm", "hidden_size": 8}')  # the later GLM-4
    assert "not to a first-generation GLM" in load_error(folder)
    config.write_text("{")
    assert "not JSON" in load_error(folder)


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**values, "model": {"type": "?"}}))
    assert "tokenizer.json: not that of a tokenizer" in load_error(folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: missing" in load_error(folder)


def test_ids_that_a_config_lacks_come_from_the_tokenizer(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if not k.endswith("_token_id")}))
    config = read_config(folder)
    assert config.blank_token_ids == [5, 6, 7]
    assert (config.sop_token_id, config.eop_token_id) == (8, 9)


def test_every_public_name_is_there_and_a_wrong_one_is_not() -> None:
    for name in gmask.__all__:
        assert getattr(gmask, name) is not None
    assert set(gmask.__all__) <= set(dir(gmask))
    with pytest.raises(AttributeError, match="infil"):
        gmask.infil  # noqa: B018


def test_public_names_are_imported_on_first_use() -> None:
    code = "import sys, gmask; gmask.GmaskError; print('torch' in sys.modules, 'infill' in vars(gmask))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout == "False False\n"
    assert gmask.infill is importlib.import_module("gmask.generation.infill").infill


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}))


def test_the_config_or_the_caller_chooses_the_class(folder: Path) -> None:
    change_config(folder, architectures=["GLMForMultipleChoice"])
    assert type(gmask.load(folder, device="cpu")[0]) is GLMForMultipleChoice
    change_config(folder, architectures=["GLMModel"], auto_map={"AutoModel": "modeling_glm.GLMModel"})
    model, _ = gmask.load(folder, device="cpu")
    assert type(model) is GLMForConditionalGeneration and not model.config.auto_map
    assert type(gmask.load(folder, device="cpu", model_class=GLMForMultipleChoice)[0]) is GLMForMultipleChoice
    with pytest.raises(gmask.GmaskError, match=r"lack dense.bias.*GLMForSequenceClassification"):
        gmask.load(folder, device="cpu", model_class=GLMForSequenceClassification)


def test_a_classifier_comes_back_with_its_head(folder: Path) -> None:
    config = GLMConfig.from_pretrained(folder, num_labels=3)
    model = GLMForSequenceClassification(config)
    model.save_pretrained(folder)
    again, _ = gmask.load(folder, device="cpu")
    assert type(again) is GLMForSequenceClassification
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (dict(model_type="glm", architectures=["GlmForCausalLM"]), "belongs to GLM-4 or later.*AutoModelForCausalLM"),
        (dict(model_type="glm4", architectures=["Glm4ForCausalLM"]), "belongs to GLM-4 or later.*AutoModelForCausalLM"),
        (
            dict(model_type="chatglm", multi_query_attention=True),
            "attention belongs to ChatGLM2, ChatGLM3 or GLM-4-9B",
        ),
        (dict(model_type="llama", architectures=["LlamaForCausalLM"]), "'llama' is not a first-generation GLM"),
        (dict(block_position_encoding=True, architectures=["GLMForTables"]), "GLMForTables is not known"),
        ({}, "None is not a first-generation GLM"),
    ],
)
def test_other_architectures_are_told_from_ours(values: dict[str, Any], named: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"hidden_size": 32, "num_layers": 2, **values}))
    assert re.search(named, load_error(folder))


def test_a_vocabulary_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(gmask.GmaskError, match=r"has 440 tokens, but the model only 439"):
        change_config(folder, vocab_size=439)
        gmask.load(folder, device="cpu")
    change_config(folder, vocab_size=448, sop_token_id=11)
    assert "sop_token_id is 8, but that of the model 11" in load_error(folder)
    change_config(folder, sop_token_id=448)
    assert "sop_token_id 448 is beyond the vocab_size of 448" in load_error(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_pointers_folders_and_nothing_in_place_of_a_file_are_named(name: str, folder: Path) -> None:
    path = folder / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7432\n")
    assert f"{name}: a Git LFS pointer" in load_error(folder) and "git lfs pull" in load_error(folder)
    path.write_text("")
    assert f"{name}: truncated or damaged" in load_error(folder)
    path.unlink()
    path.mkdir()
    assert f"{name}: is a folder" in load_error(folder)


def test_a_stored_head_must_equal_the_embedding_that_it_is_tied_to(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    embedding = weights["glm.word_embeddings.weight"]
    save_file({**weights, "lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    model, _ = gmask.load(folder, device="cpu")
    assert model.lm_head.weight is model.glm.word_embeddings.weight
    save_file({**weights, "lm_head.weight": embedding + 1}, folder / "model.safetensors")
    assert "lm_head.weight differs" in load_error(folder)
    change_config(folder, tie_word_embeddings=False)
    assert torch.equal(gmask.load(folder, device="cpu")[0].lm_head.weight, embedding + 1)


def test_too_little_memory_is_said_with_the_numbers_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())

    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("read before the check")

    monkeypatch.setattr(hardware, "free_bytes", lambda device: 2 * size)
    assert gmask.load(folder, device="cpu", dtype="float16")[0].dtype == torch.float16
    monkeypatch.setattr(Checkpoint, "read", refuse)
    numbers = f"needs {4 * size / 1e6:.1f} MB of memory on cpu, {2 * size / 1e6:.1f} MB are free"
    assert f"{numbers}; dtype='bfloat16' needs {2 * size / 1e6:.1f} MB" in load_error(folder)
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 2 * size - 1)
    with pytest.raises(gmask.GmaskError, match=r"are free; quantize='int4' needs less$"):
        gmask.load(folder, device="cpu", dtype="bfloat16")
    with pytest.raises(gmask.GmaskError, match=r"are free; dtype='bfloat16' needs [0-9.]+ MB(, but [^;]+)?$"):
        gmask.load(folder, device="cpu", dtype="float32", quantize="int4")


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CONTROL_GROUP", tmp_path)
    cpu = torch.device("cpu")
    unlimited = hardware.free_bytes(cpu)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 2000\nactive_file 100\n")
    assert hardware.free_bytes(cpu) == 3100 < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.free_bytes(cpu) > 3100


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="measured as Linux counts it")
def test_loading_takes_no_more_memory_than_the_model_and_one_tensor(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("loading_memory_worker.py")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert len(peaks) == 15
    large = {
        "megatron float16 bfloat16 int4",
        "megatron float32 bfloat16 int8",
    }  # whose one tensor has four bytes a byte
    assert {form: peak for form, peak in peaks.items() if not 0.9 < peak <= (1.25 if form in large else 1.15)} == {}


def test_a_megatron_folder_with_a_config_of_its_own_is_read_by_it(folder: Path) -> None:
    weights = {key.removeprefix("glm."): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    (folder / "latest").write_text("global_step9")
    (folder / "global_step9").mkdir()
    torch.save({"module": weights}, folder / "global_step9" / "mp_rank_00_model_states.pt")
    model, tokenizer = gmask.load(folder, device="cpu")
    assert torch.equal(model.glm.word_embeddings.weight, weights["word_embeddings.weight"])
    assert tokenizer.sop_token_id == 8
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_loaded_model_does_not_hang_on_its_file(quantize: str | None, folder: Path) -> None:
    model, _ = gmask.load(folder, quantize=quantize)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:  # in place: what mapped it would change
        file.write(b"\xff" * size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
