"""The page in the browser, made with Gradio: a tab for infilling and one for chat."""

import math
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import gradio as gr
import pandas as pd
from fastapi import FastAPI
from gradio.context import get_blocks_context
from gradio.events import Dependency
from starlette.middleware import Middleware
from transformers import PreTrainedTokenizerBase

from gmask.checkpoints.load import LanguageModel
from gmask.conversation import Conversation, read_content, read_conversation
from gmask.errors import GmaskError
from gmask.generation.answers import Choices, Infilling
from gmask.generation.chat import DEFAULTS, Reply
from gmask.serving.app import TimedProtocol
from gmask.serving.backend import Backend, make_backend
from gmask.serving.middleware import PAGE_PATH, AuthMiddleware, HostMiddleware, is_key
from gmask.serving.settings import ServerSettings
from gmask.serving.webui_parts import (
    MAX_CHARACTERS,
    PAGE_LANGUAGES,
    Labelled,
    build_sampling,
    check_length,
    fill_blanks,
    most_answers,
    preferred_language,
    read_seed,
    shown_errors,
    stream_reply,
    translate,
)

PageLanguage = Literal["en", "zh", "auto"]
MAX_WAITING = 32
"""The most requests that wait; further ones are refused."""

LOGIN = "Any name; the password is an API key of this server. 名字任意；密码为本服务器的 API 密钥。"
"""The text of the login."""

STYLE = """
#title code { font: inherit; border: 0; background: none; color: var(--body-text-color-subdued); }
#language { margin-left: auto; width: fit-content; flex: none; }
#infill-alternatives { --font-mono: var(--font); }
#chat-conversation .md { white-space: pre-wrap; }
#infill-alternatives :is(th, td, .body-cell), #infill-alternatives :is(th, td, .body-cell) * {
  overflow-wrap: normal; word-break: normal; hyphens: none;
}
@media (max-width: 640px) {
  #infill-alternatives :is(th, td, .body-cell), #infill-alternatives :is(th, td, .body-cell) * {
    white-space: normal; text-overflow: clip; font-size: 11px; min-width: 0; padding-inline: 1px;
  }
  #infill-alternatives :is(td, .body-cell):last-child * { white-space: nowrap; }
}
"""


def page_options() -> dict[str, Any]:
    """Returns the options of the page for ``launch`` and ``gr.mount_gradio_app``.

    The page loads nothing from the network: it uses the fonts of the reader's system.
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


def launch_page(page: gr.Blocks, hosts: Sequence[str], **options: Any) -> tuple[str, str | None]:
    """Serves a page by Gradio's own server, in a thread, with the limits of requests that `gmask serve` has.

    Args:
        hosts: as of `HostMiddleware`.
        options: of ``launch``.

    Returns:
        The address on this machine, and that of the public link, if one is made.
    """
    settings = ServerSettings()
    limits = [Middleware(HostMiddleware, hosts=hosts), Middleware(AuthMiddleware, settings=settings)]
    app, address, public = page.launch(
        quiet=True, prevent_thread_lock=True, app_kwargs={"middleware": limits}, **options, **page_options()
    )
    app.state.settings = settings
    page.server.config.http_protocol_class = TimedProtocol  # uvicorn asks for it at each connection
    return address, public


def create_page(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, *, name: str, language: PageLanguage = "auto"
) -> gr.Blocks:
    """Makes the page of a model, with the tabs *Fill blanks* (not for a ChatGLM) and *Chat*.

    Answers are shown as plain text. Requests of several users are batched.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        name: of the model, as it is shown.
        language: of the labels; "auto" is that of the browser. It can be changed on the page.

    Returns:
        Blocks to ``launch(**page_options())``, or to mount in an application with the same options.
    """
    return draw_page(make_backend(model, tokenizer, name=name), language=language)


def draw_page(backend: Backend, *, chat_backend: Backend | None = None, language: PageLanguage = "auto") -> gr.Blocks:
    """As `create_page`, for the model of a backend; the chat may have another one."""
    first = "en" if language == "auto" else language
    labelled = Labelled(first)
    is_shared = chat_backend is not None and chat_backend is not backend  # by two models, each of which its tab names
    page = gr.Blocks(title="gmask", analytics_enabled=False)
    with page:
        with gr.Row(equal_height=True):
            named = "" if is_shared else f" `{backend.settings.model_name}`"
            gr.Markdown(f"# gmask{named}", elem_id="title")
            switch = gr.Radio(
                [(spoken, code) for code, spoken in PAGE_LANGUAGES.items()],
                value=first,
                show_label=False,
                container=False,
                elem_id="language",
            )
        if backend.blanks:
            with labelled.make(gr.Tab, {"label": "fill"}):
                if is_shared:
                    gr.Markdown(f"`{backend.settings.model_name}`", elem_id="fill-model")
                build_infill(backend, labelled, switch)
        with labelled.make(gr.Tab, {"label": "chat"}):
            if chat_backend is not None and is_shared:
                gr.Markdown(f"`{chat_backend.settings.model_name}`", elem_id="chat-model")
            build_chat(chat_backend or backend, labelled, switch)
        switch.change(labelled.updates, switch, labelled.components, queue=False, api_visibility="private")
        if language == "auto":
            page.load(browser_language, None, switch, queue=False, api_visibility="private")
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=backend.settings.max_rows, api_open=False)
    return page


def mount_page(app: FastAPI) -> FastAPI:
    """Mounts the page at `PAGE_PATH` of an application, behind a login if the application asks for keys."""
    backends: Sequence[Backend] = app.state.backends
    keys = backends[0].settings.api_keys
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        draw_page(backends[0], chat_backend=backends[-1]),
        path=PAGE_PATH,
        auth=(lambda _, password: is_key(password, keys)) if keys else None,
        auth_message=LOGIN,
        **page_options(),
    )
    return mounted


def browser_language(request: gr.Request) -> str:
    """Returns the language of a browser."""
    return preferred_language(request.headers.get("accept-language"))


Role = Literal["user", "assistant"]
GUARD = "\u2060"  # word joiner: has no width, and no line break
MARKUP = re.compile(r"[<&]")


class PlainChat(gr.ChatInterface):
    """A chat whose messages are shown as plain text.

    Gradio renders messages as HTML even without Markdown. In HTML ``<`` and ``&`` are text unless a letter or one of
    ``/!?#`` follows, so a character without width is inserted behind them; `read_shown` removes it again.

    If a reply fails, Gradio leaves the message in the conversation and its box locked; here both are restored.
    """

    def _setup_events(self) -> None:
        super()._setup_events()
        blocks = get_blocks_context()
        assert blocks is not None, "a chat is drawn inside a page"
        replies = [number for number, event in blocks.fns.items() if event.name == "_submit_fn"]
        for number in replies:
            Dependency(self.textbox, {}, number, None).failure(
                self._take_back,
                [self.saved_input, self.chatbot, self.chatbot_state],
                [self.textbox, self.chatbot, self.chatbot_state],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )

    def _take_back(self, message: str, shown: Any, before: Any) -> tuple[gr.Textbox, Any, Any]:
        """Puts the message back into its box, and restores the conversation.

        A reply that has begun is kept: for Gradio, a reply that the user stops has failed, too.
        """
        usable: dict[str, Any] = {"interactive": True, "submit_btn": True, "stop_btn": False}
        if shown and shown[-1]["role"] == "assistant":
            return gr.Textbox(**usable), shown, shown
        return gr.Textbox(value=message, **usable), before, before

    def _append_message_to_history(self, message: Any, history: Any, role: Role = "user") -> Any:
        parts: Any = [{"type": "text", "text": guard(read_content(message))}]
        return super()._append_message_to_history({"role": role, "content": parts}, history, role)


def guard(text: str) -> str:
    """Inserts `GUARD` so that HTML shows a text as it is; a guarded text stays the same."""
    return MARKUP.sub(rf"\g<0>{GUARD}", unguard(text))


def unguard(text: str) -> str:
    """Removes the characters that `guard` inserted."""
    return re.sub(f"(?<=[<&]){GUARD}", "", text)


def build_chat(backend: Backend, labelled: Labelled, language: gr.Radio) -> None:
    """Makes the tab of the chat."""

    async def reply(message: str, history: Sequence[Mapping[str, Any]], *values: Any) -> AsyncIterator[tuple[str, str]]:
        *settings, language = values
        with shown_errors(language):
            async for shown in reply_to(backend, message, history, *settings, language=language):
                yield shown

    with gr.Row():
        with gr.Column(scale=1, min_width=260, render=False) as side:
            with labelled.make(gr.Accordion, {"label": "settings"}, open=True):
                settings = build_sampling(
                    labelled,
                    max_tokens=min(backend.positions // 2, backend.longest_answer),
                    limit=min(backend.positions - 1, backend.longest_answer),
                    temperature=DEFAULTS["temperature"],
                    top_p=DEFAULTS["top_p"],
                )
            status = gr.Markdown(elem_id="chat-status")
        with gr.Column(scale=3):
            chat = PlainChat(
                reply,
                chatbot=_build_conversation(labelled),
                textbox=_build_message(labelled),
                additional_inputs=[*settings, language],
                additional_outputs=status,
                editable=True,
                save_history=True,
                analytics_enabled=False,
                api_visibility="private",
            )
        side.render()
    labelled.add(chat.new_chat_button, {"value": "new_chat"})


async def reply_to(
    backend: Backend,
    message: str,
    history: Sequence[Mapping[str, Any]],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: str,
    *,
    language: str,
) -> AsyncIterator[tuple[str, str]]:
    """Yields the reply so far, repeatedly, with a description, which is empty until the reply is whole.

    Raises:
        GmaskError, ApiError: as of `stream_reply`.
    """
    conversation = read_shown(history, message)
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if (first := read_seed(seed)) is not None:
        settings["seed"] = first + len(conversation.rounds)  # a seed for each round, as in `Chat`
    async with aclosing(stream_reply(backend, conversation, settings)) as fragments:
        async for text, whole in fragments:
            yield text, "" if whole is None else describe_reply(whole, language)


def read_shown(history: Sequence[Mapping[str, Any]], message: str) -> Conversation:
    """Reads the conversation from the messages on the page and the new one."""
    found = read_conversation(history, message)
    rounds = tuple((unguard(asked), unguard(answered)) for asked, answered in found.rounds)
    return replace(found, rounds=rounds, query=unguard(found.require_query()))


def describe_reply(reply: Reply, language: str) -> str:
    """Describes a reply: numbers of tokens, and whether it was cut or rounds were left out."""
    notes = [translate("counts", language, prompt=reply.prompt_tokens, reply=reply.reply_tokens)]
    if reply.finish == "length":
        notes.append(translate("length", language))
    if reply.rounds_left_out:
        notes.append(translate("left_out", language, count=reply.rounds_left_out))
    return " ".join(notes)


def _build_conversation(labelled: Labelled) -> gr.Chatbot:
    return labelled.make(
        gr.Chatbot,
        {"label": "conversation", "placeholder": "greeting"},
        render_markdown=False,
        latex_delimiters=[],
        allow_file_downloads=False,
        buttons=["copy", "copy_all"],
        feedback_options=None,
        height=460,
        elem_id="chat-conversation",
    )


def _build_message(labelled: Labelled) -> gr.Textbox:
    return labelled.make(
        gr.Textbox,
        {"placeholder": "message_hint"},
        max_length=MAX_CHARACTERS,
        max_lines=8,
        submit_btn=True,
        stop_btn=True,
        elem_id="chat-message",
    )


MAX_CANDIDATES = 64  # of one blank
EXAMPLES = {
    "en": [
        ["She poured a cup of [MASK] and sat down by the window.", ""],
        ["He did not say a [MASK], but she knew what he [MASK].", ""],
        ["She is very [MASK] today, because her [MASK] is here.", "happy | sad | angry\nfriend | mother | brother"],
    ],
    "zh": [
        ["今天天气很[MASK]，我们去公园散步吧。", ""],
        ["火车晚点了，他们只[MASK]在车站等。", ""],
        ["她今年[MASK]岁，在[MASK]里学习。", "十九 | 九十 | 一百\n学校 | 医院 | 商店"],
    ],
}
"""Texts, and choices for their blanks."""

INSERT = """(text) => {
    const box = document.querySelector("#infill-text textarea");
    const blank = "%s", start = box.selectionStart, end = box.selectionEnd;
    setTimeout(() => { box.focus(); box.setSelectionRange(start + blank.length, start + blank.length); }, 50);
    return text.slice(0, start) + blank + text.slice(end);
}"""
"""Inserts a blank at the cursor."""

PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#ec4899")
COLOURS = {str(number): colour for number, colour in enumerate(PALETTE, start=1)}
"""Colours of the blanks by number; Gradio chooses those of further blanks."""

Segments = list[tuple[str, str | None]]


@dataclass(frozen=True)
class Results:
    """The components that show the answers."""

    text: gr.HighlightedText
    table: gr.Dataframe
    chart: gr.BarPlot
    note: gr.Markdown

    @property
    def all(self) -> list[Any]:
        return [self.text, self.table, self.chart, self.note]


def build_infill(backend: Backend, labelled: Labelled, language: gr.Radio) -> None:
    """Makes the tab of infilling."""
    with gr.Row():
        with gr.Column(scale=3):
            text, choices = _build_texts(backend.blanks, labelled)
            with gr.Row():
                run = labelled.make(gr.Button, {"value": "run"}, variant="primary", elem_id="infill-run")
                stop = labelled.make(
                    gr.Button, {"value": "stop"}, variant="stop", min_width=120, scale=0, visible=False,
                    elem_id="infill-stop",
                )  # fmt: skip
            results = _build_results(labelled)
            _build_examples([text, choices], labelled)
        with gr.Column(scale=1, min_width=260):
            settings = _build_settings(backend, labelled)
    filled = gr.State(time_to_live=3600)  # an Infilling, or None before the first

    async def fill(text: str, choices: str, *values: Any) -> list[Any]:
        *settings, language = values
        with shown_errors(language):
            infilling = await fill_text(backend, text, choices, *settings)
        return [infilling, *show_results(infilling, language)]

    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    began = run.click(partial(gr.update, visible=True), None, stop, **quick)
    filling = began.then(
        fill,
        [text, choices, *settings, language],
        [filled, *results.all],
        show_progress_on=run,
        api_visibility="private",
    )
    for ended in (filling.then, filling.failure):  # Gradio has no "then" behind a failure
        ended(partial(gr.update, visible=False), None, stop, **quick)
    stop.click(partial(gr.update, visible=False), None, stop, cancels=filling, **quick)
    language.change(show_results, [filled, language], results.all, queue=False, api_visibility="private")
    results.table.select(pick_row, filled, results.text, queue=False, api_visibility="private")


async def fill_text(
    backend: Backend,
    text: str,
    choices: str,
    n: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: str,
) -> Infilling:
    """Returns a filled text and its ``n - 1`` alternatives, best first. Choices are scored without a temperature.

    Raises:
        GmaskError, ApiError: as of `fill_blanks`, `parse_choices` and `read_seed`.
    """
    if candidates := parse_choices(choices):
        return await fill_blanks(backend, text, candidates, n, {})
    drawn = {"temperature": temperature, "top_p": top_p, "seed": read_seed(seed)} if temperature else {}
    return await fill_blanks(backend, text, [], n, {"max_tokens": max_tokens, **drawn})


def parse_choices(text: str) -> list[list[str]]:
    """Parses candidates from lines such as ``sunny | rainy``, one line for each blank.

    Raises:
        GmaskError: too long, an empty candidate, or too many of them.
    """
    check_length(text)
    lines = [line for line in text.splitlines() if line.strip()]
    lists = [[candidate.strip() for candidate in re.split("[|｜]", line)] for line in lines]
    for number, candidates in enumerate(lists, start=1):
        if not all(candidates):
            raise GmaskError(f"line {number} of the choices has an empty candidate: write it as sunny | rainy")
        if len(candidates) > MAX_CANDIDATES:
            raise GmaskError(f"line {number} has {len(candidates)} choices, but a blank takes {MAX_CANDIDATES}")
    return lists


def show_results(filled: Infilling | None, language: str) -> list[Any]:
    """Returns the updates of `Results`; all components are hidden until there is an answer."""
    if filled is None:
        return [gr.update(visible=False)] * 4
    shares = None if filled.choices is None else choice_shares(filled.choices)
    note = describe_filled(filled, language)
    return [
        gr.update(value=highlight(filled), visible=True),
        gr.update(value={"headers": headers(filled, language), "data": rows(filled)}, visible=True),
        gr.update(
            value=shares,
            visible=shares is not None,
            sort=None if shares is None else list(shares["candidate"]),
            x_title=translate("candidate", language),
            y_title=translate("probability", language),
        ),
        gr.update(value=note, visible=bool(note)),
    ]


def pick_row(filled: Infilling, event: gr.SelectData) -> Segments:
    """Returns the alternative of the clicked row, by its rank, since the user may have sorted the table."""
    rank = int(event.row_value[0])
    return highlight([filled, *filled.alternatives][rank - 1])


def highlight(filled: Infilling) -> Segments:
    """Returns the text in segments; the category of an answer is the number of its blank, from 1."""
    segments: Segments = []
    end = 0
    for number, blank in enumerate(filled.blanks, start=1):
        segments += [(filled.text[end : blank.start], None), (blank.text, str(number))]
        end = blank.end
    return [*segments, (filled.text[end:], None)]


def headers(filled: Infilling, language: str) -> list[str]:
    """Returns the headers of the table of alternatives."""
    blanks = [translate("blank", language, number=number) for number in range(1, len(filled.blanks) + 1)]
    return [translate("rank", language), *blanks, translate("logprob", language), translate("probability", language)]


def rows(filled: Infilling) -> list[list[Any]]:
    """Returns rank, answers, joint log-probability and probability of each alternative.

    For choices, the probability is relative to the combinations that were scored.
    """
    alternatives = [filled, *filled.alternatives]
    if filled.choices is None:
        probabilities = [math.exp(alternative.logprob) for alternative in alternatives]
    else:
        probabilities = [found.probability for found in filled.choices.combinations[: len(alternatives)]]
    return [
        [rank, *(blank.text for blank in alternative.blanks), f"{alternative.logprob:.2f}", percent(probability)]
        for rank, (alternative, probability) in enumerate(zip(alternatives, probabilities, strict=True), start=1)
    ]


def percent(probability: float) -> str:
    """Formats a probability, such as 12.3% and 0.0042%."""
    if probability < 1e-6:
        return "<0.0001%"
    return (
        f"{probability:.1%}"
        if probability >= 0.01
        else f"{probability:.{1 - math.floor(math.log10(probability)) - 2}%}"
    )


def choice_shares(choices: Choices) -> pd.DataFrame:
    """Returns the marginal probability of each candidate of each blank, in columns candidate, probability, blank."""
    shares: dict[tuple[int, str], float] = {}
    for found in choices.combinations:
        for blank, text in enumerate(found.texts, start=1):
            shares[blank, text] = shares.get((blank, text), 0.0) + found.probability
    ranked = sorted(shares.items(), key=lambda item: (item[0][0], -item[1]))
    is_single = len(choices.combinations[0].texts) == 1
    return pd.DataFrame(
        {
            "candidate": [text if is_single else f"{blank}: {text}" for (blank, text), _ in ranked],
            "probability": [share for _, share in ranked],
            "blank": [str(blank) for (blank, _), _ in ranked],
        }
    )


def describe_filled(filled: Infilling, language: str) -> str:
    """Returns notes on the answers: whether some were cut, and whether the choices were searched; may be empty."""
    alternatives = [filled, *filled.alternatives]
    cut = sum(not blank.finished for alternative in alternatives for blank in alternative.blanks)
    notes = [translate("cut", language, count=cut)] if cut else []
    if filled.choices is not None and not filled.choices.exact:
        notes.append(translate("beams", language))
    return " ".join(notes)


def _build_texts(blanks: Sequence[str], labelled: Labelled) -> tuple[gr.Textbox, gr.Textbox]:
    text = labelled.make(
        gr.Textbox,
        {"label": "text", "placeholder": "text_hint"},
        value=EXAMPLES["en"][0][0],
        lines=4,
        elem_id="infill-text",
    )
    with gr.Row():
        for blank in blanks:
            insert = labelled.make(gr.Button, {"value": f"insert_{blank.strip('[]')}"}, size="sm", min_width=120)
            insert.click(None, text, text, js=INSERT % blank)
    choices = labelled.make(
        gr.Textbox,
        {"label": "choices", "info": "choices_info", "placeholder": "choices_hint"},
        lines=2,
        elem_id="infill-choices",
    )
    return text, choices


def _build_results(labelled: Labelled) -> Results:
    return Results(
        labelled.make(
            gr.HighlightedText, {"label": "filled"}, color_map=COLOURS, visible=False, elem_id="infill-filled"
        ),
        labelled.make(
            gr.Dataframe,
            {"label": "alternatives"},
            datatype="str",
            interactive=False,
            wrap=True,
            visible=False,
            buttons=[],
            elem_id="infill-alternatives",
        ),
        labelled.make(
            gr.BarPlot,
            {"label": "chart"},
            x="candidate",
            y="probability",
            color="blank",
            color_map=COLOURS,
            color_title=" ",
            y_lim=[0, 1],
            y_axis_format=".0%",
            height=300,
            visible=False,
            buttons=[],
            elem_id="infill-chart",
        ),
        gr.Markdown(visible=False),
    )


def _build_examples(inputs: list[Any], labelled: Labelled) -> None:
    for language, examples in EXAMPLES.items():
        label = translate(f"examples_{language}", labelled.language)
        texts = [text for text, _ in examples]
        shown = gr.Examples(examples, inputs, label=label, example_labels=texts, cache_examples=False)
        labelled.add(shown.dataset, {"label": f"examples_{language}"})


def _build_settings(backend: Backend, labelled: Labelled) -> list[Any]:
    most, limit = most_answers(backend), backend.longest_answer
    with labelled.make(gr.Accordion, {"label": "settings"}, open=True):
        return [
            labelled.make(
                gr.Slider, {"label": "n", "info": "n_info"}, minimum=1, maximum=most, value=min(4, most), step=1
            ),
            *build_sampling(labelled, max_tokens=min(24, limit), limit=limit, temperature=0.0, top_p=1.0),
        ]
