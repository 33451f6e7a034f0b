"""How much memory does loading take at its peak, and how long, against plain `torch.load` and `load_state_dict`?

    python benchmarks/loading.py [--like GLM-2B] [--form bin] [--threads 2] [--rounds 3] [--folder DIR] [--json]

A checkpoint of that shape, in float16, is made in every form (one at a time, in a temporary folder that is deleted) and
loaded onto the CPU by fresh processes: by `load_model` of gmask, and plainly. The plain way is given its model for
nothing: made without initialization, in the target dtype, before the clock starts. The files are read once before, so
they come from the file cache. Memory is anonymous memory (RssAnon: what mapped files take can be given up at any time),
sampled every 2 ms, less that after the imports; of several rounds the times are medians, the peaks the largest. Aims:
a peak of at most 1.15 times the size of the weights in the target dtype, and no more time than `torch.load`. The plain
way needs 12 GB of memory for GLM-2B; no file is larger than 8 GB.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import describe_machine

FORMS = {
    "safetensors": ("float16", "bfloat16", "float32"),
    "bin": ("float16", "bfloat16", "float32"),
    "megatron, 1 rank": ("float16", "float32"),
    "megatron, 2 ranks": ("float16", "float32"),
    "bin in float32": ("bfloat16",),
}
"""Of checkpoints, and the dtypes that each is loaded in."""


def anonymous_bytes() -> int:
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def measure(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds that `work` takes, and by how much anonymous memory grows at most meanwhile."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    model = work()
    seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    peak = max(peak, anonymous_bytes()) - before
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return {"seconds": seconds, "peak": peak, "size": size}


def measure_gmask(folder: Path, like: str, dtype: str) -> dict[str, float]:
    from gmask.checkpoints.load import load_model

    return measure(lambda: load_model(folder, dtype=dtype, device="cpu", like=like))


def measure_plain(folder: Path, like: str, dtype: str) -> dict[str, float]:
    import torch
    from safetensors.torch import load_file

    from gmask.checkpoints.folder import read_config
    from gmask.models.glm import GLMModel

    (path,) = (path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt"))
    with torch.device("meta"):
        model = GLMModel(read_config(folder, like))
    model.to(getattr(torch, dtype)).to_empty(device="cpu")

    def load() -> Any:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(weights.get("module", weights))
        return model

    return measure(load)


def make_folder(folder: Path, form: str, like: str) -> None:
    """A checkpoint with weights that stand for random ones: one block of them, again and again."""
    import torch
    from safetensors.torch import save_file

    from gmask.checkpoints.formats import divide
    from gmask.checkpoints.zoo import find_family
    from gmask.models.glm import GLMConfig, GLMModel

    family = find_family(like)
    if family is None:
        raise SystemExit(f"--like {like}: no such model; gmask info --zoo lists them")
    config = GLMConfig(
        vocab_size=family.vocab_size,
        hidden_size=family.hidden_size,
        num_hidden_layers=family.layers,
        num_attention_heads=family.heads,
        max_position_embeddings=family.positions,
        **family.special_ids,
    )
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in GLMModel(config).state_dict().items()}
    dtype = torch.float32 if "float32" in form else torch.float16
    block = torch.randn(2**20).mul(0.02).to(dtype)
    weights = {
        key: block.repeat(shape.numel() // len(block) + 1)[: shape.numel()].view(shape).clone()
        for key, shape in shapes.items()
    }
    if form.startswith("megatron"):
        ranks = int(form.split()[1])
        (folder / "1000").mkdir()
        (folder / "latest").write_text("1000")
        for rank in range(ranks):
            module = {key: divide(key, tensor, ranks)[rank].clone() for key, tensor in weights.items()}
            torch.save({"module": module, "iteration": 1000}, folder / "1000" / f"mp_rank_{rank:02d}_model_states.pt")
        return
    config.save_pretrained(folder)
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")


def run_process(task: str, folder: Path, form: str, like: str, dtype: str, threads: int) -> dict[str, float]:
    """What a fresh process measures."""
    command = [sys.executable, __file__, "--process", task, str(folder), form, dtype, "--like", like]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    record: dict[str, float] = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    return record


def run_task(task: str, folder: Path, form: str, dtype: str, like: str, threads: int) -> None:
    """The work of a fresh process: prints what it measures."""
    import torch

    torch.set_num_threads(threads)
    if task == "make":
        make_folder(folder, form, like)
    else:
        print(json.dumps({"gmask": measure_gmask, "plain": measure_plain}[task](folder, like, dtype)))


def compare(forms: list[str], *, like: str, threads: int, rounds: int, parent: str | None) -> Iterator[dict[str, Any]]:
    """A record for each form and dtype."""
    for form in forms:
        folder = Path(tempfile.mkdtemp(prefix="gmask-loading-", dir=parent))
        try:
            run_process("make", folder, form, like, "", threads)
            for path in folder.rglob("*"):
                if path.is_file():
                    with path.open("rb", buffering=0) as file:
                        while file.read(2**24):
                            pass
            for dtype in FORMS[form]:
                tasks = ["gmask"] if form.endswith("ranks") else ["gmask", "plain"]
                found: dict[str, list[dict[str, float]]] = {task: [] for task in tasks}
                for _ in range(rounds):
                    for task in tasks:
                        found[task].append(run_process(task, folder, form, like, dtype, threads))
                yield {"form": form, "dtype": dtype} | {
                    task: {
                        "seconds": statistics.median(record["seconds"] for record in records),
                        "peak": max(record["peak"] for record in records) / records[0]["size"],
                        "size": records[0]["size"],
                    }
                    for task, records in found.items()
                }
        finally:
            shutil.rmtree(folder)


def print_table(records: Iterator[dict[str, Any]]) -> None:
    print("\n| checkpoint | as | size | peak memory / size | plain | seconds | plain | plain / gmask |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for record in records:
        ours, plain = record["gmask"], record.get("plain")
        row = [record["form"], record["dtype"], f"{ours['size'] / 1e9:.2f} GB", f"{ours['peak']:.2f}"]
        row += [f"{plain['peak']:.2f}" if plain else "-", f"{ours['seconds']:.2f}"]
        row += [f"{plain['seconds']:.2f}", f"{plain['seconds'] / ours['seconds']:.2f}"] if plain else ["-", "-"]
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--like", default="GLM-2B", help="the published model whose shape is taken")
    parser.add_argument(
        "--form", action="append", choices=FORMS, help="one of the forms, again for more; all if absent"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the checkpoints are made, one at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--process", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        task, folder, form, dtype = options.process
        run_task(task, Path(folder), form, dtype, options.like, options.threads)
        return
    machine = describe_machine(options.threads)
    settings = {name: getattr(options, name) for name in ("like", "threads", "rounds")}
    records = compare(options.form or list(FORMS), parent=options.folder, **settings)
    if options.json:
        print(json.dumps({"machine": machine, "like": options.like, "results": list(records)}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print_table(records)


if __name__ == "__main__":
    main()
