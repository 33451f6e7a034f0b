"""`ServerSettings`: keys, hosts and limits of a server."""

import os
from dataclasses import dataclass
from pathlib import Path

from gmask.config import Count, Positive, check_fields
from gmask.errors import GmaskError
from gmask.files import check_text


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The limits of a server. Sizes are bytes, times are seconds.

    Raises:
        GmaskError: a value that does not fit.
    """

    model_name: str = "bundled"  # the name of the model for clients
    api_keys: tuple[str, ...] = ()  # requests need one of them; if there are none, no key is needed
    allowed_hosts: tuple[str, ...] = ("*",)  # accepted names in the Host header
    max_rows: Count = 32  # answers that are written at the same time
    max_queue: Count = 256  # requests that may wait; further ones are refused
    max_tokens: Count | None = None  # of one answer; None: the positions of the model
    max_samples: Count = 64  # answers that one request may ask for
    max_body_bytes: Count = 1 << 20
    body_seconds: Positive = 20.0  # for a request to arrive
    request_seconds: Positive = 300.0  # for it to be answered
    drain_seconds: Positive = 30.0  # for running requests when the server shuts down
    log_prompts: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_text(self.model_name, "the name of the model")  # every answer has it
        if not all(self.api_keys):
            raise GmaskError("an API key is empty")
        if not all(key.isascii() and key.isprintable() for key in self.api_keys):
            raise GmaskError("an API key holds characters that no HTTP header carries: use printable ASCII")


def default_model_name(model: str) -> str:
    """Returns the default name of a model for clients: the last part of a folder's path, else the name as given.

    Bytes of it that are not UTF-8 are escaped, as ``\\udcff``.
    """
    name = Path(model).resolve().name if Path(model).is_dir() else model
    return name.encode("utf-8", "backslashreplace").decode()


def environment_keys() -> tuple[str, ...]:
    """Returns the API key in the environment variable ``GMASK_API_KEY``, if there is one."""
    key = os.environ.get("GMASK_API_KEY")
    return (key,) if key else ()
