"""What shapes a ChatGLM-6B, and which of its tokens carry the layout?"""

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from gmask.errors import GmaskError
from gmask.quantization.quantizer import QuantizationConfig

PUBLISHED_LAYERS = 28
"""The published block never learns ``num_layers`` and scales its residual for 28 layers, whatever the depth."""

IMAGE_PARTS = {"eva_config", "qformer_config", "image_length"}
"""Keys of VisualGLM, whose configs have the same ``model_type``, too, and often the same class."""

LATER_GENERATIONS = {"multi_query_attention", "padded_vocab_size", "rmsnorm"}
"""Keys of ChatGLM2, ChatGLM3 and GLM-4-9b, whose configs have the same ``model_type``."""


class ChatGLMConfig(PreTrainedConfig):
    """Configuration of a ChatGLM-6B; published configs are accepted under their own names.

    ``bos_token_id`` is ``<sop>``, which opens the answer, and ``eos_token_id`` is ``<eop>``.

    Options that no published config has:

    - ``residual_alpha``, the factor of the normalised residual; sqrt(56) unless stated, as published.
    - ``rotary_dtype``: ``"float32"``, or ``"module"`` for tables in the precision of the weights, as published; in half
      precision those are off by up to half a radian near position 2000.
    - ``rotary_stretch`` divides the places, so that a longer text falls on the angles of a shorter one: 2.0 for twice
      the ``max_position_embeddings``. Untrained: no published weights were tuned with it, and replies suffer.
    - ``position_rule``: ``"v1.1"``, or ``"v0"`` for the places that the first published code (vocabulary of 150528)
      gave, which differ between a pass over a whole text and step-by-step decoding.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_layers": "num_hidden_layers",
        "inner_hidden_size": "intermediate_size",
        "layernorm_epsilon": "layer_norm_eps",
        "max_sequence_length": "max_position_embeddings",
        "sop_token_id": "bos_token_id",
        "eop_token_id": "eos_token_id",
    }

    base_model_tp_plan: ClassVar[dict[str, str]] = {  # rows of whole heads: query, key and value of each lie together
        "word_embeddings": "embedding_rowwise",
        "layers.*.attention.query_key_value": "colwise",
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    intermediate_size: int = 16384
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    position_encoding_2d: bool = True
    rotary_dtype: str = "float32"
    rotary_stretch: float = 1.0
    position_rule: str = "v1.1"
    residual_alpha: float = math.sqrt(2 * PUBLISHED_LAYERS)
    initializer_range: float = 0.02
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 3
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    mask_token_id: int | None = 130000
    gmask_token_id: int | None = 130001
    auto_map: dict[str, Any] = field(default_factory=dict)  # no remote code; trainers read it unasked

    complete_published: ClassVar[Callable[[Mapping[str, Any]], dict[str, Any]] | None] = None
    """Fills in what an early published config leaves out; whoever knows the vocabularies sets it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls.complete_published is not None:
            config_dict = cls.complete_published(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        later = LATER_GENERATIONS & kwargs.keys()
        if later:
            raise GmaskError(
                f"{min(later)} belongs to ChatGLM2, ChatGLM3 or GLM-4-9B, which gmask does not run: call "
                "gmask.registration.unregister(), and transformers loads them with trust_remote_code=True"
            )
        images = {key for key in IMAGE_PARTS & kwargs.keys() if kwargs[key] not in (None, 0)}
        images |= {name for name in self.architectures or () if name.endswith("WithImage")}
        if images:
            raise GmaskError(
                f"{min(images)} belongs to VisualGLM, which reads images too and which gmask does not run: use "
                "github.com/THUDM/VisualGLM-6B"
            )
        quarters = 4 * self.num_attention_heads  # two rotary groups of channels, each of which turns in pairs
        if self.hidden_size % quarters:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {quarters}, 4 * num_attention_heads")
        for name, known in (("rotary_dtype", ("float32", "module")), ("position_rule", ("v1.1", "v0"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if not self.rotary_stretch > 0:
            raise ValueError(f"rotary_stretch {self.rotary_stretch} is not above 0")
        bits, with_embeddings = kwargs.pop("quantization_bit", 0), kwargs.pop("quantization_embeddings", False)
        if bits:  # a published checkpoint of integers
            kwargs["quantization_config"] = QuantizationConfig(bits, embeddings=with_embeddings).to_dict()
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
