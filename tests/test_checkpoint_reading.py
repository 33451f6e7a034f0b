"""Are checkpoints of every published form read alike, and bad ones refused in one line, before memory is filled?"""

import json
import os
import random
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gmask.checkpoints.formats import Checkpoint, divide, is_megatron, open_checkpoint
from gmask.errors import GmaskError

GOLDEN = Path(__file__).parent / "golden" / "thudm-glm-tiny"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7432\n"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    path = GOLDEN / "ckpt" / "1234" / "mp_rank_00_model_states.pt"
    tensors: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["module"]
    return tensors


def write_ranks(folder: Path, weights: dict[str, torch.Tensor], ranks: int, **entries: Any) -> list[Path]:
    """A checkpoint of the training code, the iteration folder alone."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks)]
    for rank, path in enumerate(paths):
        module = {key: divide(key, tensor, ranks)[rank].clone() for key, tensor in weights.items()}
        torch.save({"module": module, "iteration": 7, **entries}, path)
    return paths


def write_shards(folder: Path, weights: dict[str, torch.Tensor], suffix: str = "bin") -> list[Path]:
    """Two shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    keys = list(weights)
    shards = [{key: weights[key] for key in part} for part in (keys[:9], keys[9:])]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name) if suffix == "safetensors" else torch.save(shard, folder / name)
    index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return [folder / name for name in names]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what a pickled file holds, in place."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def refusal(folder: Path) -> str:
    with pytest.raises(GmaskError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_holds(checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.keys()) == set(weights)
    for key, tensor in weights.items():
        found = checkpoint.read(key)
        assert torch.equal(found, tensor) and found.dtype == checkpoint.dtype(key) == tensor.dtype
        assert checkpoint.shape(key) == tensor.shape


@pytest.mark.parametrize(("name", "ranks"), [("ckpt", 1), ("ckpt_MP2", 2), ("ckpt_MP2/1234", 2), ("ckpt_ds", 1)])
def test_the_originals_of_any_parallel_size_hold_the_same(name: str, ranks: int, weights) -> None:
    if name == "ckpt_ds":  # the same in float16
        weights = {key: tensor.half() for key, tensor in weights.items()}
    with open_checkpoint(GOLDEN / name) as checkpoint:
        assert (checkpoint.layout, checkpoint.parallel_size) == ("megatron", ranks)
        assert_holds(checkpoint, weights)
        assert checkpoint.bookkeeping["iteration"] == (77 if name == "ckpt_ds" else 1234)
        assert "module" not in checkpoint.bookkeeping


@pytest.mark.parametrize("prefix", ["", "glm.", "module.", "model."])
@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors shards", "bin shards", "4 ranks", "old bin"])
def test_every_form_gives_the_same_tensors_under_bare_names(form: str, prefix: str, weights, tmp_path: Path) -> None:
    named = {prefix + key: tensor.clone() for key, tensor in weights.items()}
    if form.endswith("shards"):
        write_shards(tmp_path, named, form.split()[0])
    elif form == "4 ranks":
        module = {key: tensor.clone() for key, tensor in weights.items()}
        for path in write_ranks(tmp_path, module, 4):
            rewrite(path, lambda content: content.update(module={prefix + k: t for k, t in content["module"].items()}))
    elif form == "safetensors":
        save_file(named, tmp_path / "model.safetensors")
    else:
        torch.save(named, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == ("megatron" if form == "4 ranks" else form.split()[-1 if "old" in form else 0])
    assert_holds(checkpoint, weights)
    assert (checkpoint.unmapped_bytes > 0) == (form == "old bin")


def test_weights_in_the_published_form_come_before_a_trainers_own_files(weights, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step500")  # a transformers Trainer with DeepSpeed leaves this
    save_file(weights, tmp_path / "model.safetensors")
    assert not is_megatron(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == "safetensors"
    assert checkpoint.files == [tmp_path / "model.safetensors"]


def test_random_states_and_loss_scalers_of_the_training_code_do_not_hinder(
    weights, tmp_path: Path, monkeypatch
) -> None:
    scaler_class = type("DynamicLossScaler", (), {"__module__": "fp16.loss_scaler"})
    for name in ("fp16", "fp16.loss_scaler"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fp16.loss_scaler"].DynamicLossScaler = scaler_class  # type: ignore[attr-defined]
    scaler, endless = scaler_class(), []
    endless.append(endless)
    scaler.cur_scale = 65536.0
    entries = {
        "np_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
        "torch_rng_state": torch.get_rng_state(),
        "optimizer": {"loss_scaler": scaler, "fp32_groups": [torch.zeros(3)]},
        "endless": endless,
    }
    write_ranks(tmp_path, weights, 1, **entries)
    monkeypatch.undo()
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint, weights)
    assert checkpoint.bookkeeping["optimizer"] is None and checkpoint.bookkeeping["iteration"] == 7


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path, function: Any) -> None:
        self.mark, self.function = mark, function

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        code = f"open({str(self.mark)!r}, 'w').close()" if self.function is exec else f"touch {self.mark}"
        return self.function, (code,)


@pytest.mark.parametrize("function", [exec, os.system])
@pytest.mark.parametrize("place", ["bin", "old bin", "shard", "rank", "beside the weights", "deep inside"])
def test_a_pickle_cannot_run_code(place: str, function: Any, weights, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = Payload(mark, function)
    folder = tmp_path / "model"
    if place == "shard":
        path = write_shards(folder, weights)[1]
        content: Any = {**dict(list(weights.items())[9:]), "x": payload}
    elif place in ("rank", "beside the weights"):
        path = write_ranks(folder, weights, 2)[1]
        content = {"module": payload} if place == "rank" else {"module": weights, "optimizer": payload}
    else:
        folder.mkdir()
        path = folder / "pytorch_model.bin"
        content = {"x": {"y": [(1, {2: payload})]}} if place == "deep inside" else {"word_embeddings.weight": payload}
    torch.save(content, path, _use_new_zipfile_serialization=place != "old bin")
    message = refusal(folder)
    assert path.name in message and "which is code" in message and function.__name__ in message
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert mark.exists()


def test_an_index_cannot_point_out_of_its_folder(weights, tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside.bin"
    shard = write_shards(folder, weights)[1]
    index = folder / "pytorch_model.bin.index.json"
    shard.rename(outside)
    text = index.read_text()
    for name in ("../outside.bin", str(outside), "sub/../../outside.bin", "..\\outside.bin", "outside.pt", ""):
        index.write_text(text.replace(json.dumps(shard.name), json.dumps(name)))
        assert "refused" in refusal(folder)
    index.write_text(text)
    shard.symlink_to(outside)
    assert "links to a file outside" in refusal(folder)
    shard.unlink()
    shard.symlink_to("../nothing")
    assert "links to a file outside" in refusal(folder)


def test_links_of_the_hub_cache_are_followed(weights, tmp_path: Path) -> None:
    repository = tmp_path / "models--THUDM--glm-10b"
    folder = repository / "snapshots" / "0a1b2c"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(write_shards(folder, weights)):
        path.rename(repository / "blobs" / f"{number}")
        path.symlink_to(f"../../blobs/{number}")
    assert_holds(open_checkpoint(folder), weights)
    folder.rename(repository / "elsewhere")
    (repository / "elsewhere").rename(tmp_path / "elsewhere")
    assert "missing" in refusal(tmp_path / "elsewhere") or "outside" in refusal(tmp_path / "elsewhere")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards_that_do_not_belong_together_are_named(suffix: str, weights, tmp_path: Path) -> None:
    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)

    first, second = write_shards(tmp_path, weights, suffix)
    whole = second.read_bytes()
    theirs = {key: weights[key] for key in list(weights)[9:]}
    save(theirs | {"word_embeddings.weight": weights["word_embeddings.weight"]}, second)  # twice
    assert f"{second.name}: holds word_embeddings.weight" in refusal(tmp_path)
    save({key: theirs[key] for key in list(theirs)[1:]}, second)
    assert f"{second.name}: lacks {next(iter(theirs))}" in refusal(tmp_path)
    second.write_bytes(first.read_bytes())
    assert f"{second.name}: lacks" in refusal(tmp_path)
    for damaged in (whole[: len(whole) // 2], whole[:3], b"", b"x" * 90):
        second.write_bytes(damaged)
        assert f"{second.name}: truncated or damaged" in refusal(tmp_path)
    second.unlink()
    assert f"{second.name}: missing" in refusal(tmp_path)
    second.mkdir()
    assert f"{second.name}: is a folder" in refusal(tmp_path)


def test_a_damaged_index_is_named(weights, tmp_path: Path) -> None:
    write_shards(tmp_path, weights)
    index = tmp_path / "pytorch_model.bin.index.json"
    for text, fault in (("{", "not JSON"), ("[]", "expected a JSON object"), ('{"weight_map": {}}', "no weight_map"),
                        ("", "empty"), (POINTER, "git lfs pull")):  # fmt: skip
        index.write_text(text)
        assert index.name in refusal(tmp_path) and fault in refusal(tmp_path)


def test_files_that_hold_something_else_are_refused(weights, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for content, fault in (
        ([torch.ones(2)], "holds a list"),
        ({"epoch": 3}, "holds 'epoch'"),
        ({"state_dict": weights}, "holds 'state_dict'"),
        ({}, "hold no weights"),
        ({"word_embeddings.weight": torch.ones(2, dtype=torch.int8)}, "quantized"),
        ({"a": torch.ones(2), "glm.a": torch.ones(2)}, "holds a twice, as a and as glm.a"),
    ):
        torch.save(content, path)
        assert fault in refusal(tmp_path)
    path.unlink()
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert "quantized" in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no weights there" in refusal(tmp_path)


def test_an_archive_that_was_packed_anew_is_refused(weights, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "stored.bin")
    with (
        zipfile.ZipFile(tmp_path / "stored.bin") as stored,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert "compressed" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "mp_rank_00_model_states.pt"])
def test_what_stands_in_the_place_of_a_file_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for text, fault in ((POINTER, "git lfs pull"), ("", "empty")):
        path.write_text(text)
        assert name in refusal(tmp_path) and fault in refusal(tmp_path)
    path.unlink()
    path.mkdir()
    assert f"{name}: is a folder" in refusal(tmp_path)


def test_missing_ranks_are_seen_by_gaps_by_their_number_and_by_shapes(weights, tmp_path: Path) -> None:
    first, second, *_ = write_ranks(tmp_path, weights, 4)
    second.unlink()
    assert f"{second.name}: missing" in refusal(tmp_path)
    for path in tmp_path.iterdir():
        if path != first:
            path.unlink()
    assert "one of 4 ranks, but there is one file" in refusal(tmp_path)  # only shapes tell
    write_ranks(tmp_path, weights, 2)
    rewrite(first, lambda content: content.update(mp_world_size=4))
    assert "is one of 4 ranks, but there are 2 files" in refusal(tmp_path)


def test_ranks_that_do_not_belong_together_are_named(weights, tmp_path: Path) -> None:
    _, second = write_ranks(tmp_path, weights, 2)
    whole = second.read_bytes()
    key = "transformer.final_layernorm.bias"
    for change, fault in (
        (lambda content: content.update(iteration=8), "is of iteration 8, but mp_rank_00_model_states.pt of 7"),
        (lambda content: content["module"].pop(key), f"{key} is only in one"),
        (lambda content: content["module"].update({key: torch.ones(3)}), f"{key} is [3] torch.float32, but [48]"),
        (lambda content: content["module"].update({key: torch.ones(48).half()}), f"{key} is [48] torch.float16"),
        (lambda content: content.pop("module"), "has no entry 'module'"),
    ):
        second.write_bytes(whole)
        rewrite(second, change)
        assert second.name in refusal(tmp_path) and fault in refusal(tmp_path)
    second.write_bytes(whole)
    rewrite(second, lambda content: content["module"].update({key: torch.ones(48)}))
    with pytest.raises(GmaskError, match=r"final_layernorm\.bias differs"):
        open_checkpoint(tmp_path).read(key)


@pytest.mark.parametrize("tracker", ["latest_checkpointed_iteration.txt", "latest"])
def test_a_tracker_that_leads_nowhere_is_named(tracker: str, weights, tmp_path: Path) -> None:
    write_ranks(tmp_path / "model" / "7", weights, 1)
    write_ranks(tmp_path / "8", weights, 1)
    path = tmp_path / "model" / tracker
    path.write_text("7\n")
    assert_holds(open_checkpoint(tmp_path / "model"), weights)
    for text, fault in (
        ("9", "names the iteration 9, which is not there"),
        ("../8", "expected the name of an iteration"),
        (str(tmp_path / "8"), "expected the name of an iteration"),
        ("..", "expected the name of an iteration"),
        ("", "empty"),
        (POINTER, "git lfs pull"),
    ):
        path.write_text(text)
        message = refusal(tmp_path / "model")
        assert tracker in message and fault in message
    path.write_text("7")
    (tmp_path / "model" / "7" / "mp_rank_00_model_states.pt").unlink()
    assert "no mp_rank_00_model_states.pt there" in refusal(tmp_path / "model")
