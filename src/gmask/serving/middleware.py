"""Middleware and error handlers: API keys, limits, errors, logs and metrics.

`AuthMiddleware` is a plain ASGI layer: requests are refused before they are parsed, and streams pass through unchanged.

Every error has OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``, whatever the endpoint.
"""

import hmac
import json
import logging
import math
import re
import time
import uuid
from asyncio import get_running_loop, timeout_at
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gmask.errors import GmaskError, is_shortage
from gmask.generation.engine import EngineClosed, QueueFull
from gmask.serving.settings import ServerSettings

if TYPE_CHECKING:
    from gmask.generation.engine import Counts


logger = logging.getLogger("gmask.serving")
OPEN_PATHS = frozenset({"/health", "/ready"})
"""Paths for load balancers, which have no key."""

PAGE_PATH = "/ui"
"""The path of the page. It asks for the key itself, since a browser does not send it in a header."""


class HostMiddleware:
    """Refuses requests to other hosts, and those that two servers in a row could read as different ones.

    A page of another site could otherwise give itself this machine's address, and ask in the name of who reads it.

    Args:
        hosts: names in the Host header; ``"*"`` is any.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        message = None
        if "*" not in self.hosts and host_name(headers.get("host", "")) not in self.hosts:
            message = "the Host header names none of the hosts that this server answers to (allowed_hosts)"
        elif "content-length" in headers and "transfer-encoding" in headers:
            message = "the headers Content-Length and Transfer-Encoding exclude each other: send one of the two"
        if message is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            response = ApiError(400, message).response()
            response.headers["Connection"] = "close"
            await response(scope, receive, send)


class AuthMiddleware:
    """Refuses requests without a valid key, for another host, or with a body that is too large or too slow."""

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
        keys = self.settings.api_keys
        if keys and not needs_no_key(scope["path"]) and not is_authorized(headers.get("authorization", ""), keys):
            raise ApiError(401, "an API key is needed: send it as the header 'Authorization: Bearer KEY'")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.settings.max_body_bytes:
            self._refuse_size()
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body is read as it is: send it without the header Content-Encoding")

    async def _read(self, receive: Receive) -> bytes | None:
        """Returns the whole body; None if the client has disconnected."""
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


def needs_no_key(path: str) -> bool:
    """Returns True if requests to a path need no key in a header."""
    return path in OPEN_PATHS or path == PAGE_PATH or path.startswith(f"{PAGE_PATH}/")


def host_name(header: str) -> str:
    """Returns the host of a Host header, without its port."""
    return header.rpartition("]")[0] + "]" if header.startswith("[") else header.partition(":")[0].lower()


def is_authorized(header: str, keys: Sequence[str]) -> bool:
    """Returns True if an Authorization header has one of the keys."""
    scheme, _, given = header.partition(" ")
    return is_key(given.strip(), keys) and scheme.lower() == "bearer"


def is_key(given: str, keys: Sequence[str]) -> bool:
    """Returns True if a text is one of the keys; compares in constant time."""
    found = [hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()) for key in keys]
    return any(found)


def replay(body: bytes, receive: Receive) -> Receive:
    """Returns a ``receive`` that gives the whole body first, and then the further messages of the client."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


ERROR_TYPES = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "timeout"),
}
"""The ``type`` and ``code`` of an error by its status."""


class ErrorDetail(BaseModel):
    """What is wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """An error with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Returns the body in OpenAI's format."""
        kind, code = ERROR_TYPES.get(self.status, ERROR_TYPES[400])
        message = self.message.encode("utf-8", "replace").decode()  # half of a surrogate pair has no UTF-8
        param = None if self.param is None else self.param.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code or code}}

    def response(self) -> JSONResponse:
        """Returns the HTTP response."""
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers=headers)


def as_api_error(error: Exception) -> ApiError:
    """Returns the error for an exception. For one that the client did not cause, it has no details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), retry_after=error.retry_after)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), retry_after=5)
    if isinstance(error, GmaskError):
        return ApiError(400, str(error))
    if is_shortage(error):
        return ApiError(503, "not enough memory for this request: ask for less, or later", retry_after=5)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why")


def add_error_handlers(app: FastAPI) -> None:
    """Registers handlers that answer every error of an app in OpenAI's format."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def answer_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        told = explain_unread_body(error.__cause__) or str(error.detail)
        response = ApiError(error.status_code, told).response()
        response.headers.update(error.headers or {})
        return response

    async def answer_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return explain_invalid_body(error.errors(), error.body).response()

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(GmaskError, answer)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(Exception, answer)


OUR_WORDS = {
    "extra_forbidden": "is not a parameter that this server knows",
    "model_type": "should be an object",
    "model_attributes_type": "should be an object",
    "dict_type": "should be an object",
    "none_required": "is nothing that these models take: leave it out",
    "string_unicode": "holds half of a character (a lone surrogate): write it in UTF-8",
}
"""Messages by the type of pydantic's error, where its own name our classes or Python's types, or say too little."""


def explain_unread_body(cause: BaseException | None) -> str | None:
    """Returns what is wrong with a body of which FastAPI only says that it could not be parsed."""
    if isinstance(cause, UnicodeDecodeError):
        return "the body is not UTF-8 text"
    if isinstance(cause, RecursionError):
        return "the body is not read, since its values are nested too deeply"
    if isinstance(cause, ValueError):  # what is not JSON is another error of FastAPI's, with the place
        return "the body is not read, since a number in it has too many digits"
    return None


def explain_invalid_body(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Returns the error for the first fault in a body, without the wrong value.

    If a parameter may have several types, pydantic has an error for each; the one of the closest type is chosen.
    """
    first = errors[0]
    if isinstance(body, bytes) and body:
        return ApiError(400, "the body is read as JSON if it comes with the header Content-Type: application/json")
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ApiError(400, "there is no body: send JSON, with the header Content-Type: application/json")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON (at character {first['loc'][-1]}): {first['ctx']['error']}")
    found = [(path_of(error, body), error) for error in errors if error["loc"][:2] == first["loc"][:2]]
    path, error = max(found, key=lambda pair: (not pair[1]["type"].endswith("_type"), len(pair[0])))
    param = ".".join(path) or None
    message = OUR_WORDS.get(error["type"], str(error["msg"]).removeprefix("Value error, "))
    return ApiError(400, f"{param}: {message}" if param else f"the body: {message}", param=param)


def path_of(error: Mapping[str, Any], body: Any) -> list[str]:
    """Returns the path of an error in a body: the location that pydantic reports, without the types that it tried."""
    path: list[str] = []
    for part in error["loc"][1:]:
        if isinstance(body, Mapping) and str(part) in body:
            body = body[str(part)]
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        elif not (error["type"] == "missing" and part == error["loc"][-1]):
            continue
        path.append(str(part))
    return path


request_logger = logging.getLogger("gmask.serving.requests")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Metrics:
    """The Prometheus metrics of one application, in a registry of their own, so that applications do not share them."""

    def __init__(self, counts: "Sequence[Callable[[], Counts]]") -> None:
        """Each of ``counts`` returns the counts of an engine; it is called when the metrics are fetched."""
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(counts))

        def histogram(name: str, help_text: str) -> Histogram:
            return Histogram(f"gmask_{name}_seconds", help_text, buckets=SECONDS, registry=self.registry)

        self.first_token = histogram("time_to_first_token", "From a request's submission to its first token")
        self.next_token = histogram("inter_token_latency", "From a token of an answer to the next one")
        self.duration = histogram("request_duration", "From a request's arrival to the end of its answer")
        self.requests = Counter(
            "gmask_http_requests", "Requests by endpoint and status", ["endpoint", "status"], registry=self.registry
        )

    def render(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class AccessLog:
    """Gives every request an id, which the response has as ``X-Request-ID``, and logs one line when it is done."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        fields: dict[str, Any] = {}
        scope.setdefault("state", {})["log_fields"] = fields
        status, began = 499, time.perf_counter()  # 499: disconnected before an answer, as in nginx

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - began
            endpoint = getattr(scope.get("route"), "path", "none")  # not the client's path: labels must be few
            self.metrics.requests.labels(endpoint, str(status)).inc()
            self.metrics.duration.observe(seconds)
            line = {"request_id": request_id, "method": scope["method"], "endpoint": endpoint, "status": status}
            request_logger.info("request", extra={"fields": {**line, "seconds": round(seconds, 4), **fields}})


def log_fields(request: Request, **fields: Any) -> None:
    """Adds fields to the request's line in the log."""
    request.state.log_fields.update(fields)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the time in UTC, the level, the message, and the fields of a request as JSON."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)  # as ASCII, so that a client cannot insert line breaks


def log_as_json() -> None:
    """Writes the log of this program to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in ("gmask.serving", "uvicorn"):
        found = logging.getLogger(name)
        found.handlers, found.propagate = [handler], False
        found.setLevel(logging.INFO)


SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)


class EngineCollector(Collector):
    """Collects the counts of the engines, summed."""

    def __init__(self, counts: "Sequence[Callable[[], Counts]]") -> None:
        self.counts = counts

    def describe(self) -> Iterator[Metric]:
        """Returns nothing: else Prometheus would call `collect` at registration, before the engine runs."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yields the present counts of the engines."""
        counts = [read() for read in self.counts]

        def total(name: str) -> int:
            return sum(getattr(one, name) for one in counts)

        yield GaugeMetricFamily("gmask_queue_length", "Requests that wait for their turn", total("waiting"))
        yield GaugeMetricFamily(
            "gmask_running_rows", "Answers that are being written: the batch size", total("running")
        )
        yield GaugeMetricFamily("gmask_cache_places_in_use", "Positions of keys and values taken", total("positions"))
        yield GaugeMetricFamily(
            "gmask_cache_places", "Positions of keys and values that there are", total("max_positions")
        )
        yield CounterMetricFamily("gmask_prompt_tokens", "Tokens that were read", total("prompt_tokens"))
        yield CounterMetricFamily("gmask_generated_tokens", "Tokens that were written", total("answer_tokens"))
        yield CounterMetricFamily("gmask_decoding_steps", "Passes that write a token of every row", total("steps"))
        samples = CounterMetricFamily("gmask_samples", "Answers by their end", labels=["end"])
        for end in dict.fromkeys(end for one in counts for end in one.ends):
            samples.add_metric([end], sum(one.ends.get(end, 0) for one in counts))
        yield samples
