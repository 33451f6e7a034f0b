"""Every metric by its name, in per cent, and tables of results.

Chinese is compared as the evaluation of ChatGLM-6B's P-tuning does: ROUGE over the words that jieba finds, BLEU-4 over
characters. English ROUGE is that of GLM's evaluation, without its clean-up of the tokens of particular data sets.

Sources: ``ptuning/main.py`` of THUDM/ChatGLM-6B, ``tasks/seq2seq/evaluate.py`` of THUDM/GLM.
Sources: ``evaluate-v1.1.py`` of SQuAD, ``evaluate.py`` of ReCoRD, ``cmrc2018_evaluate.py`` (version 5) of CMRC 2018.
"""

import importlib
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

from rich.table import Table

from gmask.errors import GmaskError, nearest
from gmask.tasks.records import LABELLED, Prediction, Sample, TaskKind

NOTHING_CHOSEN = "a text was written and nothing chosen: take exact-match, rouge-l or bleu-4"
NOTHING_WRITTEN = "a class was chosen and no text: take accuracy, f1 or macro-f1"
"""What is told of a metric that does not fit."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate or class that was chosen, the right one, and the name that the samples of one question share."""

    chosen: int
    label: int
    group: str | None = None


ChoiceMetric: TypeAlias = Callable[[Sequence[Choice]], float]  # 0 to 1
Language = Literal["en", "zh"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A text that a model gave, and those that count as right; there is at least one."""

    text: str
    references: tuple[str, ...]


PairMetrics: TypeAlias = Callable[[Pair, Language], Mapping[str, float]]  # by name, 0 to 1


def evaluate(
    task_metrics: Sequence[str],
    predictions: Sequence[Prediction],
    samples: Sequence[Sample],
    *,
    language: Language | None = None,
) -> dict[str, float]:
    """Measures predictions by the metrics that are named, in per cent.

    - ``accuracy``; ``f1`` of class 1 among two; ``macro-f1``, the mean over the classes that occur.
    - ``multirc-f1a``, F1 over all answers, and ``multirc-em``, the questions whose answers are all judged right;
      ``record-f1`` and ``record-em``: SuperGLUE (Wang et al. 2019, arXiv:1905.00537).
    - ``squad-f1`` and ``squad-em``: as SQuAD, and in Chinese as CMRC 2018.
    - ``exact-match``: the same text but for spaces.
    - ``rouge-1``, ``rouge-2``, ``rouge-l``, ``bleu-4``: the mean over the texts; ``sacrebleu``: of all together.

    A text is compared with the sample's references, or with its right answer, blank by blank.

    Args:
        task_metrics: names, of those above.
        predictions: one for each sample.
        language: of the right texts; by default each is looked at.

    Raises:
        GmaskError: an unknown metric or language, a metric that does not fit the task, a sample without a known answer
            (its file and line are named), or a library that is not installed.
    """
    assert len(predictions) == len(samples), f"{len(predictions)} predictions of {len(samples)} samples"
    for name in task_metrics:
        check_metric(name)
    if language not in (None, *get_args(Language)):
        raise GmaskError(f"the language {language!r} is not known: {' or '.join(get_args(Language))}")
    if not samples:
        raise GmaskError("there are no samples to measure")
    scores = dict[str, float]()
    if any(name in CHOICE_METRICS for name in task_metrics):
        choices = [_read_choice(*answered) for answered in zip(predictions, samples, strict=True)]
        scores |= {name: CHOICE_METRICS[name](choices) for name in task_metrics if name in CHOICE_METRICS}
    if any(name not in CHOICE_METRICS for name in task_metrics):
        pairs = [pair for answered in zip(predictions, samples, strict=True) for pair in read_pairs(*answered)]
        scores |= _score_texts(task_metrics, pairs, language)
    return {name: 100 * scores[name] for name in task_metrics}


def check_metric(name: str) -> None:
    """Raises `GmaskError` for a name that is no metric's; the nearest is named."""
    if name not in METRICS:
        near = nearest(name, METRICS)
        raise GmaskError(f"there is no metric {name!r}; the nearest is {near!r}, all are {', '.join(METRICS)}")


def check_kind(name: str, kind: TaskKind) -> None:
    """Raises `GmaskError` for a metric that no answer of this kind of task can be measured by."""
    if name in CHOICE_METRICS and kind not in LABELLED:
        raise GmaskError(f"{name} does not fit the kind {kind}: {NOTHING_CHOSEN}")
    if name not in CHOICE_METRICS and kind == "classification":
        raise GmaskError(f"{name} does not fit the kind {kind}: {NOTHING_WRITTEN}")


def predict_majority(known: Sequence[Sample], samples: Sequence[Sample]) -> list[Prediction] | None:
    """The baseline that always chooses the label which is most frequent in `known`, the lowest of several.

    None where that means nothing: labels are missing, or candidates differ in number from sample to sample.
    """
    labels = [sample.label for sample in known if sample.label is not None]
    if len(labels) < len(known) or not known or len({len(sample.answers) for sample in (*known, *samples)}) > 1:
        return None
    majority = max(sorted(set(labels)), key=labels.count)
    return [Prediction(label=majority) for _ in samples]


def is_answered(sample: Sample, kind: TaskKind) -> bool:
    """Whether anything is known that a prediction can be compared with."""
    is_known = bool(sample.references) or sample.label is not None
    return is_known or (kind not in LABELLED and bool(sample.answers))


def check_metrics(task_metrics: Sequence[str], sample: Sample, kind: TaskKind) -> None:
    """Measures one right answer, so that what cannot be measured is told before hours of prediction.

    Raises:
        GmaskError: as `evaluate`.
    """
    right = Prediction(label=sample.label or 0) if kind in LABELLED else Prediction(texts=sample.answers)
    evaluate(task_metrics, [right], [sample])


def read_pairs(prediction: Prediction, sample: Sample) -> list[Pair]:
    """What was written, or chosen, in each blank, with what counts as right there.

    Raises:
        GmaskError: the answer is not known, or it is a class, which has no text.
    """
    texts = prediction.texts
    right: list[tuple[str, ...]] = [(answer,) for answer in sample.answers]
    if prediction.label is not None:
        if not sample.answers:
            raise GmaskError(f"{_place(sample)}{NOTHING_WRITTEN}")
        texts = (sample.answers[prediction.label],)
        right = [] if sample.label is None else [(sample.answers[sample.label],)]
    if sample.references:
        right = [sample.references]
    if not right:
        raise GmaskError(f"{_place(sample)}the right answer is not known, so nothing can be measured")
    return [Pair(text, references) for text, references in zip(texts, right, strict=True)]


def accuracy(choices: Sequence[Choice]) -> float:
    return sum(choice.chosen == choice.label for choice in choices) / len(choices)


def binary_f1(choices: Sequence[Choice]) -> float:
    """F1 of class 1 among the classes 0 and 1."""
    highest = max(max(choice.chosen, choice.label) for choice in choices)
    if highest > 1:
        raise GmaskError(f"f1 is of two classes, and here is one with the index {highest}: take macro-f1")
    return _class_f1(choices, 1)


def macro_f1(choices: Sequence[Choice]) -> float:
    """The plain mean of F1 over every class that is a label or was chosen."""
    classes = {choice.label for choice in choices} | {choice.chosen for choice in choices}
    return sum(_class_f1(choices, of) for of in classes) / len(classes)


def multirc_exact_match(choices: Sequence[Choice]) -> float:
    """The share of questions all of whose answers are judged right."""
    questions = defaultdict[str, list[bool]](list)
    for choice in choices:
        if choice.group is None:
            raise GmaskError("multirc-em is over questions, and the samples do not tell which they belong to")
        questions[choice.group].append(choice.chosen == choice.label)
    return sum(map(all, questions.values())) / len(questions)


def _class_f1(choices: Sequence[Choice], of: int) -> float:
    """2 tp / (2 tp + fp + fn); 0 where the class is neither a label nor chosen, as scikit-learn has it."""
    counts = Counter((choice.chosen == of, choice.label == of) for choice in choices)
    hits, errors = counts[True, True], counts[True, False] + counts[False, True]
    return 2 * hits / (2 * hits + errors) if hits else 0.0


def _exact_match(pair: Pair, language: Language) -> dict[str, float]:
    given = pair.text.split()
    return {"exact-match": float(any(given == reference.split() for reference in pair.references))}


def _record(pair: Pair, language: Language) -> dict[str, float]:
    return dict(zip(("record-f1", "record-em"), score_reading(pair, "en"), strict=True))


def _squad(pair: Pair, language: Language) -> dict[str, float]:
    return dict(zip(("squad-f1", "squad-em"), score_reading(pair, language), strict=True))


CHOICE_METRICS: Mapping[str, ChoiceMetric] = {
    "accuracy": accuracy,
    "f1": binary_f1,
    "macro-f1": macro_f1,
    "multirc-f1a": binary_f1,
    "multirc-em": multirc_exact_match,
}


def score_rouge(pair: Pair, language: Language) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1; of several references, the best of each.

    English by rouge-score, with Porter stemming, which sees Latin letters and digits only; Chinese by rouge-chinese
    over jieba's words, which counts a repeated n-gram once. 0 where there is nothing to compare.
    """
    score = _score_chinese_rouge if language == "zh" else _score_english_rouge
    scores = [score(pair.text, reference) for reference in pair.references]
    return {name: max(found[name] for found in scores) for name in scores[0]}


def score_bleu(pair: Pair, language: Language) -> dict[str, float]:
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
    ("record-f1", "record-em"): _record,
    ("squad-f1", "squad-em"): _squad,
    ("rouge-1", "rouge-2", "rouge-l"): score_rouge,
    ("bleu-4",): score_bleu,
}
"""What one look at a pair gives; a corpus has the mean."""

METRICS = (*CHOICE_METRICS, *(name for names in PAIR_METRICS for name in names), "sacrebleu")


def _score_texts(names: Sequence[str], pairs: Sequence[Pair], language: Language | None) -> dict[str, float]:
    """Every metric of texts that is named, and those that come with it, 0 to 1."""
    scores = dict[str, float]()
    languages = [language or find_language(pair.references) for pair in pairs]
    for together, score in PAIR_METRICS.items():
        if not set(together).isdisjoint(names):
            found = [score(pair, spoken) for pair, spoken in zip(pairs, languages, strict=True)]
            scores |= {name: sum(each[name] for each in found) / len(found) for name in together}
    if "sacrebleu" in names:
        everything = [reference for pair in pairs for reference in pair.references]
        scores["sacrebleu"] = score_corpus_bleu(pairs, language or find_language(everything))
    return scores


def _read_choice(prediction: Prediction, sample: Sample) -> Choice:
    if prediction.label is None:
        raise GmaskError(f"{_place(sample)}{NOTHING_CHOSEN}")
    if sample.label is None:
        raise GmaskError(f"{_place(sample)}the label is not known, so nothing can be measured")
    return Choice(prediction.label, sample.label, sample.group)


def _place(sample: Sample) -> str:
    return "" if sample.path is None else f"{sample.path}, line {sample.line}: "


HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
LATIN_WORD = re.compile(r"[A-Za-z]+")
WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
ENGLISH_ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeLsum"}
"""What rouge-score calls them. ``rougeLsum`` takes a line for a sentence, as GLM's evaluation; of one line it is
``rougeL``."""


def find_language(texts: Sequence[str]) -> Language:
    """Chinese, if there are at least as many Chinese characters as words in Latin letters."""
    han, words = (sum(len(pattern.findall(text)) for text in texts) for pattern in (HAN, LATIN_WORD))
    return "zh" if han and han >= words else "en"


def score_corpus_bleu(pairs: Sequence[Pair], language: Language) -> float:
    """sacrebleu's BLEU of all texts together, 0 to 1, by its tokenizer ``zh`` or ``13a``."""
    streams = list(zip_longest(*(pair.references for pair in pairs)))  # None where a text has fewer references
    tokenizer = "zh" if language == "zh" else "13a"
    corpus_bleu = load_library("sacrebleu").corpus_bleu
    return float(corpus_bleu([pair.text for pair in pairs], streams, tokenize=tokenizer, force=True).score) / 100


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
    """A jieba tokenizer whose dictionary is read here: its own way logs to standard error, and trusts and writes a
    cache in the folder for temporary files, which all users share."""
    segmenter = load_library("jieba").Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def load_library(module: str) -> Any:
    """Imports a library of the extra ``metrics``. What some warn of while they are imported is not for the user."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise GmaskError(f"{error.name} is not installed; ROUGE and BLEU need pip install 'gmask[metrics]'") from error


ARTICLES = re.compile(r"\b(a|an|the)\b")
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
CMRC_MARKS = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
"""What CMRC's script leaves out. The ellipsis and Western full stops and commas are not in its list."""

CMRC_LEFT_OUT = str.maketrans("", "", CMRC_MARKS)
CMRC_HAN = re.compile(r"[\u4e00-\u9fa5]")
CMRC_HAN_OR_RUN = re.compile(r"[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+")


def score_reading(pair: Pair, language: Language) -> tuple[float, float]:
    """F1 and exact match of an answer, 0 to 1: of each the best over the references.

    English as SQuAD: lower case, without punctuation and articles, F1 over words. Chinese as CMRC 2018: without
    punctuation, F1 over the longest run of characters that both have.
    """
    f1, exact = (_cmrc_f1, _cmrc_exact) if language == "zh" else (_squad_f1, _squad_exact)
    return (
        max(f1(pair.text, reference) for reference in pair.references),
        max(exact(pair.text, reference) for reference in pair.references),
    )


def normalize_english(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, one space between words."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(ASCII_PUNCTUATION)).split())


def cut_chinese(text: str) -> list[str]:
    """Chinese characters one by one, other runs in words as NLTK cuts them, lower case and without CMRC's marks."""
    units = list[str]()
    for run in CMRC_HAN_OR_RUN.findall(_drop_marks(text)):
        units += [run] if CMRC_HAN.match(run) else load_library("nltk.tokenize").NLTKWordTokenizer().tokenize(run)
    return units


def _squad_f1(text: str, reference: str) -> float:
    words, right = normalize_english(text).split(), normalize_english(reference).split()
    return _f1((Counter(words) & Counter(right)).total(), len(words), len(right))


def _squad_exact(text: str, reference: str) -> float:
    return float(normalize_english(text) == normalize_english(reference))


def _cmrc_f1(text: str, reference: str) -> float:
    units, right = cut_chinese(text), cut_chinese(reference)
    shared = SequenceMatcher(None, right, units, autojunk=False).find_longest_match().size
    return _f1(shared, len(units), len(right))


def _cmrc_exact(text: str, reference: str) -> float:
    return float(_drop_marks(text) == _drop_marks(reference))


def _f1(shared: int, given: int, right: int) -> float:
    """Harmonic mean of shared/given and shared/right; 0 where nothing is shared, also between two empty texts."""
    return 2 * shared / (given + right) if shared else 0.0


def _drop_marks(text: str) -> str:
    return text.lower().strip().translate(CMRC_LEFT_OUT)


@dataclass(frozen=True, slots=True)
class Rows:
    """A table of texts; the first `n_labels` columns are words, the others numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_labels: int = 1

    def to_markdown(self) -> str:
        rule = ["---"] * self.n_labels + ["---:"] * (len(self.columns) - self.n_labels)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (self.columns, rule, *self.rows))

    def to_rich(self, title: str) -> Table:
        table = Table(title=title)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.n_labels else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table
