"""How does a filled text look: highlighted on a terminal, plain in a pipe?"""

import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from gmask.generation.answers import Infilling
    from gmask.generation.streaming import Fragment

ANSWER_STYLE = "bold green"
CUT_STYLE = "bold yellow"
"""Of an answer that was cut at the limit on its tokens."""


def print_infilling(infilling: "Infilling") -> None:
    """Prints a filled text, or several alternatives, each behind its log-probability (of choices: its probability)."""
    ranked = [infilling, *infilling.alternatives]
    scores = [""] if len(ranked) == 1 else [f"{found.logprob:.3f}\t" for found in ranked]
    if infilling.choices and len(ranked) > 1:
        scores = [f"{found.probability:.4f}\t" for found in infilling.choices.combinations]
    for score, found in zip(scores, ranked, strict=False):
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.text import Text

            Console(highlight=False).print(Text(score, style="dim") + highlight(found), soft_wrap=True)
        else:
            print(score + found.text)


def highlight(infilling: "Infilling") -> "Text":
    """The filled text with its answers in colour."""
    from rich.text import Text

    text = Text(infilling.text)
    for blank in infilling.blanks:
        text.stylize(ANSWER_STYLE if blank.finished else CUT_STYLE, blank.start, blank.end)
    return text


def print_stream(pieces: Sequence[str], fragments: Generator["Fragment", None, "Infilling"]) -> None:
    """Prints a text on the terminal while its blanks are being filled.

    Args:
        pieces: what stands before, between and behind the blanks.
        fragments: as `stream_infill` gives them.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    told = 0
    for fragment in fragments:
        if fragment.blank >= told:  # the text up to this blank, over blanks whose answers left nothing to see
            console.out("".join(pieces[told : fragment.blank + 1]), end="", highlight=False)
            told = fragment.blank + 1
        console.print(Text(fragment.text, style=ANSWER_STYLE), end="", soft_wrap=True)
    console.out("".join(pieces[told:]), highlight=False)
