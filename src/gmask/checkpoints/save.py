"""Writes the weights, the config and the tokenizer of a model into a folder, and verifies them by reading them back."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmask.architectures import architecture_of
from gmask.checkpoints.folder import Config, read_config
from gmask.checkpoints.formats import Checkpoint, open_checkpoint, same_bits
from gmask.checkpoints.tensor_files import SCALES, Blocks, SafetensorsFile, SafetensorsWriter, plan_shards
from gmask.errors import GmaskError
from gmask.files import read_object, write_json
from gmask.models.chatglm import ChatGLMConfig
from gmask.quantization.quantizer import form_of
from gmask.tokenizers.chat_template import chat_template_of
from gmask.tokenizers.chatglm import PROMPT_TOKENS, ChatGLMTokenizer, ChatGLMTokenizerV0
from gmask.tokenizers.folder import read_tokenizer
from gmask.tokenizers.glm import PublishedVocabulary

SHARD_BYTES = 5 * 10**9

ROWS_FILE = "training_rows.safetensors"
"""Rows of the word embedding that a conversion replaced by copies, by index; converting back restores them."""

PUBLISHED_ONLY = {
    "attention_scale": 1.0, "checkpoint_activations": False, "checkpoint_num_layers": 1, "output_predict": True,
    "parallel_output": True, "relative_encoding": False, "spell_func": "lstm", "spell_length": None,
}  # fmt: skip
"""Keys of published configs that ours lack. Source: configuration_glm.py of THUDM/glm-large-chinese."""

CHECKED = (
    "architectures", "hidden_act", "num_attention_heads", "num_hidden_layers", "pool_token", "position_rule",
    "pre_seq_len", "residual_alpha",
)  # fmt: skip
"""Values of a config that are verified, beside the special ids. Each kind of model has some of them."""

OF_THIS_MACHINE = ("local_files_only", "is_local", "name_or_path")
OF_LATER_VERSIONS = ("added_tokens_decoder", "backend")
"""Settings of a tokenizer that are left out: those of this machine, and those that the published code cannot read."""


class Content:
    """The tensors of a new checkpoint, made from those of another. Each is read when it is needed.

    Args:
        checkpoint: the source.
        names: the names in the new files, by bare name.
        dtype: of the new tensors, except for integers and their scales; None to keep that of each.
        rows: new values of rows of the word embedding.
        twins: tensors that the source lacks, by bare name, each with the bare name of the tensor that it equals.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        dtype: torch.dtype | None = None,
        rows: Mapping[int, Tensor] | None = None,
        twins: Mapping[str, str] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.names = dict(names)
        self.twins = dict(twins or {})
        self._dtype = dtype
        self._rows = dict(rows or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def dtype(self, key: str) -> torch.dtype:
        stored = self.checkpoint.dtype(self._source(key))
        is_kept = not stored.is_floating_point or key.endswith(SCALES)
        return stored if is_kept or self._dtype is None else self._dtype

    def plan(self, key: str) -> Tensor:
        """Returns a tensor on the meta device: its new shape and dtype."""
        return torch.empty(self.checkpoint.shape(self._source(key)), dtype=self.dtype(key), device="meta")

    @property
    def nbytes(self) -> int:
        return sum(self.plan(key).nbytes for key in self)

    @property
    def numbers(self) -> int:
        """The number of elements of all tensors; packed integers count as stored."""
        return sum(self.plan(key).numel() for key in self)

    def read(self, key: str) -> Tensor:
        """Returns a tensor in its new dtype; it may be a view of its file.

        Raises:
            GmaskError: a value is beyond the range of the new dtype.
        """
        stored = self.checkpoint.read(self._source(key))
        tensor = stored.to(self.dtype(key))
        if has_overflown(stored, tensor):
            raise GmaskError(
                f"{self.checkpoint.folder}: {key} has numbers beyond the range of {dtype_name(tensor.dtype)}; choose "
                "bfloat16 or float32"
            )
        if key == EMBEDDING and self._rows:
            tensor = tensor.clone()
            for row, values in self._rows.items():
                tensor[row] = values
        return tensor

    def read_rows(self, rows: list[int]) -> dict[int, Tensor]:
        """Returns copies of rows of the word embedding, in its new dtype."""
        embedding = self.read(EMBEDDING)
        return {row: embedding[row].clone() for row in rows}

    def write(self, folder: Path, advance: Callable[[int], object], *, block_bits: int | None = None) -> None:
        """Writes all tensors as safetensors; see `write_weights`."""
        plan = {self.names[key]: self.plan(key) for key in self}
        tensors = ((self.names[key], self.read(key)) for key in self)
        write_weights(folder, plan, tensors, advance, block_bits=block_bits)

    def with_rows(self, rows: Mapping[int, Tensor]) -> "Content":
        """Returns the same content with new values in rows of the word embedding."""
        return Content(self.checkpoint, self.names, self._dtype, rows, self.twins)

    def _source(self, key: str) -> str:
        return self.twins.get(key, key)


def write_weights(
    folder: Path,
    plan: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    advance: Callable[[int], object],
    *,
    block_bits: int | None = None,
) -> None:
    """Writes weights as safetensors, in several shards and an index if they are large.

    Args:
        plan: all tensors by name, on the meta device.
        tensors: in any order.
        advance: is called with the number of bytes of each tensor that was written.
        block_bits: of the quantized weights, if they are to lie in the blocks of the CPU kernels.
    """
    shards = plan_shards(plan, SHARD_BYTES)
    files = {name: file for file, shard in shards.items() for name in shard}
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(
                SafetensorsWriter(folder / file, shard, None if block_bits is None else Blocks.of(block_bits, shard))
            )
            for file, shard in shards.items()
        }
        for name, tensor in tensors:
            writers[files[name]].write(name, tensor)
            advance(tensor.nbytes)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in plan.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
        write_json(folder / "model.safetensors.index.json", index, indent=2)


def write_config(config: Config, folder: Path, *, published: bool) -> None:
    """Writes ``config.json``, in the published form with the published keys as far as they exist."""
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
    write_json(folder / "config.json", values, indent=2)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, published: bool) -> None:
    """Writes the vocabulary and its settings, in the published form with the settings that the published code needs."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = read_object(path)
    left_out = set(OF_THIS_MACHINE)
    if published and isinstance(tokenizer, PublishedVocabulary):
        left_out.update(OF_LATER_VERSIONS)
        values |= {"additional_special_tokens": values.pop("extra_special_tokens"), "use_fast": False}
    elif published and isinstance(tokenizer, ChatGLMTokenizer):
        left_out.update(OF_LATER_VERSIONS)
        values |= {"tokenizer_class": ChatGLMTokenizer.__name__, "num_image_tokens": tokenizer.first_id}
        extra = [token for token in values.pop("extra_special_tokens", ()) if token not in PROMPT_TOKENS]
        if extra:
            values["additional_special_tokens"] = extra
        if isinstance(tokenizer, ChatGLMTokenizerV0):
            values["eop_token"] = values.pop("end_token")
    write_json(path, {name: value for name, value in values.items() if name not in left_out}, indent=2)
    if published and tokenizer.chat_template == chat_template_of(tokenizer):  # gmask attaches it when it reads
        (folder / "chat_template.jinja").unlink(missing_ok=True)


def write_rows(rows: Mapping[int, Tensor], folder: Path) -> None:
    """Writes rows of the word embedding into `ROWS_FILE`."""
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


def verify_config(folder: Path, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `GmaskError` if config or vocabulary differ when they are read back."""
    found, read_back = read_config(folder), read_tokenizer(folder)
    names = (*CHECKED, *architecture_of(config).special_ids)
    differing = [name for name in names if getattr(found, name, None) != getattr(config, name, None)]
    if str(form_of(found)) != str(form_of(config)):
        differing.append("quantization_config")
    if type(read_back) is not type(tokenizer) or read_back.get_vocab() != tokenizer.get_vocab():
        differing.append("the vocabulary")
    if differing:
        raise GmaskError(f"{differing[0]} was not written as it should be; this is a fault of gmask: report it")


EMBEDDING = "word_embeddings.weight"
PIECE = 2**22  # elements that are compared at a time


def verify_weights(content: Content, folder: Path, advance: Callable[[int], object]) -> None:
    """Compares the weights of a folder with the content that was written, bit by bit.

    Args:
        advance: is called with the number of bytes of each tensor that was compared.

    Raises:
        GmaskError: they differ.
    """
    with open_checkpoint(folder) as written:
        if differing := set(written) ^ set(content):
            raise GmaskError(f"{min(differing)} was not written as it should be; this is a fault of gmask: report it")
        for key in content:
            tensor = content.read(key)
            if written.stored_name(key) != content.names[key] or not same_bits(written.read(key), tensor):
                raise GmaskError(f"{key} is not on the disk as it was written; check the disk, and try again")
            advance(tensor.nbytes)


def has_overflown(stored: Tensor, tensor: Tensor) -> bool:
    """Returns True if finite values became infinite in a smaller dtype."""
    if tensor.dtype == stored.dtype or torch.finfo(tensor.dtype).max >= torch.finfo(stored.dtype).max:
        return False
    pieces = zip(torch.split(stored.reshape(-1), PIECE), torch.split(tensor.reshape(-1), PIECE), strict=True)
    return any(not torch.equal(before.isfinite(), after.isfinite()) for before, after in pieces)


def main_dtype(weights: Checkpoint | Content, embedding: str) -> torch.dtype:
    """Returns the dtype in which a model of these weights computes: that of its embedding, else of the first floats.

    Args:
        embedding: the bare name of the word embedding.
    """
    keys = [embedding, *(key for key in weights if not key.endswith(SCALES))]
    return next(weights.dtype(key) for key in keys if weights.dtype(key).is_floating_point)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
