"""How good are a GLM's pooled hidden states as sentence vectors, beside a bag of words?

    python benchmarks/embedding.py CORPUS [--model bundled] [--layers -1] [--json]

CORPUS holds ``pretrain/bilingual/tatoeba.val.jsonl.zst`` (a text is lines of Chinese and English in turn) and
``eval/cmrc2018/cmrc2018_dev_150.json`` (SQuAD form). Two searches: for each Chinese sentence its English translation,
and for each question the paragraph that answers it. The figure is the share of queries whose nearest vector by cosine
is the right one. The bag of words counts the tokens of the same tokenizer, weighted by inverse document frequency.
"""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import zstandard

import gmask
from gmask.generation.embed import Pooling, embed


def read_translations(corpus: Path) -> tuple[list[str], list[str], list[int]]:
    """Chinese sentences, English sentences, and which English one belongs to each Chinese one."""
    with zstandard.open(corpus / "pretrain/bilingual/tatoeba.val.jsonl.zst", "rt", encoding="utf-8") as file:
        lines = [line for document in file for line in json.loads(document)["text"].split("\n")]
    return lines[::2], lines[1::2], list(range(len(lines) // 2))


def read_questions(corpus: Path) -> tuple[list[str], list[str], list[int]]:
    """Questions, paragraphs, and which paragraph answers each question."""
    values = json.loads((corpus / "eval/cmrc2018/cmrc2018_dev_150.json").read_text("utf-8"))
    paragraphs = [paragraph for article in values["data"] for paragraph in article["paragraphs"]]
    questions = [(qa["question"], index) for index, found in enumerate(paragraphs) for qa in found["qas"]]
    return [text for text, _ in questions], [found["context"] for found in paragraphs], [i for _, i in questions]


def count_words(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Weighted counts of tokens ``[N, V]``, each row of length 1."""
    counts = np.zeros((len(texts), len(tokenizer)), np.float32)
    for row, text in enumerate(texts):
        np.add.at(counts[row], tokenizer(text, add_special_tokens=False)["input_ids"], 1)
    counts *= np.log((1 + len(texts)) / (1 + (counts > 0).sum(0)))
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def find_share(queries: np.ndarray, targets: np.ndarray, right: list[int]) -> float:
    """The share of queries whose nearest target is the right one."""
    return float(((queries @ targets.T).argmax(1) == np.array(right)).mean())


def measure(model: Any, tokenizer: Any, corpus: Path, layers: list[int]) -> list[dict[str, Any]]:
    records = []
    for name, read in (("translation", read_translations), ("paragraph", read_questions)):
        queries, targets, right = read(corpus)
        words = count_words(tokenizer, [*queries, *targets])
        record = {"search": name, "queries": len(queries), "targets": len(targets), "chance": 1 / len(targets)}
        record["bag of words"] = find_share(words[: len(queries)], words[len(queries) :], right)
        for pooling in get_args(Pooling):
            for layer in layers:
                keywords = {"pooling": pooling, "layer": layer, "truncate": True}
                vectors = [embed(model, tokenizer, texts, **keywords) for texts in (queries, targets)]
                record[f"{pooling}, layer {layer}"] = find_share(*vectors, right)
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", default="bundled", help="a GLM's folder")
    parser.add_argument("--layers", type=int, nargs="+", default=[-1, 3])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    records = measure(*gmask.load(options.model, device="cpu"), options.corpus, options.layers)
    if options.json:
        print(json.dumps(records))
        return
    for record in records:
        print(f"\n{record.pop('search')}: {record.pop('queries')} queries, {record.pop('targets')} targets\n")
        print("| vectors | nearest is right |\n|---|---:|")
        for name, share in record.items():
            print(f"| {name} | {share:.1%} |")


if __name__ == "__main__":
    main()
