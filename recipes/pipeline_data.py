"""The data of recipes/pipeline-sums.yaml: sums, and pairs of a better and a worse answer.

    python recipes/pipeline_data.py OUT [--preference FOLDER] [--sums 2000] [--pairs 1500] [--validation 200] [--seed 2]

OUT gets train.jsonl (sums with answers), prompts.jsonl and validation.jsonl (other sums, in wordings that bundled-chat
was not taught; those of the second were not single questions of its tuning either), pairs.train.jsonl and
pairs.validation.jsonl. A pair is a sum with its result and with a wrong one; with ``--preference``, a folder of
synthetic_pairs.train.jsonl and synthetic_pairs.val.jsonl (prompt, chosen, rejected, kind), its short pairs are added.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from chat_data import read
from sums import ANSWER, draw, drawn_for_tuning, reword

from gmask.files import write_json_lines

LONGEST = 60
"""Characters of a prompt and of each answer of the pairs that are added."""


def wrong_answer(answer: str, rng: random.Random) -> str:
    """The answer to a sum with another result that is near it."""
    found = ANSWER.fullmatch(answer)
    assert found, answer
    result = int(found[4])
    wrong = rng.choice([result + change for change in (-20, -10, -2, -1, 1, 2, 10, 20) if result + change >= 0])
    return answer[: found.start(4)] + str(wrong) + answer[found.end(4) :]


def pair_of(record: dict[str, str], rng: random.Random) -> dict[str, str]:
    """A pair of a sum as `sums.draw` gives it."""
    right = record["output"]
    return {
        "prompt": record["instruction"], "chosen": right, "rejected": wrong_answer(right, rng), "kind": "sum"
    }  # fmt: skip


def read_short_pairs(path: Path) -> list[dict[str, Any]]:
    names = ("prompt", "chosen", "rejected", "kind")
    return [
        {name: record[name] for name in names}
        for record in read(path)
        if max(len(record[name]) for name in names) <= LONGEST
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preference", type=Path, help="a folder of pairs that are added")
    parser.add_argument("--sums", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    validation = draw(2 * options.validation, drawn_for_tuning(), rng)  # for prompts and for pairs
    asked, judged = list(validation)[::2], list(validation.values())[1::2]
    found = draw(options.sums + options.pairs, set(validation), rng)
    sums = list(found.values())
    train = [pair_of(record, rng) for record in sums[options.sums :]]
    held = [pair_of(record, rng) for record in judged]
    if options.preference:
        train += read_short_pairs(options.preference / "synthetic_pairs.train.jsonl")
        held += read_short_pairs(options.preference / "synthetic_pairs.val.jsonl")
    splits: dict[str, list[Any]] = {
        "train": sums[: options.sums],
        "prompts": [reword(one, rng) for one in draw(1000, {*validation, *found}, rng)],
        "validation": [reword(one, rng) for one in asked],
        "pairs.train": train,
        "pairs.validation": held,
    }
    for name, records in splits.items():
        write_json_lines(options.out / f"{name}.jsonl", records)
        print(f"{name}.jsonl: {len(records)}")


if __name__ == "__main__":
    main()
