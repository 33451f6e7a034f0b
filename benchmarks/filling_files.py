"""How many texts of a file are filled in a second, beside transformers' fill-mask and a T5?

    python benchmarks/filling_files.py [--lines 10000] [--rounds 3] [--threads 1] [--processes 2] [--peers-lines 1000]

Texts of 6 to 45 words with one blank, from the words of one sentence, in a file. gmask fills the file with its bundled
model by the code of ``gmask infill --input``, loading included in none of the times. Two comparisons, in turns:

- one token a blank: the pipeline ``fill-mask`` of transformers on a BERT, which predicts one token at each mask;
- answers of four tokens: `generate` of transformers on a T5 whose encoder reads the text.

BERT and T5 have random weights, gmask's tokenizer, its width, and layers for about as many parameters; they read
batches of 16 texts that are sorted by length. Seconds are those of the CPU, which other work changes little.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers import pipeline as make_pipeline

import gmask
from gmask.generation.files import fill_file
from gmask.generation.infill import Infiller
from gmask.generation.settings import Sampling
from machine import describe_machine

SENTENCE = "the old man took his hat and went down to the river where a small boat was waiting in the rain"
BATCH = 16
TOKENS = 4  # of a longer answer


def make_texts(count: int) -> list[str]:
    chance = random.Random(0)
    texts = []
    for _ in range(count):
        words = chance.choices(SENTENCE.split(), k=chance.choice((6, 8, 10, 14, 20, 30, 45)))
        words[chance.randrange(1, len(words))] = "[MASK]"
        texts.append(" ".join(words))
    return texts


def batches_by_length(texts: Sequence[str]) -> list[list[str]]:
    ordered = sorted(texts, key=len)
    return [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]


class Peers:
    """A BERT and a T5 of about the size of a GLM, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        config = model.config
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, mask_token="[MASK]", pad_token=tokenizer.pad_token
        )
        width, layers = config.hidden_size, config.num_hidden_layers
        torch.manual_seed(0)
        bert = BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=4 * width,
        )
        t5 = T5Config(
            vocab_size=config.vocab_size,
            d_model=width,
            d_kv=width // config.num_attention_heads,
            d_ff=4 * width,
            num_layers=layers // 2,  # and as many of the decoder, which have a second attention
            num_decoder_layers=layers // 2,
            num_heads=config.num_attention_heads,
            decoder_start_token_id=tokenizer.pad_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        self.bert = BertForMaskedLM(bert).eval()
        self.t5 = T5ForConditionalGeneration(t5).eval()
        self.pipeline = make_pipeline("fill-mask", model=self.bert, tokenizer=self.tokenizer, top_k=1, device="cpu")

    def fill_masks(self, texts: Sequence[str]) -> None:
        for batch in batches_by_length(texts):
            self.pipeline(batch, batch_size=BATCH)

    def generate(self, texts: Sequence[str]) -> None:
        for batch in batches_by_length(texts):
            read = self.tokenizer(batch, return_tensors="pt", padding=True)
            ids = self.t5.generate(
                input_ids=read.input_ids,
                attention_mask=read.attention_mask,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
            )
            self.tokenizer.batch_decode(ids)


def time_of(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of the CPU of this process."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def load_infiller(sampling: Sampling) -> Infiller:
    return Infiller(*gmask.load("bundled"), sampling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--peers-lines", type=int, default=1_000, help="texts that are filled in turns with the peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    one = load_infiller(Sampling(max_tokens=1))
    several = Infiller(one.model, one.tokenizer, Sampling(max_tokens=TOKENS, min_tokens=TOKENS))
    peers = Peers(one.model, one.tokenizer)
    sizes = {
        name: sum(parameter.numel() for parameter in model.parameters())
        for name, model in (("gmask", one.model), ("BERT", peers.bert), ("T5", peers.t5))
    }
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    whole: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, numbers = Path(name), itertools.count()

        def fill(infiller: Infiller, texts: Sequence[str], **settings: Any) -> Callable[[], object]:
            source = folder / f"{next(numbers)}.txt"
            source.write_text("\n".join(texts), "utf-8")
            return lambda: fill_file(infiller, source, folder / f"{next(numbers)}.jsonl", **settings)

        texts = make_texts(options.peers_lines)
        for pair, ours, theirs in (
            ("one token: fill-mask of a BERT", fill(one, texts), lambda: peers.fill_masks(texts)),
            (f"{TOKENS} tokens: generate of a T5", fill(several, texts), lambda: peers.generate(texts)),
        ):
            ways: dict[str, Callable[[], object]] = {"gmask": ours, "peer": theirs}
            found[pair] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, work in ways.items():
                    found[pair][way].append(time_of(work))
        texts = make_texts(options.lines)
        plain = load_infiller(Sampling())
        for processes in sorted({1, options.processes}):
            settings = {} if processes == 1 else {"processes": processes, "load": load_plain}
            whole[f"{processes} processes"] = time_of(fill(plain, texts, **settings))[0]
    machine = describe_machine(options.threads)
    if options.json:
        print(json.dumps({"machine": machine, "parameters": sizes, "pairs": found, "file": whole}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(", ".join(f"{name} {size / 1e6:.1f} M parameters" for name, size in sizes.items()))
    print("\n| texts per second of the CPU | gmask | peer | ratio: median (min-max) |\n|---|---:|---:|---:|")
    for pair, times in found.items():
        rates = {way: [options.peers_lines / used for _, used in rounds] for way, rounds in times.items()}
        ratios = [ours / theirs for ours, theirs in zip(rates["gmask"], rates["peer"], strict=True)]
        cells = [f"{statistics.median(rates[way]):.0f}" for way in ("gmask", "peer")]
        print(
            f"| {pair} | {' | '.join(cells)} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    rates_of_all = ", ".join(f"{name} {options.lines / seconds:.0f}" for name, seconds in whole.items())
    print(f"\nThe file of {options.lines} lines, texts/s by the clock, starting of processes included: {rates_of_all}")


def load_plain() -> Infiller:
    """Loads the model in a process that is started."""
    return load_infiller(Sampling())


if __name__ == "__main__":
    main()
