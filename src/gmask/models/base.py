"""What both architectures share: attention, prefixes, quantized weights, strict loading, tensor parallelism.

A prefix is seen by every token, takes no place in the layout, and is held by the cache like the tokens behind it.

Tensor parallelism: the plans stand beside the config and the classes (`base_model_tp_plan`, `_tp_plan`): blocks are
divided by heads and by columns of the MLP, the vocabulary by rows (the embeddings and the tied head alike; logits are
gathered); norms and position tables are whole in every process. Integers are divided as the weights are that they stand
for, scales as the rows or columns that share them (`WeightQuantizer.update_parallel_plan`); quantized embeddings are
whole.

Shape letters: B rows, T positions, K key positions (cached ones first), N heads, D head size, L layers, P prefix
length.

Source: Liu et al., "P-Tuning v2", ACL 2022; published code ``PrefixEncoder`` of modeling_chatglm.py.
"""

import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import PackedColwiseParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gmask.errors import GmaskError, one_line
from gmask.files import LFS_POINTER
from gmask.native import ops as native
from gmask.quantization.linear import QuantizedLayer
from gmask.quantization.quantizer import parallel_rule, quantize_model, quantized_layers


class AttentionModule(Protocol):
    """What the kernels read of an attention layer."""

    config: PreTrainedConfig
    scaling: float


def attend(
    module: AttentionModule,
    query: Tensor,  # B N T D
    key: Tensor,  # B N K D
    value: Tensor,  # B N K D
    attention_mask: Tensor | None,  # B 1 T K, boolean (True = visible) or additive
    *,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the config's ``attn_implementation`` says; a single query on a CPU has a kernel of its own.

    Returns:
        ``[B, T, N, D]``, and the weights ``[B, N, T, K]`` where the implementation gives them.
    """
    implementation = module.config._attn_implementation
    if implementation == "sdpa" and dropout == 0 and native.can_attend(query, key, value, attention_mask):
        return native.attend(query, key, value, attention_mask, scaling=module.scaling), None
    attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, eager_attention
    )
    return attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.scaling,
        dropout=dropout,
        is_causal=False,
        **kwargs,
    )


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
    """Attention written out: the plain twin of the fused kernels, and the one that returns the weights."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        # In float16 the sum could fall to -inf, and a row that sees nothing to NaN.
        scores = (scores + attention_mask).clamp(min=torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class PrefixConfig(Protocol):
    """What a prefix needs to know of a model."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    pre_seq_len: int | None
    prefix_projection: bool

    @property
    def head_dim(self) -> int: ...


class PrefixEncoder(nn.Module):
    """``pre_seq_len`` keys and values for each layer, from a table or from a table and a small network."""

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
        """``[P, 2 L N D]``: what the network makes of the embedding, or that itself."""
        table: Tensor = self.trans(self.embedding.weight) if self.config.prefix_projection else self.embedding.weight
        return table

    def forward(self) -> Tensor:
        """``[2 L, N, P, D]``: key and value of layer 0, of layer 1, ... Keys are not rotated."""
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        return self.table().view(self.length, -1, heads, head_dim).permute(1, 2, 0, 3)


def attach_prefix(model: PreTrainedModel, length: int, *, projection: bool) -> PrefixEncoder:
    """Gives a GLM or ChatGLM a new prefix in float32, in place of one that it may have.

    Its weights are drawn as those of the model were, from N(0, initializer_range).
    """
    for config in (model.config, model.base_model.config):  # two, where a head was put on the body of another model
        config.pre_seq_len, config.prefix_projection = length, projection
    encoder = PrefixEncoder(model.config).to(model.device)
    for module in encoder.modules():
        model._init_weights(module)
    model.base_model.prefix_encoder = encoder
    return encoder


def prepend(prefix: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, N, K, D]`` behind those ``[2, N, P, D]`` of a layer's prefix."""
    own_key, own_value = prefix.to(key).unsqueeze(1).expand(-1, len(key), -1, -1, -1)
    return torch.cat((own_key, key), dim=-2), torch.cat((own_value, value), dim=-2)


def show_prefix(mask: Tensor | None, length: int, cache: Cache | None) -> Tensor | None:
    """A mask ``[B, 1, T, K]`` of `build_mask` with the keys of a prefix, all visible, in front.

    Args:
        length: of the prefix.
        cache: a static one has room for the prefix already, at the end.
    """
    if mask is None:
        return None
    room = -length if cache is not None and cache.is_compileable else 0
    return F.pad(mask, (length, room), value=mask.dtype == torch.bool)  # an additive one hides nothing with 0


def check_division(model: Any, processes: int) -> None:
    """Raises `GmaskError` for integers that cannot be divided among processes."""
    for name, layer in quantized_layers(model):
        if not model.hf_quantizer.pre_quantized:
            raise GmaskError(
                "weights are not quantized while they are divided among processes: write them with gmask quantize, and "
                "name that folder"
            )
        together = layer.group_size or 8 // layer.bits  # columns that share a scale, or a byte
        if model.tp_plan.get(parallel_rule(name)) == "rowwise" and layer.in_features % (together * processes):
            raise GmaskError(
                f"the {layer.in_features} columns of {name} lie in groups of {together}, which cannot be divided among "
                f"{processes} processes: run fewer, or quantize in smaller groups"
            )


class QuantizingMixin:
    """``quantize`` as published; casts that leave integers and scales alone."""

    def quantize(self, bits: int, *, group_size: int | None = None, embeddings: bool = False) -> Self:
        """Quantizes the weights in place: `gmask.quantization.quantizer.quantize_model`."""
        return quantize_model(self, bits=bits, group_size=group_size, embeddings=embeddings)

    def half(self, *args: Any) -> Self:
        return nn.Module.half(self)  # type: ignore[type-var]  # transformers refuses a quantized model

    def float(self, *args: Any) -> Self:
        return nn.Module.float(self)  # type: ignore[type-var]

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations; scales have one of their own."""
        named = self.named_parameters()  # type: ignore[attr-defined]
        found = (p.dtype for name, p in named if p.is_floating_point() and not name.endswith("weight_scale"))
        dtype: torch.dtype = next(found)
        return dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, QuantizedLayer):  # integers only come from files
            super()._init_weights(module)  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How the tensors of a file differ from those that are wanted."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]  # stored and wanted, by name

    @classmethod
    def of(
        cls,
        missing: Collection[str],
        unexpected: Collection[str],
        shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    ) -> "Mismatch | None":
        """None if nothing differs."""
        differs = missing or unexpected or shapes
        return cls(tuple(sorted(missing)), tuple(sorted(unexpected)), shapes) if differs else None

    @classmethod
    def between(cls, stored: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> "Mismatch | None":
        """Of two sets of shapes, by name; None if they are the same."""
        shapes = {
            name: (shape, wanted[name]) for name, shape in stored.items() if name in wanted and shape != wanted[name]
        }
        return cls.of(wanted.keys() - stored.keys(), stored.keys() - wanted.keys(), shapes)

    @property
    def lacks_scales(self) -> bool:
        return any(name.endswith("weight_scale") for name in self.missing)

    def explain(self) -> str:
        """The first difference."""
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
        """The first difference from a model, and what one of names may come from."""
        if self.lacks_scales or not (self.missing or self.unexpected):
            return self.explain()
        return f"{self.explain()}; they do not fit the config, or are not those of {type(model).__name__}"


def _name_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError)
PLACEMENTS = ("device_map", "distributed_config", "gguf_file", "quantization_config", "tp_plan", "tp_size")
"""Keywords of `from_pretrained` by which the weights may go elsewhere than to the CPU, or be no floats."""

OTHER_FILES = ("gguf_file", "key_mapping", "state_dict", "subfolder", "use_safetensors", "variant")
"""Keywords of `from_pretrained` by which the weights are not simply those of the folder."""


class StrictLoadingMixin:
    """Makes `from_pretrained` exact where transformers' own warns and goes on with random weights."""

    base_model_prefix: str
    tuned_parts: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the keys that tuning adds: a checkpoint may lack them as a whole, like a head for a task."""

    check_source: ClassVar[Callable[..., None] | None] = None
    """Refuses a folder before it is loaded, as `gmask.load` does; whoever knows how checkpoints are read sets it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `transformers.PreTrainedModel.from_pretrained`, but every weight must be there, be known, and fit.

        A head for a task (not the one that predicts tokens) may be absent as a whole: it is then new, and transformers
        warns as usual. A model without a head leaves those of a checkpoint aside. Without a ``dtype`` the weights are
        float32, as with the published code, whatever their number (`gmask.load` takes bfloat16 on a CPU for more than
        3 billion); ``dtype="auto"`` takes the stored one.

        Raises:
            GmaskError: missing, unexpected or ill-shaped weights, which are named; unreadable files.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        lets_shapes_differ = kwargs.pop("ignore_mismatched_sizes", False)
        if all(kwargs.get(name) is None for name in ("dtype", "torch_dtype", *PLACEMENTS)):
            kwargs["dtype"] = torch.float32
        is_plain = not model_args and not lets_shapes_differ and all(not kwargs.get(name) for name in OTHER_FILES)
        if cls.check_source is not None and is_plain:
            cls.check_source(cls, pretrained_model_name_or_path, **kwargs)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that all faults are known before one is raised
                **kwargs,
            )
        except GmaskError:
            raise
        except Exception as error:  # a pointer read as JSON or as an archive fails in as many ways
            _explain(pretrained_model_name_or_path, error)
            raise
        if not getattr(model, "_hf_peft_config_loaded", False):  # else the report is on the adapter's weights
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


def check_processes(heads: int, processes: int) -> None:
    """Raises `GmaskError` for a number of processes that would have to cut a head."""
    if heads % processes:
        fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise GmaskError(
            f"{heads} attention heads cannot be divided among {processes} processes: start one of {fitting} processes"
        )


def _check(model: Any, info: Mapping[str, Any], source: Any) -> None:
    """Raises for what the loading report `info` says is amiss, but for heads."""
    prefix = f"{model.base_model_prefix}."
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if hasattr(model, model.base_model_prefix):
        keys = model.state_dict().keys()
        heads = {key for key in keys if not key.startswith((prefix, "lm_head."))}
        for added in (heads, {key for key in keys if key.startswith(model.tuned_parts)}):
            if added <= missing:
                missing -= added
    else:
        parts = (prefix, *(f"{name}." for name, _ in model.named_children()))
        unexpected = {key for key in unexpected if key.startswith(parts)}
    shapes = {key: (stored, wanted) for key, stored, wanted in sorted(info["mismatched_keys"])}
    if mismatch := Mismatch.of(missing, unexpected, shapes):
        raise GmaskError(f"{source}: {mismatch.explain_for(model)}")


def _explain(source: Any, error: Exception) -> None:
    """Raises a `GmaskError` if the weights of the folder `source` are at fault, rather than an argument."""
    folder = Path(str(source)).expanduser()
    if not folder.is_dir():
        return
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise GmaskError(
                    f"{path}: a Git LFS pointer, not the weights: run `git lfs pull` there, or download the file"
                ) from error
    if isinstance(error, UNREADABLE):
        reason = one_line(error)
        raise GmaskError(f"{folder}: the weights cannot be read, download or copy them again ({reason})") from error


class ThirdsColwiseParallel(PackedColwiseParallel):
    """Divides a fused projection ``q|k|v`` by rows within each third, its bias too: every process has whole heads."""

    def __init__(self) -> None:
        super().__init__(split_factor=3)

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters.get(param)
        if whole is None:
            return
        placement = _StridedShard(dim=0, split_factor=self.split_factor)  # transformers' own divides the bias plainly
        module._parameters[param] = nn.Parameter(
            distribute_tensor(whole, mesh, [placement], src_data_rank=None), requires_grad=whole.requires_grad
        )


ALL_PARALLEL_STYLES.register("colwise_thirds", ThirdsColwiseParallel())
