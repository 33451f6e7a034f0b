"""How many answers a second does the engine give to many clients at once, beside one request at a time?

    python benchmarks/serving.py [--model bundled | --shape LAYERS HIDDEN] [--clients 32] [--requests 96] [--prompt 64]
                                 [--answer 64] [--rounds 3] [--threads 2] [--json]

Each client sends its next request when its last one is answered. Beside the engine: the same requests one after the
other through the same model, as a server with one lock answers them (a `Stepper` of each client's own), and through
transformers' `generate`, which is what `transformers serve` calls for each request. All take turns in every round.
`--shape` makes a bfloat16 GLM with random weights instead; answers never end before `--answer` tokens.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import gmask
from gmask.generation.encoding import Context
from gmask.generation.engine import Engine, Request, Stepper
from gmask.generation.settings import Sampling
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from machine import describe_machine


def make_model(shape: Sequence[int] | None) -> tuple[Any, Any]:
    model, tokenizer = gmask.load("bundled", device="cpu")
    if shape:
        layers, hidden = shape
        values = {**model.config.to_dict(), "num_hidden_layers": layers, "hidden_size": hidden}
        values.update(num_attention_heads=hidden // 64, dtype="bfloat16")
        model = GLMForConditionalGeneration(GLMConfig(**values)).to(torch.bfloat16).eval()
    return model, tokenizer


def make_contexts(tokenizer: Any, count: int, length: int) -> list[Context]:
    """Random texts of ``length`` tokens, ``[gMASK]`` last."""
    generator = torch.Generator().manual_seed(0)
    first = len(tokenizer.all_special_ids) + 300
    ids = torch.randint(first, len(tokenizer), (count, length - 1), generator=generator).tolist()
    return [Context((*row, tokenizer.gmask_token_id), (length - 1,)) for row in ids]


def run_clients(
    answer: Callable[[Context, Callable[[], None]], None], contexts: Sequence[Context], clients: int
) -> tuple[float, list[float], list[float]]:
    """Wall seconds, and of each request the seconds to its first token and to its end."""
    firsts, ends, left, lock = [], [], list(contexts), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not left:
                    return
                context = left.pop()
            started = time.perf_counter()
            first: list[float] = []

            def note(first: list[float] = first) -> None:
                if not first:
                    first.append(time.perf_counter())

            answer(context, note)
            with lock:
                firsts.append(first[0] - started)
                ends.append(time.perf_counter() - started)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started, firsts, ends


class Systems:
    """The three ways to answer."""

    def __init__(self, model: Any, tokenizer: Any, *, clients: int, answer_tokens: int) -> None:
        self.model, self.tokens = model, answer_tokens
        self.engine = Engine(model, tokenizer, max_rows=clients, max_queue=10_000)
        self.lock = threading.Lock()
        special = self.engine.special
        self.sampling = Sampling(max_tokens=answer_tokens, min_tokens=answer_tokens)
        self.generation: dict[str, Any] = {
            "max_new_tokens": answer_tokens,
            "min_new_tokens": answer_tokens,
            "do_sample": False,
            "eos_token_id": special.eop,
            "pad_token_id": special.pad,
        }

    def by_engine(self, context: Context, note: Callable[[], None]) -> None:
        request = Request(context=context, sampling=self.sampling)
        (last,) = self.engine.submit(request, lambda progress: note()).wait()
        assert last.end == "complete" and len(last.done[0].ids) == self.tokens

    def one_at_a_time(self, context: Context, note: Callable[[], None]) -> None:
        with self.lock:
            stepper = Stepper(self.model, self.engine.tokenizer, self.engine.sampler, self.engine.special)
            for _ in stepper.stream(Request(context=context, sampling=self.sampling), seed=0):
                note()

    def by_generate(self, context: Context, note: Callable[[], None]) -> None:
        with self.lock, torch.inference_mode():
            ids = torch.tensor([[*context.ids, self.engine.special.sop]])
            self.model.generate(ids, streamer=FirstToken(note), **self.generation)


class FirstToken:
    """A streamer that notes each token."""

    def __init__(self, note: Callable[[], None]) -> None:
        self.note, self.is_prompt = note, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.note()
        self.is_prompt = False

    def end(self) -> None:
        """The answer is complete."""


def describe(seconds: float, firsts: Sequence[float], ends: Sequence[float], tokens: int) -> dict[str, float]:
    def part(values: Sequence[float], share: float) -> float:
        return sorted(values)[min(len(values) - 1, int(share * len(values)))]

    return {
        "requests_per_second": len(ends) / seconds,
        "tokens_per_second": len(ends) * tokens / seconds,
        "first_token_p50": part(firsts, 0.5),
        "first_token_p99": part(firsts, 0.99),
        "answer_p50": part(ends, 0.5),
        "answer_p99": part(ends, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, metavar=("LAYERS", "HIDDEN"))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96, help="of the engine; a third of it one at a time")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = make_model(options.shape)
    systems = Systems(model, tokenizer, clients=options.clients, answer_tokens=options.answer)
    contexts = make_contexts(tokenizer, options.requests, options.prompt)
    few = contexts[: max(options.clients, options.requests // 3)]
    ways = {
        "engine": (systems.by_engine, contexts),
        "one at a time": (systems.one_at_a_time, few),
        "transformers generate": (systems.by_generate, few),
    }
    systems.one_at_a_time(contexts[0], lambda: None)  # warm
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, (answer, asked) in ways.items():
            rounds[name].append(describe(*run_clients(answer, asked, options.clients), options.answer))
    systems.engine.close()
    table = {
        name: {key: statistics.median(found[key] for found in results) for key in results[0]}
        for name, results in rounds.items()
    }
    speeds = {name: [found["tokens_per_second"] for found in results] for name, results in rounds.items()}
    ratios = {
        name: [mine / other for mine, other in zip(speeds["engine"], theirs, strict=True)]
        for name, theirs in speeds.items()
    }
    machine = describe_machine(options.threads)
    record = {"machine": machine, **vars(options), "parameters": model.num_parameters(), "median": table}
    record["ratios"] = ratios
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    size, lengths = f"{model.num_parameters() / 1e6:.0f} M parameters", f"{options.prompt} + {options.answer} tokens"
    print(f"{size}, {model.dtype}, {options.clients} clients, {lengths}\n")
    print("| | tokens/s | engine / it: median (min-max) | first token p50, p99 s | answer p50, p99 s |")
    print("|---|---:|---:|---:|---:|")
    for name, row in table.items():
        low, middle, high = min(ratios[name]), statistics.median(ratios[name]), max(ratios[name])
        times = [f"{row[kind + '_p50']:.2f}, {row[kind + '_p99']:.2f}" for kind in ("first_token", "answer")]
        print(
            f"| {name} | {row['tokens_per_second']:.0f} | {middle:.2f} ({low:.2f}-{high:.2f}) | {' | '.join(times)} |"
        )


if __name__ == "__main__":
    main()
