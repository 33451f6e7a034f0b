"""How fast does a GLM write, beside transformers' GPT-2 of the same shape?

    python benchmarks/decoding.py [--model bundled] [--threads 2] [--rounds 5] [--json]

Both write the same number of tokens behind a prompt of the same length, greedily and with a key-value cache: the GLM by
`gmask.infill` and by its own `generate`, GPT-2 (random weights, same width, depth and vocabulary) by transformers'
`generate`. Tokens/s count the written tokens of all rows; the time includes reading the prompt. All take turns in each
round, and a ratio is taken within a round.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import logging

import gmask
from machine import describe_machine
from measuring import make_gpt2

TEXT = "The old man walked down to the river every morning. He had lived there all his life, and [gMASK]"
NEW_TOKENS = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SYSTEMS = ("infill", "generate", "gpt2")


def make_writers(name: str, dtype: torch.dtype, batch: int) -> dict[str, Callable[[], object]]:
    """A call for each system that writes `NEW_TOKENS` tokens in `batch` rows."""
    model, tokenizer = gmask.load(name, dtype=dtype, device="cpu")
    gpt2 = make_gpt2(
        hidden_size=model.config.hidden_size,
        layers=model.config.num_hidden_layers,
        heads=model.config.num_attention_heads,
        vocab_size=model.config.vocab_size,
        positions=model.config.max_position_embeddings,
        pad_token_id=0,
    )
    gpt2.to(dtype).eval()
    prompt = tokenizer([TEXT], return_tensors="pt")["input_ids"]
    prompt = torch.cat((prompt, torch.tensor([[tokenizer.sop_token_id]])), dim=1).repeat(batch, 1)
    settings: dict[str, Any] = {
        "min_new_tokens": NEW_TOKENS,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
    }
    padding = torch.ones_like(prompt)
    texts = [TEXT] * batch
    return {
        "infill": lambda: gmask.infill(
            model, tokenizer, texts, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS, batch_size=batch
        ),
        "generate": lambda: model.generate(prompt, attention_mask=padding, **settings),
        "gpt2": lambda: gpt2.generate(prompt, attention_mask=padding, **settings),
    }


def measure(name: str, dtype: str, batch: int, rounds: int) -> dict[str, Any]:
    """Tokens/s of every round and system, and the ratio of ours to GPT-2."""
    writers = make_writers(name, DTYPES[dtype], batch)
    for write in writers.values():
        write()
    speeds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(rounds):
        for system, write in writers.items():
            started = time.perf_counter()
            write()
            speeds[system].append(batch * NEW_TOKENS / (time.perf_counter() - started))
    ratios = {
        system: sorted(a / b for a, b in zip(speeds[system], speeds["gpt2"], strict=True)) for system in SYSTEMS[:2]
    }
    return {"dtype": dtype, "batch": batch, **{s: statistics.median(v) for s, v in speeds.items()}, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled", help="a GLM's folder")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    machine = describe_machine(options.threads)
    records = [measure(options.model, dtype, batch, options.rounds) for dtype in DTYPES for batch in (1, 8)]
    if options.json:
        print(json.dumps({"machine": machine, "new_tokens": NEW_TOKENS, "results": records}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("\nTokens/s; in brackets the ratio to GPT-2: median, min-max.\n")
    print("| arithmetic | rows | gmask.infill | GLM generate | GPT-2 generate |")
    print("|---|---:|---:|---:|---:|")
    for record in records:
        cells = []
        for system, ratios in record["ratios"].items():
            spread = f"{statistics.median(ratios):.2f}, {ratios[0]:.2f}-{ratios[-1]:.2f}"
            cells.append(f"{record[system]:,.0f} ({spread})")
        print(f"| {record['dtype']} | {record['batch']} | {' | '.join(cells)} | {record['gpt2']:,.0f} |")


if __name__ == "__main__":
    main()
