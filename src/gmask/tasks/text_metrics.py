"""How close is a text to those that count as right? ROUGE and BLEU by the libraries that published numbers come from.

Chinese is compared as the evaluation of ChatGLM-6B's P-tuning does: ROUGE over the words that jieba finds, BLEU-4 over
characters. English ROUGE is that of GLM's evaluation, without its clean-up of the tokens of particular data sets.
Sources: ``ptuning/main.py`` of THUDM/ChatGLM-6B, ``tasks/seq2seq/evaluate.py`` of THUDM/GLM.
"""

import importlib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, Literal

from gmask.errors import GmaskError

Language = Literal["en", "zh"]

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
LATIN_WORD = re.compile(r"[A-Za-z]+")
WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
ENGLISH_ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeLsum"}
"""What rouge-score calls them. ``rougeLsum`` takes a line for a sentence, as GLM's evaluation; of one line it is
``rougeL``."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A text that a model gave, and those that count as right; there is at least one."""

    text: str
    references: tuple[str, ...]


def find_language(texts: Sequence[str]) -> Language:
    """Chinese, if there are at least as many Chinese characters as words in Latin letters."""
    han, words = (sum(len(pattern.findall(text)) for text in texts) for pattern in (HAN, LATIN_WORD))
    return "zh" if han and han >= words else "en"


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
