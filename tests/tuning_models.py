"""Which tiny models do the tests of tuning share?"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gmask
from gmask.tokenizers.chatglm import ChatGLMTokenizer
from test_chatglm_chat import VOCABULARY
from test_chatglm_parity import TINY, load_chatglm
from tiny_folder import make_folder

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def make_glm(folder: Path) -> Pair:
    return gmask.load(make_folder(folder), device="cpu")


def make_chatglm(name: str = TINY) -> Pair:
    """A published checkpoint in miniature; skips the test where its vocabulary is not here."""
    if not VOCABULARY.is_file():
        pytest.skip("the tiny vocabulary is not here")
    return load_chatglm(name), ChatGLMTokenizer(str(VOCABULARY))


@contextmanager
def weights_kept(model: PreTrainedModel) -> Iterator[None]:
    """Undoes what is trained within."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)
