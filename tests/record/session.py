"""A folder with tiny models, and the `gmask` command in it: what every part of the record starts from.

Only public names are used, so that the record outlives any move of modules.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import gmask

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"
HAS_VOCABULARIES = (SHARED / "chatglm-tiny" / "model" / "ice_text.model").is_file()
"""Whether the published vocabulary files lie beside this checkout."""

PACKAGE = Path(gmask.__file__).parent
ENVIRONMENT = {
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "GMASK_MATMUL": "torch",  # the product with integers that every machine has
    "HF_HUB_OFFLINE": "1",
    "GMASK_API_KEY": "",
}
BAR = re.compile(r"\d+%\|.*\[.*\]|\d+it \[")
TEXTS = [
    "The old man took his dog and went down to the river. It was a sunny day, and the rainy season was over.",
    "She put the old book on the wooden table. Every morning the baker opens his shop at six.",
    "我今天早上去市场买了一些苹果。小猫喜欢睡觉，小狗喜欢跑步。",
    "今天天气很好，我们去公园散步。他把旧书放在木桌上，然后出门了。",
]
WIDTH, LAYERS = 32, 2
SHAPE = {
    "vocab_size": 448,  # rows; the tokenizer has 440 tokens
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "hidden_act": "gelu_pytorch_tanh",
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
ROLES = {"pad": "[PAD]", "eos": "<|endoftext|>", "mask": "[MASK]", "smask": "[sMASK]", "gmask": "[gMASK]",
         "sop": "<|startofpiece|>", "eop": "<|endofpiece|>"}  # fmt: skip


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Session:
    """Commands that run in one folder, on the CPU, on one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The working directory and the settings that a command runs with."""
        before, threads = Path.cwd(), torch.get_num_threads()
        os.chdir(self.folder)
        torch.set_num_threads(1)
        try:
            with (
                mock.patch.dict(os.environ, ENVIRONMENT),
                mock.patch("torch.cuda.is_available", return_value=False),
                mock.patch("torch.backends.mps.is_available", return_value=False),
                warnings.catch_warnings(),
            ):
                yield
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)

    def run(self, command: str, stdin: str = "") -> Outcome:
        """What ``gmask`` prints, and its exit code. In this process: it takes seconds to start another."""
        out, err = io.StringIO(), io.StringIO()
        with (
            self.entered(),
            mock.patch.object(sys, "argv", ["gmask", *shlex.split(command)]),
            mock.patch.object(sys, "stdin", io.StringIO(stdin)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                runpy.run_module("gmask", run_name="__main__")
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
        return Outcome(code, self.tidy(out.getvalue()), self.tidy(without_bars(err.getvalue())))

    def must(self, command: str) -> Outcome:
        """`run`, where failure would make the rest meaningless."""
        outcome = self.run(command)
        assert outcome.code == 0, f"gmask {command}\n{outcome.err}"
        return outcome

    def tidy(self, text: str) -> str:
        """A text without the places of this machine."""
        places = {self.folder: "<folder>", PACKAGE: "<gmask>", GOLDEN.resolve(): "<golden>"}
        for place, name in places.items():
            text = text.replace(str(place), name)
        return text

    def write(self, name: str, content: str | list[dict[str, Any]]) -> Path:
        """A text file, or one JSON object a line."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
        path.write_text(content, "utf-8")
        return path

    def make_models(self) -> None:
        """`tokenizer`; `tiny`, a GLM with it and weights of our own; `lora` and `ia3`, adapters for it; `golden`.

        With the published vocabularies also whole published folders in miniature, under the names of the golden ones.
        """
        self.write("corpus.txt", "\n".join(TEXTS * 3))
        self.must("train-tokenizer corpus.txt --output tokenizer --vocab-size 440")
        (self.folder / "golden").symlink_to(GOLDEN.resolve(), target_is_directory=True)
        make_glm(self.folder / "tiny", self.folder / "tokenizer")
        make_adapter(self.folder / "lora", kind="LORA")
        make_adapter(self.folder / "ia3", kind="IA3")
        if HAS_VOCABULARIES:
            for name in ("chatglm-tiny", "chatglm-tiny-int4", "chatglm-tiny-int8", "hf-glm-tiny", "hf-glm-10b-tiny"):
                publish(self.folder / name, name)


def without_bars(text: str) -> str:
    """What is left without the progress bars of tqdm."""
    return "".join(line for line in text.splitlines(keepends=True) if not BAR.search(line) and line.strip())


def publish(folder: Path, case: str) -> None:
    """A golden folder with the vocabulary that was published with it."""
    vocabulary = case if case.startswith("hf") else "chatglm-tiny"
    for source in (SHARED / vocabulary / "model", GOLDEN / case / "model"):
        for path in sorted(source.iterdir()):
            if source.is_relative_to(GOLDEN) or not path.name.startswith("pytorch_model"):
                folder.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / path.name)


def special_ids(tokenizer: Path) -> dict[str, int]:
    """The special ids that a config needs, by the tokens' names."""
    known = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return {f"{role}_token_id": known.token_to_id(token) for role, token in ROLES.items()}


def exact_weights(shape: torch.Size, rng: np.random.Generator, scale: float) -> torch.Tensor:
    """Multiples of scale / 512 between -scale and scale: the same bits on every machine."""
    return torch.from_numpy(rng.integers(-512, 513, tuple(shape)).astype(np.float32) * np.float32(scale / 512))


def make_glm(folder: Path, tokenizer: Path, *, model_class: Any = None, **changes: Any) -> None:
    """Weights are large, so that logits are far apart and greedy ids do not hang on rounding.

    The end token is likely, so that some answers end by themselves.
    """
    config = gmask.GLMConfig(**{**SHAPE, **special_ids(tokenizer), **changes})
    model = (model_class or gmask.GLMForConditionalGeneration)(config)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_norm = "norm" in name
            parameter.copy_(exact_weights(parameter.shape, rng, 0.125 if is_norm else 0.5))
            if is_norm and name.endswith("weight"):
                parameter += 1
        states = dict(model.named_parameters())
        (embedding,) = (value for name, value in states.items() if name.endswith("word_embeddings.weight"))
        (bias,) = (value for name, value in states.items() if name.endswith("final_layernorm.bias"))
        bias += 1.25 * embedding[config.eop_token_id]
    model.save_pretrained(folder)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)


def make_adapter(folder: Path, *, kind: str) -> None:
    """An adapter for `tiny` in PEFT's form: products of its numbers are exact in float32, in whatever order summed."""
    folder.mkdir()
    rng = np.random.default_rng(2)

    def numbers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, high + 1, shape) / 16).float()

    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        name = f"base_model.model.glm.transformer.layers.{layer}.attention.query_key_value"
        if kind == "LORA":
            tensors[f"{name}.lora_A.weight"] = numbers(-4, 4, 4, WIDTH)
            tensors[f"{name}.lora_B.weight"] = numbers(-4, 4, 3 * WIDTH, 4)
        else:
            tensors[f"{name}.ia3_l"] = numbers(8, 24, 3 * WIDTH, 1)
    own = (
        {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none"}
        if kind == "LORA"
        else {"feedforward_modules": []}
    )
    settings = {"peft_type": kind, "base_model_name_or_path": "tiny", "target_modules": ["query_key_value"], **own}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
