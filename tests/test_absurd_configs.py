"""Is a config.json with numbers that no model has refused in one line, before memory or time is spent on it?"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gmask import cli
from gmask.models.chatglm import ChatGLMConfig
from gmask.models.glm import GLMConfig
from tiny_folder import make_folder

VERBS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "infill": lambda folder, out: ["--model", folder, "It is [MASK]."],
    "info": lambda folder, out: [folder],
    "estimate": lambda folder, out: [folder],
    "convert": lambda folder, out: [folder, out, "--to", "huggingface"],
    "quantize": lambda folder, out: [folder, out, "--bits", "8"],
}
CHANGES = {
    "no heads": {"num_attention_heads": 0},
    "negative width": {"hidden_size": -256},
    "huge width": {"hidden_size": 10**30},
    "half a layer": {"num_hidden_layers": 1.5},
    "a billion layers": {"num_hidden_layers": 10**9},
    "a billion layers by the published name": {"num_layers": 10**9},
    "a billion labels": {"num_labels": 10**9},
    "no number": {"vocab_size": float("nan")},
    "without end": {"max_position_embeddings": float("inf")},
    "a text": {"hidden_size": "wide"},
    "null": {"num_attention_heads": None},
    "a list": {"vocab_size": [448]},
    "true": {"num_hidden_layers": True},
    "an unknown activation": {"hidden_act": "sine"},
    "an unknown dtype": {"dtype": "float99"},
    "a negative id": {"sop_token_id": -1},
    "a text as an id": {"eop_token_id": "end"},
    "a dropout above 1": {"attention_dropout": 7},
    "a wrong class list": {"id2label": 3},
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", CHANGES)
def test_an_absurd_number_is_one_line(
    ours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    verb: str,
) -> None:
    folder = shutil.copytree(ours, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **CHANGES[name]}))
    message = fail(monkeypatch, capsys, verb, *VERBS[verb](folder, tmp_path / "out"))
    assert "config.json" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "{" + '"a": 1,' * 10, ""], ids=["deep", "nested", "cut", "empty"]
)
@pytest.mark.parametrize("verb", ["infill", "info"])
def test_a_config_that_is_no_json_is_one_line(
    ours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    verb: str,
) -> None:
    folder = shutil.copytree(ours, tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert "config.json" in fail(monkeypatch, capsys, verb, *VERBS[verb](folder, tmp_path / "out"))


@pytest.mark.parametrize("config_class", [GLMConfig, ChatGLMConfig])
@pytest.mark.parametrize(
    "values", [{"num_layers": 10**9}, {"hidden_size": 0}, {"layer_norm_eps": -1.0}, {"num_labels": 0}]
)
def test_a_config_made_by_hand_is_checked_too(config_class: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))} is .* and must be"):
        config_class(**values)


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error of the command line."""
    monkeypatch.setattr(sys, "argv", ["gmask", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    _, told = capsys.readouterr()
    assert exit.value.code == 2, told
    assert len(told.strip().splitlines()) == 1, told
    return told
