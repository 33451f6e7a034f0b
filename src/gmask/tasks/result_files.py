"""How do predictions and scores come to the disk, whole or not at all?"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gmask.tasks.samples import Prediction, Sample


def write_predictions(path: Path, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> None:
    """Writes one JSON object a line: the sample, and what the model made of it. What is empty is left out.

    Raises:
        OSError: the file cannot be written.
    """
    lines = (describe(*answered) for answered in zip(predictions, samples, strict=True))
    _write(path, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_json(path: Path, values: Any) -> None:
    """Writes an indented JSON file. Raises OSError if it cannot be written."""
    _write(path, [json.dumps(values, ensure_ascii=False, indent=1) + "\n"])


def describe(prediction: Prediction, sample: Sample) -> dict[str, Any]:
    """A sample and its prediction as a line of a predictions file: with the scores in nats, rounded to 4 places."""
    values = {
        "history": sample.history,
        "text": sample.text,
        "answers": sample.answers,
        "references": sample.references,
        "label": sample.label,
        "group": sample.group,
        "predicted_label": prediction.label,
        "predicted_texts": prediction.texts,
        "scores": [round(score, 4) for score in prediction.scores],
    }
    return {name: value for name, value in values.items() if value is not None and value not in ("", (), [])}


def _write(path: Path, pieces: Iterable[str]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
