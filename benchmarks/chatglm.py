"""How fast does a ChatGLM-6B talk on a CPU, and in how much memory, beside chatglm.cpp and llama.cpp?

    python benchmarks/chatglm.py [--peers-python PATH] [--forms int4 int4-mapped int8 ...] [--only decode prefill ...]
                                 [--threads 2] [--rounds 5] [--tokenizer DIR] [--folder DIR] [--keep] [--json]
                                 [--kv-cache int8]

The true shape with random weights, embeddings and head quantized too. Every system is a process of its own that is told
what to do and then waits, so that all take turns in each round; of the rounds the fastest and the median are reported
(other work on the machine only ever slows one down), ratios within each pair. One form and one peer are held at a time.

- decode: ms a token behind 256 tokens, through the code that `gmask.Chat` runs, the greedy choice included; `drawn`, by
  its default settings. `read`: a loop that touches the bytes of the weights once, in the same rounds.
- prefill: ms a token of 256 and of 512 tokens.
- batch: int4 decoding of several rows, in times of one row.
- memory: of a fresh process at a context of 512, all that is resident and what of it no file backs.
- load: seconds until the model is loaded, from the file cache, and until the first token behind 16 is known.
- turns: resident memory of a small model over 100 turns; needs `--tokenizer DIR`, the folder of a ChatGLM tokenizer.

The peers are timed where `--peers-python` names an interpreter that has them; in a virtual environment of their own:

    pip install numpy sentencepiece gguf
    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python
    CMAKE_ARGS="-DCHATGLM_ENABLE_EXAMPLES=OFF -DCMAKE_POLICY_VERSION_MINIMUM=3.5" \
        CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install chatglm-cpp==0.4.2

Their Q4_0 and Q8_0 have a scale for 32 weights, as `int4-g32` has; llama.cpp runs a llama of the same size. Takes up to
14 GB of disk, which is given back, and about as much memory (llama.cpp keeps Q4_0 twice: in the mapped file, and in an
order of its own). `--keep` leaves what was made in `--folder` and takes what it finds there.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from machine import describe_machine

HERE = Path(__file__).parent
FORMS = {"int4": "q4_0", "int4-mapped": "q4_0", "int4-g32": "q4_0", "int8": "q8_0", "bf16": None}
"""What the peers have in place of a form."""

SMALL_FORMS = ("int4", "int4-mapped", "int4-g32")
"""Those that are loaded and run in batches."""

PEERS = {"chatglm.cpp": "peers.chatglm_cpp_model", "llama.cpp": "peers.llama_cpp_model"}
OURS = "gmask"
SECTIONS = ("decode", "prefill", "batch", "memory", "load", "turns")
CONTEXT = 256
PROMPTS = (256, 512)
NEW_TOKENS = 24
BATCHES = (1, 2, 4, 8)
BATCH_TOKENS = 8  # a round
FIRST = 16  # tokens before the first one that counts for `load`

Values = dict[str, list[float]]


class Process:
    """A system that is loaded and waits for commands."""

    def __init__(self, command: list[str], threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE, env=environment
        )
        self._command = command
        self.greeting = self._hear()

    def ask(self, *words: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._command)} ended with {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the models lie, and who runs them."""

    folder: Path
    peers_python: str | None
    threads: int
    rounds: int
    keep: bool
    kv_cache: str | None  # the form of our keys and values

    @contextmanager
    def model(self, system: str, form: str) -> Iterator[Path]:
        """The model of a system, made if it is not there, and removed afterwards unless it is to be kept."""
        kind = form if system == OURS else FORMS[form]
        path = self.folder / (form if system == OURS else f"{system}-{kind}")
        if not path.exists():
            partial = path.with_name(f"{path.name}.partial")
            subprocess.run([*self._script(system), "write", str(kind), str(partial)], check=True, cwd=HERE)
            partial.rename(path)
        try:
            yield path
        finally:
            if not self.keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def start(self, system: str, path: Path) -> Process:
        held = [self.kv_cache] if self.kv_cache and system == OURS else []
        return Process([*self._script(system), "serve", str(path), str(self.threads), *held], self.threads)

    def peers(self, form: str) -> list[str]:
        return list(PEERS) if self.peers_python and FORMS[form] else []

    def _script(self, system: str) -> list[str]:
        if system == OURS:
            return [sys.executable, "-m", "peers.gmask_model"]
        return [str(self.peers_python), "-m", PEERS[system]]


def measure_form(bench: Bench, form: str, sections: list[str]) -> dict[str, Any]:
    """Everything about one form, by section."""
    found: dict[str, Any] = {"form": form, "pairs": {}, "memory": {}}
    is_timed = bool({"decode", "prefill"} & set(sections))
    is_weighed = "memory" in sections and FORMS[form] is not None
    with bench.model(OURS, form) as path:
        if "load" in sections and form in SMALL_FORMS:
            found["load"] = measure_load(bench, path)
        if is_weighed:
            found["memory"][OURS] = measure_memory(bench, OURS, path)
        if "batch" in sections and form in SMALL_FORMS:
            found["batch"] = measure_batches(bench, path)
        for peer in bench.peers(form) if is_timed or is_weighed else []:
            with bench.model(peer, form) as file:
                if is_weighed:
                    found["memory"][peer] = measure_memory(bench, peer, file)
                if is_timed:
                    found["pairs"][peer] = take_turns(bench, {OURS: path, peer: file}, sections)
        if is_timed and not found["pairs"]:
            found["pairs"]["alone"] = take_turns(bench, {OURS: path}, sections)
    return found


def take_turns(bench: Bench, paths: dict[str, Path], sections: list[str]) -> dict[str, Values]:
    """By measure and system, a value a round, in ms a token (`read`: in ms)."""
    found: dict[str, Values] = {}
    with ExitStack() as stack:
        systems = {system: stack.enter_context(bench.start(system, path)) for system, path in paths.items()}
        for process in systems.values():
            process.ask("prefill", FIRST)  # repacks the weights
        for _ in range(bench.rounds):
            run_round(systems, sections, found)
    return found


def run_round(systems: dict[str, Process], sections: list[str], found: dict[str, Values]) -> None:
    """Has every system do everything once."""

    def note(measure: str, system: str, seconds: float) -> None:
        found.setdefault(measure, {}).setdefault(system, []).append(1e3 * seconds)

    if "prefill" in sections:
        for tokens in PROMPTS:
            for system, process in systems.items():
                note(f"prefill {tokens}", system, process.ask("prefill", tokens) / tokens)
    if "decode" in sections:
        for system, process in systems.items():
            process.ask("prefill", CONTEXT)
            note("decode", system, statistics.median(process.ask("decode", NEW_TOKENS)))
        systems[OURS].ask("draw", CONTEXT)
        note("drawn", OURS, statistics.median(systems[OURS].ask("decode", NEW_TOKENS)))
        note("read", OURS, systems[OURS].ask("read")["seconds"])


def measure_batches(bench: Bench, path: Path) -> dict[int, list[float]]:
    """Milliseconds a step by number of rows, a value a round."""
    found: dict[int, list[float]] = {rows: [] for rows in BATCHES}
    with bench.start(OURS, path) as process:
        for rows in BATCHES:
            process.ask("prefill", CONTEXT, rows)
        for _ in range(bench.rounds):
            for rows, values in found.items():
                values.append(1e3 * statistics.median(process.ask("decode", BATCH_TOKENS, rows)))
    return found


def measure_memory(bench: Bench, system: str, path: Path) -> dict[str, int]:
    with bench.start(system, path) as process:
        process.ask("prefill", 512)
        process.ask("decode", 2)
        memory: dict[str, int] = process.ask("memory")
        return memory


def measure_load(bench: Bench, path: Path) -> dict[str, list[float]]:
    """Seconds of fresh processes: to load, to load and compute the first token, and that token once more."""
    for file in path.iterdir():
        with file.open("rb", buffering=0) as data:
            while data.read(2**24):
                pass
    found: dict[str, list[float]] = {"load": [], "load and first token": [], "first token again": []}
    for _ in range(min(3, bench.rounds)):
        with bench.start(OURS, path) as process:
            load = process.greeting["load"]
            found["load"].append(load)
            found["load and first token"].append(load + process.ask("prefill", FIRST))
            found["first token again"].append(process.ask("prefill", FIRST))
    return found


def measure_turns(tokenizer: Path, turns: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "peers.chat_turns", str(tokenizer.absolute()), str(turns)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cell(values: list[float]) -> str:
    return f"{min(values):.1f} ({statistics.median(values):.1f})"


def print_form(record: dict[str, Any]) -> None:
    """The tables of one form."""
    form = record["form"]
    print(f"\n## {form}\n")
    if record["pairs"]:
        print("| ms, fastest round (median) | peer | gmask | peer | peer / gmask |\n|---|---|---:|---:|---:|")
    for peer, measures in record["pairs"].items():
        for measure, systems in measures.items():
            theirs = systems.get(peer)
            ratio = f"{min(theirs) / min(systems[OURS]):.2f}" if theirs else "-"
            print(f"| {measure} | {peer} | {cell(systems[OURS])} | {cell(theirs) if theirs else '-'} | {ratio} |")
        if "read" in measures:
            share = min(measures["read"][OURS]) / min(measures["decode"][OURS])
            print(f"| read / decode | {peer} | {share:.0%} | - | - |")
    if "batch" in record:
        print("\n| rows | ms a step, fastest round (median) | times one row |\n|---:|---:|---:|")
        for rows, values in record["batch"].items():
            print(f"| {rows} | {cell(values)} | {min(values) / min(record['batch'][1]):.2f} |")
    if record["memory"]:
        print("\n| memory at a context of 512 | resident GB | of it without a file, GB |\n|---|---:|---:|")
        for system, memory in record["memory"].items():
            print(f"| {system} | {memory['rss'] / 1e9:.2f} | {memory['anonymous'] / 1e9:.2f} |")
    if "load" in record:
        seconds = ", ".join(f"{name} {cell(values)} s" for name, values in record["load"].items())
        print(f"\nFrom the file cache, fastest (median): {seconds}.")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--peers-python", type=os.path.abspath, help="a Python that has chatglm-cpp and llama-cpp-python"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--tokenizer", type=Path, help="folder of a ChatGLM tokenizer, for the turns")
    parser.add_argument("--folder", type=Path, help="where the models are made, one form at a time")
    parser.add_argument("--kv-cache", choices=("int8",), help="the form of our keys and values")
    parser.add_argument("--keep", action="store_true", help="leave the models there, and use those that are there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.keep and not options.folder:
        parser.error("--keep needs --folder")
    results: dict[str, Any] = {"machine": describe_machine(options.threads), "kv_cache": options.kv_cache, "forms": []}
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    parent = options.folder and options.folder.absolute()
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="gmask-chatglm-") as temporary:
        folder = parent if options.keep else Path(temporary)
        bench = Bench(folder, options.peers_python, options.threads, options.rounds, options.keep, options.kv_cache)
        for form in options.forms if set(options.only) - {"turns"} else []:
            results["forms"].append(measure_form(bench, form, options.only))
            if not options.json:
                print_form(results["forms"][-1])
    if "turns" in options.only and options.tokenizer:
        results["turns"] = measure_turns(options.tokenizer, options.turns)
        if not options.json:
            memory = ", ".join(f"{turn}: {size / 1e6:.1f}" for turn, size in results["turns"]["rss"].items())
            print(
                f"\nResident MB by turn: {memory}; rounds left out at the end: {results['turns']['rounds_left_out']}."
            )
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
