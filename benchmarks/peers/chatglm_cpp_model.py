"""A ChatGLM-6B with random weights in the file format of chatglm.cpp, and its times.

    python -m peers.chatglm_cpp_model write q4_0 FILE
    python -m peers.chatglm_cpp_model serve FILE THREADS

Needs chatglm-cpp 0.4.2, numpy and sentencepiece. Its own ``generate`` fails in that version, so the model is stepped
token by token, as ``generate`` does; the greedy choice of the token is part of the step. It takes as many threads as
the machine has cores, whatever it is told.
"""

import io
import struct
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from peers.ggml import random_blocks
from peers.serving import resident_bytes, serve

LAYERS, HIDDEN, HEADS, INNER, VOCABULARY = 28, 4096, 32, 16384, 130528
FORMAT_VERSION, CHATGLM, FLOAT32 = 2, 1, 0  # as the format numbers them
KINDS = {"q4_0": 2, "q8_0": 8}
ALIGNMENT = 16  # of the numbers of a tensor in the file
MAX_LENGTH = 1024


def write_file(path: Path, kind: str) -> None:
    with path.open("wb") as file:
        write_header(file, kind)
        write_matrix(file, "word_embeddings", VOCABULARY, HIDDEN, kind)
        for layer in range(LAYERS):
            block = f"layers.{layer}"
            write_norm(file, f"{block}.input_layernorm")
            write_linear(file, f"{block}.attention.query_key_value", 3 * HIDDEN, HIDDEN, kind)
            write_linear(file, f"{block}.attention.dense", HIDDEN, HIDDEN, kind)
            write_norm(file, f"{block}.post_attention_layernorm")
            write_linear(file, f"{block}.mlp.dense_h_to_4h", INNER, HIDDEN, kind)
            write_linear(file, f"{block}.mlp.dense_4h_to_h", HIDDEN, INNER, kind)
        write_norm(file, "final_layernorm")


def write_header(file: BinaryIO, kind: str) -> None:
    """What shapes the model, then the tokenizer's file, which must have the special tokens."""
    vocabulary, end, padding = train_vocabulary()
    file.write(b"ggml" + struct.pack("2i", CHATGLM, FORMAT_VERSION))
    file.write(struct.pack("7i", KINDS[kind], VOCABULARY, HIDDEN, HEADS, HEADS, LAYERS, INNER))
    epsilon, virtual_tokens, rotary_base, positions = 1e-5, 0, 10000.0, 2048
    file.write(struct.pack("fifi", epsilon, virtual_tokens, rotary_base, positions))
    file.write(struct.pack("3i", end, padding, len(vocabulary)) + vocabulary)


def train_vocabulary() -> tuple[bytes, int, int]:
    """A small sentencepiece file, and its ids of the end and of padding."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 10),
        model_writer=written,
        vocab_size=320,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<pad>"],
        minloglevel=2,
    )
    pieces = SentencePieceProcessor(model_proto=written.getvalue())
    return written.getvalue(), pieces.piece_to_id("<eop>"), pieces.piece_to_id("<pad>")


def write_linear(file: BinaryIO, name: str, outputs: int, columns: int, kind: str) -> None:
    write_matrix(file, name, outputs, columns, kind)
    write_tensor(file, f"{name}.bias", (outputs,), FLOAT32, np.zeros(outputs, dtype=np.float32))


def write_norm(file: BinaryIO, name: str) -> None:
    write_tensor(file, f"{name}.weight", (HIDDEN,), FLOAT32, np.ones(HIDDEN, dtype=np.float32))
    write_tensor(file, f"{name}.bias", (HIDDEN,), FLOAT32, np.zeros(HIDDEN, dtype=np.float32))


def write_matrix(file: BinaryIO, name: str, outputs: int, columns: int, kind: str) -> None:
    write_tensor(file, f"{name}.weight", (outputs, columns), KINDS[kind], random_blocks(outputs, columns, kind))


def write_tensor(file: BinaryIO, name: str, shape: tuple[int, ...], kind: int, numbers: NDArray[Any]) -> None:
    key = f"transformer.{name}".encode()
    file.write(struct.pack("i", len(key)) + key + struct.pack(f"{len(shape) + 2}i", len(shape), *shape, kind))
    file.write(bytes(-file.tell() % ALIGNMENT))
    numbers.tofile(file)


class Stepper:
    """Reads a prompt, then writes token by token."""

    def __init__(self, path: str) -> None:
        import chatglm_cpp
        from chatglm_cpp import _C

        self.model = chatglm_cpp.Pipeline(path, max_length=MAX_LENGTH).model
        self.settings = _C.GenerationConfig(max_length=MAX_LENGTH, max_context_length=MAX_LENGTH, do_sample=False)
        self.ids: list[int] = []
        self.read = self.prompt = 0

    def prefill(self, tokens: int) -> float:
        self.ids, self.read, self.prompt = [300 + index % 1500 for index in range(tokens)], 0, tokens
        return self._step()

    def decode(self, tokens: int) -> list[float]:
        return [self._step() for _ in range(tokens)]

    def _step(self) -> float:
        started = time.perf_counter()
        token = self.model.generate_next_token(self.ids, None, self.settings, self.read, self.prompt)
        seconds = time.perf_counter() - started
        self.read = len(self.ids)
        self.ids.append(token)
        return seconds


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_file(Path(sys.argv[3]), sys.argv[2])
    else:
        stepper = Stepper(sys.argv[2])
        serve({"prefill": stepper.prefill, "decode": stepper.decode, "memory": resident_bytes})
