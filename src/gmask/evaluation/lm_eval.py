"""lm-eval's tasks on our models, in process: ``python -m gmask.evaluation.lm_eval --model gmask --tasks ...``.

An import of this module adds the model ``gmask`` to lm-eval, whose command line runs when the module is run.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 - the other models, which lm-eval registers only while there is none
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.load import load
from gmask.errors import GmaskError, nearest
from gmask.generation.encoding import encode_plain
from gmask.generation.padding import batches_by_length
from gmask.generation.perplexity import DocumentScorer, evaluating
from gmask.generation.predict import Predictor, ReadSample, make_predictor, measure_length, warn_of_cuts
from gmask.generation.score import Continuation, score_answer_ids, score_continuations
from gmask.generation.settings import Sampling, make_sampling
from gmask.models.chatglm import ChatGLMConfig
from gmask.tasks.records import BlankToken, Direction, LikelihoodSettings, Sample, TaskKind
from gmask.tasks.templates import count_blanks

DEFAULT_ROWS = 16
DEFAULT_TOKENS = 256
"""Of a written text, where a task does not say: as of lm-eval's own models."""

SETTING_NAMES = {
    "until": "stop",
    "max_gen_toks": "max_tokens",
    "max_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "min_tokens": "min_tokens",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "no_repeat_ngram": "no_repeat_ngram",
    **{name: name for name in ("temperature", "top_k", "top_p", "num_beams", "length_penalty", "seed")},
}
"""lm-eval's and transformers' names of our settings."""


class GmaskLM(LM):
    """A GLM or ChatGLM as a model of lm-eval.

    A context is a plain text, and what follows it is the answer to a blank behind it. A context with one blank of its
    own is read as by `gmask.infill`: the answer stands there. So tasks that `export_tasks` writes can ask for words in
    the middle of a text.

    Args:
        pretrained: a folder, the name of a published model, or ``"bundled"``; or a model, with its ``tokenizer``.
        adapter: a folder that was trained for the model.
        blank: the blank of given answers, and of the windows of `gmask.perplexity`.
        written_blank: the blank of a text that is written.
        direction: of given answers and windows: ``"left"``: the context is the first token, the rest is written.
        window, stride: of a text whose perplexity is taken, as of `gmask.perplexity`.
        batch_size: rows that run together. lm-eval's ``auto`` is 16.
        max_batch_size: is not used.

    Raises:
        GmaskError: no such model; a blank that it lacks; a window that does not fit.
    """

    tokenizer_name: str = ""  # lm-eval's cache of requests is by this name

    def __init__(
        self,
        pretrained: str | PreTrainedModel = "bundled",
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        adapter: str | None = None,
        blank: BlankToken = "[MASK]",
        written_blank: BlankToken = "[gMASK]",
        direction: Direction = "both",
        window: int | None = None,
        stride: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            self.tokenizer_name = pretrained
            self.model, self.tokenizer = load(pretrained, adapter=adapter, device=device)
        else:
            assert tokenizer is not None, "a model that is given comes with its tokenizer"
            self.tokenizer_name = type(pretrained).__name__
            self.model, self.tokenizer = pretrained, tokenizer
        self.blank, self.written_blank = blank, written_blank
        self.likelihood = LikelihoodSettings(direction=direction, window=window, stride=stride, blank=blank)
        self.rows = DEFAULT_ROWS if batch_size in (None, "auto") else int(batch_size or 0)
        # What does not fit is told before anything is measured
        self.documents = DocumentScorer(self.model, self.tokenizer, self.likelihood, self.rows)
        self.answers = self._predictor("multiple-choice" if direction == "both" else "likelihood")
        self.answers.reader.read_before_blank("", written_blank)

    def _predictor(self, kind: TaskKind, settings: Sampling | None = None) -> Predictor:
        return make_predictor(
            self.model,
            self.tokenizer,
            kind,
            settings=settings or Sampling(),
            batch_size=self.rows,
            likelihood=self.likelihood,
        )

    # What lm-eval asks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, answer) the log-probability of the answer, and whether each token is the most probable one.

        Answers to the same context share its keys and values.
        """
        places = defaultdict[str, list[int]](list)
        for index, request in enumerate(requests):
            places[request.args[0]].append(index)
        is_left = self.likelihood.direction == "left"
        asked = [[index] for index in range(len(requests))] if is_left else list(places.values())
        questions = [self._read(self.answers, requests[part[0]].args[0], self.blank,
                                [requests[index].args[1] for index in part]) for part in asked]  # fmt: skip
        warn_of_cuts(questions, self.answers.reader.max_source)

        def score(batch: list[int]) -> list[list[tuple[float, bool]]]:
            special, some = self.answers.reader.special, [questions[index] for index in batch]
            if is_left:
                continuations = [Continuation(one.context, one.answers[0], one.unscored) for one in some]
                answered = score_continuations(self.model, continuations, special, batch_size=self.rows)
                return [[(sum(one.logprobs), all(one.is_greedy))] for one in answered]
            pairs = [(one.context, one.answers) for one in some]
            scored = score_answer_ids(self.model, pairs, special, batch_size=self.rows)
            return [[(sum(one.logprobs), all(one.is_greedy)) for one in answers] for answers in scored]

        found: dict[int, tuple[float, bool]] = {}
        lengths = list(map(measure_length, questions))
        for number, answers in self._run(lengths, score, disable_tqdm):
            for index, answer in zip(asked[number], answers, strict=True):
                found[index] = answer
                self.cache_hook.add_partial("loglikelihood", requests[index].args, answer)
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each text its log-probability by the windows of `gmask.perplexity`; the first token is not scored."""
        texts = [encode_plain(self.tokenizer, request.args[0]) for request in requests]

        def score(batch: list[int]) -> list[float]:
            return [answer.logprob for answer in self.documents.score([texts[index] for index in batch])]

        found: dict[int, float] = {}
        for index, value in self._run(list(map(len, texts)), score, disable_tqdm):
            found[index] = value
            self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, value)
        return [found[index] for index in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings) the text that the model writes into the blank, as far as a stop text."""
        groups = defaultdict[str, list[int]](list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        found: dict[int, str] = {}
        for part in groups.values():
            for index, text in self._write(part, requests, disable_tqdm):
                found[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [found[index] for index in range(len(requests))]

    # How it is answered

    def _write(self, part: Sequence[int], requests: Sequence[Instance], is_quiet: bool) -> Iterator[tuple[int, str]]:
        """The texts of requests that share their settings, by index."""
        settings = self._read_settings(requests[part[0]].args[1])
        predictor = self._predictor("seq2seq", settings)
        questions = [self._read(predictor, requests[index].args[0], self.written_blank) for index in part]
        warn_of_cuts(questions, predictor.reader.max_source)
        seeds = [(settings.seed or 0) + index for index in part]  # repeats of a text have indices of their own

        def write(batch: list[int]) -> list[str]:
            answers = predictor.answer([questions[number] for number in batch], [seeds[number] for number in batch])
            return [answer.texts[0] for answer in answers]

        for number, text in self._run(list(map(measure_length, questions)), write, is_quiet):
            yield part[number], text

    def _read(self, predictor: Predictor, text: str, blank: BlankToken, answers: Sequence[str] = ()) -> ReadSample:
        if count_blanks(text) == 1:
            return predictor.reader.read(Sample(text=text, answers=tuple(answers)))
        return predictor.reader.read_before_blank(text, blank, answers)

    def _read_settings(self, given: Mapping[str, Any]) -> Sampling:
        """The settings of a task. Raises `GmaskError` for one that there is not."""
        values: dict[str, Any] = {"max_tokens": DEFAULT_TOKENS}
        draws = given.get("do_sample", float(given.get("temperature") or 0) > 0)
        for name, value in given.items():
            if name == "do_sample" or value is None:
                continue
            if name not in SETTING_NAMES:
                near = nearest(name, SETTING_NAMES)
                raise GmaskError(f"generation_kwargs: there is no setting {name!r}; the nearest is {near!r}")
            if draws or name not in ("temperature", "top_k", "top_p"):
                values[SETTING_NAMES[name]] = value
        if draws:
            values.setdefault("temperature", 1.0)
        positions: int = self.model.config.max_position_embeddings
        shared = isinstance(self.model.config, ChatGLMConfig)  # the text has to fit in, too
        values["max_tokens"] = min(values["max_tokens"], positions // 2 if shared else positions)
        return make_sampling(values)

    def _run(
        self, lengths: Sequence[int], answer: Callable[[list[int]], Sequence[Any]], is_quiet: bool
    ) -> Iterator[tuple[int, Any]]:
        """Each index with its answer. Items of similar length run together, the longest last."""
        with evaluating(self.model), tqdm(total=len(lengths), disable=is_quiet, desc="gmask") as bar:
            for batch in batches_by_length(lengths, self.rows):
                yield from zip(batch, answer(batch), strict=True)
                bar.update(len(batch))


if "gmask" not in model_registry:
    model_registry.register("gmask", target="gmask.evaluation.lm_eval:GmaskLM")

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
