"""What do convert, quantize and merge write, to the bit?

A file is told by its SHA-256. Two kinds are told by their content instead: JSON, without the version of transformers
that wrote it; and the pickles of the original training code, since equal ones can be written in many ways.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from record.session import HAS_VOCABULARIES, Session

VERSIONS = ("transformers_version",)

COMMANDS = [
    "convert tiny huggingface --to huggingface",
    "convert huggingface back",
    "convert tiny half --dtype bfloat16",
    "convert tiny float16 --to huggingface --dtype float16",
    "convert tiny ranks1 --to megatron",
    "convert tiny ranks2 --to megatron --parts 2 --dtype float16",
    "convert ranks2 merged --heads 4 --tokenizer tokenizer",
    "convert golden/thudm-glm-tiny/ckpt ours --heads 4 --tokenizer tokenizer",
    "convert golden/thudm-glm-tiny/ckpt published --to huggingface --heads 4 --tokenizer tokenizer",
    "convert golden/thudm-glm-tiny/ckpt divided2 --to megatron --parts 2",
    "convert golden/thudm-glm-tiny/ckpt divided4 --to megatron --parts 4",
    "convert golden/thudm-glm-tiny/ckpt_MP2 united --to megatron",
    "convert golden/thudm-glm-tiny/ckpt_MP2 from-ranks --heads 4 --tokenizer tokenizer --dtype bfloat16",
    "convert golden/thudm-glm-tiny/ckpt_ds deepspeed --to megatron --parts 2",
    "quantize tiny int8 --bits 8",
    "quantize tiny int4 --bits 4",
    "quantize tiny int4-32 --bits 4 --group-size 32",
    "quantize tiny int8-embeddings --bits 8 --embeddings",
    "quantize tiny int8-32-embeddings --bits 8 --group-size 32 --embeddings",
    "quantize half half-int4 --bits 4",
    "merge tiny --adapter lora --output tiny-lora",
    "merge tiny --adapter ia3 --output tiny-ia3",
    "merge tiny --adapter lora --output tiny-lora-half --dtype bfloat16",
    "merge half --adapter lora --output half-lora",
    "train-tokenizer corpus.txt --output words --vocab-size 420 --seed 3",
]

PUBLISHED = [
    *(f"convert {name} {name}-{to} --to {to}" for to in ("gmask", "huggingface")
      for name in ("hf-glm-tiny", "hf-glm-10b-tiny", "chatglm-tiny", "chatglm-tiny-int4", "chatglm-tiny-int8")),
    "convert hf-glm-tiny-gmask glm-back --to huggingface",
    "convert chatglm-tiny-gmask chatglm-back --to huggingface",
    "convert hf-glm-10b-tiny glm-ranks --to megatron --parts 2",
    "quantize hf-glm-tiny glm-int8 --bits 8",
    "quantize hf-glm-tiny glm-int4 --bits 4 --group-size 32",
    "quantize chatglm-tiny chatglm-int8 --bits 8",
    "quantize chatglm-tiny chatglm-int4 --bits 4",
    "quantize chatglm-tiny chatglm-int4-32 --bits 4 --group-size 32",
    "quantize chatglm-tiny chatglm-int8-embeddings --bits 8 --embeddings",
    "quantize chatglm-tiny chatglm-int4-embeddings --bits 4 --embeddings",
]  # fmt: skip
"""Those that need the published vocabularies."""


def record_files(session: Session) -> dict[str, Any]:
    found = {"given": {name: describe_folder(session.folder / name) for name in ("tokenizer", "tiny")}}
    return found | {command: _run(session, command) for command in COMMANDS}


def record_published_files(session: Session) -> dict[str, Any]:
    assert HAS_VOCABULARIES
    return {command: _run(session, command) for command in PUBLISHED}


def _run(session: Session, command: str) -> dict[str, Any]:
    """What a command reports, and the files that it wrote."""
    before = set(session.folder.iterdir())
    is_json = not command.startswith("train-tokenizer")
    outcome = session.must(command + " --json" * is_json)
    (target,) = set(session.folder.iterdir()) - before
    report = json.loads(outcome.out) if is_json else outcome.out.splitlines()
    if is_json and "files" in report:  # the archives of another version of torch are a little longer or shorter
        report["files"] = {name: "..." if name.endswith(".pt") else size for name, size in report["files"].items()}
    return {"report": report, "files": describe_folder(target)}


def describe_folder(folder: Path) -> dict[str, Any]:
    """Every file of a folder, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): describe_file(path) for path in paths}


def describe_file(path: Path) -> Any:
    if path.suffix == ".pt":
        return describe_value(torch.load(path, weights_only=True))
    if path.suffix == ".json" and path.name != "tokenizer.json":
        values = json.loads(path.read_text("utf-8"))
        return {key: value for key, value in values.items() if key not in VERSIONS}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".safetensors":
        return {"sha256": digest, "tensors": describe_tensors(path)}
    return digest


def describe_tensors(path: Path) -> dict[str, str]:
    """The names of a file of weights, with dtype and shape."""
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        return {name: f"{one.get_dtype()} {one.get_shape()}" for name, one in slices.items()}


def describe_value(value: Any) -> Any:
    """What a pickle holds: tensors by their bytes, in the order in which they stand there."""
    if isinstance(value, torch.Tensor):
        digest = hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        return f"{value.dtype} {list(value.shape)} {digest[:16]}"
    if isinstance(value, dict):
        return {str(key): describe_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [describe_value(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
