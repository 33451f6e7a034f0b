"""Downloads published models from the Hugging Face hub, or finds them in the local cache.

huggingface_hub does the downloading and the caching, by its own settings: ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``,
``HF_TOKEN``, ``HF_HOME``.
"""

import errno
import re
from pathlib import Path
from typing import Any

from gmask.architectures import find_architecture
from gmask.checkpoints.zoo import find_family
from gmask.errors import GmaskError, one_line
from gmask.files import read_object

DESCRIPTION_PATTERNS = ("*.json", "*.model", "merges.txt", "vocab.txt")
"""Configs and vocabularies."""

WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
"""Weight files in the order of preference. The files of one pattern are fetched."""

MODELSCOPE = "ZhipuAI"
"""The organisation of the GLMs on ModelScope. It does not exist on Hugging Face."""


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
    try:
        folder = _download(repository, revision, DESCRIPTION_PATTERNS)
        files = _list_files(repository, folder)
        pattern = next((one for one in WEIGHT_PATTERNS if any(Path(file).match(one) for file in files)), None)
        if pattern is None:
            raise GmaskError(f"{repository}: holds no weights, {' or '.join(WEIGHT_PATTERNS)}; name another model")
        if find_family(repository) is None:
            _refuse_other(folder, repository)
        return _download(repository, folder.name, (*DESCRIPTION_PATTERNS, pattern))
    except GmaskError:
        raise
    except Exception as error:  # of this library, of the HTTP library below it, and of the operating system
        raise GmaskError(_explain(error, repository, revision)) from error


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
    values = read_object(folder / "config.json", required=False)
    if values:
        find_architecture(values, repository)


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
