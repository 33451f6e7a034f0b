"""How long does a user wait for the first answer? From the start of the process to its end, median of several.

    python benchmarks/cold_start.py [--model FOLDER] [--threads 2] [--rounds 5] [--json]

The files are read once before, so they come from the file cache: what is timed is starting Python, importing, loading
the model, filling the blank. `import torch` alone shows how much of it is not ours. Aims on two cores: an answer under
3 s, `--help` under 0.5 s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from machine import describe_machine

QUESTION = "The cat sat on the [MASK]."


def time_process(command: list[str], threads: int) -> float:
    """Seconds from start to end.

    Raises `SystemExit` with the command's own error when it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": ""}
    started = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - started
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}: {finished.stderr.strip()}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a GLM's folder; the bundled one by default")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    gmask = [sys.executable, "-m", "gmask"]
    commands = {
        "gmask infill": [*gmask, "infill", QUESTION, *(["--model", options.model] if options.model else [])],
        "gmask --help": [*gmask, "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():  # the first run reads from the disk and writes Python's byte code
        time_process(command, options.threads)
    for _ in range(options.rounds):
        for name, command in commands.items():
            times[name].append(time_process(command, options.threads))
    machine = describe_machine(options.threads)
    if options.json:
        print(json.dumps({"machine": machine, "seconds": times}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("\n| command | seconds: median | min | max |\n|---|---:|---:|---:|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
