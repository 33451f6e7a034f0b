"""Several adapters on one model, of which each row of a batch goes through one.

LoRA adds to the linear layers: PEFT's layers are given the name of an adapter for each row. A prefix (P-tuning v2) is
keys and values in front of those of a row. Hooks do both, so that the code that runs the model need not know of
adapters.

Shape letters: L layers, N heads, P prefix length, D head size.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmask.checkpoints.adapters import (
    PREFIX_TUNING,
    WRAPPER,
    Adapter,
    has_layers,
    load_adapter,
    read_adapter,
    require_peft,
)
from gmask.errors import GmaskError, one_line
from gmask.files import check_text
from gmask.models.cache import GrowingCache
from gmask.models.layout import continues

BASE = "__base__"
"""PEFT's name for the model without an adapter."""


class AdapterSet:
    """Adapters of one model, by name. `only` and `rows` choose among them; else a pass goes through the model alone.

    Attributes:
        names: of the adapters, in the order in which they were given.
    """

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        """Reads the adapters of folders, and adds them and the hooks that choose among them to the model.

        Raises:
            GmaskError: a folder that is missing, damaged, or for another model; a kind of adapter that cannot be chosen
                by row; a model that has a fixed adapter already; a name with half of a character.
        """
        for name in folders:
            check_text(name, "the name of an adapter")
        self.model = model
        self.names = tuple(folders)
        self._prefixes: dict[str, Tensor] = {}  # L 2 N P D
        self._layers: dict[str, str] = {}  # PEFT's name by ours, which may hold characters that PEFT does not take
        self._tuner: Any = None  # PEFT's object that holds the layers
        self._thread = threading.local()
        if not folders:
            return
        if has_layers(model) or model.config.pre_seq_len is not None or getattr(model.config, "prompt_tokens", None):
            raise GmaskError("the model has an adapter for good, and takes no others beside it")
        for name, folder in folders.items():
            self._read(name, folder.expanduser())
        model.base_model.register_forward_pre_hook(self._put_prefix, with_kwargs=True)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.register_forward_pre_hook(self._name_rows, with_kwargs=True)
        model.eval()

    def prefix_length(self, name: str | None) -> int:
        """The number of positions that an adapter adds to the keys and values of a row."""
        return self._prefixes[name].shape[-2] if name in self._prefixes else 0

    @contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """Within it, every row of this thread's passes goes through one adapter; None: through the model alone."""
        with self._choose(name):
            yield

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it, each row of this thread's passes goes through the adapter of its name.

        The passes are decoding steps: a prefix is in the cache since the context was read.
        """
        with self._choose([self._layers.get(name or "", BASE) for name in names]):
            yield

    @contextmanager
    def _choose(self, chosen: "str | list[str] | None") -> Iterator[None]:
        before = getattr(self._thread, "chosen", None)
        self._thread.chosen = chosen
        try:
            yield
        finally:
            self._thread.chosen = before

    def _read(self, name: str, folder: Path) -> None:
        adapter = read_adapter(folder)
        if adapter.kind == PREFIX_TUNING:
            self._prefixes[name] = self._read_prefix(folder)
        elif adapter.kind == "LORA" and not adapter.values.get("use_dora") and not adapter.whole_parts():
            self._layers[name] = f"adapter{len(self._layers)}"
            self._read_layers(adapter, self._layers[name])
        else:
            raise GmaskError(
                f"{folder}: only LoRA and prefixes can be chosen by request: load this one alone, without NAME="
            )

    def _read_prefix(self, folder: Path) -> Tensor:
        body, config = self.model.base_model, self.model.config
        load_adapter(self.model, folder)
        with torch.no_grad():
            prefix: Tensor = body.prefix_encoder().unflatten(0, (-1, 2)).to(self.model.dtype)
        del body.prefix_encoder
        config.pre_seq_len, config.prefix_projection = None, False
        return prefix

    def _read_layers(self, adapter: Adapter, own_name: str) -> None:
        peft = require_peft()
        adapter.check_base(self.model.config, Path(self.model.name_or_path))
        adapter.check_weights(self.model)
        tensors = {name.removeprefix(WRAPPER): tensor for name, tensor in adapter.read().items()}
        try:
            config = peft.PeftConfig.from_peft_type(**{**adapter.values, "inference_mode": True})
            if self._tuner is None:
                self._tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](self.model, config, own_name)
            else:
                self._tuner.peft_config[own_name] = config
                self._tuner.inject_adapter(self.model, own_name)
            found = peft.set_peft_model_state_dict(self.model, tensors, adapter_name=own_name)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise GmaskError(f"{adapter.folder}: cannot be put into this model ({one_line(error)})") from error
        missing = [key for key in found.missing_keys if f".{own_name}." in key]
        if wrong := [*missing, *found.unexpected_keys]:
            raise GmaskError(f"{adapter.folder}: does not fit at {wrong[0]}: it was trained for another model")

    def _name_rows(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        chosen = getattr(self._thread, "chosen", None)
        if not isinstance(chosen, list):
            chosen = [self._layers.get(chosen or "", BASE)] * len(args[0])
        return args, {**kwargs, "adapter_names": chosen}

    def _put_prefix(self, body: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        chosen = getattr(self._thread, "chosen", None)
        cache = kwargs.get("past_key_values")
        if not isinstance(chosen, str) or chosen not in self._prefixes or continues(cache):
            return None
        cache = GrowingCache(self.model.config) if cache is None else cache
        rows = len(kwargs["input_ids"])
        for index, (keys, values) in enumerate(self._prefixes[chosen]):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return args, {**kwargs, "past_key_values": cache}
