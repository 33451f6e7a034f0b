"""The tokenizer of a folder, from its vocabulary files."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gmask.architectures import CHATGLM, GLM
from gmask.config import show
from gmask.errors import GmaskError, one_line
from gmask.files import COPY_AGAIN, MOST_KEYS, UTF8_MARK, read_object, refuse_placeholder
from gmask.tokenizers import glm
from gmask.tokenizers.chat_template import attach_chat_template
from gmask.tokenizers.chatglm import VOCABULARY_FILE, ChatGLMTokenizer
from gmask.tokenizers.glm import ADDED_TOKENS, GLMTokenizer, read_ids
from gmask.tokenizers.special_tokens import TRAINING_TOKENS

CLASSES: dict[str, type[Any]] = {kind: getattr(glm, name) for name, kind in GLM.tokenizers.items() if kind}
"""The class of each kind of vocabulary; kinds are those of the table of published models."""

CLASS_NAMES: dict[str, type[Any]] = {
    **{tokenizer_class.__name__: tokenizer_class for tokenizer_class in CLASSES.values()},
    **dict.fromkeys(CHATGLM.tokenizers, ChatGLMTokenizer),
    **dict.fromkeys(("GLMTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"), GLMTokenizer),
}
"""The classes by the names that ``tokenizer_class`` may have in ``tokenizer_config.json``."""

SETTINGS_FILES = frozenset({"tokenizer_config.json", "special_tokens_map.json", ADDED_TOKENS})
"""Files with settings of a tokenizer, without a vocabulary."""

VOCABULARY_FILES = {
    "tokenizer.json",
    VOCABULARY_FILE,
    *(name for tokenizer_class in CLASSES.values() for name in tokenizer_class.vocab_files_names.values()),
} - SETTINGS_FILES
"""Files with a vocabulary; a folder of a tokenizer has one of them."""

FILES = VOCABULARY_FILES | SETTINGS_FILES | {"chat_template.jinja"}
"""All files of a tokenizer."""

WANTED = {
    "chinese": "cog-pretrain.model",
    "gpt2": "vocab.json and merges.txt of GPT-2",
    "bert": "vocab.txt of BERT (uncased)",
    "roberta": "vocab.json and merges.txt of RoBERTa",
}
"""The files that a kind of vocabulary needs, in words."""


def require_vocabulary(folder: Path, kind: str | None) -> None:
    """Raises `GmaskError` if a folder has no vocabulary, with the files that it needs.

    Args:
        kind: of the vocabulary; None for any.
    """
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        return
    files = WANTED[kind] if kind else " or ".join(WANTED.values())
    raise GmaskError(
        f"{folder}: has no vocabulary beside it: give tokenizer=FOLDER (gmask convert: --tokenizer FOLDER), one that "
        f"holds {files}"
    )


def read_tokenizer(folder: Path, *, kind: str | None = None) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a folder in one of the published forms, or in ours, with its chat template.

    Its class is that of ``tokenizer_config.json``, else that of ``kind``, else that of the files. A folder with
    vocabulary files only, as beside a checkpoint of the training code, is read as that code read it (``spacing``
    "training"); a Hugging Face folder is read as the code published there did.

    Args:
        kind: ``chinese``, ``gpt2``, ``bert`` or ``roberta``; or, for vocabulary files only, another key of
            `TRAINING_TOKENS`, such as ``chinese-nofix`` for GLM-10B-Chinese.

    Raises:
        GmaskError: a missing or damaged file, or an unknown kind or class.
    """
    tokenizer = _read_vocabulary(folder, kind)
    attach_chat_template(tokenizer)
    return tokenizer


def _read_vocabulary(folder: Path, kind: str | None) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise GmaskError(f"{folder}: no such folder; name the one that holds the vocabulary files")
    if kind is not None and kind not in TRAINING_TOKENS:
        raise GmaskError(f"{kind}: no such kind of vocabulary; there are {', '.join(TRAINING_TOKENS)}")
    for path in sorted(folder.iterdir()):
        if path.name in VOCABULARY_FILES | SETTINGS_FILES:
            refuse_placeholder(path)
    config = read_object(folder / "tokenizer_config.json", required=False, most_keys=MOST_KEYS)
    _check_config(folder / "tokenizer_config.json", config)
    tokenizer_class = _named_class(folder, config)
    if tokenizer_class is None and kind is None and (folder / VOCABULARY_FILE).is_file():
        tokenizer_class = ChatGLMTokenizer
    if tokenizer_class is ChatGLMTokenizer:
        return _from_folder(ChatGLMTokenizer, folder, folder / VOCABULARY_FILE)
    if tokenizer_class is None:
        kind = kind or _find_kind(folder)
        tokenizer_class = CLASSES[kind.split("-")[0]] if kind else GLMTokenizer
    if tokenizer_class is GLMTokenizer:
        return _from_folder(GLMTokenizer, folder, folder / "tokenizer.json")
    if config or (folder / "added_tokens.json").is_file():
        for name in ("added_tokens.json", "special_tokens_map.json"):
            read_object(folder / name, required=False)
        return _from_folder(tokenizer_class, folder, folder / "tokenizer_config.json")
    files = {key: str(folder / name) for key, name in tokenizer_class.vocab_files_names.items()}
    settings: dict[str, Any] = {"spacing": "training", "name_or_path": str(folder)}
    assert kind is not None, "a class is named by a tokenizer_config.json"
    tokenizer: PreTrainedTokenizerBase = tokenizer_class(**files, added_ids=TRAINING_TOKENS[kind], **settings)
    return tokenizer


def _from_folder(tokenizer_class: type[Any], folder: Path, path: Path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer by ``from_pretrained``; errors of transformers name ``path``."""
    if path.name in tokenizer_class.vocab_files_names.values() and not path.is_file():
        raise GmaskError(f"{path}: missing; download or copy it there")
    try:
        with _without_marks(folder) as clean:
            tokenizer: PreTrainedTokenizerBase = tokenizer_class.from_pretrained(clean, local_files_only=True)
    except GmaskError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception, transformers whatever its parts raise
        message = one_line(error)
        raise GmaskError(f"{path}: not that of a tokenizer, download or copy it again ({message})") from error
    if clean != folder:
        _name_files(tokenizer, folder)
    return tokenizer


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """Gives the folder or, if a byte order mark begins one of its files, a copy of them without marks.

    transformers reads most of them itself, and refuses the mark.
    """
    found = {path: path.read_bytes() for path in folder.iterdir() if path.name in FILES and path.is_file()}
    if not any(data.startswith(UTF8_MARK) for data in found.values()):
        yield folder
        return
    clean = Path(tempfile.mkdtemp())
    try:
        for path, data in found.items():
            (clean / path.name).write_bytes(data.removeprefix(UTF8_MARK))
        yield clean
    finally:
        shutil.rmtree(clean)


def _name_files(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Names the files of a folder as those of the tokenizer, which copies them when it is saved."""
    tokenizer.name_or_path = str(folder)
    for key, name in tokenizer.vocab_files_names.items():
        if (folder / name).is_file():
            if getattr(tokenizer, key, None):
                setattr(tokenizer, key, str(folder / name))
            if tokenizer.init_kwargs.get(key):
                tokenizer.init_kwargs[key] = str(folder / name)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Raises `GmaskError` for values of a ``tokenizer_config.json`` that transformers would take and fail at later."""
    for key, value in config.items():
        fault = None
        if key == "tokenizer_class" and not isinstance(value, str | None):
            fault = "not the name of a class"
        elif key == "model_max_length" and value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            fault = None if is_number and value > 0 else "not a number of tokens"
        elif key.endswith("_token") and not isinstance(value, bool | None):
            token = value.get("content") if isinstance(value, dict) else value
            fault = None if isinstance(token, str) and token else "not a token"
        if fault:
            raise GmaskError(f"{path}: {key} is {show(value)}, {fault}; {COPY_AGAIN}")


def _named_class(folder: Path, config: dict[str, Any]) -> type[Any] | None:
    name = config.get("tokenizer_class")
    if name is None or name in CLASS_NAMES:
        return CLASS_NAMES.get(str(name))
    if (folder / "tokenizer.json").is_file():
        return GLMTokenizer
    raise GmaskError(f"{folder / 'tokenizer_config.json'}: tokenizer_class {name!r} is not that of a GLM")


def _find_kind(folder: Path) -> str | None:
    """The kind of vocabulary by its files; None for a ``tokenizer.json``."""
    if (folder / "tokenizer.json").is_file():
        return None
    if (folder / "cog-pretrain.model").is_file():
        return "chinese"
    if (folder / "vocab.txt").is_file():
        return "bert"
    if (folder / "vocab.json").is_file():
        return "roberta" if "<s>" in read_ids(str(folder / "vocab.json")) else "gpt2"
    raise GmaskError(
        f"{folder}: no vocabulary there; expected tokenizer.json, cog-pretrain.model, ice_text.model, vocab.txt, or"
        " vocab.json and merges.txt"
    )
