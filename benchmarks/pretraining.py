"""How fast does a GLM train, beside transformers' GPT-2 of the same shape trained the same way?

    python benchmarks/pretraining.py [--threads 2] [--rounds 5] [--json]

Both have the same width, depth, heads, vocabulary and row length, the same AdamW, clipping, autocast and rows in a
pass, and read rows of the same made text. GPT-2 predicts the next token at every position with its own loss; the GLM
predicts the blanks of the published mixture, and making its rows is part of its time. Each round measures every
setting once, one after the other, so that what else the machine does falls on all of them; a ratio is taken within a
round. Peak memory comes from a process of its own for each setting.

Tokens are the positions that the model reads; a GLM's row is a few tokens short of full, and these are not counted.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import logging

from gmask.corpus.shards import Shard, TokenSource
from gmask.infilling.blanks import BlankTokens
from gmask.infilling.collator import collate
from gmask.infilling.objectives import Mixture
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.recipes.pretraining import OptimizationSettings
from gmask.training.corpus_rows import RowStream
from gmask.training.pretrain import make_optimizers
from machine import describe_machine
from measuring import compare, make_gpt2, spread, take_turns

SPECIAL = BlankTokens(pad=0, eos=1, cls=2, mask=5, smask=6, gmask=7, sop=8, eop=9, dblock=10)
DOCUMENT_LENGTH = 900  # tokens, on average; the bundled corpus has about as many
SENTENCE_LENGTH = 20
MODELS = ("glm", "gpt2")
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Shape:
    """The bundled model's, by default."""

    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    vocab_size: int = 12288
    row_length: int = 512
    rows_per_pass: int = 8
    passes: int = 2  # of a step


@dataclass(frozen=True, slots=True)
class Setting:
    """What one measuring process trains."""

    model: str
    dtype: str


class Trainer:
    """Training steps of one model on made text."""

    def __init__(self, setting: Setting, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.half = setting.dtype == "bfloat16"
        self.model: Any = make_glm(shape) if setting.model == "glm" else peer_of(shape)
        self.model.train()
        self.step_once: Callable[[], int] = self.step_glm if setting.model == "glm" else self.step_gpt2
        self.stream = made_rows(shape)
        self.rng = np.random.default_rng(0)
        self.optimization = OptimizationSettings(steps=1)
        (self.optimizer,) = make_optimizers(self.model, self.optimization)

    def step_glm(self) -> int:
        shape = self.shape
        rows = [self.stream.next_row() for _ in range(shape.rows_per_pass * shape.passes)]
        batches = [
            collate(rows[start : start + shape.rows_per_pass], row_length=shape.row_length, pad_id=SPECIAL.pad)
            for start in range(0, len(rows), shape.rows_per_pass)
        ]
        labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                loss = self.model.token_losses(**batch).sum() / labelled
            loss.backward()
        self.finish_step()
        return sum(int((batch["sequence_ids"] >= 0).sum()) for batch in batches)

    def step_gpt2(self) -> int:
        shape = self.shape
        for _ in range(shape.passes):
            ids = self.rng.integers(16, shape.vocab_size, (shape.rows_per_pass, shape.row_length))
            batch = torch.from_numpy(ids)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss / shape.passes
            loss.backward()
        self.finish_step()
        return shape.passes * shape.rows_per_pass * shape.row_length

    def finish_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optimization.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_glm(shape: Shape) -> GLMForConditionalGeneration:
    return GLMForConditionalGeneration(
        GLMConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.row_length,
            hidden_act="gelu_pytorch_tanh",
            embedding_dropout=0.0,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            pad_token_id=SPECIAL.pad,
            sop_token_id=SPECIAL.sop,
            mask_token_id=SPECIAL.mask,
        )
    )


def peer_of(shape: Shape) -> Any:
    return make_gpt2(
        hidden_size=shape.hidden_size,
        layers=shape.layers,
        heads=shape.heads,
        vocab_size=shape.vocab_size,
        positions=shape.row_length,
        use_cache=False,
    )


def made_rows(shape: Shape) -> RowStream:
    """Rows of the published mixture from a million random tokens, cut into documents of random length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(DOCUMENT_LENGTH // 10, 2 * DOCUMENT_LENGTH, 1_000_000 // DOCUMENT_LENGTH)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = rng.integers(16, shape.vocab_size, int(offsets[-1])).astype(np.uint16)
    sentence_ends = rng.random(shape.vocab_size) < 1 / SENTENCE_LENGTH
    mixture = Mixture(special=SPECIAL, sentence_ends=sentence_ends)
    source = TokenSource("made", 1.0, [Shard(tokens, offsets)])
    return RowStream([source], mixture, row_length=shape.row_length, seed=0)


def serve_measurements(setting: Setting, shape: Shape, threads: int) -> None:
    """The measuring process: a line in is a number of steps to time, a line out the tokens/s and the peak memory."""
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    trainer = Trainer(setting, shape)
    trainer.step_once()  # warm-up
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        tokens = sum(trainer.step_once() for _ in range(int(line)))
        speed = tokens / (time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB, on Linux
        print(json.dumps({"tokens_per_second": speed, "peak_mib": peak}), flush=True)


def measure_settings(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for each arithmetic: speeds of all rounds, ratios, peaks."""
    for dtype in DTYPES:
        commands = [
            ["--threads", str(options.threads), "--measure", json.dumps(asdict(Setting(model, dtype)))]
            for model in MODELS
        ]
        ours, theirs = take_turns(commands, threads=options.threads, rounds=options.rounds, steps=options.steps)
        yield {
            "dtype": dtype,
            "glm": statistics.median(each["tokens_per_second"] for each in ours),
            "gpt2": statistics.median(each["tokens_per_second"] for each in theirs),
            "ratios": compare(ours, theirs, "tokens_per_second"),
            "glm_peak_mib": ours[-1]["peak_mib"],
            "gpt2_peak_mib": theirs[-1]["peak_mib"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of one measurement")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a measuring process is started with
    options = parser.parse_args()
    if options.measure:
        return serve_measurements(Setting(**json.loads(options.measure)), Shape(), options.threads)
    machine = describe_machine(options.threads)
    records = list(measure_settings(options))
    if options.json:
        print(json.dumps({"machine": machine, "shape": asdict(Shape()), "results": records}))
        return
    print(", ".join(f"{key} {value}" for key, value in (machine | asdict(Shape())).items()))
    print("\n| arithmetic | GLM tokens/s | GPT-2 tokens/s | ratio: median (min-max) | peak MiB |")
    print("|---|---:|---:|---:|---:|")
    for record in records:
        print(
            f"| {record['dtype']} | {record['glm']:,.0f} "
            f"| {record['gpt2']:,.0f} | {spread(record['ratios'])} "
            f"| {record['glm_peak_mib']:,.0f} and {record['gpt2_peak_mib']:,.0f} |"
        )


if __name__ == "__main__":
    main()
