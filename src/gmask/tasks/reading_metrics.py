"""How right is the answer to a reading question? F1 and exact match as the official scripts count them.

Sources: ``evaluate-v1.1.py`` of SQuAD, ``evaluate.py`` of ReCoRD, ``cmrc2018_evaluate.py`` (version 5) of CMRC 2018.
"""

import re
import string
from collections import Counter
from difflib import SequenceMatcher

from gmask.tasks.text_metrics import Language, Pair, load_library

ARTICLES = re.compile(r"\b(a|an|the)\b")
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
CMRC_MARKS = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
"""What CMRC's script leaves out. The ellipsis and Western full stops and commas are not in its list."""
CMRC_LEFT_OUT = str.maketrans("", "", CMRC_MARKS)
HAN = re.compile(r"[\u4e00-\u9fa5]")
HAN_OR_RUN = re.compile(r"[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+")


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
    for run in HAN_OR_RUN.findall(_drop_marks(text)):
        units += [run] if HAN.match(run) else load_library("nltk.tokenize").NLTKWordTokenizer().tokenize(run)
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
