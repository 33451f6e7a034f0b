"""Can one decoding step with a static cache be captured as a CUDA graph, and does replaying it write the same answer?

A captured step may not read a value back from the device. Tensors on the meta device have none to read.
"""

import pytest
import torch
from transformers import StaticCache

from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.layout import extend_layout

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
IDS = {"vocab_size": 160, "gmask_token_id": 150, "mask_token_id": 151, "bos_token_id": 152, "eos_token_id": 153}
PROMPT = torch.tensor([[20, 21, 22, 150, 152]])
TOKENS = 6


def make_chatglm(bits: int | None) -> ChatGLMForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChatGLMForConditionalGeneration(
            ChatGLMConfig(**SHAPE, **IDS, initializer_range=0.3, tie_word_embeddings=False)
        ).eval()
    return model if bits is None else model.quantize(bits, embeddings=True)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_step_reads_no_value_from_the_device(bits: int | None) -> None:
    model = make_chatglm(bits).to("meta")
    cache = StaticCache(model.config, max_cache_len=16)
    layout = torch.zeros(1, 2, 5, dtype=torch.long, device="meta")
    with torch.inference_mode():
        model(PROMPT.to("meta"), layout=layout, past_key_values=cache, use_cache=True)
        token = torch.zeros(1, 1, dtype=torch.long, device="meta")
        output = model(token, layout=layout[:, :, -1:], past_key_values=cache, use_cache=True)
    assert output.logits.shape == (1, 1, IDS["vocab_size"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [None, 4, 8])
@torch.inference_mode()
def test_a_replayed_graph_writes_what_generate_writes(bits: int | None) -> None:
    model, prompt = make_chatglm(bits).to("cuda"), PROMPT.to("cuda")
    expected = model.generate(prompt, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)[0, 5:]
    cache = StaticCache(model.config, max_cache_len=16)
    start = model.read_prompt_layout(prompt, None)
    token, layout = prompt[:, -1:].clone(), extend_layout(start, 1)[:, :, -1:].clone()

    def run(ids: torch.Tensor, places: torch.Tensor) -> None:
        logits = model(ids, layout=places, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logits[:, IDS["eos_token_id"]] = -torch.inf  # as min_new_tokens does
        token.copy_(logits.argmax(dim=-1, keepdim=True))

    def restart() -> None:
        cache.reset()
        run(prompt, start)

    restart()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(token, layout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(token, layout)
        layout[:, 1] += 1
    restart()
    written = [token.item()]
    for _ in range(TOKENS - 1):
        graph.replay()
        written.append(token.item())
    assert written == expected.tolist()
