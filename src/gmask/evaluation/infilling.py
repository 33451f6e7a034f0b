"""How well a model fills blanks in held-out texts: `gmask evaluate` without a task.

The losses of each source and objective are measured, and sentences with one hidden span each are filled, by the model
and by n-gram models.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gmask.checkpoints.load import find_folder, load
from gmask.evaluation.ngrams import NgramModel, fill_with_trigrams, fill_with_unigrams, train_ngrams
from gmask.evaluation.report import print_evaluation
from gmask.files import read_json_lines, write_json
from gmask.generation.infill import infill
from gmask.generation.padding import batches_by_length
from gmask.generation.score import score
from gmask.infilling.blanks import NOT_SCORED, BlankTokens, InfillingExample, IntArray
from gmask.infilling.collator import collate
from gmask.infilling.objectives import OBJECTIVES, Mixture, Objective
from gmask.models.glm import GLMForConditionalGeneration
from gmask.recipes.pretraining import PretrainingRecipe, load_recipe, make_mixture
from gmask.tasks.heldout import HELD_OUT_LANGUAGES, HeldOutBlank, LanguageRules, draw_sentences, hide_span
from gmask.tasks.metrics import is_exact_match, overlap_f1
from gmask.tasks.records import Source, find_files, read_texts
from gmask.tasks.tally import interval

ALTERNATIVES = 8  # answers among which one of the hidden text's length is looked for
MAX_ANSWER_TOKENS = 24  # no hidden span has as many; an answer that is cut there is wrong
CANDIDATES = 10  # texts that a blank is chosen from, the hidden one among them
FIRST_BLANKS = 6  # blanks of each length that the report shows
ALL_SPANS = "all"
EXAMPLES_PER_PASS = 8  # of a forward pass, where losses are measured
SPARE_POSITIONS = 4  # hiding moves positions on by two at most
RESAMPLES = 2_000  # of the bootstrap


def evaluate_held_out(
    model: str = "bundled",
    *,
    recipe: str,
    data_root: str | None = None,
    out: str | None = None,
    sentences: int = 300,
    loss_tokens: int = 8192,
    seed: int = 0,
    device: str | None = None,
    tables: bool = True,
) -> Path:
    """Measures a model on the held-out texts of the recipe that it was trained by.

    Args:
        model: a folder, the name of a published model, or ``"bundled"``.
        data_root: the corpus folder, if it is not the recipe's own.
        out: the folder for ``evaluation.json``, which holds every number; by default the model's own.
        sentences, loss_tokens, seed: as of `evaluate_infilling`.
        tables: print what was found.

    Returns:
        The path of ``evaluation.json``.

    Raises:
        GmaskError: a file that is missing or cannot be read.
    """
    console = Console(stderr=not tables)
    folder = find_folder(model)
    plan = load_recipe(recipe, [] if data_root is None else [f"data.root={json.dumps(data_root)}"])
    tokens_seen = _read_tokens_seen(folder / "metrics.jsonl")
    network, tokenizer = load(folder, dtype="float32", device=device, model_class=GLMForConditionalGeneration)
    settings = {"sentences": sentences, "loss_tokens": loss_tokens, "seed": seed}
    with console.status("evaluating") as status:
        evaluation = _measure(network, tokenizer, plan, settings, tokens_seen, status.update)
    if tables:
        print_evaluation(evaluation, console)
    written = Path(out or folder) / "evaluation.json"
    write_json(written, evaluation)
    return written


def _read_tokens_seen(path: Path) -> int | None:
    """The tokens of a model's training by its metrics.jsonl; None where there is no such file."""
    records = [record for _, record in read_json_lines(path)] if path.is_file() else []
    return records[-1]["tokens"] if records else None


def _measure(
    network: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    plan: PretrainingRecipe,
    settings: dict[str, int],
    tokens_seen: int | None,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """The contents of evaluation.json; arguments as of `evaluate_infilling`."""
    report = evaluate_infilling(
        network,
        tokenizer,
        plan.data.resolved_sources,
        make_mixture(tokenizer.backend_tokenizer, plan.objective),
        tokens_seen=tokens_seen,
        longest=plan.data.max_piece or plan.data.row_length,
        on_progress=on_progress,
        **settings,
    )
    return {
        "settings": {**settings, "dtype": "float32"},
        "versions": {name: version(name) for name in ("gmask", "torch", "transformers", "tokenizers")},
        "parameters": network.num_parameters(),
        "ngram_tokens": tokens_seen,
        **asdict(report),
    }


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Cross-entropy of the hidden tokens, end tokens included."""

    nats_per_token: float
    bits_per_character: float  # of the hidden text
    tokens: int  # labelled


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of one system, such as the model or the trigrams, on the blanks of one length."""

    exact: Estimate  # share of answers equal to the hidden text
    f1: Estimate  # of words or characters
    choice: Estimate  # share of blanks where the hidden text wins among `CANDIDATES`


@dataclass(frozen=True, slots=True)
class Comparison:
    """The scores of all systems on the same blanks."""

    n_blanks: int
    scores: Mapping[str, Score]  # "model", "model_told_length", "trigram", "unigram"
    leads: Mapping[str, Estimate]  # exact match of "model" and "model_told_length" less the trigrams', by sentence


@dataclass(frozen=True, slots=True)
class ContextCost:
    """Nats of the hidden texts: in their sentences, in the same with their words or characters shuffled, the rise."""

    true: Estimate
    shuffled: Estimate
    cost: Estimate  # by sentence; near 0 for a model that does not read the context


@dataclass(frozen=True, slots=True)
class FilledBlank:
    """A blank with its answer, and the answers of the model and of the trigrams."""

    source: str
    text: str
    answer: str
    model: str
    trigram: str


@dataclass(frozen=True, slots=True)
class LanguageReport:
    """What was found in the sentences of one language."""

    n_sentences: int
    counted_symbols: int  # of training text, by the n-gram models
    vocabulary: int  # of the n-gram models
    comparisons: Mapping[str, Comparison]  # by span length, and "all"
    kinds: Mapping[str, Comparison]  # of blanks of the first length, by the sources' kinds of text
    context: ContextCost  # of blanks of the first length
    first_blanks: Sequence[FilledBlank]  # the first of each length: not selected


@dataclass(frozen=True, slots=True)
class InfillingReport:
    """What `evaluate_infilling` finds."""

    losses: Mapping[str, Mapping[str, HeldOutLoss]]  # by source and objective
    languages: Mapping[str, LanguageReport]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The answers of one system to S blanks, and ``chosen [S]``: whether it chose the hidden text of each."""

    answers: Sequence[str]
    chosen: npt.NDArray[np.bool_]


def evaluate_infilling(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    mixture: Mixture,
    *,
    tokens_seen: int | None = None,
    sentences: int = 300,
    loss_tokens: int = 8192,
    longest: int | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda message: None,
) -> InfillingReport:
    """Measures the losses of each source and objective, and the answers to blanks in held-out sentences.

    Args:
        tokens_seen: by the model in training; the n-gram models count as many of each source (each text once at most).
            None counts every training text once.
        sentences: of each language; one blank of each length is hidden in each of them.
        loss_tokens: held-out tokens of each source and objective.
        longest: tokens of a piece whose loss is measured; the model should have been trained on pieces as long.
        on_progress: called with a description of each step, before it begins.

    Raises:
        GmaskError: a text file is missing, or no held-out sentence can be used.
    """
    heldout = {s.name: list(read_texts(find_files(s.validation))) for s in sources if s.validation}
    encoded = {name: encode_texts(tokenizer, texts) for name, texts in heldout.items()}
    on_progress("held-out losses")
    losses = measure_losses(model, tokenizer, encoded, mixture, max_tokens=loss_tokens, seed=seed, longest=longest)
    on_progress("reading training texts for the n-gram models")
    weights = {source.name: source.weight or 1.0 for source in sources}
    kinds = {source.name: source.kind for source in sources}
    training = sample_training_texts(sources, encoded, tokens_seen, rng=np.random.default_rng([seed, 1]))
    reports = {}
    for number, language in enumerate(HELD_OUT_LANGUAGES):
        rng = np.random.default_rng([seed, 2, number])
        chosen = draw_sentences(heldout, weights, language, sentences, rng=rng)
        on_progress(f"counting {language.name} n-grams")
        ngrams = train_ngrams(training, language)
        on_progress(f"filling {language.name} blanks")
        reports[language.name] = _compare(model, tokenizer, ngrams, chosen, language, kinds, rng=rng)
    return InfillingReport(losses, reports)


def sample_training_texts(
    sources: Sequence[Source],
    heldout: Mapping[str, HeldOutTokens],
    tokens_seen: int | None,
    *,
    rng: np.random.Generator,
) -> list[str]:
    """Draws the documents that the n-gram models count.

    Each source gives its weight's share of ``tokens_seen``, with as many characters a token as its held-out texts. It
    gives all documents where they hold fewer, and where it has no weight or no held-out text.
    """
    weights = sum(source.weight or 0.0 for source in sources)
    chosen: list[str] = []
    for source in sources:
        texts = list(read_texts(find_files(source.train)))
        if tokens_seen is None or source.weight is None or source.name not in heldout:
            chosen += texts
            continue
        characters = tokens_seen * source.weight / weights * heldout[source.name].characters_per_token
        for index in rng.permutation(len(texts)):
            if characters <= 0:
                break
            chosen.append(texts[index])
            characters -= len(texts[index])
    return chosen


def _compare(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    ngrams: NgramModel,
    chosen: Sequence[tuple[str, str]],
    language: LanguageRules,
    kinds: Mapping[str, str | None],
    *,
    rng: np.random.Generator,
) -> LanguageReport:
    """Hides spans of each length in the chosen sentences, and compares how the systems fill them."""
    first: list[HeldOutBlank] = []
    comparisons: dict[str, Comparison] = {}
    tables: list[dict[str, npt.NDArray[np.float64]]] = []  # of each length: system -> [3, S]
    shown: list[FilledBlank] = []
    for span, size in language.spans.items():
        blanks = [hide_span(text, language, size, source=source, rng=rng) for source, text in chosen]
        first = first or blanks
        candidates = draw_candidates(blanks, rng=rng)
        chosen_by_model = _choose_with_model(model, tokenizer, blanks, candidates)
        outcomes = {
            "model": _Outcome(fill_greedily(model, tokenizer, blanks), chosen_by_model),
            "model_told_length": _Outcome(fill_to_length(model, tokenizer, blanks, language), chosen_by_model),
            "trigram": _Outcome(
                fill_with_trigrams(ngrams, blanks, language),
                _choose(blanks, candidates, lambda blank, text: _trigram_score(ngrams, blank, text, language)),
            ),
            "unigram": _Outcome(
                fill_with_unigrams(ngrams, blanks, language),
                _choose(blanks, candidates, lambda _, text: ngrams.unigram_score(language.symbol.findall(text))),
            ),
        }
        tables.append({name: score_fills(blanks, o.answers, o.chosen, language) for name, o in outcomes.items()})
        comparisons[span] = _summarise(tables[-1], len(blanks), rng=rng)
        answers = zip(blanks, outcomes["model"].answers, outcomes["trigram"].answers, strict=True)
        shown += [
            FilledBlank(b.source, b.text, b.answer, ours, theirs) for b, ours, theirs in list(answers)[:FIRST_BLANKS]
        ]
    together = {name: np.mean([table[name] for table in tables], axis=0) for name in tables[0]}
    comparisons[ALL_SPANS] = _summarise(together, len(tables) * len(chosen), rng=rng)
    return LanguageReport(
        n_sentences=len(chosen),
        counted_symbols=len(ngrams.ids),
        vocabulary=len(ngrams.symbols),
        comparisons=comparisons,
        kinds=_compare_kinds(tables[0], [kinds[source] for source, _ in chosen], rng=rng),
        context=measure_context(model, tokenizer, first, language, rng=rng),
        first_blanks=shown,
    )


def _compare_kinds(
    table: Mapping[str, npt.NDArray[np.float64]], kinds: Sequence[str | None], *, rng: np.random.Generator
) -> dict[str, Comparison]:
    """The comparison for each kind of text; ``table``: of each system ``[3, S]``."""
    compared = {}
    for kind in dict.fromkeys(name for name in kinds if name is not None):
        own = np.array([name == kind for name in kinds])
        compared[kind] = _summarise({name: rows[:, own] for name, rows in table.items()}, int(own.sum()), rng=rng)
    return compared


def measure_context(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    blanks: Sequence[HeldOutBlank],
    language: LanguageRules,
    *,
    rng: np.random.Generator,
) -> ContextCost:
    """How much less probable the hidden texts become when the words or characters around them change places."""
    true, shuffled = (
        np.array(
            [
                -scoring.answers[0].logprob
                for scoring in score(model, tokenizer, [b.text for b in asked], [[b.answer] for b in asked])
            ]
        )
        for asked in (blanks, [shuffle_context(blank, language, rng=rng) for blank in blanks])
    )
    return ContextCost(*(estimate_mean(nats, rng=rng) for nats in (true, shuffled, shuffled - true)))


def shuffle_context(blank: HeldOutBlank, language: LanguageRules, *, rng: np.random.Generator) -> HeldOutBlank:
    """The blank with the words or characters on both sides in random order; punctuation stays where it is."""
    units = language.unit.findall(blank.left) + language.unit.findall(blank.right)
    order = iter([units[index] for index in rng.permutation(len(units))])
    left, right = (language.unit.sub(lambda _: next(order), side) for side in (blank.left, blank.right))
    return replace(blank, left=left, right=right)


def draw_candidates(blanks: Sequence[HeldOutBlank], *, rng: np.random.Generator) -> list[list[str]]:
    """The candidates of each blank: its own answer first, then answers of other sentences, all different.

    There are `CANDIDATES`, all of as many words or characters, and fewer where there are not as many.
    """
    candidates = []
    for blank in blanks:
        others = sorted({b.answer for b in blanks if b.n_units == blank.n_units} - {blank.answer})
        drawn = rng.permutation(len(others))[: CANDIDATES - 1]
        candidates.append([blank.answer, *(others[index] for index in drawn)])
    return candidates


def score_fills(
    blanks: Sequence[HeldOutBlank], answers: Sequence[str], chosen: npt.NDArray[np.bool_], language: LanguageRules
) -> npt.NDArray[np.float64]:
    """Exact match, F1 and choice of each blank: ``[3, S]``."""
    units = language.unit.findall
    exact = [float(is_exact_match(answer, blank.answer)) for blank, answer in zip(blanks, answers, strict=True)]
    f1 = [overlap_f1(units(answer), units(blank.answer)) for blank, answer in zip(blanks, answers, strict=True)]
    return np.array([exact, f1, chosen.astype(np.float64)])


def _summarise(table: Mapping[str, npt.NDArray[np.float64]], n_blanks: int, *, rng: np.random.Generator) -> Comparison:
    scores = {name: Score(*(estimate_mean(row, rng=rng) for row in rows)) for name, rows in table.items()}
    leads = {
        name: estimate_mean(table[name][0] - table["trigram"][0], rng=rng) for name in ("model", "model_told_length")
    }
    return Comparison(n_blanks, scores, leads)


def fill_greedily(
    model: GLMForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, blanks: Sequence[HeldOutBlank]
) -> list[str]:
    """The greedy answer to each blank; empty where the model does not end it."""
    filled = infill(model, tokenizer, [blank.text for blank in blanks], max_tokens=MAX_ANSWER_TOKENS)
    return [result.blanks[0].text if result.blanks[0].finished else "" for result in filled]


def fill_to_length(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    blanks: Sequence[HeldOutBlank],
    language: LanguageRules,
) -> list[str]:
    """The best of `ALTERNATIVES` answers with as many words or characters as the hidden text, else the best of all."""
    texts = [blank.text for blank in blanks]
    answers = []
    filled = infill(model, tokenizer, texts, n=ALTERNATIVES, max_tokens=MAX_ANSWER_TOKENS, batch_size=64)
    for blank, result in zip(blanks, filled, strict=True):
        found = [other.blanks[0].text for other in (result, *result.alternatives) if other.blanks[0].finished]
        fitting = [text for text in found if len(language.unit.findall(text)) == blank.n_units]
        answers.append((*fitting, *found, "")[0])
    return answers


def _choose_with_model(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    blanks: Sequence[HeldOutBlank],
    candidates: Sequence[Sequence[str]],
) -> npt.NDArray[np.bool_]:
    """``[S]``: true where the hidden text is the most probable of the candidates."""
    best = []
    for blank, texts in zip(blanks, candidates, strict=True):
        choices = infill(model, tokenizer, blank.text, choices=texts).choices
        assert choices is not None
        best.append(choices.combinations[0].texts[0] == blank.answer)
    return np.array(best)


def _choose(
    blanks: Sequence[HeldOutBlank], candidates: Sequence[Sequence[str]], score: Callable[[HeldOutBlank, str], float]
) -> npt.NDArray[np.bool_]:
    """``[S]``: true where the hidden text, the first candidate, has a higher score than all others."""
    scores = [[score(blank, text) for text in texts] for blank, texts in zip(blanks, candidates, strict=True)]
    return np.array([own > max(others, default=-np.inf) for own, *others in scores])


def _trigram_score(ngrams: NgramModel, blank: HeldOutBlank, answer: str, language: LanguageRules) -> float:
    find = language.symbol.findall
    return ngrams.score(find(blank.left), find(answer), find(blank.right))


def estimate_mean(values: npt.ArrayLike, *, rng: np.random.Generator, sizes: npt.ArrayLike | None = None) -> Estimate:
    """The mean of N independent scores, with the percentile bootstrap over `RESAMPLES` resamples.

    ``sizes``: with it each value is the sum of so many scores, which are drawn together; the mean is that of them all.
    """
    sums = np.asarray(values, np.float64)
    counts = np.ones(len(sums)) if sizes is None else np.asarray(sizes, np.float64)
    drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = interval(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return Estimate(float(sums.sum() / counts.sum()), low, high)


@dataclass(frozen=True, slots=True)
class HeldOutTokens:
    """The documents of one source, each as ids ``[L]`` without ``[CLS]`` and end of text, and their characters."""

    documents: Sequence[IntArray]
    characters: int

    @property
    def characters_per_token(self) -> float:
        return self.characters / sum(map(len, self.documents))


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> HeldOutTokens:
    """Encodes the texts of a source. A special token that is spelt out in a text is read as text."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
    documents = [np.array(encoding.ids, np.int64) for encoding in encodings]
    return HeldOutTokens(documents, sum(map(len, texts)))


@torch.no_grad()
def measure_losses(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Mapping[str, HeldOutTokens],
    mixture: Mixture,
    *,
    max_tokens: int,
    seed: int,
    longest: int | None = None,
) -> dict[str, dict[str, HeldOutLoss]]:
    """The loss of each source and objective; objectives without a share in the mixture are left out.

    Pieces and blanks depend on ``seed`` alone.

    Args:
        max_tokens: of each source, from its first documents.
        longest: tokens of a piece; by default as many as the model has positions for.
    """
    objectives = [objective for objective in OBJECTIVES if getattr(mixture, objective) > 0]
    limit = min(longest or sys.maxsize, model.config.max_position_embeddings - SPARE_POSITIONS)
    losses: dict[str, dict[str, HeldOutLoss]] = {}
    for name, tokens in heldout.items():
        pieces = list(_cut_pieces(tokens.documents, mixture.special, longest=limit, max_tokens=max_tokens))
        losses[name] = {}
        for number, objective in enumerate(objectives):
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
            loss = _measure_loss(model, tokenizer, pieces, mixture, objective, rng=rng)
            if loss is not None:
                losses[name][objective] = loss
    return losses


def _measure_loss(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[IntArray],
    mixture: Mixture,
    objective: Objective,
    *,
    rng: np.random.Generator,
) -> HeldOutLoss | None:
    """The loss of one objective on pieces; None where nothing can be hidden in any of them."""
    drawn = [mixture.sample(piece, rng, objective) for piece in pieces]
    examples = [example for example in drawn if example is not None]
    if not examples:
        return None
    nats, tokens = 0.0, 0
    for indices in batches_by_length([len(example.input_ids) for example in examples], EXAMPLES_PER_PASS):
        batch = collate([[examples[index]] for index in indices], row_length=None, pad_id=mixture.special.pad)
        scores = model.token_losses(**{key: tensor.to(model.device) for key, tensor in batch.items()})
        nats += float(scores.double().sum())
        tokens += len(scores)
    characters = sum(_count_characters(example, tokenizer) for example in examples)
    return HeldOutLoss(nats / tokens, nats / math.log(2) / max(characters, 1), tokens)


def _count_characters(example: InfillingExample, tokenizer: PreTrainedTokenizerBase) -> int:
    hidden = example.labels[example.labels != NOT_SCORED]
    return len(tokenizer.decode(hidden.tolist(), skip_special_tokens=True))


def _cut_pieces(
    documents: Sequence[IntArray], special: BlankTokens, *, longest: int, max_tokens: int
) -> Iterator[IntArray]:
    """Cuts ``[CLS] document <eos>`` every ``longest`` tokens, and ends after ``max_tokens``."""
    left = max_tokens
    for document in documents:
        whole = np.concatenate(([special.cls], document, [special.eos]))
        for start in range(0, len(whole), longest):
            if left <= 0:
                return
            piece = whole[start : start + min(longest, left)]
            left -= len(piece)
            if len(piece) > 2:  # the shortest text that every objective can hide something in
                yield piece
