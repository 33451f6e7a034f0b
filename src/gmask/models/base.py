"""The parts that GLM and ChatGLM share.

In this order: linear layers, attention, trained prefixes, quantized weights, strict loading, the forward pass.
glm.py and chatglm.py have the parts that differ: blocks, positions, and how the layout is derived from the tokens.

A trained prefix is visible to every token, has no position in the layout, and is cached in front of the tokens.

Shape letters: B batch rows, T positions, K key positions (cached ones first), H hidden size, N heads, D head size, L
layers, P prefix length.

Source: Liu et al., "P-Tuning v2", ACL 2022; published code ``PrefixEncoder`` of modeling_chatglm.py.
"""

import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from gmask.errors import GmaskError, one_line
from gmask.files import refuse_placeholder
from gmask.hardware import cpu_instructions, has_bfloat16, is_amd, onednn_from
from gmask.models.cache import GrowingCache, dequantize_states
from gmask.models.layout import block_mask, build_mask, continues, resolve_sequences
from gmask.models.tensor_parallel import check_division, check_processes
from gmask.native import ops as native
from gmask.quantization.linear import QuantizedLayer
from gmask.quantization.quantizer import quantize_model

FLEX = "flex_attention"
"""The name of transformers' attention by PyTorch's flex_attention, which is compiled when it is first called."""


@cache
def lacks_bfloat16() -> bool:
    """Whether this CPU has no instructions for bfloat16."""
    return not has_bfloat16(torch.device("cpu"))


def describe_bfloat16() -> str:
    """Returns a description of what multiplies by bfloat16 weights on this CPU."""
    if not lacks_bfloat16():
        few = f"; up to {few_rows()} rows: the package's C++ kernel" if few_rows() else ""
        return f"torch, by instructions of this CPU{few}"
    if native.instruction_sets():
        return "the package's C++ kernel, in float32"
    return "torch, slower than in float32: this CPU has no instructions for it"


ONEDNN_ROWS = 8
"""From so many rows on, oneDNN multiplies small matrices faster than MKL, too."""


BFLOAT16_ROWS = {"avx512_bf16": 12, "amx": 2}
"""Up to so many rows our kernel multiplies by bfloat16 weights faster than torch, which first lays them out anew."""


@cache
def few_rows() -> int:
    """The entry of `BFLOAT16_ROWS` for this CPU; 0 where nothing was measured, or the kernel was not built."""
    return BFLOAT16_ROWS.get(cpu_instructions(), 0) if "avx512_bf16" in native.instruction_sets() else 0


FLOAT32_ROWS = 16
"""From two to so many rows our kernel multiplies by float32 weights faster than MKL on AMD's CPUs without AVX-512.

MKL copies parts of the weight first, of several rows at once, so that the memory does not see coming what is read next.
"""


@cache
def few_float32_rows() -> int:
    """`FLOAT32_ROWS` on such a CPU; 0 elsewhere, and where the kernel was not built."""
    return FLOAT32_ROWS if cpu_instructions() == "avx2" and is_amd() and "avx2" in native.instruction_sets() else 0


class Linear(nn.Linear):
    """A linear layer that has its products computed by what is fastest on this CPU.

    - A bfloat16 weight: the package's kernel, if the CPU has no instructions for bfloat16, or there are few rows.
    - A float32 weight, few rows: the package's kernel, where MKL is slow.
    - A float32 weight, many rows, no gradients: oneDNN, where MKL is slow (`gmask.hardware.onednn_from`).
    - Else torch's own product.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if type(weight) is not nn.Parameter or not input.is_cpu:
            return F.linear(input, weight, bias)
        rows = input.numel() // self.in_features
        if weight.dtype == torch.float32:
            if rows == 1 or native.is_captured():
                return F.linear(input, weight, bias)
            if rows <= few_float32_rows() and native.can_multiply(input, weight, bias) and not _is_autocast():
                return native.multiply(input, weight, bias)
            if rows >= ONEDNN_ROWS and weight.numel() >= onednn_from() and self._is_plain(input):
                return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")  # type: ignore[no-any-return]
        elif native.can_multiply(input, weight, bias) and (lacks_bfloat16() or rows <= few_rows()):
            return native.multiply(input, weight, bias)
        return F.linear(input, weight, bias)

    def _is_plain(self, input: Tensor) -> bool:
        """Whether the product is one of float32 tensors, without gradients or casts."""
        weight, bias = self.weight, self.bias
        return (
            input.dtype == torch.float32
            and (bias is None or bias.dtype == torch.float32)
            and not (
                torch.is_grad_enabled()
                and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
            )
            and not _is_autocast()
            and torch._C._get_mkldnn_enabled()
        )


def _is_autocast() -> bool:
    return torch.is_autocast_enabled("cpu")


def mask_scores_(scores: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hides, in place, the keys that a query does not see: by a boolean mask (True = visible) or an additive one."""
    lowest = torch.finfo(scores.dtype).min
    if attention_mask is None:
        return scores
    if attention_mask.dtype == torch.bool:
        return scores.masked_fill_(~attention_mask, lowest)
    # In float16 the sum could fall to -inf, and a row that sees nothing to NaN.
    return scores.add_(attention_mask).clamp_(min=lowest)


def eager_attention(
    module: nn.Module,
    query: Tensor,  # B N T D
    key: Tensor,  # B N K D
    value: Tensor,  # B N K D
    attention_mask: Tensor | None,  # B 1 T K, boolean (True = visible) or additive
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch: the reference for the fused kernels, and the only one that returns the weights."""
    scores = mask_scores_(query @ key.transpose(-1, -2) * scaling, attention_mask)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


# A constant of the module, since torch.compile cannot read an attribute of an autograd function.
MATRIX_ATTENTION_KEYS = 256


class MatrixAttention(torch.autograd.Function):
    """Attention without dropout, both ways by matrix products; it keeps queries, keys, values and weights.

    For training in bfloat16 on a CPU: the backward pass of torch's fused kernel makes no use of the instructions of
    bfloat16 there. With rows of 128 tokens both passes take three to four times as long, with 256 up to twice as long.
    """

    @staticmethod
    def takes(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
        """Whether this is the faster way to attend: in training, with bfloat16 on a CPU, over up to 256 keys."""
        is_learnt = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
        is_long = key.shape[2] > MATRIX_ATTENTION_KEYS
        if not is_learnt or query.device.type != "cpu" or is_long or torch.compiler.is_compiling():
            return False
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        return dtype == torch.bfloat16 and not (mask is not None and mask.requires_grad)

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(
        ctx: Any,
        query: Tensor,  # B N T D
        key: Tensor,  # B N K D
        value: Tensor,  # B N K D
        attention_mask: Tensor | None,  # B 1 T K, boolean (True = visible) or additive
        scaling: float,
    ) -> Tensor:
        scores = (query @ key.transpose(-1, -2)).mul_(scaling)
        weights = mask_scores_(scores, attention_mask).softmax(dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scaling = scaling
        return (weights @ value).transpose(1, 2)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # B T N D
        query, key, value, weights = ctx.saved_tensors
        gradient = gradients[0].transpose(1, 2)
        towards = torch._softmax_backward_data(gradient @ value.transpose(-1, -2), weights, -1, weights.dtype)
        towards *= ctx.scaling
        return towards @ key, towards.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ gradient, None, None


class SelfAttention(nn.Module):
    """Multi-head self-attention. Subclasses compute queries, keys and values with ``query_key_value``."""

    is_causal = False  # visibility is in the mask; without a mask every key is visible
    dense: nn.Module  # the output projection

    def __init__(self, config: PreTrainedConfig, layer_idx: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = dropout

    def attend(
        self,
        query: Tensor,  # B N T D
        key: Tensor,  # B N T D
        value: Tensor,  # B N T D
        prefix: Tensor | None,  # 2 N P D
        attention_mask: Any,  # B 1 T K, boolean (True = visible) or additive; or a block mask of packed rows
        past_key_values: Cache | None,
        *,
        keep: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends to the prefix, the cache and the new keys, by the ``attn_implementation`` of the config.

        A single query on a CPU uses the package's own kernel. ``"flex_attention"`` is for packed rows; others use sdpa.

        Args:
            keep: the number of last queries that attend; 0: all. The keys and values of all are cached.

        Returns:
            ``[B, T, H]`` of the T queries that attend, and the weights ``[B, N, T, K]`` if the implementation returns
            them, else None.
        """
        if keep:
            query = query[:, :, -keep:]
            attention_mask = None if attention_mask is None else attention_mask[..., -keep:, :]
        batch, _, length, _ = query.shape
        if prefix is not None:
            key, value = prepend(prefix, key, value)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        by_blocks = implementation == FLEX and not (attention_mask is None or isinstance(attention_mask, Tensor))
        if implementation == FLEX and not by_blocks:
            implementation = "sdpa"  # a cache, or rows of any length
        weights = None
        is_native = implementation == "sdpa" and dropout == 0 and native.can_attend(query, key, value, attention_mask)
        if native.is_rounded(key, self.head_dim) and not is_native:
            key, value = dequantize_states(key, query.dtype), dequantize_states(value, query.dtype)
        if is_native:
            mixed = native.attend(query, key, value, attention_mask, scaling=self.scaling)
        elif implementation == "sdpa" and dropout == 0 and MatrixAttention.takes(query, key, attention_mask):
            mixed = MatrixAttention.apply(query, key, value, attention_mask, self.scaling)  # type: ignore[no-untyped-call]
        else:
            attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
                implementation, eager_attention
            )
            mixed, weights = attention(
                self,
                query,
                key,
                value,
                attention_mask,
                scaling=self.scaling,
                dropout=dropout,
                is_causal=False,
                **kwargs,
            )
            weights = None if by_blocks else weights  # it returns sums in their place
        output: Tensor = self.dense(mixed.reshape(batch, length, -1))
        return output, weights


def stop_dropout(model: nn.Module) -> None:
    """Turns the dropout of a model off for good, that of adapters in it, too.

    Where probabilities of one run are compared with others, they must not hang on which parts chance left out.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, SelfAttention):
            module.attention_dropout = 0.0


RANGES: Mapping[str, tuple[float, float]] = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 17),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 1 << 12),
    "intermediate_size": (1, 1 << 20),
    "max_position_embeddings": (1, 1 << 24),
    "pre_seq_len": (1, 1 << 16),
    "prompt_tokens": (0, 1 << 16),
    "num_labels": (1, 1 << 20),
    "layer_norm_eps": (0, 1),
    "initializer_range": (0, 100),
    "residual_alpha": (-1e6, 1e6),
    "embedding_dropout": (0, 1),
    "attention_dropout": (0, 1),
    "hidden_dropout": (0, 1),
    "classifier_dropout": (0, 1),
}
"""The least and the greatest value of the numbers in a config, with room above any model that was ever made."""

WHOLE = frozenset(name for name, (_, highest) in RANGES.items() if highest >= 1000 and name != "residual_alpha")
"""Those that are whole numbers."""

MAY_BE_NONE = frozenset({"pre_seq_len", "classifier_dropout", "num_labels"})
"""Those that may be None."""

FLAGS = ("block_position_encoding", "position_encoding_2d", "prefix_projection", "tie_word_embeddings", "use_cache")


def check_config_values(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> None:
    """Checks the values of a config before memory or time is spent on them.

    Args:
        values: under their own or their published names; the class has a default for those that are missing.

    Raises:
        ValueError: a number that no model can have, or no number where one is expected.
    """
    found = {config_class.attribute_map.get(name, name): (name, value) for name, value in values.items()}
    for name, (lowest, highest) in RANGES.items():
        said, value = found.get(name, (name, None))
        if name not in found or (value is None and name in MAY_BE_NONE):
            continue
        is_number = isinstance(value, int if name in WHOLE else int | float) and not isinstance(value, bool)
        if not is_number or not lowest <= value <= highest:
            kind = "a whole number" if name in WHOLE else "a number"
            raise ValueError(f"{said} is {value!r:.40}, and must be {kind} from {lowest:,} to {highest:,}")
    for name, (said, value) in found.items():
        if name in FLAGS and not isinstance(value, bool):
            raise ValueError(f"{said} is {value!r:.40}, and must be true or false")
        ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
        if name.endswith("_token_id") and not all(type(one) is int or one is None for one in ids):
            raise ValueError(f"{said} is {value!r:.40}, and must be the id of a token")


class PrefixConfig(Protocol):
    """The part of a model's config that a prefix needs."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    pre_seq_len: int | None
    prefix_projection: bool

    @property
    def head_dim(self) -> int: ...


class PrefixEncoder(nn.Module):
    """``pre_seq_len`` trained keys and values for each layer: a table, or a small network of a table."""

    def __init__(self, config: PrefixConfig) -> None:
        super().__init__()
        assert config.pre_seq_len is not None, "a prefix encoder needs a length"
        self.config = config
        self.length = config.pre_seq_len
        width = 2 * config.num_hidden_layers * config.hidden_size
        if config.prefix_projection:
            self.embedding = nn.Embedding(self.length, config.hidden_size)
            self.trans = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, width),
            )
        else:
            self.embedding = nn.Embedding(self.length, width)

    def table(self) -> Tensor:
        """Returns ``[P, 2 L N D]``: the embedding, or the output of the network for it."""
        table: Tensor = self.trans(self.embedding.weight) if self.config.prefix_projection else self.embedding.weight
        return table

    def forward(self) -> Tensor:
        """Returns ``[2 L, N, P, D]``: key and value of layer 0, of layer 1, ... Keys are not rotated."""
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        return self.table().view(self.length, -1, heads, head_dim).permute(1, 2, 0, 3)


def attach_prefix(model: PreTrainedModel, length: int, *, projection: bool) -> PrefixEncoder:
    """Adds a new prefix in float32 to a GLM or ChatGLM; it replaces an earlier one.

    Its weights are drawn from N(0, initializer_range), as those of the model.
    """
    for config in (model.config, model.base_model.config):  # they differ if the body came from another model
        config.pre_seq_len, config.prefix_projection = length, projection
    encoder = PrefixEncoder(model.config).to(model.device)
    for module in encoder.modules():
        model._init_weights(module)
    model.base_model.prefix_encoder = encoder
    return encoder


def prepend(prefix: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Prepends the keys and values of a layer's prefix ``[2, N, P, D]`` to those of tokens ``[B, N, K, D]``."""
    own_key, own_value = prefix.to(key).unsqueeze(1).expand(-1, len(key), -1, -1, -1)
    return torch.cat((own_key, key), dim=-2), torch.cat((own_value, value), dim=-2)


def show_prefix(mask: Tensor | None, length: int, cache: Cache | None) -> Tensor | None:
    """Prepends the keys of a prefix, all visible, to a mask ``[B, 1, T, K]`` of `build_mask`.

    Args:
        length: P.
        cache: if it is static, K includes the positions of the prefix already, at the end.
    """
    if mask is None:
        return None
    room = -length if cache is not None and cache.is_compileable else 0
    return F.pad(mask, (length, room), value=mask.dtype == torch.bool)  # in an additive mask 0 is visible


class QuantizingMixin:
    """The published method `quantize`, and casts that leave quantized weights and their scales as they are."""

    def quantize(self, bits: int, *, group_size: int | None = None, embeddings: bool = False) -> Self:
        """Quantizes the weights in place: `gmask.quantization.quantizer.quantize_model`."""
        return quantize_model(self, bits=bits, group_size=group_size, embeddings=embeddings)

    def half(self, *args: Any) -> Self:
        return nn.Module.half(self)  # type: ignore[type-var]  # transformers refuses a quantized model

    def float(self, *args: Any) -> Self:
        return nn.Module.float(self)  # type: ignore[type-var]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations, from which that of the scales may differ."""
        named = self.named_parameters()  # type: ignore[attr-defined]
        found = (p.dtype for name, p in named if p.is_floating_point() and not name.endswith("weight_scale"))
        dtype: torch.dtype = next(found)
        return dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, QuantizedLayer):  # integers are not drawn at random
            super()._init_weights(module)  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The differences between the names and shapes of stored tensors and of those that a model needs."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]  # the stored and the wanted shape, by name

    @classmethod
    def of(
        cls,
        missing: Collection[str],
        unexpected: Collection[str],
        shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    ) -> "Mismatch | None":
        """Returns the mismatch; None if nothing differs."""
        differs = missing or unexpected or shapes
        return cls(tuple(sorted(missing)), tuple(sorted(unexpected)), shapes) if differs else None

    @classmethod
    def between(cls, stored: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> "Mismatch | None":
        """Compares two sets of shapes by name; returns None if they are the same."""
        shapes = {
            name: (shape, wanted[name]) for name, shape in stored.items() if name in wanted and shape != wanted[name]
        }
        return cls.of(wanted.keys() - stored.keys(), stored.keys() - wanted.keys(), shapes)

    @property
    def lacks_scales(self) -> bool:
        return any(name.endswith("weight_scale") for name in self.missing)

    def explain(self) -> str:
        """Returns a description of the first difference."""
        if self.lacks_scales:
            scale = next(name for name in self.missing if name.endswith("weight_scale"))
            return f"the weights lack their scales ({scale} ...); download the model again, or quantize it anew"
        if self.missing:
            return f"the weights lack {_name_some(self.missing)}"
        if self.unexpected:
            return f"the weights hold the unexpected {_name_some(self.unexpected)}"
        name, (stored, wanted) = next(iter(self.shapes.items()))
        return f"{name} has the shape {list(stored)}, but the model asks for {list(wanted)}"

    def explain_for(self, model: PreTrainedModel) -> str:
        """Returns a description of the first difference from a model and, if names differ, of its likely cause."""
        if self.lacks_scales or not (self.missing or self.unexpected):
            return self.explain()
        return f"{self.explain()}; they do not fit the config, or are not those of {type(model).__name__}"


def _name_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


LOADING_ERRORS = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError)
QUANTIZERS = ("gguf_file", "quantization_config")
"""Keywords of `from_pretrained` that load other weights than floats: the quantizer chooses their dtype."""

PLACEMENTS = (*QUANTIZERS, "device_map", "distributed_config", "tp_plan", "tp_size")
"""Keywords of `from_pretrained` with which the weights may not all be floats on the CPU."""

OTHER_FILES = ("gguf_file", "key_mapping", "state_dict", "subfolder", "use_safetensors", "variant")
"""Keywords of `from_pretrained` that choose other weights than those of the folder, or rename them."""


class StrictLoadingMixin:
    """`from_pretrained` that raises an error where transformers warns and uses random weights."""

    base_model_prefix: str
    tuned_parts: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the names that tuning adds. A checkpoint may lack all of them, as it may lack the head of a task."""

    check_source: ClassVar[Callable[..., None] | None] = None
    """Checks a folder before it is loaded, as `gmask.load` does. It is set by `gmask.registration`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `transformers.PreTrainedModel.from_pretrained`, but the names and shapes of all weights have to fit.

        The head of a task (not the one that predicts tokens) may be missing as a whole: it is then new, and
        transformers warns as usual. A model without a head ignores the heads of a checkpoint. Without a ``dtype`` the
        weights are float32, as with the published code, for models of any size and on any device (`gmask.load` uses
        bfloat16 on a CPU beyond 3 billion parameters); ``dtype="auto"`` is the stored one.

        Raises:
            GmaskError: missing or unexpected weights, or such of another shape; unreadable files.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        lets_shapes_differ = kwargs.pop("ignore_mismatched_sizes", False)
        if all(kwargs.get(name) is None for name in ("dtype", "torch_dtype", *QUANTIZERS)):
            kwargs["dtype"] = torch.float32
        is_plain = not model_args and not lets_shapes_differ and all(not kwargs.get(name) for name in OTHER_FILES)
        if cls.check_source is not None and is_plain:
            cls.check_source(cls, pretrained_model_name_or_path, **kwargs)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that all differences are known before one is raised
                **kwargs,
            )
        except GmaskError:
            raise
        except Exception as error:  # a Git LFS pointer read as JSON or as an archive raises various errors
            _explain(pretrained_model_name_or_path, error)
            raise
        if not getattr(model, "_hf_peft_config_loaded", False):  # with an adapter, the report is about its weights
            if lets_shapes_differ:
                info = {**info, "mismatched_keys": set()}
            _check(model, info, pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    @classmethod
    def maybe_distribute_model(
        cls, model: PreTrainedModel, distributed_config: DistributedConfig | None, *args: Any
    ) -> PreTrainedModel:
        if distributed_config is not None:
            check_processes(model.config.num_attention_heads, distributed_config.tp_size)
            if model.config.pre_seq_len is not None:
                raise GmaskError("a P-tuning prefix is not divided among processes: run one process")
            check_division(model, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, *args)  # type: ignore[misc]


def new_parts(model: Any) -> tuple[set[str], set[str]]:
    """Returns the names of a task's head and those that tuning adds. A checkpoint may lack either as a whole."""
    names, body = model.state_dict().keys(), (f"{model.base_model_prefix}.", "lm_head.")
    heads = {name for name in names if not name.startswith(body)}
    return heads, {name for name in names if name.startswith(model.tuned_parts)}


def _check(model: Any, info: Mapping[str, Any], source: Any) -> None:
    """Raises `GmaskError` for the first difference in the loading report ``info``, except for heads."""
    prefix = f"{model.base_model_prefix}."
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if hasattr(model, model.base_model_prefix):
        for added in new_parts(model):
            if added <= missing:
                missing -= added
    else:
        parts = (prefix, *(f"{name}." for name, _ in model.named_children()))
        unexpected = {key for key in unexpected if key.startswith(parts)}
    shapes = {key: (stored, wanted) for key, stored, wanted in sorted(info["mismatched_keys"])}
    if mismatch := Mismatch.of(missing, unexpected, shapes):
        raise GmaskError(f"{source}: {mismatch.explain_for(model)}")


def _explain(source: Any, error: Exception) -> None:
    """Raises `GmaskError` if the error comes from the weights of the folder ``source``, not from an argument."""
    folder = Path(str(source)).expanduser()
    if not folder.is_dir():
        return
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        try:
            refuse_placeholder(path)
        except GmaskError as fault:
            raise fault from error
    if (
        isinstance(error, LOADING_ERRORS) and torch.get_default_device().type != "meta"
    ):  # which has a message of its own
        message = f"{folder}: the weights cannot be read, download or copy them again ({one_line(error)})"
        raise GmaskError(message) from error


class PrefixLMPreTrainedModel(StrictLoadingMixin, QuantizingMixin, PreTrainedModel):
    """The attributes that transformers reads, as far as they are the same for both architectures."""

    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers reads these as plain attributes
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_set_attn_implementation_cached_value = True  # else transformers searches the source file of the model

    kv_cache: str | None = None
    """``"int8"`` for keys and values in int8, once a context is read; None for the dtype of the activations."""


class PrefixLMModel(PrefixLMPreTrainedModel):
    """A model without its head: from ids and layout to final hidden states ``[B, T, H]``."""

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layout: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        keep: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the transformer.

        Args:
            input_ids: ``[B, T]``; for a GLM, ``config.prompt_ids`` are the ids of trained vectors.
            attention_mask: ``[B, past + T]`` padding mask (1 = a token), or one of the published forms, which are
                listed at the model's class.
            position_ids: ``[B, 2, T]``, the published name of ``layout``. If they are ``[B, T]``, without a mask and a
                cache, a packed sequence starts at each 0.
            layout: ``[B, 2, T]`` positions in the context and in the answer; by default derived from ``input_ids``.
            sequence_ids: ``[B, T]`` packed sequences, which do not see each other; -1 at padding.
            keep: the number of last positions whose states are computed; 0: all. Not for packed rows.

        Raises:
            ValueError: ids that imply no layout, or positions that the model does not have.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if "cache" in kwargs:
            raise ValueError("continuous batching reads prompts in chunks and causally, which is wrong for a prefix LM")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = GrowingCache(self.config)
        sequence_ids = resolve_sequences(position_ids, attention_mask, sequence_ids, past_key_values)
        published_positions = position_ids is not None and position_ids.ndim == 3
        if published_positions:
            layout = position_ids
        if layout is None:
            layout = self._read_layout(input_ids, attention_mask, sequence_ids, past_key_values)
        self._check_layout(layout, inputs_embeds)
        attention_mask = self._read_mask(
            attention_mask, layout.shape[-1], past_key_values, published_positions=published_positions
        )
        if self._attends_by_blocks(attention_mask, sequence_ids, past_key_values):
            mask: Any = block_mask(layout[:, 1] == 0, cast("Tensor", sequence_ids))
        else:
            mask = build_mask(layout, attention_mask, sequence_ids, past_key_values, dtype=inputs_embeds.dtype)
        prefix = None
        if self.config.pre_seq_len is not None and not continues(past_key_values):
            prefix = self.prefix_encoder().unflatten(0, (-1, 2))  # L 2 N P D
            mask = show_prefix(mask, self.config.pre_seq_len, past_key_values)
        hidden_states = self._run_layers(inputs_embeds, layout, prefix, mask, past_key_values, keep=keep, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _attends_by_blocks(
        self, attention_mask: Tensor | None, sequence_ids: Tensor | None, cache: Cache | None
    ) -> bool:
        """Whether flex_attention reads these rows: packed ones alone, whose one length is compiled once."""
        is_packed = sequence_ids is not None and attention_mask is None and cache is None
        return self.config._attn_implementation == FLEX and is_packed and self.config.pre_seq_len is None

    def _embed(self, input_ids: Tensor | None) -> Tensor:
        """Returns the embeddings ``[B, T, H]`` of ids ``[B, T]``."""
        embedded: Tensor = self.word_embeddings(input_ids)
        return embedded

    def _read_layout(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, sequence_ids: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Derives the layout ``[B, 2, T]`` from the token ids."""
        raise NotImplementedError

    def _check_layout(self, layout: Tensor, inputs_embeds: Tensor) -> None:
        """Raises `ValueError` for a layout that the model cannot take. Rotary positions have no limit."""

    def _read_mask(
        self, attention_mask: Tensor | None, length: int, cache: Cache | None, *, published_positions: bool
    ) -> Tensor | None:
        """Converts a mask in one of the model's published forms into one that `build_mask` takes.

        Args:
            length: T.
            published_positions: True if 3-D ``position_ids`` were given.
        """
        raise NotImplementedError

    def _run_layers(
        self,
        inputs_embeds: Tensor,
        layout: Tensor,
        prefix: Tensor | None,  # L 2 N P D
        mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """Runs the blocks; returns the final hidden states ``[B, T, H]``."""
        raise NotImplementedError


def run_blocks(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    hidden_states: Tensor,
    prefix: Tensor | None,
    *,
    keep: int = 0,
    **kwargs: Any,
) -> Tensor:
    """Runs ``hidden_states [B, T, H]`` through the blocks, each with its part of the prefix ``[L, 2, N, P, D]``.

    With ``keep`` it returns the last ``keep`` positions ``[B, keep, H]``: of the others the last block computes the
    keys and values alone.
    """
    for index, block in enumerate(blocks):
        # The prefix is no keyword: reentrant gradient checkpointing drops the gradients of keywords.
        own = None if prefix is None else prefix[index]
        if 0 < keep < hidden_states.shape[1] and index == len(blocks) - 1:
            kwargs["keep"] = keep
        hidden_states = block(hidden_states, own, **kwargs)
    return hidden_states
