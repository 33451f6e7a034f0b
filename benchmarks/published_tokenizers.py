"""How fast do the published vocabularies turn text into ids here, beside their slow paths and tiktoken?

    python benchmarks/published_tokenizers.py CORPUS VOCABULARIES [--json]

CORPUS holds a folder for each language with validation texts, `LANGUAGE/*.val.jsonl.zst`; VOCABULARIES a folder for
each kind of vocabulary (chinese, gpt2, bert, roberta), with its published files. One process, one thread; each
candidate encodes all the texts by one call, in turns with the others; the median round counts, in time of the CPU.
The slow path is transformers' own code in Python (the vocabulary of GPT-2 lives on in its CLVP) or, for the Chinese
vocabulary, the sentencepiece library by itself. All candidates for a vocabulary must find the same ids.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when tokenizers is first used

import regex
import sentencepiece
import tiktoken
from transformers import ClvpTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from gmask.tokenizers.folder import read_tokenizer
from machine import describe_machine
from tokenizer import read_groups

ROUNDS = 3
KINDS = ("chinese", "gpt2", "bert", "roberta")
Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Speed:
    """How fast one candidate encodes all the texts."""

    vocabulary: str
    candidate: str
    tokens_per_second: float
    times_slow_path: float


def by_class(kind: str, folder: Path) -> Encode:
    """Ours, by the call that users make."""
    tokenizer: Any = read_tokenizer(folder, kind=kind)
    return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def by_backend(kind: str, folder: Path) -> Encode:
    """Ours, by its `tokenizers` backend alone: what the call adds is transformers'."""
    backend = read_tokenizer(folder, kind=kind)._tokenizer
    return lambda texts: [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]


class PythonGPT2(ClvpTokenizer):
    """GPT-2's byte-level BPE in Python, with its cache of words."""

    def _tokenize(self, text: str) -> list[str]:
        words = regex.findall(self.pat, text)
        return [part for word in words for part in self.bpe("".join(map(self.byte_encoder.get, word.encode()))).split()]


def by_slow_path(kind: str, folder: Path) -> Encode:
    """sentencepiece itself, or a tokenizer of transformers in Python."""
    if kind == "chinese":
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "cog-pretrain.model"))
        return lambda texts: model.encode(texts, num_threads=1)
    if kind == "bert":
        slow: Any = BertTokenizerLegacy(str(folder / "vocab.txt"))
    else:
        special = {f"{role}_token": "<|endoftext|>" for role in ("unk", "bos", "eos", "pad")}
        slow = PythonGPT2(str(folder / "vocab.json"), str(folder / "merges.txt"), **special)
    return lambda texts: [slow.convert_tokens_to_ids(slow.tokenize(text)) for text in texts]


def by_tiktoken(folder: Path) -> Encode:
    """GPT-2's vocabulary in tiktoken: the ranks are the ids, but for the letters that spell the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    special = {"<|endoftext|>": vocabulary.pop("<|endoftext|>")}
    ranks = {bytes(byte_of[letter] for letter in word): index for word, index in vocabulary.items()}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=1)


def measure(kind: str, candidates: dict[str, Encode], texts: list[str]) -> list[Speed]:
    """Encode all the texts with every candidate, `ROUNDS` times in turns; the first candidate is the slow path."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    expected: list[list[int]] = []
    for _ in range(ROUNDS):
        for name, encode in candidates.items():
            start = time.process_time()
            ids = encode(texts)
            seconds[name].append(time.process_time() - start)
            expected = expected or ids
            if ids != expected:
                raise SystemExit(f"{name} of {kind} finds other ids")
    count = sum(map(len, expected))
    medians = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    slow = next(iter(medians.values()))
    return [Speed(kind, name, count / median, slow / median) for name, median in medians.items()]


def render(speeds: Sequence[Speed]) -> str:
    """A Markdown table."""
    rows = ["| vocabulary | encoded by | million tokens/s | times the slow path |", "| --- | --- | --: | --: |"]
    rows += [
        f"| {s.vocabulary} | {s.candidate} | {s.tokens_per_second / 1e6:.2f} | {s.times_slow_path:.2f} |"
        for s in speeds
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("vocabularies", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    texts = [text for group in read_groups(arguments.corpus, by_file=False).values() for text in group]
    speeds: list[Speed] = []
    for kind in KINDS:
        folder = arguments.vocabularies / kind
        slow_name = "sentencepiece" if kind == "chinese" else "transformers, in Python"
        candidates = {slow_name: by_slow_path(kind, folder), "ours": by_class(kind, folder)}
        if kind != "chinese":
            candidates["ours, the backend alone"] = by_backend(kind, folder)
        if kind == "gpt2":
            candidates["tiktoken"] = by_tiktoken(folder)
        speeds += measure(kind, candidates, texts)
    if arguments.json:
        print(json.dumps({"machine": describe_machine(1), "speeds": [asdict(s) for s in speeds]}, indent=2))
    else:
        print(render(speeds))


if __name__ == "__main__":
    main()
