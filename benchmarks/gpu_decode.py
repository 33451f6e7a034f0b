"""How near to the memory's bandwidth does ChatGLM-6B write on a GPU, one row at a time?

    python benchmarks/gpu_decode.py [--tokens 128] [--prompt 128] [--rounds 5] [--json]
    python benchmarks/gpu_decode.py --device cpu --tiny     # shows that it runs; its times mean nothing

The true shape, random weights, in bfloat16, int8 and int4, embeddings and head included. transformers' `generate`, as
users call it, takes turns with a static cache whose every step is the replay of one CUDA graph, and with the same steps
without a graph. The roofline is the time to read the weights once at the bandwidth of a copy within the memory, the
best of the run. Milliseconds a token behind the prompt; the median round counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.layout import extend_layout
from machine import describe_machine

BITS = {"bf16": None, "int8": 8, "int4": 4}
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
WARM_UP_STEPS = 3
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**24}  # more than any cache of a GPU holds


class Decoder:
    """Greedy decoding of one row whose every step does the same to the same memory, so that a graph can repeat it."""

    def __init__(self, model: ChatGLMForConditionalGeneration, prompt: Tensor, tokens: int) -> None:
        self.model, self.prompt = model, prompt
        self.prompt_layout = model.read_prompt_layout(prompt, None)
        self.cache = StaticCache(model.config, max_cache_len=prompt.shape[1] + tokens + WARM_UP_STEPS)
        self.token, self.layout = prompt[:, -1:].clone(), self.prompt_layout[:, :, -1:].clone()
        self.read_prompt()
        self.replay: Callable[[], None] = self.step
        if prompt.is_cuda:
            self.replay = self._capture().replay

    def read_prompt(self) -> None:
        """Starts anew: the token to be fed is the first of the answer."""
        self.cache.reset()
        self._run(self.prompt, self.prompt_layout)
        self.layout.copy_(extend_layout(self.prompt_layout, 1)[:, :, -1:])

    def step(self) -> None:
        """Feeds the token and replaces it by the next."""
        self._run(self.token, self.layout)
        self.layout[:, 1] += 1

    def _run(self, ids: Tensor, layout: Tensor) -> None:
        output = self.model(ids, layout=layout, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(output.logits[:, -1].argmax(dim=-1, keepdim=True))

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def write(self, tokens: int) -> list[int]:
        """The first tokens of the answer."""
        self.read_prompt()
        answer = [self.token.clone()]
        for _ in range(tokens - 1):
            self.replay()
            answer.append(self.token.clone())
        return torch.cat(answer).flatten().tolist()


def make_model(device: torch.device, tiny: bool) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    config = ChatGLMConfig(**(TINY if tiny else {}))
    with device:
        return ChatGLMForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()


def make_prompt(config: ChatGLMConfig, length: int, device: torch.device) -> Tensor:
    words = torch.randint(100, 60000, (1, length - 2), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([[config.gmask_token_id, config.bos_token_id]])
    return torch.cat((words, ends), dim=1).to(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def decode_seconds(decoder: Decoder, step: Callable[[], None], tokens: int, device: torch.device) -> float:
    """Seconds a token, the prompt left out; ``step`` is that of the decoder, or its replay."""
    decoder.read_prompt()

    def repeat() -> None:
        for _ in range(tokens - 1):
            step()

    return seconds(repeat, device) / (tokens - 1)


def generate(model: Any, prompt: Tensor, tokens: int) -> list[int]:
    """The answer that transformers' `generate` gives."""
    padding = torch.ones_like(prompt)
    ids = model.generate(prompt, attention_mask=padding, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    answer: list[int] = ids[0, prompt.shape[1] :].tolist()
    return answer


def generate_seconds(model: Any, prompt: Tensor, tokens: int, device: torch.device) -> float:
    """Seconds a token of `generate`, the prompt and the first token left out."""
    prefill = seconds(lambda: generate(model, prompt, 1), device)
    return (seconds(lambda: generate(model, prompt, tokens), device) - prefill) / (tokens - 1)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written ones together."""
    source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def weight_bytes(model: torch.nn.Module) -> int:
    """What a token reads: all of the weights, since the embedding table is the head's too."""
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(device: torch.device, *, tiny: bool, tokens: int, prompt_length: int, rounds: int) -> dict[str, Any]:
    bandwidths: list[float] = []
    records: list[dict[str, Any]] = []
    for weights, bits in BITS.items():
        model = make_model(device, tiny)
        prompt = make_prompt(model.config, prompt_length, device)
        if bits is not None:
            model.quantize(bits, embeddings=True)
        decoder = Decoder(model, prompt, tokens)
        answer, published = decoder.write(tokens), generate(model, prompt, tokens)
        graph, eager, plain = [], [], []
        for _ in range(rounds):
            graph.append(decode_seconds(decoder, decoder.replay, tokens, device))
            eager.append(decode_seconds(decoder, decoder.step, tokens, device))
            plain.append(generate_seconds(model, prompt, tokens, device))
            bandwidths.append(copy_bandwidth(device))
        records.append(
            {
                "weights": weights,
                "megabytes": weight_bytes(model) / 1e6,
                "graph_ms": statistics.median(graph) * 1e3,
                "eager_ms": statistics.median(eager) * 1e3,
                "generate_ms": statistics.median(plain) * 1e3,
                "same_tokens": sum(ours == theirs for ours, theirs in zip(answer, published, strict=True)),
            }
        )
    bandwidth = max(bandwidths) / 1e9
    for record in records:
        record["roofline_ms"] = record["megabytes"] / bandwidth
    return {"gigabytes_per_second": bandwidth, "tokens": tokens, "results": records}


def print_table(found: dict[str, Any]) -> None:
    print(f"copy within the memory: {found['gigabytes_per_second']:,.0f} GB/s\n")
    columns = (
        "weights",
        "MB",
        "roofline ms",
        "graph ms",
        "of roofline",
        "no graph ms",
        "generate ms",
        "generate / graph",
    )
    print(f"| {' | '.join(columns)} | same tokens |")
    print(f"|---|{'---:|' * len(columns)}")
    for r in found["results"]:
        print(
            f"| {r['weights']} | {r['megabytes']:,.0f} | {r['roofline_ms']:.2f} | {r['graph_ms']:.2f} "
            f"| {r['roofline_ms'] / r['graph_ms']:.0%} | {r['eager_ms']:.2f} | {r['generate_ms']:.2f} "
            f"| {r['generate_ms'] / r['graph_ms']:.1f} | {r['same_tokens']} of {found['tokens']} |"
        )
    bf16, int8, int4 = (record["graph_ms"] for record in found["results"])
    print(f"\nby graph, beside bf16: int8 {bf16 / int8:.2f} times as fast, int4 {bf16 / int4:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two small layers instead of ChatGLM-6B's shape")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device: --device cpu --tiny shows that it runs")
    device = torch.device(options.device)
    machine = describe_machine(torch.get_num_threads())
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    with torch.inference_mode():
        found = measure(
            device, tiny=options.tiny, tokens=options.tokens, prompt_length=options.prompt, rounds=options.rounds
        )
    if options.json:
        print(json.dumps({"machine": machine, **found}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print_table(found)


if __name__ == "__main__":
    main()
