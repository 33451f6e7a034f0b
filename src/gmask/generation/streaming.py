"""How are answers given out while they are written?"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Unpack

from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.answers import Infilling, TextAssembler, assemble_infilling, cut_at_stop
from gmask.generation.context import BlankedText
from gmask.generation.decoding import Answer, decode
from gmask.generation.infill import Infiller
from gmask.generation.search import make_search, make_seeds
from gmask.generation.settings import SettingsKeywords, make_settings
from gmask.models.glm import GLMForConditionalGeneration


@dataclass(frozen=True, slots=True)
class Fragment:
    """A stretch of one answer; never empty, and never part of a character."""

    blank: int  # which blank it belongs to, from 0
    text: str


def stream_infill(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    **settings: Unpack[SettingsKeywords],
) -> Generator[Fragment, None, Infilling]:
    """`infill` of one text that gives out the answers as they are written.

    Joined, the fragments of a blank are its answer as it stands in the filled text. The generator returns the
    `Infilling` (``result = yield from stream_infill(...)``).

    Raises:
        GmaskError: as `infill`; also more than one alternative or beam, since the best is known only at the end.
    """
    return stream_answers(Infiller(model, tokenizer, make_settings(settings)), text)


def stream_answers(infiller: Infiller, text: str) -> Generator[Fragment, None, Infilling]:
    """What `stream_infill` gives, by an `Infiller`; its errors come before the first fragment is asked for."""
    if infiller.settings.n > 1 or infiller.settings.beams > 1:
        raise GmaskError("answers are streamed for n=1 and num_beams=1 only: the best of several is known at the end")
    return _tell_answers(infiller, infiller.read(text))


def _tell_answers(infiller: Infiller, blanked: BlankedText) -> Generator[Fragment, None, Infilling]:
    stops = infiller.settings.stop
    search = make_search([blanked.context], infiller.settings, infiller.rules, seeds=make_seeds(infiller.settings, 1))
    answer_stream = AnswerStream(infiller.tokenizer, settle_blank(blanked, 0), stops=stops)
    done: tuple[Answer, ...] = ()
    for (hypothesis,) in decode(infiller.model, search.contexts, search, special=infiller.reader.special):
        has_ended = len(hypothesis.done) > len(done)
        done = hypothesis.done
        new = answer_stream.take(done[-1] if has_ended else hypothesis.open)
        if new:
            yield Fragment(len(done) - has_ended, new)
        if has_ended and not hypothesis.is_complete:
            answer_stream = AnswerStream(infiller.tokenizer, settle_blank(blanked, len(done)), stops=stops)
    return assemble_infilling(blanked, done, infiller.tokenizer, stops=stops)


def settle_blank(blanked: BlankedText, blank: int) -> Callable[[str, bool], str]:
    """What is certain of an answer in its text: spaces at its end may be its last, which the text may drop."""
    return lambda text, is_whole: blanked.fit_answer(text if is_whole else text.rstrip(" "), blank)


class AnswerStream:
    """What can be told of one answer so far without having to be taken back."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settle: Callable[[str, bool], str], *, stops: Sequence[str]
    ) -> None:
        """``settle`` gives what is certain of a text, and is told whether that is the whole answer."""
        self.assembler = TextAssembler(tokenizer)
        self.settle = settle
        self.stops = stops
        self.text = ""
        self.told = ""

    def take(self, answer: Answer) -> str:
        """The text that has become certain now that the answer has grown, or ended."""
        for token_id in answer.ids[len(self.assembler.ids) :]:
            self.text += self.assembler.push(token_id)
        if answer.finish:
            self.text += self.assembler.finish()
            text = cut_at_stop(self.text, self.stops) if answer.finish == "stop" else self.text
        else:
            text = self._without_open_stop()
        certain = self.settle(text, answer.finish is not None)
        new = certain[len(self.told) :]
        self.told = certain
        return new

    def _without_open_stop(self) -> str:
        """The text without what may be the start of a stop text."""
        keep = min((self._start_of(stop) for stop in self.stops), default=len(self.text))
        return self.text[:keep]

    def _start_of(self, stop: str) -> int:
        """Where the text's longest ending that begins a stop text starts."""
        longest = range(min(len(stop) - 1, len(self.text)), 0, -1)
        return len(self.text) - next((size for size in longest if self.text.endswith(stop[:size])), 0)
