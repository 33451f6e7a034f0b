"""Where are the files of a checkpoint of the original training code, and do they belong together?

Such a checkpoint is a folder ``DIR/<iteration>`` with a file for each rank of model parallelism, and in DIR a tracker
file that names the iteration; without a tracker the folder is the iteration itself.
Source: THUDM/GLM utils.py (``save_checkpoint``, ``load_checkpoint``) and change_mp.py.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from gmask.checkpoints.tensor_files import PickledFile, refuse_placeholder
from gmask.errors import GmaskError

TRACKERS = ("latest_checkpointed_iteration.txt", "latest")  # of THUDM/GLM, of DeepSpeed
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
WEIGHTS_ENTRY = "module"


def rank_file_name(rank: int) -> str:
    return f"mp_rank_{rank:02d}_model_states.pt"


def find_tracker(folder: Path) -> Path | None:
    """The file that names the newest iteration; None if the folder is an iteration itself."""
    return next((folder / name for name in TRACKERS if (folder / name).is_file()), None)


def holds_ranks(folder: Path) -> bool:
    """Whether rank files lie in the folder itself."""
    return folder.is_dir() and any(RANK_FILE.fullmatch(path.name) for path in folder.iterdir())


def find_rank_files(folder: Path) -> list[Path]:
    """The files of all ranks, in their order.

    Raises:
        GmaskError: the tracker names no iteration of this folder, or a rank's file is missing.
    """
    iteration = _find_iteration(folder)
    found = {int(match[1]): path for path in iteration.iterdir() if (match := RANK_FILE.fullmatch(path.name))}
    if not found:
        raise GmaskError(f"{iteration}: no {rank_file_name(0)} there, so it is no checkpoint of the training code")
    for rank in range(max(found) + 1):
        if rank not in found:
            raise GmaskError(f"{iteration / rank_file_name(rank)}: missing, though there is {found[max(found)].name}")
    return [found[rank] for rank in sorted(found)]


def _find_iteration(folder: Path) -> Path:
    tracker = find_tracker(folder)
    if tracker is None:
        return folder
    refuse_placeholder(tracker)
    name = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise GmaskError(f"{tracker}: expected the name of an iteration, found {name[:40]!r}")
    if not (folder / name).is_dir():
        raise GmaskError(f"{tracker}: names the iteration {name}, which is not there; copy its folder, or name another")
    return folder / name


def open_ranks(files: Sequence[Path]) -> list[PickledFile]:
    """The opened files of all ranks.

    Raises:
        GmaskError: they do not belong together, or some are missing.
    """
    ranks = [PickledFile(path, WEIGHTS_ENTRY) for path in files]
    first = ranks[0]
    for rank in ranks:
        size = rank.others.get("mp_world_size")
        if isinstance(size, int) and size != len(ranks):
            raise GmaskError(f"{rank.path}: is one of {size} ranks, but {_count_files(ranks)}")
        if rank.others.get("iteration") != first.others.get("iteration"):
            iterations = f"{rank.others.get('iteration')}, but {first.path.name} of {first.others.get('iteration')}"
            raise GmaskError(f"{rank.path}: is of iteration {iterations}; take all ranks from one checkpoint")
        if differing := set(rank.names()) ^ set(first.names()):
            raise GmaskError(f"{rank.path}: {min(differing)} is only in one of it and {first.path.name}")
        for key in rank.names():
            if (rank.shape(key), rank.dtype(key)) != (first.shape(key), first.dtype(key)):
                described = (
                    f"{list(rank.shape(key))} {rank.dtype(key)}, but {list(first.shape(key))} {first.dtype(key)}"
                )
                raise GmaskError(f"{rank.path}: {key} is {described} in {first.path.name}")
    expected = _count_by_shapes(first)
    if expected is not None and expected != len(ranks):
        raise GmaskError(f"{first.path}: its shapes are those of one of {expected} ranks, but {_count_files(ranks)}")
    return ranks


def _count_files(ranks: Sequence[PickledFile]) -> str:
    there = "there is one file" if len(ranks) == 1 else f"there are {len(ranks)} files"
    return f"{there}; copy all mp_rank files of the iteration"


def _count_by_shapes(rank: PickledFile) -> int | None:
    """Over how many ranks the attention is divided, each having whole norms; None if it has no attention."""
    projection = next((key for key in rank.names() if key.endswith("attention.query_key_value.weight")), None)
    if projection is None or len(rank.shape(projection)) != 2:
        return None
    rows, hidden_size = rank.shape(projection)
    return 3 * hidden_size // rows if rows and 3 * hidden_size % rows == 0 else None
