"""`Folder`: the opened folder of a model, with its config, special ids, weights and tokenizer.

A checkpoint of the training code has no config. It is inferred from the shapes of the weights; the number of heads and
the vocabulary are those of the published model of the same shape.
"""

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from gmask.architectures import VISUALGLM, architecture_of, class_of, find_architecture, find_class_name
from gmask.checkpoints.formats import PREFIX_ENCODER, Checkpoint, bare_name, is_megatron, open_megatron, open_published
from gmask.checkpoints.special_ids import special_ids
from gmask.checkpoints.tensor_files import SCALES
from gmask.checkpoints.zoo import FAMILIES, Family, family_of_shape, find_family
from gmask.errors import GmaskError, one_line
from gmask.files import MOST_KEYS, check_text, read_object
from gmask.models.base import Mismatch, check_config_values
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.glm import GLMConfig
from gmask.quantization.quantizer import QuantizationConfig, form_of, lay_out
from gmask.tokenizers.folder import read_tokenizer, require_vocabulary

Config: TypeAlias = GLMConfig | ChatGLMConfig

HEAD = "lm_head.weight"

ROWS_APART = "fix_command_token"
"""An entry that `gmask convert` adds to a training checkpoint in which ``[gMASK]`` has a row of its own.

The training code has one row for ``[gMASK]`` and the end token, unless its option of this name is set."""


class Folder:
    """The folder of a model in any form. Each file is read once, when it is first needed.

    Args:
        path: of the folder.
        like: the published model that a checkpoint of the training code is an instance of.
        heads: instead of ``like``, the number of attention heads; the config then lacks the special ids.
        tokenizer: the folder with the vocabulary, if it is not beside the weights.
        config: instead of the one in the folder.

    Raises:
        GmaskError: the path holds bytes that are not UTF-8.
    """

    def __init__(
        self,
        path: Path,
        *,
        like: str | None = None,
        heads: int | None = None,
        tokenizer: Path | None = None,
        config: Config | None = None,
    ) -> None:
        check_text(str(path), "the path of a model")  # safetensors and tokenizers open files by names in UTF-8
        self.path = path
        self.like = like
        self.heads = heads
        self._vocabulary = tokenizer
        self._given_config = config

    def __str__(self) -> str:
        return str(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "weights" in vars(self):
            self.weights.close()

    @cached_property
    def has_config(self) -> bool:
        return (self.path / "config.json").is_file()

    @cached_property
    def is_megatron(self) -> bool:
        """True for a checkpoint of the training code (Megatron, DeepSpeed), with or without a config.json."""
        return is_megatron(self.path)

    @property
    def lacks_config(self) -> bool:
        """True if the config has to be inferred from shapes and the table of published models."""
        return not self.has_config and self.is_megatron

    @cached_property
    def weights(self) -> Checkpoint:
        """The weights, mapped into memory; errors as of `open_checkpoint`."""
        return open_megatron(self.path) if self.is_megatron else open_published(self.path)

    @cached_property
    def config(self) -> Config:
        """The config, with the special ids that a published one leaves out.

        Raises:
            GmaskError: not JSON; the config of another architecture; an unknown number of heads.
        """
        if self._given_config is not None:
            return self._given_config
        if self.lacks_config:
            return _make_config(self._infer_config(), self.path, self.path)
        path = self.path / "config.json"
        return _make_config(read_object(path, most_keys=MOST_KEYS), path, self.path)

    @property
    def glm_config(self) -> GLMConfig:
        """The config of a GLM.

        Raises:
            GmaskError: as of `config`; the model is a ChatGLM.
        """
        if not isinstance(self.config, GLMConfig):
            raise GmaskError(
                f"{self.path}: is a ChatGLM, which the training code of GLM does not know; convert it to gmask or "
                "huggingface"
            )
        return self.config

    @property
    def quantization(self) -> QuantizationConfig | None:
        """The form of its integers; None for weights that are not quantized."""
        return form_of(self.config)

    @cached_property
    def family(self) -> Family | None:
        """The published model that a GLM is an instance of: the one named ``like``, else the one of its shape.

        Raises:
            GmaskError: an unknown name, or that of a model of another shape; weights that are not those of a GLM.
        """
        shape = read_shape(self.weights)
        layers, width = shape["num_hidden_layers"], shape["hidden_size"]
        if self.like is None:
            return family_of_shape(
                layers=layers,
                hidden_size=width,
                vocab_size=shape["vocab_size"],
                positions=shape["max_position_embeddings"],
            )
        family = find_family(self.like)
        if family is None or family.architecture != "glm":
            raise GmaskError(f"like={self.like!r}: no such GLM; there are {_names_of_glms()}")
        if (family.layers, family.hidden_size) != (layers, width):
            wanted = f"{family.layers} layers of width {family.hidden_size}"
            raise GmaskError(f"{self.path}: has {layers} layers of width {width}, but {family.name} {wanted}")
        return family

    def _require_family(self) -> Family:
        if self.family is None:
            shape = read_shape(self.weights)
            raise GmaskError(
                f"{self.path}: {shape['num_hidden_layers']} layers of width {shape['hidden_size']}, "
                f"{shape['vocab_size']} tokens and {shape['max_position_embeddings']} positions do not tell which GLM "
                "it is; give like=NAME (gmask convert: --like NAME, or --heads with the number of attention heads), "
                f"one of {_names_of_glms()}"
            )
        return self.family

    def _infer_config(self) -> dict[str, Any]:
        """Returns the values of a config for a checkpoint of the training code.

        The activation is the tanh form of GELU, as in the training code. If the checkpoint has the layers of a
        classifier, the class is that for sequence classification.
        """
        family = self._require_family() if self.heads is None else None
        values = {
            **(family.special_ids if family else {}),
            **read_shape(self.weights),
            "num_attention_heads": family.heads if family else self.heads,
            "hidden_act": "gelu_pytorch_tanh",
        }
        if "out_proj.weight" in self.weights:
            values |= {
                "architectures": ["GLMForSequenceClassification"],
                "num_labels": self.weights.shape("out_proj.weight")[0],
            }
        return values

    def copied_rows(self) -> Mapping[int, int]:
        """Returns the rows of the word embedding that are copies of others in the Hugging Face form: ``{to: from}``.

        GLM-10B-Chinese was trained with one id for ``[gMASK]`` and the end token. Its Hugging Face form, whose ids are
        used here, has two ids, and a copy of the row.
        """
        if not self.lacks_config or self.family is None or self.weights.bookkeeping.get(ROWS_APART):
            return {}
        return copies_of(self.family, self.config)

    def read_tokenizer(self, *, required: bool = False) -> PreTrainedTokenizerBase:
        """Reads the tokenizer.

        Args:
            required: for a folder without any vocabulary, name the files that are needed and where to get them. For a
                checkpoint of the training code this is always done.

        Raises:
            GmaskError: no vocabulary there, or a damaged one.
        """
        kind = self._require_family().tokenizer if self.lacks_config and self.heads is None else None
        if self._vocabulary is None and (required or self.is_megatron):
            require_vocabulary(self.path, kind)
        return read_tokenizer(self._vocabulary or self.path, kind=kind)

    def shape_model(
        self, model_class: type[PreTrainedModel] | None = None, *, quantized: bool = True
    ) -> PreTrainedModel:
        """Returns the model on the meta device, by default of the class that the config names.

        Args:
            quantized: False for the shapes that a quantized model had before it was quantized.

        Raises:
            GmaskError: a class or a quantization that is not for this kind of model.
        """
        chosen = model_class or class_of(self.config)
        if not issubclass(chosen.config_class, type(self.config)):
            if isinstance(self.config, ChatGLMConfig):
                raise GmaskError(f"{self}: is a ChatGLM, which has no blanks to fill: use `gmask chat` or model.chat")
            raise GmaskError(f"{self}: is a GLM, and {chosen.__name__} is not for one")
        with torch.device("meta"), no_init_weights():  # shapes alone: the weights come from the files
            model: PreTrainedModel = chosen(self.config)
        model.tie_weights()
        if quantized and self.quantization is not None:
            lay_out(model, self.quantization)
        return model

    def compare(self, model: PreTrainedModel, elsewhere: Collection[str] = ()) -> dict[str, str]:
        """Compares names and shapes of the weights with those of a model.

        Args:
            elsewhere: bare names of tensors that the model gets from elsewhere, or does not need.

        Returns:
            The name in the model of each tensor that it takes, by bare name.

        Raises:
            GmaskError: tensors that are missing, unexpected, or of another shape.
        """
        weights, state = self.weights, model.state_dict()
        own = {bare_name(name): name for name in state}
        unread = model._keys_to_ignore_on_load_unexpected or []
        skipped = {*elsewhere, *(key for key in weights if any(re.search(pattern, key) for pattern in unread))}
        if model.config.tie_word_embeddings:
            skipped |= {HEAD, f"{HEAD}_scale"}
        # A tensor that may be absent is compared if both have it: a tied head that was stored must have its shape.
        stored = {key: weights.shape(key) for key in weights if key in own or key not in skipped}
        wanted = {key: state[name].shape for key, name in own.items() if key in weights or key not in skipped}
        if mismatch := Mismatch.between(stored, wanted):
            taken = {key for key in weights if key not in skipped}
            raise GmaskError(f"{self.path}: {self._explain(mismatch, model, taken)}")
        return {key: own[key] for key in weights if key not in skipped}

    def _explain(self, mismatch: Mismatch, model: PreTrainedModel, taken: Collection[str]) -> str:
        has_integers = any(self.weights.dtype(key) == torch.int8 for key in self.weights)
        if taken and all(key.startswith(PREFIX_ENCODER) for key in taken):
            return (
                "holds no more than a P-tuning prefix: load the model that it was trained for, with "
                f"adapter={self.path}"
            )
        if any(key.startswith("image_encoder.") for key in mismatch.unexpected):
            return str(VISUALGLM.refusal("image_encoder"))
        if mismatch.lacks_scales and not has_integers:
            return "the weights are not quantized, though config.json says so: take quantization_bit out of it"
        if not mismatch.lacks_scales and any(key.endswith(SCALES) for key in mismatch.unexpected):
            return (
                "holds quantized weights, where config.json says nothing of it; take all files from one revision, or "
                "name the folder of the unquantized model"
            )
        message = mismatch.explain_for(model)
        if mismatch.missing or mismatch.unexpected:
            return message
        key = next(iter(mismatch.shapes))
        if key.endswith(("word_embeddings.weight", HEAD)):
            return f"{message}; take all files from one revision"
        is_integer = self.weights.dtype(key) == torch.int8
        return message + "; quantization_bit there says another number of bits than the weights have" * is_integer

    def check_head(self, model: PreTrainedModel) -> None:
        """Raises `GmaskError` if the config ties the head to the embedding, but the stored head differs from it."""
        embedding = architecture_of(model.config).embedding
        for head, twin in ((HEAD, embedding), (f"{HEAD}_scale", f"{embedding}_scale")):
            if not model.config.tie_word_embeddings or head not in self.weights or twin not in self.weights:
                continue
            if not torch.equal(self.weights.read(head), self.weights.read(twin)):
                raise GmaskError(
                    f"{self.path}: {head} differs from {twin}, though config.json ties them; "
                    "set tie_word_embeddings to false there to use it"
                )


def read_config(path: Path, like: str | None = None, heads: int | None = None) -> Config:
    """Opens a folder only to read its config; arguments and errors as of `Folder`."""
    with Folder(path, like=like, heads=heads) as folder:
        return folder.config


def _make_config(values: dict[str, Any], source: Path, folder: Path) -> Config:
    """Makes a config of ours; errors name ``source``."""
    values.pop("auto_map", None)  # names remote code
    architecture = find_architecture(values, source)
    values["architectures"] = [find_class_name(values, source)]
    config_class = architecture.config_class
    try:
        check_config_values(config_class, values)
    except ValueError as error:
        raise GmaskError(f"{source}: {error}") from error
    if any(values.get(role) is None for role in architecture.special_ids):
        values |= special_ids(folder, values, architecture)
    try:
        config: Config = config_class.from_dict({**values, "model_type": config_class.model_type})
    except Exception as error:  # transformers raises what it meets of values of a wrong kind
        raise GmaskError(f"{source}: {one_line(error)}") from error
    for role in architecture.special_ids:
        token_id = getattr(config, role)
        for number in token_id if isinstance(token_id, list) else [token_id]:
            if number is not None and not 0 <= number < config.vocab_size:
                raise GmaskError(f"{source}: {role} {number} is beyond the vocab_size of {config.vocab_size}")
    config.name_or_path = str(folder)
    return config


def read_shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the values of a config that follow from the shapes of a GLM: all but the number of heads.

    Raises:
        GmaskError: the weights are not those of a GLM.
    """
    found = set(checkpoint)
    needed = ("word_embeddings.weight", "transformer.position_embeddings.weight")
    for key in needed:
        if key not in found:
            raise GmaskError(f"{checkpoint.folder}: has no {key}, so it is not a checkpoint of a GLM")
    layers = {int(match[1]) for key in found if (match := re.match(r"transformer\.layers\.(\d+)\.", key))}
    vocab_size, hidden_size = checkpoint.shape(needed[0])
    has_two_tables = "transformer.block_position_embeddings.weight" in found
    return {
        "num_hidden_layers": len(layers),
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": checkpoint.shape(needed[1])[0] - int(has_two_tables),
        "block_position_encoding": has_two_tables,
    }


def copies_of(family: Family, config: Config) -> dict[int, int]:
    """Returns those of `Family.copied_rows` that concern the ``[gMASK]`` of this config."""
    return {row: source for row, source in family.copied_rows.items() if row == config.gmask_token_id}


def _names_of_glms() -> str:
    return ", ".join(family.name for family in FAMILIES if family.architecture == "glm")
