"""Metrics by name, most of them in per cent, and tables of results.

Chinese is compared as the evaluation of ChatGLM-6B's P-tuning does: ROUGE over the words that jieba finds, BLEU-4 over
characters. English ROUGE is that of GLM's evaluation, without its clean-up of the tokens of particular data sets.

Sources: ``ptuning/main.py`` of THUDM/ChatGLM-6B, ``tasks/seq2seq/evaluate.py`` of THUDM/GLM.
Sources: ``evaluate-v1.1.py`` of SQuAD, ``evaluate.py`` of ReCoRD, ``cmrc2018_evaluate.py`` (version 5) of CMRC 2018.
"""

import html
import importlib
import math
import re
import string
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import zip_longest
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gmask.errors import GmaskError, nearest
from gmask.tasks.records import LABELLED, MEASURED, Prediction, Sample, TaskKind
from gmask.tasks.templates import BLANK

NOTHING_CHOSEN = "a text was written and nothing chosen: take exact-match, rouge-l or bleu-4"
NOTHING_WRITTEN = "a class was chosen and no text: take accuracy, f1 or macro-f1"
NOTHING_CHOSEN_OR_WRITTEN = "the right answer was scored, nothing chosen or written: take accuracy, perplexity or nats"
NOTHING_MEASURED = "the tokens of the right answer were not scored: take a task of the kind likelihood"
"""Why a metric does not fit."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The index that was chosen and the right one, of candidates or classes; samples of one question share a group."""

    chosen: int
    label: int
    group: str | None = None


Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ChoiceCounts:
    """How often each pair of a chosen and a right index occurs. Shape letters: P pairs.

    ``count`` may have more dimensions in front, as for the resamples of a bootstrap; then so have the metrics.
    """

    chosen: Integers  # [P]
    label: Integers  # [P]
    count: Floats  # [..., P]


ChoiceMetric: TypeAlias = Callable[[ChoiceCounts], Floats]  # 0 to 1
MetricLanguage = Literal["en", "zh"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A text that a model gave, and the texts that count as right, one or more."""

    text: str
    references: tuple[str, ...]


PairMetrics: TypeAlias = Callable[[Pair, MetricLanguage], Mapping[str, float]]  # by name, 0 to 1


def score_predictions(
    task_metrics: Sequence[str],
    predictions: Sequence[Prediction],
    samples: Sequence[Sample],
    *,
    language: MetricLanguage | None = None,
) -> dict[str, float]:
    """Scores predictions by metrics, in per cent but for those of `NOT_PER_CENT`.

    - ``accuracy``; ``f1`` of class 1 among two; ``macro-f1``, the mean over the classes that occur. Of given answers
      accuracy is the share whose tokens are all the most probable ones.
    - ``macro-accuracy``: the mean over the groups of their accuracies (C-Eval's and MMLU's subjects); ``group-em``, the
      groups all of whose samples are right (CMRC 2019's passages).
    - ``perplexity`` of a token of given answers, ``word-perplexity`` of the words of documents; ``nats``, minus the
      log-probability of an answer, the mean over the samples.
    - ``multirc-f1a``, F1 over all answers, and ``multirc-em``, the questions whose answers are all judged right;
      ``record-f1`` and ``record-em``: SuperGLUE (Wang et al. 2019, arXiv:1905.00537).
    - ``squad-f1`` and ``squad-em``: as SQuAD, and in Chinese as CMRC 2018.
    - ``exact-match``: the same text but for the number of spaces; ``prefix-match``: a text that begins with the right
      one, such as "B. Paris" with "B".
    - ``rouge-1``, ``rouge-2``, ``rouge-l``, ``bleu-4``: the mean over the texts; ``sacrebleu``: of all together.
    - ``infill-bleu``: BLEU of the texts with their blanks filled, all together, over what spaces separate.

    A text is compared with the sample's references, or with its right answer, blank by blank.

    Args:
        task_metrics: the names of metrics.
        predictions: one for each sample.
        language: of the right texts; by default what `find_language` says of each.

    Raises:
        GmaskError: an unknown metric or language, a metric that does not fit the task, a sample without a known answer
            (its file and line are named), or a library that is not installed.
    """
    assert len(predictions) == len(samples), f"{len(predictions)} predictions of {len(samples)} samples"
    for name in task_metrics:
        check_metric(name)
    if language not in (None, *get_args(MetricLanguage)):
        raise GmaskError(f"the language {language!r} is not known: {' or '.join(get_args(MetricLanguage))}")
    if not samples:
        raise GmaskError("there are no samples to measure")
    scores = dict[str, float]()
    if any(name in CHOICE_METRICS for name in task_metrics):
        choices = [read_choice(*answered) for answered in zip(predictions, samples, strict=True)]
        counts = count_choices(choices)
        scores |= {name: float(COUNT_METRICS[name](counts)) for name in task_metrics if name in COUNT_METRICS}
        scores |= {name: GROUP_METRICS[name](choices) for name in task_metrics if name in GROUP_METRICS}
    for name in task_metrics:
        if name in LIKELIHOOD_METRICS:
            scores[name] = LIKELIHOOD_METRICS[name](predictions, samples)
        elif name == "infill-bleu":
            scores[name] = score_filled_texts(predictions, samples)
    if any(name in TEXT_METRICS for name in task_metrics):
        pairs = [pair for answered in zip(predictions, samples, strict=True) for pair in read_pairs(*answered)]
        scores |= _score_texts(task_metrics, pairs, language)
    return {name: scores[name] if name in NOT_PER_CENT else 100 * scores[name] for name in task_metrics}


def check_metric(name: str) -> None:
    """Raises `GmaskError` for an unknown metric, with the nearest name."""
    if name not in METRICS:
        near = nearest(name, METRICS)
        raise GmaskError(f"there is no metric {name!r}; the nearest is {near!r}, all are {', '.join(METRICS)}")


def check_kind(name: str, kind: TaskKind) -> None:
    """Raises `GmaskError` for a metric that does not fit this kind of task."""
    if (name in LIKELIHOOD_METRICS and kind not in MEASURED) or (name == "word-perplexity" and kind == "likelihood"):
        raise GmaskError(f"{name} does not fit the kind {kind}: {NOTHING_MEASURED}")
    if name == "infill-bleu" and kind != "infill":
        raise GmaskError(f"{name} does not fit the kind {kind}: it is of texts with several blanks, of the kind infill")
    if kind in MEASURED and name in (*TEXT_METRICS, "f1", "macro-f1", "multirc-f1a"):
        raise GmaskError(f"{name} does not fit the kind {kind}: {NOTHING_CHOSEN_OR_WRITTEN}")
    if name in CHOICE_METRICS and kind not in (*LABELLED, *MEASURED):
        raise GmaskError(f"{name} does not fit the kind {kind}: {NOTHING_CHOSEN}")
    if name not in CHOICE_METRICS and kind == "classification":
        raise GmaskError(f"{name} does not fit the kind {kind}: {NOTHING_WRITTEN}")


def predict_majority(known: Sequence[Sample], samples: Sequence[Sample]) -> list[Prediction] | None:
    """Predicts the most frequent label of ``known`` for every sample; of several, the lowest.

    None where the baseline means nothing: labels are missing, or samples differ in their number of candidates.
    """
    labels = [sample.label for sample in known if sample.label is not None]
    if len(labels) < len(known) or not known or len({len(sample.answers) for sample in (*known, *samples)}) > 1:
        return None
    majority = max(sorted(set(labels)), key=labels.count)
    return [Prediction(label=majority) for _ in samples]


def is_answered(sample: Sample, kind: TaskKind) -> bool:
    """True if the sample has an answer, a label or references to compare a prediction with."""
    is_known = bool(sample.references) or sample.label is not None
    return is_known or (kind not in LABELLED and bool(sample.answers))


def check_metrics(task_metrics: Sequence[str], sample: Sample, kind: TaskKind) -> None:
    """Scores the right answer of one sample, so that a metric that does not work fails before hours of prediction.

    Raises:
        GmaskError: as `score_predictions`.
    """
    if kind in MEASURED:
        return  # these metrics need no library, and no particular answer
    right = Prediction(label=sample.label or 0) if kind in LABELLED else Prediction(texts=sample.answers)
    score_predictions(task_metrics, [right], [sample])


def read_pairs(prediction: Prediction, sample: Sample) -> list[Pair]:
    """The text that was written or chosen for each blank, with those that count as right there.

    Raises:
        GmaskError: the answer is not known, or it is a class, which has no text.
    """
    texts = prediction.texts
    right: list[tuple[str, ...]] = [(answer,) for answer in sample.answers]
    if prediction.label is not None:
        if not sample.answers:
            raise GmaskError(f"{_location(sample)}{NOTHING_WRITTEN}")
        texts = (sample.answers[prediction.label],)
        right = [] if sample.label is None else [(sample.answers[sample.label],)]
    if sample.references:
        right = [sample.references]
    if not right:
        raise GmaskError(f"{_location(sample)}the right answer is not known, so nothing can be measured")
    return [Pair(text, references) for text, references in zip(texts, right, strict=True)]


def count_choices(choices: Sequence[Choice]) -> ChoiceCounts:
    counts = Counter((choice.chosen, choice.label) for choice in choices)
    pairs = np.array(list(counts), np.int64).reshape(-1, 2)
    return ChoiceCounts(pairs[:, 0], pairs[:, 1], np.array(list(counts.values()), np.float64))


def accuracy(counts: ChoiceCounts) -> Floats:
    right: Floats = counts.count[..., counts.chosen == counts.label].sum(-1)
    share: Floats = right / counts.count.sum(-1)
    return share


def binary_f1(counts: ChoiceCounts) -> Floats:
    """F1 of class 1 among the classes 0 and 1."""
    highest = max(counts.chosen.max(), counts.label.max())
    if highest > 1:
        raise GmaskError(f"f1 is of two classes, and here is one with the index {highest}: take macro-f1")
    return _class_f1(counts, np.array([1]))[0][..., 0]


def macro_f1(counts: ChoiceCounts) -> Floats:
    """The mean of F1 over the classes that are a label or were chosen, each with the same weight."""
    f1, occurs = _class_f1(counts, np.union1d(counts.chosen, counts.label))
    means: Floats = f1.sum(-1) / occurs.sum(-1)
    return means


def group_exact_match(choices: Sequence[Choice]) -> float:
    """The share of groups all of whose samples are right: MultiRC's questions, CMRC 2019's passages."""
    groups = _group(choices)
    return sum(map(all, groups.values())) / len(groups)


def macro_accuracy(choices: Sequence[Choice]) -> float:
    """The mean of accuracy over the groups, each with the same weight."""
    groups = _group(choices)
    return sum(sum(right) / len(right) for right in groups.values()) / len(groups)


def score_groups(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, tuple[float, int]]:
    """The accuracy of each group in per cent, and its number of samples, by the names of the groups.

    A group named ``category/subject`` counts in its category too: that is the mean over its subjects, as C-Eval's and
    MMLU's tables have it.
    """
    groups = _group([read_choice(*answered) for answered in zip(predictions, samples, strict=True)])
    return add_categories({name: (100 * sum(right) / len(right), len(right)) for name, right in groups.items()})


def add_categories(found: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """The scores and sizes of groups in the order of their names, after the means of the categories."""
    members = defaultdict[str, list[str]](list)
    for name in sorted(found):
        if "/" in name:
            members[name.partition("/")[0]].append(name)
    means = {
        category: (sum(found[name][0] for name in names) / len(names), sum(found[name][1] for name in names))
        for category, names in members.items()
    }
    return means | dict(sorted(found.items()))


def _group(choices: Sequence[Choice]) -> dict[str, list[bool]]:
    """Whether each choice is right, by groups."""
    groups = defaultdict[str, list[bool]](list)
    for choice in choices:
        if choice.group is None:
            raise GmaskError("this metric is over groups, such as questions or subjects, and the samples have no group")
        groups[choice.group].append(choice.chosen == choice.label)
    return groups


def token_perplexity(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> float:
    """exp of the mean nats of a token, over all tokens of all answers."""
    return math.exp(_sum_nats(predictions) / sum(len(prediction.scores) for prediction in predictions))


def word_perplexity(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> float:
    """exp of the mean nats of a word, the first of each document not counted, as its first token is not scored."""
    if any(sample.words is None for sample in samples):
        raise GmaskError("word-perplexity is of documents, whose words are counted: take perplexity")
    words = sum((sample.words or 1) - 1 for sample in samples)
    if words < 1:
        raise GmaskError("word-perplexity needs a document with two words")
    return math.exp(_sum_nats(predictions) / words)


def mean_nats(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> float:
    """The mean of minus the log-probability of an answer, end tokens not counted."""
    return _sum_nats(predictions) / len(predictions)


def _sum_nats(predictions: Sequence[Prediction]) -> float:
    if not any(prediction.is_greedy for prediction in predictions):
        raise GmaskError(NOTHING_MEASURED)
    return -math.fsum(score for prediction in predictions for score in prediction.scores)


def _class_f1(counts: ChoiceCounts, classes: Integers) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """2 tp / (2 tp + fp + fn) of each class, and whether it is a label or was chosen; 0 where not, as scikit-learn."""
    chosen, label = (np.equal.outer(index, classes) for index in (counts.chosen, counts.label))
    hits, seen = counts.count @ (chosen & label), counts.count @ (chosen.astype(np.float64) + label)
    occurs = seen > 0
    return 2 * hits / np.where(occurs, seen, 1.0), occurs


def is_exact_match(text: str, reference: str) -> bool:
    """True if two texts are the same but for the number of spaces; case counts."""
    return text.split() == reference.split()


def _exact_match(pair: Pair, language: MetricLanguage) -> dict[str, float]:
    return {"exact-match": float(any(is_exact_match(pair.text, reference) for reference in pair.references))}


def begins_with(text: str, reference: str) -> bool:
    """True if a text begins with another, which ends there: "Both" does not begin with "B"."""
    text, reference = text.strip(), reference.strip()
    goes_on = re.match(r"[A-Za-z0-9]", text[len(reference) :]) and re.search(r"[A-Za-z0-9]$", reference)
    return text.startswith(reference) and not goes_on


def _prefix_match(pair: Pair, language: MetricLanguage) -> dict[str, float]:
    return {"prefix-match": float(any(begins_with(pair.text, reference) for reference in pair.references))}


def _record(pair: Pair, language: MetricLanguage) -> dict[str, float]:
    return dict(zip(("record-f1", "record-em"), score_reading(pair, "en"), strict=True))


def _squad(pair: Pair, language: MetricLanguage) -> dict[str, float]:
    return dict(zip(("squad-f1", "squad-em"), score_reading(pair, language), strict=True))


COUNT_METRICS: Mapping[str, ChoiceMetric] = {
    "accuracy": accuracy,
    "f1": binary_f1,
    "macro-f1": macro_f1,
    "multirc-f1a": binary_f1,
}
GROUP_METRICS: Mapping[str, Callable[[Sequence[Choice]], float]] = {
    "multirc-em": group_exact_match,
    "group-em": group_exact_match,
    "macro-accuracy": macro_accuracy,
}
CHOICE_METRICS = (*COUNT_METRICS, *GROUP_METRICS)

LIKELIHOOD_METRICS: Mapping[str, Callable[[Sequence[Prediction], Sequence[Sample]], float]] = {
    "perplexity": token_perplexity,
    "word-perplexity": word_perplexity,
    "nats": mean_nats,
}
NOT_PER_CENT = tuple(LIKELIHOOD_METRICS)
LOWER_IS_BETTER = ("loss", *LIKELIHOOD_METRICS)


def score_rouge(pair: Pair, language: MetricLanguage) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1; of several references, the best of each.

    English by rouge-score, with Porter stemming, which sees Latin letters and digits only; Chinese by rouge-chinese
    over jieba's words, which counts a repeated n-gram once. 0 where there is nothing to compare.
    """
    score = _score_chinese_rouge if language == "zh" else _score_english_rouge
    scores = [score(pair.text, reference) for reference in pair.references]
    return {name: max(found[name] for found in scores) for name in scores[0]}


def score_bleu(pair: Pair, language: MetricLanguage) -> dict[str, float]:
    """BLEU-4 of one text, 0 to 1: over characters in Chinese, over words and punctuation marks otherwise.

    Orders without a match are smoothed by NLTK's method 3, the geometric sequence of NIST's ``mteval-v13a``.
    """
    bleu = load_library("nltk.translate.bleu_score")
    cut: Callable[[str], list[str]] = list if language == "zh" else WORD_OR_MARK.findall
    references = [cut(reference) for reference in pair.references]
    smoothing = bleu.SmoothingFunction().method3
    return {"bleu-4": float(bleu.sentence_bleu(references, cut(pair.text), smoothing_function=smoothing))}


PAIR_METRICS: Mapping[tuple[str, ...], PairMetrics] = {
    ("exact-match",): _exact_match,
    ("prefix-match",): _prefix_match,
    ("record-f1", "record-em"): _record,
    ("squad-f1", "squad-em"): _squad,
    ("rouge-1", "rouge-2", "rouge-l"): score_rouge,
    ("bleu-4",): score_bleu,
}
"""The functions that score one pair, by the metrics that they give; the score of a corpus is the mean."""

TEXT_METRICS = (*(name for names in PAIR_METRICS for name in names), "sacrebleu")
METRICS = (*CHOICE_METRICS, *TEXT_METRICS, "infill-bleu", *LIKELIHOOD_METRICS)


def _score_texts(names: Sequence[str], pairs: Sequence[Pair], language: MetricLanguage | None) -> dict[str, float]:
    """The metrics of texts that are named, and those that are computed with them, 0 to 1."""
    scores = dict[str, float]()
    languages = [language or find_language(pair.references) for pair in pairs]
    for computed, score in PAIR_METRICS.items():
        if not set(computed).isdisjoint(names):
            found = [score(pair, its_language) for pair, its_language in zip(pairs, languages, strict=True)]
            scores |= {name: sum(each[name] for each in found) / len(found) for name in computed}
    if "sacrebleu" in names:
        references = [reference for pair in pairs for reference in pair.references]
        scores["sacrebleu"] = score_corpus_bleu(pairs, language or find_language(references))
    return scores


def read_choice(prediction: Prediction, sample: Sample) -> Choice:
    if prediction.is_greedy:
        return Choice(int(all(prediction.is_greedy)), 1, sample.group)
    if prediction.label is None:
        raise GmaskError(f"{_location(sample)}{NOTHING_CHOSEN}")
    if sample.label is None:
        raise GmaskError(f"{_location(sample)}the label is not known, so nothing can be measured")
    return Choice(prediction.label, sample.label, sample.group)


def _location(sample: Sample) -> str:
    return "" if sample.path is None else f"{sample.path}, line {sample.line}: "


HAN_RANGES = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese characters, as ranges of a regular expression
HAN_CHARACTER = re.compile(f"[{HAN_RANGES}]")
LATIN_WORD = re.compile(r"[A-Za-z]+")
WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
ENGLISH_ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeLsum"}
"""The names that rouge-score has. ``rougeLsum`` takes each line for a sentence, as GLM's evaluation does; of a single
line it is ``rougeL``."""


def find_language(texts: Sequence[str]) -> MetricLanguage:
    """The language of texts: Chinese if they have at least as many Chinese characters as words in Latin letters."""
    han, words = (sum(len(pattern.findall(text)) for text in texts) for pattern in (HAN_CHARACTER, LATIN_WORD))
    return "zh" if han and han >= words else "en"


def score_corpus_bleu(pairs: Sequence[Pair], language: MetricLanguage) -> float:
    """sacrebleu's BLEU of all texts together, 0 to 1, by its tokenizer ``zh`` or ``13a``."""
    streams = list(zip_longest(*(pair.references for pair in pairs)))  # None where a text has fewer references
    tokenizer = "zh" if language == "zh" else "13a"
    corpus_bleu = load_library("sacrebleu").corpus_bleu
    return float(corpus_bleu([pair.text for pair in pairs], streams, tokenize=tokenizer, force=True).score) / 100


def score_filled_texts(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> float:
    """sacrebleu's BLEU of whole texts with the answers in their blanks, 0 to 1, over what spaces separate.

    As ``multi-bleu.perl`` of the published evaluation, which is given texts that are cut into words by spaces.
    """
    filled = [join_words(sample.text, found.texts) for found, sample in zip(predictions, samples, strict=True)]
    right = [join_words(sample.text, sample.answers) for sample in samples]
    corpus_bleu = load_library("sacrebleu").corpus_bleu
    return float(corpus_bleu(filled, [right], tokenize="none", smooth_method="none", force=True).score) / 100


def join_words(text: str, answers: Sequence[str]) -> str:
    """A text with answers in its blanks, in order, and one space between all words; escaped blanks become text."""
    remaining = iter(answers)

    def fill(match: re.Match[str]) -> str:
        backslashes, blank = match.groups()
        plain = "\\" * (len(backslashes) // 2)
        return plain + (blank if len(backslashes) % 2 else f" {next(remaining).strip()} ")

    return " ".join(BLANK.sub(fill, text).split())


def cut_words(text: str) -> list[str]:
    """jieba's words of a text, without spaces."""
    return [word for word in _segmenter().cut(text) if word.strip()]


def _score_english_rouge(text: str, reference: str) -> dict[str, float]:
    scores = _english_scorer().score(reference, text)
    return {name: float(scores[its_name].fmeasure) for name, its_name in ENGLISH_ROUGE.items()}


def _score_chinese_rouge(text: str, reference: str) -> dict[str, float]:
    words, right = cut_words(text), cut_words(reference)
    if not words or not right:  # rouge-chinese refuses them
        return {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    (scores,) = load_library("rouge_chinese").Rouge().get_scores(" ".join(words), " ".join(right))
    return {name: float(score["f"]) for name, score in scores.items()}


@cache
def _english_scorer() -> Any:
    return load_library("rouge_score.rouge_scorer").RougeScorer([*ENGLISH_ROUGE.values()], use_stemmer=True)


@cache
def _segmenter() -> Any:
    """A jieba tokenizer. Its dictionary is read here: jieba would log to standard error, and read and write a cache in
    the folder for temporary files, which all users share."""
    segmenter = load_library("jieba").Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def load_library(module: str) -> Any:
    """Imports a library of the extra ``metrics``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of an import are not for the user
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise GmaskError(f"{error.name} is not installed; ROUGE and BLEU need pip install 'gmask[metrics]'") from error


ARTICLES = re.compile(r"\b(a|an|the)\b")
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
CMRC_MARKS = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
"""The marks that CMRC's script leaves out. The ellipsis, and Western full stops and commas, are not among them."""

CMRC_LEFT_OUT = str.maketrans("", "", CMRC_MARKS)
CMRC_HAN = re.compile(r"[\u4e00-\u9fa5]")
CMRC_HAN_OR_RUN = re.compile(r"[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+")


def score_reading(pair: Pair, language: MetricLanguage) -> tuple[float, float]:
    """F1 and exact match of an answer, 0 to 1, each the best over the references.

    English as SQuAD: lower case, without punctuation and articles, F1 over words. Chinese as CMRC 2018: without
    punctuation, F1 over the longest run of characters that both have.
    """
    f1, exact = (_cmrc_f1, _cmrc_exact) if language == "zh" else (_squad_f1, _squad_exact)
    return (
        max(f1(pair.text, reference) for reference in pair.references),
        max(exact(pair.text, reference) for reference in pair.references),
    )


def normalize_english(text: str) -> str:
    """The text in lower case, without ASCII punctuation and articles, with one space between words."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(ASCII_PUNCTUATION)).split())


def cut_chinese(text: str) -> list[str]:
    """The Chinese characters of a text, and the words that NLTK finds in the rest; lower case, without CMRC's marks."""
    units = list[str]()
    for run in CMRC_HAN_OR_RUN.findall(_drop_marks(text)):
        units += [run] if CMRC_HAN.match(run) else load_library("nltk.tokenize").NLTKWordTokenizer().tokenize(run)
    return units


def _squad_f1(text: str, reference: str) -> float:
    return overlap_f1(normalize_english(text).split(), normalize_english(reference).split())


def _squad_exact(text: str, reference: str) -> float:
    return float(normalize_english(text) == normalize_english(reference))


def _cmrc_f1(text: str, reference: str) -> float:
    units, right = cut_chinese(text), cut_chinese(reference)
    shared = SequenceMatcher(None, right, units, autojunk=False).find_longest_match().size
    return _f1(shared, len(units), len(right))


def _cmrc_exact(text: str, reference: str) -> float:
    return float(_drop_marks(text) == _drop_marks(reference))


def overlap_f1(given: Sequence[str], right: Sequence[str]) -> float:
    """F1 of two texts as bags of words or characters, 0 to 1."""
    return _f1((Counter(given) & Counter(right)).total(), len(given), len(right))


def _f1(shared: int, given: int, right: int) -> float:
    """The harmonic mean of shared/given and shared/right; 0 where nothing is shared, so of two empty texts too."""
    return 2 * shared / (given + right) if shared else 0.0


def _drop_marks(text: str) -> str:
    return text.lower().strip().translate(CMRC_LEFT_OUT)


def as_cell(text: str) -> str:
    """A text of a model for a cell of `Rows`: in one line, with its bars escaped."""
    return " ".join(text.replace("|", "\\|").split()) or "(nothing)"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a table, as texts; the first ``n_labels`` columns are labels, the others numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_labels: int = 1

    def to_markdown(self) -> str:
        rule = ["---"] * self.n_labels + ["---:"] * (len(self.columns) - self.n_labels)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (self.columns, rule, *self.rows))

    def to_html(self) -> str:
        """A table whose labels have the class ``label``; what stands between backticks is code."""

        def cells(row: Sequence[str], tag: str) -> str:
            return "".join(
                f'<{tag} class="label">{_as_code(cell)}</{tag}>'
                if index < self.n_labels
                else f"<{tag}>{_as_code(cell)}</{tag}>"
                for index, cell in enumerate(row)
            )

        lines = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in self.rows)
        return f"<table><thead><tr>{cells(self.columns, 'th')}</tr></thead>\n<tbody>{lines}</tbody></table>"

    def to_rich(self, title: str) -> Table:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(self.columns):
            is_label = index < self.n_labels  # on a narrow terminal labels take several lines, numbers are never cut
            table.add_column(column, justify="left" if is_label else "right", no_wrap=not is_label, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def _as_code(cell: str) -> str:
    """The cell in HTML, with what stands between backticks as code."""
    parts = html.escape(cell).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
