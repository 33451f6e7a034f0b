"""The bundled model's answers to the plain sentences and openings, and how many of them count.

    python recipes/judge_sentences.py answer --model bundled --output answers.jsonl
    python recipes/judge_sentences.py count answers.jsonl FIRST-READER.json SECOND-READER.json --output JUDGED.jsonl

`answer` fills every sentence of plain_sentences.yaml twice: by the defaults of `gmask infill`, which take the most
probable token at every step, and by a search for the five best answers (``-n 5``); it continues every opening twice:
with the most probable tokens, and drawn as `DRAWN` says. Whether a continuation counts is decided by its rule here.
Each reader's file is a JSON list of true and false, one for each sentence in the order of answers.jsonl, made without
seeing the other's; a sentence counts if both say true.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

import gmask

HERE = Path(__file__).parent
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
WORD = re.compile(r"[A-Za-z]+(?:['’][a-z]+)?")
LENGTH = 40  # words or characters of a continuation that are looked at
DRAWN = {"temperature": 0.8, "top_p": 0.9, "seed": 0}
LONGEST_REPEAT = {"English": 4, "Chinese": 6}  # words or characters that may not come twice


def answer(model_name: str) -> list[dict[str, object]]:
    """One record for each sentence and opening."""
    plan = yaml.safe_load((HERE / "plain_sentences.yaml").read_text("utf-8"))
    model, tokenizer = gmask.load(model_name, dtype="float32")
    records: list[dict[str, object]] = []
    for language, texts in plan["sentences"].items():
        ranked = gmask.infill(model, tokenizer, texts, n=5)
        for way, filled_texts in (("greedy", gmask.infill(model, tokenizer, texts)), ("search", ranked)):
            for text, filled in zip(texts, filled_texts, strict=True):
                answers = [[blank.text for blank in other.blanks] for other in (filled, *filled.alternatives)]
                records.append(
                    {
                        "kind": "sentence",
                        "language": language,
                        "way": way,
                        "text": text,
                        "filled": filled.text,
                        "answers": answers,
                    }
                )
    for language, texts in plan["stories"].items():
        for text in texts:
            for way, settings in (("greedy", {}), ("drawn", DRAWN)):
                filled = gmask.infill(model, tokenizer, f"{text} [gMASK]", max_tokens=2 * LENGTH, **settings)
                units = units_of(filled.blanks[0].text, language)[:LENGTH]
                records.append(
                    {
                        "kind": "story",
                        "language": language,
                        "way": way,
                        "text": text,
                        "filled": filled.text,
                        "counts": is_sound(units, filled.blanks[0].text, language),
                    }
                )
    return records


def units_of(text: str, language: str) -> list[str]:
    """Words of an English text, characters of a Chinese one."""
    return WORD.findall(text) if language == "English" else HAN.findall(text)


def is_sound(units: Sequence[str], text: str, language: str) -> bool:
    """Whether a continuation is long enough, in the language of its opening, and without a loop."""
    size = LONGEST_REPEAT[language]
    runs = [tuple(units[start : start + size]) for start in range(len(units) - size + 1)]
    other = units_of(text, "Chinese" if language == "English" else "English")
    return len(units) >= LENGTH // 2 and len(other) <= len(units) // 10 and len(runs) == len(set(runs))


def judge(answers: Path, readers: Sequence[Path]) -> list[dict[str, object]]:
    """The records, each sentence with whether it counts."""
    records: list[dict[str, object]] = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
    sentences = [record for record in records if record["kind"] == "sentence"]
    verdicts = [json.loads(reader.read_text("utf-8")) for reader in readers]
    if any(len(verdict) != len(sentences) for verdict in verdicts):
        raise SystemExit(f"each reader judges {len(sentences)} sentences")
    for record, votes in zip(sentences, zip(*verdicts, strict=True), strict=True):
        record["counts"] = all(votes)
    return records


def count(records: Sequence[dict[str, object]]) -> dict[str, str]:
    """How many sentences and stories count, by language."""

    def share(kind: str, languages: Sequence[str], way: str) -> str:
        own = [r for r in records if (r["kind"], r["way"]) == (kind, way) and r["language"] in languages]
        return f"{sum(r['counts'] is True for r in own)} of {len(own)}"

    ways = {"sentence": ("greedy", "search"), "story": ("greedy", "drawn")}
    parts = {**{language: [language] for language in LONGEST_REPEAT}, "all": list(LONGEST_REPEAT)}
    return {
        name: ", ".join(f"{kind} {way} {share(kind, languages, way)}" for kind in ways for way in ways[kind])
        for name, languages in parts.items()
    }


def write(records: Sequence[dict[str, object]], path: Path) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    answering = verbs.add_parser("answer", help="let the model answer")
    answering.add_argument("--model", default="bundled")
    answering.add_argument("--output", type=Path, required=True)
    counting = verbs.add_parser("count", help="count what both readers accept")
    counting.add_argument("answers", type=Path)
    counting.add_argument("readers", type=Path, nargs=2)
    counting.add_argument("--output", type=Path, help="write the answers with their verdicts, for bundled_card.py")
    arguments = parser.parse_args()
    if arguments.verb == "answer":
        write(answer(arguments.model), arguments.output)
    else:
        records = judge(arguments.answers, arguments.readers)
        if arguments.output is not None:
            write(records, arguments.output)
        for language, line in count(records).items():
            print(f"{language}: {line}")


if __name__ == "__main__":
    main()
