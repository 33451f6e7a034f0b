"""Predictions that are written while they are made, one JSON line each, and found again when a run goes on."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gmask.errors import GmaskError
from gmask.files import at_line, writing, written
from gmask.generation.files import keep_whole_lines
from gmask.tasks.records import Prediction, Sample, prediction_line


def key_of(fingerprint: str, sample: Sample, seed: int | None) -> int:
    """A number of 64 bits that tells samples, settings and weights apart.

    Args:
        fingerprint: of the weights and of all settings that a prediction depends on.
        seed: by which an answer is drawn; None if nothing is drawn.
    """
    parts = [fingerprint, sample.text, sample.answers, sample.label, sample.history, sample.references, sample.group]
    text = json.dumps([*parts, sample.words, seed], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class PredictionLog:
    """The file of the predictions of one task. Without a path nothing is kept.

    Lines are appended as batches are done. At the end `put_in_order` writes them in the order of the samples, without
    those of other settings. In memory are two numbers a line.

    Raises:
        GmaskError: the file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._places: dict[int, int] = {}  # where the line of a key begins
        self._end = 0
        if path is None:
            return
        with writing(path, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            keep_whole_lines(path)  # the last one of a run that was killed may be half
            path.touch()
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                self._places[self._read_key(line, number)] = self._end
                self._end += len(line)

    def __contains__(self, key: int) -> bool:
        return key in self._places

    def _read_key(self, line: bytes, number: int) -> int:
        try:
            return int(json.loads(line)["key"], 16)
        except (ValueError, LookupError, TypeError) as error:
            raise at_line(str(self.path), number, "no prediction of gmask evaluate: name another folder") from error

    def find(self, keys: Sequence[int]) -> list[Prediction]:
        """The predictions of keys that are in the log."""
        assert self.path is not None, "an empty log holds nothing"
        found = []
        with self.path.open("rb") as file:
            for key in keys:
                file.seek(self._places[key])
                found.append(_read_prediction(json.loads(file.readline())))
        return found

    def append(self, answered: Iterable[tuple[int, Prediction, Sample]]) -> None:
        """Writes predictions with their keys and samples, and flushes them. Raises `GmaskError` if it cannot."""
        if self.path is None:
            return
        with writing(self.path, self.path, kept="what is done"), self.path.open("ab") as file:
            for key, prediction, sample in answered:
                values = {"key": f"{key:016x}", **prediction_line(prediction, sample, digits=None)}
                line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                self._places[key] = self._end
                self._end += len(line)

    def put_in_order(self, keys: "array[int]") -> None:
        """Writes the file anew with the lines of these keys, if it is not so already."""
        if self.path is None or list(self._places) == list(keys):
            return
        with written(self.path) as draft, draft.open("wb") as target, self.path.open("rb") as file:
            for key in keys:
                file.seek(self._places[key])
                target.write(file.readline())


def _read_prediction(values: Mapping[str, Any]) -> Prediction:
    return Prediction(
        label=values.get("predicted_label"),
        scores=tuple(values.get("scores", ())),
        texts=tuple(values.get("predicted_texts", ())),
        is_greedy=tuple(values.get("is_greedy", ())),
    )


def refuse_file(path: Path) -> None:
    """Raises `GmaskError` if a folder of results cannot be made there."""
    if path.exists() and not path.is_dir():
        raise GmaskError(f"{path}: is a file; name a folder for the results")
