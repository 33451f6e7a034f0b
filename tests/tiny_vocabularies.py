"""Which tiny vocabulary of each kind, made here, do the tests share that ask every tokenizer the same?"""

import copy
import io
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sentencepiece import SentencePieceTrainer
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from gmask.tokenizers.chatglm import APPENDED, CONTROL, USER_DEFINED
from gmask.tokenizers.folder import read_tokenizer
from gmask.training.tokenizer import save_tokenizer
from tiny_folder import CHINESE, ENGLISH, train_tiny_tokenizer

PUBLISHED = {
    "chinese": "GLMChineseTokenizer",
    "gpt2": "GLMGPT2Tokenizer",
    "bert": "GLMBertTokenizer",
    "roberta": "GLMRobertaTokenizer",
}
KINDS = (*PUBLISHED, *(f"{kind}-training" for kind in PUBLISHED), "ours", "chatglm", "chatglm-v0")
"""A published kind is a folder in the Hugging Face form; with ``-training`` it is vocabulary files alone."""

LETTERS = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789.,!?[]<>|_ABCXYZ", *CHINESE})


def train_pieces(path: Path, **settings: Any) -> None:
    """A SentencePiece model of the sample texts."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH, CHINESE, "".join(LETTERS)] * 3),
        model_writer=model,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())


def write_vocabulary(kind: str, folder: Path) -> None:
    """The vocabulary files of a kind, and for the published ones the name of their class."""
    if kind == "ours":
        save_tokenizer(train_tiny_tokenizer(), folder)
    elif kind == "chinese":
        train_pieces(folder / "cog-pretrain.model", vocab_size=240, normalization_rule_name="nmt_nfkc_cf")
    elif kind == "chatglm":
        named = {
            option: [piece for piece, its in APPENDED if its == type_]
            for option, type_ in (("control_symbols", CONTROL), ("user_defined_symbols", USER_DEFINED))
        }
        named["user_defined_symbols"].insert(0, "<n>")
        train_pieces(folder / "ice_text.model", vocab_size=600, byte_fallback=True, pad_id=3, **named)
    elif kind == "chatglm-v0":
        train_pieces(folder / "ice_text.model", vocab_size=240, pad_id=3, user_defined_symbols=["<n>"])
    elif kind == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
        lower = dict.fromkeys(word if word.startswith("[") else word.lower() for word in words)
        (folder / "vocab.txt").write_text("\n".join(lower), "utf-8")
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = ["Ġ t", "t h", "Ġt he", "h e", "a n"]
        pieces = [*alphabet, *(merge.replace(" ", "") for merge in merges)]
        named = ["<|endoftext|>"] if kind == "gpt2" else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        ids = {piece: index for index, piece in enumerate([*pieces, *named])}
        (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), "utf-8")
    if kind in PUBLISHED:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": PUBLISHED[kind]}), "utf-8")


@cache
def _folder(kind: str) -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix=f"gmask-{kind}-")
    write_vocabulary(kind.removesuffix("-training"), Path(folder.name))
    if kind.endswith("-training"):
        (Path(folder.name) / "tokenizer_config.json").unlink()
    return folder


@cache
def _read(kind: str) -> PreTrainedTokenizerBase:
    return read_tokenizer(Path(_folder(kind).name))


def make_tokenizer(kind: str) -> Any:
    """A tokenizer of a kind of `KINDS`, of one's own."""
    return copy.deepcopy(_read(kind))
