"""Settings of generation: how many answers, how long, how freely chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from gmask.errors import GmaskError, nearest


class SettingsKeywords(TypedDict, total=False):
    """The fields of `Settings` as keywords of a function."""

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
class Settings:
    """How blanks are filled.

    ``temperature=0`` takes the most probable token (or beam); above 0, tokens are drawn from the ``top_k`` most
    probable ones (0 = all) that together make ``top_p`` of the probability, after division of the logits by it.
    """

    n: int = 1  # alternatives of a text
    max_tokens: int = 64  # of an answer
    min_tokens: int = 1  # of an answer
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1  # at least 2 * n are used when n > 1 and nothing is drawn
    length_penalty: float = 0.0  # ranks answers by log-probability / tokens ** it; above 0 helps long ones
    no_repeat_ngram: int = 0  # no n tokens stand twice in an answer; 0 = they may
    seed: int | None = None
    stop: tuple[str, ...] = ()  # an answer ends before any of these; they may lie across tokens

    def __post_init__(self) -> None:
        for name in ("n", "max_tokens", "min_tokens", "top_k", "num_beams", "no_repeat_ngram"):
            if not _is_whole(getattr(self, name)):
                raise GmaskError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in ("temperature", "top_p", "length_penalty"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise GmaskError(f"{name} must be a number, not {getattr(self, name)!r}")
        if self.seed is not None and not (_is_whole(self.seed) and self.seed >= 0):
            raise GmaskError(f"seed must be a whole number from 0, not {self.seed!r}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise GmaskError(f"stop must be a text or several, none of them empty, not {list(self.stop)}")
        for name, fits, rule in (
            ("n", self.n >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"from 0 to max_tokens ({self.max_tokens})"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or above"),
            ("top_k", self.top_k >= 0, "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("length_penalty", abs(self.length_penalty) < float("inf"), "a finite number"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 or above"),
        ):
            if not fits:
                raise GmaskError(f"{name} must be {rule}, not {getattr(self, name)}")
        if self.temperature > 0 and self.num_beams > 1:
            raise GmaskError("num_beams searches for the best answers and temperature draws them: set one of the two")

    @property
    def beams(self) -> int:
        """Width of the beam search; 1 where there is none.

        Alternatives need twice their number, for some differ in their tokens and not in their text.
        """
        if self.temperature > 0:
            return 1
        return max(self.num_beams, 2 * self.n if self.n > 1 else 1)


def make_settings(values: Mapping[str, Any]) -> Settings:
    """`Settings` from keywords; ``stop`` may be one text.

    Raises:
        GmaskError: an unknown keyword (the nearest one is named), or a value that does not fit.
    """
    known = [field.name for field in fields(Settings)]
    for name in values:
        if name not in known:
            near = nearest(name, known)
            raise GmaskError(f"there is no setting {name!r}; the nearest is {near!r}, all are {', '.join(known)}")
    stop = values.get("stop", ())
    return Settings(**{**values, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
