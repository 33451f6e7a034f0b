"""What does one of several processes compute that run a model together? Started by test_tensor_parallel.py.

    torchrun ... tensor_parallel_worker.py FOLDER

FOLDER holds the models and `inputs.pt`; what this process computed goes to FOLDER/<rank>.pt.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMForConditionalGeneration
from gmask.models.glm import GLMForConditionalGeneration
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.quantization.quantizer import QuantizationConfig

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
REFUSED = {
    "odd": GLMForConditionalGeneration,
    "wide-groups": GLMForConditionalGeneration,
    "chat-prefix": ChatGLMForConditionalGeneration,
}
INTEGERS = {
    "int4": GLMForConditionalGeneration,
    "int4-groups": GLMForConditionalGeneration,
    "chat-int8": ChatGLMForConditionalGeneration,
    "chat-int4": ChatGLMForConditionalGeneration,
}


@torch.no_grad()
def compute(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The logits, and the greedy ids with each kind of cache if the model writes."""
    found = {"logits": model(**inputs).logits}
    if model.can_generate():
        for name, settings in CACHES.items():
            found[name] = model.generate(**inputs, max_new_tokens=12, do_sample=False, **settings)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    divided = DistributedConfig(tp_plan="auto")
    inputs = torch.load(folder / "inputs.pt")
    found: dict[str, Any] = {}
    for name in ("ours", "published"):
        model = GLMForConditionalGeneration.from_pretrained(
            folder / name, distributed_config=divided, dtype=torch.float32
        )
        found[name] = compute(model.eval(), inputs)
        found[f"{name}.local"] = {
            key: value.to_local().shape for key, value in model.named_parameters() if is_cut(value)
        }
    chat = ChatGLMForConditionalGeneration.from_pretrained(
        folder / "chat", distributed_config=divided, dtype=torch.float32
    )
    found["chat"] = compute(chat.eval(), torch.load(folder / "chat.pt"))
    found["chat.local"] = {key: value.to_local().shape for key, value in chat.named_parameters() if is_cut(value)}
    classifier = GLMForSequenceClassification.from_pretrained(
        folder / "classifier", tp_plan="auto", dtype=torch.float32
    )  # the older keyword
    found["classifier"] = compute(classifier.eval(), inputs)
    model.save_pretrained(folder / "saved")
    for name, model_class in INTEGERS.items():
        whole = model_class.from_pretrained(folder / name, distributed_config=divided, dtype=torch.float32)
        found[name] = compute(whole.eval(), torch.load(folder / ("chat.pt" if "chat" in name else "inputs.pt")))
        found[f"{name}.local"] = {key: value.shape for key, value in whole.named_parameters()}
        if name == "int4-groups":
            whole.save_pretrained(folder / "saved-int4")
    form = QuantizationConfig(8)
    for name, model_class, settings in (
        *((name, model_class, {}) for name, model_class in REFUSED.items()),
        ("quantized while loading", GLMForConditionalGeneration, {"quantization_config": form}),
    ):
        try:
            place = folder / (name if (folder / name).exists() else "ours")
            model_class.from_pretrained(place, distributed_config=divided, **settings)
        except GmaskError as error:
            found[name] = str(error)
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


def is_cut(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "placements") and parameter.to_local().shape != parameter.shape


if __name__ == "__main__":
    main(Path(sys.argv[1]))
