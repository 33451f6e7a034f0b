"""What does a busy program beside it cost a run? Tokens per second alone and beside one, as median, min-max.

    python benchmarks/shared_cores.py [--threads 2] [--seconds 4] [--width 1024 --layers 12] [--json]

The bundled model, or one of another shape with random weights in int8, fills blanks: with one thread; with as many as
the cores, whose waiting is torch's own; and as the command ``gmask`` does, by `gmask.cores`. The busy program counts on
one of the cores. Aim: beside it gmask is no slower than one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from machine import describe_machine

TEXT = "The old man took his [MASK] and went down to the [MASK]."
TOKENS = 24  # of each answer
BUSY = "while True: pass"
WAYS = ("one thread", "all threads", "gmask")


def run(way: str, threads: int, seconds: float, width: int | None, layers: int) -> None:
    """The work of a fresh process: prints tokens per second of each of its runs."""
    if way == "gmask":
        from gmask.cores import share_cores

        share_cores()
    import torch

    import gmask

    torch.set_num_threads(1 if way == "one thread" else threads)
    model, tokenizer = gmask.load("bundled")
    if width is not None:
        from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
        from gmask.quantization.quantizer import quantize_model

        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
        model = GLMForConditionalGeneration(GLMConfig(**{**model.config.to_dict(), **shape})).bfloat16().eval()
        model = quantize_model(model, bits=8, embeddings=True)
    found = []
    for limit in (1.5, seconds):  # the first runs warm up, and let gmask look at the machine
        found, started = [], time.perf_counter()
        while time.perf_counter() - started < limit:
            begun = time.perf_counter()
            gmask.infill(model, tokenizer, TEXT, max_tokens=TOKENS, min_tokens=TOKENS)
            found.append(2 * TOKENS / (time.perf_counter() - begun))
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--width", type=int, help="of a model with random weights instead of the bundled one")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--process", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        run(options.process, options.threads, options.seconds, options.width, options.layers)
        return
    hidden = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    shape = [] if options.width is None else ["--width", str(options.width), "--layers", str(options.layers)]
    common = ["--threads", str(options.threads), "--seconds", str(options.seconds), *shape]
    results: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for beside in ("alone", "beside a busy program"):
        busy = None
        if beside != "alone":
            busy = subprocess.Popen([sys.executable, "-c", BUSY])
            os.sched_setaffinity(busy.pid, {max(os.sched_getaffinity(0))})
        try:
            for way in WAYS:
                command = [sys.executable, __file__, "--process", way, *common]
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
                results[way][beside] = json.loads(done.stdout.splitlines()[-1])
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()
    machine = describe_machine(options.threads)
    if options.json:
        print(json.dumps({"machine": machine, "tokens_per_second": results}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("\n| tokens/s | alone | beside a busy program |\n|---|---:|---:|")
    for way, found in results.items():
        cells = [f"{statistics.median(runs):.0f} ({min(runs):.0f}-{max(runs):.0f})" for runs in found.values()]
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
