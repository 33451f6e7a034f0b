"""A ChatGLM-6B with random weights: the folder that ``gmask quantize --embeddings`` would write, and its times.

python -m peers.gmask_model write int4 FOLDER
python -m peers.gmask_model serve FOLDER THREADS [int8]    (the form of keys and values)
"""

import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmask.checkpoints.load import load_model
from gmask.checkpoints.save import SHARD_BYTES, write_config
from gmask.checkpoints.tensor_files import Blocks, SafetensorsWriter, plan_shards
from gmask.files import write_json
from gmask.generation.chat import DEFAULTS
from gmask.generation.encoding import Context
from gmask.generation.engine import Request, Stepper
from gmask.generation.sampling import Sampler
from gmask.generation.settings import Sampling
from gmask.infilling.blanks import BlankTokens
from gmask.models.cache import read_kv_cache
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.quantization.quantizer import QuantizationConfig, lay_out, quantized_layers
from peers.serving import resident_bytes, serve

FORMS = {
    "int4": QuantizationConfig(4, embeddings=True),
    "int4-mapped": QuantizationConfig(4, embeddings=True),  # as gmask convert --to mapped writes it
    "int4-g32": QuantizationConfig(4, group_size=32, embeddings=True),
    "int8": QuantizationConfig(8, embeddings=True),
    "bf16": None,
}
DEVIATION = 0.02  # of the weights, as ChatGLM-6B is initialized
MOST_TOKENS = 1000  # of an answer, which has no end before


def write_folder(folder: Path, form: QuantizationConfig | None, *, mapped: bool = False) -> None:
    """Config and weights, without a tokenizer; no more memory is taken than the largest tensor needs."""
    config = ChatGLMConfig(architectures=["ChatGLMForConditionalGeneration"], dtype="bfloat16")
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).bfloat16()
        if form is not None:
            lay_out(model, form)
            config.quantization_config = form
    plan = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder, published=False)
    places = {}
    for file, shard in plan_shards(plan, SHARD_BYTES).items():
        blocks = Blocks.of(form.bits, shard) if mapped and form is not None else None
        with SafetensorsWriter(folder / file, shard, blocks) as writer:
            for name, planned in shard.items():
                writer.write(name, random_tensor(name, planned, form))
                places[name] = file
    if len(set(places.values())) > 1:
        size = sum(tensor.nbytes for tensor in plan.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def random_tensor(name: str, planned: Tensor, form: QuantizationConfig | None) -> Tensor:
    """Numbers that keep the activations finite: one random block, again and again."""
    if name.endswith("weight_scale"):
        assert form is not None
        largest = 2 ** (form.bits - 1)
        return torch.full(planned.shape, DEVIATION * 3**0.5 / largest, dtype=planned.dtype)
    if name.endswith("bias"):
        return torch.zeros(planned.shape, dtype=planned.dtype)
    if "layernorm" in name:
        return torch.ones(planned.shape, dtype=planned.dtype)
    block = random_block(planned.dtype)
    return block.repeat(planned.numel() // len(block) + 1)[: planned.numel()].view(planned.shape)


@cache
def random_block(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (2**22 + 1,)  # not a multiple of a row: the rows of a weight differ
    if dtype == torch.int8:
        return torch.randint(-127, 128, size, dtype=dtype, generator=generator)
    return torch.randn(size, generator=generator).mul(DEVIATION).to(dtype)


class Writer:
    """Reads prompts, then writes token by token, through what `gmask.Chat` runs."""

    def __init__(self, folder: Path, kv_cache: str | None = None) -> None:
        self.model = load_model(folder, dtype="bfloat16", device="cpu")
        self.model.kv_cache = read_kv_cache(kv_cache)
        config = self.model.config
        end, pad, mask, gmask, sop = (
            getattr(config, f"{name}_token_id") for name in ("eos", "pad", "mask", "gmask", "bos")
        )
        self.special = BlankTokens(mask=mask, smask=mask, gmask=gmask, sop=sop, eop=end, pad=pad, cls=pad, eos=end)
        self.sampler = Sampler((end,), (pad, mask, gmask))
        self.steppers: dict[int, Stepper] = {}  # answers that are being written, by number of rows

    def prefill(self, tokens: int, rows: int = 1) -> float:
        """Seconds that prompts of this length and the choice of their first tokens take; greedy, as `decode` is."""
        return self._begin(tokens, rows, temperature=0.0)

    def draw(self, tokens: int) -> float:
        """`prefill` for one row, whose tokens are drawn as `gmask.Chat` does by default."""
        return self._begin(tokens, 1, **DEFAULTS)

    def _begin(self, tokens: int, rows: int, **settings: Any) -> float:
        ids = (*(300 + index % 1500 for index in range(tokens - 2)), self.special.gmask)  # and <sop>
        sampling = Sampling(max_tokens=MOST_TOKENS, min_tokens=MOST_TOKENS, **settings)
        self.steppers.pop(rows, None)
        stepper = self.steppers[rows] = Stepper(self.model, None, self.sampler, self.special)
        for _ in range(rows):
            request = Request(context=Context(ids, (tokens - 2,)), sampling=sampling)
            stepper.scheduler.push(stepper.prepare(request, seed=0))
        return self._step(rows)

    def decode(self, tokens: int, rows: int = 1) -> list[float]:
        """Seconds of each further token behind the latest prompts of so many rows."""
        return [self._step(rows) for _ in range(tokens)]

    def _step(self, rows: int) -> float:
        started = time.perf_counter()
        self.steppers[rows].step()
        return time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds that a loop takes to touch the bytes of all matrices and scales once, and how many they are."""
        products = [layer.product() for _, layer in quantized_layers(self.model)]  # as they lie in memory
        matrices = {tensor for product in products for tensor in (product.data, product.scale)}
        matrices = matrices or {tensor for tensor in self.model.parameters() if tensor.ndim == 2}
        started = time.perf_counter()
        for matrix in matrices:
            matrix.detach().flatten().view(torch.float32).amax()
        return {"seconds": time.perf_counter() - started, "bytes": sum(matrix.nbytes for matrix in matrices)}


def main() -> None:
    task, *arguments = sys.argv[1:]
    if task == "write":
        form, folder = arguments
        write_folder(Path(folder), FORMS[form], mapped=form.endswith("mapped"))
        return
    folder, threads, *held = arguments
    torch.set_num_threads(int(threads))
    started = time.perf_counter()
    writer = Writer(Path(folder), *held)
    commands = {name: getattr(writer, name) for name in ("prefill", "draw", "decode", "read")}
    serve({**commands, "memory": resident_bytes}, load=time.perf_counter() - started)


if __name__ == "__main__":
    main()
