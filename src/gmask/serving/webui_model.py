"""What does the page ask of a model, one request at a time?"""

import html
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import gradio as gr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError, is_shortage
from gmask.generation.answers import Infilling
from gmask.generation.chat import Chatter, Reply
from gmask.generation.context import TextReader
from gmask.generation.conversation import Rounds
from gmask.generation.infill import infill
from gmask.models.glm import GLMForConditionalGeneration
from gmask.serving.webui_labels import say

MAX_CHARACTERS = 20_000
"""Of a text, of all its choices, and of a message; what a model reads is less, but is counted in tokens."""


class PageModel:
    """A model that answers one request after the other.

    Args:
        lock: held while the model works, for a program that uses the same model beside the page.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lock: "threading.Lock | None" = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = lock or threading.Lock()

    @property
    def positions(self) -> int:
        """Tokens that prompt and reply may have together."""
        return int(self.model.config.max_position_embeddings)

    @property
    def blanks(self) -> list[str]:
        """The blank tokens that it was trained with; none for a model that only talks."""
        if not isinstance(self.model, GLMForConditionalGeneration):
            return []
        known = TextReader(self.tokenizer).blank_ids
        return [blank for blank in ("[MASK]", "[sMASK]", "[gMASK]") if blank in known]

    def fill(self, text: str, choices: Sequence[Sequence[str]], settings: dict[str, Any]) -> Infilling:
        """A text with its blanks filled.

        Raises:
            GmaskError: as of `gmask.infill`; also a text that is too long.
        """
        check_length(text)
        assert isinstance(self.model, GLMForConditionalGeneration), "the page has no blanks for another model"
        with self.lock:
            filled: Infilling = infill(self.model, self.tokenizer, text, choices=choices or None, **settings)
        return filled

    def stream_reply(self, message: str, rounds: Rounds, settings: dict[str, Any]) -> Generator[str, None, Reply]:
        """The reply to a message in fragments; it ends early when the generator is closed.

        Raises:
            GmaskError: as of `gmask.Chat`; also a message that is too long.
        """
        check_length(message)
        chatter = Chatter(self.model, self.tokenizer, **settings)
        prompt = chatter.fit(message, rounds)
        seed = chatter.first_seed() + len(rounds)
        with self.lock, closing(chatter.stream(prompt, seed)) as fragments:
            return (yield from fragments)


def check_length(text: str) -> None:
    """Raises `GmaskError` for a text that no model could read."""
    if len(text) > MAX_CHARACTERS:
        raise GmaskError(f"the text has {len(text)} characters, but the page takes {MAX_CHARACTERS}: shorten it")


@contextmanager
def told_errors(language: str) -> Iterator[None]:
    """Tells the user's mistakes in a line on the page. Gradio would render it as HTML, and it may quote the user."""
    try:
        yield
    except GmaskError as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        message = "not enough memory: a shorter text, fewer answers or a quantized model need less"
    else:
        return
    raise gr.Error(html.escape(message), title=say("error", language), print_exception=False)
