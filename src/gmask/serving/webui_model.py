"""What does the page ask of a model, and how is it told what went wrong?

It asks as an HTTP client does: what it wants is written in one batch with other requests, and ends when the user stops
it.
"""

import asyncio
import html
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import gradio as gr

from gmask.errors import GmaskError, is_shortage
from gmask.generation.answers import Infilling
from gmask.generation.chat import DEFAULTS, Reply
from gmask.generation.conversation import Prompt, Rounds
from gmask.generation.infill import infill
from gmask.generation.requests import Progress
from gmask.generation.sampling import SamplingParameters
from gmask.serving.backend import Backend
from gmask.serving.blanks import read_filled
from gmask.serving.errors import ApiError
from gmask.serving.prompts import fit_chat, settle_reply
from gmask.serving.samples import SampleReader
from gmask.serving.webui_labels import say

MAX_CHARACTERS = 20_000
"""Of a text, of all its choices, and of a message; what a model reads is less, but is counted in tokens."""

MAX_ANSWERS = 16
"""To one text."""


class PageModel:
    """A model, as the page sees it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def positions(self) -> int:
        """Tokens that prompt and reply may have together."""
        return self.backend.positions

    @property
    def longest_answer(self) -> int:
        """In tokens."""
        return self.backend.longest_answer

    @property
    def most_answers(self) -> int:
        """To one text."""
        return min(MAX_ANSWERS, self.backend.settings.max_samples)

    @property
    def blanks(self) -> list[str]:
        """The blank tokens that it was trained with; none for a model that only talks."""
        if not self.backend.fills_blanks:
            return []
        known = self.backend.reader.blank_ids
        return [blank for blank in ("[MASK]", "[sMASK]", "[gMASK]") if blank in known]

    async def fill(self, text: str, choices: Sequence[Sequence[str]], n: int, settings: dict[str, Any]) -> Infilling:
        """A text with its blanks filled, and ``n - 1`` alternatives; settings as of `gmask.infill`.

        Raises:
            GmaskError: as of `gmask.infill`; also a text that is too long.
            ApiError: too many requests; no time.
        """
        check_length(text)
        backend = self.backend
        model = backend.require_blanks("filling blanks")
        if choices or (n > 1 and not settings.get("temperature")):
            search = partial(infill, model, backend.tokenizer, text, choices=choices or None, n=n, **settings)
            return await backend.offline(None, search)
        blanked = await asyncio.to_thread(backend.reader.read, text)
        sampling = SamplingParameters(**settings)
        return await read_filled(backend.submit(None, [blanked.context], sampling, n=n), blanked, sampling)

    async def stream_reply(
        self, message: str, rounds: Rounds, settings: dict[str, Any]
    ) -> AsyncGenerator[tuple[str, Reply | None]]:
        """What is certain of the reply to a message, again and again, and at its end the whole `Reply`.

        Raises:
            GmaskError: as of `gmask.Chat`; also a message that is too long.
            ApiError: too many requests; no time.
        """
        check_length(message)
        backend, longest, room = self.backend, self.positions, settings["max_tokens"]
        prompt = await asyncio.to_thread(fit_chat, message, rounds, backend, longest=longest, max_tokens=room)
        sampling = SamplingParameters(**{**DEFAULTS, **settings})
        reader = SampleReader(backend.tokenizer, [settle_reply(backend)], (), logprobs=False)
        said = ""
        with closing(backend.submit(None, [prompt.context], sampling, is_streamed=True)) as job:
            async for _, progress in job.news():
                said += "".join(piece.text for piece in reader.read(progress, {}))
                yield said, read_reply(said, prompt, progress) if progress.end else None


def read_reply(text: str, prompt: Prompt, progress: Progress) -> Reply:
    """What is known of a reply that has ended; one that had no more time counts as one that was cut."""
    answer = progress.done[0] if progress.done else progress.open
    finish = answer.finish or "length"
    return Reply(text, finish, prompt.length, len(answer.ids), prompt.rounds_left_out, answer.logprob)


def check_length(text: str) -> None:
    """Raises `GmaskError` for a text that no model could read."""
    if len(text) > MAX_CHARACTERS:
        raise GmaskError(f"the text has {len(text)} characters, but the page takes {MAX_CHARACTERS}: shorten it")


@contextmanager
def told_errors(language: str) -> Iterator[None]:
    """Tells the user's mistakes in a line on the page. Gradio would render it as HTML, and it may quote the user."""
    try:
        yield
    except (GmaskError, ApiError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        message = "not enough memory: a shorter text, fewer answers or a quantized model need less"
    else:
        return
    raise gr.Error(html.escape(message), title=say("error", language), print_exception=False)
