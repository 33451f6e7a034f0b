"""How does the page fill blanks, and show the answers in their text?"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
import pandas as pd

from gmask.errors import GmaskError
from gmask.generation.answers import Choices, Infilling
from gmask.serving.webui_labels import Labelled, say
from gmask.serving.webui_model import PageModel, check_length, told_errors
from gmask.serving.webui_settings import build_sampling, read_seed

MAX_CANDIDATES = 64  # of one blank

EXAMPLES = {
    "en": [
        ["The old man took his [MASK] and went down to the [MASK].", ""],
        ['The king said to his [MASK], "Bring me the [MASK]."', ""],
        ["She is very [MASK] today, because her [MASK] is here.", "happy | sad | angry\nfriend | mother | brother"],
    ],
    "zh": [
        ["春天来了，[MASK]开了，[MASK]绿了。", ""],
        ["根据[MASK]的规定，[MASK]应当依法处理。", ""],
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
"""Puts a blank where the cursor is, which stands at the end before the box is first used."""

PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#ec4899")
COLOURS = {str(number): colour for number, colour in enumerate(PALETTE, start=1)}
"""Of the blanks by their number; Gradio finds some for more."""

Segments = list[tuple[str, str | None]]


@dataclass(frozen=True)
class Results:
    """Where the answers are shown."""

    text: gr.HighlightedText
    table: gr.Dataframe
    chart: gr.BarPlot
    note: gr.Markdown

    @property
    def all(self) -> list[Any]:
        return [self.text, self.table, self.chart, self.note]


def build_infill(model: PageModel, labelled: Labelled, language: gr.Radio) -> None:
    """Draws the tab and wires it up."""
    with gr.Row():
        with gr.Column(scale=3):
            text, choices = _build_texts(model.blanks, labelled)
            with gr.Row():
                run = labelled.make(gr.Button, {"value": "run"}, variant="primary", elem_id="infill-run")
                stop = labelled.make(
                    gr.Button, {"value": "stop"}, variant="stop", min_width=120, scale=0, visible=False,
                    elem_id="infill-stop",
                )  # fmt: skip
            results = _build_results(labelled)
            _build_examples([text, choices], labelled)
        with gr.Column(scale=1, min_width=260):
            settings = _build_settings(model, labelled)
    filled = gr.State(time_to_live=3600)  # an Infilling, or None before the first

    async def fill(text: str, choices: str, *values: Any) -> list[Any]:
        *settings, language = values
        with told_errors(language):
            infilling = await fill_text(model, text, choices, *settings)
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
    filling.then(partial(gr.update, visible=False), None, stop, **quick)
    stop.click(partial(gr.update, visible=False), None, stop, cancels=filling, **quick)
    language.change(show_results, [filled, language], results.all, queue=False, api_visibility="private")
    results.table.select(pick_row, filled, results.text, queue=False, api_visibility="private")


async def fill_text(
    model: PageModel,
    text: str,
    choices: str,
    n: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: str,
) -> Infilling:
    """A filled text and its ``n - 1`` alternatives, best first; choices are scored, whatever the temperature.

    Raises:
        GmaskError, ApiError: as of `PageModel.fill`, `read_choices` and `read_seed`.
    """
    if candidates := read_choices(choices):
        return await model.fill(text, candidates, n, {})
    drawn = {"temperature": temperature, "top_p": top_p, "seed": read_seed(seed)} if temperature else {}
    return await model.fill(text, [], n, {"max_tokens": max_tokens, **drawn})


def read_choices(text: str) -> list[list[str]]:
    """Candidates from lines such as ``sunny | rainy``, one line for each blank.

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
    """The updates of `Results`: all are hidden until there is an answer."""
    if filled is None:
        return [gr.update(visible=False)] * 4
    shares = None if filled.choices is None else choice_shares(filled.choices)
    note = tell(filled, language)
    return [
        gr.update(value=highlight(filled), visible=True),
        gr.update(value={"headers": headers(filled, language), "data": rows(filled)}, visible=True),
        gr.update(
            value=shares,
            visible=shares is not None,
            sort=None if shares is None else list(shares["candidate"]),
            x_title=say("candidate", language),
            y_title=say("probability", language),
        ),
        gr.update(value=note, visible=bool(note)),
    ]


def pick_row(filled: Infilling, event: gr.SelectData) -> Segments:
    """The alternative in the row that was clicked; the table may have been sorted by the user."""
    rank = int(event.row_value[0])
    return highlight([filled, *filled.alternatives][rank - 1])


def highlight(filled: Infilling) -> Segments:
    """The text in segments; an answer's category is the number of its blank, from 1."""
    segments: Segments = []
    end = 0
    for number, blank in enumerate(filled.blanks, start=1):
        segments += [(filled.text[end : blank.start], None), (blank.text, str(number))]
        end = blank.end
    return [*segments, (filled.text[end:], None)]


def headers(filled: Infilling, language: str) -> list[str]:
    """Those of the table of alternatives."""
    blanks = [say("blank", language, number=number) for number in range(1, len(filled.blanks) + 1)]
    return [say("rank", language), *blanks, say("logprob", language), say("probability", language)]


def rows(filled: Infilling) -> list[list[Any]]:
    """Rank, answers, joint log-probability and probability of each alternative.

    Of choices, the probability is the share among the combinations that were scored.
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
    """Such as 12.3% and 0.0042%."""
    if probability < 1e-6:
        return "<0.0001%"
    return (
        f"{probability:.1%}"
        if probability >= 0.01
        else f"{probability:.{1 - math.floor(math.log10(probability)) - 2}%}"
    )


def choice_shares(choices: Choices) -> pd.DataFrame:
    """The probability of each candidate of each blank, summed over the other blanks: candidate, probability, blank."""
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


def tell(filled: Infilling, language: str) -> str:
    """What the user should know of the answers; empty if nothing."""
    alternatives = [filled, *filled.alternatives]
    cut = sum(not blank.finished for alternative in alternatives for blank in alternative.blanks)
    notes = [say("cut", language, count=cut)] if cut else []
    if filled.choices is not None and not filled.choices.exact:
        notes.append(say("beams", language))
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
        label = say(f"examples_{language}", labelled.language)
        texts = [text for text, _ in examples]
        shown = gr.Examples(examples, inputs, label=label, example_labels=texts, cache_examples=False)
        labelled.add(shown.dataset, {"label": f"examples_{language}"})


def _build_settings(model: PageModel, labelled: Labelled) -> list[Any]:
    most, limit = model.most_answers, model.longest_answer
    with labelled.make(gr.Accordion, {"label": "settings"}, open=True):
        return [
            labelled.make(
                gr.Slider, {"label": "n", "info": "n_info"}, minimum=1, maximum=most, value=min(4, most), step=1
            ),
            *build_sampling(labelled, max_tokens=min(24, limit), limit=limit, temperature=0.0, top_p=1.0),
        ]
