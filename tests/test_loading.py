"""Does `gmask.load` read good folders exactly, and name what is wrong with bad ones?"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gmask
from gmask.loading import load_model, read_config
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
    with pytest.raises(gmask.GmaskError, match=r"tokenizer\.json"):
        gmask.load(GOLDEN)


def test_a_name_that_is_no_folder_says_what_to_give(tmp_path: Path) -> None:
    assert "no such folder" in load_error(tmp_path / "nothing")
    assert "config.json" in load_error(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in load_error(tmp_path / "file")
    with pytest.raises(gmask.GmaskError, match="hub"):
        gmask.load("THUDM/glm-10b")


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
            "lack glm.transformer.final_layernorm.bias",
        ),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda weights: weights.update({"glm.transformer.final_layernorm.bias": torch.zeros(3)}),
            r"final_layernorm.bias has the shape [3], but config.json asks for [32]",
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
    assert "not a first-generation GLM" in load_error(folder)
    config.write_text("{")
    assert "not JSON" in load_error(folder)


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**values, "model": {"type": "?"}}))
    assert "tokenizer.json: not a tokenizer" in load_error(folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in load_error(folder)


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
    code = "import sys, gmask; gmask.{}; print('torch' in sys.modules)"
    for name, loads_torch in (("GmaskError", "False"), ("infill", "True")):
        done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == loads_torch
