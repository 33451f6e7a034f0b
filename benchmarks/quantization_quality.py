"""How much worse does the bundled model predict held-out text with int8 and int4 weights, calibrated or not?

    python benchmarks/quantization_quality.py --data-root CORPUS [--tokens 8192] [--pieces 256] [--texts 50] [--json]

CORPUS is the folder that recipes/bundled.yaml was trained with. Perplexity is that of the hidden tokens of the held-out
texts, every source and objective counted alike; calibration reads training texts. All forms see the same blanks.

Keys and values in int8 matter as tokens are written: beginnings of held-out texts are continued greedily with them and
without, by float32 weights, and the continuations are compared up to where they part.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gmask
from gmask.evaluation.infilling import encode_texts, measure_losses
from gmask.quantization.calibration import calibrate_model, cut_texts
from gmask.quantization.quantizer import quantize_model
from gmask.recipes.pretraining import load_recipe, make_mixture
from gmask.tasks.records import Source, find_files, read_texts
from machine import describe_machine

RECIPE = Path(__file__).parents[1] / "recipes" / "bundled.yaml"
GROUPS = (128, 64, 32)
TEXT_BYTES = 20_000  # of each source, to calibrate with


def training_texts(sources: Sequence[Source]) -> list[str]:
    """Some text of each source in turn, the larger share of those that weigh more in training."""
    texts = []
    for source in sources:
        wanted = TEXT_BYTES * (1 + int(source.weight or 0) // 4)
        for text in read_texts(find_files(source.train)):
            texts.append(text[:wanted])
            wanted -= len(texts[-1])
            if wanted <= 0:
                break
    return texts


def forms(batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Callable[[Any], Any]]:
    """What is done to the float32 model, by the name of the form."""
    found: dict[str, Callable[[Any], Any]] = {
        "float32": lambda model: model,
        "bfloat16": lambda model: model.bfloat16(),
    }
    for bits in (8, 4):
        found[f"int{bits}, scale a row (published)"] = lambda model, bits=bits: quantize_model(model, bits=bits)
    for group in GROUPS:
        found[f"int4, groups of {group}"] = lambda model, group=group: quantize_model(model, bits=4, group_size=group)
    for group in (None, *GROUPS):
        name = f"groups of {group}" if group else "scale a row"
        found[f"int4, {name}, calibrated"] = lambda model, group=group: calibrate_model(
            model, batches, bits=4, group_size=group
        )
    found["int4, groups of 32, calibrated, embeddings too"] = lambda model: calibrate_model(
        model, batches, bits=4, group_size=32, embeddings=True
    )
    return found


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if name != "lm_head.weight")


def compare_kv_caches(texts: Sequence[str], longest: int = 32) -> dict[str, float]:
    """Continues texts greedily with keys and values in float32 and in int8."""
    settings = {"max_tokens": longest, "min_tokens": longest}
    plain, rounded = (
        gmask.infill(*gmask.load(device="cpu", kv_cache=held), texts, **settings) for held in (None, "int8")
    )
    gaps, equal = [], 0
    for one, other in zip(plain, rounded, strict=True):
        pairs = list(zip(one.blanks[0].tokens, other.blanks[0].tokens, strict=False))
        same = [a.id == b.id for a, b in pairs]
        equal += all(same)
        upto = same.index(False) if False in same else len(same)
        gaps += [abs(a.logprob - b.logprob) for a, b in pairs[:upto]]
    return {
        "texts": len(plain),
        "equal": equal / len(plain),
        "tokens_compared": len(gaps),
        "mean_difference": statistics.fmean(gaps),
        "largest_difference": max(gaps),
    }


def beginnings(texts: Sequence[str], count: int) -> list[str]:
    """The first 200 characters of texts that are longer, with a blank behind them."""
    return [f"{text[:200]} [gMASK]" for text in texts if len(text) > 400 and "[" not in text[:200]][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens of each source and objective")
    parser.add_argument("--pieces", type=int, default=256, help="of 256 tokens, to calibrate with")
    parser.add_argument("--texts", type=int, default=50, help="of each source, to be continued")
    parser.add_argument("--only", default="", help="forms whose names hold this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = load_recipe(str(RECIPE), [f"data.root={json.dumps(options.data_root)}"])
    sources = plan.data.resolved_sources
    model, tokenizer = gmask.load(dtype="float32", device="cpu")
    mixture = make_mixture(tokenizer.backend_tokenizer, plan.objective)
    held_texts = {s.name: list(read_texts(find_files(s.validation))) for s in sources if s.validation}
    heldout = {name: encode_texts(tokenizer, found) for name, found in held_texts.items()}
    texts = training_texts(sources)
    random.Random(0).shuffle(texts)
    batches = cut_texts(tokenizer, model.config, texts, pieces=options.pieces)
    rows: list[dict[str, Any]] = []
    reference = 0.0
    for name, change in forms(batches).items():
        if options.only not in name and name not in ("float32", "bfloat16"):
            continue
        started = time.perf_counter()
        model = change(gmask.load(dtype="float32", device="cpu")[0])
        seconds = time.perf_counter() - started
        if name not in ("float32", "bfloat16"):
            model.bfloat16()
        losses = measure_losses(
            model, tokenizer, heldout, mixture, max_tokens=options.tokens, seed=0, longest=plan.data.max_piece
        )
        loss = statistics.fmean(loss.nats_per_token for kinds in losses.values() for loss in kinds.values())
        reference = loss if name == "bfloat16" else reference
        rows.append({"form": name, "loss": loss, "perplexity": math.exp(loss), "megabytes": weight_bytes(model) / 1e6,
                     "worse": math.expm1(loss - reference) if reference else None, "seconds": seconds})  # fmt: skip
        if not options.json:
            worse = f"{rows[-1]['worse']:+.2%}" if reference else ""
            size = f"{rows[-1]['megabytes']:8.2f} MB {seconds:6.1f} s"
            print(f"{name:50}{loss:9.4f}{math.exp(loss):10.3f} {worse:>8} {size}", flush=True)
    kv_cache = compare_kv_caches([one for found in held_texts.values() for one in beginnings(found, options.texts)])
    tokens = sum(loss.tokens for kinds in losses.values() for loss in kinds.values())
    if options.json:
        found = {"tokens": tokens, "forms": rows, "kv_cache": kv_cache}
        print(json.dumps({"machine": describe_machine(options.threads), **found}, indent=2))
    else:
        print("keys and values in int8:", ", ".join(f"{name} {value:.4g}" for name, value in kv_cache.items()))
        print(f"{tokens} hidden tokens, {len(batches)} pieces to calibrate with; {describe_machine(options.threads)}")


if __name__ == "__main__":
    main()
