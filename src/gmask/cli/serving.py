"""``gmask serve`` and ``gmask webui``."""

import contextlib
import sys
import threading
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gmask.cli.options import (
    BUNDLED_NAMES,
    LOOPBACK,
    AdapterFolder,
    Dtype,
    Host,
    KVCache,
    Port,
    Quantize,
    base_of,
    parse_settings,
)
from gmask.cores import share_cores
from gmask.errors import GmaskError, nearest
from gmask.files import read_text
from gmask.serving.settings import ServerSettings, default_model_name, environment_keys

if TYPE_CHECKING:
    import gradio as gr


INFILL_MODEL, CHAT_MODEL = BUNDLED_NAMES
SERVER_SETTINGS = [field.name for field in fields(ServerSettings) if field.name not in ("api_keys", "log_prompts")]
"""The settings of ``--set``; the other two have an option each."""

Served = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Folder or name of a model, or bundled, or bundled-chat.",
        show_default="bundled, and bundled-chat for conversations",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="File with an API key a line. GMASK_API_KEY in the environment is one more.",
        show_default=False,
    ),
]

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=FOLDER",
        help="LoRA or a prefix that requests choose as the model MODEL:NAME; once for each. "
        "Without NAME=, the folder of one adapter of any kind, which every request goes through.",
        show_default=False,
    ),
]

LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Write what is asked to the log.")]
LimitPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"{', '.join(SERVER_SETTINGS[:-1])} or {SERVER_SETTINGS[-1]}, such as max_rows=16; once for each.",
        show_default=False,
    ),
]


def serve(
    model: Served = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    dtype: Dtype = None,
    adapter: Adapters = None,
    log_prompts: LogPrompts = False,
    pairs: LimitPairs = None,
) -> None:
    """Serve a model over HTTP: OpenAI's API, ChatGLM-6B's, blanks to fill and to score; a reward model, rewards."""
    check_installed()
    fixed, chosen = read_adapters(adapter or [])
    name = model or (base_of(fixed, INFILL_MODEL) if fixed else INFILL_MODEL)
    settings = read_settings(name, host, read_keys(api_key_file), log_prompts, parse_settings(pairs or []))
    from gmask.checkpoints.hub import check_name

    check_name(name)  # before torch is imported, which takes seconds
    share_cores()
    from gmask.checkpoints.load import load
    from gmask.serving.app import create_app, make_server, open_port, web_address
    from gmask.serving.backend import make_backend
    from gmask.serving.middleware import log_as_json

    sockets = open_port(host, port)  # before the model, which takes a while
    network, tokenizer = load(name, dtype=dtype, quantize=quantize, adapter=fixed, kv_cache=kv_cache)
    chat_backend = None
    if model is None and fixed is None:  # the first was not tuned for conversations
        chat_backend = make_backend(
            *load(CHAT_MODEL, dtype=dtype, quantize=quantize, kv_cache=kv_cache), name=CHAT_MODEL, settings=settings
        )
    log_as_json()
    if host not in LOOPBACK and not settings.api_keys:
        print("note: everybody who reaches this address may ask: --api-key-file asks for a key", file=sys.stderr)
    app = create_app(network, tokenizer, settings=settings, adapters=chosen, chat_backend=chat_backend)
    shows_page = find_spec("gradio") is not None and not app.state.backend.gives_rewards
    if shows_page:
        from gmask.serving.webui import mount_page

        app = mount_page(app)
    page = ", a page at /ui" if shows_page else ""
    names = settings.model_name if chat_backend is None else f"{settings.model_name} and {CHAT_MODEL}"
    print(f"{names} at {web_address(host, port)}/v1, documented at /docs{page}", file=sys.stderr)
    try:
        make_server(app, host=host, port=port).run(sockets=sockets)
    finally:
        for opened in sockets:
            opened.close()


def check_installed() -> None:
    """Raises `GmaskError` if the packages of a server are missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise GmaskError(f"{error.name} is not installed; serving needs pip install 'gmask[serve]'") from error


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Returns the API keys of a file and of the environment.

    Raises:
        GmaskError: a file without any.
    """
    keys = list(environment_keys())
    if path is not None:
        found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not found:
            raise GmaskError(f"{path}: holds no API key: write one a line")
        keys += found
    return tuple(keys)


def read_adapters(values: list[str]) -> tuple[Path | None, dict[str, Path]]:
    """Returns the adapter that every request goes through, or None, and those that requests choose, by name.

    Raises:
        GmaskError: an adapter without a name beside another one; a name that is empty or given twice.
    """
    fixed: list[Path] = []
    chosen: dict[str, Path] = {}
    for value in values:
        name, sign, folder = value.partition("=")
        if not sign or Path(value).expanduser().is_dir():
            fixed.append(Path(value))
        elif not name or name in chosen:
            raise GmaskError(f"--adapter {value}: the name is {'given twice' if name else 'empty'}")
        else:
            chosen[name] = Path(folder)
    if len(fixed) + bool(chosen) > 1:
        raise GmaskError(f"--adapter {fixed[0]}: several adapters need names to be chosen by: --adapter NAME=FOLDER")
    return (fixed[0] if fixed else None), chosen


def read_settings(
    model: str, host: str, keys: tuple[str, ...], log_prompts: bool, values: dict[str, Any]
) -> ServerSettings:
    """Returns the settings of a server.

    Raises:
        GmaskError: an unknown setting (the nearest one is named), or a value that does not fit.
    """
    for name in values:
        if name not in SERVER_SETTINGS:
            near = nearest(name, SERVER_SETTINGS)
            raise GmaskError(
                f"there is no setting {name!r}; the nearest is {near!r}, all are {', '.join(SERVER_SETTINGS)}"
            )
    hosts = values.pop("allowed_hosts", None)
    names = tuple(str(hosts).split(",")) if hosts else own_names(host)
    values.setdefault("model_name", default_model_name(model))
    values["model_name"] = str(values["model_name"])
    return ServerSettings(api_keys=keys, allowed_hosts=names, log_prompts=log_prompts, **values)


def own_names(host: str) -> tuple[str, ...]:
    """Returns the names that are accepted in the Host header: at a loopback address, local names alone.

    Otherwise a foreign web page could use DNS rebinding to send requests from the browser of its reader.
    """
    return (*LOOPBACK[:2], "[::1]") if host in LOOPBACK else ("*",)


ServedModel = Annotated[
    str | None,
    typer.Argument(
        help="Folder or name of a model.",
        show_default="bundled to fill blanks and bundled-chat to talk",
    ),
]

Share = Annotated[bool, typer.Option("--share", help="Make a public link, through a server of Gradio's.")]
LanguageOption = Annotated[
    Literal["en", "zh", "auto"], typer.Option(help="Of the labels; auto is the browser's.", show_choices=True)
]


def webui(
    model: ServedModel = None,
    port: Port = 7860,
    host: Host = "127.0.0.1",
    share: Share = False,
    language: LanguageOption = "auto",
    adapter: AdapterFolder = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    kv_cache: KVCache = None,
) -> None:
    """Open a page in the browser: fill blanks and chat, in English and Chinese."""
    if model is not None:
        from gmask.checkpoints.hub import check_name

        check_name(model)  # before torch and Gradio are imported, which takes seconds
    share_cores()
    try:
        from gmask.serving.app import open_port
        from gmask.serving.backend import make_backend
        from gmask.serving.webui import draw_page
    except ModuleNotFoundError as error:
        raise GmaskError(f"{error.name} is not installed; the page needs pip install 'gmask[webui]'") from error
    from gmask.checkpoints.load import load

    for opened in open_port(host, port):  # Gradio opens it again; here a taken port fails before the model is loaded
        opened.close()
    names = (model,) if model else (base_of(adapter, BUNDLED_NAMES[0]),) if adapter else BUNDLED_NAMES
    with contextlib.ExitStack() as stack:
        backends = []
        for name in names:
            network, tokenizer = load(name, dtype=dtype, quantize=quantize, adapter=adapter, kv_cache=kv_cache)
            backends.append(make_backend(network, tokenizer, name=default_model_name(name)))
            stack.callback(backends[-1].close)
        serve_page(draw_page(backends[0], chat_backend=backends[-1], language=language), host, port, share=share)


def serve_page(page: "gr.Blocks", host: str, port: int, *, share: bool) -> None:
    """Serves a page until Ctrl-C.

    Raises:
        GmaskError: the port is taken.
    """
    from gmask.serving.webui import launch_page

    try:
        address, public = launch_page(
            page, ("*",) if share else own_names(host), server_name=host, server_port=port, share=share
        )
    except OSError as error:
        raise GmaskError(f"port {port} of {host} cannot be used: it is taken, or is not this machine's") from error
    print(f"The page is at {public or address} (Ctrl-C ends it)", flush=True)
    if share or host not in LOOPBACK:
        print("note: the page asks for no password; whoever reaches this address can use the model", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)
