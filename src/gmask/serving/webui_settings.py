"""Which settings do both tabs of the page offer?"""

import re
from typing import Any

import gradio as gr

from gmask.errors import GmaskError
from gmask.serving.webui_labels import Labelled


def build_sampling(labelled: Labelled, *, max_tokens: int, limit: int, temperature: float, top_p: float) -> list[Any]:
    """The controls of how answers are chosen: longest answer, temperature, top-p, seed."""
    return [
        labelled.make(
            gr.Slider,
            {"label": "max_tokens", "info": "max_tokens_info"},
            minimum=1,
            maximum=limit,
            value=max_tokens,
            step=1,
        ),
        labelled.make(
            gr.Slider,
            {"label": "temperature", "info": "temperature_info"},
            minimum=0,
            maximum=2,
            value=temperature,
            step=0.05,
        ),
        labelled.make(
            gr.Slider, {"label": "top_p", "info": "top_p_info"}, minimum=0.05, maximum=1, value=top_p, step=0.05
        ),
        labelled.make(gr.Textbox, {"label": "seed", "info": "seed_info"}, max_length=18, elem_classes="seed"),
    ]


def read_seed(text: str) -> int | None:
    """The seed, or None where the box is empty, which Gradio's own box for numbers cannot be.

    Raises:
        GmaskError: not a whole number from 0.
    """
    if not text.strip():
        return None
    if not re.fullmatch("[0-9]{1,18}", text.strip()):
        raise GmaskError(f"the seed must be a whole number from 0, not {text.strip()!r}")
    return int(text)
