"""Where do people who do not program meet a model? On a page in their browser."""

import threading
from typing import Any, Literal

import gradio as gr
from fastapi import FastAPI
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.serving.webui_chat import build_chat
from gmask.serving.webui_infill import build_infill
from gmask.serving.webui_labels import LANGUAGES, Labelled, preferred_language
from gmask.serving.webui_model import PageModel

Language = Literal["en", "zh", "auto"]

MOUNT_PATH = "/ui"
"""Where ``gmask serve`` shows the page."""

MAX_WAITING = 32
"""Requests; the next one is refused."""

STYLE = """
#title code { font: inherit; border: 0; background: none; color: var(--body-text-color-subdued); }
#language { margin-left: auto; width: fit-content; flex: none; }
#infill-alternatives { --font-mono: var(--font); }
#chat-conversation .md { white-space: pre-wrap; }
"""


def page_options() -> dict[str, Any]:
    """What ``launch`` and ``gr.mount_gradio_app`` are told of the page.

    It needs nothing from the network: the fonts are the reader's own, which have Chinese where it is read.
    """
    return {
        "theme": gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]),
        "css": STYLE,
        "footer_links": [],
        "max_file_size": 1,  # byte: nothing is uploaded
        "show_error": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "pwa": False,
        "mcp_server": False,
    }


def create_page(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    language: Language = "auto",
    lock: "threading.Lock | None" = None,
) -> gr.Blocks:
    """The page of a model: *Fill blanks*, unless it only talks, and *Chat*.

    What the model writes is shown as plain text. One request is answered at a time, `MAX_WAITING` wait.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        name: of the model, as it is shown.
        language: of the labels; "auto" is the browser's. It can be changed on the page.
        lock: held while the model works, for a program that uses the same model beside the page.

    Returns:
        Blocks to ``launch(**page_options())``, or to mount in an application with the same options (`mount_page`).
    """
    served = PageModel(model, tokenizer, lock)
    first = "en" if language == "auto" else language
    labelled = Labelled(first)
    page = gr.Blocks(title="gmask", analytics_enabled=False)
    with page:
        with gr.Row(equal_height=True):
            gr.Markdown(f"# gmask `{name}`", elem_id="title")
            switch = gr.Radio(
                [(spoken, code) for code, spoken in LANGUAGES.items()],
                value=first,
                show_label=False,
                container=False,
                elem_id="language",
            )
        if served.blanks:
            with labelled.make(gr.Tab, {"label": "fill"}):
                build_infill(served, labelled, switch)
        with labelled.make(gr.Tab, {"label": "chat"}):
            build_chat(served, labelled, switch)
        switch.change(labelled.updates, switch, labelled.components, queue=False, api_visibility="private")
        if language == "auto":
            page.load(browser_language, None, switch, queue=False, api_visibility="private")
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


def mount_page(app: FastAPI, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> FastAPI:
    """The application with the page at `MOUNT_PATH`; arguments as of `create_page`."""
    page = create_page(model, tokenizer, name=name)
    mounted: FastAPI = gr.mount_gradio_app(app, page, path=MOUNT_PATH, **page_options())
    return mounted


def browser_language(request: gr.Request) -> str:
    """The language that a browser asks for."""
    return preferred_language(request.headers.get("accept-language"))
