"""Which tiny model folder do the tests of loading, infilling and the command line share?"""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.training.tokenizer import save_tokenizer, train_tokenizer

ENGLISH = "The old man took his dog and went down to the river. It was a sunny day, and the rainy season was over. "
CHINESE = "我今天早上去市场买了一些苹果。小猫喜欢睡觉，小狗喜欢跑步。"
SPECIAL = dict(
    pad_token_id=0, eos_token_id=1, mask_token_id=5, smask_token_id=6, gmask_token_id=7, sop_token_id=8, eop_token_id=9
)


def train_tiny_tokenizer() -> Tokenizer:
    return train_tokenizer([ENGLISH * 3, CHINESE * 3], vocab_size=440, alphabet_size=40)


def make_folder(folder: Path) -> Path:
    """A GLM with random weights and a real tokenizer, saved as gmask saves them.

    Weights are large, so that logits are far apart; the end token is likely, so that some answers end by themselves.
    """
    tokenizer = train_tiny_tokenizer()
    config = GLMConfig(
        vocab_size=448,  # eight rows more than tokens
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.3,
        hidden_act="gelu_pytorch_tanh",
        **SPECIAL,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = GLMForConditionalGeneration(config)
    with torch.no_grad():
        end = model.glm.word_embeddings.weight[SPECIAL["eop_token_id"]]
        model.glm.transformer.final_layernorm.bias += 1.2 * end
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder
