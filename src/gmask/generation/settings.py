"""`Sampling`: the settings by which answers are written."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from gmask.config import Count, NotEmpty, NotNegative, Positive, Range, Whole, check_fields
from gmask.errors import GmaskError, nearest
from gmask.files import check_text

if TYPE_CHECKING:  # the command line reads the defaults without loading torch
    from gmask.generation.constraints import Constraint

ScoreNormalization = Literal["sum", "mean", "unconditional"]
"""How an answer's log-probability becomes its score; see `gmask.score`."""

MOST_TOP_LOGPROBS = 20
MOST_SAMPLES = 1000
"""Answers to one text that are drawn."""

MOST_BEAMS = 256
"""Beams of one text. All of them are in memory at once."""


class SettingsKeywords(TypedDict, total=False):
    """The fields of `Sampling` that functions take as keywords. The other fields are for the server."""

    n: int
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    num_beams: int
    length_penalty: float
    no_repeat_ngram: int
    seed: int | None
    stop: str | Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling settings of the answers to a text.

    ``temperature=0`` takes the most probable token (or beam). Above 0 the logits are divided by it, and tokens are
    drawn from the ``top_k`` most probable ones (0 = all), cut to those that together have ``top_p`` of the probability.

    Raises:
        GmaskError: a value that does not fit.
    """

    n: Annotated[Count, Range(most=MOST_SAMPLES)] = 1  # answers to a text: samples, or the best of a beam search
    max_tokens: Count = 64  # of an answer
    min_tokens: Whole = 1  # of an answer
    temperature: NotNegative = 0.0
    top_k: Whole = 0
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    num_beams: Annotated[Count, Range(most=MOST_BEAMS)] = 1  # at least 2 * n are used if n > 1 and nothing is drawn
    # Answers are ranked by log-probability / tokens ** length_penalty; above 0 favours long ones.
    length_penalty: Annotated[float, Range(-100, 100)] = 0.0
    no_repeat_ngram: Whole = 0  # the size of n-grams that must not occur twice in an answer; 0: they may
    repetition_penalty: Positive = 1.0  # divides scores of written tokens, or multiplies those below 0 (Keskar 2019)
    presence_penalty: float = 0.0  # subtracted from the score of each written token
    frequency_penalty: float = 0.0  # subtracted for each time that the token was written
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the scores of these tokens
    constraint: "Constraint | None" = None  # on the text of every answer
    top_logprobs: Annotated[int, Range(0, MOST_TOP_LOGPROBS)] = 0  # number of most probable tokens reported with each
    seed: Whole | None = None
    stop: tuple[Annotated[str, NotEmpty()], ...] = ()  # texts that end an answer, which is cut before them

    def __post_init__(self) -> None:
        check_fields(self)
        if self.min_tokens > self.max_tokens:
            raise GmaskError(f"min_tokens is {self.min_tokens}: it must be at most max_tokens, {self.max_tokens}")
        if self.beams > MOST_BEAMS:
            raise GmaskError(
                f"n is {self.n}: at most the best {MOST_BEAMS // 2} are found; set a temperature to draw more"
            )
        for text in self.stop:
            check_text(text, "a stop text")
        if self.temperature > 0 and self.num_beams > 1:
            raise GmaskError("num_beams searches for the best answers and temperature draws them: set one of the two")

    @property
    def beams(self) -> int:
        """The width of the beam search that finds the ``n`` best answers; 1 if there is no beam search.

        It is at least twice ``n``, since some beams differ in their tokens but not in their text.
        """
        if self.temperature > 0:
            return 1
        return max(self.num_beams, 2 * self.n if self.n > 1 else 1)

    @property
    def changes_scores(self) -> bool:
        """True if penalties, a bias or a constraint change the scores before a token is chosen."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias) or self.constraint is not None

    def keywords(self) -> dict[str, Any]:
        """Returns the values of `SettingsKeywords`."""
        return {name: getattr(self, name) for name in SettingsKeywords.__annotations__}

    def seeds(self, count: int) -> list[int]:
        """Returns the seeds of ``count`` texts: ``seed + i``; without a ``seed`` they start from a random one."""
        first = secrets.randbelow(2**62) if self.seed is None else self.seed
        return list(range(first, first + count))


def make_sampling(values: Mapping[str, Any]) -> Sampling:
    """Makes a `Sampling` of the keywords of a function; ``stop`` may be one text.

    Raises:
        GmaskError: an unknown keyword (the nearest one is named), or a value that does not fit.
    """
    known = list(SettingsKeywords.__annotations__)
    for name in values:
        if name not in known:
            near = nearest(name, known)
            raise GmaskError(f"there is no setting {name!r}; the nearest is {near!r}, all are {', '.join(known)}")
    stop = values.get("stop")
    texts = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence):
        raise GmaskError(f"stop is {stop!r}: give a text or a list of texts")
    return Sampling(**{**values, "stop": tuple(texts)})
