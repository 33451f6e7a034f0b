"""`gmask evaluate` without a task: losses on held-out texts, and blanks filled beside models that only count."""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from gmask.config import read_yaml
from gmask.errors import GmaskError
from gmask.evaluation.counting import (
    Estimate,
    NgramModel,
    estimate_mean,
    exact_match,
    fill_with_trigrams,
    fill_with_unigrams,
    overlap_f1,
    train_ngrams,
)
from gmask.evaluation.model_card import Card, render_card
from gmask.evaluation.report import print_evaluation
from gmask.files import read_json_lines, write_json, write_text
from gmask.generation.infill import infill
from gmask.infilling.blanks import NOT_SCORED, BlankTokens, InfillingExample, IntArray
from gmask.infilling.collator import collate
from gmask.infilling.objectives import OBJECTIVES, Mixture, Objective
from gmask.models.glm import GLMForConditionalGeneration
from gmask.recipes.pretraining import Recipe, load_recipe, make_mixture
from gmask.tasks.heldout import LANGUAGES, HeldOutBlank, Language, choose_sentences, hide_span
from gmask.tasks.records import Source, find_files, read_texts


def run(
    model: str = "bundled",
    *,
    recipe: str,
    data_root: str | None = None,
    out: str | None = None,
    card: str | None = None,
    hardware: str | None = None,
    sentences: int = 300,
    loss_tokens: int = 8192,
    seed: int = 0,
    device: str | None = None,
    tables: bool = True,
) -> Path:
    """Measure a model by the recipe that it was trained with and return the path of evaluation.json.

    data_root: the corpus folder, if it is not the recipe's own.
    out: the folder for evaluation.json, which holds every number; the model's own if not given.
    card: write the bundled model's card to this path as well. Its numbers come from evaluation.json, the config, the
        recipe and the model folder's metrics.jsonl; origins, licences and credits from RECIPE-sources.yaml beside the
        recipe, a list of `{name, origin, licence, credit}`.
    hardware: what the model was trained on, in words, for the card.
    sentences, loss_tokens, seed: as in `evaluate_infilling`.
    tables: print what was found.

    Raises `GmaskError`: a file that is missing or cannot be read.
    """
    console = Console(stderr=not tables)
    folder = find_folder(model)
    plan = load_recipe(recipe, [] if data_root is None else [f"data.root={json.dumps(data_root)}"])
    metrics = _read_metrics(folder / "metrics.jsonl")
    if card and not metrics:
        raise GmaskError(f"{folder}: no metrics.jsonl of its training there, which the model card needs")
    origins = _read_origins(recipe) if card else {}
    network, tokenizer = load(folder, dtype="float32", device=device, model_class=GLMForConditionalGeneration)
    tokens_seen = metrics[-1]["tokens"] if metrics else None
    settings = {"sentences": sentences, "loss_tokens": loss_tokens, "seed": seed}
    with console.status("evaluating") as status:
        evaluation = _measure(network, tokenizer, plan, settings, tokens_seen, status.update)
    if tables:
        print_evaluation(evaluation, console)
    written = Path(out or folder) / "evaluation.json"
    write_json(written, evaluation)
    if card:
        facts = Card(
            evaluation=evaluation,
            metrics=metrics,
            config=network.config.to_dict(),
            recipe=plan.to_dict(),
            recipe_path=recipe,
            origins=origins,
            hardware=hardware,
        )
        write_text(card, render_card(facts))
    return written


def _measure(
    network: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    plan: Recipe,
    settings: dict[str, int],
    tokens_seen: int | None,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """What evaluation.json holds; arguments as of `evaluate_infilling`."""
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


def _read_origins(recipe: str) -> dict[str, Any]:
    """Origin, licence and credit of each source, from the table beside the recipe."""
    table = Path(recipe)
    return {entry["name"]: entry for entry in read_yaml(table.with_name(f"{table.stem}-sources.yaml"))}


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [record for _, record in read_json_lines(path)]


ALTERNATIVES = 8  # among which the model that is told the length finds an answer that has it
MAX_ANSWER_TOKENS = 24  # no hidden span has as many; an answer cut there is wrong
CANDIDATES = 10  # the true answer among them
ALL_SPANS = "all"


@dataclass(frozen=True, slots=True)
class Score:
    """How one system does on the blanks of one kind."""

    exact: Estimate  # share of answers equal to the hidden text
    f1: Estimate  # of words or characters
    choice: Estimate  # share of blanks where the hidden text wins among `CANDIDATES`


@dataclass(frozen=True, slots=True)
class Comparison:
    """All systems on the same blanks."""

    n_blanks: int
    scores: Mapping[str, Score]  # "model", "model_told_length", "trigram", "unigram"
    leads: Mapping[str, Estimate]  # exact match of either model less that of the trigrams, sentence by sentence


@dataclass(frozen=True, slots=True)
class FilledBlank:
    """One blank of the sample and what became of it."""

    source: str
    text: str
    answer: str
    model: str
    trigram: str


@dataclass(frozen=True, slots=True)
class LanguageReport:
    n_sentences: int
    counted_symbols: int  # of training text, by the n-gram models
    vocabulary: int  # of the n-gram models
    comparisons: Mapping[str, Comparison]  # by span length, and "all"
    first_blanks: Sequence[FilledBlank]  # the first of each length: not selected


@dataclass(frozen=True, slots=True)
class InfillingReport:
    losses: Mapping[str, Mapping[str, Loss]]  # by source and objective
    languages: Mapping[str, LanguageReport]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One system's answers to blanks [S], and whether it chose the hidden text."""

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
    """Losses of every source and objective, and blanks in held-out sentences filled by the model and by counting.

    tokens_seen: by the model in training; the n-gram models count as many of each source (each text once at most).
        None counts every training text once.
    sentences: of each language; one blank of each length is hidden in each of them.
    loss_tokens: held-out tokens of each source and objective.
    longest: tokens of a piece whose loss is measured; the model should have been trained on pieces as long.

    Raises `GmaskError` where a text file is missing or no held-out sentence can be used.
    """
    heldout = {s.name: list(read_texts(find_files(s.validation))) for s in sources if s.validation}
    encoded = {name: encode_texts(tokenizer, texts) for name, texts in heldout.items()}
    on_progress("held-out losses")
    losses = measure_losses(model, tokenizer, encoded, mixture, max_tokens=loss_tokens, seed=seed, longest=longest)
    on_progress("reading training texts for the n-gram models")
    weights = {source.name: source.weight or 1.0 for source in sources}
    training = sample_training_texts(sources, encoded, tokens_seen, rng=np.random.default_rng([seed, 1]))
    reports = {}
    for number, language in enumerate(LANGUAGES):
        rng = np.random.default_rng([seed, 2, number])
        chosen = choose_sentences(heldout, weights, language, sentences, rng=rng)
        on_progress(f"counting {language.name} n-grams")
        ngrams = train_ngrams(training, language)
        on_progress(f"filling {language.name} blanks")
        reports[language.name] = _compare(model, tokenizer, ngrams, chosen, language, rng=rng)
    return InfillingReport(losses, reports)


def sample_training_texts(
    sources: Sequence[Source],
    heldout: Mapping[str, HeldOutTokens],
    tokens_seen: int | None,
    *,
    rng: np.random.Generator,
) -> list[str]:
    """Random documents of each source: its weight's share of `tokens_seen`, by the characters per token of its
    held-out texts, or all documents where there are fewer, no share is given or there is no held-out text."""
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
    language: Language,
    *,
    rng: np.random.Generator,
) -> LanguageReport:
    comparisons: dict[str, Comparison] = {}
    tables: list[dict[str, npt.NDArray[np.float64]]] = []  # of each length: system -> [3, S]
    shown: list[FilledBlank] = []
    for span, size in language.spans.items():
        blanks = [hide_span(text, language, size, source=source, rng=rng) for source, text in chosen]
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
        tables.append({name: score_answers(blanks, o.answers, o.chosen, language) for name, o in outcomes.items()})
        comparisons[span] = _summarise(tables[-1], len(blanks), rng=rng)
        answers = zip(blanks, outcomes["model"].answers, outcomes["trigram"].answers, strict=True)
        shown += [FilledBlank(b.source, b.text, b.answer, ours, theirs) for b, ours, theirs in list(answers)[:6]]
    together = {name: np.mean([table[name] for table in tables], axis=0) for name in tables[0]}
    comparisons[ALL_SPANS] = _summarise(together, len(tables) * len(chosen), rng=rng)
    return LanguageReport(len(chosen), len(ngrams.ids), len(ngrams.symbols), comparisons, shown)


def draw_candidates(blanks: Sequence[HeldOutBlank], *, rng: np.random.Generator) -> list[list[str]]:
    """For each blank its own answer and, of those hidden in the other sentences, `CANDIDATES - 1` different ones
    with as many words or characters (fewer where there are not as many). The own answer stands first."""
    candidates = []
    for blank in blanks:
        others = sorted({b.answer for b in blanks if b.n_units == blank.n_units} - {blank.answer})
        drawn = rng.permutation(len(others))[: CANDIDATES - 1]
        candidates.append([blank.answer, *(others[index] for index in drawn)])
    return candidates


def score_answers(
    blanks: Sequence[HeldOutBlank], answers: Sequence[str], chosen: npt.NDArray[np.bool_], language: Language
) -> npt.NDArray[np.float64]:
    """[3, S]: exact match, F1 and choice of each blank."""
    units = language.unit.findall
    exact = [float(exact_match(answer, blank.answer)) for blank, answer in zip(blanks, answers, strict=True)]
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
    """The most probable token each time, until the model ends the answer; cut answers count as empty."""
    filled = infill(model, tokenizer, [blank.text for blank in blanks], max_tokens=MAX_ANSWER_TOKENS)
    return [result.blanks[0].text if result.blanks[0].finished else "" for result in filled]


def fill_to_length(
    model: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    blanks: Sequence[HeldOutBlank],
    language: Language,
) -> list[str]:
    """The best of `ALTERNATIVES` answers that has the hidden text's number of words or characters, else the best."""
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
    """[S]: is the hidden text the most probable of the candidates?"""
    best = []
    for blank, texts in zip(blanks, candidates, strict=True):
        choices = infill(model, tokenizer, blank.text, choices=texts).choices
        assert choices is not None
        best.append(choices.combinations[0].texts[0] == blank.answer)
    return np.array(best)


def _choose(
    blanks: Sequence[HeldOutBlank], candidates: Sequence[Sequence[str]], score: Callable[[HeldOutBlank, str], float]
) -> npt.NDArray[np.bool_]:
    """[S]: is the hidden text, which stands first, scored above all other candidates? A tie is lost."""
    scores = [[score(blank, text) for text in texts] for blank, texts in zip(blanks, candidates, strict=True)]
    return np.array([own > max(others, default=-np.inf) for own, *others in scores])


def _trigram_score(ngrams: NgramModel, blank: HeldOutBlank, answer: str, language: Language) -> float:
    find = language.symbol.findall
    return ngrams.score(find(blank.left), find(answer), find(blank.right))


BATCH = 8  # examples of one forward pass
MARGIN = 4  # positions kept free: hiding moves places on by two at most


@dataclass(frozen=True, slots=True)
class Loss:
    """Cross-entropy of the hidden tokens, end tokens included."""

    nats_per_token: float
    bits_per_character: float  # of the hidden text
    tokens: int  # labelled


@dataclass(frozen=True, slots=True)
class HeldOutTokens:
    """The documents of one source as ids [L] without `[CLS]` and end-of-text, and their characters."""

    documents: Sequence[IntArray]
    characters: int

    @property
    def characters_per_token(self) -> float:
        return self.characters / sum(map(len, self.documents))


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> HeldOutTokens:
    """Special tokens spelt out in a text are text here."""
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
) -> dict[str, dict[str, Loss]]:
    """The loss of every source and objective, on pieces and blanks that depend on nothing but `seed`.

    longest: tokens of a piece; as many as the model has positions for, if not given.
    max_tokens: of each source, from its first documents. Objectives without a share in the mixture are left out.
    """
    objectives = [objective for objective in OBJECTIVES if getattr(mixture, objective) > 0]
    limit = min(longest or sys.maxsize, model.config.max_position_embeddings - MARGIN)
    losses: dict[str, dict[str, Loss]] = {}
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
) -> Loss | None:
    """None where nothing can be hidden in any piece."""
    drawn = [mixture.sample(piece, rng, objective) for piece in pieces]
    examples = sorted((example for example in drawn if example is not None), key=lambda e: len(e.input_ids))
    if not examples:
        return None
    nats, tokens = 0.0, 0
    for start in range(0, len(examples), BATCH):
        batch = collate([[e] for e in examples[start : start + BATCH]], row_length=None, pad_id=mixture.special.pad)
        scores = model.token_losses(**{key: tensor.to(model.device) for key, tensor in batch.items()})
        nats += float(scores.double().sum())
        tokens += len(scores)
    characters = sum(_count_characters(example, tokenizer) for example in examples)
    return Loss(nats / tokens, nats / math.log(2) / max(characters, 1), tokens)


def _count_characters(example: InfillingExample, tokenizer: PreTrainedTokenizerBase) -> int:
    hidden = example.labels[example.labels != NOT_SCORED]
    return len(tokenizer.decode(hidden.tolist(), skip_special_tokens=True))


def _cut_pieces(
    documents: Sequence[IntArray], special: BlankTokens, *, longest: int, max_tokens: int
) -> Iterator[IntArray]:
    """`[CLS] document <eos>`, cut every `longest` tokens, until `max_tokens` are out."""
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
