"""What does a client read when its request cannot be served?

Every error has OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``, whatever the endpoint.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gmask.errors import GmaskError, is_shortage
from gmask.generation.requests import EngineClosed, QueueFull

logger = logging.getLogger("gmask.serving")

KINDS = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
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
        """In OpenAI's shape."""
        kind, code = KINDS.get(self.status, KINDS[400])
        message = self.message.encode("utf-8", "replace").decode()  # half of a surrogate pair has no UTF-8
        param = None if self.param is None else self.param.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code or code}}

    def response(self) -> JSONResponse:
        """As it is sent."""
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers=headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception; of one that is not the client's doing, no more than that it happened."""
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
    """Has every error of an app answered in OpenAI's shape."""

    async def tell(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def tell_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    async def tell_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return describe(error.errors()[0]).response()

    app.add_exception_handler(ApiError, tell)
    app.add_exception_handler(GmaskError, tell)
    app.add_exception_handler(HTTPException, tell_http)
    app.add_exception_handler(RequestValidationError, tell_validation)
    app.add_exception_handler(Exception, tell)


def describe(found: Mapping[str, Any]) -> ApiError:
    """The first thing that is wrong with a body; its value is not repeated."""
    place = [str(part) for part in found["loc"] if part != "body"]
    param = ".".join(place) or None
    message = str(found["msg"])
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON (at character {param}): {found['ctx']['error']}")
    if found["type"] == "extra_forbidden":
        message = "is not a parameter that this server knows"
    return ApiError(400, f"{param}: {message}" if param else f"the body: {message}", param=param)
