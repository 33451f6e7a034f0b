"""How is a file of tensors written one tensor at a time?

A file is planned with tensors on the meta device, which have shapes and no numbers, and takes as much memory as the
tensor that is being written. Tensors may come in any order.
Source: the format description of safetensors; ``torch/serialization.py`` for the archives of `torch.save`.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gmask.checkpoints.megatron import WEIGHTS_ENTRY
from gmask.checkpoints.tensor_files import DTYPES, INTEGERS, SCALES

ALIGNMENT = 64  # of tensors in an archive, so that they can be mapped; as torch.save has it
LARGE = 2**30  # from here on an entry of an archive has the long form of its header


class TensorWriter:
    """A file that is being written, in a ``with`` block; whole on the disk once that is left."""

    def __init__(self, path: Path, plan: Mapping[str, Tensor]) -> None:
        self._open = set(plan)
        self._plan = plan
        self._file = path.open("wb")

    def write(self, name: str, tensor: Tensor) -> None:
        planned = self._plan[name]
        assert (tensor.shape, tensor.dtype) == (planned.shape, planned.dtype), f"{name} is not as planned"
        self._open.remove(name)
        self._put(name, as_bytes(tensor))

    def _put(self, name: str, data: memoryview) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        assert not self._open, f"{min(self._open)} was planned and not written"
        self._finish()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _finish(self) -> None:
        """Writes what stands at the end of the file."""

    def _abandon(self) -> None:
        """Lets go what would write to the file later."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._close()
        finally:
            with suppress(OSError, ValueError):
                self._abandon()
            self._file.close()


class SafetensorsWriter(TensorWriter):
    """A file in the safetensors format: the length of a JSON header in 8 bytes, the header, the numbers."""

    def __init__(self, path: Path, plan: Mapping[str, Tensor]) -> None:
        super().__init__(path, plan)
        names = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
        end = 0
        self._offsets: dict[str, int] = {}
        for name in sorted(plan, key=lambda name: -plan[name].itemsize):  # none lies across the grid of its dtype
            start, end = end, end + plan[name].nbytes
            header[name] = {
                "dtype": names[plan[name].dtype],
                "shape": list(plan[name].shape),
                "data_offsets": [start, end],
            }
            self._offsets[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._start = 8 + len(text)

    def _put(self, name: str, data: memoryview) -> None:
        self._file.seek(self._start + self._offsets[name])
        self._file.write(data)


class PickledWriter(TensorWriter):
    """A file as `torch.save` makes it, of an object with the tensors by name in its entry ``module``.

    Args:
        others: its other entries, plain data and tensors, which are written at once.
    """

    def __init__(self, path: Path, plan: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
        super().__init__(path, plan)
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._folder = path.stem
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump({**others, WEIGHTS_ENTRY: dict(plan)})
        self._put_entry("data.pkl", memoryview(buffer.getbuffer()))
        self._put_entry("byteorder", memoryview(b"little"))
        self._numbers = {name: pickler.numbers[id(tensor)] for name, tensor in plan.items()}
        for number, tensor in enumerate(pickler.tensors):
            if not tensor.is_meta:
                self._put_entry(f"data/{number}", as_bytes(tensor))

    def _put(self, name: str, data: memoryview) -> None:
        self._put_entry(f"data/{self._numbers[name]}", data)

    def _put_entry(self, name: str, data: memoryview) -> None:
        entry = zipfile.ZipInfo(f"{self._folder}/{name}")
        is_large = len(data) >= LARGE
        header = 30 + len(entry.filename) + (20 if is_large else 0) + 4
        gap = -(self._file.tell() + header) % ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", gap) + bytes(gap)
        with self._archive.open(entry, "w", force_zip64=is_large) as file:
            file.write(data)

    def _finish(self) -> None:
        self._put_entry("version", memoryview(b"3\n"))
        self._archive.close()

    def _abandon(self) -> None:
        self._archive.close()


class _Storage:
    """Stands in a pickle for the numbers of a tensor, which lie in an entry of their own."""

    def __init__(self, number: int, tensor: Tensor) -> None:
        self.number, self.tensor = number, tensor


class _Pickler(pickle.Pickler):
    """Pickles tensors as `torch.save` does, those without numbers too."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)  # that of torch.save; the training code's Python reads it
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}  # places in the list, by identity

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        number = self.numbers.setdefault(id(value), len(self.tensors))
        self.tensors.append(value)
        strides = torch.empty(value.shape, device="meta").stride()
        storage = _Storage(number, value)
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(value.shape), strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        storage_class = getattr(torch, STORAGES[value.tensor.dtype])
        return ("storage", storage_class, str(value.number), "cpu", value.tensor.numel())


STORAGES = {
    torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage", torch.int32: "IntStorage",
    torch.int16: "ShortStorage", torch.int8: "CharStorage", torch.uint8: "ByteStorage", torch.bool: "BoolStorage",
}  # fmt: skip
"""What `torch.save` calls the numbers of a dtype."""


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous."""
    numbers = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(numbers)  # type: ignore[arg-type]  # numpy says so only of Python 3.12 and later


def plan_shards(plan: Mapping[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """The names of safetensors files, and what each holds: at most ``limit`` bytes, or one tensor.

    Scales stay in the file of the tensor before them: a file of integers alone is not read.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in plan.items():
        if shards[-1] and size + tensor.nbytes > limit and not name.endswith(SCALES):
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
