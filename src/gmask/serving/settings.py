"""A server's settings: who may ask, how much, and for how long."""

import os
from dataclasses import dataclass
from pathlib import Path

from gmask.config import Count, Positive, check_fields
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
    max_rows: Count = 32  # answers that are written at the same time
    max_queue: Count = 256  # requests that wait for their turn; one more is told to come back
    max_tokens: Count | None = None  # of one answer; None: what the model holds
    max_samples: Count = 64  # answers that one request may ask for
    max_body_bytes: Count = 1 << 20
    body_seconds: Positive = 20.0  # for a request to arrive
    request_seconds: Positive = 300.0  # for it to be answered
    drain_seconds: Positive = 30.0  # for running requests once the server is told to end
    log_prompts: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
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
