"""Fills the blanks of texts, at once or as a stream."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Unpack, overload

from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.answers import Answer, AnswerStream, Hypothesis, Infilling, assemble_infilling, stable_answer
from gmask.generation.decode import Decoder, make_decoder
from gmask.generation.encoding import BlankedText, TextReader, list_texts
from gmask.generation.engine import Request, Stepper
from gmask.generation.sampling import Sampler
from gmask.generation.score import ChoiceLists, read_choice_lists, score_choices
from gmask.generation.settings import Sampling, SettingsKeywords, make_sampling
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
    text "[MASK]". The model reads the text once, in both directions. Each answer sees the text and the answers before
    it. An answer begins with a space of its own, which is dropped if the text has white space before the blank.

    Args:
        model, tokenizer: as `gmask.load` returns them.
        text: one text, or several; the results of several are those of single runs.
        choices: the answers to choose from, scored jointly over all blanks: a list for texts with one blank, else a
            list of lists or a mapping from each blank (counted from 0). Up to 256 combinations are all scored, more
            are searched by beams; `Infilling.choices` says which. If the text has a space before the blank, candidates
            are read with that space.
        batch_size: rows that are decoded together.
        settings: ``n=1`` alternatives: the best ones of a beam search or, with a temperature, drawn ones, ranked by the
            joint log-probability of all answers, also of one that was cut; ``max_tokens=64`` and ``min_tokens=1`` of an
            answer; ``temperature=0``, ``top_k=0``, ``top_p=1``; ``num_beams=1``; ``length_penalty=0`` (ranks by the
            log-probability divided by the number of tokens, end tokens counted, to this power); ``no_repeat_ngram=0``
            (no n-gram of this size occurs twice in an answer); ``seed`` (text i of several draws by ``seed + i``);
            ``stop``, texts that end an answer.

    Returns:
        An `Infilling` for a text, a list of them for several. All log-probabilities are exact and the model's own.

    Raises:
        GmaskError: no blank; an unknown special token; more tokens than the model has positions; a wrong setting.

    Source: Du et al., ACL 2022, section 2; THUDM/GLM generate_samples.py.
    """
    infiller = Infiller(model, tokenizer, make_sampling(settings), batch_size=batch_size)
    if isinstance(text, str):
        return infiller.fill([text], choices)[0]
    return infiller.fill(list_texts(text), choices)


@dataclass(frozen=True)
class Infiller:
    """A model, its tokenizer and the settings of infilling."""

    model: GLMForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise GmaskError(f"batch_size must be at least 1, not {self.batch_size}")
        positions = self.model.config.max_position_embeddings
        if self.sampling.max_tokens > positions:
            raise GmaskError(f"max_tokens is {self.sampling.max_tokens}, but the model has only {positions} positions")

    @cached_property
    def reader(self) -> TextReader:
        return TextReader(self.tokenizer, self.model.config.prompt_ids)

    def decoder(self) -> Decoder:
        """Returns the decoder of the settings. It never writes special tokens, nor ids that only pad the vocabulary."""
        special, forbidden = self.reader.special, self.reader.special_ids.values()
        sampler = Sampler.for_model(special, forbidden, self.tokenizer, self.model.config.vocab_size)
        return make_decoder(self.model, self.tokenizer, sampler, special, self.sampling, batch_size=self.batch_size)

    def fill(
        self,
        texts: Sequence[str | BlankedText],
        choices: ChoiceLists | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[Infilling]:
        """Fills texts; arguments and errors as in `infill`.

        Args:
            texts: as they are, or as `read` returns them.
            seeds: one for each text.
        """
        blanked = [text if isinstance(text, BlankedText) else self.read(text) for text in texts]
        if choices is not None:
            return [self._choose(text, choices) for text in blanked]
        seeds = self.sampling.seeds(len(texts)) if seeds is None else seeds
        found = self.decoder().run([text.context for text in blanked], self.sampling, seeds=seeds)
        return list(map(self._assemble, blanked, found))

    def read(self, text: str) -> BlankedText:
        """Cuts and encodes a text, and checks that it fits the model."""
        return self.reader.read(text, positions=self.model.config.max_position_embeddings)

    def _assemble(self, text: BlankedText, found: Sequence[Hypothesis]) -> Infilling:
        filled = [
            assemble_infilling(text, hypothesis.done, self.tokenizer, stops=self.sampling.stop) for hypothesis in found
        ]
        if self.sampling.beams > 1:  # different tokens may spell the same text: only the best of them is kept
            unique: dict[str, Infilling] = {}
            for infilling in filled:
                unique.setdefault(infilling.text, infilling)
            filled = list(unique.values())
        best, *others = filled[: self.sampling.n]
        return replace(best, alternatives=tuple(others))

    def _choose(self, text: BlankedText, choices: ChoiceLists) -> Infilling:
        if self.sampling.temperature > 0:
            raise GmaskError("choices are scored, not drawn: leave temperature at 0")
        lists = read_choice_lists(choices, len(text.context.blanks))
        scored = score_choices(self.model, self.reader, text, lists, batch_size=self.batch_size)
        filled = [assemble_infilling(text, answers, self.tokenizer) for answers in scored.answers[: self.sampling.n]]
        return replace(filled[0], alternatives=tuple(filled[1:]), choices=scored.choices)


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of one answer; it is never empty, and never a part of a character."""

    blank: int  # index of the blank, from 0
    text: str


def stream_infill(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    **settings: Unpack[SettingsKeywords],
) -> Generator[Fragment, None, Infilling]:
    """As `infill` of one text, but yields the answers in fragments while they are written.

    Joined, the fragments of a blank are its answer as it stands in the filled text. The generator returns the
    `Infilling` (``result = yield from stream_infill(...)``).

    Raises:
        GmaskError: as of `infill`; also for more than one alternative or beam, since the best is known only at the end.
    """
    return stream_answers(Infiller(model, tokenizer, make_sampling(settings)), text)


def stream_answers(infiller: Infiller, text: str) -> Generator[Fragment, None, Infilling]:
    """As `stream_infill`, by an `Infiller`. Wrong settings and texts raise at once, before the first fragment."""
    if infiller.sampling.n > 1 or infiller.sampling.beams > 1:
        raise GmaskError("answers are streamed for n=1 and num_beams=1 only: the best of several is known at the end")
    return _stream(infiller, infiller.read(text))


def _stream(infiller: Infiller, blanked: BlankedText) -> Generator[Fragment, None, Infilling]:
    sampling, stepper = infiller.sampling, infiller.decoder()
    assert isinstance(stepper, Stepper), "there is one answer"
    (seed,) = sampling.seeds(1)
    answer_stream = AnswerStream(infiller.tokenizer, stable_answer(blanked, 0), stops=sampling.stop)
    done: tuple[Answer, ...] = ()
    for progress in stepper.stream(Request(context=blanked.context, sampling=sampling), seed=seed):
        has_ended = len(progress.done) > len(done)
        done = progress.done
        new = answer_stream.take(done[-1] if has_ended else progress.open)
        if new:
            yield Fragment(len(done) - has_ended, new)
        if has_ended and progress.end is None:
            answer_stream = AnswerStream(infiller.tokenizer, stable_answer(blanked, len(done)), stops=sampling.stop)
    return assemble_infilling(blanked, done, infiller.tokenizer, stops=sampling.stop)
