"""Measures gmask beside its peers and draws them on one page, the plot of the README.

    python benchmarks/bench.py [--only decoding serving ...] [--corpus DIR] [--peers-python PATH] [--out runs/bench]
    python benchmarks/bench.py --draw    # measures nothing

Every script runs by itself and prints JSON, which is kept in `--out`. The pairs of bars.json that it measured are
replaced, and docs/images/peers.png is drawn from all of them, behind each script, so that a run that is cut off keeps
what it had. A script that fails is told, the next one goes on, and the exit code is then 1.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
BARS, PLOT = HERE / "bars.json", HERE.parent / "docs/images/peers.png"


@dataclass(frozen=True, slots=True)
class Pair:
    """What gmask and a peer took for the same, in one run. Of a time, less is better."""

    what: str
    peer: str
    unit: str
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer."""
        is_time = self.unit.split()[0] in ("ms", "s")
        return self.theirs / self.ours if is_time else self.ours / self.theirs


def find(found: Any, **wanted: object) -> Any:
    """The record of the results that has these values."""
    return next(record for record in found["results"] if all(record[key] == value for key, value in wanted.items()))


def read_chatglm(found: Any) -> Iterator[Pair]:
    for form in found["forms"]:
        for peer, measures in form["pairs"].items():
            for measure, what in (("decode", "decoding"), ("prefill 256", "reading a prompt")):
                if peer in (systems := measures.get(measure, {})):
                    ours, theirs = min(systems["gmask"]), min(systems[peer])
                    yield Pair(f"ChatGLM-6B {form['form']}, {what}", peer, "ms a token", ours, theirs)


def read_serving(found: Any) -> Iterator[Pair]:
    ours, theirs = (found["median"][way]["tokens_per_second"] for way in ("engine", "transformers generate"))
    yield Pair(f"Serving {found['clients']} clients", "transformers' generate", "tokens/s", ours, theirs)


def read_scoring(found: Any) -> Iterator[Pair]:
    record = next(record for record in found["results"] if record["answers"] == 16)
    yield Pair("Scoring 16 answers to a text", "a pass for each answer", "answers/s", record["gmask"], record["plain"])


def read_loading(found: Any) -> Iterator[Pair]:
    record = find(found, form="bin", dtype="float16")
    ours, theirs = (record[way]["seconds"] for way in ("gmask", "plain"))
    yield Pair("Loading a published .bin", "torch.load", "s", ours, theirs)


def read_decoding(found: Any) -> Iterator[Pair]:
    record = find(found, dtype="float32", batch=1)
    yield Pair("Filling blanks, bundled model", "GPT-2 of its shape", "tokens/s", record["infill"], record["gpt2"])


def read_forward(found: Any) -> Iterator[Pair]:
    for dtype in ("float32", "bfloat16"):
        record = find(found, dtype=dtype, batch=1)
        yield Pair(
            f"One pass of 512 tokens, {dtype}", "BERT of its shape", "tokens/s", record["context"], record["bert"]
        )


def read_filling_files(found: Any) -> Iterator[Pair]:
    for pair, times in found["pairs"].items():
        kind, _, peer = pair.partition(": ")
        ours, theirs = (statistics.median(used for _, used in times[way]) for way in ("gmask", "peer"))
        yield Pair(f"Filling a file, {kind} a blank", peer, "s of the CPU", ours, theirs)


def read_pretraining(found: Any) -> Iterator[Pair]:
    record = find(found, dtype="bfloat16")
    yield Pair("Pretraining, bfloat16", "GPT-2 of its shape", "tokens/s", record["glm"], record["gpt2"])


def read_tuning(found: Any) -> Iterator[Pair]:
    record = find(found, shape="bundled", method="lora")
    ours, theirs = (statistics.median(record[system]) for system in ("glm", "gpt2"))
    yield Pair("LoRA tuning", "transformers and PEFT", "samples/s", ours, theirs)


def read_matmul(found: Any) -> Iterator[Pair]:
    for bits, operation in ((4, "int4pack"), (8, "int8pack")):
        record = find(found, bits=bits, rows=1, outputs=16384)
        yield Pair(f"One row times an int{bits} matrix", f"torch's {operation}", "ms", record["ours"], record["torch"])


def read_nothing(found: Any) -> Iterator[Pair]:
    """Of a script whose peers are no programs of others."""
    return iter(())


SCRIPTS: dict[str, Callable[[Any], Iterator[Pair]]] = {
    "infilling": read_nothing,
    "pretraining": read_pretraining,
    "decoding": read_decoding,
    "serving": read_serving,
    "cold_start": read_nothing,
    "shared_cores": read_nothing,
    "filling_files": read_filling_files,
    "scoring": read_scoring,
    "matmul": read_matmul,
    "loading": read_loading,
    "forward": read_forward,
    "tuning_speed": read_tuning,
    "evaluation": read_nothing,
    "chatglm": read_chatglm,
    "tokenizer": read_nothing,
}
"""What draws its pairs from the JSON of each script, in the order in which they run."""


def run_script(name: str, arguments: list[str], out: Path) -> Any:
    """Runs a script and keeps its JSON; None if it failed."""
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), *arguments, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        return None
    (out / f"{name}.json").write_text(done.stdout, "utf-8")
    return json.loads(done.stdout)


def show(value: float) -> str:
    """A number with three digits, or as a whole one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(pairs: list[Pair], output: Path) -> None:
    """Two bars a pair on a logarithmic axis, the peer's as long as 1; the best ratio first."""
    pairs = sorted(pairs, key=lambda pair: -pair.ratio)
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(pairs) + 1), layout="constrained")
    places, start = range(len(pairs)), 0.5
    for side, colour, name in ((-1, "#3b82f6", "gmask"), (1, "#cbd5e1", "the peer")):
        lengths = [pair.ratio if side < 0 else 1.0 for pair in pairs]
        values = [pair.ours if side < 0 else pair.theirs for pair in pairs]
        bars = axes.barh(
            [place + 0.2 * side for place in places],
            [length - start for length in lengths],
            left=start,
            height=0.38,
            color=colour,
            label=name,
        )
        told = [f"{show(value)} {pair.unit}" for value, pair in zip(values, pairs, strict=True)]
        if side < 0:
            told = [f"{text}  ({pair.ratio:.2f}×)" for text, pair in zip(told, pairs, strict=True)]
        axes.bar_label(bars, told, padding=4, fontsize=8)
    axes.set_yticks(list(places), [f"{pair.what}\nbeside {pair.peer}" for pair in pairs], fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.5, 1, 2, 4, 8], ["half", "the peer", "2×", "4×", "8×"])
    axes.set_xlim(start, 40)
    axes.invert_yaxis()
    axes.set_title("Speed beside the peer: each pair on one machine, in one run, on two CPU cores", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, help="by default all")
    parser.add_argument("--corpus", help="validation texts, LANGUAGE/*.val.jsonl.zst; without it, no tokenizer")
    parser.add_argument("--peers-python", help="has chatglm-cpp and llama-cpp-python; without it, no chatglm")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--draw", action="store_true", help="draw what was measured before")
    options = parser.parse_args()
    arguments = {"loading": ["--like", "GLM-Large"], "chatglm": ["--peers-python", str(options.peers_python)]}
    arguments["tokenizer"] = [str(options.corpus), "--ours", str(HERE.parent / "src/gmask/pretrained")]
    needs = {"chatglm": options.peers_python, "tokenizer": options.corpus}
    names = [] if options.draw else options.only or [name for name in SCRIPTS if needs.get(name, True)]
    pairs = {(pair.what, pair.peer): pair for pair in (Pair(**one) for one in json.loads(BARS.read_text("utf-8")))}
    failed = []
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"{name} ...", flush=True)
        found = run_script(name, arguments.get(name, []), options.out)
        if found is None:
            failed.append(name)
            continue
        for pair in SCRIPTS[name](found):
            pairs[pair.what, pair.peer] = pair
            print(
                f"  {pair.what} beside {pair.peer}: {show(pair.ours)} and {show(pair.theirs)} {pair.unit}", flush=True
            )
        rows = ",\n".join(f" {json.dumps(asdict(pair))}" for pair in pairs.values())
        BARS.write_text(f"[\n{rows}\n]\n", "utf-8")
        draw(list(pairs.values()), PLOT)
    if options.draw:
        draw(list(pairs.values()), PLOT)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
