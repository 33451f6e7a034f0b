"""Sorting five numbers as a task with a reward: draws lists, and checks an answer. For recipes/grpo-sorting.yaml.

    python recipes/sorting.py OUT [--train 1000] [--validation 500] [--seed 1]

Wordings and ranges are those of recipes/chat_data.py. Of 7 thousand million lists, bundled-chat was taught 5,000.
"""

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chat_data import make_list

from gmask.files import write_json_lines

SAME_NUMBERS = 0.3
"""The reward of the same numbers in a wrong order."""


def grade(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The reward: 1 for the numbers in their order and nothing else, `SAME_NUMBERS` in another order, else 0."""
    return [grade_answer(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def grade_answer(prompt: str, answer: str) -> float:
    asked = [int(number) for number in re.findall(r"\d+", prompt)]
    if not re.fullmatch(r"\d+((, |、)\d+)*[.。]", answer.strip()):
        return 0.0
    found = [int(number) for number in re.findall(r"\d+", answer)]
    return 1.0 if found == sorted(asked) else SAME_NUMBERS if sorted(found) == sorted(asked) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for name, count in (("validation", options.validation), ("train", options.train)):
        lists = [make_list(rng) for _ in range(count)]
        write_json_lines(
            options.out / f"{name}.jsonl",
            [{"instruction": asked["content"], "input": "", "output": answer["content"]} for asked, answer in lists],
        )
        print(f"{name}: {count} lists")


if __name__ == "__main__":
    main()
