"""How does ``gmask webui`` open its page?"""

import contextlib
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gmask.cli.arguments import base_of
from gmask.cli.options import BUNDLED, LOOPBACK, Adapter, Dtype, Host, Port, Quantize
from gmask.errors import GmaskError

if TYPE_CHECKING:
    import gradio as gr

Model = Annotated[
    str | None,
    typer.Argument(
        help="Folder or name of a model.",
        show_default="bundled to fill blanks and bundled-chat to talk",
    ),
]
Share = Annotated[bool, typer.Option("--share", help="Make a public link, through a server of Gradio's.")]
Language = Annotated[
    Literal["en", "zh", "auto"], typer.Option(help="Of the labels; auto is the browser's.", show_choices=True)
]


def webui(
    model: Model = None,
    port: Port = 7860,
    host: Host = "127.0.0.1",
    share: Share = False,
    language: Language = "auto",
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Open a page in the browser: fill blanks and chat, in English and Chinese."""
    try:
        from gmask.serving.webui import draw_page, make_backend
    except ModuleNotFoundError as error:
        raise GmaskError(f"{error.name} is not installed; the page needs pip install 'gmask[webui]'") from error
    from gmask.loading import load

    names = (model,) if model else (base_of(adapter, BUNDLED[0]),) if adapter else BUNDLED
    with contextlib.ExitStack() as stack:
        backends = []
        for name in names:
            network, tokenizer = load(name, dtype=dtype, quantize=quantize, adapter=adapter)
            backends.append(make_backend(network, tokenizer, name=Path(name).name or name))
            stack.callback(backends[-1].close)
        serve_page(draw_page(backends[0], talks=backends[-1], language=language), host, port, share=share)


def serve_page(page: "gr.Blocks", host: str, port: int, *, share: bool) -> None:
    """Serves a page until Ctrl-C.

    Raises:
        GmaskError: the port is taken.
    """
    from gmask.serving.webui import page_options

    try:
        _, address, public = page.launch(
            server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True, **page_options()
        )
    except OSError as error:
        raise GmaskError(f"port {port} of {host} cannot be used: it is taken, or is not this machine's") from error
    print(f"The page is at {public or address} (Ctrl-C ends it)", flush=True)
    if share or host not in LOOPBACK:
        print("note: the page asks for no password; whoever reaches this address can use the model", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    page.close(verbose=False)
