"""How fast is a few rows times an int8 or int4 weight, beside torch's operations and merely reading the bytes?

    python benchmarks/matmul.py [--threads 2] [--rounds 40] [--rows 1 2 4 ...] [--json]

The four matrices of a ChatGLM-6B layer, random weights, bfloat16 activations. Ours (`gmask.quantization.kernels`, the
best path of the machine), torch's int4pack and int8pack operations, a dense bfloat16 matrix, and a reduction that reads
the same bytes as the quantized weight take turns in each round; every call takes another copy of the weight, so that no
cache holds it. The fastest round counts: other work on the machine only ever slows one down. GB/s are weight bytes.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from gmask.quantization.kernels import PackedWeight, describe_path, matmul, prepare
from machine import describe_machine

SHAPES = ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384))  # [outputs, columns]: q|k|v, dense, up, down
ROWS = (1, 2, 4, 8, 16, 64, 256, 512)
COLD_BYTES = 200e6  # together the copies of a weight outgrow the caches
SLOW_ROWS = 16  # from here on, fewer rounds are enough


def make_copies(outputs: int, columns: int, bits: int) -> list[tuple[Tensor, Tensor]]:
    """Published integers and scales, as often as it takes to outgrow the caches."""
    width = columns * bits // 8
    copies = max(2, round(COLD_BYTES / (outputs * width)))
    scale = torch.full((outputs,), 0.01, dtype=torch.float16)
    return [(torch.randint(-127, 128, (outputs, width), dtype=torch.int8), scale) for _ in range(copies)]


def read(weight: PackedWeight) -> Tensor:
    """Touches every byte once and does nearly nothing with it."""
    return weight.data.view(torch.float32).amax()


def make_calls(outputs: int, columns: int, bits: int) -> dict[str, tuple[int, Callable[[int, Tensor], object]]]:
    """By system: how many copies it has, and what multiplies the activations by one of them."""
    given = make_copies(outputs, columns, bits)
    ours = [prepare(weight, scale, bits=bits) for weight, scale in given]
    torchs = [prepare(weight, scale, bits=bits, path="aten") for weight, scale in given]
    dense = [torch.randn(outputs, columns, dtype=torch.bfloat16) for _ in range(max(2, len(given) * bits // 16))]
    return {
        "read": (len(ours), lambda copy, x: read(ours[copy])),
        "ours": (len(ours), lambda copy, x: matmul(x, ours[copy])),
        "torch": (len(torchs), lambda copy, x: matmul(x, torchs[copy])),
        "bfloat16": (len(dense), lambda copy, x: linear(x, dense[copy])),
    }


def measure(outputs: int, columns: int, bits: int, all_rows: list[int], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of the fastest round, by system, for each number of rows."""
    calls, records = make_calls(outputs, columns, bits), []
    for rows in all_rows:
        x = torch.randn(rows, columns, dtype=torch.bfloat16)
        best = dict.fromkeys(calls, float("inf"))
        for turn in range(rounds if rows < SLOW_ROWS else max(3, rounds // 10)):
            for system, (copies, call) in calls.items():
                started = time.perf_counter()
                call(turn % copies, x)
                best[system] = min(best[system], (time.perf_counter() - started) * 1e3)
        gigabytes = outputs * columns * bits / 8 / 1e6 / best["ours"]
        shape = {"outputs": outputs, "columns": columns, "bits": bits, "rows": rows}
        records.append({**shape, **best, "gigabytes_per_second": gigabytes})
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    print("| weight | bits | rows | ours ms (GB/s) | read ms | ratio | torch ms | ratio | bfloat16 ms | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for r in records:
        ratios = [r[system] / r["ours"] for system in ("read", "torch", "bfloat16")]
        print(
            f"| {r['outputs']} x {r['columns']} | {r['bits']} | {r['rows']} "
            f"| {r['ours']:.2f} ({r['gigabytes_per_second']:.1f}) | {r['read']:.2f} | {ratios[0]:.2f} "
            f"| {r['torch']:.2f} | {ratios[1]:.2f} | {r['bfloat16']:.2f} | {ratios[2]:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.threads)
    records = []
    with torch.inference_mode():
        for bits in (4, 8):
            for outputs, columns in SHAPES:
                records += measure(outputs, columns, bits, options.rows, options.rounds)
    if options.json:
        print(json.dumps({"machine": machine, "path": describe_path(), "results": records}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"ours: {describe_path()}; a ratio is a time to ours\n")
    print_table(records)


if __name__ == "__main__":
    main()
