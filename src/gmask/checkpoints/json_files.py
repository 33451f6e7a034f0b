"""What stands in a JSON file of a model's folder?"""

import json
from pathlib import Path
from typing import Any

from gmask.checkpoints.tensor_files import refuse_placeholder
from gmask.errors import GmaskError, one_line


def read_object(path: Path, *, required: bool = True) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        required: if False, a file that is not there gives an empty object.

    Raises:
        GmaskError: not JSON, another value than an object, or a Git LFS pointer.
        OSError: no such file, though it is required.
    """
    if not required and not path.is_file():
        return {}
    refuse_placeholder(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GmaskError(f"{path}: not JSON, download or copy it again ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise GmaskError(f"{path}: expected a JSON object")
    return values
