"""What shapes a GLM, and which of its tokens carry the layout?"""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

Network = Literal["lstm", "mlp", "none"]
"""What trained vectors of P-tuning may come out of."""


class GLMConfig(PreTrainedConfig):
    """Configuration of a GLM.

    Published configs (``num_layers``, ``max_sequence_length``, ``output_dropout_prob`` ...) are accepted under their
    own names. ``hidden_act`` is ``"gelu"`` (erf) for the published Hugging Face code and ``"gelu_pytorch_tanh"`` for
    the original training code and for models made here.

    The ids of ``<sop>`` and of the blanks are what lets the model read a layout off the token ids; without them a
    ``layout`` has to be given.

    What tuning adds, and no published config has:

    - ``pre_seq_len`` trained keys and values in front of every layer (P-tuning v2), with ``prefix_projection`` out of a
      small network.
    - ``prompt_tokens`` trained vectors that stand in the text for words (P-tuning): ``prompt_ids`` are their ids.
      ``prompt_encoder`` is the network that they come out of: ``"lstm"``, ``"mlp"``, or ``"none"``.
    """

    model_type = "glm_blank"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_layers": "num_hidden_layers",
        "max_sequence_length": "max_position_embeddings",
        "embedding_dropout_prob": "embedding_dropout",
        "attention_dropout_prob": "attention_dropout",
        "output_dropout_prob": "hidden_dropout",
    }
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "word_embeddings": "embedding_rowwise",
        "transformer.layers.*.attention.query_key_value": "colwise_thirds",
        "transformer.layers.*.attention.dense": "rowwise",
        "transformer.layers.*.mlp.dense_h_to_4h": "colwise",
        "transformer.layers.*.mlp.dense_4h_to_h": "rowwise",
    }

    vocab_size: int = 30592
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 512
    block_position_encoding: bool = True
    hidden_act: str = "gelu"
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    classifier_dropout: float | None = None  # as hidden_dropout if absent
    pool_token: Literal["cls", "start", "pad"] = "cls"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    prompt_tokens: int = 0
    prompt_encoder: Network = "none"
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    sop_token_id: int | None = None
    eop_token_id: int | None = None
    mask_token_id: int | None = None
    smask_token_id: int | None = None
    gmask_token_id: int | None = None
    auto_map: dict[str, Any] = field(default_factory=dict)  # no remote code; trainers read it unasked

    complete_published: ClassVar[Callable[[Mapping[str, Any], str], dict[str, Any]] | None] = None
    """Fills in what the published config of a folder or hub name leaves out; whoever knows the vocabularies sets it."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if cls.complete_published is not None and values.get("model_type") == "glm":
            values = cls.complete_published(values, str(pretrained_model_name_or_path))
        return values, rest

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size

    @property
    def position_rows(self) -> int:
        """Rows of a position table: with two tables, one more than positions, as published; answers start at 1."""
        return self.max_position_embeddings + int(self.block_position_encoding)

    @property
    def prompt_ids(self) -> range:
        """The ids behind the vocabulary, which stand for trained vectors."""
        return range(self.vocab_size, self.vocab_size + self.prompt_tokens)

    @property
    def blank_token_ids(self) -> list[int]:
        """Ids of ``[MASK]``, ``[sMASK]`` and ``[gMASK]``, those that the vocabulary has."""
        ids = (self.mask_token_id, self.smask_token_id, self.gmask_token_id)
        return [token_id for token_id in ids if token_id is not None]
