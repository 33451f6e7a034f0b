"""The bundled model's answers to the plain sentences and openings, and how many of them count.

    python recipes/judge_sentences.py answer --model bundled --output answers.jsonl
    python recipes/judge_sentences.py count answers.jsonl FIRST-READER.json SECOND-READER.json

`answer` fills every sentence of plain_sentences.yaml once, greedily, and continues every opening; whether a
continuation counts is decided by its rule here. Each reader's file is a JSON list of true and false, one for each
sentence in the order of answers.jsonl, made without seeing the other's; a sentence counts if both say true.
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
LONGEST_REPEAT = {"English": 4, "Chinese": 6}  # words or characters that may not come twice


def answer(model_name: str) -> list[dict[str, object]]:
    """One record for each sentence and opening."""
    plan = yaml.safe_load((HERE / "plain_sentences.yaml").read_text("utf-8"))
    model, tokenizer = gmask.load(model_name, dtype="float32")
    records: list[dict[str, object]] = []
    for language, texts in plan["sentences"].items():
        for text, filled in zip(texts, gmask.infill(model, tokenizer, texts, n=5), strict=True):
            answers = [[blank.text for blank in other.blanks] for other in (filled, *filled.alternatives)]
            records.append(
                {"kind": "sentence", "language": language, "text": text, "filled": filled.text, "answers": answers}
            )
    for language, texts in plan["stories"].items():
        for text in texts:
            filled = gmask.infill(model, tokenizer, f"{text} [gMASK]", max_tokens=2 * LENGTH)
            units = units_of(filled.blanks[0].text, language)[:LENGTH]
            records.append(
                {
                    "kind": "story",
                    "language": language,
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


def count(answers: Path, readers: Sequence[Path]) -> dict[str, str]:
    """How many sentences and stories count, by language."""
    records = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
    sentences = [record for record in records if record["kind"] == "sentence"]
    verdicts = [json.loads(reader.read_text("utf-8")) for reader in readers]
    if any(len(verdict) != len(sentences) for verdict in verdicts):
        raise SystemExit(f"each reader judges {len(sentences)} sentences")
    accepted = [all(votes) for votes in zip(*verdicts, strict=True)]
    table = {}
    for language in LONGEST_REPEAT:
        own = [ok for record, ok in zip(sentences, accepted, strict=True) if record["language"] == language]
        stories = [
            record["counts"] for record in records if (record["kind"], record["language"]) == ("story", language)
        ]
        table[language] = f"{sum(own)} of {len(own)} sentences, {sum(stories)} of {len(stories)} stories"
    table["all"] = f"{sum(accepted)} of {len(accepted)} sentences"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    answering = verbs.add_parser("answer", help="let the model answer")
    answering.add_argument("--model", default="bundled")
    answering.add_argument("--output", type=Path, required=True)
    counting = verbs.add_parser("count", help="count what both readers accept")
    counting.add_argument("answers", type=Path)
    counting.add_argument("readers", type=Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.verb == "answer":
        lines = [json.dumps(record, ensure_ascii=False) for record in answer(arguments.model)]
        arguments.output.write_text("\n".join(lines) + "\n", "utf-8")
    else:
        for language, line in count(arguments.answers, arguments.readers).items():
            print(f"{language}: {line}")


if __name__ == "__main__":
    main()
