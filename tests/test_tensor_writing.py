"""Are files of tensors that are written piece by piece what torch and safetensors read?"""

import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversions import assert_same
from gmask.checkpoints.tensor_files import PickledWriter, SafetensorsWriter, plan_shards


def test_tensors_written_in_any_order_are_read_by_torch_and_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 7).half(),
        "b": torch.randn(3).bfloat16(),
        "c": torch.randn(2, 9),
        "d": torch.ones(()),
    }
    plan = {name: tensor.to("meta") for name, tensor in tensors.items()}
    others = {"iteration": 3, "random_rng_state": (3, (1, 2**40), None), "lr_scheduler": {"name": "x", "steps": [1.5]}}
    with PickledWriter(tmp_path / "x.pt", plan, others) as pickled:
        for name in "dbca":
            pickled.write(name, tensors[name])
    for is_mapped in (True, False):
        found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=is_mapped)
        assert_same(found["module"], tensors)
        assert {key: value for key, value in found.items() if key != "module"} == others
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    reader = torch._C.PyTorchFileReader(str(tmp_path / "x.pt"))
    assert all(reader.get_record_offset(f"data/{number}") % 64 == 0 for number in range(4))
    with SafetensorsWriter(tmp_path / "x.safetensors", plan) as flat:
        for name in "dbca":
            flat.write(name, tensors[name])
    assert_same(load_file(tmp_path / "x.safetensors"), tensors)


def test_a_pickled_file_holds_the_bytes_that_torch_saves_of_the_same_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300, 7).half(), "b": torch.randn(0, 4), "c": torch.randn(17)}
    others = {"iteration": 3, "lr_scheduler": None}
    (tmp_path / "theirs").mkdir()
    torch.save({**others, "module": tensors}, tmp_path / "theirs" / "x.pt")
    plan = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with PickledWriter(tmp_path / "x.pt", plan, others) as file:
        for name in "cab":
            file.write(name, tensors[name])
    mine, theirs = (zipfile.ZipFile(path) for path in (tmp_path / "x.pt", tmp_path / "theirs" / "x.pt"))
    assert mine.namelist() == theirs.namelist()
    for one, other in zip(mine.infolist(), theirs.infolist(), strict=True):
        # The pickle spells "cpu" anew for each tensor, and the id is a digest that no reader of weights looks at.
        if not one.filename.endswith(("data.pkl", "serialization_id")):
            assert (one.CRC, mine.read(one)) == (other.CRC, theirs.read(other))
    found, expected = (torch.load(path / "x.pt", weights_only=True) for path in (tmp_path, tmp_path / "theirs"))
    assert_same(found.pop("module"), expected.pop("module"))
    assert found == expected


def resident_bytes() -> int:
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="measured as Linux counts it")
@pytest.mark.parametrize("kind", ["pickled", "safetensors"])
def test_writing_does_not_hold_what_is_written(kind: str, tmp_path: Path) -> None:
    size = 2**22  # numbers: 16 MB a tensor
    plan = {str(number): torch.empty(size, device="meta") for number in range(16)}
    PickledWriter(tmp_path / "first", {}, {}).__exit__(None, None, None)  # what is loaded once is no part of it
    before, peak = resident_bytes(), 0
    path = tmp_path / "x"
    with PickledWriter(path, plan, {}) if kind == "pickled" else SafetensorsWriter(path, plan) as file:
        for number in range(16):
            file.write(str(number), torch.full((size,), float(number)))
            peak = max(peak, resident_bytes() - before)
    # malloc may keep some of the freed tensors, of which more are in use elsewhere when other tests ran before.
    assert path.stat().st_size > 16 * 4 * size and peak < 6 * 4 * size
    stored = torch.load(path, mmap=True)["module"] if kind == "pickled" else load_file(path)
    assert all(bool((stored[str(number)] == number).all()) for number in range(16))


def test_a_shard_holds_what_fits_or_one_tensor() -> None:
    sizes = {"a": 3, "b": 2, "c": 9, "d": 1}
    plan = {name: torch.empty(size, dtype=torch.float16, device="meta") for name, size in sizes.items()}
    assert [list(shard) for shard in plan_shards(plan, 10).values()] == [["a", "b"], ["c"], ["d"]]
