"""What does a constraint cost a token, beside the sizes of the vocabularies that it has to choose from?

    python benchmarks/constraints.py [--answers 20] [--json]

The vocabularies are the bundled one and one of ChatGLM-6B's size, with random words and Chinese strings for its
pieces, since the published file is not part of gmask. Scores are random; the best allowed token is taken, and an
answer ends where it may with a chance of 1 in 20. Timed: `allowed` together with `accept` and
`is_complete`, in CPU time of the one thread that runs them, which other programs disturb less.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import gmask
from gmask.generation.constraints import Constraint, choices, json_schema, regex
from gmask.tokenizers.glm import GLMTokenizer
from machine import describe_machine

CHATGLM_PIECES, CHATGLM_ROWS = 130344, 130528
LONGEST_ANSWER = 200  # tokens
WORDS = ["red", "green", "blue", "light blue", "dark green"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": WORDS}, "maxItems": 8},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, Callable[..., Constraint]] = {
    "choices": lambda tokenizer, rows: choices(tokenizer, WORDS, vocabulary_size=rows),
    "regex": lambda tokenizer, rows: regex(tokenizer, r"[a-z]{3,10}( [a-z]{1,10}){5,20}\.", vocabulary_size=rows),
    "any text": lambda tokenizer, rows: regex(tokenizer, r"(?s:.*)", vocabulary_size=rows),
    "JSON schema": lambda tokenizer, rows: json_schema(tokenizer, PERSON, vocabulary_size=rows),
}


@dataclass(frozen=True)
class Cost:
    """Of one constraint in one vocabulary."""

    vocabulary: str
    rows: int  # V
    constraint: str
    compile_ms: float
    start_ms: float  # median of the answers
    tokens: int
    mean_ms: float  # per token
    median_ms: float
    p99_ms: float


def make_large_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A vocabulary of 256 bytes, half Chinese strings and half words, most of which bring a space."""
    draw = random.Random(seed)
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [chr(code) for code in range(32, 127)]
    pieces += [chr(code) for code in range(0x4E00, 0x4E00 + 8000)]
    known = dict.fromkeys(pieces)
    while len(known) < CHATGLM_PIECES:
        if draw.random() < 0.5:
            known["".join(chr(0x4E00 + int(8000 * draw.random() ** 2)) for _ in range(draw.randint(2, 4)))] = None
        else:
            word = "".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1), k=draw.randint(2, 9)))
            known[word if draw.random() < 0.3 else f" {word}"] = None
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(known)}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def measure(
    vocabulary: str, tokenizer: PreTrainedTokenizerBase, rows: int, name: str, answers: int, generator: torch.Generator
) -> Cost:
    begin = time.thread_time()
    constraint = CONSTRAINTS[name](tokenizer, rows)
    compile_ms = 1e3 * (time.thread_time() - begin)
    starts, steps = [], []
    for _ in range(answers):
        begin = time.thread_time()
        mask = constraint.start()
        starts.append(1e3 * (time.thread_time() - begin))
        for _ in range(LONGEST_ANSWER):
            begin = time.thread_time()
            allowed, is_complete = mask.allowed(), mask.is_complete()
            spent = time.thread_time() - begin
            if is_complete and (not bool(allowed.any()) or torch.rand((), generator=generator).item() < 0.05):
                break
            token_id = int(torch.rand(rows, generator=generator).masked_fill_(~allowed, -1).argmax())
            begin = time.thread_time()
            mask.accept(token_id)
            steps.append(1e3 * (spent + time.thread_time() - begin))
    return Cost(
        vocabulary,
        rows,
        name,
        compile_ms,
        statistics.median(starts),
        len(steps),
        statistics.fmean(steps),
        statistics.median(steps),
        statistics.quantiles(steps, n=100)[98],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bundled = GLMTokenizer.from_pretrained(Path(gmask.__file__).parent / "pretrained")
    generator = torch.Generator().manual_seed(0)
    tables: dict[str, float] = {}
    costs: list[Cost] = []
    for vocabulary, tokenizer, rows in (
        ("bundled", bundled, len(bundled)),
        ("ChatGLM-6B's size", make_large_tokenizer(), CHATGLM_ROWS),
    ):
        begin = time.thread_time()
        choices(tokenizer, ["a"])
        tables[vocabulary] = time.thread_time() - begin
        costs += [measure(vocabulary, tokenizer, rows, name, options.answers, generator) for name in CONSTRAINTS]
    result: dict[str, Any] = {
        "machine": describe_machine(1),
        "table_seconds": tables,
        "costs": list(map(asdict, costs)),
    }
    if options.json:
        print(json.dumps(result))
        return
    print(result["machine"])
    print("table of the vocabulary, s:", {name: round(seconds, 2) for name, seconds in tables.items()})
    print("| vocabulary | V | constraint | compile ms | start ms | tokens | mean ms | median ms | p99 ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cost in costs:
        print(f"| {' | '.join(f'{x:.2f}' if isinstance(x, float) else str(x) for x in asdict(cost).values())} |")


if __name__ == "__main__":
    main()
