"""A llama with as many parameters as ChatGLM-6B, random weights, for llama.cpp, and its times.

    python -m peers.llama_cpp_model write q4_0 FILE
    python -m peers.llama_cpp_model serve FILE THREADS

Needs llama-cpp-python, gguf and numpy. llama.cpp does not know ChatGLM-6B: the llama has its layers, width, vocabulary
and tied head, and an inner width that makes up for the third matrix of its MLP. A step does not choose the token.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from peers.ggml import random_blocks, row_bytes
from peers.serving import resident_bytes, serve

LAYERS, HIDDEN, HEADS, INNER, VOCABULARY = 28, 4096, 32, 11008, 130528
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN, HIDDEN),
    "attn_v": (HIDDEN, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
"""Outputs and columns of the matrices of a block."""


def write_file(path: Path, kind: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(3, VOCABULARY))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([1] * VOCABULARY)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    quantization = gguf.GGMLQuantizationType[kind.upper()]
    tensors = list(tensor_shapes())
    for name, shape in tensors:
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            row = row_bytes(shape[1], kind)
            writer.add_tensor_info(name, (shape[0], row), np.dtype(np.uint8), shape[0] * row, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape in tensors:
        is_vector = len(shape) == 1
        writer.write_tensor_data(np.ones(shape, dtype=np.float32) if is_vector else random_blocks(*shape, kind))
    writer.close()


def tensor_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the model; the head is that of the embeddings."""
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        yield f"blk.{layer}.attn_norm.weight", (HIDDEN,)
        yield f"blk.{layer}.ffn_norm.weight", (HIDDEN,)
        for name, shape in MATRICES.items():
            yield f"blk.{layer}.{name}.weight", shape
    yield "output_norm.weight", (HIDDEN,)


class Stepper:
    """Reads a prompt, then one token after the other."""

    def __init__(self, path: str, threads: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512, verbose=False
        )

    def prefill(self, tokens: int) -> float:
        self.model.reset()
        return self._read([300 + index % 1500 for index in range(tokens)])

    def decode(self, tokens: int) -> list[float]:
        return [self._read([300 + index]) for index in range(tokens)]

    def _read(self, ids: list[int]) -> float:
        started = time.perf_counter()
        self.model.eval(ids)
        return time.perf_counter() - started


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_file(Path(sys.argv[3]), sys.argv[2])
    else:
        stepper = Stepper(sys.argv[2], int(sys.argv[3]))
        serve({"prefill": stepper.prefill, "decode": stepper.decode, "memory": resident_bytes})
