"""How soon does a small GLM find the word beside a blank, started in three ways?

    python benchmarks/initialization.py [--threads 2] [--steps 700] [--json]

The text is made so that every second token follows from the one before it by a fixed rule; only such tokens are hidden.
A model that looks at the left neighbour of a blank reaches a loss of 0; one that does not stays near ln(240) / 2, since
the end of each answer, half of what is scored, is easy. All three models see the same rows in the same order.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gmask.infilling.blanks import BlankTokens, blank_out
from gmask.infilling.collator import collate
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.training.initial_weights import start_with_neighbours
from machine import describe_machine

SPECIAL = BlankTokens(pad=0, eos=1, cls=2, mask=5, smask=6, gmask=7, sop=8, eop=9)
FIRST_WORD, VOCABULARY = 16, 256
TEXT, BLANKS, ROWS = 65, 6, 16
WIDTH = 128
STARTS = {
    "published (0.02)": (0.02, False),
    "1 / sqrt(width)": (WIDTH**-0.5, False),
    "1 / sqrt(width), neighbours": (WIDTH**-0.5, True),
}


def make_rows(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A batch of texts `[CLS] a f(a) b f(b) ...` with some of the f's hidden."""
    rule = np.random.default_rng(7).permutation(np.arange(FIRST_WORD, VOCABULARY))
    rows = []
    for _ in range(ROWS):
        words = rng.integers(FIRST_WORD, VOCABULARY, TEXT // 2)
        text = np.concatenate(([SPECIAL.cls], np.stack((words, rule[words - FIRST_WORD]), axis=1).ravel()))
        hidden = np.sort(rng.choice(np.arange(2, TEXT, 2), BLANKS, replace=False))
        spans = np.stack((hidden, hidden + 1), axis=1)
        order = rng.permutation(BLANKS)
        rows.append([blank_out(text, spans, mask=5, special=SPECIAL, objective="token", order=order)])
    return collate(rows, row_length=None, pad_id=SPECIAL.pad)


def make_model(initializer_range: float, neighbours: bool) -> GLMForConditionalGeneration:
    torch.manual_seed(0)
    model = GLMForConditionalGeneration(
        GLMConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=initializer_range,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    )
    if neighbours:
        start_with_neighbours(model)
    return model


def train_all(steps: int, report_every: int) -> Iterator[dict[str, Any]]:
    """A record of each start's mean loss over the last steps, every `report_every` steps."""
    models = {name: make_model(*start) for name, start in STARTS.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, model in models.items()}
    rng = np.random.default_rng(0)
    losses: dict[str, list[float]] = {name: [] for name in STARTS}
    for step in range(1, steps + 1):
        rows = make_rows(rng)
        for name, model in models.items():
            loss = model.token_losses(**rows).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            losses[name].append(loss.item())
        if step % report_every == 0:
            recent = {name: float(np.mean(found[-50:])) for name, found in losses.items()}
            yield {"step": step, "losses": recent}


def main() -> None:
    parser = argparse.ArgumentParser(description="How soon a small GLM finds the word beside a blank.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.threads)
    records = list(train_all(options.steps, 100))
    if options.json:
        print(json.dumps({"machine": machine, "results": records}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"\n| step | {' | '.join(STARTS)} |\n|---:|{'---:|' * len(STARTS)}")
    for record in records:
        print(f"| {record['step']} | {' | '.join(f'{loss:.3f}' for loss in record['losses'].values())} |")


if __name__ == "__main__":
    main()
