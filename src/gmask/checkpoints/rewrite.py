"""`rewrite`: writes a folder of a model anew, as a transform plans it, whole or not at all."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gmask.checkpoints.folder import Config, Folder
from gmask.checkpoints.formats import RANK_FILE, TRACKERS
from gmask.checkpoints.save import Content, verify_config, verify_weights, write_config, write_tokenizer
from gmask.errors import GmaskError
from gmask.files import written_folder
from gmask.hardware import format_bytes

COMPANIONS = ("README.md", "LICENSE", "MODEL_LICENSE", "generation_config.json")
"""Files that are copied with the weights: model card, licences, generation settings."""

Advance: TypeAlias = Callable[[int], object]
"""Is called with the number of bytes that were processed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The report of a rewriting."""

    source: str
    target: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


R = TypeVar("R", bound=Report)


@dataclass(frozen=True, slots=True)
class Plan(Generic[R]):
    """The plan of a transform for a folder; nothing is written yet.

    Attributes:
        nbytes: of the new weights.
        write: writes the weights into a folder.
        report: makes the report, from the fields of `Report` and the sizes of all ``files`` by name.
        config: of the new folder; None for a form without one.
        tokenizer: of the new folder; None for a form without one.
        published: True to write config and tokenizer in the published form.
        expected: the tensors that the new weights are compared with, bit by bit, when they are read back.
    """

    nbytes: int
    write: Callable[[Path, Advance], None]
    report: Callable[..., R]
    config: Config | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    published: bool = False
    expected: Content | None = None


def rewrite(
    folder: Folder,
    target: Path,
    transform: Callable[[Folder], Plan[R]],
    *,
    force: bool = False,
    also_read: Sequence[Path] = (),
) -> R:
    """Writes a folder anew, as a transform plans it. The source stays as it is.

    The target appears when all is done, or not at all.

    Args:
        target: a folder that does not exist yet.
        force: replace a checkpoint at the target, after the new one is complete.
        also_read: folders that the transform reads beside the source.

    Raises:
        GmaskError: a target that is in use; no space on the disk; a source that the transform refuses.
    """
    started = time.monotonic()
    check_target(folder.path, target, force=force, also_read=also_read)
    with folder:
        plan = transform(folder)
        check_space(target, plan.nbytes)
        with written_folder(target) as new:
            _fill(plan, new, folder.path)
            files = {
                path.relative_to(new).as_posix(): path.stat().st_size
                for path in sorted(new.rglob("*"))
                if path.is_file()
            }
    seconds = round(time.monotonic() - started, 1)
    return plan.report(source=str(folder), target=str(target), files=files, seconds=seconds)


def _fill(plan: Plan[R], folder: Path, source: Path) -> None:
    """Writes all files of the new folder, and reads them back."""
    passes = 1 if plan.expected is None else 2
    with tqdm(total=passes * plan.nbytes, unit="B", unit_scale=True, desc="writing", leave=False, disable=None) as bar:
        plan.write(folder, bar.update)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if plan.tokenizer is not None:
            write_tokenizer(plan.tokenizer, folder, published=plan.published)
        if plan.config is not None:
            write_config(plan.config, folder, published=plan.published)
        bar.set_description("reading back")
        if plan.expected is not None:
            verify_weights(plan.expected, folder, bar.update)
        if plan.config is not None and plan.tokenizer is not None:
            verify_config(folder, plan.config, plan.tokenizer)


OWN_FILES = (
    "*.safetensors", "pytorch_model*.bin", "*.json", "*.model", "merges.txt", "vocab.txt", "chat_template.jinja",
    "README.md", "LICENSE", "MODEL_LICENSE", ".gitattributes", *TRACKERS,
)  # fmt: skip
"""The files of a checkpoint. A folder that holds any other file is not replaced."""


def check_target(source: Path, target: Path, *, force: bool, also_read: Sequence[Path] = ()) -> None:
    """Raises `GmaskError` if writing a folder would overwrite files that are read, or that are no checkpoint.

    Args:
        source: the folder that is read.
        target: must not exist, or be empty; with ``force``, it may hold a checkpoint and nothing else.
        also_read: folders that are read beside the source.
    """
    resolved = target.resolve()
    for folder in (source, *also_read):
        real = folder.resolve()
        if real == resolved:
            raise GmaskError(f"{target}: is what is read; name another folder for the result")
        if resolved.is_relative_to(real):
            raise GmaskError(f"{target}: lies in {folder}, which is read; name a folder outside it")
        if real.is_relative_to(resolved):
            raise GmaskError(f"{target}: holds {folder}, which is read; name another folder for the result")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise GmaskError(f"{target}: is a file or a link; name a new folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise GmaskError(f"{target}: exists; name a new folder, or use --force to replace it")
    if foreign := _find_foreign(target):
        raise GmaskError(
            f"{target}: holds {foreign.name}, which is no part of a checkpoint; move it away, or remove {target}"
        )


def _find_foreign(folder: Path) -> Path | None:
    """Returns a file or folder that does not belong to a checkpoint; None if there is none."""
    iterations = [path for path in folder.iterdir() if path.is_dir()]
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            inner = list(path.iterdir())
            if len(iterations) > 1 or not inner or not all(RANK_FILE.fullmatch(entry.name) for entry in inner):
                return path
        elif not RANK_FILE.fullmatch(path.name) and not any(fnmatch(path.name, pattern) for pattern in OWN_FILES):
            return path
    return None


def check_space(target: Path, needed: int) -> None:
    """Raises `GmaskError`, with the numbers, if the disk has less than ``needed`` bytes free."""
    free = shutil.disk_usage(nearest_folder(target)).free
    if needed > free:
        raise GmaskError(f"{target}: needs {format_bytes(needed)} of the disk, {format_bytes(free)} are free")


def nearest_folder(path: Path) -> Path:
    """Returns the nearest parent folder that exists."""
    return next(parent for parent in path.resolve().parents if parent.is_dir())
