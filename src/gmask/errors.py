"""What is raised for a mistake that the user can mend."""

import difflib
import re
from collections.abc import Iterable

SHORTAGE = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED")
"""In the messages of torch, whose errors are plain RuntimeErrors on a CPU and on Apple's GPU."""


class GmaskError(ValueError):
    """A user's mistake, told in one line that says what to do; the command line prints it and exits with 2."""


class StoppedError(Exception):
    """A run was asked to stop and has saved its state; the command line prints where it goes on and exits with 0."""


def one_line(error: Exception) -> str:
    """The start of another library's message; of torch's, of what stands behind its advice."""
    return " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:160] or type(error).__name__


def nearest(word: object, known: Iterable[str]) -> str:
    """The one of several known words that a mistyped word most resembles."""
    return difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.0)[0]


def type_name(value: object) -> str:
    """The type of a value with an article, such as "a dict"."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def is_shortage(error: Exception) -> bool:
    """Whether an error means that there is too little memory, as Python, torch on any device and our kernels say it."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(SHORTAGE.search(str(error))))
