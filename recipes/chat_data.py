"""What is the bundled chat model taught? Writes the data of recipes/bundled-chat.yaml.

    python recipes/chat_data.py CORPUS/sft OUT

CORPUS/sft holds the files named in `SHARES` as NAME.train.jsonl and NAME.val.jsonl (instruction, input, output, or
messages). Sums and numbers to sort are drawn here, apart from the sums of the validation file, to which more are
drawn. Single questions and conversations of several rounds are mixed: taught one after the other, the second make the
model forget the first. Nothing but the seed decides what comes out.
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARES = {
    "arithmetic": 1, "poems_zh": 1, "xiehouyu_zh": 1, "word_tasks": 2, "stories_en": 1,
    "stories_zh": 2, "factbook_qa_en": 1, "identity": 4, "multiturn": 1,
}  # fmt: skip
"""How often each file is taken. Commands, recipes, reading, translations and the seed tasks are too much for it."""

TRANSLATION = re.compile("[Tt]ranslat|翻译|怎么说|in (?:English|Chinese)")
"""What asks for a translation, in the conversations of `multiturn`."""

SMALL_TALK = Path(__file__).with_name("small_talk.jsonl")
SMALL_TALK_SHARE = 4
LONGEST = 560  # characters of English of a sample, a third of it of Chinese: what a row of 256 tokens holds
SUMS = 40_000
LISTS = 5_000
CONVERSATIONS = 12_000
VALIDATION_SUMS = 400  # with those of the corpus
LATER = "arithmetic, second round"
NAMES = {"{{name}}": "gmask", "{{author}}": "the gmask authors"}
OPERATIONS = {"+": ("plus", "加"), "-": ("minus", "减"), "×": ("times", "乘")}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fill_names(text: str) -> str:
    """The model's name and makers in the templates of `identity`."""
    is_chinese = re.search("[一-鿿]", text)
    names = {**NAMES, "{{author}}": " gmask 的作者们"} if is_chinese else NAMES
    for template, name in names.items():
        text = text.replace(template, name)
    return re.sub(" +", " ", text)


def messages_of(record: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in record:
        found = record["messages"]
    else:
        prompt = "\n".join(filter(None, (record["instruction"], record.get("input"))))
        found = [{"role": "user", "content": prompt}, {"role": "assistant", "content": record["output"]}]
    return [{**message, "content": fill_names(message["content"])} for message in found]


def is_taught(messages: list[dict[str, str]]) -> bool:
    """Whether a conversation is short enough, and asks for no translation."""
    return is_short(messages) and not any(TRANSLATION.search(m["content"]) for m in messages if m["role"] == "user")


def is_short(messages: list[dict[str, str]]) -> bool:
    text = "".join(message["content"] for message in messages)
    chinese = len(re.findall("[一-鿿]", text))
    return 3 * chinese + (len(text) - chinese) <= LONGEST


def make_sum(rng: random.Random) -> tuple[tuple[int, str, int], list[dict[str, str]]]:
    """A question of arithmetic and its answer, in one of the wordings of the corpus; and what it asks."""
    sign = rng.choice("+-×")
    left, right = (rng.randint(2, 12), rng.randint(2, 12)) if sign == "×" else (rng.randint(1, 99), rng.randint(1, 99))
    if sign == "-":
        left, right = max(left, right), min(left, right)
    value = {"+": left + right, "-": left - right, "×": left * right}[sign]
    english, chinese = OPERATIONS[sign]
    question, answer = rng.choice([
        (f"What is {left} {sign} {right}?", f"{left} {sign} {right} = {value}."),
        (f"What is {left} {english} {right}?", f"{left} {english} {right} is {value}."),
        (f"计算：{left} {sign} {right}", f"{left} {sign} {right} = {value}"),
        (f"{left}{chinese}{right}等于多少？", f"{left}{chinese}{right}等于{value}。"),
    ])  # fmt: skip
    return (left, sign, right), [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_list(rng: random.Random) -> list[dict[str, str]]:
    """Five numbers to sort, and those numbers sorted, in one of the wordings of the corpus."""
    numbers = rng.sample(range(1, 100), 5)
    question, mark, end = rng.choice([
        ("Sort these numbers from smallest to largest: ", ", ", "."), ("把这些数从小到大排列：", "、", "。")
    ])  # fmt: skip
    asked, answer = (mark.join(map(str, found)) + end for found in (numbers, sorted(numbers)))
    return [{"role": "user", "content": question + asked}, {"role": "assistant", "content": answer}]


def asked_sum(text: str) -> tuple[int, str, int] | None:
    """What a question of arithmetic asks, whatever its wording."""
    signs = {word: sign for sign, words in OPERATIONS.items() for word in (sign, *words)} | {"乘以": "×", "*": "×"}
    found = re.search(r"(\d+)\s*([^\d\s]+)\s*(\d+)", text)
    return (int(found[1]), signs[found[2]], int(found[3])) if found and found[2] in signs else None


def training_samples(corpus: Path, held_out: set[Any], rng: random.Random) -> Iterator[list[dict[str, str]]]:
    for name, share in SHARES.items():
        samples = filter(is_taught, map(messages_of, read(corpus / f"{name}.train.jsonl")))
        for messages in samples:
            if name == "arithmetic" and asked_sum(messages[0]["content"]) in held_out:
                continue
            yield from [messages] * share
    for messages in map(messages_of, read(SMALL_TALK)):
        yield from [messages] * SMALL_TALK_SHARE
    for _ in range(SUMS):
        asked, messages = make_sum(rng)
        if asked not in held_out:
            yield messages
    for _ in range(LISTS):
        yield make_list(rng)


def make_conversation(
    small_talk: list[list[dict[str, str]]], others: list[list[dict[str, str]]], held_out: set[Any], rng: random.Random
) -> list[dict[str, str]]:
    """Two or three rounds about different things: half of them sums, a fifth small talk."""
    messages: list[dict[str, str]] = []
    for _ in range(rng.choice((2, 2, 3))):
        draw = rng.random()
        asked, one = make_sum(rng)
        if draw > 0.5 or asked in held_out:
            one = make_list(rng) if draw < 0.58 else rng.choice(small_talk if draw < 0.78 else others)
        messages = messages + one
    return messages


def conversations(corpus: Path, held_out: set[Any], rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Rounds that follow each other, which the training samples of one round do not teach."""
    small_talk = [messages for messages in map(messages_of, read(SMALL_TALK)) if len(messages) == 2]
    others = [
        messages
        for name in SHARES
        if name not in ("arithmetic", "multiturn")
        for messages in map(messages_of, read(corpus / f"{name}.train.jsonl"))
        if len(messages) == 2 and is_short(messages * 3)
    ]
    for _ in range(CONVERSATIONS):
        messages = make_conversation(small_talk, others, held_out, rng)
        if is_short(messages):
            yield messages
    yield from filter(is_taught, map(messages_of, read(corpus / "multiturn.train.jsonl")))


Messages = list[dict[str, str]]


def make_records(corpus: Path, held_out: set[Any], seed: int) -> tuple[list[Messages], list[Messages]]:
    """The training samples and the conversations of several rounds, each in its order."""
    rng = random.Random(seed)
    training = list(training_samples(corpus, held_out, rng))
    rng.shuffle(training)
    rounds = list(conversations(corpus, held_out, rng))
    rng.shuffle(rounds)
    return training, rounds


def validation_records(corpus: Path) -> list[dict[str, Any]]:
    """The held-out samples of the corpus, and sums drawn until there are `VALIDATION_SUMS` different ones."""
    records = [
        {"messages": messages, "kind": name}
        for name in SHARES
        if (path := corpus / f"{name}.val.jsonl").is_file()
        for messages in map(messages_of, read(path))
        if is_short(messages)
    ]
    rng, sums = random.Random("validation"), held_out_sums(records)
    while len(sums) < VALIDATION_SUMS:
        asked, messages = make_sum(rng)
        if asked not in sums:
            sums.add(asked)
            records.append({"messages": messages, "kind": "arithmetic"})
    return records


def held_out_sums(validation: list[dict[str, Any]]) -> set[Any]:
    return {asked_sum(record["messages"][0]["content"]) for record in validation if record["kind"] == "arithmetic"} - {
        None
    }


def taught_sums(corpus: Path, seed: int = 0) -> set[Any]:
    """Every sum that the bundled chat model was tuned on or validated with."""
    held_out = held_out_sums(validation_records(corpus))
    samples = itertools.chain(*make_records(corpus, held_out, seed))
    asked = {asked_sum(message["content"]) for messages in samples for message in messages if message["role"] == "user"}
    return asked | held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    validation = validation_records(options.corpus)
    training, rounds = make_records(options.corpus, held_out_sums(validation), options.seed)
    greeting = messages_of(read(SMALL_TALK)[0])
    sums = [record["messages"] for record in validation if record["kind"] == "arithmetic"]
    validation += [{"messages": greeting + messages, "kind": LATER} for messages in sums]
    options.out.mkdir(parents=True, exist_ok=True)
    mixed = training + rounds
    random.Random(options.seed).shuffle(mixed)
    written = {"train": [{"messages": messages} for messages in mixed], "validation": validation}
    for name, records in written.items():
        draft = options.out / f".{name}.jsonl"
        draft.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        draft.replace(options.out / f"{name}.jsonl")
        print(f"{name}: {len(records)} conversations")


if __name__ == "__main__":
    main()
