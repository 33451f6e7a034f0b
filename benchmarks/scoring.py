"""How fast are answers scored, beside one plain forward pass for each?

    python benchmarks/scoring.py [--model bundled] [--texts 16] [--threads 2] [--rounds 3] [--json]

`gmask.score` reads a text once and scores all its answers behind the shared cache, several texts together. The plain
way runs the same model over text and answer, one pass without a cache for each, as a short script would. Both take
turns in each round, and a ratio is taken within a round; their log-probabilities must agree.
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch

import gmask
from gmask.generation.score import Scorer
from machine import describe_machine

SENTENCE = "The old man walked down to the river every morning, for he had lived there all his life. "
WORDS = "boat fish water morning friend bread window country mountain letter garden captain winter village horse song"
SHAPES = ((1, 2), (1, 16), (6, 2), (6, 16))  # sentences of a text, answers
TOLERANCE = 1e-4


def make_task(sentences: int, answers: int, texts: int) -> tuple[list[str], list[str]]:
    """Texts of about 20 tokens a sentence, all different, and one- to three-token answers."""
    words = WORDS.split()
    made = [f"{words[i % len(words)]} {i}. {SENTENCE * sentences}Then he saw the [MASK] again." for i in range(texts)]
    return made, words[:answers]


def score_plainly(scorer: Scorer, texts: list[str], answers: list[str]) -> list[list[float]]:
    """One forward pass over text, <sop> and answer for each answer."""
    sop, found = scorer.reader.special.sop, []
    with torch.inference_mode():
        for question in (scorer.read(text, answers) for text in texts):
            context = question.blanked.context.ids
            row = []
            for ids in question.ids:
                logits = scorer.model(torch.tensor([[*context, sop, *ids[:-1]]]), use_cache=False).logits[0]
                logprobs = logits[len(context) :].log_softmax(-1)
                row.append(float(logprobs.gather(-1, torch.tensor(ids)[:, None]).sum()))
            found.append(row)
    return found


def measure(name: str, sentences: int, answers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Answers a second of either way in every round, and the ratio."""
    scorer = Scorer(*gmask.load(name, device="cpu"))
    texts, candidates = make_task(sentences, answers, options.texts)
    ways = {
        "gmask": lambda: [
            [answer.logprob for answer in scoring.answers]
            for scoring in scorer.score([scorer.read(text, candidates) for text in texts])
        ],
        "plain": lambda: score_plainly(scorer, texts, candidates),
    }
    difference = (torch.tensor(ways["gmask"]()) - torch.tensor(ways["plain"]())).abs().max().item()
    assert difference < TOLERANCE, f"the two ways differ by {difference}"
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            speeds[way].append(options.texts * answers / (time.perf_counter() - started))
    return {
        "tokens": len(scorer.read(texts[0], candidates).blanked.context.ids),
        "answers": answers,
        **{way: statistics.median(found) for way, found in speeds.items()},
        "ratios": sorted(a / b for a, b in zip(*speeds.values(), strict=True)),
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled", help="a GLM's folder")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.threads)
    records = [measure(options.model, sentences, answers, options) for sentences, answers in SHAPES]
    if options.json:
        print(json.dumps({"machine": machine, "texts": options.texts, "results": records}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("\nAnswers/s; ratio: median, min-max.\n")
    print("| tokens of a text | answers | gmask.score | one pass each | ratio | largest difference |")
    print("|---:|---:|---:|---:|---:|---:|")
    for record in records:
        ratios = record["ratios"]
        spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})"
        cells = [record["tokens"], record["answers"], f"{record['gmask']:,.0f}", f"{record['plain']:,.0f}", spread]
        print("| " + " | ".join(map(str, [*cells, f"{record['difference']:.0e}"])) + " |")


if __name__ == "__main__":
    main()
