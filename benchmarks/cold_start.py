"""How long does a user wait for the first answer? From the start of the process to its end, median of several.

    python benchmarks/cold_start.py [--model FOLDER] [--threads 2] [--rounds 5] [--json]

The files are read once before, so they come from the file cache: what is timed is starting Python, importing, loading
the model, filling the blank. `import torch` alone shows how much of it is not ours; the aim is an answer in 1.5 times
that. Seconds of the CPU are those that other work on the machine does not change much.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from machine import describe_machine

QUESTION = "The cat sat on the [MASK]."


def time_process(command: list[str], threads: int) -> tuple[float, float]:
    """Seconds from start to end, and seconds of the CPU.

    Raises `SystemExit` with the command's own error when it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)}: {errors.read().decode().strip()}")
    return seconds, used.ru_utime + used.ru_stime


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
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
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
    print("\n| command | seconds: median (min-max) | of the CPU | / import torch | of the CPU |")
    print("|---|---:|---:|---:|---:|")
    base = [statistics.median(column) for column in zip(*times["import torch"], strict=True)]
    for name, rounds in times.items():
        columns = list(zip(*rounds, strict=True))
        cells = [f"{statistics.median(column):.2f} ({min(column):.2f}-{max(column):.2f})" for column in columns]
        cells += [f"{statistics.median(column) / whole:.2f}" for column, whole in zip(columns, base, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
