"""What a model makes of its own answers: samples answers to questions, and writes what may be learnt from them.

    python recipes/own_answers.py bundled-chat data/sums/train.jsonl OUT
        [--reward sums:grade] [--answers 8] [--limit 1000] [--seed 1]

An answer is right if its reward is 1. OUT gets three files. mixed.jsonl: the questions of which some answers are right
and some wrong; of the others a group of answers teaches nothing (for gmask grpo and ppo). pairs.jsonl: a right and a
wrong answer to each of them (for gmask dpo). right.jsonl: the different right answers to each question, of all of them
(for gmask finetune; expert iteration).
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gmask import load
from gmask.files import write_json_lines
from gmask.generation.predict import SampleReader
from gmask.generation.settings import Sampling
from gmask.recipes.tuning import TuningDataSettings
from gmask.tasks.records import Sample
from gmask.tasks.task import read_task
from gmask.training.rollouts import Rollout, RolloutWriter, load_function, read_prompt_splits, rollout_seeds

MAX_SOURCE, MAX_TARGET = 48, 24


def read_questions(path: Path, limit: int | None = None) -> Sequence[Sample]:
    """The questions of a file that recipes/sums.py or sorting.py wrote."""
    data = TuningDataSettings(train=path.name, root=str(path.parent), limit=limit)
    return read_prompt_splits(read_task({"use": "chat/alpaca"}), data, seed=0).train


def write_answers(
    model: Any, tokenizer: Any, samples: Sequence[Sample], *, answers: int = 1, temperature: float = 0.0, seed: int = 0
) -> list[list[Rollout]]:
    """So many answers to each question; at temperature 0 the most probable one."""
    reader = SampleReader(tokenizer, model.config, "chat", max_source=MAX_SOURCE)
    writer = RolloutWriter(model, tokenizer, reader, rows=256)
    sampling = Sampling(n=answers, max_tokens=MAX_TARGET, min_tokens=0, temperature=temperature)
    with torch.inference_mode():
        return writer.write(writer.read(samples), sampling, seeds=rollout_seeds(seed, 0, range(len(samples))))


def load_reward(name: str) -> Any:
    """The reward of a recipe's ``reward.function``, which lies beside this file."""
    return load_function(name, [Path(__file__).parent])


def split_by_reward(reward: Any, question: str, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The different right answers to a question, and the different wrong ones, in their order."""
    right: list[str] = []
    wrong: list[str] = []
    different = list(dict.fromkeys(texts))
    for text, found in zip(different, reward([question] * len(different), different), strict=True):
        (right if found == 1.0 else wrong).append(text)
    return right, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reward", default="sums:grade", help="module:function, beside this file")
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    samples, rng = read_questions(options.questions, options.limit), random.Random(options.seed)
    reward = load_reward(options.reward)
    found = write_answers(
        *load(options.model, dtype=torch.float32), samples, answers=options.answers, temperature=1.0, seed=options.seed
    )
    records: dict[str, list[dict[str, str]]] = {"mixed": [], "pairs": [], "right": []}
    for sample, group in zip(samples, found, strict=True):
        right, wrong = split_by_reward(reward, sample.text, [one.text for one in group])
        asked = {"instruction": sample.text, "input": ""}
        records["right"] += [asked | {"output": text} for text in right]
        if right and wrong:
            records["mixed"].append(asked | {"output": right[0]})
            pair = {"prompt": sample.text, "chosen": rng.choice(right), "rejected": rng.choice(wrong)}
            records["pairs"].append(pair)
    for name, found_records in records.items():
        write_json_lines(options.out / f"{name}.jsonl", found_records)
        print(f"{name}.jsonl: {len(found_records)}")


if __name__ == "__main__":
    main()
