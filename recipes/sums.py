"""Sums as a task with a reward: draws sums, and checks an answer. For recipes/grpo-sums.yaml and ppo-sums.yaml.

    python recipes/sums.py OUT [--corpus CORPUS/sft] [--train 4000] [--validation 1200] [--seed 1]

Additions and subtractions, in the ranges of recipes/chat_data.py; of products there are 121 in all, so that none is
new. validation.jsonl asks in the wordings that the bundled chat model was taught, reworded.jsonl asks the same sums in
wordings that it was not, and train.jsonl asks other sums, half of them in each way. With ``--corpus``, of which the
data of bundled-chat was made, the sums of the first two were not taught to it in any wording: what was drawn for it is
drawn again here and left out. Without it that holds for its single questions alone: the conversations of several rounds
hang on the other files of the corpus.
"""

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chat_data import OPERATIONS, SUMS, asked_sum, make_sum, taught_sums

from gmask.files import write_json_lines

ANSWER = re.compile(r"(\d+)\s*([^\d\s]+)\s*(\d+)\s*(?:=|is|等于)\s*(-?\d+)\s*[.。]?")
PRODUCTS = {(left, "×", right) for left in range(2, 13) for right in range(2, 13)}
NEW_WORDINGS = (
    ("{left} {sign} {right} = ?", "{left} {sign} {right} = {value}."),
    ("How much is {left} {english} {right}?", "{left} {english} {right} is {value}."),
    ("计算：{left}{chinese}{right}", "{left}{chinese}{right}等于{value}"),
    ("请问{left}{chinese}{right}是多少？", "{left}{chinese}{right}等于{value}。"),
    ("{left}{sign}{right}等于多少？", "{left}{sign}{right}等于{value}。"),
)
"""Questions that are not among those of recipes/chat_data.py, and their answers."""
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


def reword(asked: tuple[int, str, int], rng: random.Random) -> dict[str, str]:
    """A sum in one of the new wordings."""
    left, sign, right = asked
    english, chinese = OPERATIONS[sign]
    words = {"left": left, "sign": sign, "right": right, "english": english, "chinese": chinese}
    question, answer = rng.choice(NEW_WORDINGS)
    answer = answer.format(**words, value=result_of(*asked))
    return {"instruction": question.format(**words), "input": "", "output": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, help="CORPUS/sft, as of recipes/chat_data.py")
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--validation", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng, taught = random.Random(options.seed), drawn_for_tuning() | PRODUCTS
    if options.corpus:
        taught |= taught_sums(options.corpus)
    validation = draw(options.validation, taught, rng)
    train = draw(options.train, {*validation, *PRODUCTS}, rng)
    splits = {
        "validation": list(validation.values()),
        "reworded": [reword(asked, rng) for asked in validation],
        "train": [reword(asked, rng) if index % 2 else record for index, (asked, record) in enumerate(train.items())],
    }
    for name, sums in splits.items():
        write_json_lines(options.out / f"{name}.jsonl", sums)
        print(f"{name}: {len(sums)} sums")


if __name__ == "__main__":
    main()
