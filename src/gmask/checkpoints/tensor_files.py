"""Which tensors does one file of weights hold, and how is one of them read?

Files are mapped, not read: a tensor takes memory when it is copied, and opening a file of 20 GB takes none. No pickle
runs code: each is read with ``weights_only=True``.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gmask.errors import GmaskError, one_line
from gmask.models.strict_loading import LFS_POINTER

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of floating-point numbers, as safetensors calls them."""

INTEGERS = {"I8": torch.int8}
"""Of quantized weights, which are read where there are scales beside them (`SCALES` ends the keys of these)."""

SCALES = "weight_scale"

UNREADABLE = (
    SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, TypeError,
    AttributeError, LookupError, AssertionError, OSError,
)  # fmt: skip
"""What torch, safetensors and the reader of pickles raise for a damaged file."""


class LeftOut:
    """Stands in a pickle of the training code for an object that has nothing to do with the weights."""


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
"""What THUDM/GLM and DeepSpeed store beside tensors: numpy's random state, and objects that are replaced unread."""


class TensorFile(Protocol):
    """An open file of tensors."""

    path: Path
    is_mapped: bool  # else it fills memory as soon as one tensor is read

    def names(self) -> list[str]:
        """Names in the order in which the tensors lie in the file."""

    def shape(self, key: str) -> torch.Size: ...
    def dtype(self, key: str) -> torch.dtype: ...
    def read(self, key: str) -> Tensor:
        """The tensor on the CPU, as stored; it may be a view of the file, so copy it before the file changes."""


class SafetensorsFile:
    """A file in the safetensors format.

    Raises:
        GmaskError: not such a file, or one that holds other than floating-point numbers.
    """

    is_mapped = True

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_placeholder(path)
        try:
            file: Any = safe_open(path, framework="pt")
            self._file, self._entries = file, {key: file.get_slice(key) for key in file.offset_keys()}
        except UNREADABLE as error:
            raise explain(path, error) from error
        for key, entry in self._entries.items():
            if entry.get_dtype() not in DTYPES | (INTEGERS if _has_scales(self._entries) else {}):
                raise GmaskError(_explain_integers(path, key, entry.get_dtype()))

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, key: str) -> torch.Size:
        return torch.Size(self._entries[key].get_shape())

    def dtype(self, key: str) -> torch.dtype:
        return (DTYPES | INTEGERS)[self._entries[key].get_dtype()]

    def read(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor


class PickledFile:
    """A file that `torch.save` wrote: tensors by name, at the top or in an entry of it.

    Args:
        path: of the file.
        entry: the name of the entry with the tensors; None if they are the whole.

    Raises:
        GmaskError: not such a file, one that would run code, or one that holds something else.
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
        """As in `TensorFile`; of a file that cannot be mapped, each tensor is let go once it has been read."""
        if self.is_mapped:
            return self._tensors[key]
        if key not in self._whole:
            content = self._load(whole=True)
            self._whole = dict(content if self._entry is None else content[self._entry])
        return self._whole.pop(key).detach()

    def _load(self, *, whole: bool) -> Any:
        place = "cpu" if self.is_mapped or whole else "meta"
        try:
            if self.is_mapped:
                _refuse_compressed(self.path)
            with torch.serialization.safe_globals(BOOKKEEPING_CLASSES):
                content = torch.load(self.path, map_location=place, mmap=self.is_mapped, weights_only=True)
        except GmaskError:
            raise
        except UNREADABLE as error:
            raise explain(self.path, error) from error
        if not isinstance(content, dict):
            raise GmaskError(f"{self.path}: holds a {type(content).__name__}, not weights by name")
        return content


def refuse_placeholder(path: Path) -> None:
    """Raises `GmaskError` if there is no file, or only what stands for one: a folder, nothing, a Git LFS pointer."""
    if path.is_dir():
        raise GmaskError(f"{path}: is a folder, where a file is expected")
    if not path.is_file():
        raise GmaskError(f"{path}: missing; download or copy it again")
    if path.stat().st_size == 0:
        raise GmaskError(f"{path}: truncated or damaged, download or copy it again (it is empty)")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise GmaskError(f"{path}: cannot be read ({error.strerror})") from error
    if start == LFS_POINTER:
        raise GmaskError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` there")


def explain(path: Path, error: Exception) -> GmaskError:
    """What another library's error means for a file."""
    if code := re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", str(error)):
        return GmaskError(
            f"{path}: asks to run {code[1]} when it is read, which is code and no weights: refused; get the weights "
            "from whom you trust, as safetensors"
        )
    return GmaskError(f"{path}: truncated or damaged, download or copy it again ({one_line(error)})")


def _is_zip(path: Path) -> bool:
    """Whether `torch.save` wrote the file in its form since PyTorch 1.6, the only one that can be mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refuse_compressed(path: Path) -> None:
    """Raises `GmaskError` if an archiver has packed the file anew: mapped, it would give other numbers."""
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
    """Whether a value is made of numbers, strings and containers alone, these no deeper than ``depth``."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return depth > 0 and all(_is_data(item, depth - 1) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
