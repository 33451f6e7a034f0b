"""Sums as a task with a reward: draws sums, and checks an answer. For recipes/ppo-sums.yaml.

    python recipes/sums.py OUT [--corpus CORPUS/sft] [--train 4000] [--validation 400] [--seed 1]

Wordings and ranges are those of recipes/chat_data.py. The sums of validation.jsonl are not in train.jsonl. With
``--corpus``, of which the data of bundled-chat was made, they were not taught to it either: what was drawn for it is
drawn again here and left out. Without it that holds for its single questions alone: the conversations of several rounds
hang on the other files of the corpus, and ask 203 of the 400 sums that seed 1 gives.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chat_data import SUMS, asked_sum, make_sum, taught_sums

ANSWER = re.compile(r"(\d+)\s*([^\d\s]+)\s*(\d+)\s*(?:=|is|等于)\s*(-?\d+)\s*[.。]?")
IN_FORM = 0.1
"""The reward of a wrong result in the right form."""


def grade(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The reward: 1 for the sum with its result and nothing else, `IN_FORM` if only the result is wrong, else 0."""
    return [grade_answer(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def grade_answer(prompt: str, answer: str) -> float:
    asked, found = asked_sum(prompt), ANSWER.fullmatch(answer.strip())
    if asked is None:
        raise ValueError(f"there is no sum in {prompt!r}")
    if not found or asked_sum(answer) != asked:
        return 0.0
    return 1.0 if int(found[4]) == result_of(*asked) else IN_FORM


def result_of(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "×": left * right}[sign]


def drawn_for_tuning(seed: int = 0) -> set[Any]:
    """The sums that recipes/chat_data.py drew as single questions: its random numbers begin with them."""
    rng = random.Random(seed)
    return {make_sum(rng)[0] for _ in range(SUMS)}


def draw(count: int, excluded: set[Any], rng: random.Random) -> dict[Any, dict[str, str]]:
    """So many different sums that are not excluded."""
    found: dict[Any, dict[str, str]] = {}
    while len(found) < count:
        asked, (question, answer) = make_sum(rng)
        if asked not in excluded:
            found.setdefault(asked, {"instruction": question["content"], "input": "", "output": answer["content"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, help="CORPUS/sft, as of recipes/chat_data.py")
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--validation", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng, taught = random.Random(options.seed), drawn_for_tuning()
    if options.corpus:
        taught |= taught_sums(options.corpus)
    validation = draw(options.validation, taught, rng)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, sums in (("validation", validation), ("train", draw(options.train, set(validation), rng))):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in sums.values()]
        (options.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(lines)} sums")


if __name__ == "__main__":
    main()
