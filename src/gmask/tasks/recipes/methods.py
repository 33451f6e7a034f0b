"""Which parts of a model are trained, and how many numbers are added to it for that?"""

import dataclasses
import math
from typing import Literal, get_args

from gmask.errors import GmaskError

Method = Literal[
    "full", "frozen-embeddings", "lora", "dora", "adalora", "ia3", "qlora", "p-tuning-v2", "p-tuning"
]  # fmt: skip
"""Source: lora: Hu et al., ICLR 2022; dora: Liu et al., ICML 2024; adalora: Zhang et al., ICLR 2023; ia3: Liu et al.,
NeurIPS 2022; qlora: Dettmers et al., NeurIPS 2023 (LoRA beside integers); p-tuning-v2: Liu et al., ACL 2022 (a prefix
before every layer); p-tuning: Liu et al., "GPT Understands, Too", 2021 (trained vectors in the text);
frozen-embeddings: the published Hugging Face class, where the word embeddings are a buffer."""

PromptNetwork = Literal["lstm", "mlp", "none"]

LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The linear layers of a block, in GLM and ChatGLM."""

LOW_RANK: tuple[Method, ...] = ("lora", "dora", "adalora", "qlora")

OWNERS: dict[str, tuple[Method, ...]] = {
    "rank": LOW_RANK,
    "alpha": LOW_RANK,
    "dropout": LOW_RANK,
    "targets": LOW_RANK,
    "prefix_length": ("p-tuning-v2",),
    "projection": ("p-tuning-v2",),
    "prompt_tokens": ("p-tuning",),
    "prompt_encoder": ("p-tuning",),
}
"""The methods that a setting means something to."""

RATES: dict[Method, tuple[float, float]] = {
    "full": (1e-5, 2e-3),  # the upper end for small models
    "frozen-embeddings": (1e-5, 2e-3),
    "lora": (1e-4, 2e-3),
    "dora": (1e-4, 2e-3),
    "adalora": (1e-4, 5e-3),
    "qlora": (1e-4, 2e-3),
    "ia3": (1e-3, 3e-2),
    "p-tuning-v2": (3e-3, 3e-2),
    "p-tuning": (5e-4, 1e-2),
}
"""Learning rates that the methods are usually given, lowest and highest."""

USUAL_RATES: dict[Method, float] = {
    "full": 2e-5, "frozen-embeddings": 2e-5, "lora": 2e-4, "dora": 2e-4, "adalora": 1e-3, "qlora": 2e-4, "ia3": 3e-3,
    "p-tuning-v2": 2e-2, "p-tuning": 1e-3,
}  # fmt: skip
"""One of them for each; that of p-tuning-v2 is the published one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What is trained.

    Raises:
        GmaskError: an unknown method, a value out of range, or a setting of another method.
    """

    name: Method = "lora"
    rank: int = 8  # of the change of a weight; for adalora, that which remains on average
    alpha: float | None = None  # the change is scaled by alpha / rank; twice the rank by default
    dropout: float = 0.0  # of what the change is computed from
    targets: str | tuple[str, ...] = "query_key_value"  # linear layers of a block, or all-linear
    prefix_length: int = 128  # keys and values before each layer, as published
    projection: bool = False  # whether a network computes the prefix
    prompt_tokens: int = 8  # trained vectors in the text
    prompt_encoder: PromptNetwork = "lstm"  # the network that they come out of

    def __post_init__(self) -> None:
        _check_word(self.name, get_args(Method), "name")
        _check_word(self.prompt_encoder, get_args(PromptNetwork), "prompt_encoder")
        for field in dataclasses.fields(self):
            owners = OWNERS.get(field.name)
            if owners and self.name not in owners and getattr(self, field.name) != field.default:
                raise GmaskError(f"method.{field.name} belongs to {_join(owners)}, not to {self.name}: leave it out")
        for name in ("rank", "prefix_length", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise GmaskError(f"method.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise GmaskError(f"method.dropout must be from 0 to below 1, not {self.dropout}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise GmaskError(f"method.alpha must be above 0 and finite, not {self.alpha}")
        self._read_targets()

    def _read_targets(self) -> None:
        """Checks ``targets``, and makes a tuple of the list that YAML has."""
        if not isinstance(self.targets, str | list | tuple) or not self.targets:
            raise GmaskError(
                f"method.targets is {self.targets!r}: expected {_join((*LINEARS, 'all-linear'))}, or a list"
            )
        for name in (self.targets,) if isinstance(self.targets, str) else self.targets:
            _check_word(name, (*LINEARS, "all-linear"), "targets")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """Alpha of the low-rank methods."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def layers(self) -> tuple[str, ...]:
        """The linear layers that ``targets`` names, each once."""
        names = (self.targets,) if isinstance(self.targets, str) else self.targets
        return LINEARS if "all-linear" in names else tuple(dict.fromkeys(names))

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        """The linear layers of a block that something is put around."""
        if self.name == "ia3":
            return ("query_key_value", "dense_4h_to_h")
        return self.layers if self.name in LOW_RANK else ()

    @property
    def first_rank(self) -> int:
        """The rank of a change when training begins; adalora drops ranks, and starts with half as many again."""
        return self.rank + (self.rank + 1) // 2 if self.name == "adalora" else self.rank

    @property
    def makes_adapter(self) -> bool:
        """Whether the trained numbers are kept beside the model, in a folder of their own."""
        return self.name not in ("full", "frozen-embeddings")


def check_model(method: MethodSettings, *, is_quantized: bool, is_glm: bool) -> None:
    """Raises `GmaskError` for a method that cannot train such a model."""
    if method.name == "qlora" and not is_quantized:
        raise GmaskError(
            "qlora is lora beside integers: set model.quantize (or --quantize) to int8 or int4, or choose lora"
        )
    if is_quantized and method.name == "dora":
        raise GmaskError(
            "dora needs the norms of the float weights: leave model.quantize (or --quantize) out, or choose qlora"
        )
    if is_quantized and not method.makes_adapter:
        raise GmaskError(
            "integers cannot be trained: leave model.quantize (or --quantize) out, or choose qlora or p-tuning-v2"
        )
    if method.name == "p-tuning" and not is_glm:
        raise GmaskError("p-tuning trains vectors in the texts of a GLM; for a ChatGLM choose p-tuning-v2")


def hint_learning_rate(method: Method, rate: float) -> str | None:
    """Advice on a learning rate that is far from what a method is usually given; None for one that is not."""
    low, high = RATES[method]
    if low <= rate <= high:
        return None
    others = [name for name, (least, most) in RATES.items() if least <= rate <= most and name != method]
    nearest = min(others, key=lambda name: abs(math.log(rate / USUAL_RATES[name])), default=None)
    likely = f", {rate:g} is one for {nearest}" if nearest else ""
    return f"a learning rate of {rate:g} is unusual for {method}: {low:g} to {high:g} is common{likely}"


def _check_word(value: object, known: tuple[str, ...], name: str) -> None:
    if value not in known:
        raise GmaskError(f"method.{name} is {value!r}: choose {_join(known)}")


def _join(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
