"""How much memory does loading a checkpoint of each form take? Prints peaks, as multiples of the size of the model.

A process of its own, so that nothing freed before is used again unseen; run with ``MALLOC_MMAP_THRESHOLD_=65536``.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gmask.checkpoints import load as checkpoint_load
from gmask.checkpoints.formats import divide
from gmask.checkpoints.load import load_model
from gmask.models.glm import GLMConfig, GLMModel

IDS = dict(pad_token_id=0, eos_token_id=1, mask_token_id=5, smask_token_id=6, gmask_token_id=7, sop_token_id=8,
           eop_token_id=9)  # fmt: skip
CONVERSIONS = (
    ("float16", "float32", None),
    ("float32", "bfloat16", None),
    ("float16", "float16", None),
    ("float16", "bfloat16", "int4"),
    ("float32", "bfloat16", "int8"),
)


def anonymous_bytes() -> int:
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def write(folder: Path, form: str, dtype: str) -> None:
    folder.mkdir()
    config = GLMConfig(vocab_size=1536, hidden_size=384, num_hidden_layers=8, num_attention_heads=6, **IDS)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in GLMModel(config).state_dict().items()}
    weights = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, shape in shapes.items()}
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors")
    elif form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        for rank in range(2):
            module = {key: divide(key, tensor, 2)[rank].clone() for key, tensor in weights.items()}
            torch.save({"module": module}, folder / f"mp_rank_{rank:02d}_model_states.pt")


def main(parent: Path) -> None:
    grown: list[int] = []
    stream = checkpoint_load.stream_weights

    def measured(*args: Any, **settings: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for item in stream(*args, **settings):
            yield item
            grown.append(anonymous_bytes())  # the tensor has its place in the model, and what was read is still held

    checkpoint_load.stream_weights = measured  # type: ignore[assignment]
    peaks = {}
    for form in ("safetensors", "bin", "megatron"):
        for stored, wanted, quantize in CONVERSIONS:
            folder = parent / f"{form} {stored}"
            if not folder.exists():
                write(folder, form, stored)
            before = anonymous_bytes()
            grown.clear()
            model = load_model(folder, device="cpu", dtype=wanted, quantize=quantize)
            size = sum(parameter.nbytes for parameter in model.parameters())
            peaks[f"{form} {stored} {wanted} {quantize}"] = (max(*grown, anonymous_bytes()) - before) / size
            del model
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
