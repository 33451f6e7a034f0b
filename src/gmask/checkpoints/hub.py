"""The name of a model becomes a folder of this machine: a bundled one, the user's, or a published one that is fetched.

Nothing here needs torch, so that a mistyped name is refused before that is imported. The downloading, its cache and its
settings (``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_HOME``) are those of huggingface_hub.
"""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmask.architectures import find_architecture
from gmask.checkpoints.zoo import find_family
from gmask.errors import GmaskError, one_line
from gmask.files import MOST_KEYS, read_object

DESCRIPTION_PATTERNS = ("*.json", "*.model", "merges.txt", "vocab.txt")
"""Configs and vocabularies."""

WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
"""Weight files in the order of preference. The files of one pattern are fetched."""

MODELSCOPE = "ZhipuAI"
"""The organisation of the GLMs on ModelScope. It does not exist on Hugging Face."""

BUNDLED = Path(__file__).parents[1] / "pretrained"
BUNDLED_MODELS = {"bundled": BUNDLED, "bundled-chat": BUNDLED / "chat"}
"""What comes with gmask: a model that fills blanks, and the same tuned to answer."""


def find_local(name: str | Path) -> Path | None:
    """The folder of this machine that a name stands for; None for a published model, which a hub may have.

    Raises:
        GmaskError: a file, or the name of nothing.
    """
    path = BUNDLED_MODELS.get(str(name)) or Path(name).expanduser()
    if path.is_dir() or name in BUNDLED_MODELS:
        return path
    if path.exists():
        raise GmaskError(f"{path}: is a file; name the folder of a model")
    if looks_like_hub_name(str(name)) or find_family(str(name)):
        return None
    raise GmaskError(f"{name}: no such folder; name the folder of a model, a published model, or bundled")


def check_name(name: str) -> None:
    """Refuses what no model is called, before anything large is imported or fetched.

    A name that neither this machine nor the catalog knows, such as ``runs/modle``, is looked up on the hub.

    Raises:
        GmaskError: as of `find_local` and `fetch`.
    """
    if find_local(name) is not None:
        return
    repository = _find_repository(name)
    if find_family(name) is None and find_cached(name) is None:
        with _explained(repository, None):
            _look_up(repository, None)


def looks_like_hub_name(name: str) -> bool:
    """Returns True if a name has the form ``organisation/model``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def fetch(name: str, *, revision: str | None = None) -> Path:
    """Returns the folder of a published model in the local cache, and downloads it first if need be.

    Only config, vocabulary and weights are fetched, never code. Where weights are there in two formats, the safetensors
    files are taken.

    Args:
        name: ``THUDM/glm-10b`` or the like, a ModelScope name such as ``ZhipuAI/glm-10b``, or a name of the catalog
            such as ``GLM-10B``.
        revision: a branch, tag or commit; the default branch if absent.

    Raises:
        GmaskError: no such model or revision, another kind of model, no permission, no connection, or no space.
    """
    repository = _find_repository(name)
    with _explained(repository, revision):
        commit, pattern = _look_up(repository, revision)
        return _download(repository, commit, (*DESCRIPTION_PATTERNS, pattern))


def _look_up(repository: str, revision: str | None) -> tuple[str, str]:
    """Returns the commit of a revision and the pattern of its weights; fetches config and vocabulary for that."""
    folder = _download(repository, revision, DESCRIPTION_PATTERNS)
    files = _list_files(repository, folder)
    pattern = next((one for one in WEIGHT_PATTERNS if any(Path(file).match(one) for file in files)), None)
    if pattern is None:
        raise GmaskError(f"{repository}: holds no weights, {' or '.join(WEIGHT_PATTERNS)}; name another model")
    if find_family(repository) is None:
        _refuse_other(folder, repository)
    return folder.name, pattern


def find_cached(repository: str) -> Path | None:
    """The cached folder of a hub model at its default branch; None if it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:  # a path, or another text that cannot be the name of a model
        return None
    return Path(config).parent if isinstance(config, str) else None


def _find_repository(name: str) -> str:
    family = find_family(name)
    if looks_like_hub_name(name) and (family is None or name.split("/")[0].casefold() != MODELSCOPE.casefold()):
        return name
    if family is None:
        raise GmaskError(f"{name}: no such model; `gmask info --zoo` lists the published ones")
    if not family.hub_names:
        raise GmaskError(
            f"{family.name} is on no hub: download its archive (the README of github.com/THUDM/GLM says where) "
            "and name its folder"
        )
    return family.hub_names[0]


def _download(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class TerminalBar(tqdm):
        """A bar that is shown only on a terminal, and not if HF_HUB_DISABLE_PROGRESS_BARS is set."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": kwargs.get("disable") or None})  # type: ignore[no-untyped-call]

    folder = snapshot_download(
        repository,
        revision=revision,
        allow_patterns=[*patterns],
        ignore_patterns=["*/*"],
        tqdm_class=TerminalBar,
    )
    return Path(folder)


def _list_files(repository: str, folder: Path) -> list[str]:
    """The names of the files that the hub has at this commit; without a connection, those in the cache."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = [file.path for file in get_cached_repo_tree(repository, revision=folder.name)]
    except CachedRepoTreeNotFoundError:
        files = [path.name for path in folder.iterdir()]
    return [file for file in files if "/" not in file]


def _refuse_other(folder: Path, repository: str) -> None:
    """Raises `GmaskError` if the config is not of a first-generation GLM, before gigabytes of weights are fetched."""
    values = read_object(folder / "config.json", required=False, most_keys=MOST_KEYS)
    if values:
        find_architecture(values, repository)


@contextlib.contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Any error of a download becomes a `GmaskError`."""
    try:
        yield
    except GmaskError:
        raise
    except Exception as error:  # of this library, of the HTTP library below it, and of the operating system
        raise GmaskError(_explain(error, repository, revision)) from error


def _explain(error: Exception, repository: str, revision: str | None) -> str:
    """Returns one line that says why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repository}: needs permission: accept its terms on {constants.ENDPOINT}, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repository}: not on {constants.ENDPOINT}; check the name, or set HF_TOKEN if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository}: has no revision {revision}; name a branch, tag or commit of it"
    if isinstance(error, errors.HFValidationError):
        return f"{repository}: not a name of the hub ({one_line(error)})"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{repository}: no space left in {constants.HF_HUB_CACHE}; free some, or set HF_HOME to another place"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{repository}: {constants.ENDPOINT} refused ({one_line(error)}); try again later"
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | OSError):
        wanted = f"revision {revision}" if revision else "the model"
        return (
            f"{repository}: {constants.ENDPOINT} cannot be reached, and {wanted} is not whole in the cache: "
            "set HF_ENDPOINT to a mirror, or download it elsewhere and name its folder"
        )
    return f"{repository}: the download failed ({one_line(error)}); try again, whole files are kept"
