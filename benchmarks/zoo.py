"""Does every published model load, run and fill a blank at its full shape? With random weights, in the published form.

    python benchmarks/zoo.py [--rows GLM-Base GLM-2B] [--limit-gb 20] [--vocabularies FOLDER] [--folder /tmp] [--json]

For each row of the catalog one process writes a folder as it was published (config.json without special ids,
pytorch_model.bin under the bare keys, float16), and another one loads it in bfloat16, runs 128 tokens forward and fills
one blank of eight tokens. The folder is then removed. Rows of one shape and vocabulary are run once. A row whose
weights need more than the limit (by default what is free now) is skipped and says so; where the memory suffices but the
disk does not, the model is built in memory, without a file.

With --vocabularies, a folder of the files that THUDM/GLM has (bert-large-uncased-vocab.txt, gpt2-vocab.json,
gpt2-merges.txt, roberta-vocab.json, cog-pretrain.model; plain or gzipped), a text is filled by ``gmask.infill``; by
default, ids. Seconds are those of a single run from a warm file cache. The peak is that of anonymous memory (what
mapped files take can be given up at any time), less that after the imports.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

import gmask
from gmask.checkpoints.load import load_model, load_tokenizer
from gmask.checkpoints.zoo import FAMILIES, Family, find_family
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from loading import measure as measure_memory
from machine import describe_machine

Result = TypeVar("Result")
TOKENS = 128
ANSWER = 8
OVERHEAD_GB = 1.2  # Python, torch and the activations
TEXT = "The capital of France is [MASK], on the river Seine. 北京是中国的首都。"

VOCABULARY_FILES = {
    "bert": {"vocab.txt": "bert-large-uncased-vocab.txt"},
    "gpt2": {"vocab.json": "gpt2-vocab.json", "merges.txt": "gpt2-merges.txt"},
    "roberta": {"vocab.json": "roberta-vocab.json", "merges.txt": "gpt2-merges.txt"},
    "chinese": {"cog-pretrain.model": "cog-pretrain.model"},
}
"""The files of the published folders, and their names in --vocabularies, where they may be gzipped."""

FIRST_ADDED = {"bert": 30522, "gpt2": 50257, "roberta": 50265, "chinese": 50000}
"""Ids below are those of the vocabulary files."""

TOKENIZER_CLASSES = {
    "bert": "GLMBertTokenizer",
    "gpt2": "GLMGPT2Tokenizer",
    "roberta": "GLMRobertaTokenizer",
    "chinese": "GLMChineseTokenizer",
}
SPELLINGS = {
    "bert": {"pad": "[PAD]", "eos": "[PAD]"},
    "roberta": {"cls": "<s>", "pad": "</s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"},
}
USUAL = {"pad": "<|endoftext|>", "eos": "<|endoftext|>", "cls": "[CLS]", "mask": "[MASK]", "unk": "[UNK]"}
MARKERS = {"sop": "<|startofpiece|>", "eop": "<|endofpiece|>", "gmask": "[gMASK]", "smask": "[sMASK]", "sep": "[SEP]"}


def published_config(family: Family) -> dict[str, Any]:
    """As on the hub: no special ids."""
    return {
        "architectures": ["GLMModel"],
        "model_type": "glm",
        "block_position_encoding": True,
        "num_layers": family.layers,
        "hidden_size": family.hidden_size,
        "num_attention_heads": family.heads,
        "max_sequence_length": family.positions,
        "vocab_size": family.vocab_size,
        "torch_dtype": "float32",
    }


def random_weights(family: Family, dtype: torch.dtype) -> dict[str, Tensor]:
    """Under the keys of the published files."""
    config = GLMConfig.from_dict({**published_config(family), "model_type": GLMConfig.model_type})
    with torch.device("meta"):
        model = GLMForConditionalGeneration(config).glm
    torch.manual_seed(0)
    weights = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("bias"):
            weights[key] = torch.zeros(tensor.shape, dtype=dtype)
        elif "layernorm" in key:
            weights[key] = torch.ones(tensor.shape, dtype=dtype)
        else:
            weights[key] = torch.empty(tensor.shape, dtype=dtype).normal_(std=0.02)
    return weights


def write_folder(family: Family, folder: Path, vocabularies: Path | None) -> None:
    (folder / "config.json").write_text(json.dumps(published_config(family)), encoding="utf-8")
    torch.save(random_weights(family, torch.float16), folder / "pytorch_model.bin")
    if vocabularies is not None:
        write_vocabulary(family, folder, vocabularies)


def write_vocabulary(family: Family, folder: Path, vocabularies: Path) -> None:
    spelled = {**USUAL, **SPELLINGS.get(family.tokenizer, {})}
    settings = {f"{role}_token": token for role, token in spelled.items()}
    settings |= {"tokenizer_class": TOKENIZER_CLASSES[family.tokenizer], "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, source in VOCABULARY_FILES[family.tokenizer].items():
        plain, packed = vocabularies / source, vocabularies / f"{source}.gz"
        content = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
        (folder / name).write_bytes(content)
    tokens = {token: family.special_ids.get(f"{role}_token_id") for role, token in {**spelled, **MARKERS}.items()}
    first = FIRST_ADDED[family.tokenizer]
    added = {token: token_id for token, token_id in tokens.items() if token_id is not None and token_id >= first}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")


def build_directly(family: Family) -> GLMForConditionalGeneration:
    """The model without a file."""
    ids = {role: token_id for role, token_id in family.special_ids.items() if hasattr(GLMConfig, role)}
    values = {**published_config(family), **ids, "model_type": GLMConfig.model_type}
    with torch.device("meta"):
        model = GLMForConditionalGeneration(GLMConfig.from_dict(values))
    weights = random_weights(family, torch.bfloat16)
    model.glm.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def timed(action: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def fill(model: GLMForConditionalGeneration, folder: Path | None) -> str:
    """One blank, by text where the folder has a vocabulary, else by ids; what was filled in."""
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        out = gmask.infill(model, load_tokenizer(folder), TEXT, max_tokens=ANSWER)
        return out.blanks[0].text
    config = model.config
    ids = [*range(200, 216), config.mask_token_id, *range(300, 316), config.eos_token_id, config.sop_token_id]
    answer = model.generate(torch.tensor([ids]), max_new_tokens=ANSWER, do_sample=False, eos_token_id=None)
    return f"{answer.shape[1] - len(ids)} ids"


def measure(family: Family, folder: Path | None) -> dict[str, Any]:
    """Loads or builds a model, uses it, and watches the memory."""
    results: dict[str, Any] = {}
    memory = measure_memory(lambda: use(family, folder, results))
    return results | {"peak_gb": memory["peak"] / 1e9}


def use(family: Family, folder: Path | None, results: dict[str, Any]) -> GLMForConditionalGeneration:
    """Loads or builds a model, runs it, fills a blank; adds what that took to the results."""
    if folder is None:
        results["load_s"], model = timed(lambda: build_directly(family))
    else:
        results["load_s"], model = timed(lambda: load_model(folder, dtype="bfloat16", device="cpu"))
    ids = torch.arange(300, 300 + TOKENS)[None]
    with torch.inference_mode():
        results["forward_s"], out = timed(lambda: model(ids))
        assert out.logits.shape == (1, TOKENS, family.vocab_size)
        assert bool(out.logits.isfinite().all())
        results["infill_s"], results["answer"] = timed(lambda: fill(model, folder))
    results["parameters"] = model.num_parameters()
    return model


def run_process(arguments: Sequence[str], threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if finished.returncode:
        return {"failed": (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]}
    return dict(json.loads(finished.stdout or "{}"))


def run_row(family: Family, options: argparse.Namespace) -> dict[str, Any]:
    need = family.memory("bfloat16") / 1e9 + OVERHEAD_GB
    limit = options.limit_gb or psutil.virtual_memory().available / 1e9
    if need > limit:
        known = "the limit is" if options.limit_gb else "free are"
        return {"skipped": f"needs {need:.1f} GB, {known} {limit:.1f} GB"}
    if 1.1 * family.memory("float16") > shutil.disk_usage(options.folder).free:
        return run_process(["--measure", family.name], options.threads) | {"built": True}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        vocabularies = ["--vocabularies", str(options.vocabularies)] if options.vocabularies else []
        written = run_process(["--write", family.name, "--folder", folder, *vocabularies], options.threads)
        return written or run_process(["--measure", family.name, "--folder", folder], options.threads)


def distinct(families: Sequence[Family]) -> dict[Family, list[str]]:
    """One row of each shape and vocabulary, and the names of all that have it."""
    found: dict[tuple[Any, ...], list[Family]] = {}
    for family in families:
        if family.architecture == "glm":
            key = (family.layers, family.hidden_size, family.positions, family.tokenizer)
            found.setdefault(key, []).append(family)
    return {same[0]: [family.name for family in same] for same in found.values()}


def table_line(names: Sequence[str], result: Mapping[str, Any]) -> str:
    label = ", ".join(names)
    if "peak_gb" not in result:
        return f"| {label} | {result.get('skipped') or 'failed: ' + result['failed']} | | | | |"
    seconds = [f"{result[key]:.2f}" for key in ("load_s", "forward_s", "infill_s")]
    if result.get("built"):
        seconds[0] += " (built, no file)"
    return f"| {label} | {result['parameters'] / 1e6:,.0f} M | {' | '.join(seconds)} | {result['peak_gb']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", nargs="+", help="names of the catalog; all by default")
    parser.add_argument("--limit-gb", type=float, help="the memory that a row may need; by default what is free")
    parser.add_argument("--vocabularies", type=Path, help="folder of the published vocabulary files")
    parser.add_argument("--folder", type=Path, help="where the folders are written, one at a time")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_folder(row(options.write), options.folder, options.vocabularies)
        return
    if options.measure:
        print(json.dumps(measure(row(options.measure), options.folder)))
        return
    options.folder = options.folder or Path(tempfile.gettempdir())
    rows = distinct([row(name) for name in options.rows] if options.rows else FAMILIES)
    machine = describe_machine(options.threads)
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in machine.items()))
        print("\n| model | parameters | load, s | forward of 128 tokens, s | one blank, s | peak GB |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
    results = {}
    for family, names in rows.items():
        results[family.name] = run_row(family, options)
        if not options.json:
            print(table_line(names, results[family.name]), flush=True)
    if options.json:
        print(json.dumps({"machine": machine, "rows": results}))


def row(name: str) -> Family:
    family = find_family(name)
    if family is None:
        raise SystemExit(f"{name}: not in the catalog")
    return family


if __name__ == "__main__":
    main()
