"""Is a merged model the adapted one, and is what cannot be merged refused?"""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gmask
from gmask.checkpoints.adapters import load_adapter, merge_adapter, save_adapter
from gmask.checkpoints.convert import merge_folder
from gmask.cli import app
from gmask.errors import GmaskError
from gmask.recipes.tuning import MethodSettings
from gmask.training.methods import apply_method
from tiny_folder import make_folder
from tuning import BUILDERS, METHODS, build_glm_of, logits_of, tune

FOLDED = ["lora", "dora", "adalora", "ia3"]
TEXT = "The old man took his [MASK] to the river."


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("name", FOLDED)
def test_a_merged_model_is_the_adapted_one_without_the_adapter(family: str, name: str) -> None:
    model = BUILDERS[family]()
    names = [key for key, _ in model.named_parameters()]
    tune(model, name)
    logits = logits_of(model)
    assert merge_adapter(model) in (2, 4, 8)
    assert torch.allclose(logits_of(model), logits, atol=1e-5, rtol=1e-5)
    assert [key for key, _ in model.named_parameters()] == names
    assert not torch.allclose(logits, logits_of(BUILDERS[family]()), atol=1e-2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Those of a model with a tokenizer, and of LoRA for it."""
    folder = make_folder(tmp_path_factory.mktemp("merge") / "model")
    (folder / "LICENSE").write_text("as you like")
    model, _ = gmask.load(folder, device="cpu")
    torch.manual_seed(1)
    apply_method(model, MethodSettings(rank=4, targets="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(model, folder.with_name("adapter"), base=str(folder))
    return folder, folder.with_name("adapter")


def test_the_command_writes_a_model_that_needs_no_adapter(folders, tmp_path: Path) -> None:
    folder, adapter = folders
    target = tmp_path / "merged"
    arguments = ["merge", str(folder), "--adapter", str(adapter), "--output", str(target)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["layers"] == 8 and report["dtype"] == "float32"
    (merged, words), (adapted, _) = gmask.load(target, device="cpu"), gmask.load(folder, device="cpu", adapter=adapter)
    found, expected = (gmask.score(one, words, TEXT, ["dog", "cat"]) for one in (merged, adapted))
    for one, other in zip(found.answers, expected.answers, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    assert (target / "LICENSE").read_text() == "as you like" and not list(target.glob("adapter*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    again = CliRunner().invoke(app, arguments)
    assert "use --force to replace it" in str(again.exception)
    shown = CliRunner().invoke(app, [*arguments, "--force", "--dtype", "bfloat16"])
    assert shown.exit_code == 0 and "8 layers, in float32" in shown.stdout and "bfloat16" in shown.stdout
    half, _ = gmask.load(target, device="cpu")
    states = half.state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(states[name], value.bfloat16().float()), "computed in float32, and rounded once"


def test_what_cannot_be_folded_is_refused_before_anything_is_written(folders, tmp_path: Path) -> None:
    folder, adapter = folders
    target = tmp_path / "merged"
    prefixed, _ = gmask.load(folder, device="cpu")
    apply_method(prefixed, MethodSettings(name="p-tuning-v2", prefix_length=2))
    save_adapter(prefixed, tmp_path / "prefix", base=str(folder))
    with pytest.raises(GmaskError, match="cannot be folded into weights"):
        merge_folder(folder, tmp_path / "prefix", target)
    quantized = gmask.load(folder, device="cpu", quantize="int8")[0]
    quantized.save_pretrained(tmp_path / "int8")
    with pytest.raises(GmaskError, match="merge into the unquantized model, then gmask quantize"):
        merge_folder(tmp_path / "int8", adapter, target)
    with pytest.raises(GmaskError, match="no such folder"):
        merge_folder(folder, tmp_path / "absent", target)
    with pytest.raises(GmaskError, match="is what is read"):
        merge_folder(folder, adapter, adapter, force=True)
    assert not target.exists()


def test_a_model_in_memory_that_has_nothing_to_fold_is_refused(folders) -> None:
    _, adapter = folders
    with pytest.raises(GmaskError, match="no adapter that could be folded"):
        merge_adapter(build_glm_of())
    with pytest.raises(GmaskError, match="cannot be folded into the weights"):
        merge_adapter(build_glm_of(pre_seq_len=2))
    quantized = build_glm_of().quantize(8)
    apply_method(quantized, METHODS["lora"])
    with pytest.raises(GmaskError, match="int8 or int4 weights"):
        merge_adapter(quantized)
    with pytest.raises(GmaskError, match="was trained for"):
        load_adapter(build_glm_of(), adapter)
