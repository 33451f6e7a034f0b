"""Are files of tensors that are written piece by piece what torch and safetensors read?"""

import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from conversions import assert_same
from gmask.checkpoints import tensor_files
from gmask.checkpoints.tensor_files import PickledWriter, SafetensorsWriter, plan_shards


def test_tensors_written_in_any_order_are_read_by_torch_and_by_safetensors(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensor_files, "LARGE", 100)  # entries of both kinds
    tensors = {
        "a": torch.randn(5, 7).half(),
        "b": torch.randn(3).bfloat16(),
        "c": torch.randn(2, 9),
        "d": torch.ones(()),
    }
    plan = {name: tensor.to("meta") for name, tensor in tensors.items()}
    state = torch.arange(9, dtype=torch.uint8)
    with PickledWriter(tmp_path / "x.pt", plan, {"iteration": 3, "state": state}) as pickled:
        for name in "dbca":
            pickled.write(name, tensors[name])
    for is_mapped in (True, False):
        found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=is_mapped)
        assert_same(found["module"], tensors)
        assert found["iteration"] == 3 and torch.equal(found["state"], state)
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    reader = torch._C.PyTorchFileReader(str(tmp_path / "x.pt"))
    assert all(reader.get_record_offset(f"data/{number}") % 64 == 0 for number in range(5))
    with SafetensorsWriter(tmp_path / "x.safetensors", plan) as flat:
        for name in "dbca":
            flat.write(name, tensors[name])
    assert_same(load_file(tmp_path / "x.safetensors"), tensors)


def test_a_shard_holds_what_fits_or_one_tensor() -> None:
    sizes = {"a": 3, "b": 2, "c": 9, "d": 1}
    plan = {name: torch.empty(size, dtype=torch.float16, device="meta") for name, size in sizes.items()}
    assert [list(shard) for shard in plan_shards(plan, 10).values()] == [["a", "b"], ["c"], ["d"]]
