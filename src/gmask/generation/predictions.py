"""What does a model answer to the samples of a task?

Shape letters: B samples of a batch, T positions, L labels.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.generation.answers import cut_at_stop, token_texts
from gmask.generation.decoding import Answer, check_numbers, stack_contexts
from gmask.generation.likelihood import score_answers, score_shared
from gmask.generation.reading import ReadSample, SampleReader, locate
from gmask.generation.score import Normalization
from gmask.generation.search import find_answers, make_rules, make_seeds
from gmask.generation.settings import Settings
from gmask.models.glm import GLMConfig, GLMForSequenceClassification
from gmask.tasks.samples import CHOICES, LABELLED, Prediction, Sample, TaskKind, Truncation

GREEDY = Settings()


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: TaskKind,
    samples: Sequence[Sample],
    *,
    settings: Settings = GREEDY,
    batch_size: int = 16,
    normalization: Normalization = "sum",
    max_source: int | None = None,
    truncation: Truncation = "left",
    on_progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Answers samples: chooses among their candidates, classifies, or writes, by the kind of the task.

    A GLM fills the blanks of a text; a ChatGLM answers behind its prompt, which ends with the blank. The results of
    several samples are those of single runs.

    Args:
        model, tokenizer: as `gmask.load` returns them; for ``"classification"`` a `GLMForSequenceClassification`.
        settings: how texts are written. Sample i draws by ``seed + i``; of several answers the best is taken.
        batch_size: samples that are read together; fewer, where each is searched by several beams.
        normalization: of the candidates' log-probabilities, as in `gmask.score`.
        max_source: tokens of a context, as of `SampleReader`; by default what the model has positions for, with room
            for the answer where both share them. Longer ones are cut.
        truncation: where a text that is too long is cut.
        on_progress: is told after each batch how many samples it had.

    Returns:
        A `Prediction` for each sample. Candidates and classes: ``scores`` in nats, and the ``label`` of the highest.
        Texts: one for each blank, and in ``scores`` their log-probabilities.

    Raises:
        GmaskError: a model that cannot do this kind of task; a sample that it cannot read, with file and line.

    Warns:
        UserWarning: texts had to be cut, or rounds of conversations left out.
    """
    if batch_size < 1:
        raise GmaskError(f"batch_size must be at least 1, not {batch_size}")
    if normalization not in get_args(Normalization):
        raise GmaskError(f"normalization must be one of {', '.join(get_args(Normalization))}, not {normalization!r}")
    if (kind == "classification") != isinstance(model, GLMForSequenceClassification):
        needed = "a GLMForSequenceClassification" if kind == "classification" else "a model that writes"
        raise GmaskError(f"a {kind} task needs {needed}, not a {type(model).__name__}")
    positions = model.config.max_position_embeddings
    if isinstance(model.config, GLMConfig) and settings.max_tokens > positions:
        raise GmaskError(f"max_tokens is {settings.max_tokens}, but the model has only {positions} positions")
    if max_source is None:
        max_source = _room(model, kind, settings)
    reader = SampleReader(tokenizer, model.config, kind, max_source=max_source, truncation=truncation)
    predictor = Predictor(model, tokenizer, reader, settings, batch_size, normalization)
    with _evaluating(model), torch.inference_mode():
        return predictor.predict(samples, on_progress or (lambda count: None))


def _room(model: PreTrainedModel, kind: TaskKind, settings: Settings) -> int:
    """Tokens that a context may have. The answers to a GLM's blanks have positions of their own."""
    positions: int = model.config.max_position_embeddings
    if kind in LABELLED or (isinstance(model.config, GLMConfig) and kind != "chat"):
        return positions
    if settings.max_tokens >= positions - 1:
        raise GmaskError(f"max_tokens {settings.max_tokens} leaves no room for a prompt in {positions} positions")
    return positions - settings.max_tokens - 1  # <sop>


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout; a model that was in training goes back to it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True, slots=True)
class Predictor:
    """A model with all that its predictions depend on; arguments as of `predict`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reader: SampleReader
    settings: Settings
    batch_size: int
    normalization: Normalization

    def predict(self, samples: Sequence[Sample], on_progress: Callable[[int], None]) -> list[Prediction]:
        """The predictions in the order of the samples; those of like length are made together."""
        questions = [self.reader.read(sample) for sample in samples]
        _tell_cuts(questions, self.reader.max_source)
        kind = self.reader.kind
        if kind in CHOICES:
            for sample in samples:
                if not sample.answers:
                    raise locate(GmaskError("the sample has no candidates to choose from"), sample)
        seeds = make_seeds(self.settings, len(samples))
        writes = kind not in LABELLED
        size = max(1, self.batch_size // max(self.settings.beams, self.settings.n)) if writes else self.batch_size
        order = sorted(range(len(questions)), key=lambda index: len(questions[index].context.ids))
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            asked = [questions[index] for index in batch]
            if kind in CHOICES:
                predictions = self._choose(asked)
            elif kind == "classification":
                predictions = self._classify(asked)
            else:
                predictions = self._write(asked, [seeds[index] for index in batch])
            found.update(zip(batch, predictions, strict=True))
            on_progress(len(batch))
        return [found[index] for index in range(len(samples))]

    def _choose(self, questions: Sequence[ReadSample]) -> list[Prediction]:
        asked = [(question.context, question.answers) for question in questions]
        answers = score_answers(self.model, asked, self.reader.special, batch_size=self.batch_size)
        if self.normalization == "unconditional":
            bare = [(self.reader.read_bare(question), question.answers) for question in questions]
            baselines = score_shared(self.model, bare, self.reader.special, batch_size=self.batch_size)
        else:
            baselines = [[0.0] * len(question.answers) for question in questions]
        return list(map(self._rank, answers, baselines))

    def _rank(self, answers: Sequence[Answer], baselines: Sequence[float]) -> Prediction:
        scores = [sum(answer.logprobs) - baseline for answer, baseline in zip(answers, baselines, strict=True)]
        if self.normalization == "mean":
            scores = [score / len(answer.ids) for score, answer in zip(scores, answers, strict=True)]
        return _best(scores)

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

    def _write(self, questions: Sequence[ReadSample], seeds: Sequence[int]) -> list[Prediction]:
        special = self.reader.special
        rules = make_rules(
            self.settings,
            self.tokenizer,
            ends=(special.eop, special.eos),
            forbidden=self.reader.format.forbidden_ids,
            vocabulary_size=self.model.config.vocab_size,
        )
        contexts = [question.context for question in questions]
        found = find_answers(self.model, contexts, self.settings, rules, special=special, seeds=seeds)
        return [self._read(question, best[0].done) for question, best in zip(questions, found, strict=True)]

    def _read(self, question: ReadSample, answers: Sequence[Answer]) -> Prediction:
        texts = [self._spell(question, blank, answer) for blank, answer in enumerate(answers)]
        return Prediction(texts=tuple(texts), scores=tuple(answer.logprob for answer in answers))

    def _spell(self, question: ReadSample, blank: int, answer: Answer) -> str:
        """An answer as it stands in its text, or as a conversation shows it."""
        text = "".join(token_texts(answer.ids, self.tokenizer))
        if answer.finish == "stop":
            text = cut_at_stop(text, self.settings.stop)
        if self.reader.kind == "chat":
            return self.reader.format.clean(text)
        return text.strip() if question.blanked is None else question.blanked.fit_answer(text, blank)


def _best(scores: Sequence[float]) -> Prediction:
    """The first of the highest scores."""
    label = max(range(len(scores)), key=lambda index: (scores[index], -index))
    return Prediction(label=label, scores=tuple(scores))


def _tell_cuts(questions: Sequence[ReadSample], max_source: int) -> None:
    """Warns of texts that are not read as a whole."""
    cut = sum(question.tokens_cut > 0 for question in questions)
    left_out = sum(question.rounds_left_out for question in questions)
    if cut or left_out:
        warnings.warn(
            f"of {len(questions)} samples {cut} were cut to {max_source} tokens, and {left_out} earlier rounds of "
            "conversations were left out",
            stacklevel=4,
        )
