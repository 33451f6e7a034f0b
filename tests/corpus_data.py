"""A synthetic corpus with planted duplicates, contamination and faulty documents, of any size; also a program.

    python tests/corpus_data.py FOLDER --megabytes 2000

writes JSON lines in English and Chinese, an evaluation set, `planted.json`, which says which documents must be dropped
and why, a tokenizer, and a recipe for `gmask prepare`. The texts are of made-up words, so that two of them share no
sequence of five by chance; each document has a number, and its id is the field "id".
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer

from gmask.training.tokenizer import save_tokenizer, train_tokenizer

SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "an", "er")]
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
FILES = 4  # of each language
EVALUATION_TEXTS = 50
PLANTED = {"exact_duplicate": 0.03, "near_duplicate": 0.03, "contamination": 0.02, "min_units": 0.02}
"""Shares of all documents."""

EDITS = 0.005
"""The share of the words of a near duplicate that are others. At least 0.93 of its sequences of 5 are then common, and
14 bands of 8 hashes miss one in a hundred thousand."""


def make_words(rng: random.Random, count: int) -> list[str]:
    return sorted({"".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(2 * count)})[:count]


class TextMaker:
    """Makes texts of random words or Han characters."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.words = make_words(random.Random(0), 20_000)

    def units(self, language: str, count: int) -> list[str]:
        return self.rng.choices(HAN if language == "zh" else self.words, k=count)

    def other(self, language: str, unit: str) -> str:
        """A unit that is not this one."""
        while (found := self.units(language, 1)[0]) == unit:
            pass
        return found

    def join(self, language: str, units: list[str]) -> str:
        sentences = [units[start : start + 15] for start in range(0, len(units), 15)]
        if language == "zh":
            return "".join("".join(sentence) + "。" for sentence in sentences)
        return " ".join(" ".join(sentence).capitalize() + "." for sentence in sentences)


def make_documents(language: str, total_bytes: int, maker: TextMaker, evaluation: list[list[str]]) -> Iterator[Any]:
    """The documents of a language, each with its id and the reason for which it must be dropped, or None."""
    rng, written, number = maker.rng, 0, 0
    recent: list[list[str]] = []  # units of originals that copies are made of
    while written < total_bytes:
        kind = rng.random()
        bounds, reason = 0.0, None
        for name, share in PLANTED.items():
            bounds += share
            if kind < bounds:
                reason = name
                break
        if reason in ("exact_duplicate", "near_duplicate") and not recent:
            reason = None
        units = maker.units(language, rng.randint(200, 500))
        if reason == "exact_duplicate":
            units = recent.pop(rng.randrange(len(recent)))
        elif reason == "near_duplicate":
            units = recent.pop(rng.randrange(len(recent)))
            edited = set(rng.sample(range(len(units)), max(1, round(EDITS * len(units)))))
            units = [maker.other(language, unit) if at in edited else unit for at, unit in enumerate(units)]
        elif reason == "contamination":
            shared = rng.choice(evaluation)
            start, at = rng.randrange(len(shared) - 20), rng.randrange(len(units))
            units[at:at] = shared[start : start + 20]
        elif reason == "min_units":
            units = units[:10]
        elif len(recent) < 2000 and rng.random() < 0.1:
            recent.append(units)
        text = maker.join(language, units)
        if reason == "exact_duplicate" and language == "en":
            text = text.upper().replace(". ", ".\n\n")
        yield {"text": text, "id": f"{language}-{number}"}, reason
        written += len(text.encode())
        number += 1


def write_corpus(folder: Path, megabytes: float, *, seed: int = 0, vocab_size: int = 1000) -> dict[str, str]:
    """Writes the corpus, its recipe and a tokenizer; returns the ids of the planted documents with their reasons."""
    folder.mkdir(parents=True, exist_ok=True)
    maker = TextMaker(seed)
    evaluation = {language: [maker.units(language, 60) for _ in range(EVALUATION_TEXTS)] for language in ("en", "zh")}
    lines = [
        json.dumps({"question": maker.join(language, units), "answer": "yes"}, ensure_ascii=False)
        for language, texts in evaluation.items()
        for units in texts
    ]
    (folder / "evaluation.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    planted, sample = dict[str, str](), list[str]()
    for language in ("en", "zh"):
        documents = make_documents(language, int(megabytes * 1e6 / 2), maker, evaluation[language])
        files = [(folder / f"{language}.{index}.jsonl").open("w", encoding="utf-8") for index in range(FILES)]
        written, part = 0, megabytes * 1e6 / 2 / FILES
        for record, reason in documents:
            files[min(int(written / part), FILES - 1)].write(json.dumps(record, ensure_ascii=False) + "\n")
            written += len(record["text"].encode())
            if reason is not None:
                planted[record["id"]] = reason
            elif len(sample) < 300:
                sample.append(record["text"])
        for file in files:
            file.close()
    (folder / "planted.json").write_text(json.dumps(planted), "utf-8")
    save_tokenizer(train_tokenizer(sample, vocab_size=vocab_size), folder / "tokenizer")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(make_recipe(folder)), "utf-8")
    return planted


def make_recipe(folder: Path) -> dict[str, Any]:
    """The plain values of a recipe that prepares the corpus."""
    return {
        "run": {"out": str(folder / "prepared")},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {
            "root": str(folder),
            "sources": [
                {"name": "en", "train": "en.*.jsonl", "weight": 2},
                {"name": "zh", "train": "zh.*.jsonl", "weight": 1},
            ],
        },
        "decontamination": {"root": str(folder), "files": ["evaluation.jsonl"]},
    }


def read_kept(out: Path, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """The texts of each source that a preparation kept, in their order."""
    from gmask.corpus.preparation import open_prepared

    return {
        source.name: [tokenizer.decode(source.document(index).tolist()) for index in range(len(source))]
        for source in open_prepared(out, tokenizer)
    }


def check_prepared(folder: Path, out: Path) -> dict[str, int]:
    """Holds a preparation against what was planted.

    Returns:
        "missed", planted documents of each reason that were kept; "lost", others that were dropped.
    """
    planted = json.loads((folder / "planted.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    kept = {text for texts in read_kept(out, tokenizer).values() for text in texts}
    found = {f"missed {reason}": 0 for reason in PLANTED} | {"lost": 0, "planted": len(planted), "documents": 0}
    for path in sorted(folder.glob("*.?.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                found["documents"] += 1
                reason = planted.get(record["id"])
                # An exact duplicate in Chinese is its original letter by letter: the text is kept, once.
                if reason is not None and record["text"] in kept and reason != "exact_duplicate":
                    found[f"missed {reason}"] += 1
                elif reason is None and record["text"] not in kept:
                    found["lost"] += 1
    report = json.loads((out / "report" / "report.json").read_text("utf-8"))["sources"]
    for reason in PLANTED:
        counted = sum(source["dropped"].get(reason, {"documents": 0})["documents"] for source in report.values())
        found[f"reported {reason}"] = counted
        found[f"planted {reason}"] = sum(one == reason for one in planted.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument(
        "--check", type=Path, metavar="OUT", help="hold a finished preparation against what was planted"
    )
    arguments = parser.parse_args()
    if arguments.check:
        found = check_prepared(arguments.folder, arguments.check)
        print(json.dumps(found, indent=1))
        sys.exit(any(count for name, count in found.items() if name.startswith(("missed", "lost"))))
    planted = write_corpus(arguments.folder, arguments.megabytes, vocab_size=8000 if arguments.megabytes > 10 else 1000)
    print(f"{arguments.folder}: {len(planted)} documents to be dropped; gmask prepare {arguments.folder}/recipe.yaml")


if __name__ == "__main__":
    main()
