"""How fast does a GLM read, beside transformers' BERT of the same shape?

    python benchmarks/forward.py [--layers 24] [--threads 2] [--rounds 6] [--json]

Both compute the logits of every token of rows of 512, without gradients, in the shape of GLM-Large and BERT-large (24
layers, width 1024, 16 heads, vocabulary 30592; random weights). The GLM reads a context (a text with a blank, all of
which is visible to all) and a context with its answer (the second half of the row, which needs a mask) from the token
ids alone; BERT reads the same ids. All take turns in each round, and a ratio is taken within a round.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, logging

from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from machine import describe_machine

LENGTH = 512
HIDDEN_SIZE = 1024
HEADS = 16
VOCAB_SIZE = 30592
MASK, SOP = 30522, 30523
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SYSTEMS = ("context", "answer", "bert")


def make_glm(layers: int, dtype: torch.dtype) -> GLMForConditionalGeneration:
    config = GLMConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        mask_token_id=MASK,
        sop_token_id=SOP,
    )
    return GLMForConditionalGeneration(config).to(dtype).eval()


def make_bert(layers: int, dtype: torch.dtype) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN_SIZE,
        max_position_embeddings=LENGTH,
    )
    return BertForMaskedLM(config).to(dtype).eval()


def make_readers(layers: int, dtype: torch.dtype, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """A call for each system that computes the logits of `batch` rows."""
    glm, bert = make_glm(layers, dtype), make_bert(layers, dtype)
    context = torch.randint(1000, 30000, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    context[:, LENGTH // 4] = MASK
    answer = context.clone()
    answer[:, LENGTH // 2] = SOP
    return {
        "context": lambda: glm(context, use_cache=False).logits,
        "answer": lambda: glm(answer, use_cache=False).logits,
        "bert": lambda: bert(context).logits,
    }


@torch.no_grad()
def measure(layers: int, dtype: str, batch: int, rounds: int) -> dict[str, Any]:
    """Tokens/s of every system, and the ratio of ours to BERT in each round."""
    readers = make_readers(layers, DTYPES[dtype], batch)
    for read in readers.values():
        read()
    speeds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for number in range(rounds):
        first = number % len(SYSTEMS)  # each goes first in turn: what ran before leaves its mark on caches and memory
        for system in SYSTEMS[first:] + SYSTEMS[:first]:
            started = time.perf_counter()
            readers[system]()
            speeds[system].append(batch * LENGTH / (time.perf_counter() - started))
    ratios = {
        system: sorted(a / b for a, b in zip(speeds[system], speeds["bert"], strict=True)) for system in SYSTEMS[:2]
    }
    return {"dtype": dtype, "batch": batch, **{s: statistics.median(v) for s, v in speeds.items()}, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    machine = describe_machine(options.threads)
    records = [measure(options.layers, dtype, batch, options.rounds) for dtype in DTYPES for batch in (1, 4)]
    if options.json:
        print(json.dumps({"machine": machine, "layers": options.layers, "length": LENGTH, "results": records}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"\nTokens/s, {options.layers} layers; in brackets the ratio to BERT: median, min-max.\n")
    print("| arithmetic | rows | GLM, context | GLM, context and answer | BERT |")
    print("|---|---:|---:|---:|---:|")
    for record in records:
        cells = []
        for system, ratios in record["ratios"].items():
            spread = f"{statistics.median(ratios):.2f}, {ratios[0]:.2f}-{ratios[-1]:.2f}"
            cells.append(f"{record[system]:,.0f} ({spread})")
        print(f"| {record['dtype']} | {record['batch']} | {' | '.join(cells)} | {record['bert']:,.0f} |")


if __name__ == "__main__":
    main()
