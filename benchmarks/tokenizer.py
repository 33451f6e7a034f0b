"""How many characters does a token of ours hold, and how fast is it found, beside GPT-2 and cog-pretrain?

    python benchmarks/tokenizer.py CORPUS --ours FOLDER... [--gpt2 VOCAB.json.gz MERGES.txt.gz]
        [--cog cog-pretrain.model] [--by-file] [--json]

CORPUS holds a folder for each language with validation texts, `LANGUAGE/*.val.jsonl.zst`. One process, one
thread; the tokenizers are timed in turns on all the texts together and the median round counts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when tokenizers is first used

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gmask.tasks.records import find_files, read_texts

ROUNDS = 5


@dataclass(frozen=True)
class Candidate:
    """A tokenizer to be measured."""

    name: str
    vocabulary: int
    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]


@dataclass(frozen=True)
class Measurement:
    """What one tokenizer makes of all the texts."""

    tokenizer: str
    vocabulary: int
    chars_per_token: dict[str, float]  # by group of texts
    returned_verbatim: float  # share of the texts
    tokens_per_second: float
    megabytes_per_second: float  # of UTF-8


def measure(candidates: Sequence[Candidate], groups: dict[str, list[str]]) -> list[Measurement]:
    """Encode all the texts with every candidate, `ROUNDS` times in turns."""
    texts = [text for group in groups.values() for text in group]
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for _ in range(ROUNDS):
        for candidate in candidates:
            start = time.perf_counter()
            candidate.encode(texts)
            seconds[candidate.name].append(time.perf_counter() - start)
    return [describe(candidate, groups, statistics.median(seconds[candidate.name])) for candidate in candidates]


def describe(candidate: Candidate, groups: dict[str, list[str]], seconds: float) -> Measurement:
    """Count tokens by group, and texts that come back as they were."""
    chars_per_token: dict[str, float] = {}
    tokens = texts = verbatim = size = 0
    for group, members in groups.items():
        encoded = candidate.encode(members)
        count = sum(map(len, encoded))
        chars_per_token[group] = sum(map(len, members)) / count
        tokens += count
        texts += len(members)
        size += sum(len(text.encode()) for text in members)
        verbatim += sum(candidate.decode(ids) == text for ids, text in zip(encoded, members, strict=True))
    return Measurement(
        tokenizer=candidate.name,
        vocabulary=candidate.vocabulary,
        chars_per_token=chars_per_token,
        returned_verbatim=verbatim / texts,
        tokens_per_second=tokens / seconds,
        megabytes_per_second=size / seconds / 1e6,
    )


def from_tokenizers(name: str, tokenizer: Tokenizer) -> Candidate:
    """A tokenizer of the `tokenizers` library."""

    def encode(texts: list[str]) -> list[list[int]]:
        return [row.ids for row in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    return Candidate(name, tokenizer.get_vocab_size(), encode, decode)


def from_sentencepiece(name: str, path: Path) -> Candidate:
    """A SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def encode(texts: list[str]) -> list[list[int]]:
        return model.encode(texts, num_threads=1)

    return Candidate(name, model.vocab_size(), encode, model.decode)


def load_gpt2(vocab: Path, merges: Path) -> Tokenizer:
    """GPT-2's byte-level BPE from its two published files, gzipped."""
    pairs = gzip.decompress(merges.read_bytes()).decode().splitlines()
    pairs = [tuple(line.split(" ")) for line in pairs if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocab=json.loads(gzip.decompress(vocab.read_bytes())), merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_groups(corpus: Path, *, by_file: bool) -> dict[str, list[str]]:
    """The validation texts of each language, or of each file."""
    groups: dict[str, list[str]] = {}
    for file in find_files(str(corpus / "*" / "*.val.jsonl.zst")):
        group = f"{file.parent.name}/{file.name.split('.')[0]}" if by_file else file.parent.name
        groups.setdefault(group, []).extend(read_texts([file]))
    return groups


def render(measurements: Sequence[Measurement]) -> str:
    """A Markdown table: a row for each group of texts, a column for each tokenizer."""
    rows = [["characters per token", *(f"{m.tokenizer} ({m.vocabulary:,})" for m in measurements)]]
    rows.append(["---", *("--:" for _ in measurements)])
    for group in measurements[0].chars_per_token:
        rows.append([group, *(f"{m.chars_per_token[group]:.2f}" for m in measurements)])
    rows.append(["texts returned verbatim", *(f"{m.returned_verbatim:.1%}" for m in measurements)])
    rows.append(["million tokens/s, one thread", *(f"{m.tokens_per_second / 1e6:.2f}" for m in measurements)])
    rows.append(["MB/s, one thread", *(f"{m.megabytes_per_second:.1f}" for m in measurements)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--ours", type=Path, nargs="+", required=True, help="folders with a tokenizer.json")
    parser.add_argument("--gpt2", type=Path, nargs=2, metavar=("VOCAB", "MERGES"), help="gzipped")
    parser.add_argument("--cog", type=Path, help="cog-pretrain.model")
    parser.add_argument("--by-file", action="store_true", help="a row for each file")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    candidates = [
        from_tokenizers(folder.name, Tokenizer.from_file(str(folder / "tokenizer.json"))) for folder in arguments.ours
    ]
    if arguments.gpt2:
        candidates.append(from_tokenizers("GPT-2", load_gpt2(*arguments.gpt2)))
    if arguments.cog:
        candidates.append(from_sentencepiece("cog-pretrain", arguments.cog))
    measurements = measure(candidates, read_groups(arguments.corpus, by_file=arguments.by_file))
    print(json.dumps([asdict(m) for m in measurements], indent=2) if arguments.json else render(measurements))


if __name__ == "__main__":
    main()
