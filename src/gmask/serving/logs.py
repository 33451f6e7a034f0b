"""What is written down of a request? Its figures, and its text only where the operator asks for it."""

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gmask.serving.metrics import Metrics

logger = logging.getLogger("gmask.serving.requests")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Ledger:
    """Gives every request an id, answers with it in ``X-Request-ID``, and writes one line when it is done."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts
        status, began = 499, time.perf_counter()  # 499: gone before an answer, as nginx has it

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, tell)
        finally:
            seconds = time.perf_counter() - began
            endpoint = getattr(scope.get("route"), "path", "none")  # never what the client wrote: paths are endless
            self.metrics.requests.labels(endpoint, str(status)).inc()
            self.metrics.duration.observe(seconds)
            line = {"request_id": request_id, "method": scope["method"], "endpoint": endpoint, "status": status}
            logger.info("request", extra={"facts": {**line, "seconds": round(seconds, 4), **facts}})


def note(request: Request, **facts: Any) -> None:
    """Adds facts to the request's line in the log."""
    request.state.facts.update(facts)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The time in UTC, the level, the message, and the facts of a request."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)  # ASCII: no line break of a client's ends a line


def log_as_json() -> None:
    """Has this program's log written to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in ("gmask.serving", "uvicorn"):
        found = logging.getLogger(name)
        found.handlers, found.propagate = [handler], False
        found.setLevel(logging.INFO)
