"""Who is let in, and how much may they bring?

A plain ASGI layer: what is refused here has cost no parsing, and answers stream through untouched.
"""

import hmac
from asyncio import get_running_loop, timeout_at
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gmask.serving.errors import ApiError
from gmask.serving.settings import ServerSettings

OPEN_PATHS = frozenset({"/health", "/ready"})
"""For load balancers, which have no key."""

PAGE_PATH = "/ui"
"""Of the page, which asks for the key itself: a browser has no header to send it in."""


class Door:
    """Lets requests pass that bring a key, if keys are asked for, and whose body is small and does not dawdle."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = await self._read(receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, replay(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        hosts = self.settings.allowed_hosts
        if "*" not in hosts and host_name(headers.get("host", "")) not in hosts:
            raise ApiError(400, "the Host header names none of the hosts that this server answers to (allowed_hosts)")
        keys = self.settings.api_keys
        if keys and not is_open(scope["path"]) and not is_authorized(headers.get("authorization", ""), keys):
            raise ApiError(401, "an API key is needed: send it as the header 'Authorization: Bearer KEY'")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.settings.max_body_bytes:
            self._refuse_size()

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone."""
        chunks: list[bytes] = []
        size = 0
        try:
            async with timeout_at(get_running_loop().time() + self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self.settings.max_body_bytes:
                        self._refuse_size()
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(408, f"the request took more than {self.settings.body_seconds:g} s to arrive") from None

    def _refuse_size(self) -> None:
        raise ApiError(413, f"the body is larger than the {self.settings.max_body_bytes} bytes that are taken")


def is_open(path: str) -> bool:
    """Whether a path needs no key in a header."""
    return path in OPEN_PATHS or path == PAGE_PATH or path.startswith(f"{PAGE_PATH}/")


def host_name(header: str) -> str:
    """The host of a Host header, without its port."""
    return header.rpartition("]")[0] + "]" if header.startswith("[") else header.partition(":")[0].lower()


def is_authorized(header: str, keys: Sequence[str]) -> bool:
    """Whether an Authorization header brings one of the keys."""
    scheme, _, given = header.partition(" ")
    return is_key(given.strip(), keys) and scheme.lower() == "bearer"


def is_key(given: str, keys: Sequence[str]) -> bool:
    """Whether a text is one of the keys; the time that it takes tells nothing of them."""
    found = [hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()) for key in keys]
    return any(found)


def replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that tells the body once more; what comes behind it comes from the client."""
    is_told = False

    async def tell() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return tell
