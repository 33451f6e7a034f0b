"""Where do people who do not program meet a model? On a page in their browser."""

from dataclasses import replace
from typing import Any, Literal

import gradio as gr
from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from gmask.generation.engine import Engine
from gmask.loading import LanguageModel
from gmask.serving.backend import Backend
from gmask.serving.limits import PAGE_PATH, is_key
from gmask.serving.settings import ServerSettings
from gmask.serving.webui_chat import build_chat
from gmask.serving.webui_infill import build_infill
from gmask.serving.webui_labels import LANGUAGES, Labelled, preferred_language
from gmask.serving.webui_model import PageModel

Language = Literal["en", "zh", "auto"]

MAX_WAITING = 32
"""Requests beyond those that are answered together; the next one is refused."""

LOGIN = "Any name; the password is an API key of this server. 名字任意；密码为本服务器的 API 密钥。"
"""What the page says where it asks for a key."""

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
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, *, name: str, language: Language = "auto"
) -> gr.Blocks:
    """The page of a model: *Fill blanks*, unless it only talks, and *Chat*.

    What the model writes is shown as plain text. The users of the page are answered together.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        name: of the model, as it is shown.
        language: of the labels; "auto" is the browser's. It can be changed on the page.

    Returns:
        Blocks to ``launch(**page_options())``, or to mount in an application with the same options.
    """
    return draw_page(make_backend(model, tokenizer, name=name), language=language)


def make_backend(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, *, name: str, settings: ServerSettings | None = None
) -> Backend:
    """What answers a page without a server, or beside its model and within its limits; to be closed by its user."""
    limits = replace(settings or ServerSettings(), model_name=name)
    engine = Engine(model, tokenizer, max_rows=limits.max_rows, max_queue=limits.max_queue)
    return Backend(model, tokenizer, engine, limits)


def draw_page(backend: Backend, *, talks: Backend | None = None, language: Language = "auto") -> gr.Blocks:
    """The page of the model of a backend, or of another one where it talks; as `create_page`."""
    served, talking = PageModel(backend), PageModel(talks or backend)
    first = "en" if language == "auto" else language
    labelled = Labelled(first)
    page = gr.Blocks(title="gmask", analytics_enabled=False)
    with page:
        with gr.Row(equal_height=True):
            gr.Markdown(f"# gmask `{backend.settings.model_name}`", elem_id="title")
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
            build_chat(talking, labelled, switch)
        switch.change(labelled.updates, switch, labelled.components, queue=False, api_visibility="private")
        if language == "auto":
            page.load(browser_language, None, switch, queue=False, api_visibility="private")
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=backend.settings.max_rows, api_open=False)
    return page


def mount_page(app: FastAPI, *, talks: Backend | None = None) -> FastAPI:
    """An application of `gmask.serving.server` with the page at `PAGE_PATH`, behind a login if it asks for keys.

    Args:
        talks: what the page talks with, if that is another model than the application's; to be closed by its user.
    """
    backend: Backend = app.state.backend
    keys = backend.settings.api_keys
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        draw_page(backend, talks=talks),
        path=PAGE_PATH,
        auth=(lambda _, password: is_key(password, keys)) if keys else None,
        auth_message=LOGIN,
        **page_options(),
    )
    return mounted


def browser_language(request: gr.Request) -> str:
    """The language that a browser asks for."""
    return preferred_language(request.headers.get("accept-language"))
