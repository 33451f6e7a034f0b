"""Reads and writes single files of tensors: safetensors, and those of `torch.save`.

Files are mapped into memory: opening a file of 20 GB takes no memory, and a tensor takes some when it is copied.
Pickles are read with ``weights_only=True``, so that they run no code.

A file to write is planned with tensors on the meta device. Tensors are written one at a time, in any order, so that
only one of them is in memory.

Source: the format description of safetensors; ``torch/serialization.py`` for the archives of `torch.save`; PKWARE's
APPNOTE.TXT 4.3.9 and 4.3.12 for their checksums.
"""

import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gmask.errors import GmaskError, one_line
from gmask.files import refuse_placeholder
from gmask.native import ops as native
from gmask.quantization.formats import (
    BLOCK_LAYOUT,
    block_shape,
    check_form,
    pack_blocks,
    pack_scale_blocks,
    scale_block_shape,
    unpack_blocks,
    unpack_scale_blocks,
)

WEIGHTS_ENTRY = "module"
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point dtypes by their names in safetensors."""

INTEGER_DTYPES = {"I8": torch.int8}
"""The dtype of quantized weights. They are read only if the file has scales, whose names end with `SCALES`."""

SCALES = "weight_scale"
DAMAGED_FILE_ERRORS = (
    SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, TypeError,
    AttributeError, LookupError, AssertionError, OSError,
)  # fmt: skip
"""The errors of torch, safetensors and pickle for a damaged file."""


class LeftOut:
    """Replaces objects in a pickle of the training code that are not needed, such as a loss scaler."""


BOOKKEEPING_CLASSES: list[Any] = [
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    (np.ndarray, "numpy.ndarray"),
    (np.dtype, "numpy.dtype"),
    (np.dtypes.UInt32DType, "numpy.dtypes.UInt32DType"),
    (LeftOut, "fp16.loss_scaler.LossScaler"),
    (LeftOut, "fp16.loss_scaler.DynamicLossScaler"),
    (LeftOut, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (LeftOut, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (LeftOut, "argparse.Namespace"),
]
"""Classes in the checkpoints of THUDM/GLM and DeepSpeed: those of numpy's random state, and some that are replaced."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The quantized tensors of a safetensors file that lie in the blocks of the CPU kernels, to be mapped.

    Everything but `SafetensorsFile.read_blocks` sees them in the published format.

    Attributes:
        bits: of a weight.
        shapes: of the tensors in the published format, by name: those of weights and, by `SCALES`, their scales.
    """

    bits: int
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, bits: int, plan: Mapping[str, Tensor]) -> Self:
        """Returns the blocks of all quantized tensors of a plan."""
        quantized = {name for name, tensor in plan.items() if tensor.dtype == torch.int8}
        scales = {f"{name}_scale" for name in quantized}
        return cls(bits, {name: tensor.shape for name, tensor in plan.items() if name in quantized | scales})

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, str] | None) -> Self | None:
        """Returns the blocks that the header of a file tells of; None if it tells of none.

        Raises:
            GmaskError: blocks of another layout, or a damaged header.
        """
        text = (metadata or {}).get(BLOCKS)
        if text is None:
            return None
        try:
            values = json.loads(text)
            if values["layout"] != BLOCK_LAYOUT:
                raise GmaskError(
                    f"{path}: is laid out for the kernels of another version of gmask: with that one, gmask convert "
                    "FOLDER NEW --to gmask writes the form that all versions read"
                )
            check_form(values["bits"], None)
            return cls(values["bits"], {name: torch.Size(shape) for name, shape in values["shapes"].items()})
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            if isinstance(error, GmaskError):
                raise
            raise GmaskError(f"{path}: its header is damaged; make it again ({one_line(error)})") from error

    def header(self) -> str:
        """Returns the text that `read` takes."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return json.dumps({"layout": BLOCK_LAYOUT, "bits": self.bits, "shapes": shapes}, separators=(",", ":"))

    def plan(self, name: str, planned: Tensor) -> Tensor:
        """Returns a tensor on the meta device as it lies in the file."""
        if name not in self.shapes:
            return planned
        shape = self.shapes[name]
        lies = scale_block_shape(shape) if name.endswith(SCALES) else block_shape(shape, self.bits)
        return planned.new_empty(lies)

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor as it lies in the file."""
        if name not in self.shapes:
            return tensor
        if name.endswith(SCALES):
            return pack_scale_blocks(tensor)
        pack = native.pack_blocks_native if native.instruction_sets() else pack_blocks
        return pack(tensor, self.bits).view(torch.int8)

    def unpack(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor of the file in the published format."""
        if name not in self.shapes:
            return tensor
        rows, *others = self.shapes[name]
        if name.endswith(SCALES):
            return unpack_scale_blocks(tensor, rows, group_size=1 if others else None)
        return unpack_blocks(tensor.view(torch.uint8), self.bits, rows, others[0] * 8 // self.bits)


BLOCKS = "gmask_blocks"
"""The key of `Blocks` in the header of a file."""

BLOCK_ALIGNMENT = 64
"""Bytes: a file's data start at a multiple of it, so that blocks do as those in memory."""


class TensorFile(Protocol):
    """An open file of tensors."""

    path: Path
    is_mapped: bool  # if False, reading one tensor reads the whole file into memory

    def names(self) -> list[str]:
        """Returns the names in the order of the file."""

    def shape(self, key: str) -> torch.Size: ...
    def dtype(self, key: str) -> torch.dtype: ...
    def read(self, key: str) -> Tensor:
        """Returns the tensor on the CPU, as stored. It may be a view of the file: copy it before the file changes."""


class SafetensorsFile:
    """A file in the safetensors format.

    Raises:
        GmaskError: not such a file, or one with tensors that are neither floating-point nor quantized.
    """

    is_mapped = True

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_placeholder(path)
        try:
            file: Any = safe_open(path, framework="pt")
            self._file, self._entries = file, {key: file.get_slice(key) for key in file.offset_keys()}
        except DAMAGED_FILE_ERRORS as error:
            raise explain(path, error) from error
        self.blocks = Blocks.read(path, file.metadata())
        if self.blocks is not None:
            self._check_blocks(self.blocks)
        for key, entry in self._entries.items():
            if entry.get_dtype() not in FLOAT_DTYPES | (INTEGER_DTYPES if _has_scales(self._entries) else {}):
                raise GmaskError(_explain_integers(path, key, entry.get_dtype()))

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, key: str) -> torch.Size:
        published = None if self.blocks is None else self.blocks.shapes.get(key)
        return torch.Size(self._entries[key].get_shape()) if published is None else published

    def dtype(self, key: str) -> torch.dtype:
        return (FLOAT_DTYPES | INTEGER_DTYPES)[self._entries[key].get_dtype()]

    def read(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor if self.blocks is None else self.blocks.unpack(key, tensor)

    def read_blocks(self, key: str) -> Tensor:
        """Returns a tensor of `blocks` as it lies in the file, mapped; a weight as uint8."""
        assert self.blocks is not None and key in self.blocks.shapes, key
        tensor: Tensor = self._file.get_tensor(key)
        return tensor if key.endswith(SCALES) else tensor.view(torch.uint8)

    def _check_blocks(self, blocks: Blocks) -> None:
        for key, shape in blocks.shapes.items():
            is_scale = key.endswith(SCALES)
            dtypes, axes = (("F16", "F32"), (1, 2)) if is_scale else (("I8",), (2,))
            entry: Any = self._entries.get(key)
            fits = entry is not None and entry.get_dtype() in dtypes and len(shape) in axes
            if not fits or list(blocks.plan(key, torch.empty(0, device="meta")).shape) != entry.get_shape():
                raise GmaskError(f"{self.path}: {key} is not as its header says: truncated or damaged, make it again")


class PickledFile:
    """A file of `torch.save`: a dictionary of tensors, or one that has such a dictionary as an entry.

    Args:
        path: of the file.
        entry: the name of the entry with the tensors; None if the whole is the dictionary.

    Raises:
        GmaskError: not such a file, one that would run code, or one that holds other objects.
    """

    def __init__(self, path: Path, entry: str | None = None) -> None:
        self.path = path
        refuse_placeholder(path)
        self.is_mapped = _is_zip(path)
        self._entry = entry
        content = self._load(whole=False)
        tensors = content if entry is None else content.get(entry)
        if not isinstance(tensors, dict):
            raise GmaskError(f"{path}: has no entry {entry!r}; it is no checkpoint of the training code")
        for key, tensor in tensors.items():
            _check_plain(path, key, tensor, may_be_integers=_has_scales(tensors))
        self._tensors: dict[str, Tensor] = {key: tensor.detach() for key, tensor in tensors.items()}
        self._whole: dict[str, Tensor] = {}
        others = {} if entry is None else {key: value for key, value in content.items() if key != entry}
        self.others: dict[str, Any] = {str(key): value if _is_data(value) else None for key, value in others.items()}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> torch.Size:
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str) -> Tensor:
        """As in `TensorFile`. If the file cannot be mapped, a tensor that was read is not kept."""
        if self.is_mapped:
            return self._tensors[key]
        if key not in self._whole:
            content = self._load(whole=True)
            self._whole = dict(content if self._entry is None else content[self._entry])
        return self._whole.pop(key).detach()

    def _load(self, *, whole: bool) -> Any:
        device = "cpu" if self.is_mapped or whole else "meta"
        try:
            if self.is_mapped:
                _refuse_compressed(self.path)
            with torch.serialization.safe_globals(BOOKKEEPING_CLASSES):
                content = torch.load(self.path, map_location=device, mmap=self.is_mapped, weights_only=True)
        except GmaskError:
            raise
        except DAMAGED_FILE_ERRORS as error:
            raise explain(self.path, error) from error
        if not isinstance(content, dict):
            raise GmaskError(f"{self.path}: holds a {type(content).__name__}, not weights by name")
        return content


def explain(path: Path, error: Exception) -> GmaskError:
    """Returns our error for an error of another library about a file."""
    if code := re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", str(error)):
        return GmaskError(
            f"{path}: asks to run {code[1]} when it is read, which is code and no weights: refused; get the weights "
            "from whom you trust, as safetensors"
        )
    return GmaskError(f"{path}: truncated or damaged, download or copy it again ({one_line(error)})")


def _is_zip(path: Path) -> bool:
    """Returns True if the file has the format of `torch.save` since PyTorch 1.6, the only one that can be mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refuse_compressed(path: Path) -> None:
    """Raises `GmaskError` if an archiver has compressed the file: mapped, it would give wrong numbers."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise GmaskError(f"{path}: an archiver has compressed it; use the file that torch.save wrote")


def _has_scales(keys: Iterable[Any]) -> bool:
    return any(str(key).endswith(SCALES) for key in keys)


def _explain_integers(path: Path, key: str, dtype: object) -> str:
    return (
        f"{path}: {key} is stored as {dtype}, and the file holds no scales, without which quantized weights are not "
        "read; download the model again, or quantize it anew"
    )


def _check_plain(path: Path, key: Any, tensor: Any, *, may_be_integers: bool) -> None:
    if not isinstance(key, str) or not isinstance(tensor, Tensor):
        raise GmaskError(f"{path}: holds {key!r}, which is no tensor; expected weights by name and nothing else")
    is_integers = may_be_integers and tensor.dtype == torch.int8
    if tensor.layout != torch.strided or tensor.is_quantized or not (tensor.dtype.is_floating_point or is_integers):
        raise GmaskError(_explain_integers(path, key, tensor.dtype))


def _is_data(value: Any, depth: int = 20) -> bool:
    """Returns True if a value consists of numbers, strings and containers, nested no deeper than ``depth``."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return depth > 0 and all(_is_data(item, depth - 1) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


class TensorWriter:
    """A file that is filled in a ``with`` block, and complete at its end.

    Args:
        path: of a file that has everything but the data of the tensors.
        plan: all tensors by name, on the meta device.
        offsets: of the data of each tensor, in bytes.
    """

    def __init__(self, path: Path, plan: Mapping[str, Tensor], offsets: Mapping[str, int]) -> None:
        self.path = path
        self._open = set(plan)
        self._plan = plan
        self._offsets = offsets
        self._file = path.open("r+b")

    def write(self, name: str, tensor: Tensor) -> None:
        planned = self._plan[name]
        assert (tensor.shape, tensor.dtype) == (planned.shape, planned.dtype), f"{name} is not as planned"
        self._open.remove(name)
        self._file.seek(self._offsets[name])
        self._put(name, as_bytes(tensor))

    def _put(self, name: str, data: memoryview) -> None:
        self._file.write(data)

    def _finish(self) -> None:
        """Writes the parts of the file that depend on all tensors."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                assert not self._open, f"{min(self._open)} was planned and not written"
                self._finish()


class SafetensorsWriter(TensorWriter):
    """A file in the safetensors format: the length of a JSON header in 8 bytes, the header, the numbers.

    Args:
        blocks: those of the planned tensors that are written in blocks.
    """

    def __init__(self, path: Path, plan: Mapping[str, Tensor], blocks: Blocks | None = None) -> None:
        names = {dtype: name for name, dtype in (FLOAT_DTYPES | INTEGER_DTYPES).items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
        self._blocks = blocks
        if blocks is not None:
            header["__metadata__"][BLOCKS] = blocks.header()
            plan = {name: blocks.plan(name, tensor) for name, tensor in plan.items()}
        end = 0
        starts: dict[str, int] = {}
        for name in sorted(plan, key=lambda name: -plan[name].itemsize):  # so that all are aligned to their dtypes
            starts[name], end = end, end + plan[name].nbytes
            header[name] = {
                "dtype": names[plan[name].dtype],
                "shape": list(plan[name].shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % (8 if blocks is None else BLOCK_ALIGNMENT))
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        super().__init__(path, plan, {name: 8 + len(text) + start for name, start in starts.items()})

    def write(self, name: str, tensor: Tensor) -> None:
        super().write(name, tensor if self._blocks is None else self._blocks.pack(name, tensor))


class PickledWriter(TensorWriter):
    """A file of `torch.save` that holds a dictionary with the tensors by name in its entry ``module``.

    `torch.save` writes the archive, with gaps for the data of the tensors.

    Args:
        others: the other entries, plain data.
    """

    def __init__(self, path: Path, plan: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode  # loads sympy, which nothing else here needs

        assert _is_data(others), "tensors beside the weights would become zeros"
        with FakeTensorMode():  # tensors that claim to be on the CPU, but take no memory
            tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in plan.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({**others, WEIGHTS_ENTRY: tensors}, path)
        archive: Any = torch._C.PyTorchFileReader(str(path))
        offsets = {name: archive.get_record_offset(f"data/{number}") for number, name in enumerate(plan)}
        super().__init__(path, plan, offsets)
        self._checksums: dict[str, int] = {}

    def _put(self, name: str, data: memoryview) -> None:
        super()._put(name, data)
        self._checksums[name] = zlib.crc32(data)

    def _finish(self) -> None:
        """Writes the checksums into the archive, for zip tools. For gaps torch wrote 0; it does not check them."""
        with zipfile.ZipFile(self.path) as archive:
            entry = archive.start_dir
            paths = [info.filename for info in archive.infolist()]
        checksums = {f"data/{number}": self._checksums[name] for number, name in enumerate(self._plan)}
        for name in self._plan:
            self._file.seek(self._offsets[name] + self._plan[name].nbytes + 4)  # behind the data, and a signature
            self._file.write(struct.pack("<I", self._checksums[name]))
        for path in paths:  # of the directory at the end of the archive
            self._file.seek(entry)
            lengths = struct.unpack_from("<3H", self._file.read(DIRECTORY_ENTRY), 28)
            if (checksum := checksums.get(path.partition("/")[2])) is not None:
                self._file.seek(entry + 16)
                self._file.write(struct.pack("<I", checksum))
            entry += DIRECTORY_ENTRY + sum(lengths)


DIRECTORY_ENTRY = 46
"""Bytes of an entry in the directory of a zip archive, before its name, its extra fields and its comment."""


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor on the CPU, without a copy if it is contiguous."""
    numbers = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(numbers)  # type: ignore[arg-type]  # numpy says so only of Python 3.12 and later


def plan_shards(plan: Mapping[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """Divides tensors among safetensors files of at most ``limit`` bytes, or one tensor; returns them by file name.

    Scales stay in the file of the tensor before them, since a file of integers without scales is refused.
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
