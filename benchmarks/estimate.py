"""Does a model take the memory that `gmask estimate` says?

    python benchmarks/estimate.py [--shape GLM-2B ...] [--form int4 ...] [--context-length 512 ...] [--return-freed]

A model of that shape, with constants for weights, is made in a fresh process, reads a prompt that fills the context but
for three tokens, and answers with these. Measured is the largest resident memory of the process (VmHWM), against the
estimated peak; and without what the process held before the model was made, against the peak without the libraries.
Both ought to be within 10 % of each other. By default the allocator of the C library is as it comes; it keeps some of
what is freed, which no estimate counts. With `--return-freed` what is freed goes back at once
(MALLOC_MMAP_THRESHOLD_=65536). GLM-2B takes 8.5 GB in float32, ChatGLM-6B in int4 5 GB.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import describe_machine

FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
    "int4 float32": {"dtype": "float32", "quantize": "int4"},
    "int4 embeddings": {"dtype": "bfloat16", "quantize": "int4", "group_size": 32, "embeddings": True},
}
ANSWER = 3  # tokens


def resident_bytes(name: str) -> int:
    """VmRSS, or VmHWM, its largest value so far."""
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def config_of(shape: str | dict[str, Any]) -> Any:
    """Of a published model by its name, or of the values of a config."""
    from gmask.checkpoints.zoo import find_family
    from gmask.estimation.inference import config_of_family
    from gmask.models.chatglm import ChatGLMConfig
    from gmask.models.glm import GLMConfig

    if isinstance(shape, dict):
        kinds = {"glm": GLMConfig, "chatglm": ChatGLMConfig}
        return kinds[shape["kind"]](**{name: value for name, value in shape.items() if name != "kind"})
    family = find_family(shape)
    if family is None:
        raise SystemExit(f"--shape {shape}: no such model; gmask info --zoo lists them")
    return config_of_family(family)


def read_quantization(form: dict[str, Any]) -> Any:
    from gmask.quantization.quantizer import read_form

    found = read_form(form.get("quantize"), form.get("group_size"))
    if found is not None:
        found.embeddings = form.get("embeddings", False)
    return found


def make_model(config: Any, form: dict[str, Any]) -> Any:
    """A model whose memory is written to, tensor by tensor."""
    import torch

    from gmask.estimation.inference import shape_at
    from gmask.quantization.quantizer import finish

    quantized = read_quantization(form)
    model = shape_at(config, dtype=getattr(torch, form["dtype"]), form=quantized)
    filled = {
        parameter: torch.full(parameter.shape, 0.01 if parameter.is_floating_point() else 1, dtype=parameter.dtype)
        for parameter in model.parameters()
    }
    weights = {name: filled[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.eval()
    return model if quantized is None else finish(model, quantized)


def run_model(model: Any, context_length: int) -> None:
    """Reads a prompt and answers, as `gmask infill` and `gmask chat` do."""
    from gmask.generation.encoding import Context
    from gmask.generation.engine import Stepper
    from gmask.generation.sampling import Sampler
    from gmask.generation.settings import Sampling
    from gmask.infilling.blanks import BlankTokens

    special = BlankTokens(mask=5, smask=6, gmask=7, sop=8, eop=9, pad=0, cls=1, eos=2)
    prompt = Context((*[10] * (context_length - ANSWER - 2), special.gmask), (context_length - ANSWER - 2,))
    sampling = Sampling(max_tokens=ANSWER, min_tokens=ANSWER)
    Stepper(model, None, Sampler((special.eop,)), special).run([prompt], sampling, seeds=[0])


def measure(cases: list[dict[str, Any]]) -> Iterator[dict[str, int]]:
    """The resident memory before each case, and the largest during it."""
    tiny: dict[str, Any] = {
        "kind": "glm",
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for form in FORMS.values():  # loads what every form needs
        run_model(make_model(config_of(tiny), form), 32)
    for case in cases:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident_bytes("VmRSS")
        run_model(make_model(config_of(case["shape"]), case["form"]), case["context_length"])
        yield {"before": before, "peak": resident_bytes("VmHWM")}


def run_process(cases: list[dict[str, Any]], *, threads: int, return_freed: bool) -> list[dict[str, int]]:
    """What a fresh process measures."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if return_freed:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, __file__, "--process", json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{cases}: {done.stderr.strip()}")
    records: list[dict[str, int]] = json.loads(done.stdout)
    return records


def compare(cases: list[dict[str, Any]], *, threads: int, return_freed: bool) -> Iterator[dict[str, Any]]:
    """A record for each case."""
    import torch

    from gmask.estimation.inference import estimate_inference

    for case in cases:
        (measured,) = run_process([case], threads=threads, return_freed=return_freed)
        estimate = estimate_inference(
            config_of(case["shape"]),
            dtype=getattr(torch, case["form"]["dtype"]),
            form=read_quantization(case["form"]),
            context_length=case["context_length"],
        )
        parts = {part: getattr(estimate, part) for part in ("weights", "cache", "working", "runtime", "peak")}
        grown = measured["peak"] - measured["before"]
        ratios = {
            "ratio": estimate.peak / measured["peak"],
            "ratio_of_model": (estimate.peak - estimate.runtime) / grown,
        }
        yield {**case, **parts, "measured": measured["peak"], "measured_of_model": grown, **ratios}


def print_table(records: Iterator[dict[str, Any]]) -> None:
    names = {json.dumps(form): name for name, form in FORMS.items()}
    columns = "shape", "form", "context", "weights", "cache", "working", "estimated peak, MB", "measured", "ratio"
    print(f"\n| {' | '.join(columns)} | of the model |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for record in records:
        sizes = [record[name] / 1e6 for name in ("weights", "cache", "working", "peak", "measured")]
        row = [record["shape"], names[json.dumps(record["form"])], str(record["context_length"])]
        row += [f"{size:.0f}" for size in sizes] + [f"{record['ratio']:.2f}", f"{record['ratio_of_model']:.2f}"]
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", nargs="+", default=["GLM-Large-Chinese"], help="published models")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--context-length", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--return-freed", action="store_true", help="have the allocator keep nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", type=json.loads, help="cases in JSON: print what a process takes, and no estimate")
    parser.add_argument("--process", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        print(json.dumps(list(measure(options.process))))
        return
    if options.measure:
        print(json.dumps(run_process(options.measure, threads=options.threads, return_freed=options.return_freed)))
        return
    cases = [
        {"shape": shape, "form": FORMS[form], "context_length": length}
        for shape in options.shape
        for form in options.form
        for length in options.context_length
    ]
    machine = describe_machine(options.threads)
    records = compare(cases, threads=options.threads, return_freed=options.return_freed)
    if options.json:
        print(json.dumps({"machine": machine, "return_freed": options.return_freed, "results": list(records)}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print_table(records)


if __name__ == "__main__":
    main()
