"""Is a folder opened once, and each of its files read once, whatever is done with it?"""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gmask
from gmask.checkpoints import folder as checkpoint_folder
from gmask.checkpoints import zoo
from gmask.checkpoints.convert import convert, merge_folder, quantize_folder
from gmask.checkpoints.folder import Folder
from gmask.checkpoints.tensor_files import PickledFile, SafetensorsFile
from gmask.errors import GmaskError
from gmask.quantization.quantizer import QuantizationConfig
from gmask.recipes.tuning import MethodSettings
from gmask.training.methods import apply_method
from test_chatglm_loading import SHARED, publish
from tiny_folder import make_folder

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY = Path(__file__).parents[2] / "shared" / "golden" / "hf-glm-tiny" / "model"
needs_vocabulary = pytest.mark.skipif(not SHARED.is_dir(), reason="the tiny vocabularies are not here")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each folder was opened, each file of weights, and each config parsed."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, label: Callable[..., str | None]) -> None:
        real = getattr(owner, name)

        def counted(self: Any, *args: Any, **settings: Any) -> Any:
            if told := label(self, *args):
                counts[told] += 1
            return real(self, *args, **settings)

        monkeypatch.setattr(owner, name, counted)

    count(Folder, "__init__", lambda self, path, *args: str(path))
    for file in (SafetensorsFile, PickledFile):
        count(file, "__init__", lambda self, path, *args: str(path))
    for read in ("read_text", "read_bytes"):
        count(Path, read, lambda self: str(self) if self.name == "config.json" else None)
    return counts


def pickled(ours: Path, folder: Path) -> Path:
    shutil.copytree(ours, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def sharded(ours: Path, folder: Path) -> Path:
    shutil.copytree(ours, folder)
    (folder / "model.safetensors").unlink()
    gmask.load(ours, device="cpu")[0].save_pretrained(folder, max_shard_size="50KB")
    return folder


def published(ours: Path, folder: Path) -> Path:
    convert(ours, folder, to="huggingface")
    return folder


def quantized(ours: Path, folder: Path) -> Path:
    quantize_folder(ours, folder, QuantizationConfig(4))
    return folder


def with_config_beside_ranks(ours: Path, folder: Path) -> Path:
    convert(ours, folder, to="megatron", parts=2)
    for path in ours.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    return folder


FORMS = [lambda ours, folder: ours, pickled, sharded, published, quantized, with_config_beside_ranks]


def assert_once(counts: Counter[str], folder: Path) -> None:
    mine = {path: number for path, number in counts.items() if Path(path).is_relative_to(folder)}
    assert mine[str(folder)] == 1 and len(mine) >= 2 + (folder / "config.json").is_file()
    assert set(mine.values()) == {1}, mine


@pytest.mark.parametrize("make", FORMS)
def test_loading_opens_a_folder_and_reads_its_config_once(make: Any, ours: Path, tmp_path: Path, opened) -> None:
    folder = make(ours, tmp_path / "model")
    opened.clear()
    gmask.load(folder, device="cpu")
    assert_once(opened, folder)


@needs_vocabulary
@pytest.mark.parametrize("case", ["chatglm-tiny", "chatglm-tiny-int4"])
def test_a_published_chatglm_too(case: str, tmp_path: Path, opened) -> None:
    folder = publish(tmp_path / "model", case)
    gmask.load(folder, device="cpu")
    assert_once(opened, folder)


@needs_vocabulary
@pytest.mark.parametrize("name", ["ckpt", "ckpt_MP2", "ckpt_ds"])
def test_a_checkpoint_of_the_training_code_too(name: str, opened, monkeypatch: pytest.MonkeyPatch) -> None:
    large = zoo.find_family("GLM-Large-Chinese")
    assert large is not None
    shape = dict(layers=2, hidden_size=48, heads=4, positions=96, vocab_size=512)
    tiny = dataclasses.replace(large, **shape, special_ids={"sop_token_id": 476, "eop_token_id": 477})
    for module in (zoo, checkpoint_folder):
        monkeypatch.setattr(module, "FAMILIES", (tiny,))
    folder = GOLDEN / "thudm-glm-tiny" / name
    gmask.load(folder, device="cpu", tokenizer=VOCABULARY)
    assert_once(opened, folder)


def test_an_adapter_and_every_rewriting_open_their_folders_once(ours: Path, tmp_path: Path, opened) -> None:
    model, _ = gmask.load(ours, device="cpu")
    apply_method(model, MethodSettings(rank=2))
    gmask.save_adapter(model, tmp_path / "adapter", base=str(ours))
    for work in (
        lambda: gmask.load(ours, device="cpu", adapter=tmp_path / "adapter"),
        lambda: convert(ours, tmp_path / "converted"),
        lambda: convert(ours, tmp_path / "ranks", to="megatron", parts=2),
        lambda: quantize_folder(ours, tmp_path / "quantized", QuantizationConfig(8)),
    ):
        opened.clear()
        work()
        assert_once(opened, ours)
        assert opened[str(tmp_path / "adapter" / "adapter_model.safetensors")] in (0, 1)
    opened.clear()
    merge_folder(ours, tmp_path / "adapter", tmp_path / "merged")
    assert_once(opened, ours)


def test_a_path_that_no_library_opens_is_not_called_a_damaged_file(ours: Path, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"m\xff")
    try:
        shutil.copytree(ours, place)
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    ways: list[Callable[[], object]] = [
        lambda: gmask.load(place),
        lambda: convert(place, tmp_path / "converted"),
        lambda: quantize_folder(place, tmp_path / "quantized", QuantizationConfig(bits=8)),
    ]
    for way in ways:
        with pytest.raises(GmaskError, match="the path of a model holds half of a character"):
            way()
