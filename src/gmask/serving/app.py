"""The FastAPI application and the uvicorn server: routes, probes, start and shutdown."""

import asyncio
import errno
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import PreTrainedTokenizerBase
from uvicorn.protocols.http.h11_impl import H11Protocol

import gmask
from gmask.checkpoints.load import LanguageModel
from gmask.errors import GmaskError
from gmask.generation.adapters import AdapterSet
from gmask.generation.engine import Engine
from gmask.serving import blanks, openai, rewards
from gmask.serving.backend import Backend
from gmask.serving.middleware import (
    AccessLog,
    ApiError,
    AuthMiddleware,
    ErrorReply,
    HostMiddleware,
    Metrics,
    add_error_handlers,
)
from gmask.serving.settings import ServerSettings

DESCRIPTION = "OpenAI's API, the published one of ChatGLM-6B, blanks to fill and to score, and rewards."


def create_app(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: ServerSettings | None = None,
    adapters: Mapping[str, Path] | None = None,
    engine: Engine | None = None,
    chat_backend: Backend | None = None,
) -> FastAPI:
    """Makes the application that serves a model.

    Args:
        model, tokenizer: as `gmask.load` returns them; a reward model answers /classify alone.
        settings: the limits; by default those of `ServerSettings`.
        adapters: folders of LoRA or prefixes by name. A request chooses one by the model name ``NAME:ADAPTER``.
        engine: writes the answers; by default a new one. The application closes it when it ends.
        chat_backend: another model, by `make_backend`, for conversations that name no model. The application closes it.

    Raises:
        GmaskError: an adapter that does not fit the model; two models of one name.
    """
    settings = settings or ServerSettings()
    engine = engine or Engine(
        model,
        tokenizer,
        max_rows=settings.max_rows,
        max_queue=settings.max_queue,
        adapters=AdapterSet(model, adapters or {}),
    )
    backend = Backend(model, tokenizer, engine, settings)
    backends = [backend] if chat_backend is None else [backend, chat_backend]
    if chat_backend is not None and chat_backend.settings.model_name in backend.model_names:
        raise GmaskError(
            f"two models have the name {chat_backend.settings.model_name!r}: give the first another model_name"
        )
    metrics = Metrics([one.engine.counts for one in backends])
    for one in backends:
        one.metrics = metrics

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for one in backends:
            one.drain()
        await asyncio.gather(*(asyncio.to_thread(one.close) for one in backends))

    app = FastAPI(
        title="gmask",
        version=gmask.__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )
    app.state.backend, app.state.backends, app.state.settings = backend, backends, settings
    for router in (openai.openai_router, blanks.blanks_router, rewards.rewards_router, openai.published_router):
        app.include_router(router)
    _add_probes(app, backends, metrics)
    add_error_handlers(app)
    app.add_middleware(AuthMiddleware, settings=settings)  # the last one added is the first to see a request
    app.add_middleware(HostMiddleware, hosts=settings.allowed_hosts)
    app.add_middleware(AccessLog, metrics=metrics)
    return app


def _add_probes(app: FastAPI, backends: Sequence[Backend], figures: Metrics) -> None:
    @app.get("/health", tags=["Operation"])
    async def health() -> dict[str, str]:
        """The process runs, and so does its engine: where it says no, only a new process helps."""
        for backend in backends:
            backend.check_engine()
        return {"status": "ok"}

    @app.get("/ready", tags=["Operation"])
    async def ready(request: Request) -> JSONResponse:
        """Whether it takes requests."""
        for backend in backends:
            backend.check_open()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["Operation"], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(figures.render(), media_type=CONTENT_TYPE_LATEST)


LINGER_SECONDS = 1.0


class TimedProtocol(H11Protocol):
    """HTTP/1.1 in which what a client has begun must arrive in time.

    uvicorn's own waits for the other half of a request's headers, and for the body of one that has been answered, as
    long as the client likes. What the application reads of a body has its time from `AuthMiddleware`.
    """

    deadline: asyncio.TimerHandle | None = None
    is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        if not self.is_refused:
            super().data_received(data)
            self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """For what is not HTTP."""
        self._refuse(ApiError(400, "this is not a request in HTTP/1.1, or its headers are too long"))

    def _set_deadline(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._clear_deadline()
        elif self.deadline is None:
            settings: ServerSettings = self.config.app.state.settings  # type: ignore[union-attr]
            seconds = settings.body_seconds
            late = ApiError(408, f"the request took more than {seconds:g} s to arrive")
            self.deadline = self.loop.call_later(seconds, self._refuse, late)

    def _clear_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _refuse(self, error: ApiError) -> None:
        """Answers what never reached the application, and ends the connection."""
        if self.transport.is_closing() or self.is_refused:
            return
        if self.cycle is None or (self.cycle.response_complete and self.conn.their_state is not h11.SEND_BODY):
            body = json.dumps(error.body()).encode()
            head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        self.is_refused = True
        # What the client still sends is read for a moment: a system that has unread bytes resets the connection, and
        # the client would lose the answer.
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


class Server(uvicorn.Server):
    """A uvicorn server that on shutdown refuses new requests, while running ones go on."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGINT and SIGTERM; a second SIGINT ends the server at once."""
        backends: Sequence[Backend] = self.config.app.state.backends  # type: ignore[union-attr]
        if self.loop is not None:
            for backend in backends:
                self.loop.call_soon_threadsafe(backend.drain)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen, and logs the address, which uvicorn does only for sockets that it opened."""
        await super().startup(sockets)
        if sockets and self.started:
            address = web_address(self.config.host, sockets[0].getsockname()[1])
            logging.getLogger("uvicorn.error").info("Uvicorn running on %s (Press CTRL+C to quit)", address)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until shutdown."""
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)


def web_address(host: str, port: int) -> str:
    """Returns the address of a server as a browser takes it: a host of IPv6 in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def open_port(host: str, port: int) -> list[socket.socket]:
    """Binds sockets to the addresses of a host. They do not listen yet, so connections are refused.

    Raises:
        GmaskError: the port is taken, or the host is not this machine's.
    """
    opened: list[socket.socket] = []
    fault: OSError | ValueError | None = None
    try:
        for family, kind, protocol, _, address in dict.fromkeys(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        ):
            try:
                opened.append(_bind(socket.socket(family, kind, protocol), address))
            except OSError as error:
                fault = error
                if error.errno == errno.EADDRINUSE:
                    raise
    except (OSError, ValueError) as error:  # a ValueError comes from a name that no host can have
        fault = error
        for one in opened:
            one.close()
        opened.clear()
    if not opened:  # one is enough: a host may have addresses of a kind that this machine has no network for
        raise GmaskError(f"port {port} of {host} cannot be used: it is taken, or is not this machine's") from fault
    return opened


def _bind(opened: socket.socket, address: Any) -> socket.socket:
    try:
        if os.name == "posix":  # allows to reuse a port that was just closed; on Windows it has another meaning
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if opened.family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
    except OSError:
        opened.close()
        raise
    return opened


def make_server(app: FastAPI, *, host: str, port: int) -> Server:
    """Makes a server, which listens once it runs."""
    backend: Backend = app.state.backend
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        http=TimedProtocol,
        server_header=False,
        timeout_graceful_shutdown=int(backend.settings.drain_seconds) + 5,
    )
    return Server(config)
