"""How well does the bundled chat model answer, by kind of question, beside the model that it was made from?

    python benchmarks/chat_quality.py VALIDATION.jsonl [--models bundled bundled-chat] [--limit 50] [--json]

VALIDATION.jsonl is what recipes/chat_data.py writes: `messages`, and the `kind` of question. Greedy replies; in per
cent: exact, the reply is the reference but for spaces and the mark at its end; ROUGE-L and BLEU-4 as in tuning.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import gmask
from gmask.generation.predict import predict
from gmask.generation.settings import make_sampling
from gmask.tasks.metrics import score_predictions
from gmask.tasks.records import Prediction, Sample, read_records
from gmask.tasks.task import load_task

METRICS = ("rouge-l", "bleu-4")


def is_exact(prediction: Prediction, sample: Sample) -> bool:
    written, wanted = (re.sub(r"\s|[.。!！]$", "", text) for text in (prediction.texts[0], sample.answers[0]))
    return written == wanted


def measure(model: Any, tokenizer: Any, samples: list[Sample]) -> dict[str, float]:
    settings = make_sampling({"max_tokens": 96})
    predictions = predict(model, tokenizer, "chat", samples, settings=settings, max_source=256)
    found = score_predictions(METRICS, predictions, samples)
    exact = sum(map(is_exact, predictions, samples)) / len(samples)
    return {"exact": 100 * exact, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--models", nargs="+", default=["bundled", "bundled-chat"])
    parser.add_argument("--limit", type=int, default=50, help="samples of a kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = load_task("chat/messages")
    kinds: dict[str, list[Sample]] = defaultdict(list)
    for record in read_records(options.validation):
        kinds[record.values["kind"]] += task.samples([record])[-1:]  # the last reply of a conversation
    found: dict[str, dict[str, Any]] = {}
    for name in options.models:
        model, tokenizer = gmask.load(name, dtype="float32", device="cpu")
        found[name] = {kind: measure(model, tokenizer, samples[: options.limit]) for kind, samples in kinds.items()}
    if options.json:
        print(json.dumps(found))
        return
    names = list(next(iter(next(iter(found.values())).values())))
    heads = [f"{name}, {model}" for name in names for model in options.models]
    print("| kind | samples |", " | ".join(heads), "|")
    print("|---|---:|" + "---:|" * len(heads))
    for kind, samples in kinds.items():
        cells = [f"{found[model][kind][name]:.1f}" for name in names for model in options.models]
        print(f"| {kind} | {min(options.limit, len(samples))} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
