"""A server's settings: who may ask, how much, and for how long."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

from gmask.errors import GmaskError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The limits of a server. Sizes are bytes, times are seconds.

    Raises:
        GmaskError: a value that does not fit.
    """

    model_name: str = "bundled"  # what clients call the model
    api_keys: tuple[str, ...] = ()  # any of them opens the door; none: it is open
    allowed_hosts: tuple[str, ...] = ("*",)  # the names in the Host header by which it is called
    max_rows: int = 32  # answers that are written at the same time
    max_queue: int = 256  # requests that wait for their turn; one more is told to come back
    max_tokens: int | None = None  # of one answer; None: what the model holds
    max_samples: int = 64  # answers that one request may ask for
    max_body_bytes: int = 1 << 20
    body_seconds: float = 20.0  # for a request to arrive
    request_seconds: float = 300.0  # for it to be answered
    drain_seconds: float = 30.0  # for running requests once the server is told to end
    log_prompts: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if hints[field.name] in (int, float, int | None) and value is not None:
                wanted = float if hints[field.name] is float else int
                is_number = isinstance(value, int | wanted) and not isinstance(value, bool)
                if not is_number or not 0 < value < float("inf"):
                    raise GmaskError(f"{field.name} must be a number above 0, not {value!r}")
        if not all(self.api_keys):
            raise GmaskError("an API key is empty")
        if not all(key.isascii() and key.isprintable() for key in self.api_keys):
            raise GmaskError("an API key holds characters that no HTTP header carries: use printable ASCII")


def called(model: str) -> str:
    """What clients call a model unless told otherwise: a folder by its last name, everything else as it was given."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def environment_keys() -> tuple[str, ...]:
    """The API key in ``GMASK_API_KEY``, if there is one."""
    key = os.environ.get("GMASK_API_KEY")
    return (key,) if key else ()
