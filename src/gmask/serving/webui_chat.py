"""How does the page hold a conversation?"""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

import gradio as gr

from gmask.generation.chat import DEFAULTS, Reply
from gmask.serving.webui_labels import Labelled, say
from gmask.serving.webui_model import MAX_CHARACTERS, PageModel, told_errors
from gmask.serving.webui_settings import build_sampling, read_seed

Role = Literal["user", "assistant"]

GUARD = "\u2060"  # word joiner: has no width, and no line break
MARKUP = re.compile(r"[<&]")


class PlainChat(gr.ChatInterface):
    """A conversation that is shown as it is written.

    Gradio's own is HTML even where Markdown is switched off. HTML takes ``<`` and ``&`` for text unless a letter or one
    of ``/!?#`` follows, so a character without width is put behind them; `read_history` takes it out again.
    """

    def _append_message_to_history(self, message: Any, history: Any, role: Role = "user") -> Any:
        parts: Any = [{"type": "text", "text": guard(read_content(message))}]
        return super()._append_message_to_history({"role": role, "content": parts}, history, role)


def guard(text: str) -> str:
    """A text that HTML takes for text; one that is guarded already stays as it is."""
    return MARKUP.sub(rf"\g<0>{GUARD}", unguard(text))


def unguard(text: str) -> str:
    """The text that was guarded."""
    return re.sub(f"(?<=[<&]){GUARD}", "", text)


def build_chat(model: PageModel, labelled: Labelled, language: gr.Radio) -> None:
    """Draws the tab and wires it up."""

    async def reply(message: str, history: Sequence[Mapping[str, Any]], *values: Any) -> AsyncIterator[tuple[str, str]]:
        *settings, language = values
        with told_errors(language):
            async for told in reply_to(model, message, history, *settings, language=language):
                yield told

    with gr.Row():
        with gr.Column(scale=1, min_width=260, render=False) as side:
            with labelled.make(gr.Accordion, {"label": "settings"}, open=True):
                settings = build_sampling(
                    labelled,
                    max_tokens=min(model.positions // 2, model.longest_answer),
                    limit=min(model.positions - 1, model.longest_answer),
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
    model: PageModel,
    message: str,
    history: Sequence[Mapping[str, Any]],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: str,
    *,
    language: str,
) -> AsyncIterator[tuple[str, str]]:
    """The reply as far as it is written, again and again, and beside it the counts, once it is whole.

    Raises:
        GmaskError, ApiError: as of `PageModel.stream_reply`.
    """
    rounds = read_history(history)
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if (first := read_seed(seed)) is not None:
        settings["seed"] = first + len(rounds)  # each reply is a throw of its own
    async with aclosing(model.stream_reply(unguard(message), rounds, settings)) as fragments:
        async for said, whole in fragments:
            yield said, "" if whole is None else tell(whole, language)


def read_history(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The rounds of the messages on the page; a message whose reply was stopped before its first word is left out."""
    rounds: list[tuple[str, str]] = []
    asked = None
    for message in history:
        text = unguard(read_content(message["content"]))
        if message["role"] == "user":
            asked = text
        elif asked is not None:
            rounds.append((asked, text))
            asked = None
    return rounds


def read_content(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message, which Gradio keeps in parts once it is in the history."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def tell(reply: Reply, language: str) -> str:
    """What a reply took, and whether something is missing."""
    notes = [say("counts", language, prompt=reply.prompt_tokens, reply=reply.reply_tokens)]
    if reply.finish == "length":
        notes.append(say("length", language))
    if reply.rounds_left_out:
        notes.append(say("left_out", language, count=reply.rounds_left_out))
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
