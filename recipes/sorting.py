"""Sorting five numbers or five words as a task with a reward: draws lists, and checks an answer. For
recipes/grpo-sorting.yaml (numbers) and ppo-words.yaml (words).

    python recipes/sorting.py OUT [--items words] [--corpus CORPUS/sft] [--train 1000] [--validation 500] [--seed 1]

Wordings are those that the bundled chat model was taught. Numbers have the ranges of recipes/chat_data.py: of 7
thousand million lists, bundled-chat was taught 5,000. Words are five of the twenty that it was taught to put in
alphabetical order: there are 15,504 such fives, of which it was taught 183. No five words are in both files, in any
order; with ``--corpus`` those that it was taught are in neither.
"""

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chat_data import make_list, messages_of, read

from gmask.files import write_json_lines

WORDS = re.findall(
    "[a-z]+",
    "apple bird bread flower forest garden horse kitchen letter mountain "
    "music ocean river school summer table teacher window winter yellow",
)
WORDING = "Sort these words in alphabetical order: "
SAME_ITEMS = 0.3
"""The reward of the same numbers or words in a wrong order."""


def grade(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The reward: 1 for what was asked in its order and nothing else, `SAME_ITEMS` in another order, else 0."""
    return [grade_answer(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def grade_answer(prompt: str, answer: str) -> float:
    asked, item = items_of(prompt), r"\d+" if prompt[-2].isdigit() else "[a-z]+"
    if not re.fullmatch(rf"{item}((, |、){item})*[.。]", answer.strip()):
        return 0.0
    found = items_of(answer)
    return 1.0 if found == sorted(asked) else SAME_ITEMS if sorted(found) == sorted(asked) else 0.0


def items_of(text: str) -> list[Any]:
    """The numbers of a question or an answer, or else its words."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return numbers or re.findall("[a-z]+", re.split("[:：]", text)[-1])


def draw_words(count: int, excluded: set[frozenset[str]], rng: random.Random) -> list[dict[str, str]]:
    """So many questions of five words each, which are no five of the excluded ones; adds them to those."""
    found: list[dict[str, str]] = []
    while len(found) < count:
        words = rng.sample(WORDS, 5)
        if frozenset(words) not in excluded:
            excluded.add(frozenset(words))
            question, answer = (", ".join(one) + "." for one in (words, sorted(words)))
            found.append({"instruction": WORDING + question, "input": "", "output": answer})
    return found


def draw_numbers(count: int, rng: random.Random) -> list[dict[str, str]]:
    lists = [make_list(rng) for _ in range(count)]
    return [{"instruction": asked["content"], "input": "", "output": answer["content"]} for asked, answer in lists]


def taught_lists(corpus: Path) -> set[frozenset[str]]:
    """The words of every question that the corpus asks in this wording."""
    paths = [path for name in ("word_tasks", "multiturn") for path in corpus.glob(f"{name}.*.jsonl")]
    records = (record for path in paths for record in read(path))
    asked = (message["content"] for record in records for message in messages_of(record) if message["role"] == "user")
    return {frozenset(items_of(text)) for text in asked if text.startswith(WORDING)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", choices=("numbers", "words"), default="numbers")
    parser.add_argument("--corpus", type=Path, help="CORPUS/sft, as of recipes/chat_data.py")
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    excluded = taught_lists(options.corpus) if options.corpus else set()
    for name, count in (("validation", options.validation), ("train", options.train)):
        lists = draw_numbers(count, rng) if options.items == "numbers" else draw_words(count, excluded, rng)
        write_json_lines(options.out / f"{name}.jsonl", lists)
        print(f"{name}: {len(lists)} lists")


if __name__ == "__main__":
    main()
