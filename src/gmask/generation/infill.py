"""The blanks of a text are filled, at once or as a stream."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Unpack, overload

from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.answers import (
    Answer,
    AnswerStream,
    Hypothesis,
    Infilling,
    Rules,
    assemble_infilling,
    settle_blank,
)
from gmask.generation.decode import decode, find_answers, make_rules, make_search
from gmask.generation.sampling import make_seeds
from gmask.generation.score import ChoiceLists, read_choices, score_choices
from gmask.generation.settings import Settings, SettingsKeywords, make_settings
from gmask.generation.text import BlankedText, TextReader
from gmask.models.glm import GLMForConditionalGeneration


@overload
def infill(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    choices: ChoiceLists | None = ...,
    batch_size: int = ...,
    **settings: Unpack[SettingsKeywords],
) -> Infilling: ...
@overload
def infill(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[str],
    *,
    choices: ChoiceLists | None = ...,
    batch_size: int = ...,
    **settings: Unpack[SettingsKeywords],
) -> list[Infilling]: ...
def infill(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    choices: ChoiceLists | None = None,
    batch_size: int = 16,
    **settings: Unpack[SettingsKeywords],
) -> Infilling | list[Infilling]:
    """Fills the blanks of a text, or of several in one batch, from left to right.

    ``[MASK]`` stands for a few words, ``[sMASK]`` for a sentence, ``[gMASK]`` for all that follows; ``\\[MASK]`` is the
    text "[MASK]". The model reads the text once, in both directions; each answer sees the text and the answers before
    it. An answer brings its own leading space, which is dropped where the text has white space before the blank.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        text: one text, or several; the results of several are those of single runs.
        choices: the answers to choose from, scored jointly over all blanks: a list for texts with one blank, else a
            list of lists or a mapping from each blank (counted from 0). Up to 256 combinations are all scored, more
            are searched by beams; `Infilling.choices` says which. A candidate is fitted to its place: after a space in
            the text it is read with that space.
        batch_size: rows that are decoded together.
        settings: ``n=1`` alternatives: the best by beam search or, with a temperature, that many drawn ones, ranked by
            the joint log-probability of all answers (one that was cut counts as far as it goes); ``max_tokens=64`` and
            ``min_tokens=1`` of an answer; ``temperature=0``, ``top_k=0``, ``top_p=1``; ``num_beams=1``;
            ``length_penalty=0`` (the rank is the log-probability divided by the number of tokens, ends counted, to this
            power); ``no_repeat_ngram=0`` (no so many tokens stand twice in an answer); ``seed`` (text i of several
            draws as a single run does with ``seed + i``); ``stop``, texts that end an answer.

    Returns:
        An `Infilling` for a text, a list of them for several. All log-probabilities are exact and the model's own.

    Raises:
        GmaskError: no blank; an unknown special token; more tokens than the model has positions; a wrong setting.

    Source: Du et al., ACL 2022, section 2; THUDM/GLM generate_samples.py.
    """
    infiller = Infiller(model, tokenizer, make_settings(settings), batch_size=batch_size)
    if isinstance(text, str):
        return infiller.fill([text], choices)[0]
    return infiller.fill(text, choices)


@dataclass(frozen=True)
class Infiller:
    """A model, its tokenizer and the settings by which blanks are filled."""

    model: GLMForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise GmaskError(f"batch_size must be at least 1, not {self.batch_size}")
        positions = self.model.config.max_position_embeddings
        if self.settings.max_tokens > positions:
            raise GmaskError(f"max_tokens is {self.settings.max_tokens}, but the model has only {positions} positions")

    @cached_property
    def reader(self) -> TextReader:
        return TextReader(self.tokenizer, self.model.config.prompt_ids)

    @cached_property
    def rules(self) -> Rules:
        """When answers end. Special tokens and the rows that pad the vocabulary are never part of one."""
        return make_rules(
            self.settings,
            self.tokenizer,
            ends=(self.reader.special.eop, self.reader.special.eos),
            forbidden=self.reader.special_ids.values(),
            vocabulary_size=self.model.config.vocab_size,
        )

    def fill(
        self, texts: Sequence[str], choices: ChoiceLists | None = None, *, seeds: Sequence[int] | None = None
    ) -> list[Infilling]:
        """Fills texts; arguments and errors as in `infill`. ``seeds`` has one for each text."""
        blanked = [self.read(text) for text in texts]
        if choices is not None:
            return [self._choose(text, choices) for text in blanked]
        seeds = make_seeds(self.settings, len(texts)) if seeds is None else seeds
        size = max(1, self.batch_size // max(self.settings.beams, self.settings.n))
        filled: list[Infilling] = []
        for start in range(0, len(blanked), size):
            batch = blanked[start : start + size]
            found = find_answers(
                self.model,
                [text.context for text in batch],
                self.settings,
                self.rules,
                special=self.reader.special,
                seeds=seeds[start : start + size],
            )
            filled += map(self._assemble, batch, found)
        return filled

    def read(self, text: str) -> BlankedText:
        """Cuts and encodes a text, and checks that it fits the model."""
        blanked = self.reader.read(text)
        blanked.context.check_length(self.model.config.max_position_embeddings)
        return blanked

    def _assemble(self, text: BlankedText, found: Sequence[Hypothesis]) -> Infilling:
        filled = [
            assemble_infilling(text, hypothesis.done, self.tokenizer, stops=self.settings.stop) for hypothesis in found
        ]
        if self.settings.beams > 1:  # different tokens may spell the same text: the best ones stand for it
            unique: dict[str, Infilling] = {}
            for infilling in filled:
                unique.setdefault(infilling.text, infilling)
            filled = list(unique.values())
        best, *others = filled[: self.settings.n]
        return replace(best, alternatives=tuple(others))

    def _choose(self, text: BlankedText, choices: ChoiceLists) -> Infilling:
        if self.settings.temperature > 0:
            raise GmaskError("choices are scored, not drawn: leave temperature at 0")
        lists = read_choices(choices, len(text.context.places))
        scored = score_choices(self.model, self.reader, text, lists, batch_size=self.batch_size)
        filled = [assemble_infilling(text, answers, self.tokenizer) for answers in scored.answers[: self.settings.n]]
        return replace(filled[0], alternatives=tuple(filled[1:]), choices=scored.choices)


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
