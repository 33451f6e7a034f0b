"""Predictions for the samples of a task, and how a sample becomes the input of a model.

Training and prediction read samples by the same `SampleReader`, so that a model is prompted as it was trained. A GLM
reads a text with blanks; a ChatGLM reads a prompt and answers behind it.

Shape letters: B samples of a batch, T positions, L labels.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.files import check_characters, cut_characters
from gmask.generation.answers import Answer, answer_text, rank_scores
from gmask.generation.decode import make_decoder
from gmask.generation.encoding import BLANKS, BlankedText, Context, TextReader, encode_plain, fit_prompt, format_of
from gmask.generation.padding import batches_by_length, check_numbers, stack_contexts
from gmask.generation.perplexity import DocumentScorer, evaluating
from gmask.generation.sampling import Sampler
from gmask.generation.score import (
    Continuation,
    check_normalization,
    normalize,
    score_answer_ids,
    score_continuations,
)
from gmask.generation.settings import Sampling, ScoreNormalization
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.glm import GLMConfig
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.tasks.records import (
    CHOICES,
    LABELLED,
    MEASURED,
    BlankToken,
    Direction,
    LikelihoodSettings,
    Prediction,
    Sample,
    TaskKind,
    Truncation,
)
from gmask.tasks.templates import split_final_blank

GREEDY = Sampling()
PUBLISHED = LikelihoodSettings()


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: TaskKind,
    samples: Sequence[Sample],
    *,
    settings: Sampling = GREEDY,
    batch_size: int = 16,
    normalization: ScoreNormalization = "sum",
    likelihood: LikelihoodSettings = PUBLISHED,
    max_source: int | None = None,
    truncation: Truncation = "left",
    on_progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Predicts the answers of samples, as the kind of task says: chooses among candidates, classifies, writes, or
    scores the given answer. Of the kind language-model a given document is scored; without one, a text is written on.

    A GLM fills the blanks of a text; a ChatGLM answers behind its prompt, which ends with the blank. The results of
    several samples are those of single runs.

    Args:
        model, tokenizer: as `gmask.load` returns them; for ``"classification"`` a `GLMForSequenceClassification`.
        settings: of written answers. Sample i draws by ``seed + i``; of several answers the best is taken.
        batch_size: rows that are read together; a sample takes as many as it has beams or answers.
        normalization: of the candidates' log-probabilities, as in `gmask.score`.
        likelihood: how given answers are read, and documents cut into windows.
        max_source: tokens of a context, as of `SampleReader`. Longer texts are cut. By default the number of positions
            of the model, less those of the answer if both share them.
        truncation: the side on which a text that is too long is cut.
        on_progress: is called after each batch with the number of its samples.

    Returns:
        A `Prediction` for each sample. For candidates and classes it has ``scores`` in nats, and the ``label`` of the
        highest. For written answers it has a text for each blank, and their log-probabilities as ``scores``. For given
        answers ``scores`` and ``is_greedy`` are of the tokens, of a document without the first.

    Raises:
        GmaskError: a model that cannot do this kind of task; a sample that cannot be read, with file and line.

    Warns:
        UserWarning: texts had to be cut, or rounds of conversations left out.
    """
    predictor = make_predictor(
        model,
        tokenizer,
        kind,
        settings=settings,
        batch_size=batch_size,
        normalization=normalization,
        likelihood=likelihood,
        max_source=max_source,
        truncation=truncation,
    )
    return predictor.predict(samples, on_progress or (lambda count: None))


def make_predictor(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: TaskKind,
    *,
    settings: Sampling = GREEDY,
    batch_size: int = 16,
    normalization: ScoreNormalization = "sum",
    likelihood: LikelihoodSettings = PUBLISHED,
    max_source: int | None = None,
    truncation: Truncation = "left",
) -> "Predictor":
    """What `predict` asks, for callers who choose the batches themselves; arguments and errors as there."""
    if batch_size < 1:
        raise GmaskError(f"batch_size must be at least 1, not {batch_size}")
    check_normalization(normalization)
    if (kind == "classification") != isinstance(model, GLMForSequenceClassification):
        needed = "a GLMForSequenceClassification" if kind == "classification" else "a model that writes"
        raise GmaskError(f"a {kind} task needs {needed}, not a {type(model).__name__}")
    positions = model.config.max_position_embeddings
    if isinstance(model.config, GLMConfig) and settings.max_tokens > positions:
        raise GmaskError(f"max_tokens is {settings.max_tokens}, but the model has only {positions} positions")
    if max_source is None:
        max_source = _room(model, kind, settings)
    reader = SampleReader(
        tokenizer,
        model.config,
        kind,
        max_source=max_source,
        truncation=truncation,
        direction=likelihood.direction,
    )
    return Predictor(model, tokenizer, reader, settings, batch_size, normalization, likelihood)


def _room(model: PreTrainedModel, kind: TaskKind, settings: Sampling) -> int:
    """Returns the most tokens that a context may have. Answers to a GLM's blanks have positions of their own."""
    positions: int = model.config.max_position_embeddings
    if kind in (*LABELLED, "likelihood") or (isinstance(model.config, GLMConfig) and kind != "chat"):
        return positions
    if settings.max_tokens >= positions - 1:
        raise GmaskError(f"max_tokens {settings.max_tokens} leaves no room for a prompt in {positions} positions")
    return positions - settings.max_tokens - 1  # <sop>


@dataclass(frozen=True, slots=True)
class ReadSample:
    """A sample in tokens."""

    context: Context
    answers: tuple[tuple[int, ...], ...]  # ids of the known answers
    blanked: BlankedText | None = None  # of a text with blanks: to fit written answers into it
    tokens_cut: int = 0  # of the text
    rounds_left_out: int = 0  # of a conversation, the oldest ones
    unscored: int = 0  # leading tokens of the answer that stand before it in the text


class SampleReader:
    """Reads samples of one kind for models of one config.

    Args:
        max_source: tokens of a context, blanks and control tokens counted. If a text has more, tokens of the text are
            cut, but no blank and no control token. Of a conversation, the oldest rounds are left out first.
        truncation: the side on which the text is cut.
        direction: of the kind likelihood: whether the text before the answer is context, or written too.

    Raises:
        GmaskError: a kind that the model cannot do, or more tokens than it has positions.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        kind: TaskKind,
        *,
        max_source: int,
        truncation: Truncation = "left",
        direction: Direction = "both",
    ) -> None:
        if truncation not in get_args(Truncation):
            raise GmaskError(f"truncation must be left or right, not {truncation!r}")
        if direction not in get_args(Direction):
            raise GmaskError(f"direction must be both or left, not {direction!r}")
        if max_source > config.max_position_embeddings:
            raise GmaskError(
                f"max_source is {max_source}, but the model has only {config.max_position_embeddings} positions"
            )
        is_chatglm = isinstance(config, ChatGLMConfig)
        if kind == "classification":
            if is_chatglm:
                raise GmaskError("a ChatGLM has no head to classify with: make the task a cloze")
            if config.pool_token == "start":
                raise GmaskError("pool_token start reads <sop>, which a text without a blank lacks: take cls or pad")
        self.tokenizer, self.config, self.kind = tokenizer, config, kind
        self.max_source, self.truncation, self.direction = max_source, truncation, direction
        self.format = format_of(config, tokenizer)
        self.special = self.format.special
        self.blanks = None if is_chatglm else TextReader(tokenizer, config.prompt_ids)
        special = self.special
        self.control_ids = {special.cls, special.eos, special.mask, special.smask, special.gmask}
        if self.blanks is not None:
            self.control_ids |= {*self.blanks.prompt_ids}

    def read(self, sample: Sample) -> ReadSample:
        """Returns the context of a sample, cut to `max_source`, and the ids of its answers.

        Raises:
            GmaskError: a text that lacks a blank, or answers that do not fit the blanks; the error names the file and
                the line of the sample.
        """
        try:
            return self._read_chat(sample) if self.kind == "chat" else self._read_text(sample)
        except GmaskError as error:
            raise locate(error, sample) from error

    def read_before_blank(self, text: str, blank: BlankToken, answers: Sequence[str] = ()) -> ReadSample:
        """Returns the context of a text that a blank follows, and the ids of answers. Special tokens in it are text.

        A ChatGLM has but one blank. Errors as of `read`.
        """
        if self.blanks is None:
            plain = [answer.removeprefix(" ") for answer in answers]
            ids = tuple(tuple(encode_plain(self.tokenizer, answer)) for answer in plain)
            whole, blanked = self.format.encode(self._shorten_source(text.rstrip()), ()), None
        else:
            whole = self.blanks.read_blank(
                self.blanks.find_blank(blank), text, most=self.max_source, cut_start=self.truncation == "left"
            )
            blanked = BlankedText((text, ""), whole)
            ids = tuple(self.blanks.encode_answer(answer, blanked, 0) for answer in answers)
        for answer, tokens in zip(answers, ids, strict=True):
            self._check_answer(answer, tokens)
        return self._fit(whole, ids, blanked)

    def read_bare(self, question: ReadSample) -> Context:
        """Returns a context that is nothing but the blank of a question: for ``normalization="unconditional"``."""
        if self.blanks is None:
            return self.format.encode("", ())
        return self.blanks.read_blank(question.context.ids[question.context.blanks[0]])

    def _read_chat(self, sample: Sample) -> ReadSample:
        answers = tuple(tuple(encode_plain(self.tokenizer, self._shorten(answer))) for answer in sample.answers)
        bare = self.format.encode(self._shorten_source(sample.text), ())
        if len(bare.ids) > self.max_source:
            context = self._cut(bare, self._frame(bare), self.max_source)
            return ReadSample(context, answers, None, len(bare.ids) - len(context.ids), len(sample.history))
        longest = self.max_source + 1  # with <sop>
        prompt = fit_prompt(sample.text, sample.history, self.format, longest=longest, max_tokens=0)
        return ReadSample(prompt.context, answers, rounds_left_out=prompt.rounds_left_out)

    def _frame(self, context: Context) -> set[int]:
        """Returns the indices of the tokens that belong to the prompt format, not to the question."""
        empty, ids = self.format.encode("", ()).ids, context.ids
        head, tail = 0, 0
        while head < len(empty) and empty[head] == ids[head]:
            head += 1
        while tail < len(empty) - head and empty[-1 - tail] == ids[-1 - tail]:
            tail += 1
        return {*range(head), *range(len(ids) - tail, len(ids))}

    def _read_text(self, sample: Sample) -> ReadSample:
        blanked = None
        if self.blanks is None:
            text = sample.text if self.kind == "language-model" else before_last_blank(sample.text)
            whole = self.format.encode(self._shorten_source(text), ())
        elif self.kind == "language-model":
            whole = self.blanks.read_blank(
                self.special.gmask, sample.text, most=self.max_source, cut_start=self.truncation == "left"
            )
        else:
            blanked = self.blanks.read_any(sample.text, most=self.max_source, cut_start=self.truncation == "left")
            self._check_blanks(len(blanked.context.blanks), sample)
            whole = blanked.context
        answers = tuple(self._encode_answer(sample, index, blanked) for index in range(len(sample.answers)))
        return self._fit(whole, answers, blanked)

    def _fit(
        self, whole: Context, answers: tuple[tuple[int, ...], ...], blanked: BlankedText | None = None
    ) -> ReadSample:
        """Cuts a context to the room that it has, and lays it out by the direction."""
        is_left = self.kind == "likelihood" and self.direction == "left"
        room = self.max_source
        if self.kind == "likelihood" and answers and (is_left or self.blanks is None):  # they share the positions
            room = min(room, self.config.max_position_embeddings - len(answers[0]) - 1)
        context = self._cut(whole, (), room)
        tokens_cut = len(whole.ids) - len(context.ids)
        if is_left and answers:
            context, before = self._begin(context)
            return ReadSample(context, ((*before, *answers[0]),), blanked, tokens_cut, unscored=len(before))
        return ReadSample(context, answers, blanked, tokens_cut)

    def _begin(self, context: Context) -> tuple[Context, tuple[int, ...]]:
        """Splits a context that ends with its blank: the first token of its text with the blank, and the other tokens.

        As published for the evaluation from left to right: something must be context, so the first token is.
        """
        ids, (blank,) = context.ids, context.blanks
        if any(token not in self.control_ids for token in ids[blank + 1 :]):
            raise GmaskError("direction left writes the text before the blank, and here text follows it: take both")
        first = next((index for index in range(blank) if ids[index] not in self.control_ids), blank)
        start = min(first + 1, blank)
        return Context((*ids[:start], *ids[blank:]), (start,)), ids[start:blank]

    def _check_blanks(self, blanks: int, sample: Sample) -> None:
        if self.kind == "classification":
            if blanks:
                raise GmaskError(
                    f"the text of a classification has no blank, but this one has {blanks}: make it a cloze"
                )
        elif not blanks:
            raise GmaskError(f"the text has no blank: put {', '.join(BLANKS[:-1])} or {BLANKS[-1]} into the template")
        elif self.kind != "infill" and blanks > 1:
            raise GmaskError(f"the text has {blanks} blanks, {self.kind} takes one: make the task an infill")
        elif self.kind == "infill" and sample.answers and len(sample.answers) != blanks:
            raise GmaskError(f"the text has {blanks} blanks, but there are {len(sample.answers)} answers")

    def _encode_answer(self, sample: Sample, index: int, blanked: BlankedText | None) -> tuple[int, ...]:
        answer = sample.answers[index]
        if self.kind in CHOICES:
            positions = self.config.max_position_embeddings
            check_characters(answer, positions, self.tokenizer, name=f"the answer {answer[:20]!r}")
        elif self.kind != "language-model":  # of which all pieces of a document are learnt
            answer = self._shorten(answer)
        if blanked is None or self.blanks is None:
            ids = tuple(encode_plain(self.tokenizer, answer))
        else:
            ids = self.blanks.encode_answer(answer, blanked, index if self.kind == "infill" else 0)
        self._check_answer(answer, ids)
        return ids

    def _shorten_source(self, text: str) -> str:
        """Returns the side of a text that `_cut` keeps, if it is far longer, before it is tokenized."""
        return cut_characters(text, self.max_source, self.tokenizer, keep_end=self.truncation == "left")

    def _shorten(self, answer: str) -> str:
        """Returns the start of an answer, if it is far longer than the positions of the model."""
        return cut_characters(answer, self.config.max_position_embeddings, self.tokenizer)

    def _check_answer(self, answer: str, ids: tuple[int, ...]) -> None:
        """Raises `GmaskError` for an answer that cannot be scored, if it is one that is."""
        if self.kind not in (*CHOICES, "likelihood"):
            return
        if not ids:
            raise GmaskError("an answer is empty: only texts with at least one token can be scored")
        if len(ids) >= self.config.max_position_embeddings:
            raise GmaskError(f"the answer {answer[:20]!r} has {len(ids)} tokens, more than the model has positions")

    def _cut(self, context: Context, kept: Collection[int], room: int) -> Context:
        """Returns the context cut to ``room`` tokens. Control tokens and those at the indices ``kept`` stay."""
        surplus = len(context.ids) - room
        if surplus <= 0:
            return context
        loose = [i for i, token in enumerate(context.ids) if token not in self.control_ids and i not in kept]
        if surplus > len(loose):
            raise GmaskError(
                f"max_source is {room}, but what may not be cut has {len(context.ids) - len(loose)} tokens"
            )
        first = context.blanks[0] if context.blanks else len(context.ids)
        before = sum(index < first for index in loose)
        order = loose[:before] + loose[before:][::-1] if self.truncation == "left" else loose[::-1]
        gone = set(order[:surplus])
        stays = [index for index in range(len(context.ids)) if index not in gone]
        blanks = tuple(new for new, index in enumerate(stays) if index in context.blanks)
        return Context(tuple(context.ids[index] for index in stays), blanks)


@dataclass(frozen=True, slots=True)
class Predictor:
    """A model and the settings of its predictions; arguments as of `predict`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reader: SampleReader
    settings: Sampling
    batch_size: int
    normalization: ScoreNormalization
    likelihood: LikelihoodSettings

    def predict(self, samples: Sequence[Sample], on_progress: Callable[[int], None]) -> list[Prediction]:
        """Returns predictions in the order of the samples. Samples of similar length are batched."""
        questions = self.read(samples)
        warn_of_cuts(questions, self.reader.max_source)
        seeds = self.settings.seeds(len(samples))
        found: dict[int, Prediction] = {}
        for batch in batches_by_length(list(map(measure_length, questions)), self.samples_per_batch(questions)):
            predictions = self.answer([questions[index] for index in batch], [seeds[index] for index in batch])
            found.update(zip(batch, predictions, strict=True))
            on_progress(len(batch))
        return [found[index] for index in range(len(samples))]

    def samples_per_batch(self, questions: Sequence[ReadSample]) -> int:
        """``batch_size`` is in rows: each beam and each answer of a text that is written takes one."""
        is_written = self.reader.kind not in LABELLED and not self._is_measured(questions)
        return max(1, self.batch_size // max(self.settings.beams, self.settings.n)) if is_written else self.batch_size

    def _is_measured(self, questions: Sequence[ReadSample]) -> bool:
        """Whether given answers are scored; a language model without a text to score writes one."""
        return self.reader.kind in MEASURED and any(question.answers for question in questions)

    def read(self, samples: Sequence[Sample]) -> list[ReadSample]:
        """The samples in tokens. Raises `GmaskError` for one that cannot be read, with file and line."""
        kind = self.reader.kind
        if kind in CHOICES:
            for sample in samples:
                if not sample.answers:
                    raise locate(GmaskError("the sample has no candidates to choose from"), sample)
        elif kind == "likelihood" or (kind == "language-model" and any(sample.answers for sample in samples)):
            for sample in samples:
                if len(sample.answers) != 1:
                    raise locate(GmaskError("the sample has no answer, or several: one text is scored"), sample)
        return [self.reader.read(sample) for sample in samples]

    def answer(self, questions: Sequence[ReadSample], seeds: Sequence[int]) -> list[Prediction]:
        """The predictions of one batch; each written answer draws by the seed of its sample."""
        with evaluating(self.model), torch.inference_mode():
            if self.reader.kind in CHOICES:
                return self._choose(questions)
            if self.reader.kind == "classification":
                return self._classify(questions)
            if self._is_measured(questions):
                return self._measure(questions)
            return self._write(questions, seeds)

    def _choose(self, questions: Sequence[ReadSample]) -> list[Prediction]:
        special, size = self.reader.special, self.batch_size
        asked = [(question.context, question.answers) for question in questions]
        answers = score_answer_ids(self.model, asked, special, batch_size=size)
        bare = [self.reader.read_bare(question) for question in questions]
        return [
            _best(scores)
            for scores in normalize(self.model, answers, bare, special, self.normalization, batch_size=size)
        ]

    def _classify(self, questions: Sequence[ReadSample]) -> list[Prediction]:
        contexts = [question.context for question in questions]
        input_ids, layout, is_real = stack_contexts(contexts, pad=self.reader.special.pad)
        mask = torch.ones_like(input_ids) if is_real is None else is_real.long()
        device = self.model.device
        logits = self.model(
            input_ids=input_ids.to(device), layout=layout.to(device), attention_mask=mask.to(device)
        ).logits
        check_numbers(logits)
        return [_best(row) for row in logits.log_softmax(-1).tolist()]

    def _measure(self, questions: Sequence[ReadSample]) -> list[Prediction]:
        if self.reader.kind == "language-model":
            scorer = DocumentScorer(self.model, self.tokenizer, self.likelihood, self.batch_size)
            found = scorer.score([question.answers[0] for question in questions])
        else:
            asked = [Continuation(question.context, question.answers[0], question.unscored) for question in questions]
            found = score_continuations(self.model, asked, self.reader.special, batch_size=self.batch_size)
        return [Prediction(scores=answer.logprobs, is_greedy=answer.is_greedy) for answer in found]

    def _write(self, questions: Sequence[ReadSample], seeds: Sequence[int]) -> list[Prediction]:
        special, forbidden = self.reader.special, self.reader.format.forbidden_ids
        sampler = Sampler.for_model(special, forbidden, self.tokenizer, self.model.config.vocab_size)
        decoder = make_decoder(self.model, self.tokenizer, sampler, special, self.settings, batch_size=self.batch_size)
        found = decoder.run([question.context for question in questions], self.settings, seeds=seeds)
        return [self._read(question, best[0].done) for question, best in zip(questions, found, strict=True)]

    def _read(self, question: ReadSample, answers: Sequence[Answer]) -> Prediction:
        texts = [self._spell(question, blank, answer) for blank, answer in enumerate(answers)]
        return Prediction(texts=tuple(texts), scores=tuple(answer.logprob for answer in answers))

    def _spell(self, question: ReadSample, blank: int, answer: Answer) -> str:
        """Returns the text of an answer as it stands in its text, or as a conversation shows it."""
        text = answer_text(answer, self.tokenizer, self.settings.stop)
        if self.reader.kind == "chat":
            return self.reader.format.clean(text)
        return text.strip() if question.blanked is None else question.blanked.fit_answer(text, blank)


def measure_length(question: ReadSample) -> int:
    """The tokens by which samples are sorted: those of the context, and of a text that is written to be scored."""
    return len(question.context.ids) + question.unscored


def _best(scores: Sequence[float]) -> Prediction:
    """Returns the index of the highest score; of equal ones the first."""
    return Prediction(label=rank_scores(scores)[0], scores=tuple(scores))


def warn_of_cuts(questions: Sequence[ReadSample], max_source: int) -> None:
    """Warns if texts were cut or rounds left out."""
    cut = sum(question.tokens_cut > 0 for question in questions)
    left_out = sum(question.rounds_left_out for question in questions)
    if cut or left_out:
        warnings.warn(
            f"of {len(questions)} samples {cut} were cut to {max_source} tokens, and {left_out} earlier rounds of "
            "conversations were left out",
            stacklevel=4,
        )


def before_last_blank(text: str) -> str:
    r"""Returns the text before the one blank that ends it; ``\[MASK]`` is the text "[MASK]".

    Raises:
        GmaskError: no blank, several, or one that does not end the text.
    """
    found = split_final_blank(text)
    if found is None:
        raise GmaskError("a ChatGLM answers behind its prompt: the text must end with its one blank, [gMASK]")
    return found[0].rstrip()


def locate(error: GmaskError, sample: Sample) -> GmaskError:
    """Returns the error with the file and line of a sample in front, if the sample has them."""
    return GmaskError(f"{sample.path}:{sample.line}: {error}") if sample.path else error
