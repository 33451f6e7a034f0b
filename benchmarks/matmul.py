"""How fast is a few rows times an int8, int4 or bfloat16 weight, beside torch's operations and merely reading it?

    python benchmarks/matmul.py [--threads 2] [--rounds 40] [--rows 1 2 4 ...] [--bits 4 8 16] [--json]

The four matrices of a ChatGLM-6B layer, random weights, bfloat16 activations. Ours (`gmask.quantization.kernels`, the
best path of the machine), torch's int4pack and int8pack operations, a dense bfloat16 matrix, and a reduction that reads
the same bytes as the quantized weight take turns in each round; every call takes another copy of the weight, so that no
cache holds it. 16 bits: ours is the kernel for CPUs without instructions for bfloat16 (`gmask.native.ops.multiply`),
beside torch's product in bfloat16 and in float32. The fastest round counts: other work on the machine only ever slows
one down. GB/s are weight bytes.
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

from gmask.native.ops import multiply
from gmask.quantization.kernels import PackedWeight, describe_path, matmul, repack_weight
from machine import describe_machine

SHAPES = ((12288, 4096), (4096, 4096), (4096, 16384), (16384, 4096))  # [outputs, columns]: q|k|v, dense, down, up
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
    if bits == 16:
        return make_dense_calls(outputs, columns)
    given = make_copies(outputs, columns, bits)
    ours = [repack_weight(weight, scale, bits=bits) for weight, scale in given]
    torchs = [repack_weight(weight, scale, bits=bits, path="aten") for weight, scale in given]
    dense = [torch.randn(outputs, columns, dtype=torch.bfloat16) for _ in range(max(2, len(given) * bits // 16))]
    return {
        "read": (len(ours), lambda copy, x: read(ours[copy])),
        "ours": (len(ours), lambda copy, x: matmul(x, ours[copy])),
        "torch": (len(torchs), lambda copy, x: matmul(x, torchs[copy])),
        "dense": (len(dense), lambda copy, x: linear(x, dense[copy])),
    }


def make_dense_calls(outputs: int, columns: int) -> dict[str, tuple[int, Callable[[int, Tensor], object]]]:
    """The same for a weight that stays bfloat16; `dense` is float32."""
    count = max(2, round(COLD_BYTES / (2 * outputs * columns)))
    halves = [torch.randn(outputs, columns, dtype=torch.bfloat16) for _ in range(count)]
    wholes = [half.float() for half in halves]
    return {
        "read": (count, lambda copy, x: halves[copy].view(torch.float32).amax()),
        "ours": (count, lambda copy, x: multiply(x, halves[copy], None)),
        "torch": (count, lambda copy, x: linear(x, halves[copy])),
        "dense": (count, lambda copy, x: linear(x.float(), wholes[copy])),
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


def print_table(records: list[dict[str, Any]], *, dense: str) -> None:
    print(f"| weight | bits | rows | ours ms (GB/s) | read ms | ratio | torch ms | ratio | {dense} ms | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for r in records:
        ratios = [r[system] / r["ours"] for system in ("read", "torch", "dense")]
        print(
            f"| {r['outputs']} x {r['columns']} | {r['bits']} | {r['rows']} "
            f"| {r['ours']:.2f} ({r['gigabytes_per_second']:.1f}) | {r['read']:.2f} | {ratios[0]:.2f} "
            f"| {r['torch']:.2f} | {ratios[1]:.2f} | {r['dense']:.2f} | {ratios[2]:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16], choices=(4, 8, 16))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the four matrices")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.threads)
    records = []
    with torch.inference_mode():
        for bits in options.bits:
            for outputs, columns in SHAPES[-options.shapes :]:
                records += measure(outputs, columns, bits, options.rows, options.rounds)
    if options.json:
        print(json.dumps({"machine": machine, "path": describe_path(), "results": records}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"ours: {describe_path()}; a ratio is a time to ours\n")
    for dense, wanted in (("bfloat16", (4, 8)), ("float32", (16,))):
        if found := [record for record in records if record["bits"] in wanted]:
            print_table(found, dense=dense)
            print()


if __name__ == "__main__":
    main()
