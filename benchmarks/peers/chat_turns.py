"""Does the memory of a process stay where it is while a conversation goes on?

    python -m peers.chat_turns FOLDER TURNS

A small ChatGLM with random int4 weights talks through `gmask.Chat` by the tokenizer in FOLDER. The context is full
after a few turns, from when on the oldest rounds are left out. Prints the resident memory after every tenth turn.
"""

import json
import sys
from pathlib import Path

import torch

import gmask
from gmask.checkpoints.load import load_tokenizer
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.quantization.quantizer import quantize_model
from peers.serving import resident_bytes

CONTEXT, REPLY = 256, 16  # tokens


def make_chat(folder: Path) -> gmask.Chat:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.convert_tokens_to_ids
    config = ChatGLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=ids("[MASK]"),
        gmask_token_id=ids("[gMASK]"),
    )
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(config).bfloat16().eval()
    quantize_model(model, bits=4, embeddings=True)
    return gmask.Chat(model, tokenizer, context_length=CONTEXT, max_tokens=REPLY, min_tokens=REPLY, seed=0)


def main() -> None:
    chat = make_chat(Path(sys.argv[1]))
    memory = {}
    for turn in range(1, int(sys.argv[2]) + 1):
        chat.ask(f"{turn}. The old man walked down to the river. And what then?")
        if turn % 10 == 0:
            memory[turn] = resident_bytes()["rss"]
    assert chat.last_reply is not None
    print(json.dumps({"rss": memory, "rounds_left_out": chat.last_reply.rounds_left_out}))


if __name__ == "__main__":
    main()
