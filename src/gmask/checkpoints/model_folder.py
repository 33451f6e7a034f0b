"""What stands in a folder that transformers reads, in our form and in the published one?"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmask.checkpoints.architectures import architecture_of
from gmask.checkpoints.configs import Config, read_config
from gmask.checkpoints.content import EMBEDDING, Content
from gmask.checkpoints.tensor_files import SafetensorsFile
from gmask.checkpoints.tokenizer_files import read_tokenizer
from gmask.checkpoints.writing import SafetensorsWriter, plan_shards
from gmask.errors import GmaskError
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.chatglm.tokenization import ChatGLMTokenizer
from gmask.models.chatglm.tokenization_v0 import ChatGLMTokenizerV0
from gmask.models.glm.published_vocabulary import PublishedVocabulary
from gmask.quantization.quantizer import form_of

SHARD_BYTES = 5 * 10**9

COMPANIONS = ("README.md", "LICENSE", "MODEL_LICENSE", "generation_config.json")
"""Files that go along with the weights: they say whose these are, and how answers are drawn."""

ROWS_FILE = "training_rows.safetensors"
"""Rows of the word embedding that the training checkpoint had where the model has copies of others, by their number."""

PUBLISHED_ONLY = {
    "attention_scale": 1.0, "checkpoint_activations": False, "checkpoint_num_layers": 1, "output_predict": True,
    "parallel_output": True, "relative_encoding": False, "spell_func": "lstm", "spell_length": None,
}  # fmt: skip
"""What published configs state beside what ours does. Source: configuration_glm.py of THUDM/glm-large-chinese."""

CHECKED = (
    "architectures", "hidden_act", "num_attention_heads", "num_hidden_layers", "pool_token", "position_rule",
    "pre_seq_len", "residual_alpha",
)  # fmt: skip
"""Values of a config that are read back, beside the special ids; either kind of model has some of them."""

OF_THIS_MACHINE = ("local_files_only", "is_local", "name_or_path")
OF_LATER_VERSIONS = ("added_tokens_decoder", "backend")
"""Settings of a tokenizer that say nothing about it, and those that the published code does not know."""


def write_shards(content: Content, folder: Path, advance: Callable[[int], object]) -> None:
    """Writes the weights as safetensors, in several files and an index if they are large.

    Args:
        advance: is told the bytes that were written.
    """
    plan = {content.names[key]: content.plan(key) for key in content}
    keys = {name: key for key, name in content.names.items()}
    shards = plan_shards(plan, SHARD_BYTES)
    for file, shard in shards.items():
        with SafetensorsWriter(folder / file, shard) as writer:
            for name in shard:
                writer.write(name, content.read(keys[name]))
                advance(shard[name].nbytes)
    write_index(shards, folder)


def write_index(shards: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Writes which of several files holds which tensor; one file needs no index.

    Args:
        shards: what each file holds, by its name; the tensors may be without numbers.
    """
    if len(shards) > 1:
        places = {name: file for file, shard in shards.items() for name in shard}
        size = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def copy_companions(source: Path, folder: Path) -> None:
    """Copies those of `COMPANIONS` that are there into the folder of the new weights."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_config(config: Config, folder: Path, *, published: bool) -> None:
    """Writes ``config.json``; where the published form has no name for a value, it stands under ours."""
    values = json.loads(config.to_json_string())
    values.pop("auto_map", None)
    if published:
        architecture = architecture_of(config)
        aliases = {
            ours: theirs for theirs, ours in config.attribute_map.items() if ours not in architecture.special_ids
        }
        values = {aliases.get(name, name): value for name, value in values.items()}
        values["torch_dtype"] = values.pop("dtype")
        values.pop("transformers_version", None)
        if values["architectures"] == [architecture.classes[0]]:
            values["architectures"] = [architecture.body]
        form = form_of(config)
        if form is not None:
            del values["quantization_config"]
            values |= {"quantization_bit": form.bits, "quantization_embeddings": form.embeddings}
        if not isinstance(config, ChatGLMConfig):
            values = PUBLISHED_ONLY | values | {"model_type": "glm"}
    write_json(folder / "config.json", values)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, published: bool) -> None:
    """Writes the vocabulary and its settings, in the published form with what the published code expects of them."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    left_out = set(OF_THIS_MACHINE)
    if published and isinstance(tokenizer, PublishedVocabulary):
        left_out.update(OF_LATER_VERSIONS)
        values |= {"additional_special_tokens": values.pop("extra_special_tokens"), "use_fast": False}
    elif published and isinstance(tokenizer, ChatGLMTokenizer):
        left_out.update(OF_LATER_VERSIONS)
        values |= {"tokenizer_class": ChatGLMTokenizer.__name__, "num_image_tokens": tokenizer.first_id}
        if isinstance(tokenizer, ChatGLMTokenizerV0):
            values["eop_token"] = values.pop("end_token")
    write_json(path, {name: value for name, value in values.items() if name not in left_out})


def write_rows(rows: Mapping[int, Tensor], folder: Path) -> None:
    """Writes rows of the word embedding into `ROWS_FILE`, for the way back to a training checkpoint."""
    with SafetensorsWriter(folder / ROWS_FILE, {str(row): values.to("meta") for row, values in rows.items()}) as writer:
        for row, values in rows.items():
            writer.write(str(row), values)


def read_rows(folder: Path, content: Content) -> dict[int, Tensor]:
    """The rows that `write_rows` wrote into a folder, if they fit the content; none without such a file."""
    if not (folder / ROWS_FILE).is_file():
        return {}
    file = SafetensorsFile(folder / ROWS_FILE)
    vocab_size, hidden_size = content.checkpoint.shape(EMBEDDING)
    for name in file.names():
        if not name.isdecimal() or int(name) >= vocab_size or file.shape(name) != torch.Size([hidden_size]):
            raise GmaskError(f"{file.path}: does not belong to the weights beside it; remove it")
    return {int(name): file.read(name).to(content.dtype(EMBEDDING)) for name in file.names()}


def verify_folder(folder: Path, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `GmaskError` if config or vocabulary are not read back as they were written."""
    found, words = read_config(folder), read_tokenizer(folder)
    names = (*CHECKED, *architecture_of(config).special_ids)
    differing = [name for name in names if getattr(found, name, None) != getattr(config, name, None)]
    if str(form_of(found)) != str(form_of(config)):
        differing.append("quantization_config")
    if type(words) is not type(tokenizer) or words.get_vocab() != tokenizer.get_vocab():
        differing.append("the vocabulary")
    if differing:
        raise GmaskError(f"{differing[0]} was not written as it should be; this is a fault of gmask: report it")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
